//! Settings: their sources, and the errors of invalid ones.

use clap::Args;
use fast_zero::Config;

use crate::support::{
    app::SECRET_KEY, postgres::TestDatabase, process::Binary, readme::CONFIGURATION,
};

const USAGE: Option<i32> = Some(64);
const CONFIG: Option<i32> = Some(78);

/// Returns the environment variables of all settings.
fn variables() -> Vec<String> {
    let settings = Config::augment_args(clap::Command::new("settings"));
    let variables = settings.get_arguments().filter_map(|setting| setting.get_env());
    variables.map(|variable| variable.to_str().expect("text").to_owned()).collect()
}

#[tokio::test]
async fn the_help_names_every_setting() {
    let (code, help) = Binary::new(&["--help"]).output().await;
    assert_eq!(code, Some(0));
    // ALGORITHM has a single valid value.
    for variable in variables().into_iter().filter(|variable| variable != "ALGORITHM") {
        // The help hides the values of secrets.
        let named = [format!("[env: {variable}="), format!("[env: {variable}]")];
        assert!(named.iter().any(|text| help.contains(text)), "{variable} is not in:\n{help}");
        let flag = format!("--{}", variable.to_lowercase().replace('_', "-"));
        assert!(help.contains(&flag), "{flag} is not in:\n{help}");
    }
}

#[test]
fn the_documentation_and_the_example_name_every_setting_and_no_other() {
    let variables = variables();
    let table = CONFIGURATION.split("\n## Settings\n").nth(1).expect("a section");
    let table = table.split("\n## ").next().expect("text");
    for variable in &variables {
        assert!(table.contains(&format!("`{variable}`")), "no {variable} in docs/configuration.md");
    }
    let example = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/.env.example"));
    let assigned: Vec<_> = example
        .lines()
        .filter_map(|line| line.strip_prefix('#').unwrap_or(line).split_once('='))
        .map(|(name, _)| name)
        .filter(|name| name.bytes().all(|byte| byte.is_ascii_uppercase() || byte == b'_'))
        .collect();
    for variable in &variables {
        // Secrets in files are for containers, and ALGORITHM has a single valid value.
        let is_special = variable.ends_with("_FILE") && !variable.starts_with("TLS_");
        let is_named = assigned.contains(&&**variable);
        assert!(is_named || is_special || variable == "ALGORITHM", "no {variable} in .env.example");
    }
    // Further variables that compose reads.
    for name in assigned {
        let of_compose = name.starts_with("POSTGRES_")
            || ["FASTZERO_COMMIT", "FASTZERO_PORT", "GRAFANA_PORT", "PROMETHEUS_PORT"]
                .contains(&name);
        assert!(of_compose || variables.iter().any(|known| known == name), "{name} is no setting");
    }
}

#[test]
fn the_kubernetes_examples_use_only_existing_settings() {
    let variables = variables();
    for manifest in [
        include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/deploy/kubernetes.yaml")),
        include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/deploy/kubernetes-migrate.yaml")),
    ] {
        let names = manifest.split("- name: ").skip(1).filter_map(|rest| rest.lines().next());
        let is_variable =
            |name: &&str| name.bytes().all(|byte| byte.is_ascii_uppercase() || byte == b'_');
        let set: Vec<_> = names.filter(is_variable).collect();
        assert!(set.contains(&"DATABASE_URL_FILE"), "{set:?}");
        for name in set {
            assert!(variables.iter().any(|known| known == name), "{name} is no setting");
        }
    }
}

#[tokio::test]
async fn the_version_names_the_commit() {
    let (code, version) = Binary::new(&["--version"]).output().await;
    assert_eq!(code, Some(0));
    let (name, commit) = version.trim().split_once(" (").expect("a commit in parentheses");
    assert_eq!(name, concat!("fast-zero ", env!("CARGO_PKG_VERSION")));
    let commit = commit.strip_suffix(')').expect("a commit in parentheses");
    assert!(commit == "unknown" || commit.len() >= 7, "{commit}");
}

#[tokio::test]
async fn invalid_usage_and_invalid_values_have_distinct_exit_codes() {
    for arguments in [&["--no-such-flag"][..], &["no-such-command"], &["serve", "more"]] {
        let (code, output) = Binary::new(arguments).output().await;
        assert_eq!(code, USAGE, "{arguments:?}: {output}");
    }
    for (variable, value, allowed) in [
        ("LISTEN_ADDR", "localhost", "127.0.0.1:50051"),
        ("METRICS_ADDR", "9464", "an IP address and a port"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "collector:4317", "http://localhost:4317"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "localhost", "http://localhost:4317"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://", "http://localhost:4317"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "ftp://collector:4317", "http://localhost:4317"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector:4318/v1/traces", "a gRPC URL"),
        ("ALGORITHM", "none", "HS256"),
        ("ACCESS_TOKEN_EXPIRE_MINUTES", "0", "1..="),
        ("REFRESH_TOKEN_EXPIRE_DAYS", "-1", "1..="),
        ("HASHING_THREADS", "many", "invalid digit"),
        ("DATABASE_MAX_CONNECTIONS", "70000", "1..="),
        ("SIGN_UPS_PER_PEER_PER_MINUTE", "0", "1.."),
        ("MAX_WATCHES", "0", "1..="),
        ("MAX_WATCHES_PER_USER", "0", "1.."),
        ("MIGRATE_ON_START", "perhaps", "true, false"),
        ("REFLECTION", "2", "true, false"),
        ("DATABASE_WAIT_SECONDS", "99999", "0..="),
        ("SHUTDOWN_GRACE_SECONDS", "1.5", "invalid digit"),
        ("LOG_FORMAT", "xml", "pretty, json"),
        ("RUST_LOG", "fast_zero=loud", "invalid"),
    ] {
        let (code, output) = Binary::new(&[]).env(variable, value).output().await;
        assert_eq!(code, CONFIG, "{variable}={value}: {output}");
        for part in [variable, value, allowed] {
            assert!(output.contains(part), "{part} is not in: {output}");
        }
    }
}

#[tokio::test]
async fn an_invalid_secret_is_named_but_not_shown() {
    let database = "postgres://localhost/db";
    for (name, run) in [
        ("SECRET_KEY", Binary::new(&[]).env("SECRET_KEY", "15-bytes-of-key")),
        ("SECRET_KEY", Binary::new(&["--secret-key", "15-bytes-of-key"])),
        (
            "SECRET_KEY",
            Binary::new(&[]).file("key", "15-bytes-of-key\n").env("SECRET_KEY_FILE", "key"),
        ),
        (
            "SECRET_KEY_PREVIOUS",
            Binary::new(&[])
                .env("SECRET_KEY", SECRET_KEY)
                .env("SECRET_KEY_PREVIOUS", "15-bytes-of-key"),
        ),
    ] {
        let (code, output) = run.env("DATABASE_URL", database).output().await;
        assert_eq!(code, CONFIG, "{output}");
        assert!(output.contains(name) && output.contains("32 random bytes"), "{output}");
        assert!(!output.contains("15-bytes-of-key"), "{output}");
    }
    for url in ["mysql://ana:hidden@db/app", "hidden", "postgres://ana:hidden@db:port/app"] {
        let run = Binary::new(&[]).env("DATABASE_URL", url).env("SECRET_KEY", SECRET_KEY);
        let (code, output) = run.output().await;
        assert_eq!(code, CONFIG, "{output}");
        assert!(output.contains("DATABASE_URL must be like postgresql://"), "{output}");
        assert!(!output.contains("hidden"), "{output}");
    }
}

#[tokio::test]
async fn a_secret_key_is_required_with_a_database_url() {
    for run in [Binary::new(&[]), Binary::new(&[]).env("SECRET_KEY", "")] {
        let (code, output) = run.env("DATABASE_URL", "postgres://localhost/db").output().await;
        assert_eq!(code, CONFIG, "{output}");
        assert!(output.contains("SECRET_KEY must be set"), "{output}");
    }
}

#[tokio::test]
async fn secrets_come_from_files_without_their_trailing_newline() {
    let database = TestDatabase::create().await;
    let server = Binary::new(&[])
        .file("url", &format!("{}\n", database.url()))
        .file("key", &format!("{SECRET_KEY}\n"))
        .env("DATABASE_URL_FILE", "url")
        .env("SECRET_KEY_FILE", "key")
        .env("LISTEN_ADDR", "127.0.0.1:0")
        .start();
    server.address().await;

    let both =
        Binary::server(&database.url()).file("key", SECRET_KEY).env("SECRET_KEY_FILE", "key");
    let (code, output) = both.output().await;
    assert_eq!(code, CONFIG, "{output}");
    assert!(output.contains("SECRET_KEY and SECRET_KEY_FILE are both set"), "{output}");

    let missing = Binary::new(&[])
        .env("DATABASE_URL", &database.url())
        .env("SECRET_KEY_FILE", "no-such-file");
    let (code, output) = missing.output().await;
    assert_eq!(code, CONFIG, "{output}");
    assert!(output.contains("no-such-file"), "{output}");
}

#[tokio::test]
async fn flags_override_variables_and_variables_override_the_file() {
    let invalid = |source: &str| format!("from-{source}");
    let file = format!("LISTEN_ADDR={}\n", invalid("file"));
    let from_file = Binary::new(&[]).file(".env", &file);
    let from_variable =
        Binary::new(&[]).file(".env", &file).env("LISTEN_ADDR", &invalid("variable"));
    let from_flag = Binary::new(&["--listen-addr", &invalid("flag")])
        .file(".env", &file)
        .env("LISTEN_ADDR", &invalid("variable"));
    for (run, source) in [(from_file, "file"), (from_variable, "variable"), (from_flag, "flag")] {
        let (code, output) = run.output().await;
        assert_eq!(code, CONFIG, "{output}");
        assert!(output.contains(&invalid(source)), "{source}: {output}");
    }
}

#[tokio::test]
async fn flags_may_precede_a_subcommand_that_knows_them() {
    for (args, code, part) in [
        (&["--listen-addr", "from-flag", "serve"][..], CONFIG, "'from-flag' for '--listen-addr"),
        (&["--listen-addr=from-flag", "serve"], CONFIG, "'from-flag' for '--listen-addr"),
        (&["--reflection", "--listen-addr", "from-flag", "serve"], CONFIG, "'from-flag'"),
        (&["--reflection", "false", "serve", "--listen-addr", "from-flag"], CONFIG, "'from-flag'"),
        (&["--reflection", "serve", "--listen-addr", "from-flag"], CONFIG, "'from-flag'"),
        (&["--token-issuer", "serve", "--listen-addr", "from-flag"], CONFIG, "'from-flag'"),
        (&["--database-url", "mysql://db", "migrate"], CONFIG, "DATABASE_URL must be like"),
        (&["--listen-addr", "127.0.0.1:1", "healthcheck"], Some(2), "127.0.0.1:1: cannot connect"),
        (&["--listen-addr", "127.0.0.1:1", "migrate"], USAGE, "--listen-addr"),
        (&["--version", "serve"], Some(0), "fast-zero "),
        (&["help", "serve"], Some(0), "Usage: fast-zero serve"),
    ] {
        let (actual, output) = Binary::new(args).output().await;
        assert_eq!(actual, code, "{args:?}: {output}");
        assert!(output.contains(part), "{args:?}: {part} is not in: {output}");
    }
    // Variables of settings that the subcommand does not use are not read.
    let (code, output) = Binary::new(&["--listen-addr", "127.0.0.1:1", "healthcheck"])
        .env("TRUSTED_PROXIES", "no network")
        .output()
        .await;
    assert_eq!(code, Some(2), "{output}");
}

#[tokio::test]
async fn an_empty_variable_is_not_set() {
    let database = TestDatabase::create().await;
    let mut run = Binary::server(&database.url());
    for variable in [
        "HASHING_THREADS",
        "LOG_FORMAT",
        "OTEL_EXPORTER_OTLP_ENDPOINT",
        "REFLECTION",
        "RUST_LOG",
        "TOKEN_ISSUER",
    ] {
        run = run.env(variable, "");
    }
    run.start().address().await;
}

#[tokio::test]
async fn a_wait_of_zero_seconds_still_connects() {
    for migrate in ["true", "false"] {
        let database = TestDatabase::create().await;
        let run = Binary::server(&database.url()).env("DATABASE_WAIT_SECONDS", "0");
        run.env("MIGRATE_ON_START", migrate).start().address().await;
    }
}

#[tokio::test]
async fn an_ambiguous_or_unsupported_url_is_rejected_and_not_shown() {
    for (url, named) in [
        ("postgresql://app:4711?hidden@db/app", "like %40 for @"),
        ("postgresql://app:4711#hidden@db/app", "like %40 for @"),
        ("postgresql://app:p@db/app?sslpassword=hidden", "sslpassword is not supported"),
        ("postgresql://app:p@db/app?hidden=hidden", "supported are host, hostaddr, port"),
        ("postgresql://app:p@db/app?channel_binding=require", "channel_binding"),
        ("postgresql://app:hidden@db1,db2/app", "host must name one host"),
    ] {
        for command in ["serve", "migrate"] {
            let run = Binary::new(&[command]).env("SECRET_KEY", SECRET_KEY);
            // A library logs to standard error, too.
            let run = run.env("RUST_LOG", "trace").env("DATABASE_URL", url);
            let (code, output) = run.output().await;
            assert_eq!(code, CONFIG, "{url}: {output}");
            assert!(output.contains("DATABASE_URL must be like postgresql://"), "{url}: {output}");
            assert!(output.contains(named), "{url}: {output}");
            assert!(!output.contains("hidden") && !output.contains("4711"), "{url}: {output}");
        }
    }
}

#[tokio::test]
async fn invalid_variables_of_libpq_are_rejected() {
    for (variable, value, named) in [
        ("PGSSLMODE", "verify_full", "PGSSLMODE must be one of disable, allow, prefer, require"),
        ("PGPORT", "5432x", "PGPORT must be a number"),
        ("PGHOST", "a,b", "PGHOST must name one host"),
        ("PGSSLROOTCERT", "/none/ca.pem", "PGSSLROOTCERT cannot be read from /none/ca.pem"),
        ("PGCHANNELBINDING", "require", "PGCHANNELBINDING with another value than disable"),
        ("PGTARGETSESSIONATTRS", "read-write", "PGTARGETSESSIONATTRS with another value than any"),
        ("PGSERVICE", "app", "PGSERVICE is not supported"),
    ] {
        for url in ["postgresql:///app", "postgresql://app:hidden-password@/app"] {
            let run = Binary::new(&[]).env("SECRET_KEY", SECRET_KEY).env(variable, value);
            let (code, output) = run.env("DATABASE_URL", url).output().await;
            assert_eq!(code, CONFIG, "{variable}: {output}");
            assert!(output.contains(named), "{variable}: {output}");
            assert!(!output.contains("hidden"), "{variable}: {output}");
        }
    }
}

#[tokio::test]
async fn no_line_of_the_password_file_is_logged() {
    let url = "postgresql://app@127.0.0.1:1/app";
    // Without its password, the line is invalid.
    let run = Binary::server(url).file("pgpass", "*:*:hidden-password\n");
    let run = run.env("PGPASSFILE", "pgpass").env("DATABASE_WAIT_SECONDS", "0");
    let (code, output) = run.env("RUST_LOG", "trace").output().await;
    assert_eq!(code, Some(1), "{output}");
    assert!(!output.contains("hidden-password"), "{output}");
}
