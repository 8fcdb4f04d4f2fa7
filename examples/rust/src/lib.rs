//! The session of a client of fast-zero: logs in, and keeps calls authenticated.
//!
//! Two parts are meant to be copied: [`Session`] refreshes the access token, and [`reason`] reads
//! the reason of an error.

use std::{env, process::ExitCode, sync::Arc, time::Duration};

use http_body_util::{BodyExt, Full};
use tokio::{sync::Mutex, time::Instant};
use tonic::{
    Request, Status,
    body::Body,
    transport::{Channel, Endpoint},
};
use tonic_types::StatusExt;
use tower::{BoxError, ServiceExt};

use proto::fastzero::{
    auth::v1::{
        LoginRequest, RefreshTokenRequest, TokenSet, auth_service_client::AuthServiceClient,
    },
    user::v1::{CreateUserRequest, user_service_client::UserServiceClient},
};

/// The generated code of the API.
#[expect(
    clippy::doc_lazy_continuation,
    clippy::pedantic,
    missing_docs,
    reason = "generated from the .proto files"
)]
pub mod proto {
    include!(concat!(env!("OUT_DIR"), "/proto.rs"));
}

const USERNAME: &str = "ana";
const PASSWORD: &str = "correct horse";

/// The time until a call's deadline. The server allows 5 seconds at most.
const CALL_TIMEOUT: Duration = Duration::from_secs(3);

/// Returns the reason of an error, or an empty string if fast-zero gave none. Programs decide by
/// the reason.
#[must_use]
pub fn reason(status: &Status) -> String {
    let info = status.get_details_error_info().filter(|info| info.domain == "fastzero");
    info.map(|info| info.reason).unwrap_or_default()
}

/// Returns `true` if the client refreshes its access token after an error with this reason. A token
/// with a retired key is TOKEN_INVALID, while its session may still be active.
#[must_use]
pub fn is_refreshable(reason: &str) -> bool {
    matches!(reason, "TOKEN_EXPIRED" | "TOKEN_INVALID")
}

/// Returns the delay before a retry, if the error has one.
#[must_use]
pub fn retry_delay(status: &Status) -> Option<Duration> {
    status.get_details_retry_info()?.retry_delay
}

/// The tokens of a login, and the channel for the calls that they authenticate.
#[derive(Debug)]
pub struct Session {
    channel: Channel,
    tokens: Mutex<TokenSet>,
}

impl Session {
    /// Resumes the session of the environment, or logs in.
    pub async fn open() -> Result<Arc<Self>, BoxError> {
        let address = env::var("FASTZERO_ADDR").unwrap_or_else(|_| "localhost:50051".to_owned());
        let channel = Endpoint::from_shared(format!("http://{address}"))?.connect_lazy();
        let tokens = match env::var("FASTZERO_ACCESS_TOKEN") {
            Ok(access_token) => {
                let refresh_token = env::var("FASTZERO_REFRESH_TOKEN")?;
                TokenSet { access_token, refresh_token, ..TokenSet::default() }
            }
            Err(_) => log_in(&channel).await?,
        };
        Ok(Arc::new(Self { channel, tokens: Mutex::new(tokens) }))
    }

    /// Returns the channel.
    #[must_use]
    pub fn channel(&self) -> Channel {
        self.channel.clone()
    }

    /// Makes a call with a deadline and the access token, which it refreshes when the server
    /// rejects it. The server reports the expiry (TOKEN_EXPIRED), so the client's clock does not
    /// matter. It is a tower service, because an interceptor of tonic sees no responses.
    pub async fn call(
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
        let access_token = self.access_token(None).await?;
        let response = attempt(access_token.clone()).await?;
        // A call that fails before its first response message has its status in the headers.
        match Status::from_header_map(response.headers()) {
            Some(status) if is_refreshable(&reason(&status)) => {
                attempt(self.access_token(Some(&access_token)).await?).await
            }
            _ => Ok(response),
        }
    }

    /// Returns the access token, after a refresh if it still is the rejected one. The first of
    /// several concurrent calls refreshes; the others wait and use its token.
    pub async fn access_token(&self, rejected: Option<&str>) -> Result<String, Status> {
        let mut tokens = self.tokens.lock().await;
        if rejected == Some(&*tokens.access_token) {
            let refresh_token = tokens.refresh_token.clone();
            let request = timed(RefreshTokenRequest { refresh_token });
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

/// Returns the exit code of a program. Prints the error with which it ended.
#[must_use]
pub fn exit_code(result: Result<(), BoxError>) -> ExitCode {
    let Err(error) = result else {
        return ExitCode::SUCCESS;
    };
    let status = Status::from_error(error);
    eprintln!("{:?}: {} ({})", status.code(), status.message(), reason(&status));
    if let Some(delay) = retry_delay(&status) {
        eprintln!("retry after {:.0} s", delay.as_secs_f64());
    }
    ExitCode::FAILURE
}
