//! A PostgreSQL database cluster: its creation, its password, its URL.

use std::{
    fs::{self, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    time::Duration,
};

use secrecy::{ExposeSecret, SecretString};
use tempfile::TempDir;

use crate::{
    App, Error,
    command::{combined_output, command, output},
    dirs,
    installation::Installation,
    instance::InstanceDir,
    layout::{self, PARTIAL_PREFIX, PASSWORD_FILE, VERSION_FILE},
    privileges,
    random::random_secret,
};

const USER: &str = "postgres";
/// How long PostgreSQL may take to create a cluster or a database: about 1 s on an idle
/// disk.
const CREATE_TIMEOUT: Duration = Duration::from_mins(2);
/// The first version with a locale provider of its own, the same on every system.
const BUILTIN_LOCALE_SINCE: u32 = 17;
/// The first version with the setting `scram_iterations`.
///
/// One iteration is enough: more of them make guesses expensive, and 256 random bits cannot
/// be guessed. They would also make each connection expensive, above all for a client built
/// without optimization, where PostgreSQL's default of 4096 takes 30 ms.
const SCRAM_ITERATIONS_SINCE: u32 = 16;
/// The system's locales that fold case beyond ASCII, for older versions. The first is
/// the same on every system; older macOS has only the second.
const SYSTEM_LOCALES: [&str; 2] = ["C.UTF-8", "en_US.UTF-8"];

/// A complete cluster.
#[derive(Debug)]
pub(crate) struct Cluster {
    pub(crate) dir: PathBuf,
    /// The file of PostgreSQL's log.
    pub(crate) log: PathBuf,
    database: &'static str,
    password: SecretString,
}

impl Cluster {
    /// Opens the cluster of the installation's major version, or creates it.
    pub(crate) async fn open(
        app: &App,
        instance: &InstanceDir,
        installation: &Installation,
    ) -> Result<Self, Error> {
        let name = layout::cluster_name(installation.major);
        let dir = instance.path().join(&name);
        if !dir.exists() {
            create(app, instance, &dir, installation).await?;
        } else if !dir.join(VERSION_FILE).is_file() {
            return Err(Error::NotADataDir { dir });
        }
        let password = read_password(&dir)?;
        // PostgreSQL's main process runs in the path without symbolic links.
        let dir = dir.canonicalize().map_err(Error::io("resolve", &dir))?;
        let log = instance.path().join(name + ".log");
        Ok(Self { dir, log, database: app.database, password })
    }

    /// Returns the URL of the database through the socket in a directory, as sqlx and libpq
    /// read it. It is complete, so that variables such as `PGSSLMODE` have no effect.
    pub(crate) fn url(&self, socket_dir: &Path, port: u16) -> SecretString {
        let password = percent_encode(self.password.expose_secret().as_bytes());
        let host = percent_encode(socket_dir.as_os_str().as_encoded_bytes());
        let database = self.database;
        format!(
            "postgresql://{USER}:{password}@localhost/{database}?host={host}&port={port}&sslmode=disable"
        )
        .into()
    }
}

/// Creates a cluster with its password and the database. It gets its name when it is
/// complete.
async fn create(
    app: &App,
    instance: &InstanceDir,
    dir: &Path,
    installation: &Installation,
) -> Result<(), Error> {
    let failed = || Error::io("create a PostgreSQL data directory in", instance.path());
    dirs::remove_partial(instance.path(), PARTIAL_PREFIX);
    let partial = dirs::create_temp_dir(instance.path(), PARTIAL_PREFIX).map_err(failed())?;
    let data = partial.path().join("data");
    let password = partial.path().join(PASSWORD_FILE);
    write_private_file(&password, random_secret()?.expose_secret()).map_err(failed())?;
    initdb(app, &partial, &data, &password, instance, installation).await?;
    create_database(app, &data, instance, installation).await?;
    fs::rename(password, data.join(PASSWORD_FILE)).map_err(failed())?;
    dirs::fsync_dir(&data).map_err(failed())?;
    fs::rename(&data, dir).map_err(failed())?;
    dirs::fsync_dir(instance.path()).map_err(failed())
}

/// Creates a cluster in UTF-8, with a locale that folds case beyond ASCII, and with password
/// authentication for every connection.
async fn initdb(
    app: &App,
    partial: &TempDir,
    data: &Path,
    password: &Path,
    instance: &InstanceDir,
    installation: &Installation,
) -> Result<(), Error> {
    let mut failure = String::new();
    for locale in locales(installation.major) {
        let mut initdb = command(installation.program("initdb"), partial.path());
        initdb.arg("--pgdata").arg(data).arg("--pwfile").arg(password);
        initdb.args(["--username", USER, "--auth=scram-sha-256", "--encoding=UTF8"]);
        initdb.args(["--no-instructions"]).args(locale);
        if installation.major >= SCRAM_ITERATIONS_SINCE {
            initdb.args(["--set", "scram_iterations=1"]);
        }
        if instance.is_ephemeral() {
            initdb.arg("--no-sync");
        }
        let finished =
            output(&mut initdb, "", CREATE_TIMEOUT).await.map_err(map_timeout("initdb"))?;
        if finished.status.success() {
            return Ok(());
        }
        failure = combined_output(&finished);
    }
    match privileges::nameless_user() {
        Some(uid) => Err(Error::UnknownUser { uid, alternative: app.alternative }),
        None => Err(Error::InitDb { dir: instance.path().to_owned(), output: failure }),
    }
}

/// Returns the options of `initdb` for each locale to try.
fn locales(major: u32) -> Vec<Vec<String>> {
    if major >= BUILTIN_LOCALE_SINCE {
        let builtin = ["--locale-provider=builtin", "--builtin-locale=C.UTF-8", "--locale=C"];
        vec![builtin.map(String::from).to_vec()]
    } else {
        SYSTEM_LOCALES.map(|locale| vec![format!("--locale={locale}")]).to_vec()
    }
}

/// Creates the database before any client can connect: in single-user mode, PostgreSQL is
/// one process that reads statements from standard input.
async fn create_database(
    app: &App,
    data: &Path,
    instance: &InstanceDir,
    installation: &Installation,
) -> Result<(), Error> {
    let mut postgres = command(installation.program("postgres"), data);
    postgres.arg("--single").arg("-D").arg(data).args(["-c", "exit_on_error=on"]);
    if instance.is_ephemeral() {
        postgres.args(["-c", "fsync=off"]);
    }
    let statement = format!("CREATE DATABASE {}\n", app.database);
    let finished = output(postgres.arg("template1"), &statement, CREATE_TIMEOUT)
        .await
        .map_err(map_timeout("postgres --single"))?;
    if finished.status.success() {
        return Ok(());
    }
    Err(Error::InitDb { dir: instance.path().to_owned(), output: combined_output(&finished) })
}

/// Returns a function for `map_err` of a program that creates the cluster.
fn map_timeout(program: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |source| match source.kind() {
        io::ErrorKind::TimedOut => {
            Error::Timeout { operation: program, timeout_seconds: CREATE_TIMEOUT.as_secs() }
        }
        _ => Error::io("run", program)(source),
    }
}

fn write_private_file(path: &Path, text: &str) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()
}

fn read_password(cluster: &Path) -> Result<SecretString, Error> {
    let file = cluster.join(PASSWORD_FILE);
    match fs::read_to_string(&file) {
        Ok(text) if !text.trim_end().is_empty() => Ok(text.trim_end().into()),
        Ok(_) => Err(Error::NoPassword { file }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Err(Error::NoPassword { file }),
        Err(error) => Err(Error::io("read", file)(error)),
    }
}

/// Encodes all but RFC 3986's unreserved characters as `%XX`.
fn percent_encode(bytes: &[u8]) -> String {
    let encode = |&byte: &u8| {
        let unreserved = byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
        if unreserved { char::from(byte).to_string() } else { format!("%{byte:02X}") }
    };
    bytes.iter().map(encode).collect()
}

#[cfg(test)]
mod tests {
    use std::str::FromStr;

    use sqlx::postgres::PgConnectOptions;

    use super::*;

    #[test]
    fn the_url_preserves_any_path_and_password() {
        let cluster = Cluster {
            dir: PathBuf::new(),
            log: PathBuf::new(),
            database: "some_database",
            password: "a b/%&?#@:é".into(),
        };
        let url = cluster.url(Path::new("/home/joão silva/50% & more?"), 5432);
        let options = PgConnectOptions::from_str(url.expose_secret()).expect("a URL");
        assert_eq!(options.get_socket(), Some(&PathBuf::from("/home/joão silva/50% & more?")));
        assert_eq!(options.get_port(), 5432);
        assert_eq!(options.get_database(), Some("some_database"));
        assert_eq!(options.get_username(), USER);
    }
}
