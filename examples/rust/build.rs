//! Generates the client code of the API in `OUT_DIR`. protox parses the `.proto` files, so
//! the build needs no protoc.

use std::error::Error;

/// The files with services. Their imports are found in [`INCLUDE_DIR`].
const PROTOS: [&str; 3] = [
    "fastzero/auth/v1/auth_service.proto",
    "fastzero/todo/v1/todo_service.proto",
    "fastzero/user/v1/user_service.proto",
];
const INCLUDE_DIR: &str = "../../proto";

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed={INCLUDE_DIR}");
    let descriptors = protox::compile(PROTOS, [INCLUDE_DIR])?;
    tonic_prost_build::configure()
        .build_server(false)
        .include_file("proto.rs")
        .compile_fds(descriptors)?;
    Ok(())
}
