//! A client of fast-zero: signs up, logs in, and creates, lists and updates todos.
//!
//! Two parts are meant to be copied: [`Session::call`] keeps calls authenticated, and
//! [`reason`] reads the reason of an error.

use std::{env, process::ExitCode, sync::Arc, time::Duration};

use http_body_util::{BodyExt, Full};
use tokio::{sync::Mutex, time::Instant, try_join};
use tonic::{
    Request, Status,
    body::Body,
    transport::{Channel, Endpoint},
};
use tonic_types::StatusExt;
use tower::{BoxError, ServiceExt, service_fn};

use proto::fastzero::{
    auth::v1::{
        LoginRequest, RefreshTokenRequest, TokenSet, auth_service_client::AuthServiceClient,
    },
    todo::v1::{
        CreateTodoRequest, ListTodosRequest, Todo, TodoState, UpdateTodoRequest,
        todo_service_client::TodoServiceClient,
    },
    user::v1::{CreateUserRequest, user_service_client::UserServiceClient},
};

#[expect(
    clippy::doc_lazy_continuation,
    clippy::pedantic,
    reason = "generated from the .proto files"
)]
mod proto {
    include!(concat!(env!("OUT_DIR"), "/proto.rs"));
}

const USERNAME: &str = "ana";
const PASSWORD: &str = "correct horse";

/// The time until a call's deadline. The server allows 5 seconds at most.
const CALL_TIMEOUT: Duration = Duration::from_secs(3);

/// Returns the reason of an error, or an empty string if fast-zero gave none. Programs decide by
/// the reason.
fn reason(status: &Status) -> String {
    let info = status.get_details_error_info().filter(|info| info.domain == "fastzero");
    info.map(|info| info.reason).unwrap_or_default()
}

/// The tokens of a login, and the channel for the calls that they authenticate.
struct Session {
    channel: Channel,
    tokens: Mutex<TokenSet>,
}

impl Session {
    /// Makes a call with a deadline and the access token, which it refreshes once it has
    /// expired. The server reports the expiry (TOKEN_EXPIRED), so the client's clock does not
    /// matter. It is a tower service, because an interceptor of tonic sees no responses.
    async fn call(
        self: Arc<Self>,
        request: http::Request<Body>,
    ) -> Result<http::Response<Body>, BoxError> {
        let deadline = Instant::now() + CALL_TIMEOUT;
        let (head, body) = request.into_parts();
        // A retry sends the body again.
        let body = body.collect().await?.to_bytes();
        let attempt = async |access_token: String| {
            let mut head = head.clone();
            head.headers.insert("authorization", format!("Bearer {access_token}").parse()?);
            let left = deadline.duration_since(Instant::now());
            head.headers.insert("grpc-timeout", format!("{}m", left.as_millis()).parse()?);
            let request = http::Request::from_parts(head, Body::new(Full::new(body.clone())));
            Ok::<_, BoxError>(self.channel.clone().oneshot(request).await?)
        };
        let access_token = self.access_token(None, deadline).await?;
        let response = attempt(access_token.clone()).await?;
        // A call that fails before its first response message has its status in the headers.
        match Status::from_header_map(response.headers()) {
            Some(status) if reason(&status) == "TOKEN_EXPIRED" => {
                attempt(self.access_token(Some(&access_token), deadline).await?).await
            }
            _ => Ok(response),
        }
    }

    /// Returns the access token, after a refresh if it still is the expired one. The first of
    /// several concurrent calls refreshes; the others wait and use its token.
    async fn access_token(
        &self,
        expired: Option<&str>,
        deadline: Instant,
    ) -> Result<String, Status> {
        let mut tokens = self.tokens.lock().await;
        if expired == Some(&*tokens.access_token) {
            let refresh_token = tokens.refresh_token.clone();
            let mut request = Request::new(RefreshTokenRequest { refresh_token });
            request.set_timeout(deadline.duration_since(Instant::now()));
            let mut auth = AuthServiceClient::new(self.channel.clone());
            let response = auth.refresh_token(request).await?.into_inner();
            println!("refreshed the access token");
            *tokens = response.tokens.unwrap_or_default();
        }
        Ok(tokens.access_token.clone())
    }
}

/// Gives a request of a method that needs no access token its deadline.
fn timed<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(CALL_TIMEOUT);
    request
}

/// Signs up unless the username exists, then logs in.
async fn log_in(channel: &Channel) -> Result<TokenSet, Status> {
    let user = CreateUserRequest {
        username: USERNAME.to_owned(),
        email: format!("{USERNAME}@example.com"),
        password: PASSWORD.to_owned(),
    };
    match UserServiceClient::new(channel.clone()).create_user(timed(user)).await {
        Ok(_) => println!("signed up: {USERNAME}"),
        Err(status) if reason(&status) == "USERNAME_EXISTS" => {
            println!("already signed up: USERNAME_EXISTS");
        }
        Err(status) => return Err(status),
    }
    let login = LoginRequest { login: USERNAME.to_owned(), password: PASSWORD.to_owned() };
    let response = AuthServiceClient::new(channel.clone()).login(timed(login)).await?;
    Ok(response.into_inner().tokens.unwrap_or_default())
}

fn new_todo(title: &str) -> CreateTodoRequest {
    CreateTodoRequest { todo: Some(Todo { title: title.to_owned(), ..Todo::default() }) }
}

async fn run() -> Result<(), BoxError> {
    let address = env::var("FASTZERO_ADDR").unwrap_or_else(|_| "localhost:50051".to_owned());
    let channel = Endpoint::from_shared(format!("http://{address}"))?.connect_lazy();
    let tokens = match env::var("FASTZERO_ACCESS_TOKEN") {
        Ok(access_token) => {
            let refresh_token = env::var("FASTZERO_REFRESH_TOKEN")?;
            TokenSet { access_token, refresh_token, ..TokenSet::default() }
        }
        Err(_) => log_in(&channel).await?,
    };
    let session = Arc::new(Session { channel, tokens: Mutex::new(tokens) });
    let mut todos =
        TodoServiceClient::new(service_fn(move |request| Arc::clone(&session).call(request)));

    // Two concurrent calls: if the access token has expired, they refresh it once.
    let mut other = todos.clone();
    try_join!(
        todos.create_todo(new_todo("Buy milk")),
        other.create_todo(new_todo("Water the plants")),
    )?;
    let order_by = "create_time desc".to_owned();
    let newest = ListTodosRequest { order_by, page_size: 2, ..ListTodosRequest::default() };
    let page = todos.list_todos(newest).await?.into_inner();
    for todo in &page.todos {
        println!("todo: {}", todo.title);
    }

    // The update changes the etag, so repeating it with the first etag fails.
    let mut todo = page.todos[0].clone();
    todo.set_state(TodoState::Doing);
    let update = UpdateTodoRequest { todo: Some(todo), update_mask: None };
    todos.update_todo(update.clone()).await?;
    if let Err(status) = todos.update_todo(update).await {
        println!("stale etag: {}", reason(&status));
    }
    if let Err(status) = todos.create_todo(new_todo(" ")).await {
        let details = status.get_details_bad_request();
        for violation in details.into_iter().flat_map(|details| details.field_violations) {
            println!("invalid field: {}: {}", violation.field, violation.description);
        }
    }
    Ok(())
}

#[tokio::main]
async fn main() -> ExitCode {
    let Err(error) = run().await else {
        return ExitCode::SUCCESS;
    };
    let status = Status::from_error(error);
    eprintln!("{:?}: {} ({})", status.code(), status.message(), reason(&status));
    if let Some(delay) = status.get_details_retry_info().and_then(|info| info.retry_delay) {
        eprintln!("retry after {:.0} s", delay.as_secs_f64());
    }
    ExitCode::FAILURE
}
