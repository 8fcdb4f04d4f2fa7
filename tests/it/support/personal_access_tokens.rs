//! Personal access tokens: their RPCs, and the parts of their text.

use std::time::{Duration, SystemTime};

use fast_zero::proto::auth::v1::{
    CreatePersonalAccessTokenRequest, CreatePersonalAccessTokenResponse,
    ListPersonalAccessTokensRequest, PersonalAccessToken, RevokePersonalAccessTokenRequest,
    RevokePersonalAccessTokenResponse,
};
use prost_types::Timestamp;
use uuid::Uuid;

use super::{
    Client, PASSWORD, RpcResult,
    checksummed_text::{decode, encode},
};

/// The scopes of the API.
pub const SCOPES: [&str; 4] = ["todo.read", "todo.write", "token.introspect", "user.read"];

/// Returns the time in this many seconds.
pub fn in_seconds(seconds: u64) -> Timestamp {
    (SystemTime::now() + Duration::from_secs(seconds)).into()
}

/// Returns a valid request for a token that expires in an hour.
pub fn new_token(scopes: &[&str]) -> CreatePersonalAccessTokenRequest {
    CreatePersonalAccessTokenRequest {
        name: "nightly job".to_owned(),
        scopes: scopes.iter().copied().map(str::to_owned).collect(),
        expire_time: Some(in_seconds(3_600)),
        current_password: PASSWORD.to_owned(),
    }
}

impl Client {
    pub async fn try_create_token(
        &self,
        request: CreatePersonalAccessTokenRequest,
    ) -> RpcResult<CreatePersonalAccessTokenResponse> {
        self.auth().create_personal_access_token(request).await
    }

    /// Creates a token. Returns it with its text.
    pub async fn create_token(&self, scopes: &[&str]) -> (PersonalAccessToken, String) {
        let created = self.try_create_token(new_token(scopes)).await.expect("created");
        let created = created.into_inner();
        (created.personal_access_token.expect("a token"), created.secret)
    }

    /// Creates a token, and returns a client that calls with it.
    pub async fn with_new_token(&self, scopes: &[&str]) -> (PersonalAccessToken, Self) {
        let (token, secret) = self.create_token(scopes).await;
        (token, self.clone().with_token(&secret))
    }

    pub async fn list_tokens(&self) -> Vec<PersonalAccessToken> {
        let request = ListPersonalAccessTokensRequest {};
        let listed = self.auth().list_personal_access_tokens(request).await;
        listed.expect("listed").into_inner().personal_access_tokens
    }

    pub async fn try_revoke_token(&self, id: &str) -> RpcResult<RevokePersonalAccessTokenResponse> {
        let request = RevokePersonalAccessTokenRequest { id: id.to_owned() };
        self.auth().revoke_personal_access_token(request).await
    }
}

/// The parts of a token's text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TokenText {
    pub user_id: Uuid,
    pub id: Uuid,
    pub secret: [u8; 32],
}

impl TokenText {
    /// Parses the text of a valid token.
    pub fn parse(text: &str) -> Self {
        let bytes = decode("fz_", text);
        assert_eq!(bytes.len(), 64);
        Self {
            user_id: Uuid::from_slice(&bytes[..16]).expect("16 bytes"),
            id: Uuid::from_slice(&bytes[16..32]).expect("16 bytes"),
            secret: bytes[32..64].try_into().expect("32 bytes"),
        }
    }

    /// Returns the text, with a valid checksum.
    pub fn encode(&self) -> String {
        encode("fz_", &[&self.user_id.as_bytes()[..], self.id.as_bytes(), &self.secret].concat())
    }

    /// Returns a token of the same user that does not exist.
    pub fn unknown(self) -> Self {
        Self { id: Uuid::now_v7(), ..self }
    }

    /// Returns the same token with another secret.
    pub fn with_wrong_secret(mut self) -> Self {
        self.secret[31] ^= 1;
        self
    }
}
