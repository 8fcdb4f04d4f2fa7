//! Compiles the API: `proto/` becomes Rust code, a descriptor set and the table of methods with
//! their access rules, all in `OUT_DIR`. protox does what protoc would, so that the build needs
//! no installed compiler.

use std::{
    env,
    error::Error,
    fmt::Write,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use protox::prost_reflect::{
    DescriptorPool, DynamicMessage, ExtensionDescriptor, MethodDescriptor,
};

/// The files with services, and the enum that no service refers to. Their imports follow.
const PROTOS: [&str; 4] = [
    "fastzero/auth/v1/auth_service.proto",
    "fastzero/error/v1/error_reason.proto",
    "fastzero/todo/v1/todo_service.proto",
    "fastzero/user/v1/user_service.proto",
];

/// The service of the tests of server streams, compiled with the feature `test-service` only.
const TEST_PROTOS: [&str; 1] = ["fastzero/test/v1/test_service.proto"];

/// The option of `google.protobuf.MethodOptions` that every method of the API carries.
const ACCESS_OPTION: &str = "fastzero.access.v1.access";

/// Messages that hold a password or a token: without `Debug` they cannot reach a log.
const SECRET_MESSAGES: [&str; 11] = [
    ".fastzero.auth.v1.ChangePasswordRequest",
    ".fastzero.auth.v1.CreatePersonalAccessTokenRequest",
    ".fastzero.auth.v1.CreatePersonalAccessTokenResponse",
    ".fastzero.auth.v1.IntrospectTokenRequest",
    ".fastzero.auth.v1.LoginRequest",
    ".fastzero.auth.v1.LoginResponse",
    ".fastzero.auth.v1.RefreshTokenRequest",
    ".fastzero.auth.v1.RefreshTokenResponse",
    ".fastzero.auth.v1.ResetPasswordRequest",
    ".fastzero.auth.v1.TokenSet",
    ".fastzero.user.v1.CreateUserRequest",
];

fn main() -> Result<(), Box<dyn Error>> {
    // tonic-prost-build prints this only if it gets files instead of descriptors.
    println!("cargo::rerun-if-changed=proto");
    // sqlx embeds the migrations and cannot tell cargo about a new file.
    println!("cargo::rerun-if-changed=migrations");
    println!("cargo::rustc-env=FASTZERO_COMMIT={}", commit());

    let with_test_service = env::var_os("CARGO_FEATURE_TEST_SERVICE").is_some();
    let mut includes = vec!["proto"];
    if with_test_service {
        println!("cargo::rerun-if-changed=tests/proto");
        includes.push("tests/proto");
    }
    let mut compiler = protox::Compiler::new(includes)?;
    compiler.include_imports(true).include_source_info(true).open_files(PROTOS)?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    // Encoded by protox: prost's own descriptors drop custom options.
    fs::write(out.join("descriptors.bin"), compiler.encode_file_descriptor_set())?;
    if with_test_service {
        compiler.open_files(TEST_PROTOS)?;
    }
    fs::write(out.join("methods.rs"), method_table(&compiler.descriptor_pool())?)?;
    tonic_prost_build::configure()
        .build_client(true)
        .skip_debug(SECRET_MESSAGES)
        .include_file("proto.rs")
        .compile_fds(compiler.file_descriptor_set())?;
    Ok(())
}

/// Returns the methods of all services as an expression of type `[Method; n]`.
///
/// # Errors
/// If a method has no access option, or a request stream.
fn method_table(pool: &DescriptorPool) -> Result<String, Box<dyn Error>> {
    let option = pool.get_extension_by_name(ACCESS_OPTION).ok_or("the access option is missing")?;
    let mut table = "[".to_owned();
    for method in pool.services().flat_map(|service| service.methods().collect::<Vec<_>>()) {
        let entry = table_entry(&method, &option);
        let entry = entry.map_err(|problem| format!("{}: {problem}", method.full_name()))?;
        table.push_str(&entry);
    }
    table.push(']');
    Ok(table)
}

fn table_entry(
    method: &MethodDescriptor,
    option: &ExtensionDescriptor,
) -> Result<String, Box<dyn Error>> {
    if method.is_client_streaming() {
        return Err("request streams are not supported".into());
    }
    let options = method.options();
    if !options.has_extension(option) {
        return Err(format!("the option ({ACCESS_OPTION}) is missing").into());
    }
    let access = options.get_extension(option);
    let access: &DynamicMessage = access.as_message().ok_or("the access option is no message")?;
    let field = |name: &str| access.get_field_by_name(name).map(std::borrow::Cow::into_owned);
    let level = field("level").and_then(|level| level.as_enum_number()).unwrap_or_default();
    let scope = field("scope").and_then(|scope| scope.as_str().map(str::to_owned));
    let scope = scope.unwrap_or_default();
    let large_response = field("large_response").and_then(|it| it.as_bool()).unwrap_or_default();
    let level = match level {
        1 => "Public",
        2 => "Caller",
        3 => "Session",
        _ => return Err("the access option has no level".into()),
    };
    if (level == "Caller") == scope.is_empty() {
        return Err("methods for callers have a scope, and others have none".into());
    }
    let mut entry = String::new();
    write!(
        entry,
        "Method {{ path: \"/{}/{}\", access: Access::{level}, scope: {:?}, \
         server_streaming: {}, large_response: {large_response}, system: None }},",
        method.parent_service().full_name(),
        method.name(),
        Some(scope).filter(|scope| !scope.is_empty()),
        method.is_server_streaming(),
    )?;
    Ok(entry)
}

/// Returns the commit that is built, for `--version`: `FASTZERO_COMMIT` where there is no
/// repository (in a container), otherwise what git reports.
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
