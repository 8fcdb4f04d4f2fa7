//! Certificates for one test, and TLS clients that trust them.

use std::{
    fs, io,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
};

use crate::support::app::adjusted;
use fast_zero::Config;
use hyper_util::rt::TokioIo;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use tempfile::TempDir;
use tokio::net::TcpStream;
use tokio_rustls::{
    TlsConnector,
    client::TlsStream,
    rustls::{
        ClientConfig, RootCertStore, SupportedProtocolVersion,
        crypto::aws_lc_rs::default_provider,
        pki_types::{PrivateKeyDer, ServerName, pem::PemObject},
        version::TLS13,
    },
};
use tonic::transport::{Channel, Endpoint};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

/// A certificate authority.
pub struct CertificateAuthority(CertifiedIssuer<'static, KeyPair>);

/// A certificate and its key, in PEM.
pub struct PemIdentity {
    pub certificate: String,
    pub key: String,
}

impl CertificateAuthority {
    pub fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().expect("a key");
        Self(CertifiedIssuer::self_signed(params, key).expect("an authority"))
    }

    /// Returns the certificate of the authority.
    pub fn pem(&self) -> String {
        self.0.pem()
    }

    /// Issues a certificate for this machine, for servers and clients.
    pub fn issue(&self) -> PemIdentity {
        let names = ["localhost", "127.0.0.1"].map(str::to_owned);
        let params = CertificateParams::new(names).expect("valid names");
        let key = KeyPair::generate().expect("a key");
        let certificate = params.signed_by(&key, &self.0).expect("a certificate");
        PemIdentity { certificate: certificate.pem(), key: key.serialize_pem() }
    }

    /// Returns a client that trusts this authority.
    pub fn client(&self) -> TlsClient<'_> {
        TlsClient { authority: self, version: &TLS13, alpn: &["h2"], identity: None }
    }
}

/// A directory with the files `cert.pem`, `key.pem` and `ca.pem`, laid out as Kubernetes
/// mounts a secret: `cert.pem` links to `..data/cert.pem`, and `..data` to a directory.
pub struct TlsSecret {
    dir: TempDir,
    has_ca: bool,
}

impl TlsSecret {
    pub fn new(identity: &PemIdentity, client_ca: Option<&CertificateAuthority>) -> Self {
        let secret =
            Self { dir: TempDir::new().expect("a directory"), has_ca: client_ca.is_some() };
        secret.replace(identity, client_ca);
        for name in ["cert.pem", "key.pem", "ca.pem"] {
            let link = secret.dir.path().join(name);
            std::os::unix::fs::symlink(Path::new("..data").join(name), link).expect("a link");
        }
        secret
    }

    /// Replaces all files atomically.
    pub fn replace(&self, identity: &PemIdentity, client_ca: Option<&CertificateAuthority>) {
        let data =
            tempfile::Builder::new().tempdir_in(self.dir.path()).expect("a directory").keep();
        fs::write(data.join("cert.pem"), &identity.certificate).expect("written");
        fs::write(data.join("key.pem"), &identity.key).expect("written");
        if let Some(authority) = client_ca {
            fs::write(data.join("ca.pem"), authority.pem()).expect("written");
        }
        let link = self.dir.path().join("..data_tmp");
        std::os::unix::fs::symlink(&data, &link).expect("a link");
        fs::rename(link, self.dir.path().join("..data")).expect("swapped");
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Returns the settings with these files.
    pub fn config(&self, config: Config) -> Config {
        adjusted(config, |config| {
            config.tls.tls_cert_file = Some(self.path("cert.pem"));
            config.tls.tls_key_file = Some(self.path("key.pem"));
            config.tls.tls_client_ca_file = self.has_ca.then(|| self.path("ca.pem"));
        })
    }

    /// Returns the environment variables for these files.
    pub fn env_vars(&self) -> Vec<(&'static str, String)> {
        let path = |name| self.path(name).to_str().expect("a UTF-8 path").to_owned();
        let mut vars = vec![("TLS_CERT_FILE", path("cert.pem")), ("TLS_KEY_FILE", path("key.pem"))];
        if self.has_ca {
            vars.push(("TLS_CLIENT_CA_FILE", path("ca.pem")));
        }
        vars
    }
}

/// A TLS client.
#[derive(Clone, Copy)]
pub struct TlsClient<'a> {
    pub authority: &'a CertificateAuthority,
    pub version: &'static SupportedProtocolVersion,
    pub alpn: &'a [&'a str],
    /// The client certificate, if any.
    pub identity: Option<&'a PemIdentity>,
}

impl TlsClient<'_> {
    fn connector(&self) -> TlsConnector {
        let mut roots = RootCertStore::empty();
        roots.add(self.authority.0.der().clone()).expect("a valid certificate");
        let builder = ClientConfig::builder_with_provider(Arc::new(default_provider()))
            .with_protocol_versions(&[self.version])
            .expect("a known version")
            .with_root_certificates(roots);
        let mut config = match self.identity {
            None => builder.with_no_client_auth(),
            Some(identity) => {
                let chain = PemObject::pem_slice_iter(identity.certificate.as_bytes());
                let chain = chain.collect::<Result<_, _>>().expect("certificates");
                let key = PrivateKeyDer::from_pem_slice(identity.key.as_bytes()).expect("a key");
                builder.with_client_auth_cert(chain, key).expect("a matching key")
            }
        };
        config.alpn_protocols = self.alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
        TlsConnector::from(Arc::new(config))
    }

    /// Completes a TLS handshake.
    pub async fn handshake(&self, address: SocketAddr) -> io::Result<TlsStream<TcpStream>> {
        tls_handshake(self.connector(), address).await
    }

    /// Connects a channel.
    pub async fn connect(&self, address: SocketAddr) -> Result<Channel, tonic::transport::Error> {
        let connector = self.connector();
        let endpoint = Endpoint::from_shared(format!("https://{address}")).expect("an address");
        let connect = tower::service_fn(move |_| {
            let stream = tls_handshake(connector.clone(), address);
            async { stream.await.map(TokioIo::new) }
        });
        endpoint.connect_with_connector(connect).await
    }

    /// Returns `true` if a call succeeds. A server may reject a client certificate after the
    /// handshake.
    pub async fn can_call(&self, address: SocketAddr) -> bool {
        let Ok(channel) = self.connect(address).await else {
            return false;
        };
        HealthClient::new(channel).check(HealthCheckRequest::default()).await.is_ok()
    }
}

async fn tls_handshake(
    connector: TlsConnector,
    address: SocketAddr,
) -> io::Result<TlsStream<TcpStream>> {
    let stream = TcpStream::connect(address).await?;
    // As tonic does for its own connections. Otherwise the kernel delays some calls by 40 ms.
    stream.set_nodelay(true)?;
    connector.connect(ServerName::IpAddress(address.ip().into()), stream).await
}
