//! Runs PostgreSQL's programs.

use std::{
    ffi::OsStr,
    io,
    path::Path,
    process::{Output, Stdio},
    time::Duration,
};

use nix::{
    sys::signal::{Signal, killpg},
    unistd::Pid,
};
use tokio::{io::AsyncWriteExt, process::Command, time::timeout};

/// A program that gets nothing of the caller's environment, in which `PGOPTIONS`, a
/// locale that is not installed or an unwritable `HOME` could break or redirect it, and
/// that runs in `folder`, because the caller's folder may be closed to this user.
///
/// It has a process group of its own: Ctrl-C at the terminal does not reach it.
pub(super) fn command(program: impl AsRef<OsStr>, folder: &Path) -> Command {
    let mut command = Command::new(program);
    command
        .env_clear()
        // macOS starts threads in a process without a locale, which PostgreSQL refuses.
        .env("LC_ALL", "C")
        .env("TZ", "UTC")
        .env("PATH", "/usr/bin:/bin")
        .current_dir(folder)
        .stdin(Stdio::null())
        .process_group(0)
        .kill_on_drop(true);
    command
}

/// Runs a program to its end, with `input` (less than a pipe holds) on its standard
/// input. When it takes longer than `limit`, or when this is dropped, it is killed with
/// all that it started.
pub(super) async fn output(
    command: &mut Command,
    input: &str,
    limit: Duration,
) -> io::Result<Output> {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn()?;
    let mut group = Group(child.id());
    if let Some(mut stdin) = child.stdin.take() {
        // A program that ends without reading says why by itself.
        let _ = stdin.write_all(input.as_bytes()).await;
    }
    let output = timeout(limit, child.wait_with_output()).await??;
    group.0 = None;
    Ok(output)
}

/// The process group of a program that runs, by the number of its first process.
struct Group(Option<u32>);

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(id) = self.0.and_then(|id| i32::try_from(id).ok()) {
            // It may have ended in between.
            let _ = killpg(Pid::from_raw(id), Signal::SIGKILL);
        }
    }
}

/// What a program printed, for an error's message.
pub(super) fn printed(output: &Output) -> String {
    let text = [output.stdout.as_slice(), output.stderr.as_slice()].concat();
    String::from_utf8_lossy(&text).trim().to_owned()
}
