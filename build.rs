//! Compiles the contract: `proto/` becomes Rust code and a descriptor set, both in
//! `OUT_DIR`. protox does what protoc would, so nobody has to install it.

use std::{
    env,
    error::Error,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use prost::Message;

/// The files with services, and the enum that no service refers to. What they
/// import comes by itself.
const PROTOS: [&str; 4] = [
    "fastzero/auth/v1/auth_service.proto",
    "fastzero/error/v1/error_reason.proto",
    "fastzero/todo/v1/todo_service.proto",
    "fastzero/user/v1/user_service.proto",
];

/// Messages that hold a password or a token: without `Debug` they cannot reach a log.
const SECRET_MESSAGES: [&str; 8] = [
    ".fastzero.auth.v1.ChangePasswordRequest",
    ".fastzero.auth.v1.IntrospectTokenRequest",
    ".fastzero.auth.v1.LoginRequest",
    ".fastzero.auth.v1.LoginResponse",
    ".fastzero.auth.v1.RefreshTokenRequest",
    ".fastzero.auth.v1.RefreshTokenResponse",
    ".fastzero.auth.v1.TokenSet",
    ".fastzero.user.v1.CreateUserRequest",
];

fn main() -> Result<(), Box<dyn Error>> {
    // Not printed by tonic-prost-build when it gets descriptors instead of files.
    println!("cargo::rerun-if-changed=proto");
    // sqlx embeds the migrations, and cannot tell cargo of a new file.
    println!("cargo::rerun-if-changed=migrations");
    println!("cargo::rustc-env=FASTZERO_COMMIT={}", commit());

    let descriptors = protox::compile(PROTOS, ["proto"])?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(out.join("descriptors.bin"), descriptors.encode_to_vec())?;
    tonic_prost_build::configure()
        .build_client(true)
        .skip_debug(SECRET_MESSAGES)
        .include_file("proto.rs")
        .compile_fds(descriptors)?;
    Ok(())
}

/// The commit that is built, for `--version`: `FASTZERO_COMMIT` where there is no
/// repository (in a container), else what git says.
fn commit() -> String {
    println!("cargo::rerun-if-env-changed=FASTZERO_COMMIT");
    if let Ok(commit) = env::var("FASTZERO_COMMIT") {
        return commit;
    }
    let log = ".git/logs/HEAD";
    if Path::new(log).exists() {
        println!("cargo::rerun-if-changed={log}");
    }
    Command::new("git")
        .args(["rev-parse", "--short=12", "HEAD"])
        .output()
        .ok()
        .filter(|output| output.status.success())
        .and_then(|output| String::from_utf8(output.stdout).ok())
        .map_or_else(|| "unknown".to_owned(), |commit| commit.trim().to_owned())
}
