//! The certificates.

use std::path::PathBuf;

use clap::Args;
use tokio_rustls::rustls::ClientConfig;

use super::ConfigError;
use crate::transport::tls::{IdentityFiles, PemFile, ReloadingTls, TlsFiles};

/// The certificates of the server.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "TLS")]
#[expect(clippy::struct_field_names, reason = "the fields are named like the settings")]
pub struct TlsConfig {
    /// Certificate chain of the server, in PEM [default: none, plaintext]
    #[arg(long, env)]
    pub tls_cert_file: Option<PathBuf>,

    /// Private key of the certificate, in PEM
    #[arg(long, env)]
    pub tls_key_file: Option<PathBuf>,

    /// CA bundle of client certificates, in PEM: requires one of each client (mTLS) [default: none]
    #[arg(long, env)]
    pub tls_client_ca_file: Option<PathBuf>,
}

impl TlsConfig {
    /// Loads the certificates of the server; `None` for plaintext.
    pub(crate) fn load(&self) -> Result<Option<ReloadingTls>, ConfigError> {
        Ok(self.files()?.map(ReloadingTls::load).transpose()?)
    }

    /// Returns the configuration of a client of this server, which presents a certificate of its
    /// own (its file and that of its key), or else the server's.
    pub(crate) fn client_config(
        &self,
        identity: Option<(PathBuf, PathBuf)>,
    ) -> Result<Option<ClientConfig>, ConfigError> {
        let identity = identity.map(|(certificate, key)| IdentityFiles {
            certificate: PemFile { setting: "--cert", path: certificate },
            key: PemFile { setting: "--key", path: key },
        });
        let files = self.files()?;
        if files.is_none() && identity.is_some() {
            return Err(ConfigError::requires("TLS_CERT_FILE", "--cert"));
        }
        Ok(files.map(|files| files.client_config(identity.as_ref())).transpose()?)
    }

    fn files(&self) -> Result<Option<TlsFiles>, ConfigError> {
        let file = |setting, path: &Option<PathBuf>| {
            let path = path.clone().filter(|path| !path.as_os_str().is_empty())?;
            Some(PemFile { setting, path })
        };
        let certificate = file("TLS_CERT_FILE", &self.tls_cert_file);
        let key = file("TLS_KEY_FILE", &self.tls_key_file);
        let client_ca = file("TLS_CLIENT_CA_FILE", &self.tls_client_ca_file);
        match (certificate, key, client_ca) {
            (Some(certificate), Some(key), client_ca) => {
                Ok(Some(TlsFiles { server: IdentityFiles { certificate, key }, client_ca }))
            }
            (None, None, None) => Ok(None),
            (Some(_), None, _) => Err(ConfigError::requires("TLS_KEY_FILE", "TLS_CERT_FILE")),
            (None, Some(_), _) => Err(ConfigError::requires("TLS_CERT_FILE", "TLS_KEY_FILE")),
            (None, None, Some(_)) => {
                Err(ConfigError::requires("TLS_CERT_FILE", "TLS_CLIENT_CA_FILE"))
            }
        }
    }
}
