//! TLS configuration of the server and of clients, with certificate reload.
//!
//! The server polls the files for changes. It compares their contents and not their
//! modification times: a Kubernetes secret is a symlink that is swapped, and other tools
//! preserve modification times. If the new files are invalid, the server logs a warning and
//! continues with the current certificate.

use std::{
    fmt, fs, io,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError, RwLock},
    time::Duration,
};

use aws_lc_rs::digest;
use http::Uri;
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    task::spawn_blocking,
    time::sleep,
};
use tokio_rustls::{
    TlsAcceptor, TlsConnector,
    client::TlsStream,
    rustls::{
        self, CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, ServerConfig,
        SignatureScheme, SupportedProtocolVersion,
        client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
        crypto::{
            WebPkiSupportedAlgorithms, aws_lc_rs as provider, verify_tls12_signature,
            verify_tls13_signature,
        },
        pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject},
        server::WebPkiClientVerifier,
        sign::{CertifiedKey, SingleCertAndKey},
        version::{TLS12, TLS13},
    },
};
use tower::Service;

use super::failures::{ConnectionFailure, HandshakeError};
use crate::types::secret_text::display_path;

/// The only ALPN protocol that is offered: HTTP/2 (RFC 9113, section 3.2).
const ALPN: &[u8] = b"h2";

/// The supported TLS versions. RFC 8996 deprecates all older versions.
const VERSIONS: [&SupportedProtocolVersion; 2] = [&TLS13, &TLS12];

/// The interval at which the files are polled. It is shorter than the interval of health
/// checks, which pin the certificate in the file: at most one health check fails because the
/// server has not yet reloaded a new file.
const RELOAD_INTERVAL: Duration = Duration::from_secs(2);

/// A file in PEM, and the setting that names it.
#[derive(Clone, Debug)]
pub struct PemFile {
    /// The environment variable or the flag.
    pub setting: &'static str,
    /// The path of the file.
    pub path: PathBuf,
}

/// The files of a certificate and its private key.
#[derive(Clone, Debug)]
pub struct IdentityFiles {
    /// The certificate chain, in PEM.
    pub certificate: PemFile,
    /// The unencrypted private key, in PEM.
    pub key: PemFile,
}

/// The files of the server's TLS configuration.
#[derive(Clone, Debug)]
pub struct TlsFiles {
    /// The server's certificate and key.
    pub server: IdentityFiles,
    /// The CA bundle that verifies client certificates (mTLS), in PEM. If `None`, the server
    /// does not request client certificates.
    pub client_ca: Option<PemFile>,
}

/// An error of a TLS file. It does not reveal the contents of the file.
#[derive(Debug)]
pub struct TlsFileError {
    /// The setting that names the file.
    pub setting: &'static str,
    /// The description of the error, which starts with the path of the file.
    pub message: String,
}

impl fmt::Display for TlsFileError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{} {}", self.setting, self.message)
    }
}

impl std::error::Error for TlsFileError {}

/// The server's TLS configuration, reloaded when the files change.
#[derive(Debug)]
pub struct ReloadingTls {
    files: TlsFiles,
    /// The configuration for new connections.
    current: RwLock<Arc<ServerConfig>>,
    /// The result of the last poll, valid or not.
    last_state: Mutex<FileState>,
}

#[derive(Debug, PartialEq)]
enum FileState {
    /// The digest of the files, which avoids another copy of the private key in memory.
    Digest(Vec<u8>),
    Fault(String),
}

impl ReloadingTls {
    /// Loads the files. Returns an error for the first file that is invalid.
    pub fn load(files: TlsFiles) -> Result<Self, TlsFileError> {
        let contents = PemContents::read(&files)?;
        let current = RwLock::new(Arc::new(contents.server_config(&files)?));
        let last_state = Mutex::new(FileState::Digest(contents.digest()));
        Ok(Self { files, current, last_state })
    }

    /// Performs the TLS handshake. Rejects clients that do not negotiate HTTP/2.
    pub async fn accept(
        &self,
        stream: TcpStream,
    ) -> Result<impl AsyncRead + AsyncWrite + Send + Unpin + use<>, HandshakeError> {
        let current = self.current.read().unwrap_or_else(PoisonError::into_inner).clone();
        let stream = TlsAcceptor::from(current).accept(stream).await;
        let stream = stream.map_err(|error| HandshakeError::new(failure(&error), error))?;
        // The handshake also succeeds if the client offers no ALPN protocol.
        if stream.get_ref().1.alpn_protocol() != Some(ALPN) {
            let error = io::Error::new(io::ErrorKind::InvalidData, "the client does not offer h2");
            return Err(HandshakeError::new(ConnectionFailure::Alpn, error));
        }
        Ok(stream)
    }

    /// Polls the files and reloads them, without end. Open connections are not affected.
    pub async fn watch(self: Arc<Self>) {
        loop {
            sleep(RELOAD_INTERVAL).await;
            let this = self.clone();
            // Reading from disk may block. A panic in one poll does not prevent later polls.
            let _ = spawn_blocking(move || this.reload_if_changed()).await;
        }
    }

    fn reload_if_changed(&self) {
        let read = PemContents::read(&self.files);
        let now = match &read {
            Ok(contents) => FileState::Digest(contents.digest()),
            Err(error) => FileState::Fault(error.to_string()),
        };
        let mut last_state = self.last_state.lock().unwrap_or_else(PoisonError::into_inner);
        if *last_state == now {
            return;
        }
        *last_state = now;
        match read.and_then(|contents| contents.server_config(&self.files)) {
            Ok(config) => {
                // Replacing the configuration also discards the TLS sessions that clients could
                // resume without a certificate.
                *self.current.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(config);
                tracing::info!("TLS certificate reloaded");
            }
            Err(error) => {
                tracing::warn!(%error, "failed to reload TLS certificate, using the previous one");
            }
        }
    }
}

impl TlsFiles {
    /// Returns the configuration of a client of this server. The client accepts only the
    /// certificate in these files (pinned certificate), whatever its name and issuer. If the
    /// server requests a client certificate, the client presents `client_identity`, or the
    /// server's own certificate if that is `None`.
    pub fn client_config(
        &self,
        client_identity: Option<&IdentityFiles>,
    ) -> Result<ClientConfig, TlsFileError> {
        let server = &self.server.certificate;
        let pinned = server.certificates(&server.read()?)?.swap_remove(0);
        let client_identity = client_identity.unwrap_or(&self.server);
        let client_identity = client_identity
            .certified_key(&client_identity.certificate.read()?, &client_identity.key.read()?)?;
        let provider = Arc::new(provider::default_provider());
        let verifier =
            PinnedCertVerifier { pinned, algorithms: provider.signature_verification_algorithms };
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&VERSIONS)
            .map_err(|error| server.error(&error))?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_client_cert_resolver(Arc::new(SingleCertAndKey::from(client_identity)));
        config.alpn_protocols = vec![ALPN.to_vec()];
        Ok(config)
    }
}

/// Returns why a TLS handshake failed.
fn failure(error: &io::Error) -> ConnectionFailure {
    use rustls::Error;
    match error.get_ref().and_then(|source| source.downcast_ref()) {
        None => ConnectionFailure::Disconnected,
        Some(Error::InvalidMessage(_)) => ConnectionFailure::PlaintextToTls,
        Some(Error::NoApplicationProtocol) => ConnectionFailure::Alpn,
        Some(Error::NoCertificatesPresented | Error::InvalidCertificate(_)) => {
            ConnectionFailure::ClientCertificate
        }
        // The alerts about certificates, their CA and their signature (RFC 8446, section 6).
        Some(Error::AlertReceived(alert)) if matches!(u8::from(*alert), 42..=46 | 48 | 51) => {
            ConnectionFailure::ServerCertificate
        }
        Some(_) => ConnectionFailure::Tls,
    }
}

/// Returns the configuration of a client that trusts the public CAs.
pub fn webpki_client_config() -> Result<ClientConfig, rustls::Error> {
    let ca_roots = RootCertStore { roots: webpki_roots::TLS_SERVER_ROOTS.to_vec() };
    let mut config = ClientConfig::builder_with_provider(Arc::new(provider::default_provider()))
        .with_protocol_versions(&VERSIONS)?
        .with_root_certificates(ca_roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![ALPN.to_vec()];
    Ok(config)
}

/// Returns a service that opens TLS connections to the hosts of URLs.
#[must_use]
pub fn connector(
    config: ClientConfig,
) -> impl Service<Uri, Response = TokioIo<TlsStream<TcpStream>>, Error = io::Error, Future: Send> + Send
{
    let tls = TlsConnector::from(Arc::new(config));
    tower::service_fn(move |uri| connect(uri, tls.clone()))
}

async fn connect(uri: Uri, tls: TlsConnector) -> io::Result<TokioIo<TlsStream<TcpStream>>> {
    let host = uri.host().unwrap_or_default().trim_matches(['[', ']']);
    let name = ServerName::try_from(host.to_owned()).map_err(io::Error::other)?;
    let stream = TcpStream::connect((host, uri.port_u16().unwrap_or(443))).await?;
    // Disable Nagle's algorithm: frames are small, and a frame may depend on the response to
    // the previous one.
    stream.set_nodelay(true)?;
    Ok(TokioIo::new(tls.connect(name, stream).await?))
}

/// The contents of the files.
struct PemContents {
    certificate: Vec<u8>,
    key: Vec<u8>,
    client_ca: Option<Vec<u8>>,
}

impl PemContents {
    fn read(files: &TlsFiles) -> Result<Self, TlsFileError> {
        Ok(Self {
            certificate: files.server.certificate.read()?,
            key: files.server.key.read()?,
            client_ca: files.client_ca.as_ref().map(PemFile::read).transpose()?,
        })
    }

    fn digest(&self) -> Vec<u8> {
        let mut digest = digest::Context::new(&digest::SHA256);
        for file in [&self.certificate, &self.key].into_iter().chain(&self.client_ca) {
            digest.update(&file.len().to_be_bytes());
            digest.update(file);
        }
        digest.finish().as_ref().to_vec()
    }

    fn server_config(&self, files: &TlsFiles) -> Result<ServerConfig, TlsFileError> {
        let provider = Arc::new(provider::default_provider());
        let builder = ServerConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&VERSIONS)
            .map_err(|error| files.server.certificate.error(&error))?;
        let builder = match files.client_ca.as_ref().zip(self.client_ca.as_deref()) {
            Some((file, pem)) => {
                let ca_roots = Arc::new(file.root_store(pem)?);
                let verifier =
                    WebPkiClientVerifier::builder_with_provider(ca_roots, provider).build();
                builder.with_client_cert_verifier(verifier.map_err(|error| file.error(&error))?)
            }
            None => builder.with_no_client_auth(),
        };
        let certified_key = files.server.certified_key(&self.certificate, &self.key)?;
        let mut config =
            builder.with_cert_resolver(Arc::new(SingleCertAndKey::from(certified_key)));
        config.alpn_protocols = vec![ALPN.to_vec()];
        Ok(config)
    }
}

impl IdentityFiles {
    /// Returns the certificate chain with its private key, from the contents of both files.
    fn certified_key(&self, certificate: &[u8], key: &[u8]) -> Result<CertifiedKey, TlsFileError> {
        let chain = self.certificate.certificates(certificate)?;
        // The parser's error could reveal a line of the key.
        let key = PrivateKeyDer::from_pem_slice(key)
            .map_err(|_| self.key.error(&"holds no private key in PEM that is not encrypted"))?;
        CertifiedKey::from_der(chain, key, &provider::default_provider()).map_err(|error| {
            match error {
                rustls::Error::InvalidCertificate(_) => self.certificate.error(&error),
                rustls::Error::InconsistentKeys(_) => {
                    let certificate = self.certificate.setting;
                    self.key.error(&format_args!("is not the key of the first in {certificate}"))
                }
                _ => self.key.error(&"holds no key that TLS accepts: ECDSA, or RSA of 2048 bits"),
            }
        })
    }
}

impl PemFile {
    fn read(&self) -> Result<Vec<u8>, TlsFileError> {
        fs::read(&self.path).map_err(|error| self.error(&format_args!("cannot be read: {error}")))
    }

    fn error(&self, message: &dyn fmt::Display) -> TlsFileError {
        TlsFileError {
            setting: self.setting,
            message: format!("{} {message}", display_path(&self.path)),
        }
    }

    /// Returns the certificates in `pem`, at least one.
    fn certificates(&self, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, TlsFileError> {
        let certificates = CertificateDer::pem_slice_iter(pem).collect::<Result<Vec<_>, _>>();
        match certificates {
            Ok(certificates) if !certificates.is_empty() => Ok(certificates),
            // The parser's error could reveal a line of the file, which may be a key.
            _ => Err(self.error(&"holds no certificate in PEM, or a damaged one")),
        }
    }

    fn root_store(&self, pem: &[u8]) -> Result<RootCertStore, TlsFileError> {
        let mut ca_roots = RootCertStore::empty();
        for certificate in self.certificates(pem)? {
            ca_roots.add(certificate).map_err(|error| self.error(&error))?;
        }
        Ok(ca_roots)
    }
}

/// A verifier that accepts only the pinned certificate. The handshake signature proves that
/// the server has its key.
#[derive(Debug)]
struct PinnedCertVerifier {
    pinned: CertificateDer<'static>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl ServerCertVerifier for PinnedCertVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        if *end_entity == self.pinned {
            Ok(ServerCertVerified::assertion())
        } else {
            Err(CertificateError::ApplicationVerificationFailure.into())
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, signature, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, signature, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}
