//! Where the data is: a configured database, or the embedded PostgreSQL.

use super::ExitError;
use crate::config::Config;

#[cfg(feature = "embedded")]
use super::embedded::{self, EmbeddedPostgres};
#[cfg(not(feature = "embedded"))]
use crate::config::ConfigError;

/// A database, with the embedded PostgreSQL behind it if none is configured.
pub(super) struct DatabaseSource {
    #[cfg(feature = "embedded")]
    embedded: Option<EmbeddedPostgres>,
}

#[cfg(feature = "embedded")]
impl DatabaseSource {
    /// Starts the embedded PostgreSQL if no database is configured, and adds what it provides to
    /// the settings: the URL, and the signing key if none is configured.
    pub(super) async fn open(config: &mut Config) -> Result<Self, ExitError> {
        if config.database.connect_options()?.is_some() {
            return Ok(Self { embedded: None });
        }
        let data_dir = config.database.fastzero_data_dir.clone();
        let postgres = embedded::start(data_dir.as_deref()).await?;
        config.database.database_url = Some(postgres.url().clone());
        if config.tokens.keyring()?.is_none() {
            let secret_key = embedded::load_or_create_secret_key(data_dir.as_deref())?;
            config.tokens.secret_key = Some(secret_key);
            // Fails if the configured previous key cannot be used.
            config.tokens.keyring()?;
        }
        Ok(Self { embedded: Some(postgres) })
    }

    /// Returns `true` if the database is the embedded one.
    pub(super) fn is_embedded(&self) -> bool {
        self.embedded.is_some()
    }

    /// Waits until the embedded PostgreSQL has exited; forever if there is none.
    pub(super) async fn exited(&mut self) -> ExitError {
        match &mut self.embedded {
            Some(postgres) => postgres.exited().await.into(),
            None => std::future::pending().await,
        }
    }

    /// Stops the embedded PostgreSQL.
    pub(super) async fn close(self) {
        if let Some(postgres) = self.embedded {
            postgres.stop().await;
        }
    }
}

#[cfg(not(feature = "embedded"))]
#[expect(clippy::unused_async, clippy::unused_self, reason = "as with the embedded PostgreSQL")]
impl DatabaseSource {
    pub(super) async fn open(config: &mut Config) -> Result<Self, ExitError> {
        match config.database.connect_options()? {
            Some(_) => Ok(Self {}),
            None => Err(ConfigError::missing("DATABASE_URL").into()),
        }
    }

    pub(super) fn is_embedded(&self) -> bool {
        false
    }

    pub(super) async fn exited(&mut self) -> ExitError {
        std::future::pending().await
    }

    pub(super) async fn close(self) {}
}
