//! Each limit of the source names the test that fails without it, in the last line of its
//! documentation.

use std::{collections::BTreeSet, fs, path::Path};

use crate::support::sources::files;

/// The words of which the name of a limit has one.
const LIMIT_WORDS: [&str; 8] = ["BYTES", "KIB", "LEN", "LIMIT", "MAX", "MIN", "TIMEOUT", "TTL"];

/// Constants that have such a word and limit nothing.
const PLAIN_DATA: [&str; 13] = [
    // Lengths that a format fixes.
    "BODY_BYTES",
    "CHECKSUM_BYTES",
    "DERIVED_KEY_BYTES",
    "GENERATION_BYTES",
    "ID_BYTES",
    "KEY_ID_BYTES",
    "MAC_BYTES",
    "MESSAGE_PREFIX_LEN",
    "OUTPUT_BYTES",
    "SALT_BYTES",
    "SECRET_BYTES",
    // A metadata entry.
    "GRPC_TIMEOUT",
    // Makes the allocator return the buffers of hashes.
    "MIN_BUFFER_BLOCKS",
];

/// A constant, and the line before it.
struct Constant<'a> {
    name: &'a str,
    line_before: &'a str,
}

impl<'a> Constant<'a> {
    fn all(text: &'a str) -> Vec<Self> {
        let code = text.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default();
        let lines: Vec<_> =
            code.lines().map(str::trim).filter(|line| !line.starts_with("#[")).collect();
        let pairs = lines.windows(2).filter_map(|pair| {
            let (visibility, item) = pair[1].split_once("const ")?;
            let (name, _) = item.split_once(':')?;
            let is_item = visibility.is_empty() || visibility.starts_with("pub");
            is_item.then_some(Self { name, line_before: pair[0] })
        });
        pairs.collect()
    }

    fn has_name_of_limit(&self) -> bool {
        self.name.split('_').any(|word| LIMIT_WORDS.contains(&word))
    }

    /// Returns the name of the test, if the documentation ends with one.
    fn test(&self) -> Option<&'a str> {
        let test = self.line_before.strip_prefix("/// Test: `")?;
        test.trim_end_matches('.').strip_suffix('`')
    }
}

#[test]
fn limits_name_their_tests() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let read = |path| fs::read_to_string(path).expect("a source file");
    let tests: String = ["src", "tests/it", "crates"]
        .iter()
        .flat_map(|dir| files(&root.join(dir)))
        .map(read)
        .collect();
    let mut faults = Vec::new();
    let mut unused = BTreeSet::from(PLAIN_DATA);
    for file in files(&root.join("src")) {
        let (text, file) = (read(file.clone()), file.display());
        let constants = Constant::all(&text);
        let named: Vec<_> = constants.iter().filter_map(Constant::test).collect();
        for constant in &constants {
            let is_plain_data = unused.remove(constant.name);
            if constant.has_name_of_limit() && !is_plain_data && constant.test().is_none() {
                faults.push(format!("{file}: {} names no test", constant.name));
            }
        }
        for test in &named {
            if !tests.contains(&format!("fn {test}(")) {
                faults.push(format!("{file}: there is no test {test}"));
            }
        }
        if text.lines().filter(|line| line.trim().starts_with("/// Test:")).count() != named.len() {
            faults.push(format!("{file}: a test is not named in the last line"));
        }
    }
    faults.extend(unused.iter().map(|name| format!("there is no constant {name}")));
    assert!(faults.is_empty(), "{faults:#?}");
}
