//! The child process as the application sees it.

use std::{
    env, io,
    path::Path,
    process::{ExitStatus, Stdio},
    time::Duration,
};

use secrecy::SecretString;
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, BufReader},
    process::{Child, ChildStdin, ChildStdout, Command},
    time::timeout,
};

use crate::{App, Error, dirs, error::ErrorChain};

/// How long the child may take to print the URL: longer than its own timeouts together (for
/// the download, unpacking, the cluster, the start), whose errors are more specific.
const START_TIMEOUT: Duration = Duration::from_mins(30);
/// How long the child may take to exit: longer than it gives PostgreSQL.
const STOP_TIMEOUT: Duration = Duration::from_secs(12);
/// The maximum length of the URL: a path of 4096 bytes, each as `%XX`, and the rest.
const MAX_URL_BYTES: u64 = 16 * 1024;

/// A PostgreSQL in a child process. It stops when this is dropped, and when this process
/// ends in any way.
#[derive(Debug)]
pub struct EmbeddedPostgres {
    child: Child,
    /// The other end is the child's standard input.
    lifeline: ChildStdin,
    url: SecretString,
}

impl EmbeddedPostgres {
    /// Starts this program as a child process and waits until PostgreSQL accepts
    /// connections.
    ///
    /// The data is in `data_dir`, or in the user's own directory for the application if that
    /// is `None`. The very first start downloads PostgreSQL, which may take minutes.
    ///
    /// # Errors
    /// Returns [`Error::ChildExited`] if there is no PostgreSQL; the child has printed the
    /// reason to standard error. Returns another error if the child cannot be started, or
    /// takes longer than 30 minutes.
    pub async fn start(app: &App, data_dir: Option<&Path>) -> Result<Self, Error> {
        let program = env::current_exe().map_err(Error::io("find", "this program"))?;
        let mut command = Command::new(&program);
        command.args(app.child_args);
        if data_dir.is_some() {
            command.env(app.data_dir_var, dirs::data_dir(app, data_dir)?);
        }
        for variable in app.withheld_vars {
            command.env_remove(variable);
        }
        // The current directory may contain a `.env` from which the child would read the
        // withheld variables again.
        command.current_dir("/");
        // Ctrl-C at the terminal signals the foreground process group. The application must
        // be able to finish its work before it stops its database.
        command.process_group(0);
        let (mut child, lifeline, stdout) =
            spawn(&mut command).map_err(Error::io("start", &program))?;
        match timeout(START_TIMEOUT, read_url(stdout)).await {
            Ok(Some(url)) => Ok(Self { child, lifeline, url }),
            Ok(None) => {
                drop(lifeline);
                Err(Error::ChildExited { status: wait(&mut child).await? })
            }
            // Dropping the lifeline stops the child.
            Err(_) => Err(timeout_error("starting the embedded PostgreSQL", START_TIMEOUT)),
        }
    }

    /// Returns the URL of the database, as sqlx and libpq read it. It contains the password.
    #[must_use]
    pub fn url(&self) -> &SecretString {
        &self.url
    }

    /// Waits until PostgreSQL exits without a request, and returns the error. It is safe to
    /// cancel this and to call it again.
    pub async fn exited(&mut self) -> Error {
        match self.child.wait().await {
            Ok(status) => Error::ChildExited { status },
            Err(error) => Error::io("wait for", "the embedded PostgreSQL")(error),
        }
    }

    /// Stops PostgreSQL, closes all its connections, and waits for the child, at most 12 s.
    pub async fn stop(self) {
        let Self { mut child, lifeline, .. } = self;
        drop(lifeline);
        match wait(&mut child).await {
            Ok(status) if status.success() => {}
            Ok(status) => tracing::warn!(%status, "embedded PostgreSQL exited with an error"),
            Err(error) => {
                tracing::warn!(error = %ErrorChain(&error), "killing embedded PostgreSQL");
                // The next start stops the orphaned processes.
                let _ = child.start_kill();
            }
        }
    }
}

/// Starts a program with pipes as its standard input and output.
fn spawn(command: &mut Command) -> io::Result<(Child, ChildStdin, ChildStdout)> {
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    let stdin = child.stdin.take().expect("standard input is piped");
    let stdout = child.stdout.take().expect("standard output is piped");
    Ok((child, stdin, stdout))
}

/// Reads the only line that the child prints. Returns `None` if the child exits before.
async fn read_url(stdout: ChildStdout) -> Option<SecretString> {
    let mut line = String::new();
    BufReader::new(stdout.take(MAX_URL_BYTES)).read_line(&mut line).await.ok()?;
    line.strip_suffix('\n').map(SecretString::from)
}

/// Waits for a child whose lifeline is closed.
async fn wait(child: &mut Child) -> Result<ExitStatus, Error> {
    match timeout(STOP_TIMEOUT, child.wait()).await {
        Ok(status) => status.map_err(Error::io("wait for", "the embedded PostgreSQL")),
        Err(_) => Err(timeout_error("stopping the embedded PostgreSQL", STOP_TIMEOUT)),
    }
}

fn timeout_error(operation: &'static str, limit: Duration) -> Error {
    Error::Timeout { operation, timeout_seconds: limit.as_secs() }
}
