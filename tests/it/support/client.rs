//! Clients: the generated ones, with or without an access token.

use fast_zero::proto::{
    auth::v1::{LoginRequest, TokenSet, auth_service_client::AuthServiceClient},
    test::v1::test_service_client::TestServiceClient,
    todo::v1::{CreateTodoRequest, Todo, todo_service_client::TodoServiceClient},
    user::v1::{CreateUserRequest, User, user_service_client::UserServiceClient},
};
use tonic::{
    Request, Response, Status,
    metadata::{Ascii, MetadataKey, MetadataValue},
    service::{Interceptor, interceptor::InterceptedService},
    transport::Channel,
};

/// The password of the users that tests create.
pub const PASSWORD: &str = "correct horse battery";

pub type RpcResult<T> = Result<Response<T>, Status>;

/// A client. A clone has the same token.
#[derive(Clone)]
pub struct Client {
    channel: Channel,
    metadata: Metadata,
    /// The tokens of the login, if there was one.
    pub tokens: Option<TokenSet>,
    /// The created user, if [`Self::signed_up`] made this client.
    pub user: Option<User>,
}

pub type ClientService = InterceptedService<Channel, Metadata>;

/// Metadata that the client sends with every call.
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

    /// Appends a metadata entry.
    pub fn with_metadata(mut self, key: &'static str, value: &str) -> Self {
        let value = MetadataValue::try_from(value).expect("a valid metadata value");
        self.metadata.0.push((MetadataKey::from_static(key), value));
        self
    }

    /// Removes the access token and all other metadata.
    pub fn without_metadata(mut self) -> Self {
        self.metadata = Metadata::default();
        self
    }

    /// Replaces all metadata by this access token.
    pub fn with_token(self, token: &str) -> Self {
        self.without_metadata().with_metadata("authorization", &format!("Bearer {token}"))
    }

    /// Replaces the connection.
    pub fn with_channel(mut self, channel: &Channel) -> Self {
        self.channel = channel.clone();
        self
    }

    /// Creates a user with the password [`PASSWORD`] and an email at example.com, and logs
    /// in.
    pub async fn signed_up(&self, username: &str) -> Self {
        let user = self.create_user(username).await;
        let mut client = self.logged_in(username, PASSWORD).await.expect("logged in");
        client.user = Some(user);
        client
    }

    /// Creates a user with the password [`PASSWORD`] and an email at example.com.
    pub async fn create_user(&self, username: &str) -> User {
        let request = CreateUserRequest {
            username: username.to_owned(),
            email: format!("{username}@example.com"),
            password: PASSWORD.to_owned(),
        };
        let response = self.users().create_user(request).await.expect("created");
        response.into_inner().user.expect("a user")
    }

    /// Logs in. Returns a client with the access token.
    pub async fn logged_in(&self, login: &str, password: &str) -> Result<Self, Status> {
        let request = LoginRequest { login: login.to_owned(), password: password.to_owned() };
        let response = self.auth().login(request).await?.into_inner();
        let tokens = response.tokens.expect("tokens");
        let mut client = self.clone().with_token(&tokens.access_token);
        client.tokens = Some(tokens);
        Ok(client)
    }

    /// Returns the client of the tests' own service.
    pub fn streams(&self) -> TestServiceClient<ClientService> {
        TestServiceClient::with_interceptor(self.channel.clone(), self.metadata.clone())
    }

    pub fn users(&self) -> UserServiceClient<ClientService> {
        UserServiceClient::with_interceptor(self.channel.clone(), self.metadata.clone())
    }

    pub fn auth(&self) -> AuthServiceClient<ClientService> {
        AuthServiceClient::with_interceptor(self.channel.clone(), self.metadata.clone())
    }

    pub fn todos(&self) -> TodoServiceClient<ClientService> {
        TodoServiceClient::with_interceptor(self.channel.clone(), self.metadata.clone())
    }

    /// Returns the ID of the user that [`Self::signed_up`] created.
    pub fn user_id(&self) -> String {
        self.user.as_ref().expect("a client that signed up").id.clone()
    }

    /// Returns the tokens of the login.
    pub fn tokens(&self) -> &TokenSet {
        self.tokens.as_ref().expect("a client that logged in")
    }

    /// Creates a todo with this title.
    pub async fn create_todo(&self, title: &str) -> Todo {
        self.create_todo_with(Todo { title: title.to_owned(), ..Todo::default() }).await
    }

    /// Creates a todo.
    pub async fn create_todo_with(&self, todo: Todo) -> Todo {
        let request = CreateTodoRequest { todo: Some(todo) };
        let response = self.todos().create_todo(request).await.expect("created");
        response.into_inner().todo.expect("a todo")
    }
}
