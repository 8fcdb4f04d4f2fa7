//! Which part of the code knows which: the source is read for the paths that it uses.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

/// A crate or a module, and who alone may use it: the files, each with how much of it.
type MayUse = (&'static str, &'static [(&'static str, &'static str)]);

const MAY_USE: [MayUse; 12] = [
    // Everything is wired in `server`, and nothing but `main` knows it.
    ("crate::server", &[]),
    ("fast_zero::server", &[("main.rs", "fast_zero::server")]),
    // Messages of the contract stop at `service.rs`.
    (
        "crate::proto",
        &[
            ("service.rs", "crate::proto"),
            // The reasons of errors are an enum of the contract.
            ("error.rs", "crate::proto::error"),
            // The wiring of the services.
            ("server.rs", "crate::proto"),
            ("guard.rs", "crate::proto::DESCRIPTORS"),
        ],
    ),
    ("prost", &[("service.rs", "prost::Message"), ("guard.rs", "prost::Message")]),
    (
        "prost_types",
        &[
            ("guard.rs", "prost_types::FileDescriptorSet"),
            ("mask.rs", "prost_types::FieldMask"),
            ("proto.rs", "prost_types::Timestamp"),
        ],
    ),
    // SQL stops at `store.rs`; where the database is passes through a few more.
    (
        "sqlx",
        &[
            ("store.rs", "sqlx"),
            ("database.rs", "sqlx"),
            ("coalesce.rs", "sqlx::PgConnection"),
            ("config.rs", "sqlx::postgres::PgConnectOptions"),
            ("main.rs", "sqlx::postgres::PgConnectOptions"),
            ("server.rs", "sqlx::postgres::PgConnectOptions"),
        ],
    ),
    // TLS stops at `tls.rs`, but for what the health check speaks.
    (
        "tokio_rustls",
        &[
            ("tls.rs", "tokio_rustls"),
            ("probe.rs", "tokio_rustls::rustls::ClientConfig"),
            ("config.rs", "tokio_rustls::rustls::ClientConfig"),
        ],
    ),
    // Everybody else counts with what `metrics.rs` gives them.
    ("prometheus_client", &[("metrics.rs", "prometheus_client")]),
    // And is traced with what `traces.rs` gives them.
    ("opentelemetry", &[("traces.rs", "opentelemetry")]),
    ("opentelemetry_otlp", &[("traces.rs", "opentelemetry_otlp")]),
    ("opentelemetry_sdk", &[("traces.rs", "opentelemetry_sdk")]),
    // Settings are read with the arguments, into the configuration. What the private
    // PostgreSQL reads is about the machine: folders, programs, and where it is itself.
    (
        "std::env",
        &[
            ("main.rs", "std::env"),
            ("folders.rs", "std::env"),
            ("install.rs", "std::env"),
            ("parent.rs", "std::env"),
        ],
    ),
];

/// A file of `src/` without its comments and unit tests.
struct Source {
    /// Below `src/`.
    path: String,
    code: String,
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

    fn all() -> Vec<Self> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
        let files = files(&root);
        assert!(files.len() > 20, "the source is there");
        files.iter().map(|file| Self::read(&root, file)).collect()
    }

    fn is(&self, name: &str) -> bool {
        Path::new(&self.path).file_name().is_some_and(|file| file == name)
    }

    /// The paths that the code spells out, those of `use` in full.
    fn paths(&self) -> BTreeSet<String> {
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
        // In a feature, the parent's parent is the crate.
        paths.into_iter().map(|path| path.replace("super::super::", "crate::")).collect()
    }
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).expect("a folder").map(|entry| entry.expect("read").path());
    let files = entries.flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] });
    files.filter(|path| path.extension().is_some_and(|extension| extension == "rs")).collect()
}

/// `a::{b, c::d}` is `a::b` and `a::c::d`.
fn expand(prefix: &str, tree: &str, paths: &mut BTreeSet<String>) {
    let tree = tree.trim();
    let Some((head, group)) = tree.split_once('{') else {
        let name = tree.split_whitespace().next().unwrap_or_default();
        paths.insert(format!("{prefix}{name}"));
        return;
    };
    let prefix = format!("{prefix}{head}");
    let group = group.trim_end().strip_suffix('}').unwrap_or(group);
    let (mut depth, mut begin) = (0, 0);
    for (at, c) in group.char_indices() {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 0 => {
                expand(&prefix, &group[begin..at], paths);
                begin = at + 1;
            }
            _ => {}
        }
    }
    if !group[begin..].trim().is_empty() {
        expand(&prefix, &group[begin..], paths);
    }
}

/// The path leads to this crate, module or item, or into it.
fn leads_to(path: &str, target: &str) -> bool {
    path.strip_prefix(target).is_some_and(|rest| rest.is_empty() || rest.starts_with("::"))
}

/// The modules of the crate, each with the modules that it imports.
fn imports(sources: &[Source]) -> BTreeMap<String, BTreeSet<String>> {
    let name = |path: &str| {
        let path = path.trim_end_matches(".rs").trim_end_matches("/mod");
        format!("crate::{}", path.replace('/', "::"))
    };
    let modules: BTreeMap<_, _> = sources
        .iter()
        .filter(|source| !["lib.rs", "main.rs"].contains(&&*source.path))
        .filter(|source| !source.path.starts_with("embedded/"))
        .map(|source| (name(&source.path), source))
        .collect();
    let longest = |path: &str| {
        let leading = modules.keys().filter(|module| leads_to(path, module));
        leading.max_by_key(|module| module.len()).cloned()
    };
    let absolute = |module: &str, is_parent: bool, path: &str| {
        let parent =
            if is_parent { module } else { module.rsplit_once("::").map_or("", |(it, _)| it) };
        if let Some(rest) = path.strip_prefix("super::") {
            let above =
                if is_parent { module.rsplit_once("::").map_or("", |(it, _)| it) } else { parent };
            return format!("{above}::{rest}");
        }
        path.strip_prefix("self::")
            .map_or_else(|| path.to_owned(), |rest| format!("{module}::{rest}"))
    };
    let graph = modules.iter().map(|(module, source)| {
        let is_parent = source.is("mod.rs");
        let paths = source.paths();
        let targets = paths.iter().filter_map(|path| longest(&absolute(module, is_parent, path)));
        // A parent and its children are one thing.
        let others =
            targets.filter(|target| !leads_to(target, module) && !leads_to(module, target));
        (module.clone(), others.collect())
    });
    graph.collect()
}

/// Returns the modules of a cycle, if there is one.
fn cycle(graph: &BTreeMap<String, BTreeSet<String>>) -> Option<Vec<String>> {
    fn visit<'a>(
        module: &'a str,
        graph: &'a BTreeMap<String, BTreeSet<String>>,
        path: &mut Vec<&'a str>,
        done: &mut BTreeSet<&'a str>,
    ) -> Option<Vec<String>> {
        if let Some(at) = path.iter().position(|seen| *seen == module) {
            return Some(path[at..].iter().map(ToString::to_string).collect());
        }
        if done.contains(module) {
            return None;
        }
        path.push(module);
        let found = graph.get(module).into_iter().flatten();
        let found = found.into_iter().find_map(|next| visit(next, graph, path, done));
        path.pop();
        done.insert(module);
        found
    }
    let mut done = BTreeSet::new();
    graph.keys().find_map(|module| visit(module, graph, &mut Vec::new(), &mut done))
}

#[test]
fn cycles_are_found() {
    let graph = |arrows: &[(&str, &str)]| {
        let mut graph = BTreeMap::<String, BTreeSet<String>>::new();
        for (from, to) in arrows {
            graph.entry((*from).to_owned()).or_default().insert((*to).to_owned());
        }
        graph
    };
    assert_eq!(cycle(&graph(&[("a", "b"), ("a", "c"), ("b", "c"), ("c", "d")])), None);
    let found = cycle(&graph(&[("a", "b"), ("b", "c"), ("c", "d"), ("d", "b")]));
    assert_eq!(found, Some(["b", "c", "d"].map(str::to_owned).to_vec()));
}

#[test]
fn no_module_imports_itself_through_others() {
    let sources = Source::all();
    let graph = imports(&sources);
    assert!(
        graph["crate::todo::store"].contains("crate::database"),
        "imports are read: {graph:#?}"
    );
    assert_eq!(cycle(&graph), None);
}

#[test]
fn groups_of_imports_are_understood() {
    let mut paths = BTreeSet::new();
    expand("", "a::{\n    self, b, c::{d, e::{f as g}},\n    h::*,\n}", &mut paths);
    let expected = ["a::self", "a::b", "a::c::d", "a::c::e::f", "a::h::*"];
    assert_eq!(paths, expected.map(str::to_owned).into());
}

#[test]
fn each_part_is_used_by_those_only_who_may() {
    let sources = Source::all();
    let mut faults = Vec::new();
    for (part, users) in MAY_USE {
        let mut unused = BTreeSet::from_iter(users);
        for source in &sources {
            for path in source.paths().iter().filter(|path| leads_to(path, part)) {
                let allowing =
                    |(file, much): &&(&str, &str)| source.is(file) && leads_to(path, much);
                let allowing: Vec<_> = users.iter().filter(allowing).collect();
                if allowing.is_empty() {
                    faults.push(format!("{} uses {path}", source.path));
                }
                for user in allowing {
                    unused.remove(user);
                }
            }
        }
        faults.extend(unused.iter().map(|(file, much)| format!("{file} may use {much} in vain")));
    }
    assert!(faults.is_empty(), "{faults:#?}");
}

#[test]
fn users_and_todos_do_not_know_how_callers_are_authenticated() {
    let sources = Source::all();
    for folder in ["user/", "todo/"] {
        let paths: Vec<_> = sources
            .iter()
            .filter(|source| source.path.starts_with(folder))
            .flat_map(|source| source.paths().into_iter().map(|path| (&*source.path, path)))
            .collect();
        let users_of = |part: &str| -> Vec<_> {
            paths.iter().filter(|(_, path)| leads_to(path, part)).collect()
        };
        assert!(!users_of("crate::caller").is_empty(), "{folder} knows its callers");
        assert_eq!(users_of("crate::auth"), Vec::<&(&str, String)>::new());
    }
}

#[test]
fn statuses_are_made_of_errors_only() {
    let mut faults = Vec::new();
    for source in Source::all() {
        for path in source.paths() {
            let made = path.rsplit_once("::").filter(|(of, with)| {
                let is_status = of.rsplit("::").next() == Some("Status");
                is_status && with.starts_with(char::is_lowercase) && *with != "from"
            });
            if made.is_some() && !source.is("error.rs") {
                faults.push(format!("{} uses {path}", source.path));
            }
        }
    }
    assert!(faults.is_empty(), "{faults:#?}");
}

#[test]
fn nothing_is_unwrapped() {
    for source in Source::all() {
        assert!(!source.code.contains(".unwrap()"), "{}", source.path);
    }
}
