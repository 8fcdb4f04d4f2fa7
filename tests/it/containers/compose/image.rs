//! The image.

use super::{APP, BASE, DATABASE};
use crate::support::{
    app::SECRET_KEY,
    compose::{
        DATABASE_PASSWORD, Stack, docker, docker_command, expect_success, inspect,
        is_engine_available, run_command,
    },
    wait::wait_until,
};

/// The maximum size that the image adds to its base, with a probe of this size or larger: 16 MB for
/// the service.
const MAX_ADDED_BYTES: u64 = 28_600_000;

/// The size of `grpc_health_probe` as its project builds it. Another build may be smaller.
const PROBE_BYTES: u64 = 12_600_000;

/// The type of a section with symbols (ELF specification, section 4).
const SHT_SYMTAB: u32 = 2;

#[tokio::test]
#[ignore = "needs a Docker engine"]
async fn the_image_contains_little_but_the_service() {
    if !is_engine_available() {
        return;
    }
    let stack = Stack::configured(&[BASE]);
    stack.compose(&["build"]).await;
    let image = "fast-zero";
    for (what, expected) in [
        ("{{.Config.User}}", "65532:65532"),
        ("{{.Config.Entrypoint}}", "[/bin/fast-zero]"),
        ("{{.Config.Healthcheck.Test}}", "[CMD /bin/fast-zero healthcheck]"),
        ("{{.Config.StopSignal}}", "SIGTERM"),
        ("{{.Config.ExposedPorts}}", "map[50051/tcp:{}]"),
        ("{{index .Config.Labels \"org.opencontainers.image.title\"}}", "fast-zero"),
    ] {
        assert_eq!(inspect(image, what).await, expected, "{what}");
    }
    let environment = inspect(image, "{{.Config.Env}}").await;
    assert!(environment.contains("LISTEN_ADDR=0.0.0.0:50051"), "{environment}");
    for secret in ["SECRET_KEY", "PASSWORD", "DATABASE_URL"] {
        assert!(!environment.contains(secret), "{environment}");
    }

    let dockerfile = std::fs::read_to_string(stack.path("Dockerfile")).expect("an existing entry");
    let base = dockerfile.rsplit("FROM ").next().and_then(|stage| stage.lines().next());
    let base = base.expect("the last stage has a base");
    if !run_command(docker_command(&["image", "inspect", base])).await.status.success() {
        docker(&["pull", "--quiet", base]).await;
    }
    let size = async |image| inspect(image, "{{.Size}}").await.parse::<u64>().expect("a number");
    let added = size(image).await - size(base).await;

    let container = docker(&["create", image]).await;
    let [binary, probe] = ["fast-zero", "grpc_health_probe"].map(|name| stack.path(name));
    for file in [&binary, &probe] {
        let name = file.file_name().and_then(|name| name.to_str()).expect("a name");
        let from = format!("{}:/bin/{name}", container.trim());
        docker(&["cp", &from, file.to_str().expect("UTF-8")]).await;
    }
    let probe_bytes = std::fs::metadata(probe).expect("a file").len();
    let added = added - probe_bytes + probe_bytes.max(PROBE_BYTES);
    println!("the image has {added} bytes on top of its base");
    assert!(added < MAX_ADDED_BYTES, "{added} bytes");
    let sections = section_types(&std::fs::read(binary).expect("a file"));
    assert!(!sections.is_empty() && !sections.contains(&SHT_SYMTAB), "{sections:?}");

    let history = docker(&["history", "--no-trunc", image]).await;
    let export = format!("docker export {}", container.trim());
    let list =
        format!("{export} | tar -tv --numeric-owner && ! {export} | grep -qa '{SECRET_KEY}'");
    let mut listing = stack.command("bash");
    listing.args(["-o", "pipefail", "-c", &list]);
    let files = run_command(listing).await;
    docker(&["rm", container.trim()]).await;
    let files = expect_success(files);
    for secret in [SECRET_KEY, DATABASE_PASSWORD] {
        assert!(!history.contains(secret), "{history}");
    }
    assert!(files.contains("bin/fast-zero\n"), "{files}");
    for file in files.lines() {
        let mut columns = file.split_whitespace();
        let (mode, owner) = (columns.next().expect("a mode"), columns.next().expect("an owner"));
        let path = columns.nth(3).expect("a path");
        let (user, group) = owner.split_once('/').expect("both");
        let writable = user == "65532" || mode.as_bytes()[8] == b'w';
        let writable = writable || (group == "65532" && mode.as_bytes()[5] == b'w');
        assert!(!(mode.starts_with('-') && writable), "{file}");
        let name = path.rsplit('/').next().expect("a name");
        for unwanted in ["sh", "bash", "dash", "busybox", "cargo", ".env", ".git", "Cargo.toml"] {
            assert_ne!(name, unwanted, "{file}");
        }
    }
}

#[tokio::test]
#[ignore = "needs a Docker engine"]
async fn the_health_check_finds_a_server_that_is_started_with_flags() {
    if !is_engine_available() {
        return;
    }
    let stack = Stack::configured(&[BASE]);
    stack.compose(&["build"]).await;
    stack.compose(&["up", "--wait", DATABASE]).await;
    let flags = ["--listen-addr", "0.0.0.0:6000"];
    let run = ["run", "--detach", "--no-deps", APP];
    let container = stack.compose(&[&run[..], &flags].concat()).await;
    // As the engine runs the health check of the image: with the environment of the container.
    let check = ["exec", container.trim(), "/bin/fast-zero", "healthcheck"];
    wait_until("the server is healthy", async || {
        run_command(docker_command(&check)).await.status.success()
    })
    .await;
    // The check has an address of its own.
    let other = run_command(docker_command(&[&check[..], &["--addr=127.0.0.1:1"]].concat())).await;
    assert_eq!(other.status.code(), Some(2));
}

/// Returns the types of the sections of a 64-bit little-endian ELF file.
fn section_types(elf: &[u8]) -> Vec<u32> {
    let number = |at: usize, len: usize| {
        let bytes = elf[at..at + len].iter().rev();
        bytes.fold(0, |number, byte| number << 8 | usize::from(*byte))
    };
    let (start, size, count) = (number(0x28, 8), number(0x3a, 2), number(0x3c, 2));
    let types = (0..count).map(|index| number(start + index * size + 4, 4));
    types.map(|kind| u32::try_from(kind).expect("4 bytes")).collect()
}
