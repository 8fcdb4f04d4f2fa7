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

/// Returns a command that inherits no environment and runs in `dir`.
///
/// `PGOPTIONS`, a locale that is not installed or an unwritable `HOME` could break or
/// redirect the program, and the current directory may be inaccessible to this user. The
/// program has its own process group, so that Ctrl-C at the terminal does not reach it.
pub(crate) fn command(program: impl AsRef<OsStr>, dir: &Path) -> Command {
    let mut command = Command::new(program);
    command
        .env_clear()
        // macOS starts threads in a process without a locale, which PostgreSQL refuses.
        .env("LC_ALL", "C")
        .env("TZ", "UTC")
        .env("PATH", "/usr/bin:/bin")
        .current_dir(dir)
        .stdin(Stdio::null())
        .process_group(0)
        .kill_on_drop(true);
    command
}

/// Runs a program until it exits, with `input` on its standard input. The input must fit
/// the buffer of a pipe.
///
/// The program and all its child processes are killed after `limit`, and when the future is
/// dropped.
pub(crate) async fn output(
    command: &mut Command,
    input: &str,
    limit: Duration,
) -> io::Result<Output> {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn()?;
    let mut group = ProcessGroupGuard(child.id());
    if let Some(mut stdin) = child.stdin.take() {
        // A program that exits without reading prints the reason.
        let _ = stdin.write_all(input.as_bytes()).await;
    }
    let output = timeout(limit, child.wait_with_output()).await??;
    group.0 = None;
    Ok(output)
}

/// A process group, by the ID of its first process, that is killed on drop.
struct ProcessGroupGuard(Option<u32>);

impl Drop for ProcessGroupGuard {
    fn drop(&mut self) {
        if let Some(id) = self.0.and_then(|id| i32::try_from(id).ok()) {
            // The processes may have exited in the meantime.
            let _ = killpg(Pid::from_raw(id), Signal::SIGKILL);
        }
    }
}

/// Returns what a program printed, for an error message.
pub(crate) fn combined_output(output: &Output) -> String {
    let text = [output.stdout.as_slice(), output.stderr.as_slice()].concat();
    String::from_utf8_lossy(&text).trim().to_owned()
}
