//! Child processes that end with this process.

use std::{
    env,
    ffi::{OsStr, OsString},
    os::unix::process::CommandExt,
    process::{self, Stdio},
};

use nix::{
    sys::{prctl, signal::Signal},
    unistd::{Pid, getppid},
};
use tokio::process::Command;

use crate::error::{BoxError, Result};

/// Returns a command for a program that the kernel terminates when this process ends, in
/// whatever way. Ctrl-C in the terminal does not reach the program.
///
/// Spawn the command from the main thread: the kernel watches the thread that spawned the
/// child, not the process.
pub fn die_with_parent(program: impl AsRef<OsStr>) -> Result<Command> {
    let mut command = Command::new(env::current_exe()?);
    command.args(["exec-with-parent", &process::id().to_string()]).arg(program);
    command.process_group(0).kill_on_drop(true).stdin(Stdio::null());
    Ok(command)
}

/// Replaces this process with a program that ends with its parent. Returns only on failure.
pub fn exec_with_parent(parent: i32, command: &[OsString]) -> BoxError {
    let Some((program, arguments)) = command.split_first() else {
        return "no program to execute".into();
    };
    if let Err(error) = prctl::set_pdeathsig(Signal::SIGTERM) {
        return error.into();
    }
    // The kernel sends no signal if the parent ended before the call above.
    if getppid() != Pid::from_raw(parent) {
        return "the parent process has ended".into();
    }
    process::Command::new(program).args(arguments).exec().into()
}
