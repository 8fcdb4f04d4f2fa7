//! The SQL statements of the baseline and of pgbench: the ones that the service runs for a
//! call that is not batched, by their names.

use std::{collections::HashMap, sync::LazyLock};

/// Gets a todo. Parameters: owner, ID.
pub const GET: &str = "todo_get";

/// Lists a small page of todos by creation time. Parameters: owner, title, description, states,
/// skip, limit, ID to start after.
pub const LIST: &str = "todo_list_create_time";

/// Updates a todo. Parameters: owner, ID, version, title, folded title, description, folded
/// description, state, time.
pub const UPDATE: &str = "todo_update";

/// Creates a todo. Parameters: owner, ID, title, folded title, description, folded
/// description, state, time, version.
pub const INSERT: &str = "todo_insert";

/// The connection options of the service: each prepared statement has one generic plan.
pub const OPTIONS: &str = "-c plan_cache_mode=force_generic_plan";

static STATEMENTS: LazyLock<HashMap<String, &'static str>> =
    LazyLock::new(|| fast_zero::todo_statements().into_iter().collect());

/// Returns the text of a statement of the service.
///
/// # Panics
/// If the service has no statement of that name.
pub fn text(name: &str) -> &'static str {
    STATEMENTS.get(name).unwrap_or_else(|| panic!("the service has no statement {name}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_statement_is_one_of_the_service() {
        for (name, verb) in
            [(GET, "select"), (LIST, "select"), (UPDATE, "update"), (INSERT, "insert")]
        {
            assert!(text(name).starts_with(verb), "{name}");
        }
    }
}
