//! The counts of rows that the upgrade of PostgreSQL in `docs/deployment.md` compares.

use std::{fs, os::unix::fs::PermissionsExt, process::Command};

use sqlx::AssertSqlSafe;

use crate::support::{
    postgres::TestDatabase,
    readme::{DEPLOYMENT, subsection_blocks},
};

const COUNTS: &str = include_str!("../../../deploy/counts.sql");

#[tokio::test]
async fn the_tables_of_all_schemas_are_counted() {
    let database = TestDatabase::create().await;
    let mut connection = database.connect().await;
    let setup = "create schema \"Other\"; create table \"Other\".\"a'b\" as values (1), (2)";
    sqlx::raw_sql(setup).execute(&mut connection).await.expect("created");
    // psql executes each row of the result.
    let statements = COUNTS.trim_end().strip_suffix("\\gexec").expect("\\gexec");
    let statements: Vec<String> =
        sqlx::query_scalar(statements).fetch_all(&mut connection).await.expect("statements");
    let mut counts = Vec::new();
    for statement in statements {
        let count = sqlx::query_as(AssertSqlSafe(statement));
        let count: (String, i64) = count.fetch_one(&mut connection).await.expect("a count");
        counts.push(count);
    }
    assert_eq!(counts.first(), Some(&("\"Other\".\"a'b\"".to_owned(), 2)), "{counts:?}");
    for table in ["public.users", "public.todos", "public._sqlx_migrations"] {
        assert!(counts.iter().any(|(name, _)| name == table), "{table}: {counts:?}");
    }
    assert!(counts.iter().all(|(name, _)| !name.starts_with("pg_")), "{counts:?}");
}

#[test]
fn the_old_volume_is_removed_only_after_a_comparison() {
    let [_, _, remove] = subsection_blocks(DEPLOYMENT, "PostgreSQL upgrades")[..] else {
        panic!("the upgrade has three blocks");
    };
    let dir = tempfile::tempdir().expect("a directory");
    let docker = dir.path().join("docker");
    fs::write(&docker, "#!/bin/sh\necho removed\n").expect("written");
    fs::set_permissions(&docker, fs::Permissions::from_mode(0o755)).expect("executable");
    let path = format!("{}:{}", dir.path().display(), std::env::var("PATH").expect("PATH"));
    for (before, after, is_removed) in [
        ("public.users|1\n", "public.users|1\n", true),
        ("public.users|1\n", "public.users|0\n", false),
        ("public.users|1\n", "", false),
        ("", "", false),
    ] {
        for (name, counts) in [("counts.before", before), ("counts.after", after)] {
            fs::write(dir.path().join(name), counts).expect("written");
        }
        let mut shell = Command::new("sh");
        let shell = shell.args(["-c", remove]).current_dir(dir.path()).env("PATH", &path);
        let output = shell.output().expect("a shell");
        let output = String::from_utf8_lossy(&output.stdout).into_owned();
        assert_eq!(output.contains("removed"), is_removed, "{before}{after}: {output}");
    }
}
