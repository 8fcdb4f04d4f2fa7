//! The `.env` file in the working directory, which means what it means to `docker compose`.

mod error;
mod expand;
mod parse;

use std::{ffi::OsString, fmt::Write, fs, io, path::Path};

pub(crate) use self::error::DotenvError;
use self::parse::parse;

const FILE: &str = ".env";

/// Sets the variables of `.env` that `environment` does not contain, if there is such a file.
/// Invalid lines are skipped, except those of a variable that `is_read` by this program.
pub(crate) fn load(
    environment: impl Fn(&str) -> Option<OsString>,
    is_read: impl Fn(&str) -> bool,
) -> Result<(), DotenvError> {
    let Some(text) = read(Path::new(FILE))? else {
        return Ok(());
    };
    let lookup = |name: &str| environment(name)?.into_string().ok();
    let mut assignments = String::new();
    for (name, value) in parse(&text, lookup, is_read)? {
        if environment(&name).is_none() && can_be_set(&name) {
            push_assignment(&mut assignments, &name, &value);
        }
    }
    // This crate forbids `unsafe`, which setting a variable is.
    dotenvy::from_read(assignments.as_bytes()).map_err(|error| match error {
        dotenvy::Error::Io(error) => DotenvError::Io(error),
        error => DotenvError::Io(io::Error::other(error)),
    })
}

/// Returns the text of the file; `None` if there is none. A directory of this name, such as a
/// virtual environment of Python, is no file. A working directory that this user may not search,
/// such as that of the image for another user, has none. Invalid UTF-8 becomes U+FFFD, because
/// only the lines that contain it are invalid.
fn read(path: &Path) -> Result<Option<String>, DotenvError> {
    let entry = fs::symlink_metadata(path);
    if entry.is_err_and(|error| error.kind() == io::ErrorKind::PermissionDenied) {
        return Ok(None);
    }
    match fs::metadata(path) {
        Ok(metadata) if metadata.is_file() => {}
        Ok(_) => return Ok(None),
        Err(error) => {
            use io::ErrorKind::{NotADirectory, NotFound};
            let is_missing = matches!(error.kind(), NotFound | NotADirectory);
            return if is_missing { Ok(None) } else { Err(DotenvError::Io(error)) };
        }
    }
    let bytes = fs::read(path).map_err(DotenvError::Io)?;
    if matches!(*bytes, [0xff, 0xfe, ..] | [0xfe, 0xff, ..]) {
        return Err(DotenvError::Utf16);
    }
    Ok(Some(String::from_utf8_lossy(&bytes).into_owned()))
}

/// Returns `true` for the names of variables that programs read.
fn can_be_set(name: &str) -> bool {
    let is_first = |c: char| c.is_ascii_alphabetic() || c == '_';
    name.starts_with(is_first) && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
}

/// Appends an assignment whose value dotenvy takes literally.
fn push_assignment(assignments: &mut String, name: &str, value: &str) {
    // Writing to a string cannot fail.
    let _ = write!(assignments, "{name}=\"");
    for character in value.chars() {
        match character {
            '\n' => assignments.push_str("\\n"),
            '\\' | '"' | '$' => assignments.extend(['\\', character]),
            character => assignments.push(character),
        }
    }
    assignments.push_str("\"\n");
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    #[test]
    fn dotenvy_takes_assignments_literally() {
        let values = ["", "a", " a ", "p%40/:#@ $HOME ?&=+", "'\"\\$x\\n", "a\nb\r\n#c\n", "é${x}"];
        let mut assignments = String::new();
        for (index, value) in values.iter().enumerate() {
            push_assignment(&mut assignments, &format!("V{index}"), value);
        }
        let read: Result<Vec<_>, _> = dotenvy::from_read_iter(assignments.as_bytes()).collect();
        let read: HashMap<_, _> = read.expect("valid").into_iter().collect();
        for (index, value) in values.iter().enumerate() {
            assert_eq!(read[&format!("V{index}")], *value);
        }
    }
}
