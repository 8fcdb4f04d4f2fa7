//! Missing and invalid settings, and secrets from files.

use std::net::SocketAddr;

use serde_json::Value;

use super::{APP, BASE, DATABASE, REPLICAS, SECRETS, TESTS, TLS};
use crate::support::{
    certificates::CertificateAuthority,
    compose::{
        DATABASE_PASSWORD, Stack, combined_output, expect_success, inspect, is_engine_available,
        run_command,
    },
};

#[tokio::test]
#[ignore = "needs a Docker engine"]
async fn compose_names_missing_settings() {
    if !is_engine_available() {
        return;
    }
    let stack = Stack::without_env_file(&[BASE]);
    let rejected = stack.try_compose(&["config", "--quiet"]).await;
    assert!(!rejected.status.success());
    assert!(combined_output(&rejected).contains(".env.example"), "{}", combined_output(&rejected));

    std::fs::copy(stack.path(".env.example"), stack.path(".env")).expect("copied");
    let rejected = stack.try_compose(&["config", "--quiet"]).await;
    assert!(!rejected.status.success());
    assert!(
        combined_output(&rejected).contains("variable SECRET_KEY is missing"),
        "{}",
        combined_output(&rejected)
    );

    for files in [&[BASE][..], &[BASE, REPLICAS], &[BASE, SECRETS], &[BASE, TLS], &[TESTS]] {
        let stack = Stack::configured(files);
        let checked = stack.try_compose(&["config", "--quiet"]).await;
        assert!(checked.status.success(), "{files:?}");
        assert_eq!(combined_output(&checked), "", "{files:?}");
    }
}

#[tokio::test]
#[ignore = "needs a Docker engine"]
async fn all_services_rotate_their_logs_and_mount_existing_files() {
    if !is_engine_available() {
        return;
    }
    for files in [&[BASE][..], &[BASE, REPLICAS], &[BASE, SECRETS], &[BASE, TLS], &[TESTS]] {
        let stack = Stack::configured(files);
        let config = ["--profile", "monitoring", "config", "--format", "json"];
        let config: Value = serde_json::from_str(&stack.compose(&config).await).expect("JSON");
        let services = config["services"].as_object().expect("services");
        assert_eq!(services.contains_key("fastzero_grafana"), files[0] == BASE, "{files:?}");
        for (name, service) in services {
            assert_eq!(service["logging"]["driver"], "local", "{name} of {files:?}");
            let volumes = service["volumes"].as_array().into_iter().flatten();
            for volume in volumes.filter(|volume| volume["type"] == "bind") {
                let source = volume["source"].as_str().expect("a path");
                // The user creates the directory of the certificate.
                let exists = source.ends_with("/tls") || std::path::Path::new(source).exists();
                assert!(exists, "{name} of {files:?} mounts {source}");
            }
        }
    }
}

#[tokio::test]
#[ignore = "needs a Docker engine"]
async fn the_example_with_tls_serves_tls_and_is_healthy() {
    if !is_engine_available() {
        return;
    }
    let stack = Stack::configured(&[BASE, TLS]);
    let authority = CertificateAuthority::new();
    let identity = authority.issue();
    std::fs::create_dir(stack.path("tls")).expect("created");
    for (name, pem) in [("cert.pem", &identity.certificate), ("key.pem", &identity.key)] {
        std::fs::write(stack.path("tls").join(name), pem).expect("written");
    }
    stack.compose(&["up", "--build", "--wait"]).await;
    let address = SocketAddr::from(([127, 0, 0, 1], stack.port));
    assert!(authority.client().can_call(address).await);
    assert!(!CertificateAuthority::new().client().can_call(address).await, "another authority");
}

#[tokio::test]
#[ignore = "needs a Docker engine"]
async fn an_invalid_setting_fails_startup_with_a_readable_line() {
    if !is_engine_available() {
        return;
    }
    let stack = Stack::configured(&[BASE]);
    stack.compose(&["build"]).await;
    stack.compose(&["up", "--wait", DATABASE]).await;
    for (setting, code, line) in [
        ("SECRET_KEY=short", 78, "error: SECRET_KEY must have at least 32 random bytes"),
        ("SECRET_KEY=", 78, "error: SECRET_KEY must be set"),
        ("DATABASE_URL=", 78, "error: DATABASE_URL must be set"),
        ("DATABASE_URL=mysql://db", 78, "error: DATABASE_URL must be like postgresql://"),
        ("DATABASE_URL=postgresql://nowhere/db", 1, "error: "),
        ("PGPASSWORD=wrong", 1, "password authentication failed"),
    ] {
        let wait = "DATABASE_WAIT_SECONDS=1";
        let run = ["run", "--rm", "--no-deps", "-e", wait, "-e", setting, APP];
        let rejected = stack.try_compose(&run).await;
        let output = combined_output(&rejected);
        assert_eq!(rejected.status.code(), Some(code), "{setting}: {output}");
        assert!(output.contains(line), "{setting}: {output}");
        assert!(!output.contains("panicked"), "{setting}: {output}");
    }
}

#[tokio::test]
#[ignore = "needs a Docker engine"]
async fn secrets_are_read_from_files() {
    if !is_engine_available() {
        return;
    }
    let stack = Stack::configured(&[BASE, SECRETS]);
    // The commands of the example, for a user whose new files are private.
    let example = std::fs::read_to_string(stack.path(SECRETS)).expect("the example");
    let commands = example.lines().filter_map(|line| line.strip_prefix("#   "));
    let commands: Vec<_> = commands.filter(|line| !line.starts_with("docker compose")).collect();
    let mut shell = stack.command("bash");
    shell.args(["-euc", &format!("umask 077\n{}", commands.join("\n"))]);
    expect_success(run_command(shell).await);
    let secrets = ["secret_key", "postgres_password"].map(|name| {
        let file = stack.path("secrets").join(name);
        std::fs::read_to_string(file).expect("the command writes it").trim().to_owned()
    });
    stack.compose(&["up", "--build", "--wait"]).await;
    stack.anonymous().await.signed_up("ana").await;
    for service in [APP, DATABASE] {
        let container = stack.container(service).await;
        let environment = inspect(&container, "{{.Config.Env}}").await;
        for secret in secrets.iter().map(String::as_str).chain([DATABASE_PASSWORD]) {
            assert!(!environment.contains(secret), "{environment}");
        }
    }
}
