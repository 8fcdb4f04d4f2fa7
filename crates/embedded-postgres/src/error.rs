use std::{error::Error as StdError, fmt, io, path::PathBuf, process::ExitStatus};

/// The reason why there is no embedded PostgreSQL.
///
/// The message says what failed and what the operator can do about it. The cause is only in
/// [`source()`](StdError::source), so print the whole chain.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The user has no home directory, and the environment names no other one.
    #[error(
        "cannot choose the {purpose} directory: the user has no home directory; set {setting} to \
         a directory, or {alternative}"
    )]
    NoHomeDir {
        /// What the directory is for: `data` or `cache`.
        purpose: &'static str,
        /// The environment variable that can name one.
        setting: &'static str,
        /// See [`App::alternative`](crate::App::alternative).
        alternative: &'static str,
    },
    /// The user that PostgreSQL runs as cannot write to a directory, or not reach it.
    #[error(
        "cannot use the directory {} as {os_user}, which has no access to {}; grant that user \
         write access to the directory and search access to its parents, or name another one in \
         {setting} (data) or XDG_CACHE_HOME (programs)",
        .dir.display(), .blocked_at.display()
    )]
    DirNotUsable {
        /// The directory to use.
        dir: PathBuf,
        /// The user, by name and ID.
        os_user: String,
        /// The first directory on the path that the user cannot enter, or the directory
        /// itself.
        blocked_at: PathBuf,
        /// The environment variable that names the data directory.
        setting: &'static str,
        /// The error of the operating system.
        source: io::Error,
    },
    /// Another process uses the data directory.
    #[error(
        "the data directory {} is in use by another process{}; stop that process, or name \
         another directory in {setting}",
        .dir.display(), in_parentheses(*.owner_pid)
    )]
    InUse {
        /// The data directory.
        dir: PathBuf,
        /// The process that holds the lock, if its ID could be read.
        owner_pid: Option<u32>,
        /// The environment variable that names the data directory.
        setting: &'static str,
    },
    /// The process runs as root and cannot switch to another user.
    #[error(
        "PostgreSQL does not run as root, and this process cannot switch to {os_user}; start it \
         as an unprivileged user, or {alternative}"
    )]
    DropRoot {
        /// The user to switch to, by name and ID.
        os_user: String,
        /// See [`App::alternative`](crate::App::alternative).
        alternative: &'static str,
        /// The error of the operating system.
        source: io::Error,
    },
    /// The user that PostgreSQL would run as has no entry in the user database.
    #[error(
        "PostgreSQL does not run as uid {uid}, which has no entry in /etc/passwd; add an entry, \
         start as another user, or {alternative}"
    )]
    UnknownUser {
        /// The user's ID.
        uid: u32,
        /// See [`App::alternative`](crate::App::alternative).
        alternative: &'static str,
    },
    /// The download failed, and no suitable PostgreSQL is installed.
    #[error(
        "cannot download PostgreSQL ({reason}), and none is installed; connect to the network \
         for the first start, install PostgreSQL {oldest_major} or newer, or {alternative}"
    )]
    PostgresUnavailable {
        /// Why the download failed.
        reason: String,
        /// The oldest supported major version.
        oldest_major: u32,
        /// See [`App::alternative`](crate::App::alternative).
        alternative: &'static str,
    },
    /// The data directory belongs to a PostgreSQL of another major version, and that is not
    /// installed.
    #[error(
        "the data directory {} contains data of PostgreSQL {}, which is not installed; install \
         that version, or set {setting} to another directory to start with an empty one",
        .dir.display(), list(majors)
    )]
    DataOfOtherVersion {
        /// The data directory.
        dir: PathBuf,
        /// The major versions of its clusters.
        majors: Vec<u32>,
        /// The environment variable that names the data directory.
        setting: &'static str,
    },
    /// PostgreSQL's programs failed to create the cluster or the database in it.
    #[error("cannot initialize PostgreSQL in {}: {output}", .dir.display())]
    InitDb {
        /// The directory that would contain the cluster.
        dir: PathBuf,
        /// The output of the program that failed.
        output: String,
    },
    /// A directory has the name of a cluster but is not one.
    #[error(
        "{} is not a PostgreSQL data directory; move it away to start with an empty one",
        .dir.display()
    )]
    NotADataDir {
        /// The directory.
        dir: PathBuf,
    },
    /// The cluster exists, but its password does not.
    #[error(
        "the PostgreSQL data directory has no password in {}; restore the file, or move the \
         directory away to start with an empty one",
        .file.display()
    )]
    NoPassword {
        /// The file that should contain the password.
        file: PathBuf,
    },
    /// A PostgreSQL that outlived its supervisor does not stop.
    #[error(
        "the PostgreSQL of an earlier start (pid {pid}) still uses {} and does not stop; kill it \
         first",
        .dir.display()
    )]
    OrphanedPostgres {
        /// The ID of its main process.
        pid: i32,
        /// Its cluster.
        dir: PathBuf,
    },
    /// PostgreSQL exited during its startup or later without a request.
    #[error(
        "PostgreSQL exited unexpectedly ({status}); its log {} ends with:\n{log_tail}",
        .log.display()
    )]
    PostgresExited {
        /// The exit status.
        status: ExitStatus,
        /// The log file.
        log: PathBuf,
        /// The last lines of the log.
        log_tail: String,
    },
    /// An operation exceeded its timeout.
    #[error("{operation} timed out after {timeout_seconds} s")]
    Timeout {
        /// The operation, as a gerund ("starting PostgreSQL"), or the program.
        operation: &'static str,
        /// The timeout in seconds.
        timeout_seconds: u64,
    },
    /// The child process exited without a request. It has printed the reason to standard
    /// error.
    #[error("the process of the embedded PostgreSQL exited ({status}); its error is above")]
    ChildExited {
        /// The exit status.
        status: ExitStatus,
    },
    /// The operating system returned no random bytes.
    #[error("the operating system returned no random bytes")]
    Rng,
    /// A [`SecretFile`](crate::SecretFile) contains something else.
    #[error("{} does not contain a secret of at least {min_bytes} bytes; {remedy}", .file.display())]
    InvalidSecret {
        /// The file.
        file: PathBuf,
        /// The minimum length in bytes.
        min_bytes: usize,
        /// See [`SecretFile::remedy`](crate::SecretFile::remedy).
        remedy: &'static str,
    },
    /// Another operation of the operating system failed.
    #[error("cannot {action} {}", .path.display())]
    Io {
        /// The operation, as an infinitive: "read".
        action: &'static str,
        /// The file or program, or a noun if it is neither.
        path: PathBuf,
        /// The error of the operating system.
        source: io::Error,
    },
}

impl Error {
    /// Returns a function for `map_err` that adds the operation and its object.
    pub(crate) fn io(
        action: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { action, path, source }
    }
}

fn list(majors: &[u32]) -> String {
    majors.iter().map(u32::to_string).collect::<Vec<_>>().join(" and ")
}

fn in_parentheses(pid: Option<u32>) -> String {
    pid.map_or_else(String::new, |pid| format!(" (pid {pid})"))
}

/// Displays an error with all its sources in one line.
#[derive(Debug)]
pub(crate) struct ErrorChain<'a>(pub(crate) &'a (dyn StdError + 'static));

impl fmt::Display for ErrorChain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)?;
        let mut source = self.0.source();
        while let Some(error) = source {
            write!(f, ": {error}")?;
            source = error.source();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cause_is_displayed_once_and_last() {
        let error = Error::io("read", "/etc/nothing")(io::Error::other("disk on fire"));
        assert_eq!(error.to_string(), "cannot read /etc/nothing");
        assert_eq!(ErrorChain(&error).to_string(), "cannot read /etc/nothing: disk on fire");
    }

    #[test]
    fn an_unknown_owner_of_a_data_directory_is_left_out() {
        let in_use = |owner_pid| {
            Error::InUse { dir: "/data".into(), owner_pid, setting: "DATA_DIR" }.to_string()
        };
        assert!(in_use(Some(7)).contains("in use by another process (pid 7); stop"));
        assert!(in_use(None).contains("in use by another process; stop"));
    }
}
