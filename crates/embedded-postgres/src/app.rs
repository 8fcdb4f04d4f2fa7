/// The properties of the application that runs an embedded PostgreSQL.
#[derive(Clone, Copy, Debug)]
pub struct App {
    /// The name of the data and cache directories, the prefix of temporary ones, and
    /// PostgreSQL's `cluster_name`.
    pub name: &'static str,
    /// The name of the database. It must be a lowercase SQL identifier, because statements
    /// and the URL contain it without quotation marks.
    pub database: &'static str,
    /// The arguments with which this program calls [`run`](crate::run) with
    /// [`Options::lifeline`](crate::Options::lifeline).
    pub child_args: &'static [&'static str],
    /// The environment variable from which the child reads
    /// [`Options::data_dir`](crate::Options::data_dir), and which error messages name.
    pub data_dir_var: &'static str,
    /// The environment variables that the child does not inherit, such as secrets.
    pub withheld_vars: &'static [&'static str],
    /// What the operator can do instead, as a clause for error messages: "set
    /// `SOME_SETTING` to use another PostgreSQL server".
    pub alternative: &'static str,
}
