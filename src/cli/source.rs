//! Where the data is: a configured database, or the embedded PostgreSQL.

use super::ExitError;
use crate::config::{Config, DatabaseConfig};

#[cfg(feature = "embedded")]
use super::embedded::{self, EmbeddedPostgres};

/// A database, with the embedded PostgreSQL behind it if none is configured.
pub(super) struct DatabaseSource {
    #[cfg(feature = "embedded")]
    embedded: Option<EmbeddedPostgres>,
}

#[cfg(feature = "embedded")]
impl DatabaseSource {
    /// Starts the embedded PostgreSQL if no database is configured, and adds its URL to the
    /// settings.
    pub(super) async fn open(config: &mut DatabaseConfig) -> Result<Self, ExitError> {
        config.load_secrets()?;
        if config.connect_options()?.is_some() {
            return Ok(Self { embedded: None });
        }
        let postgres = embedded::start(config.fastzero_data_dir.as_deref()).await?;
        config.database_url = Some(postgres.url().clone());
        Ok(Self { embedded: Some(postgres) })
    }

    /// Adds the signing key of the embedded PostgreSQL's data directory to the settings, if none
    /// is configured.
    pub(super) fn provide_secret_key(&self, config: &mut Config) -> Result<(), ExitError> {
        if self.is_embedded() && config.tokens.keyring()?.is_none() {
            let data_dir = config.database.fastzero_data_dir.as_deref();
            config.tokens.secret_key = Some(embedded::load_or_create_secret_key(data_dir)?);
            // Fails if the configured previous key cannot be used.
            config.tokens.keyring()?;
        }
        Ok(())
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
#[expect(
    clippy::unnecessary_wraps,
    clippy::unused_async,
    clippy::unused_self,
    reason = "as with the embedded PostgreSQL"
)]
impl DatabaseSource {
    pub(super) async fn open(config: &mut DatabaseConfig) -> Result<Self, ExitError> {
        config.load_secrets()?;
        config.required_options()?;
        Ok(Self {})
    }

    pub(super) fn provide_secret_key(&self, _: &mut Config) -> Result<(), ExitError> {
        Ok(())
    }

    pub(super) fn is_embedded(&self) -> bool {
        false
    }

    pub(super) async fn exited(&mut self) -> ExitError {
        std::future::pending().await
    }

    pub(super) async fn close(self) {}
}
