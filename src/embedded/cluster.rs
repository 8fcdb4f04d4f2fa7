//! A data folder of PostgreSQL's: its making, its password, its URL.

use std::{
    fs::{self, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    time::Duration,
};

use secrecy::{ExposeSecret, SecretString};
use tempfile::TempDir;

use super::{
    Error,
    command::{command, output, printed},
    folders::{self, Home},
    install::Installation,
    privileges,
};

/// The database of the service.
const DATABASE: &str = "fast_zero";
const USER: &str = "postgres";
/// The file by which PostgreSQL knows a data folder.
const WHOLE: &str = "PG_VERSION";
const PASSWORD_FILE: &str = "password";
/// Beginning of the names of data folders, and of those that are being made.
const PREFIX: &str = "postgres-";
const PARTIAL_PREFIX: &str = "partial-";
/// How long PostgreSQL may take to make a data folder or a database; about a second
/// where the disk is idle.
const MAKING_LIMIT: Duration = Duration::from_mins(2);
/// The first version with a locale of its own, which is the same on every system.
const BUILTIN_LOCALE_SINCE: u32 = 17;
/// The first version that can be told how often to hash a password. Once is enough
/// here: repeating it makes guesses expensive, and nobody guesses 256 random bits. It
/// also makes each connection of a client expensive, above all in a debug build, where
/// PostgreSQL's 4096 times take 30 ms.
const SCRAM_ITERATIONS_SINCE: u32 = 16;
/// The system's locales that fold case beyond ASCII, for older versions. The first is
/// the same everywhere; macOS has had only the second.
const SYSTEM_LOCALES: [&str; 2] = ["C.UTF-8", "en_US.UTF-8"];

/// A data folder that is whole.
#[derive(Debug)]
pub(super) struct Cluster {
    pub(super) folder: PathBuf,
    /// Where PostgreSQL writes its log.
    pub(super) log: PathBuf,
    password: SecretString,
}

impl Cluster {
    /// Opens the data folder of this version, or makes it.
    pub(super) async fn open(home: &Home, installation: &Installation) -> Result<Self, Error> {
        let name = format!("{PREFIX}{}", installation.major);
        let folder = home.folder().join(&name);
        if !folder.exists() {
            make(home, &folder, installation).await?;
        } else if !folder.join(WHOLE).is_file() {
            return Err(Error::NoDataFolder { folder });
        }
        let password = read_password(&folder)?;
        // PostgreSQL names its folder by the path without links.
        let folder = folder.canonicalize().map_err(Error::io("finding", &folder))?;
        Ok(Self { folder, log: home.folder().join(name + ".log"), password })
    }

    /// How to connect to the database through a socket in a folder. As sqlx and libpq
    /// read it; nothing in it depends on the environment (`PGSSLMODE`).
    pub(super) fn url(&self, socket_folder: &Path, port: u16) -> SecretString {
        let password = percent_encoded(self.password.expose_secret().as_bytes());
        let host = percent_encoded(socket_folder.as_os_str().as_encoded_bytes());
        format!(
            "postgresql://{USER}:{password}@localhost/{DATABASE}?host={host}&port={port}&sslmode=disable"
        )
        .into()
    }
}

/// The data folders in a home.
pub(super) fn folders(home: &Path) -> impl Iterator<Item = PathBuf> {
    let whole = |folder: &PathBuf| version(folder).is_some() && folder.join(WHOLE).is_file();
    folders::named(home, PREFIX).filter(whole)
}

/// The major versions that have a data folder in a home.
pub(super) fn versions(home: &Path) -> Vec<u32> {
    folders(home).filter_map(|folder| version(&folder)).collect()
}

fn version(folder: &Path) -> Option<u32> {
    folder.file_name()?.to_str()?.strip_prefix(PREFIX)?.parse().ok()
}

/// Makes a data folder with its password and the database. All or nothing: it gets its
/// name when it is whole.
async fn make(home: &Home, folder: &Path, installation: &Installation) -> Result<(), Error> {
    let failed = || Error::io("making a data folder in", home.folder());
    folders::clear(home.folder(), PARTIAL_PREFIX);
    let partial = folders::fresh(home.folder(), PARTIAL_PREFIX).map_err(failed())?;
    let data = partial.path().join("data");
    let password = partial.path().join(PASSWORD_FILE);
    new_file(&password, super::random_text()?.expose_secret()).map_err(failed())?;
    initdb(&partial, &data, &password, home, installation).await?;
    create_database(&data, home, installation).await?;
    fs::rename(password, data.join(PASSWORD_FILE)).map_err(failed())?;
    folders::sync(&data).map_err(failed())?;
    fs::rename(&data, folder).map_err(failed())?;
    folders::sync(home.folder()).map_err(failed())
}

/// Makes a data folder: UTF-8, with a locale that folds case beyond ASCII, and for
/// nobody without the password.
async fn initdb(
    partial: &TempDir,
    data: &Path,
    password: &Path,
    home: &Home,
    installation: &Installation,
) -> Result<(), Error> {
    let builtin = ["--locale-provider=builtin", "--builtin-locale=C.UTF-8", "--locale=C"];
    let locales = if installation.major >= BUILTIN_LOCALE_SINCE {
        vec![builtin.map(String::from).to_vec()]
    } else {
        SYSTEM_LOCALES.map(|locale| vec![format!("--locale={locale}")]).to_vec()
    };
    let mut said = String::new();
    for locale in locales {
        let mut initdb = command(installation.program("initdb"), partial.path());
        initdb.arg("--pgdata").arg(data).arg("--pwfile").arg(password);
        initdb.args(["--username", USER, "--auth=scram-sha-256", "--encoding=UTF8"]);
        initdb.args(["--no-instructions"]).args(locale);
        if installation.major >= SCRAM_ITERATIONS_SINCE {
            initdb.args(["--set", "scram_iterations=1"]);
        }
        if home.is_temporary() {
            initdb.arg("--no-sync");
        }
        let ended = output(&mut initdb, "", MAKING_LIMIT).await.map_err(late("initdb", data))?;
        if ended.status.success() {
            return Ok(());
        }
        said = printed(&ended);
    }
    match privileges::nameless_user() {
        Some(uid) => Err(Error::UnknownUser { uid }),
        None => Err(Error::Initialise { folder: home.folder().to_owned(), output: said }),
    }
}

/// Creates the database while nobody can connect: PostgreSQL runs just for this, as one
/// process that reads statements.
async fn create_database(
    data: &Path,
    home: &Home,
    installation: &Installation,
) -> Result<(), Error> {
    let mut postgres = command(installation.program("postgres"), data);
    postgres.arg("--single").arg("-D").arg(data).args(["-c", "exit_on_error=on"]);
    if home.is_temporary() {
        postgres.args(["-c", "fsync=off"]);
    }
    let statement = format!("CREATE DATABASE {DATABASE}\n");
    let ended = output(postgres.arg("template1"), &statement, MAKING_LIMIT)
        .await
        .map_err(late("postgres --single", data))?;
    if ended.status.success() {
        return Ok(());
    }
    Err(Error::Initialise { folder: home.folder().to_owned(), output: printed(&ended) })
}

/// For `map_err` of a program that makes the data folder.
fn late(program: &'static str, data: &Path) -> impl FnOnce(io::Error) -> Error {
    let data = data.to_owned();
    move |source| match source.kind() {
        io::ErrorKind::TimedOut => {
            Error::TooLong { what: program, limit_seconds: MAKING_LIMIT.as_secs() }
        }
        _ => Error::Io { doing: "making", path: data, source },
    }
}

fn new_file(path: &Path, text: &str) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()
}

fn read_password(folder: &Path) -> Result<SecretString, Error> {
    let file = folder.join(PASSWORD_FILE);
    match fs::read_to_string(&file) {
        Ok(text) if !text.trim_end().is_empty() => Ok(text.trim_end().into()),
        Ok(_) => Err(Error::NoPassword { file }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Err(Error::NoPassword { file }),
        Err(error) => Err(Error::io("reading", file)(error)),
    }
}

/// All but RFC 3986's unreserved characters as `%XX`.
fn percent_encoded(bytes: &[u8]) -> String {
    let encoded = |&byte: &u8| {
        let kept = byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
        if kept { char::from(byte).to_string() } else { format!("%{byte:02X}") }
    };
    bytes.iter().map(encoded).collect()
}

#[cfg(test)]
mod tests {
    use std::str::FromStr;

    use sqlx::postgres::PgConnectOptions;

    use super::*;

    #[test]
    fn the_url_survives_any_path_and_password() {
        let cluster =
            Cluster {
                folder: PathBuf::new(), log: PathBuf::new(), password: "a b/%&?#@:é".into()
            };
        let url = cluster.url(Path::new("/home/joão silva/50% & more?"), 5432);
        let options = PgConnectOptions::from_str(url.expose_secret()).expect("a URL");
        assert_eq!(options.get_socket(), Some(&PathBuf::from("/home/joão silva/50% & more?")));
        assert_eq!(options.get_port(), 5432);
        assert_eq!(options.get_database(), Some(DATABASE));
        assert_eq!(options.get_username(), USER);
    }
}
