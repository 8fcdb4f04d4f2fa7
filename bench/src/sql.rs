//! The SQL statements of the baseline and of pgbench: the ones that the service runs for a
//! call that is not batched, by their names.

use std::sync::LazyLock;

/// A statement of the service, looked up once.
pub type Statement = LazyLock<&'static str>;

/// Gets a todo. Parameters: owner, ID.
pub static GET: Statement = Statement::new(|| find("todo_get"));

/// Lists a small page of todos by creation time. Parameters: owner, skip, limit, ID to start
/// after.
pub static LIST: Statement = Statement::new(|| find("todo_list_create_time"));

/// Does the same with filters. Parameters: owner, skip, limit, title, description, states, ID to
/// start after.
pub static LIST_FILTERED: Statement = Statement::new(|| find("todo_list_create_time_filtered"));

/// Updates a todo. Parameters: owner, ID, version, title, folded title, description, folded
/// description, state, time in microseconds.
pub static UPDATE: Statement = Statement::new(|| find("todo_update"));

/// Creates a todo. Parameters: owner, ID, title, folded title, description, folded
/// description, state, time in microseconds. Returns the version.
pub static INSERT: Statement = Statement::new(|| find("todo_insert"));

/// The connection options of the service: each prepared statement has one generic plan.
pub const OPTIONS: &str = "-c plan_cache_mode=force_generic_plan";

/// Returns the text of a statement.
fn find(name: &str) -> &'static str {
    let statement = fast_zero::todo_statements().into_iter().find(|(known, _)| known == name);
    let (_, text) = statement.unwrap_or_else(|| panic!("the service has no statement {name}"));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_statement_is_one_of_the_service() {
        for (statement, verb) in [
            (&GET, "select id, "),
            (&LIST, "select id, "),
            (&LIST_FILTERED, "select id, "),
            (&UPDATE, "update todos "),
            (&INSERT, "insert into todos "),
        ] {
            assert!(statement.contains(verb), "{}", **statement);
        }
    }
}
