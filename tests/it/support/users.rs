//! The RPCs of `UserService`.

use fast_zero::proto::user::v1::{
    CreateUserRequest, CreateUserResponse, DeleteUserRequest, DeleteUserResponse, GetUserRequest,
    GetUserResponse, ListUsersRequest, ListUsersResponse, UpdateUserRequest, UpdateUserResponse,
    User,
};
use prost_types::FieldMask;

use super::{App, Client, RpcResult};

/// Returns the caller's own user with only these fields.
pub fn own_user(username: &str, email: &str) -> User {
    User { id: "me".into(), username: username.into(), email: email.into(), ..User::default() }
}

pub fn usernames(users: &[User]) -> Vec<&str> {
    users.iter().map(|user| &*user.username).collect()
}

impl App {
    /// Inserts users without passwords, "user1" and so on, in the order of their IDs.
    pub async fn insert_users(&self, count: i32) {
        let statement = sqlx::query(
            "insert into users select
                 ('00000000-0000-7000-8000-' || lpad(to_hex(n), 12, '0'))::uuid, 'user' || n,
                 'user' || n, 'user' || n || '@example.com', 'user' || n || '@example.com',
                 'no hash', 1, now(), 1
             from generate_series(1, $1) n",
        );
        let mut connection = self.connect_database().await;
        statement.bind(count).execute(&mut connection).await.expect("inserted");
    }
}

impl Client {
    pub async fn try_sign_up(
        &self,
        username: &str,
        email: &str,
        password: &str,
    ) -> RpcResult<CreateUserResponse> {
        let request = CreateUserRequest {
            username: username.to_owned(),
            email: email.to_owned(),
            password: password.to_owned(),
        };
        self.users().create_user(request).await
    }

    pub async fn sign_up(&self, username: &str, email: &str, password: &str) -> User {
        let response = self.try_sign_up(username, email, password).await.expect("created");
        response.into_inner().user.expect("a user")
    }

    pub async fn try_get_user(&self, id: &str) -> RpcResult<GetUserResponse> {
        self.users().get_user(GetUserRequest { id: id.to_owned() }).await
    }

    pub async fn get_user(&self, id: &str) -> User {
        let response = self.try_get_user(id).await.expect("found");
        response.into_inner().user.expect("a user")
    }

    pub async fn try_list_users(&self, request: ListUsersRequest) -> RpcResult<ListUsersResponse> {
        self.users().list_users(request).await
    }

    /// Returns one page.
    pub async fn list_users(&self, request: ListUsersRequest) -> ListUsersResponse {
        self.try_list_users(request).await.expect("listed").into_inner()
    }

    pub async fn try_update_user(
        &self,
        user: Option<User>,
        mask: Option<&[&str]>,
    ) -> RpcResult<UpdateUserResponse> {
        let paths = |mask: &[&str]| mask.iter().map(|path| (*path).to_owned()).collect();
        let update_mask = mask.map(|mask| FieldMask { paths: paths(mask) });
        self.users().update_user(UpdateUserRequest { user, update_mask }).await
    }

    pub async fn update_user(&self, user: User, mask: Option<&[&str]>) -> User {
        let response = self.try_update_user(Some(user), mask).await.expect("updated");
        response.into_inner().user.expect("a user")
    }

    pub async fn try_delete_user(&self, id: &str, etag: &str) -> RpcResult<DeleteUserResponse> {
        let request = DeleteUserRequest { id: id.to_owned(), etag: etag.to_owned() };
        self.users().delete_user(request).await
    }
}
