//! The rules that the sources of this crate follow.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

/// A module without its comments and unit tests.
struct Module {
    name: String,
    code: String,
}

fn src() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src")
}

fn modules() -> Vec<Module> {
    let files = fs::read_dir(src()).expect("src").map(|entry| entry.expect("an entry").path());
    let modules = files.filter(|path| path.extension().is_some_and(|it| it == "rs")).map(|path| {
        let text = fs::read_to_string(&path).expect("a source file");
        let code = text.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default();
        let is_code = |line: &&str| !line.trim_start().starts_with("//");
        let code = code.lines().filter(is_code).collect::<Vec<_>>().join("\n");
        Module { name: path.file_stem().expect("a name").to_string_lossy().into_owned(), code }
    });
    modules.filter(|module| module.name != "lib").collect()
}

/// The modules in the order of the list in `lib.rs`.
fn layout() -> Vec<String> {
    let text = fs::read_to_string(src().join("lib.rs")).expect("lib.rs");
    let (_, rest) = text.split_once("//! # Layout\n").expect("the layout");
    let list = rest.split("//! # ").next().unwrap_or(rest);
    let items = list.lines().filter_map(|line| line.strip_prefix("//! - ")?.split(": ").next());
    items.flat_map(|item| item.split(", ").map(|name| name.trim_matches('`').to_owned())).collect()
}

/// The modules that the code imports by paths that begin with `crate::`.
fn imports(code: &str) -> BTreeSet<String> {
    let paths = code.split("crate::").skip(1);
    let mut names: BTreeSet<_> = paths.flat_map(first_segments).collect();
    names.retain(|name| name.starts_with(char::is_lowercase));
    names
}

/// The first segments of `a::B` or `{a::{self, b}, c::D}`, up to its end.
fn first_segments(path: &str) -> Vec<String> {
    let mut segments = Vec::new();
    let (mut depth, mut segment, mut is_first) = (0, String::new(), true);
    for c in path.chars() {
        if c.is_alphanumeric() || c == '_' {
            segment.push(c);
            continue;
        }
        let ended = std::mem::take(&mut segment);
        if is_first && depth <= 1 && !ended.is_empty() {
            segments.push(ended);
        }
        match c {
            ':' => is_first = false,
            ',' => is_first = true,
            '{' => (depth, is_first) = (depth + 1, true),
            '}' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            break;
        }
    }
    segments
}

#[test]
fn imports_are_found() {
    let code =
        "use crate::{\n    App, dirs::{self, A},\n    lock::Lock,\n};\nlet a = crate::app::B;";
    assert_eq!(imports(code), ["app", "dirs", "lock"].map(str::to_owned).into());
}

#[test]
fn modules_import_only_those_above_them_in_the_layout() {
    let layout = layout();
    let position = |name: &str| layout.iter().position(|it| it == name);
    let modules = modules();
    assert_eq!(layout.len(), modules.len(), "the layout lists each module once: {layout:?}");
    for Module { name, code } in &modules {
        let own = position(name);
        assert!(own.is_some(), "the layout does not list {name}");
        for import in imports(code) {
            let above = position(&import).is_some_and(|it| Some(it) < own);
            assert!(above, "{name} imports {import}");
        }
    }
}

#[test]
fn the_environment_is_read_in_few_modules() {
    let users = modules().into_iter().filter(|module| {
        let is_env = |line: &str| line.contains("std::env") || line.trim_start().starts_with("env");
        module.code.lines().any(is_env)
    });
    let users: BTreeSet<_> = users.map(|module| module.name).collect();
    // Of `std::env`, the download uses the name of the platform only.
    assert_eq!(users, ["dirs", "download", "installation", "process"].map(str::to_owned).into());
}

#[test]
fn nothing_is_unwrapped() {
    for Module { name, code } in modules() {
        assert!(!code.contains(".unwrap()"), "{name}");
    }
}
