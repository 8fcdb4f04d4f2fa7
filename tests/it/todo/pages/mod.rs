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

/// Inserts todos by SQL, all with the same update time.
async fn insert(app: &App, owner: &Client, titles: Vec<String>, description: &str) {
    let owner = Uuid::parse_str(&owner.user_id()).expect("an id");
    let ids: Vec<_> = titles.iter().map(|_| Uuid::now_v7()).collect();
    // For these titles, lowercase equals case folding.
    let folded: Vec<_> = titles.iter().map(|title| title.to_lowercase()).collect();
    let insert = sqlx::query(
        "insert into todos (owner_id, id, title, title_folded, description, description_folded,
             state, updated_at, version)
         select $1, id, title, title_folded, $5, $5, 1, now(), 1
         from unnest($2::uuid[], $3::text[], $4::text[]) as new (id, title, title_folded)",
    );
    let insert = insert.bind(owner).bind(ids).bind(titles).bind(folded).bind(description);
    insert.execute(&mut app.connect_database().await).await.expect("inserted");
}

/// Inserts todos with many equal titles and update times.
async fn insert_alike(app: &App, owner: &Client) {
    let titles = ["a", "A", "b", "a", "É", "é", "b", "A", "a", "C", "b", "c", "É", "a", "c"];
    insert(app, owner, titles.map(str::to_owned).to_vec(), "").await;
    app.execute("update todos set updated_at = updated_at + interval '1 s' where title > 'b'")
        .await;
}
