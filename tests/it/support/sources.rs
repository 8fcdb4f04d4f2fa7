//! The sources of the service, and the paths in them.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

/// A file of `src/` without its comments and unit tests.
pub struct Source {
    /// Below `src/`.
    pub path: String,
    pub code: String,
}

impl Source {
    fn read(root: &Path, path: &Path) -> Self {
        let text = fs::read_to_string(path).expect("a source file");
        let code = text.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default();
        let is_code = |line: &&str| !line.trim_start().starts_with("//");
        let code = code.lines().filter(is_code).collect::<Vec<_>>().join("\n");
        let path = path.strip_prefix(root).expect("below src").to_str().expect("a plain name");
        Self { path: path.to_owned(), code }
    }

    pub fn all() -> Vec<Self> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
        let files = files(&root);
        assert!(files.len() > 20, "the source is there");
        files.iter().map(|file| Self::read(&root, file)).collect()
    }

    /// Returns `true` if this is the file, or a file in the directory.
    pub fn is(&self, name: &str) -> bool {
        Path::new(&self.path).starts_with(name)
    }

    /// The paths that the code spells out, those of `use` in full.
    pub fn paths(&self) -> BTreeSet<String> {
        let is_path = |c: char| c.is_alphanumeric() || c == '_' || c == ':';
        let inline = self.code.split(|c| !is_path(c)).filter(|word| word.contains("::"));
        let mut paths: BTreeSet<_> = inline.map(str::to_owned).collect();
        for line_start in self.code.match_indices("use ").map(|(at, _)| at) {
            let (before, rest) = self.code.split_at(line_start);
            if before.ends_with(['\n', ' ']) || before.is_empty() {
                let tree = rest["use ".len()..].split(';').next().unwrap_or_default();
                expand("", tree, &mut paths);
            }
        }
        let module = self.module();
        paths.into_iter().map(|path| Self::absolute(&module, path)).collect()
    }

    /// The path of the module: `crate::a::b` for `a/b.rs` and `a/b/mod.rs`.
    pub fn module(&self) -> String {
        let path = self.path.trim_end_matches(".rs").trim_end_matches("/mod");
        format!("crate::{}", path.replace('/', "::"))
    }

    /// Resolves `super::` and `self::`.
    fn absolute(module: &str, path: String) -> String {
        if let Some(rest) = path.strip_prefix("self::") {
            return format!("{module}::{rest}");
        }
        let (mut above, mut rest) = (module, &*path);
        while let Some(further) = rest.strip_prefix("super::") {
            (above, rest) = (above.rsplit_once("::").map_or("crate", |(above, _)| above), further);
        }
        if above == module { path } else { format!("{above}::{rest}") }
    }
}

/// Returns the Rust files of a directory and its subdirectories.
pub fn files(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).expect("a directory").map(|entry| entry.expect("read").path());
    let files = entries.flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] });
    files.filter(|path| path.extension().is_some_and(|extension| extension == "rs")).collect()
}

/// `a::{b, c::d}` is `a::b` and `a::c::d`.
pub fn expand(prefix: &str, tree: &str, paths: &mut BTreeSet<String>) {
    let tree = tree.trim();
    let Some((head, group)) = tree.split_once('{') else {
        let name = tree.split_whitespace().next().unwrap_or_default();
        paths.insert(format!("{prefix}{name}"));
        return;
    };
    let prefix = format!("{prefix}{head}");
    let group = group.trim_end().strip_suffix('}').unwrap_or(group);
    let (mut depth, mut start) = (0, 0);
    for (at, c) in group.char_indices() {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 0 => {
                expand(&prefix, &group[start..at], paths);
                start = at + 1;
            }
            _ => {}
        }
    }
    if !group[start..].trim().is_empty() {
        expand(&prefix, &group[start..], paths);
    }
}
