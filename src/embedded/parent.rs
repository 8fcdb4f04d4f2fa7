//! The server's side of a private PostgreSQL.

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

use super::{Error, folders};

/// How long the child may take to print the URL: longer than its own limits together
/// (fetching, unpacking, the making of the data folder, the start), each of which tells
/// better what took so long.
const START_LIMIT: Duration = Duration::from_mins(30);
/// How long the child may take to end: longer than it gives PostgreSQL.
const STOP_LIMIT: Duration = Duration::from_secs(12);
/// The longest URL, in bytes: a path of 4096 bytes, each as `%XX`, and the rest.
const MAX_URL: u64 = 16 * 1024;
/// What the child has no need to know.
const SECRETS: [&str; 2] = ["SECRET_KEY", "SECRET_KEY_PREVIOUS"];

/// A private PostgreSQL, in a child process. It ends with this process, however that
/// ends, and when this is dropped.
#[derive(Debug)]
pub struct Embedded {
    child: Child,
    /// Its other end is the child's standard input.
    lifeline: ChildStdin,
    url: SecretString,
}

impl Embedded {
    /// Starts this same program as the child, with the data in `data_dir`, or in the
    /// user's own folder if there is none, and waits until PostgreSQL answers. The
    /// first start of all fetches PostgreSQL, which may take minutes.
    ///
    /// # Errors
    /// [`Error::Child`] when there is no PostgreSQL; the child has told why on standard
    /// error.
    pub async fn start(data_dir: Option<&Path>) -> Result<Self, Error> {
        let program = env::current_exe().map_err(Error::io("finding", "this program"))?;
        let mut command = Command::new(&program);
        command.args(["postgres", "--lifeline"]);
        if data_dir.is_some() {
            command.env("FASTZERO_DATA_DIR", folders::data_folder(data_dir)?);
        }
        for secret in SECRETS {
            command.env_remove(secret);
        }
        // Away from a `.env` that would give it the secrets again.
        command.current_dir("/");
        // Ctrl-C goes to the group of processes in the foreground: the server must be
        // able to finish its calls before it ends its database.
        command.process_group(0);
        let (mut child, lifeline, stdout) =
            spawn(&mut command).map_err(Error::io("starting", &program))?;
        match timeout(START_LIMIT, read_url(stdout)).await {
            Ok(Some(url)) => Ok(Self { child, lifeline, url }),
            Ok(None) => {
                drop(lifeline);
                Err(Error::Child { status: wait(&mut child).await? })
            }
            // Dropping the lifeline ends the child.
            Err(_) => Err(too_long("the start of the private PostgreSQL", START_LIMIT)),
        }
    }

    /// How to connect, as sqlx and libpq read it. It contains the password.
    #[must_use]
    pub fn url(&self) -> &SecretString {
        &self.url
    }

    /// Waits until PostgreSQL ends by itself, and tells how. May be given up and called
    /// again.
    pub async fn ended(&mut self) -> Error {
        match self.child.wait().await {
            Ok(status) => Error::Child { status },
            Err(error) => Error::io("waiting for", "the private PostgreSQL")(error),
        }
    }

    /// Ends PostgreSQL with all its connections, and waits for that.
    pub async fn stop(self) {
        let Self { mut child, lifeline, .. } = self;
        drop(lifeline);
        match wait(&mut child).await {
            Ok(status) if status.success() => {}
            Ok(status) => tracing::warn!(%status, "the private PostgreSQL has failed"),
            Err(error) => {
                tracing::warn!(%error, "killing the process of the private PostgreSQL");
                // The next start ends what is left.
                let _ = child.start_kill();
            }
        }
    }
}

/// Starts a program, with its standard input and output.
fn spawn(command: &mut Command) -> io::Result<(Child, ChildStdin, ChildStdout)> {
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    let stdin = child.stdin.take().expect("it is piped");
    let stdout = child.stdout.take().expect("it is piped");
    Ok((child, stdin, stdout))
}

/// The one line that the child prints; `None` if it ends before.
async fn read_url(stdout: ChildStdout) -> Option<SecretString> {
    let mut line = String::new();
    BufReader::new(stdout.take(MAX_URL)).read_line(&mut line).await.ok()?;
    line.strip_suffix('\n').map(SecretString::from)
}

/// Waits for a child whose lifeline is closed.
async fn wait(child: &mut Child) -> Result<ExitStatus, Error> {
    match timeout(STOP_LIMIT, child.wait()).await {
        Ok(status) => status.map_err(Error::io("waiting for", "the private PostgreSQL")),
        Err(_) => Err(too_long("the end of the private PostgreSQL", STOP_LIMIT)),
    }
}

fn too_long(what: &'static str, limit: Duration) -> Error {
    Error::TooLong { what, limit_seconds: limit.as_secs() }
}
