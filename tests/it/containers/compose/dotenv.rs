//! The file `.env` has one meaning, in compose and in the service.

use std::fs;

use serde_json::Value;
use tempfile::TempDir;

use crate::support::compose::{docker_command, is_engine_available, run_command};

const COMPOSE: &str = "services: { a: { image: a, environment: [TOKEN_ISSUER] } }";

/// Returns the value of the variable in compose: text, null if it is not set, or false if
/// compose rejects the file.
async fn value_in_compose(env_file: &str) -> Value {
    let dir = TempDir::new().expect("a directory");
    fs::write(dir.path().join(".env"), env_file).expect("written");
    fs::write(dir.path().join("compose.yaml"), COMPOSE).expect("written");
    let mut command = docker_command(&["compose", "--project-name=a", "config", "--format=json"]);
    command.current_dir(&dir).env_remove("TOKEN_ISSUER").env("EXPORTED", "environment");
    let output = run_command(command).await;
    if !output.status.success() {
        return Value::Bool(false);
    }
    let config: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    match &config["services"]["a"]["environment"]["TOKEN_ISSUER"] {
        // The output is a compose file again, in which a dollar sign is doubled.
        Value::String(text) => Value::String(text.replace("$$", "$")),
        value => value.clone(),
    }
}

/// The unit test of the parser compares the same table with the service.
#[tokio::test]
#[ignore = "needs a Docker engine"]
async fn a_file_has_the_value_that_the_service_gives_it() {
    if !is_engine_available() {
        return;
    }
    let cases = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/dotenv.json"));
    let cases: Vec<(String, Value)> = serde_json::from_str(cases).expect("a table");
    for (text, expected) in cases {
        assert_eq!(value_in_compose(&text).await, expected, "{text:?}");
    }
}
