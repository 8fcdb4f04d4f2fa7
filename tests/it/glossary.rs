//! The terms of the field: sources and documents must not use home-made words for them.

use std::{
    fs,
    path::{Path, PathBuf},
};

/// Words, separated by `|`, and what to say instead. A word matches whole words in any case, with
/// spaces for underscores, across line breaks. A word with a capital letter matches its case only.
/// A word with a final `*` matches all words that start with it.
const WORDS: [(&str, &str); 46] = [
    // Actors and actions.
    ("nobody|somebody|anybody|everybody|whoever|whom", "the actor: the client, the caller"),
    ("who reads|who sends|who calls|who waits|who goes", "a client that"),
    ("who asks|who says|who speaks|who opens|who logs in", "a client that"),
    ("told|goodbye", "reports, returns, logs"),
    ("under way", "in flight, in progress"),
    ("turn away|turns away|turned away", "shed, reject"),
    ("lets in|is let in|are let in", "admit"),
    ("its turn|their turn|takes turns", "a permit, a queue slot"),
    ("give or take", "jitter"),
    ("anew", "again, re- (reconnects, rehashes)"),
    ("begun", "started"),
    // States.
    ("is away|are away|goes away|went away", "is unavailable, disconnects"),
    ("good token*|bad token*|good id*|bad id*", "valid, invalid"),
    ("good address*|bad address*|good request*|bad field*", "valid, invalid"),
    ("live session*", "active session"),
    ("leftover*", "orphaned process, stale file"),
    ("like one that never was", "not found"),
    ("rising order|falling order", "ascending, descending"),
    ("without regard to case", "case-insensitively"),
    // Comments without content.
    ("As kept|As written|As there|Not said", "what the element is, or nothing"),
    // Things.
    ("private PostgreSQL", "embedded PostgreSQL"),
    ("folder*", "directory"),
    ("to-do*", "todo"),
    ("e-mail*", "email"),
    ("look-up*", "lookup"),
    ("time-out*", "timeout"),
    ("start-up*", "startup"),
    ("back-off*", "backoff"),
    ("back-pressure", "backpressure"),
    ("log-in*|sign-in*", "login"),
    ("user name*", "username"),
    ("white space", "whitespace"),
    ("meta data", "metadata"),
    ("at the most", "at most"),
    // American spelling.
    ("authoris*|initialis*|normalis*|serialis*|deserialis*", "-ize"),
    ("customis*|organis*|prioritis*|recognis*|summaris*", "-ize"),
    ("maximis*|minimis*|synchronis*|utilis*", "-ize"),
    ("optimise*|optimisation*|optimising", "optimize"),
    ("analyse|analysed|analyses the", "analyze"),
    ("behaviour*", "behavior"),
    ("colour*|favour*|honour*|neighbour*", "-or"),
    ("licence*", "license"),
    ("defence|offence", "-ense"),
    ("centre*|grey", "center, gray"),
    ("catalogue*|artefact*", "catalog, artifact"),
    ("whilst|amongst", "while, among"),
];

/// Files whose text may contain a word, and why.
const ALLOWED: [(&str, &str, &str); 2] = [
    ("crates/embedded-postgres/src/privileges.rs", "nobody", "the Unix user"),
    ("docs/embedded-postgres.md", "nobody", "the Unix user"),
];

/// The checked files and directories. Migrations are immutable.
const CHECKED: [&str; 19] = [
    ".ci",
    ".dockerignore",
    ".env.example",
    ".gitignore",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "Dockerfile",
    "README.md",
    "SECURITY.md",
    "bench",
    "build.rs",
    "compose.yaml",
    "crates",
    "deploy",
    "docs",
    "examples",
    "proto",
    "src",
    "tests",
];

/// Directories that commands of the documentation generate.
const GENERATED: [&str; 3] = [".venv", "gen", "target"];

/// The text of a file as words: without comment markers, line breaks and underscores.
struct Prose {
    text: String,
    lowercase: String,
    /// The start of each line in `text`.
    lines: Vec<usize>,
}

impl Prose {
    fn new(text: &str) -> Self {
        let (mut prose, mut lines) = (String::new(), Vec::new());
        for line in text.lines() {
            lines.push(prose.len());
            let is_marker = |c: char| c.is_whitespace() || "/!#*>".contains(c);
            prose.push_str(line.trim_start_matches(is_marker).trim_end());
            prose.push(' ');
        }
        let text = prose.replace('_', " ");
        Self { lowercase: text.to_ascii_lowercase(), text, lines }
    }

    /// Returns the numbers of the lines in which a word starts.
    fn find(&self, word: &str) -> Vec<usize> {
        let (stem, is_prefix) = word.strip_suffix('*').map_or((word, false), |stem| (stem, true));
        let is_exact = stem.contains(char::is_uppercase);
        let text = if is_exact { &self.text } else { &self.lowercase };
        let is_whole = |at: &usize| {
            let (before, after) = (&text[..*at], &text[at + stem.len()..]);
            !before.ends_with(char::is_alphanumeric)
                && (is_prefix || !after.starts_with(char::is_alphanumeric))
        };
        let starts = text.match_indices(stem).map(|(at, _)| at).filter(is_whole);
        starts.map(|at| self.lines.partition_point(|line| *line <= at)).collect()
    }
}

fn files(path: &Path, found: &mut Vec<PathBuf>) {
    if path.is_file() {
        found.push(path.to_owned());
        return;
    }
    for entry in fs::read_dir(path).expect("a directory") {
        let path = entry.expect("an entry").path();
        if !GENERATED.iter().any(|name| path.ends_with(name)) {
            files(&path, found);
        }
    }
}

#[test]
fn home_made_words_for_terms_are_absent() {
    let sample = Prose::new("/// Calls under\n/// way. Who_Reads folders\n/// undergrown e-mails");
    assert_eq!(sample.find("under way"), [1]);
    assert_eq!(sample.find("who reads"), [2]);
    assert_eq!(sample.find("Who reads"), [] as [usize; 0]);
    assert_eq!((sample.find("folder"), sample.find("folder*")), (vec![], vec![2]));
    assert_eq!((sample.find("under"), sample.find("mail*")), (vec![1], vec![3]));

    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut paths = Vec::new();
    for checked in CHECKED {
        files(&root.join(checked), &mut paths);
    }
    let (mut faults, mut used) = (Vec::new(), [false; ALLOWED.len()]);
    for path in paths {
        let name = path.strip_prefix(root).expect("below the root").to_string_lossy();
        let Ok(text) = fs::read_to_string(&path) else { continue };
        if path.ends_with(file!()) {
            continue;
        }
        let prose = Prose::new(&text);
        for (word, instead) in WORDS
            .iter()
            .flat_map(|(words, instead)| words.split('|').map(move |word| (word, instead)))
        {
            for line in prose.find(word) {
                let allowance =
                    ALLOWED.iter().position(|(file, allowed, _)| *file == name && *allowed == word);
                match allowance {
                    Some(index) => used[index] = true,
                    None => faults.push(format!("{name}:{line}: \"{word}\", say: {instead}")),
                }
            }
        }
    }
    assert!(faults.is_empty(), "{faults:#?}");
    assert_eq!(used, [true; ALLOWED.len()], "an allowance is not needed");
}
