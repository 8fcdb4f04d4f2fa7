use std::path::PathBuf;

/// The options of [`run`](crate::run).
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// The data directory. Defaults to the user's own, and is ignored if the data is
    /// [`temporary`](Self::temporary).
    pub data_dir: Option<PathBuf>,
    /// Whether standard input is the lifeline: its end stops PostgreSQL.
    pub lifeline: bool,
    /// Whether to use a new directory, with settings that are fast but not durable, and to
    /// remove it at the end.
    pub temporary: bool,
}
