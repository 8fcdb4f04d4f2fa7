//! The one owner of personal access tokens. Each method that changes them writes to the audit
//! trail, whether or not the call still waits.

use std::sync::Arc;

use secrecy::SecretString;

use super::{
    NewPersonalAccessToken, PersonalAccessToken, StoredToken, TokenDetails,
    last_use::LastUseRecorder, text::TokenText,
};
use crate::{
    auth::{
        failed_lookups::FailedLookups,
        sessions::Sessions,
        store::{AuthStore, Credentials, TokenCreation},
    },
    crypto::random_secret::{RandomSecret, SecretHash},
    database::run_to_completion,
    rpc::{
        caller::{ClientIp, SessionCaller},
        error::Error,
    },
    telemetry::audit,
    types::id::{PersonalAccessTokenId, UserId},
};

/// The personal access tokens of all users.
#[derive(Debug)]
pub(crate) struct PersonalAccessTokens {
    store: Arc<AuthStore>,
    /// Caches the tokens, and watches those of open streams.
    sessions: Sessions,
    failed_lookups: Arc<FailedLookups>,
    last_use: LastUseRecorder,
}

impl PersonalAccessTokens {
    pub(in crate::auth) fn new(
        store: Arc<AuthStore>,
        sessions: Sessions,
        failed_lookups: Arc<FailedLookups>,
    ) -> Self {
        let last_use = LastUseRecorder::new(store.clone());
        Self { store, sessions, failed_lookups, last_use }
    }

    /// Returns the row of a token, if the secret is right and the token has not expired. Stores in
    /// the background that it was used today. `client_ip` is the client that fails if the token is
    /// invalid; `None` if that does not count.
    ///
    /// # Errors
    /// [`Error::TokenInvalid`], [`Error::TokenExpired`], or [`Error::TooManyAttempts`] instead of
    /// `TokenInvalid` if the client has presented too many invalid ones.
    pub(in crate::auth) async fn verify(
        &self,
        text: &TokenText,
        client_ip: Option<ClientIp>,
    ) -> Result<Arc<StoredToken>, Error> {
        // Before the lookup, so that both outcomes take the same work.
        let secret_hash = text.secret.hash();
        let token = match self.sessions.cached_token(text) {
            Some(token) if token.secret_hash == secret_hash => token,
            Some(_) => return Err(invalid(&self.failed_lookups, client_ip)),
            None => self.find(text, secret_hash, client_ip).await?,
        };
        // Only the owner learns that the token has expired.
        let now = self.store.clock().now();
        if token.expires_at <= now {
            return Err(Error::TokenExpired { server_time: now });
        }
        self.last_use.record(&token, now.date());
        Ok(token)
    }

    /// Looks up the row of a token. A client that disconnects would otherwise guess without being
    /// counted.
    async fn find(
        &self,
        text: &TokenText,
        secret_hash: SecretHash,
        client_ip: Option<ClientIp>,
    ) -> Result<Arc<StoredToken>, Error> {
        let permit = match client_ip {
            Some(client_ip) => self.failed_lookups.admit(client_ip).await,
            None => None,
        };
        let (sessions, failed_lookups) = (self.sessions.clone(), self.failed_lookups.clone());
        let text = text.clone();
        run_to_completion(async move {
            let _permit = permit;
            let found = sessions.find_token(&text).await?;
            let found = found.filter(|token| token.secret_hash == secret_hash);
            found.ok_or_else(|| invalid(&failed_lookups, client_ip))
        })
        .await
    }

    /// Creates a token of the caller, whose password was verified. Returns it with its text.
    ///
    /// # Errors
    /// [`Error::PersonalAccessTokenLimitReached`], or [`Error::IncorrectCredentials`] if the
    /// password changed, or the user was disabled or deleted, in the meantime.
    pub(in crate::auth) async fn create(
        &self,
        caller: SessionCaller,
        verified: Credentials,
        details: TokenDetails,
    ) -> Result<(PersonalAccessToken, SecretString), Error> {
        let store = self.store.clone();
        run_to_completion(async move {
            let id = PersonalAccessTokenId::generate(store.clock());
            let text = TokenText { user_id: caller.user_id, id, secret: RandomSecret::generate() };
            let token = NewPersonalAccessToken {
                id,
                user_id: caller.user_id,
                now: store.clock().now(),
                details,
                secret_hash: text.secret.hash(),
            };
            match store.create_token(&token, verified.password_version).await? {
                TokenCreation::Created => {}
                TokenCreation::LimitReached => return Err(Error::PersonalAccessTokenLimitReached),
                TokenCreation::Outdated => return Err(Error::IncorrectCredentials),
            }
            audit::record_personal_access_token(
                "personal_access_token_created",
                caller.user_id,
                caller.session_id,
                id,
            );
            Ok((token.into(), text.encode()))
        })
        .await
    }

    /// Lists a user's tokens, the newest first.
    pub(in crate::auth) async fn list(
        &self,
        user_id: UserId,
    ) -> Result<Vec<PersonalAccessToken>, Error> {
        self.store.list_tokens(user_id).await
    }

    /// Revokes a token of the caller.
    ///
    /// # Errors
    /// [`Error::PersonalAccessTokenNotFound`].
    pub(in crate::auth) async fn revoke(
        &self,
        caller: SessionCaller,
        id: PersonalAccessTokenId,
    ) -> Result<(), Error> {
        let (store, sessions) = (self.store.clone(), self.sessions.clone());
        run_to_completion(async move {
            let revoked = store.delete_token(caller.user_id, id).await;
            // Also after an error: the statement may have run.
            sessions.invalidate(caller.user_id);
            if !revoked? {
                return Err(Error::PersonalAccessTokenNotFound);
            }
            audit::record_personal_access_token(
                "personal_access_token_revoked",
                caller.user_id,
                caller.session_id,
                id,
            );
            Ok(())
        })
        .await
    }
}

/// Returns the error of an invalid token, and records it for its client.
fn invalid(failed_lookups: &FailedLookups, client_ip: Option<ClientIp>) -> Error {
    match client_ip {
        Some(client_ip) => failed_lookups.record(client_ip, Error::TokenInvalid),
        None => Error::TokenInvalid,
    }
}

impl From<NewPersonalAccessToken> for PersonalAccessToken {
    fn from(token: NewPersonalAccessToken) -> Self {
        let TokenDetails { name, scopes, expires_at } = token.details;
        let scopes = scopes.into_iter().map(str::to_owned).collect();
        Self { id: token.id, name, scopes, expires_at, last_used_date: None }
    }
}
