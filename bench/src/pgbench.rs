//! pgbench with the same statements: what PostgreSQL does without any server before it.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use tokio_postgres::config::Host;

use crate::{
    Result,
    fill::{FIRST_TODO, FIRST_USER, Fill},
    measure::Site,
    postgres::{Database, Postgres, program},
    process::leashed,
    scenario::{CALLERS, PAGE_SIZE, Scenario},
    sql,
};

/// Connections of pgbench, and writers of CreateTodo.
pub const CLIENTS: u16 = 16;

/// pgbench, if it is there.
#[derive(Debug)]
pub struct Pgbench {
    program: PathBuf,
    folder: PathBuf,
}

impl Pgbench {
    /// Finds it on the PATH. It is part of most packages of PostgreSQL's server.
    pub fn find(folder: &Path) -> Option<Self> {
        Some(Self { program: program("pgbench")?, folder: folder.to_owned() })
    }

    /// Statements a second; `None` for what is not one statement.
    pub async fn run(
        &self,
        postgres: &Postgres,
        site: &Site,
        scenario: Scenario,
        duration: Duration,
    ) -> Result<Option<f64>> {
        let Some(script) = script(scenario, site.fill, has_uuidv7(&postgres.version)) else {
            return Ok(None);
        };
        let path = self.folder.join("pgbench.sql");
        fs::write(&path, script)?;
        let mut command = leashed(&self.program)?;
        let seconds = time(duration).as_secs().to_string();
        command
            .args(["--protocol=prepared", "--no-vacuum", "--jobs=2"])
            .args(["--client", &CLIENTS.to_string(), "--time", &seconds, "--file"])
            .arg(&path)
            .env("PGOPTIONS", sql::OPTIONS);
        for (variable, value) in environment(&site.database)? {
            command.env(variable, value);
        }
        let output = command.output().await?;
        let text = String::from_utf8_lossy(&output.stdout);
        let rate = text.lines().find_map(|line| line.strip_prefix("tps = ")?.split(' ').next());
        let clean = output.status.success() && text.contains("failed transactions: 0 ");
        match rate.filter(|_| clean) {
            Some(rate) => Ok(Some(rate.parse()?)),
            None => {
                Err(format!("pgbench: {text}{}", String::from_utf8_lossy(&output.stderr)).into())
            }
        }
    }
}

/// How long pgbench runs, which counts in whole seconds.
pub fn time(duration: Duration) -> Duration {
    Duration::from_secs(duration.as_secs().max(1))
}

fn has_uuidv7(version: &str) -> bool {
    version.split(|c: char| !c.is_ascii_digit()).next().and_then(|major| major.parse().ok())
        >= Some(18)
}

/// How to connect, as libpq reads it from the environment, where no password is seen.
fn environment(database: &Database) -> Result<Vec<(&'static str, String)>> {
    let config = database.config()?;
    let mut environment = Vec::new();
    match config.get_hosts().first() {
        Some(Host::Tcp(host)) => environment.push(("PGHOST", host.clone())),
        Some(Host::Unix(folder)) => environment.push(("PGHOST", folder.display().to_string())),
        None => {}
    }
    if let Some(port) = config.get_ports().first() {
        environment.push(("PGPORT", port.to_string()));
    }
    if let Some(user) = config.get_user() {
        environment.push(("PGUSER", user.to_owned()));
    }
    if let Some(password) = config.get_password() {
        environment.push(("PGPASSWORD", String::from_utf8(password.to_vec())?));
    }
    if let Some(name) = config.get_dbname() {
        environment.push(("PGDATABASE", name.to_owned()));
    }
    Ok(environment)
}

/// A statement of [`sql`] with pgbench's variables for its parameters: `:u` is a user, `:k`
/// one of their to-dos. Both ids are made by the statement, since pgbench knows numbers
/// only: some microseconds that a server does not need.
fn script(scenario: Scenario, fill: Fill, has_uuidv7: bool) -> Option<String> {
    let owner =
        format!("(lpad(to_hex({FIRST_USER} + :u), 12, '0') || '70008000000000000000')::uuid");
    let id = format!(
        "(lpad(to_hex({FIRST_TODO} + :k), 12, '0') || '70008' || lpad(to_hex(:u::int), 15, '0'))::uuid"
    );
    let new_id = if has_uuidv7 { "uuidv7()" } else { "gen_random_uuid()" };
    let limit = (PAGE_SIZE + 1).to_string();
    let (bytes, overhead) = (sql::MAX_PAGE_BYTES.to_string(), sql::TODO_OVERHEAD_BYTES.to_string());
    let nil = "'00000000-0000-0000-0000-000000000000'";
    let (title, description) = ("'Water the plants'", "'All of them, before it gets hot'");
    let (statement, parameters): (_, [&str; 9]) = match scenario {
        Scenario::Get => (sql::GET, [&owner, &id, "", "", "", "", "", "", ""]),
        Scenario::List => {
            (sql::LIST, [&owner, "null", "null", "null", "0", &limit, &bytes, &overhead, nil])
        }
        Scenario::Update => (
            sql::UPDATE,
            [&owner, &id, "null", "null", "null", "null", "null", ":s::smallint", "now()"],
        ),
        Scenario::Create => (
            sql::INSERT,
            [
                &owner,
                new_id,
                title,
                "'water the plants'",
                description,
                "'all of them, before it gets hot'",
                "2",
                "now()",
                "1",
            ],
        ),
        _ => return None,
    };
    let mut statement = statement.to_owned();
    for (number, parameter) in (1..).zip(parameters) {
        statement = statement.replace(&format!("${number}"), parameter);
    }
    let last = fill.each() - 1;
    Some(format!(
        "\\set u random(1, {CALLERS})\n\\set k random(0, {last})\n\\set s random(1, 5)\n{statement};\n"
    ))
}
