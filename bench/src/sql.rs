//! The statements of the floor and of pgbench: those of the service when it asks for one
//! thing at a time. That the answers are the service's is checked at the start of a run.

/// Looks up a to-do: owner, id.
pub const GET: &str = "\
    select id, title, description, state, updated_at, version
    from todos where owner_id = $1 and id = $2";

/// Lists to-dos by creation: owner, title, description, states, skip, limit, bytes of a
/// page, bytes of a to-do besides its texts, the id to begin after.
pub const LIST: &str = "\
    select id, title, description, state, updated_at, version, candidates
    from (
        select *,
            count(*) over () as candidates,
            row_number() over so_far as position,
            sum(octet_length(title) + octet_length(description) + $8::int) over so_far as bytes
        from (
            select id, title, title_folded, description, state, updated_at, version
            from todos
            where owner_id = $1
                and ($2::text is null or strpos(title_folded, $2) > 0)
                and ($3::text is null or strpos(description_folded, $3) > 0)
                and ($4::smallint[] is null or state = any($4))
                and id > $9
            order by id
            offset $5 limit $6
        ) as found
        window so_far as (order by id rows unbounded preceding)
    ) as measured
    where position = 1 or bytes <= $7
    order by position";

/// Changes a to-do: owner, id, version, title, folded, description, folded, state, time.
pub const UPDATE: &str = "\
    update todos set
        title = coalesce($4, title),
        title_folded = coalesce($5, title_folded),
        description = coalesce($6, description),
        description_folded = coalesce($7, description_folded),
        state = coalesce($8, state),
        updated_at = $9,
        version = version + 1
    where owner_id = $1 and id = $2 and ($3::bigint is null or version = $3)
    returning id, title, description, state, updated_at, version";

/// Adds a to-do: owner, id, title, folded, description, folded, state, time, version.
pub const INSERT: &str = "\
    insert into todos (
        owner_id, id, title, title_folded, description, description_folded,
        state, updated_at, version
    ) values ($1, $2, $3, $4, $5, $6, $7, $8, $9)";

/// What the service sets on its connections: plans are kept.
pub const OPTIONS: &str = "-c plan_cache_mode=force_generic_plan";

/// As the service has them: what the to-dos of a page may add up to, and what one takes
/// besides its texts, in bytes.
pub const MAX_PAGE_BYTES: i64 = 1_000_000;
pub const TODO_OVERHEAD_BYTES: i32 = 160;

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    use super::*;

    fn words(text: &str) -> String {
        text.split_whitespace().collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn they_are_the_statements_of_the_service() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.sqlx");
        let files =
            fs::read_dir(folder).expect("a folder").map(|file| file.expect("a file").path());
        let of_service: Vec<_> = files
            .map(|file| {
                let text = fs::read_to_string(file).expect("text");
                let json: serde_json::Value = serde_json::from_str(&text).expect("JSON");
                // By which sqlx knows that it is never null.
                let statement = json["query"].as_str().expect("a statement");
                words(&statement.replace(r#" as "candidates!""#, ""))
            })
            .collect();
        for statement in [GET, LIST, UPDATE, INSERT] {
            assert!(of_service.contains(&words(statement)), "{statement}");
        }
    }
}
