use std::{error, fmt, io, path::PathBuf, process::ExitStatus};

use super::install;

/// Why there is no private PostgreSQL. The message says what to do about it, and tells the
/// cause.
#[derive(Debug)]
#[non_exhaustive]
pub enum Error {
    /// The user has no home folder, and the environment names none for data or cache.
    NoHome {
        /// What the folder would be for: `data` or `cache`.
        purpose: &'static str,
        /// The variable that names one.
        variable: &'static str,
    },
    /// The user that PostgreSQL runs as cannot enter a folder, or not write in it.
    FolderUnusable {
        /// The folder that was asked for.
        folder: PathBuf,
        /// Who cannot use it.
        user: String,
        /// Where the way to it ends.
        at: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Another process has its PostgreSQL in this folder.
    InUse {
        /// The data folder.
        folder: PathBuf,
        /// The process that holds it, as far as it said so.
        holder: Option<u32>,
    },
    /// Started as root, the process could not become another user.
    DropRoot {
        /// Whom it tried to become.
        user: String,
        /// What the system said.
        source: io::Error,
    },
    /// The user that PostgreSQL would run as has no entry in the user database.
    UnknownUser {
        /// Its id.
        uid: u32,
    },
    /// PostgreSQL could not be fetched, and none is installed.
    NoPostgres {
        /// Why it could not be fetched.
        reason: String,
    },
    /// A data folder could not be made.
    Initialise {
        /// Where it was to be.
        folder: PathBuf,
        /// What PostgreSQL's programs said.
        output: String,
    },
    /// There is something in the place of the data folder that is none.
    NoDataFolder {
        /// Its place.
        folder: PathBuf,
    },
    /// The data folder is there, its password is not.
    NoPassword {
        /// Where it should be.
        file: PathBuf,
    },
    /// A PostgreSQL that an earlier start left running does not stop.
    Leftover {
        /// Its process.
        pid: i32,
        /// Its data folder.
        folder: PathBuf,
    },
    /// PostgreSQL ended: at its start, or later by itself.
    Ended {
        /// How.
        status: ExitStatus,
        /// Its log.
        log: PathBuf,
        /// The last lines of its log.
        last_words: String,
    },
    /// Something took longer than its limit.
    TooLong {
        /// What was waited for.
        what: &'static str,
        /// The limit, in seconds.
        limit_seconds: u64,
    },
    /// The child process ended by itself, and said why on standard error.
    Child {
        /// How it ended.
        status: ExitStatus,
    },
    /// The system gives no random numbers.
    NoRandom,
    /// The file of the signing key holds something else.
    SecretKey {
        /// The file.
        file: PathBuf,
    },
    /// The system refused something else.
    Io {
        /// What was being done.
        doing: &'static str,
        /// On which file or program.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

impl Error {
    /// For `map_err`: what was being done, on which file or program.
    pub(super) fn io(
        doing: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { doing, path, source }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoHome { purpose, variable } => write!(
                f,
                "the user has no home folder to keep {purpose} in: name a folder in {variable}, \
                 or set DATABASE_URL to use a PostgreSQL of your own"
            ),
            Self::FolderUnusable { folder, user, at, source } => write!(
                f,
                "PostgreSQL runs as {user}, which cannot use the folder {}: {}: {source}. Give \
                 that user a folder of its own (it needs to write in it, and to enter all the \
                 folders above), or name another place: in FASTZERO_DATA_DIR for \
                 data, in XDG_CACHE_HOME for PostgreSQL's programs",
                folder.display(),
                at.display(),
            ),
            Self::InUse { folder, holder } => {
                write!(f, "the data folder {} is in use by another fast-zero", folder.display())?;
                if let Some(pid) = holder {
                    write!(f, " (process {pid})")?;
                }
                f.write_str(": stop that one first, or name another folder in FASTZERO_DATA_DIR")
            }
            Self::DropRoot { user, source } => write!(
                f,
                "PostgreSQL does not run as root, and this process may not become {user}: \
                 {source}. Start it as an ordinary user, or set DATABASE_URL"
            ),
            Self::UnknownUser { uid } => write!(
                f,
                "PostgreSQL refuses to run as user id {uid}, which has no entry in /etc/passwd: \
                 add one, start as another user, or set DATABASE_URL"
            ),
            Self::NoPostgres { reason } => write!(
                f,
                "PostgreSQL could not be fetched ({reason}), and none is installed. Either \
                 connect to the network for the first start, or install PostgreSQL {} or newer, \
                 or set DATABASE_URL to use one that runs elsewhere",
                install::OLDEST_MAJOR,
            ),
            Self::Initialise { folder, output } => {
                write!(
                    f,
                    "PostgreSQL could not make its data folder {}: {output}",
                    folder.display()
                )
            }
            Self::NoDataFolder { folder } => write!(
                f,
                "{} is in the place of PostgreSQL's data folder, but is none: move it away",
                folder.display()
            ),
            Self::NoPassword { file } => write!(
                f,
                "PostgreSQL's data are there, but the password {} is not: put it back, or move \
                 the folder away to start with an empty one",
                file.display()
            ),
            Self::Leftover { pid, folder } => write!(
                f,
                "an earlier start left a PostgreSQL running in {} (process {pid}) that does not \
                 stop: end it first",
                folder.display()
            ),
            Self::Ended { status, log, last_words } => write!(
                f,
                "PostgreSQL ended by itself ({status}); its log is {}:\n{last_words}",
                log.display()
            ),
            Self::TooLong { what, limit_seconds } => {
                write!(f, "{what} took longer than {limit_seconds} s")
            }
            Self::Child { status } => write!(
                f,
                "the process of the private PostgreSQL ended ({status}); its reason is above"
            ),
            Self::NoRandom => f.write_str("the system gives no random numbers"),
            Self::SecretKey { file } => write!(
                f,
                "{} does not hold a signing key: remove it, and a new one is made (all logins end \
                 with the old one), or set SECRET_KEY",
                file.display()
            ),
            Self::Io { doing, path, source } => {
                write!(f, "{doing} {} failed: {source}", path.display())
            }
        }
    }
}

/// Without a source: the message tells it.
impl error::Error for Error {}
