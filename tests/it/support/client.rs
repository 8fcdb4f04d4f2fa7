//! Callers: the generated clients, with or without an access token.

use fast_zero::proto::{
    auth::v1::{LoginRequest, TokenSet, auth_service_client::AuthServiceClient},
    todo::v1::{CreateTodoRequest, Todo, todo_service_client::TodoServiceClient},
    user::v1::{CreateUserRequest, User, user_service_client::UserServiceClient},
};
use tonic::{
    Request, Status,
    metadata::{Ascii, MetadataKey, MetadataValue},
    service::{Interceptor, interceptor::InterceptedService},
    transport::Channel,
};

/// The password of the users that tests create.
pub const PASSWORD: &str = "correct horse battery";

/// A caller. Cloning it gives another one with the same token.
#[derive(Clone)]
pub struct Client {
    channel: Channel,
    metadata: Metadata,
    /// Of the login, if there was one.
    pub tokens: Option<TokenSet>,
    /// Of the sign-up, if it was made by [`Self::signed_up`].
    pub user: Option<User>,
}

pub type Service = InterceptedService<Channel, Metadata>;

/// Metadata that goes with every call.
#[derive(Clone, Default)]
pub struct Metadata(Vec<(MetadataKey<Ascii>, MetadataValue<Ascii>)>);

impl Interceptor for Metadata {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        for (key, value) in &self.0 {
            request.metadata_mut().append(key.clone(), value.clone());
        }
        Ok(request)
    }
}

impl Client {
    pub fn new(channel: Channel) -> Self {
        Self { channel, metadata: Metadata::default(), tokens: None, user: None }
    }

    /// The same caller with one more metadata entry, after those it has.
    pub fn with(mut self, key: &'static str, value: &str) -> Self {
        let value = MetadataValue::try_from(value).expect("a metadata value");
        self.metadata.0.push((MetadataKey::from_static(key), value));
        self
    }

    /// The same caller without its access token and all other metadata.
    pub fn without_metadata(mut self) -> Self {
        self.metadata = Metadata::default();
        self
    }

    /// The same caller with this access token and no other metadata.
    pub fn with_token(self, token: &str) -> Self {
        self.without_metadata().with("authorization", &format!("Bearer {token}"))
    }

    /// The same caller by way of another server.
    pub fn through(mut self, channel: &Channel) -> Self {
        self.channel = channel.clone();
        self
    }

    /// Creates a user with the password [`PASSWORD`] and an address at example.com, and
    /// logs in.
    pub async fn signed_up(&self, username: &str) -> Self {
        let user = self.create_user(username).await;
        let mut client = self.logged_in(username, PASSWORD).await.expect("logged in");
        client.user = Some(user);
        client
    }

    /// Creates a user with the password [`PASSWORD`] and an address at example.com.
    pub async fn create_user(&self, username: &str) -> User {
        let request = CreateUserRequest {
            username: username.to_owned(),
            email: format!("{username}@example.com"),
            password: PASSWORD.to_owned(),
        };
        let response = self.users().create_user(request).await.expect("signed up");
        response.into_inner().user.expect("a user")
    }

    /// Logs in; the caller that comes of it has the access token.
    pub async fn logged_in(&self, login: &str, password: &str) -> Result<Self, Status> {
        let request = LoginRequest { login: login.to_owned(), password: password.to_owned() };
        let response = self.auth().login(request).await?.into_inner();
        let tokens = response.tokens.expect("tokens");
        let mut client = self.clone().with_token(&tokens.access_token);
        client.tokens = Some(tokens);
        Ok(client)
    }

    pub fn users(&self) -> UserServiceClient<Service> {
        UserServiceClient::with_interceptor(self.channel.clone(), self.metadata.clone())
    }

    pub fn auth(&self) -> AuthServiceClient<Service> {
        AuthServiceClient::with_interceptor(self.channel.clone(), self.metadata.clone())
    }

    pub fn todos(&self) -> TodoServiceClient<Service> {
        TodoServiceClient::with_interceptor(self.channel.clone(), self.metadata.clone())
    }

    /// The id of the user that [`Self::signed_up`] created.
    pub fn user_id(&self) -> String {
        self.user.as_ref().expect("a caller that signed up").id.clone()
    }

    /// The tokens of the login.
    pub fn tokens(&self) -> &TokenSet {
        self.tokens.as_ref().expect("a caller that logged in")
    }

    /// Adds a to-do with this title.
    pub async fn create_todo(&self, title: &str) -> Todo {
        self.create(Todo { title: title.to_owned(), ..Todo::default() }).await
    }

    /// Adds a to-do.
    pub async fn create(&self, todo: Todo) -> Todo {
        let request = CreateTodoRequest { todo: Some(todo) };
        let response = self.todos().create_todo(request).await.expect("added");
        response.into_inner().todo.expect("a to-do")
    }
}
