//! Lists of todos, page by page.

mod model;
mod sequence;
mod size;
mod tokens;

use fast_zero::proto::todo::v1::Todo;
use uuid::Uuid;

use crate::support::{App, Client};

const ORDERS: [&str; 6] =
    ["create_time", "create_time desc", "update_time", "update_time desc", "title", "title desc"];

fn ids(todos: &[Todo]) -> Vec<&str> {
    todos.iter().map(|todo| &*todo.id).collect()
}

/// Inserts todos by SQL, with consecutive versions.
async fn insert(app: &App, owner: &Client, titles: Vec<String>, description: &str) {
    let owner = Uuid::parse_str(&owner.user_id()).expect("an id");
    let ids: Vec<_> = titles.iter().map(|_| Uuid::now_v7()).collect();
    // For these titles, lowercase equals case folding.
    let folded: Vec<_> = titles.iter().map(|title| title.to_lowercase()).collect();
    let insert = sqlx::query(
        "with clock as (
             insert into todo_clocks as clock
             values ($1, (extract(epoch from now()) * 1000000)::bigint + cardinality($2::uuid[]))
             on conflict (owner_id) do update
                 set version = greatest(clock.version + cardinality($2::uuid[]), excluded.version)
             returning version - cardinality($2::uuid[]) as before
         )
         insert into todos (owner_id, id, title, title_folded, description, description_folded,
             state, version)
         select $1, id, title, title_folded, $5, $5, 1, before + number
         from clock, unnest($2::uuid[], $3::text[], $4::text[]) with ordinality
             as new (id, title, title_folded, number)",
    );
    let insert = insert.bind(owner).bind(ids).bind(titles).bind(folded).bind(description);
    insert.execute(&mut app.connect_database().await).await.expect("inserted");
}

/// Inserts todos with many equal titles. Their order by update time is not that of their creation.
async fn insert_alike(app: &App, owner: &Client) {
    let titles = ["a", "A", "b", "a", "É", "é", "b", "A", "a", "C", "b", "c", "É", "a", "c"];
    insert(app, owner, titles.map(str::to_owned).to_vec(), "").await;
    app.execute("update todos set version = version + 1000000 where title > 'b'").await;
    app.execute("update todo_clocks set version = version + 1000000").await;
}
