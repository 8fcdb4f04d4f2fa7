//! Missing and invalid settings, and secrets from files.

use std::net::SocketAddr;

use serde_json::Value;

use super::{APP, BASE, DATABASE, REPLICAS, SECRETS, TESTS, TLS};
use crate::support::{
    certificates::CertificateAuthority,
    compose::{DATABASE_PASSWORD, Stack, combined_output, inspect, is_engine_available},
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
    let secrets = stack.path("secrets");
    std::fs::create_dir(&secrets).expect("created");
    let url = "postgresql://app_user:from-a-file@fastzero_database/app_db";
    for (name, secret) in [
        ("secret_key", "a secret key that is stored in a file"),
        ("postgres_password", "from-a-file"),
        ("database_url", url),
    ] {
        std::fs::write(secrets.join(name), format!("{secret}\n")).expect("written");
    }
    stack.compose(&["up", "--build", "--wait"]).await;
    stack.anonymous().await.signed_up("ana").await;
    for service in [APP, DATABASE] {
        let container = stack.container(service).await;
        let environment = inspect(&container, "{{.Config.Env}}").await;
        for secret in ["from-a-file", "stored in a file", DATABASE_PASSWORD] {
            assert!(!environment.contains(secret), "{environment}");
        }
    }
}
