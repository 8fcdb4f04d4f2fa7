//! TLS: what the server shows and asks for, and how that changes while it runs.
//!
//! The files are looked at again and again. Their contents are compared and not their
//! times: a secret of Kubernetes is a symlink that is swapped, and other tools keep times
//! as they were. What cannot be used changes nothing but the log.

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

/// What is spoken over TLS: HTTP/2 (RFC 9113, section 3.2) and nothing else.
const ALPN: &[u8] = b"h2";

/// Nothing older: RFC 8996.
const VERSIONS: [&SupportedProtocolVersion; 2] = [&TLS13, &TLS12];

/// How often the files are looked at. Shorter than two health checks are apart, which are
/// strict about the certificate: at most one of them sees a new file with an old server.
const RELOAD_INTERVAL: Duration = Duration::from_secs(2);

/// A file, and the setting that says which.
#[derive(Clone, Debug)]
pub struct PemFile {
    /// The variable or the flag.
    pub setting: &'static str,
    /// Where it is.
    pub path: PathBuf,
}

/// A certificate and its key.
#[derive(Clone, Debug)]
pub struct IdentityFiles {
    /// The certificate, and those between it and the authority, in PEM.
    pub certificate: PemFile,
    /// Its private key, in PEM, not encrypted.
    pub key: PemFile,
}

/// What TLS is made of.
#[derive(Clone, Debug)]
pub struct TlsFiles {
    /// What the server shows.
    pub server: IdentityFiles,
    /// Who vouches for clients, in PEM; without it, they show no certificate.
    pub client_ca: Option<PemFile>,
}

/// A file that cannot be used. It shows nothing of what the file holds.
#[derive(Debug)]
pub struct TlsFileError {
    /// The setting that says which file.
    pub setting: &'static str,
    /// What is wrong, beginning with the file's path.
    pub message: String,
}

impl fmt::Display for TlsFileError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{} {}", self.setting, self.message)
    }
}

impl std::error::Error for TlsFileError {}

/// The server's side of TLS.
#[derive(Debug)]
pub struct ReloadingTls {
    files: TlsFiles,
    /// In force for new connections.
    current: RwLock<Arc<ServerConfig>>,
    /// What the last reload_if_changed at the files found, for better or worse.
    last_state: Mutex<FileState>,
}

#[derive(Debug, PartialEq)]
enum FileState {
    /// A digest of the files: a copy of the key would be one more.
    Digest(Vec<u8>),
    Fault(String),
}

impl ReloadingTls {
    /// Reads the files, and tells what is wrong with them.
    pub fn load(files: TlsFiles) -> Result<Self, TlsFileError> {
        let contents = PemContents::read(&files)?;
        let current = RwLock::new(Arc::new(contents.server_config(&files)?));
        let last_state = Mutex::new(FileState::Digest(contents.digest()));
        Ok(Self { files, current, last_state })
    }

    /// Shakes hands, and refuses who does not ask for HTTP/2.
    pub async fn accept(
        &self,
        stream: TcpStream,
    ) -> io::Result<impl AsyncRead + AsyncWrite + Send + Unpin + use<>> {
        let current = self.current.read().unwrap_or_else(PoisonError::into_inner).clone();
        let stream = TlsAcceptor::from(current).accept(stream).await?;
        // Without any wish the handshake succeeds.
        if stream.get_ref().1.alpn_protocol() != Some(ALPN) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the client asks for no h2"));
        }
        Ok(stream)
    }

    /// Follows the files, for ever. Connections that are open stay as they are.
    pub async fn watch(self: Arc<Self>) {
        loop {
            sleep(RELOAD_INTERVAL).await;
            let this = self.clone();
            // A disk may take its time. A panic here would not be the last reload_if_changed.
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
                // With it go the sessions that could be resumed without a certificate.
                *self.current.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(config);
                tracing::info!("the files of TLS have changed: new connections get the new ones");
            }
            Err(error) => tracing::warn!(
                cause = %error,
                "the files of TLS have changed and cannot be used: those before stay in force"
            ),
        }
    }
}

impl TlsFiles {
    /// The side of a client that asks the very server which shows the certificate in these
    /// files: no other one is taken, whatever the name and whoever signed it. A server that
    /// asks for a certificate is shown `client_identity`, or that of these files.
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

/// The side of a client of servers that a public authority vouches for.
pub fn webpki_client_config() -> Result<ClientConfig, rustls::Error> {
    let authorities = RootCertStore { roots: webpki_roots::TLS_SERVER_ROOTS.to_vec() };
    let mut config = ClientConfig::builder_with_provider(Arc::new(provider::default_provider()))
        .with_protocol_versions(&VERSIONS)?
        .with_root_certificates(authorities)
        .with_no_client_auth();
    config.alpn_protocols = vec![ALPN.to_vec()];
    Ok(config)
}

/// Opens connections with TLS to where URLs lead.
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
    // The frames of a call are small, and each waits for the answer to the one before.
    stream.set_nodelay(true)?;
    Ok(TokioIo::new(tls.connect(name, stream).await?))
}

/// What the files hold.
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
                let authorities = Arc::new(file.root_store(pem)?);
                let verifier =
                    WebPkiClientVerifier::builder_with_provider(authorities, provider).build();
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
    /// What is proved with the two, of which this is what they hold.
    fn certified_key(&self, certificate: &[u8], key: &[u8]) -> Result<CertifiedKey, TlsFileError> {
        let chain = self.certificate.certificates(certificate)?;
        // The reader's error could show a line of the key.
        let key = PrivateKeyDer::from_pem_slice(key)
            .map_err(|_| self.key.error(&"holds no private key in PEM that is not encrypted"))?;
        CertifiedKey::from_der(chain, key, &provider::default_provider()).map_err(|error| {
            match error {
                rustls::Error::InvalidCertificate(_) => self.certificate.error(&error),
                rustls::Error::InconsistentKeys(_) => {
                    let certificate = self.certificate.setting;
                    self.key.error(&format_args!("is not the key of the one in {certificate}"))
                }
                _ => self.key.error(&"holds a private key of a kind that TLS does not know"),
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
            message: format!("{} {message}", self.path.display()),
        }
    }

    /// At least one.
    fn certificates(&self, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, TlsFileError> {
        let certificates = CertificateDer::pem_slice_iter(pem).collect::<Result<Vec<_>, _>>();
        match certificates {
            Ok(certificates) if !certificates.is_empty() => Ok(certificates),
            // The reader's error could show a line of what may be a key.
            _ => Err(self.error(&"holds no certificate in PEM, or a damaged one")),
        }
    }

    fn root_store(&self, pem: &[u8]) -> Result<RootCertStore, TlsFileError> {
        let mut authorities = RootCertStore::empty();
        for certificate in self.certificates(pem)? {
            authorities.add(certificate).map_err(|error| self.error(&error))?;
        }
        Ok(authorities)
    }
}

/// Takes one certificate, from whoever proves to have its key.
#[derive(Debug)]
struct PinnedCertVerifier {
    pinned: CertificateDer<'static>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl ServerCertVerifier for PinnedCertVerifier {
    fn verify_server_cert(
        &self,
        shown: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        if *shown == self.pinned {
            Ok(ServerCertVerified::assertion())
        } else {
            Err(CertificateError::ApplicationVerificationFailure.into())
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        shown: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, shown, signature, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        shown: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, shown, signature, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}
