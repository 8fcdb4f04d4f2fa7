//! pgbench with the statements of the service: the rate of PostgreSQL without a server in
//! front of it.

use std::{
    env, fs,
    path::{Path, PathBuf},
    time::Duration,
};

use tokio_postgres::config::Host;

use crate::{
    dataset::Dataset,
    error::Result,
    fixtures::CALLER_COUNT,
    postgres::Database,
    process::die_with_parent,
    scenario::Scenario,
    seed::{DatasetSize, FIRST_TODO_MS, FIRST_USER_MS, PAGE_SIZE},
    sql,
};

/// The number of pgbench's connections, and of the connections that measure CreateTodo.
pub const CLIENTS: u16 = 16;

/// The first major version of PostgreSQL with the function `uuidv7()`.
const UUIDV7_VERSION: u32 = 18;

/// An installed pgbench.
#[derive(Debug)]
pub struct Pgbench {
    program: PathBuf,
    run_dir: PathBuf,
}

impl Pgbench {
    /// Returns `None` if pgbench is not on the `PATH`. Most packages of the PostgreSQL
    /// server contain it.
    pub fn find(run_dir: &Path) -> Option<Self> {
        let path = env::var_os("PATH")?;
        let mut programs = env::split_paths(&path).map(|dir| dir.join("pgbench"));
        Some(Self { program: programs.find(|file| file.is_file())?, run_dir: run_dir.to_owned() })
    }

    /// Returns the number of statements per second, or `None` if the scenario is not a
    /// single statement.
    pub async fn run(
        &self,
        server_version: &str,
        dataset: &Dataset,
        scenario: Scenario,
        duration: Duration,
    ) -> Result<Option<f64>> {
        let Some(script) = script(scenario, dataset.size, has_uuidv7(server_version)) else {
            return Ok(None);
        };
        let path = self.run_dir.join("pgbench.sql");
        fs::write(&path, script)?;
        let mut command = die_with_parent(&self.program)?;
        let seconds = run_time(duration).as_secs().to_string();
        command
            .args(["--protocol=prepared", "--no-vacuum", "--jobs=2"])
            .args(["--client", &CLIENTS.to_string(), "--time", &seconds, "--file"])
            .arg(&path)
            .env("PGOPTIONS", sql::OPTIONS)
            .envs(connection_variables(&dataset.database)?);
        let output = command.output().await?;
        let stdout = String::from_utf8_lossy(&output.stdout);
        let rate = parse_rate(&stdout).filter(|_| output.status.success());
        let Some(rate) = rate else {
            let stderr = String::from_utf8_lossy(&output.stderr);
            return Err(format!("pgbench: {stdout}{stderr}").into());
        };
        Ok(Some(rate.parse()?))
    }
}

/// Returns the transactions per second, unless transactions failed.
fn parse_rate(stdout: &str) -> Option<&str> {
    let rate = stdout.lines().find_map(|line| line.strip_prefix("tps = ")?.split(' ').next());
    rate.filter(|_| stdout.contains("failed transactions: 0 "))
}

/// Rounds a duration for pgbench, which runs for whole seconds.
pub fn run_time(duration: Duration) -> Duration {
    Duration::from_secs(duration.as_secs().max(1))
}

fn has_uuidv7(server_version: &str) -> bool {
    let major = server_version.split(|c: char| !c.is_ascii_digit()).next();
    major.and_then(|major| major.parse().ok()) >= Some(UUIDV7_VERSION)
}

/// Returns libpq's connection parameters as environment variables, which, unlike
/// arguments, hide the password from other users.
fn connection_variables(database: &Database) -> Result<Vec<(&'static str, String)>> {
    let config = database.config()?;
    let mut variables = Vec::new();
    match config.get_hosts().first() {
        Some(Host::Tcp(host)) => variables.push(("PGHOST", host.clone())),
        Some(Host::Unix(dir)) => variables.push(("PGHOST", dir.display().to_string())),
        None => {}
    }
    if let Some(port) = config.get_ports().first() {
        variables.push(("PGPORT", port.to_string()));
    }
    if let Some(user) = config.get_user() {
        variables.push(("PGUSER", user.to_owned()));
    }
    if let Some(password) = config.get_password() {
        variables.push(("PGPASSWORD", String::from_utf8(password.to_vec())?));
    }
    if let Some(name) = config.get_dbname() {
        variables.push(("PGDATABASE", name.to_owned()));
    }
    Ok(variables)
}

/// Returns a statement of [`sql`] with pgbench's variables as parameters: `:u` is the number
/// of a user, `:k` the number of the user's todo, `:s` a state.
///
/// pgbench's variables are numbers, so the statement computes the IDs. This costs a few
/// microseconds that a server does not need.
fn script(scenario: Scenario, size: DatasetSize, has_uuidv7: bool) -> Option<String> {
    let owner =
        format!("(lpad(to_hex({FIRST_USER_MS} + :u), 12, '0') || '70008000000000000000')::uuid");
    let id = format!(
        "(lpad(to_hex({FIRST_TODO_MS} + :k), 12, '0') || '70008' || lpad(to_hex(:u::int), 15, '0'))::uuid"
    );
    let new_id = if has_uuidv7 { "uuidv7()" } else { "gen_random_uuid()" };
    let limit = (PAGE_SIZE + 1).to_string();
    let nil = "'00000000-0000-0000-0000-000000000000'";
    let now = "(extract(epoch from now()) * 1000000)::bigint";
    let (title, description) = ("'Water the plants'", "'All of them, before it gets hot'");
    let (statement, parameters): (&sql::Statement, [&str; 9]) = match scenario {
        Scenario::Get => (&sql::GET, [&owner, &id, "", "", "", "", "", "", ""]),
        Scenario::List => (&sql::LIST, [&owner, "0", &limit, nil, "", "", "", "", ""]),
        Scenario::Update => (
            &sql::UPDATE,
            [&owner, &id, "null", "null", "null", "null", "null", ":s::smallint", now],
        ),
        Scenario::Create => (
            &sql::INSERT,
            [
                &owner,
                new_id,
                title,
                "'water the plants'",
                description,
                "'all of them, before it gets hot'",
                "2",
                now,
                "",
            ],
        ),
        _ => return None,
    };
    let mut statement = statement.to_string();
    for (number, parameter) in (1..).zip(parameters) {
        statement = statement.replace(&format!("${number}"), parameter);
    }
    let last = size.min_todos_per_user() - 1;
    Some(format!(
        "\\set u random(1, {CALLER_COUNT})\n\\set k random(0, {last})\n\\set s random(1, 5)\n{statement};\n"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_counts_only_if_no_transaction_failed() {
        let output = |failed| {
            format!("number of failed transactions: {failed} (0.000%)\ntps = 62950.1 (without…)\n")
        };
        assert_eq!(parse_rate(&output(0)), Some("62950.1"));
        assert_eq!(parse_rate(&output(3)), None);
    }

    #[test]
    fn uuidv7_is_used_where_the_server_has_it() {
        assert!(has_uuidv7("18.6 (Debian 18.6-1)"));
        assert!(has_uuidv7("19beta1"));
        assert!(!has_uuidv7("17.2"));
    }

    #[test]
    fn a_script_has_no_numbered_parameters() {
        let size = DatasetSize { users: 200, todos: 20_000 };
        for scenario in [Scenario::Get, Scenario::List, Scenario::Update, Scenario::Create] {
            let script = script(scenario, size, true).expect("one statement");
            assert!(!script.contains('$'), "{script}");
        }
        assert_eq!(script(Scenario::Login, size, true), None);
    }
}
