//! Password resets: an operator creates a one-time code, and its holder sets a new password.
//!
//! The operator never learns the password, and the database stores a hash of the code only. A code
//! is `fzr_` and the base64url of the user's ID, of 32 random bytes and of a checksum. The ID finds
//! the code without a search.

use std::sync::Arc;

use secrecy::SecretString;
use time::{Duration, OffsetDateTime};
use uuid::Uuid;

use super::{
    failed_lookups::FailedLookups,
    login_throttle::{Account, LoginThrottle},
    sessions::Sessions,
    store::{
        AuthStore,
        reset_codes::{self, OpenResetCode},
    },
};
use crate::{
    crypto::{
        checksummed_text,
        hashing::HashingPool,
        password::{NewPassword, PasswordHash},
        random_secret::{RandomSecret, SECRET_BYTES},
    },
    database::{Database, run_to_completion},
    rpc::{caller::ClientIp, error::Error, validation::FieldViolations},
    telemetry::audit,
    types::{id::UserId, login::LoginIdentifier},
};

/// How long a reset code is valid: long enough for an email to arrive and to be read.
///
/// Test: `a_reset_code_is_valid_for_half_an_hour`.
pub(crate) const RESET_CODE_LIFETIME: Duration = Duration::minutes(30);

const PREFIX: &str = "fzr_";

/// A reset code that a client presents, or that is about to be stored.
#[derive(Debug)]
struct ResetCode {
    user_id: UserId,
    secret: RandomSecret,
}

impl ResetCode {
    /// Parses the text of a code. Returns `None` if the prefix, the length or the checksum is
    /// wrong.
    fn parse(text: &str) -> Option<Self> {
        let bytes: [u8; size_of::<Uuid>() + SECRET_BYTES] = checksummed_text::decode(PREFIX, text)?;
        let (id, secret) = bytes.split_first_chunk()?;
        Some(Self {
            user_id: UserId::from_uuid(Uuid::from_bytes(*id)),
            secret: RandomSecret::from_bytes(secret.try_into().ok()?),
        })
    }

    fn text(&self) -> SecretString {
        let id = self.user_id.as_uuid();
        checksummed_text::encode(PREFIX, &[id.as_bytes(), self.secret.as_bytes()])
    }
}

/// A reset code for the operator who created it.
#[derive(Debug)]
pub(crate) struct CreatedResetCode {
    /// The text of the code, which is stored nowhere.
    pub(crate) text: SecretString,
    /// The time when the code expires, by the clock of the database.
    pub(crate) expires_at: OffsetDateTime,
}

/// Creates a reset code for a user, in place of any other code.
///
/// # Errors
/// [`Error::UserNotFound`], [`Error::UserDisabled`], and those of the database.
pub(crate) async fn create(
    database: &Database,
    user_id: UserId,
) -> Result<CreatedResetCode, Error> {
    let code = ResetCode { user_id, secret: RandomSecret::generate() };
    let expires_at = database.clock().now() + RESET_CODE_LIFETIME;
    reset_codes::replace(database, user_id, &code.secret.hash(), expires_at).await?;
    audit::record("password_reset_created", Some(user_id), None);
    Ok(CreatedResetCode { text: code.text(), expires_at })
}

/// Sets passwords for those who have a code.
#[derive(Clone, Debug)]
pub(super) struct PasswordResets {
    pub(super) store: Arc<AuthStore>,
    pub(super) sessions: Sessions,
    pub(super) passwords: HashingPool,
    pub(super) throttle: Arc<LoginThrottle>,
    pub(super) failed_lookups: Arc<FailedLookups>,
}

impl PasswordResets {
    /// Redeems a code and sets the password. Nothing is hashed before the code is verified.
    ///
    /// # Errors
    /// [`Error::ResetCodeInvalid`], or [`Error::TooManyAttempts`] instead if the client has sent too
    /// many invalid codes, [`Error::InvalidRequest`] if the password equals a name of the user, and
    /// those of the hashing queue.
    pub(super) async fn reset(
        &self,
        code: &str,
        password: NewPassword,
        client_ip: ClientIp,
    ) -> Result<(), Error> {
        // A typo costs no query, and is no guess.
        let code = ResetCode::parse(code).ok_or(Error::ResetCodeInvalid)?;
        let code = Arc::new(code);
        let permit = self.failed_lookups.admit(client_ip).await;
        let (this, presented) = (self.clone(), code.clone());
        // A client that disconnects would otherwise guess without being counted.
        let open = run_to_completion(async move {
            let _permit = permit;
            this.verify(&presented, client_ip).await
        })
        .await?;
        password
            .check_differs_from(&[&open.username, &open.email])
            .map_err(|invalid| FieldViolations::single("new_password", invalid))?;
        let hash = self.passwords.try_enqueue()?.hash(password).await?;
        let this = self.clone();
        // A client that disconnects would otherwise stay locked out with the new password.
        run_to_completion(async move { this.set_password(&code, &hash, &open, client_ip).await })
            .await
    }

    async fn verify(&self, code: &ResetCode, client_ip: ClientIp) -> Result<OpenResetCode, Error> {
        let open = self.store.find_reset_code(code.user_id).await?;
        let known = open.as_ref().map(|_| code.user_id);
        if let Some(open) = open.filter(|open| open.hash == code.secret.hash()) {
            return Ok(open);
        }
        audit::record("password_reset_failed", known, None);
        Err(self.failed_lookups.record(client_ip, Error::ResetCodeInvalid))
    }

    async fn set_password(
        &self,
        code: &ResetCode,
        hash: &PasswordHash,
        open: &OpenResetCode,
        client_ip: ClientIp,
    ) -> Result<(), Error> {
        let user_id = code.user_id;
        let is_reset = self.store.reset_password(user_id, &code.secret, hash).await;
        // Also after an error: the transaction may have been committed.
        self.sessions.invalidate(user_id);
        if !is_reset? {
            // Another call has used the code in the meantime, or it was replaced.
            audit::record("password_reset_failed", Some(user_id), None);
            return Err(Error::ResetCodeInvalid);
        }
        audit::record("password_reset", Some(user_id), None);
        self.unlock(user_id, open, client_ip);
        Ok(())
    }

    /// Clears the failed logins of the account at this client and those over all clients, so that
    /// the user can log in at once. A lockout of the client for all accounts remains, and so do
    /// those of the account at other clients.
    fn unlock(&self, user_id: UserId, open: &OpenResetCode, client_ip: ClientIp) {
        self.throttle.clear(Account::User(user_id), client_ip);
        for login in [&open.username, &open.email] {
            let login = LoginIdentifier::parse(login);
            self.throttle.clear(Account::Login(&login), client_ip);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use secrecy::ExposeSecret;

    use super::*;

    fn code() -> ResetCode {
        ResetCode { user_id: UserId::any(), secret: RandomSecret::generate() }
    }

    #[test]
    fn a_code_has_the_prefix_and_one_length() {
        let code = code();
        let text = code.text();
        assert!(text.expose_secret().starts_with("fzr_"));
        assert_eq!(text.expose_secret().len(), 4 + 70);
        assert!(!format!("{code:?}").contains(&text.expose_secret()[30..40]));
    }

    #[test]
    fn a_token_is_no_code() {
        let token = checksummed_text::encode("fz_", &[&[1; 48]]);
        assert!(ResetCode::parse(token.expose_secret()).is_none());
    }

    proptest! {
        #[test]
        fn the_text_of_a_code_parses_back(id: u128, secret: [u8; SECRET_BYTES]) {
            let user_id = UserId::from_uuid(Uuid::from_u128(id));
            let code = ResetCode { user_id, secret: RandomSecret::from_bytes(secret) };
            let parsed = ResetCode::parse(code.text().expose_secret()).expect("our own text");
            prop_assert_eq!(parsed.user_id, user_id);
            prop_assert_eq!(parsed.secret.as_bytes(), &secret);
        }

        #[test]
        fn a_code_with_another_character_is_rejected(at in 0_usize..74, other in "\\PC") {
            let mut chars: Vec<_> =
                code().text().expose_secret().chars().map(String::from).collect();
            prop_assume!(chars[at] != other);
            chars[at] = other;
            prop_assert!(ResetCode::parse(&chars.concat()).is_none());
        }

        #[test]
        fn any_other_text_is_rejected(
            text in prop_oneof![any::<String>(), "fzr_[A-Za-z0-9_-]{68,72}", " ?fzr_\\PC{0,72}"]
        ) {
            prop_assert!(ResetCode::parse(&text).is_none());
        }
    }
}
