//! The user that makes the calls, and a bystander.

use fast_zero::proto::{
    todo::v1::{GetTodoRequest, GetTodoResponse, ListDeletedTodosRequest, ListTodosRequest, Todo},
    user::v1::ListUsersRequest,
};
use prost::Message;
use uuid::Uuid;

use super::call::Call;
use crate::support::{
    Client, PASSWORD, RpcResult, app::unique_name, messages::KnownValues, raw_client::RawClient,
};

pub(super) const GET_TODO: &str = "/fastzero.todo.v1.TodoService/GetTodo";

/// The user that makes the calls, and known ids of its data.
pub(super) struct Caller {
    pub(super) client: Client,
    pub(super) known: KnownValues,
}

impl Caller {
    pub(super) async fn sign_up(anonymous: &Client) -> Self {
        let username = unique_name("caller");
        let email = format!("{username}@example.com");
        let user = anonymous.sign_up(&username, &email, PASSWORD).await;
        let mut client = anonymous.logged_in(&username, PASSWORD).await.expect("logged in");
        client.user = Some(user.clone());
        let (one, _) = (client.create_todo("one").await, client.create_todo("two").await);
        let mut deleted = String::new();
        for title in ["three", "four"] {
            deleted = client.create_todo(title).await.id;
            client.delete_todo(&deleted).await;
        }
        let todos = ListTodosRequest { page_size: 1, ..<_>::default() };
        let users = ListUsersRequest { page_size: 1, ..<_>::default() };
        let deleted_todos = ListDeletedTodosRequest { page_size: 1, ..<_>::default() };
        let deleted_todos = client.try_list_deleted_todos(deleted_todos).await.expect("listed");
        let page_tokens = vec![
            deleted_todos.into_inner().next_page_token,
            String::new(),
            client.list_todos(todos).await.next_page_token,
            client.list_users(users).await.next_page_token,
        ];
        let tokens = client.tokens().clone();
        let owned = |texts: &[&str]| texts.iter().map(ToString::to_string).collect();
        let known = KnownValues::from([
            (
                "id",
                vec![
                    "me".into(),
                    user.id,
                    one.id.clone(),
                    one.id,
                    deleted,
                    Uuid::now_v7().to_string(),
                ],
            ),
            ("session_id", vec![tokens.session_id, Uuid::now_v7().to_string()]),
            ("etag", vec![String::new(), String::new(), "1".into(), "2".into(), one.etag]),
            ("login", vec![username.clone(), email.clone()]),
            ("username", vec![username, unique_name("new"), unique_name("new")]),
            ("email", vec![email, format!("{}@example.com", unique_name("new"))]),
            ("password", vec![PASSWORD.into(), PASSWORD.into(), "another password".into()]),
            ("current_password", vec![PASSWORD.into()]),
            ("new_password", owned(&["another password"])),
            ("access_token", vec![tokens.access_token]),
            ("refresh_token", vec![tokens.refresh_token]),
            ("page_token", page_tokens),
            ("cursor", vec![String::new(), client.cursor().await]),
            ("order_by", owned(&["", "title", "update_time desc", "create_time desc"])),
            ("title", owned(&["one", "o", "Ação"])),
            ("description", owned(&["", "two\nlines"])),
            ("paths", owned(&["title", "state", "description", "username", "email", "*"])),
        ]);
        Self { client, known }
    }

    /// Returns `true` if the user and its data still exist.
    pub(super) async fn is_intact(&self, call: &Call, result: &RpcResult<Vec<u8>>) -> bool {
        let is_read = ["Get", "List", "Introspect", "Sync", "Watch"]
            .iter()
            .any(|read| call.method.name.starts_with(read));
        let has_new_password = call.method.name == "ChangePassword" && result.is_ok();
        let todo = &self.known["id"][2];
        is_read
            || !has_new_password
                && self.client.is_session_active().await
                && self.client.try_get_todo(todo).await.is_ok()
    }
}

/// Another user, on the connection of the calls and on another one.
pub(super) struct Bystander {
    pub(super) client: Client,
    pub(super) raw: RawClient,
    pub(super) todo: Todo,
}

impl Bystander {
    pub(super) async fn is_unaffected(&self) {
        let request = GetTodoRequest { id: self.todo.id.clone() }.encode_to_vec();
        let (there, here) =
            tokio::join!(self.client.get_todo(&self.todo.id), self.raw.call(GET_TODO, &request));
        let here = here.expect("found on the same connection").into_inner();
        let here = GetTodoResponse::decode(&*here).expect("a response");
        assert_eq!((&there, here.todo.as_ref()), (&self.todo, Some(&self.todo)));
    }
}
