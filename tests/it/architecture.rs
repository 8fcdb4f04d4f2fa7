//! The dependencies between modules, read from the paths in the sources.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

use crate::support::sources::{Source, expand, files};

/// A restricted crate or module, with the only files that may use it and the paths that each
/// file may use.
type MayUse = (&'static str, &'static [(&'static str, &'static str)]);

const ALLOWED_USERS: [MayUse; 13] = [
    // `server` wires everything, and only the command `serve` uses it.
    ("crate::server", &[("cli/serve.rs", "crate::server::Server")]),
    // Protobuf messages stop at `service.rs` and `requests.rs`. The reasons of errors are an enum
    // of the API.
    (
        "crate::rpc::proto",
        &[
            ("auth/service.rs", "crate::rpc::proto"),
            ("auth/requests.rs", "crate::rpc::proto"),
            ("auth/personal_access_tokens/service.rs", "crate::rpc::proto"),
            ("user/service.rs", "crate::rpc::proto"),
            ("todo/service.rs", "crate::rpc::proto"),
            ("todo/changes/service.rs", "crate::rpc::proto"),
            ("rpc/test_service.rs", "crate::rpc::proto::test"),
            ("rpc/error.rs", "crate::rpc::proto::error"),
            ("rpc/status.rs", "crate::rpc::proto::error"),
            ("rpc/error_hint.rs", "crate::rpc::proto::error"),
            ("server.rs", "crate::rpc::proto"),
        ],
    ),
    (
        "prost",
        &[
            ("todo/service.rs", "prost::Message"),
            ("rpc/open_stream.rs", "prost"),
            ("rpc/policy.rs", "prost::Message"),
            ("rpc/reflection.rs", "prost"),
        ],
    ),
    (
        "prost_types",
        &[
            ("rpc/policy.rs", "prost_types::FileDescriptorSet"),
            ("rpc/reflection.rs", "prost_types"),
            ("rpc/update_mask.rs", "prost_types::FieldMask"),
            ("rpc/proto.rs", "prost_types::Timestamp"),
        ],
    ),
    // SQL stops at the stores. The configuration parses the options of the connection.
    (
        "sqlx",
        &[
            ("auth/store", "sqlx"),
            ("user/store", "sqlx"),
            ("todo/store", "sqlx"),
            ("todo/changes/store.rs", "sqlx"),
            ("todo/list.rs", "sqlx"),
            ("todo/list_batch.rs", "sqlx"),
            ("todo/row.rs", "sqlx"),
            ("database/mod.rs", "sqlx"),
            ("database/batch", "sqlx::PgConnection"),
            ("database/connect.rs", "sqlx"),
            ("database/errors.rs", "sqlx"),
            ("database/health.rs", "sqlx"),
            ("database/incarnation.rs", "sqlx"),
            ("database/migrate.rs", "sqlx"),
            ("database/pool.rs", "sqlx"),
            ("database/state.rs", "sqlx"),
            ("database/url", "sqlx::postgres"),
            ("config/mod.rs", "sqlx::postgres::PgConnectOptions"),
            ("config/secrets.rs", "sqlx::postgres::PgConnectOptions"),
            ("server.rs", "sqlx::postgres::PgConnectOptions"),
        ],
    ),
    // TLS stops at `tls.rs`, except for the client of the health check, and the errors of
    // connections to the database.
    (
        "tokio_rustls",
        &[
            ("transport/tls.rs", "tokio_rustls"),
            ("cli/healthcheck.rs", "tokio_rustls::rustls::ClientConfig"),
            ("config/tls.rs", "tokio_rustls::rustls::ClientConfig"),
            ("database/errors.rs", "tokio_rustls::rustls::Error"),
        ],
    ),
    ("prometheus_client", &[("telemetry/metrics", "prometheus_client")]),
    ("opentelemetry", &[("telemetry/traces", "opentelemetry")]),
    ("opentelemetry_otlp", &[("telemetry/traces", "opentelemetry_otlp")]),
    ("opentelemetry_sdk", &[("telemetry/traces", "opentelemetry_sdk")]),
    // Settings are read with the arguments, and the variables of libpq with the URL.
    ("std::env", &[("cli/mod.rs", "std::env"), ("database/url", "std::env")]),
    // One file connects the embedded PostgreSQL with the service.
    ("embedded_postgres", &[("cli/embedded.rs", "embedded_postgres")]),
    // Only the admin server speaks HTTP/1.1.
    ("axum", &[("telemetry/admin.rs", "axum")]),
];

/// The modules of the crate from the lowest to the highest rank. Each imports only modules of
/// lower ranks. Modules of the same rank do not import each other.
const RANKS: [&[&str]; 12] = [
    &["types"],
    &["telemetry"],
    &["limits"],
    &["crypto"],
    &["rpc"],
    &["database"],
    &["user", "todo", "auth"],
    &["transport"],
    &["middleware"],
    &["config"],
    &["server"],
    &["cli"],
];

/// The maximum number of lines of a file.
const MAX_LINES: usize = 400;

/// The maximum number of entries of `src/`, so that a listing shows the architecture.
const MAX_ENTRIES: usize = 16;

/// The path leads to this crate, module or item, or into it.
fn leads_to(path: &str, target: &str) -> bool {
    path.strip_prefix(target).is_some_and(|rest| rest.is_empty() || rest.starts_with("::"))
}

/// The modules of the crate, each with the modules that it imports.
fn imports(sources: &[Source]) -> BTreeMap<String, BTreeSet<String>> {
    let modules: BTreeMap<_, _> = sources
        .iter()
        .filter(|source| !["lib.rs", "main.rs"].contains(&&*source.path))
        .map(|source| (source.module(), source))
        .collect();
    let longest = |path: &str| {
        let leading = modules.keys().filter(|module| leads_to(path, module));
        leading.max_by_key(|module| module.len()).cloned()
    };
    let graph = modules.iter().map(|(module, source)| {
        let paths = source.paths();
        let targets = paths.iter().filter_map(|path| longest(path));
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
fn restricted_paths_are_used_only_by_listed_files() {
    let sources = Source::all();
    let mut faults = Vec::new();
    for (part, users) in ALLOWED_USERS {
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
        faults.extend(unused.iter().map(|(file, much)| format!("{file} does not use {much}")));
    }
    assert!(faults.is_empty(), "{faults:#?}");
}

#[test]
fn user_and_todo_do_not_depend_on_auth() {
    let sources = Source::all();
    for dir in ["user/", "todo/"] {
        let paths: Vec<_> = sources
            .iter()
            .filter(|source| source.path.starts_with(dir))
            .flat_map(|source| source.paths().into_iter().map(|path| (&*source.path, path)))
            .collect();
        let users_of = |part: &str| -> Vec<_> {
            paths.iter().filter(|(_, path)| leads_to(path, part)).collect()
        };
        assert!(!users_of("crate::rpc::caller").is_empty(), "{dir} uses the caller");
        assert_eq!(users_of("crate::auth"), Vec::<&(&str, String)>::new());
    }
}

#[test]
fn statuses_are_created_only_from_errors() {
    let mut faults = Vec::new();
    for source in Source::all() {
        for path in source.paths() {
            let made = path.rsplit_once("::").filter(|(of, with)| {
                let is_status = of.rsplit("::").next() == Some("Status");
                is_status && with.starts_with(char::is_lowercase) && *with != "from"
            });
            let may = [
                // The one conversion.
                ("rpc/status.rs", ""),
                // Reads what a handler answered.
                ("middleware/buffer.rs", "from_header_map"),
                // The only error of the health service, which is below the errors of the API.
                ("telemetry/health.rs", "not_found"),
                // Is a client.
                ("cli/healthcheck.rs", "new"),
                // A status of OpenTelemetry.
                ("telemetry/traces", "error"),
            ];
            let is_allowed = may.iter().any(|(file, with)| source.is(file) && path.ends_with(with));
            if made.is_some() && !is_allowed {
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

#[test]
fn modules_import_only_lower_ranks() {
    let rank = |module: &str| {
        let name = module.split("::").nth(1).unwrap_or_default();
        let rank = RANKS.iter().position(|names| names.contains(&name));
        (rank.unwrap_or_else(|| panic!("{module} has a rank")), name.to_owned())
    };
    let mut faults = Vec::new();
    for (module, targets) in imports(&Source::all()) {
        let (from, from_name) = rank(&module);
        for target in targets {
            let (to, to_name) = rank(&target);
            if from_name != to_name && to >= from {
                faults.push(format!("{module} imports {target}"));
            }
        }
    }
    assert!(faults.is_empty(), "{faults:#?}");
}

#[test]
fn files_and_the_source_tree_are_small() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let entries = fs::read_dir(&root).expect("a directory").count();
    assert!(entries <= MAX_ENTRIES, "{entries} entries");
    for file in files(&root) {
        let lines = fs::read_to_string(&file).expect("a source file").lines().count();
        assert!(lines <= MAX_LINES, "{} has {lines} lines", file.display());
    }
}

#[test]
fn the_embedded_postgresql_does_not_depend_on_the_service() {
    let crate_dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("crates/embedded-postgres");
    for file in files(&crate_dir).into_iter().chain([crate_dir.join("Cargo.toml")]) {
        let text = fs::read_to_string(&file).expect("a text file").to_lowercase();
        for name in ["fast-zero", "fast_zero", "fastzero", "database_url", "secret_key"] {
            assert!(!text.contains(name), "{} contains {name}", file.display());
        }
    }
}
