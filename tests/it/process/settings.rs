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
        ("ALGORITHM", "none", "EdDSA, HS256"),
        ("ALGORITHM", "eddsa", "EdDSA, HS256"),
        ("ACCESS_TOKEN_EXPIRE_MINUTES", "0", "1..="),
        ("ACCESS_TOKEN_EXPIRE_MINUTES", "38881", "at most 38880 (27 days) if ALGORITHM is EdDSA"),
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

/// A pipe can be read once, as in `SECRET_KEY_FILE=<(command)`.
#[tokio::test]
async fn the_file_of_a_secret_may_be_a_pipe() {
    let database = TestDatabase::create().await;
    for (variable, value, other, file) in [
        ("SECRET_KEY", SECRET_KEY.to_owned(), "DATABASE_URL_FILE", database.url()),
        ("DATABASE_URL", database.url(), "SECRET_KEY_FILE", SECRET_KEY.to_owned()),
    ] {
        let server = Binary::new(&[]).env(variable, &value).env(other, "/dev/stdin").input(&file);
        server.env("LISTEN_ADDR", "127.0.0.1:0").start().address().await;
    }
    let migrate = Binary::new(&["migrate"]).env("DATABASE_URL_FILE", "/dev/stdin");
    let (code, output) = migrate.input(&database.url()).output().await;
    assert_eq!(code, Some(0), "{output}");
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
        ("postgresql://app:p@db/app?sslmode=verify-ca", "sslmode=verify-ca needs sslrootcert"),
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
        ("PGMINPROTOCOLVERSION", "3.2", "PGMINPROTOCOLVERSION with another value than 3.0"),
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

#[tokio::test]
async fn a_value_that_may_be_secret_is_not_shown() {
    let url = "postgresql://app:hidden@db/app";
    let collector = "http://app:hidden@collector:4318/v1/traces";
    let collector_with_key = "http://collector:4318/v1/traces?api-key=hidden";
    let pem = "-----BEGIN PRIVATE KEY-----\nhidden";
    let key = "hiddenhiddenhiddenhiddenhiddenhidden";
    let plain = || Binary::new(&[]).env("SECRET_KEY", SECRET_KEY);
    for run in [
        plain().env("OTEL_EXPORTER_OTLP_ENDPOINT", collector),
        plain().env("OTEL_EXPORTER_OTLP_ENDPOINT", collector_with_key),
        Binary::new(&["--otel-exporter-otlp-endpoint", collector]),
        // Values of other settings.
        plain().env("LISTEN_ADDR", url),
        plain().env("LISTEN_ADDR", key),
        plain().env("RUST_LOG", url),
        plain().env("DATABASE_URL_FILE", url),
        plain().env("TLS_CERT_FILE", pem).env("TLS_KEY_FILE", pem),
        Binary::new(&[]).env("DATABASE_URL", "postgresql://db/app").env("SECRET_KEY_FILE", key),
        plain().env("DATABASE_URL", "postgresql:///app").env("PGSSLKEY", key),
        Binary::new(&["--reflection", url]),
    ] {
        let (code, output) = run.output().await;
        assert_eq!(code, CONFIG, "{output}");
        assert!(output.contains("(not shown"), "{output}");
        assert!(!output.contains("hidden"), "{output}");
    }
    for arguments in [&[url][..], &["migrate", url], &["healthcheck", url]] {
        let (code, output) = Binary::new(arguments).output().await;
        assert_eq!(code, USAGE, "{output}");
        assert!(output.contains("(not shown)") && !output.contains("hidden"), "{output}");
    }
    let check = Binary::new(&["healthcheck", "--addr", "app:hidden@127.0.0.1:1"]);
    let (code, output) = check.output().await;
    assert_eq!(code, Some(2), "{output}");
    assert!(output.contains("(not shown)") && !output.contains("hidden"), "{output}");
    let help = Binary::new(&["--help"]).env("OTEL_EXPORTER_OTLP_ENDPOINT", collector);
    let (_, output) = help.env("DATABASE_URL_FILE", url).output().await;
    assert!(output.contains("[env: OTEL_EXPORTER_OTLP_ENDPOINT]"), "{output}");
    assert!(!output.contains("hidden"), "{output}");
}

#[tokio::test]
async fn a_variable_that_is_not_utf_8_is_named() {
    use std::{ffi::OsStr, os::unix::ffi::OsStrExt};

    let value = OsStr::from_bytes(b"verify-full\xff");
    for variable in ["DATABASE_URL", "SECRET_KEY", "LISTEN_ADDR", "PGSSLMODE", "PGPASSWORD"] {
        let run = Binary::new(&[]).env("SECRET_KEY", SECRET_KEY);
        let run = run.env("DATABASE_URL", "postgresql:///app").env_os(variable, value);
        let (code, output) = run.output().await;
        assert_eq!(code, CONFIG, "{variable}: {output}");
        assert!(output.contains(&format!("{variable} must be UTF-8 text")), "{output}");
        assert!(!output.contains("verify-full\u{fffd}"), "{output}");
    }
}

#[tokio::test]
async fn secrets_may_come_from_pipes() {
    // A shell passes a pipe for `<(command)`. A second read would wait forever.
    let url = "--database-url-file <(echo postgresql://a@127.0.0.1:1/a)";
    let key = format!("--secret-key-file <(echo {SECRET_KEY})");
    for arguments in [format!("serve {url} {key}"), format!("migrate {url}")] {
        let run = Binary::in_bash(&arguments).env("DATABASE_WAIT_SECONDS", "0");
        let (code, output) = run.env("LISTEN_ADDR", "127.0.0.1:0").output().await;
        assert_eq!(code, Some(1), "{output}");
        assert!(output.contains("cannot reach the database at 127.0.0.1:1"), "{output}");
    }
}

#[tokio::test]
async fn a_url_file_may_begin_with_a_byte_order_mark() {
    let run = Binary::new(&[]).file("url", "\u{feff}postgresql://a@127.0.0.1:1/a\r\n");
    let run = run.env("SECRET_KEY", SECRET_KEY).env("DATABASE_URL_FILE", "url");
    let run = run.env("DATABASE_WAIT_SECONDS", "0").env("LISTEN_ADDR", "127.0.0.1:0");
    let (code, output) = run.output().await;
    assert_eq!(code, Some(1), "{output}");
    assert!(output.contains("cannot reach the database at 127.0.0.1:1"), "{output}");
}

#[tokio::test]
async fn the_address_of_a_variable_precedes_the_host_of_the_url() {
    let run = Binary::server("postgresql://a@no-such-host.invalid:1/a");
    let run = run.env("PGHOSTADDR", "127.0.0.1").env("DATABASE_WAIT_SECONDS", "0");
    let (code, output) = run.output().await;
    assert_eq!(code, Some(1), "{output}");
    assert!(output.contains("cannot reach the database at 127.0.0.1:1"), "{output}");
    // The certificate would be verified for the address.
    let run = Binary::server("postgresql://a@db/a?sslmode=verify-full");
    let (code, output) = run.env("PGHOSTADDR", "127.0.0.1").output().await;
    assert_eq!(code, CONFIG, "{output}");
    assert!(output.contains("PGHOSTADDR is not supported with sslmode=verify-full"), "{output}");
}

#[tokio::test]
async fn the_connections_have_the_application_name_of_the_environment() {
    let database = TestDatabase::create().await;
    for (variable, expected) in [("", "fast-zero"), ("replica-1", "replica-1")] {
        let server = Binary::server(&database.url()).env("PGAPPNAME", variable).start();
        server.address().await;
        let names: Vec<String> = sqlx::query_scalar(
            "select distinct application_name from pg_stat_activity
             where datname = current_database() and pid <> pg_backend_pid()",
        )
        .fetch_all(&mut database.connect().await)
        .await
        .expect("names");
        assert!(names.iter().any(|name| name == expected), "{names:?}");
    }
}
