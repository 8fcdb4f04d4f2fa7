//! Certificates made for one test, and callers that trust them.

use std::{
    fs, io,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
};

use fast_zero::config::Config;
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

/// Who vouches for certificates.
pub struct Authority(CertifiedIssuer<'static, KeyPair>);

/// A certificate and its key, in PEM.
pub struct Pair {
    pub certificate: String,
    pub key: String,
}

impl Authority {
    pub fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().expect("a key");
        Self(CertifiedIssuer::self_signed(params, key).expect("an authority"))
    }

    /// Its own certificate.
    pub fn pem(&self) -> String {
        self.0.pem()
    }

    /// A certificate for this machine, good for servers and clients.
    pub fn pair(&self) -> Pair {
        let names = ["localhost", "127.0.0.1"].map(str::to_owned);
        let params = CertificateParams::new(names).expect("good names");
        let key = KeyPair::generate().expect("a key");
        let certificate = params.signed_by(&key, &self.0).expect("a certificate");
        Pair { certificate: certificate.pem(), key: key.serialize_pem() }
    }

    /// A caller that trusts what this one has signed.
    pub fn caller(&self) -> Caller<'_> {
        Caller { trusted: self, version: &TLS13, alpn: &["h2"], own: None }
    }
}

/// A folder with the files of TLS, `cert.pem`, `key.pem` and `ca.pem`, made as Kubernetes
/// makes a secret's: `cert.pem` leads to `..data/cert.pem`, and `..data` to a folder.
pub struct Secret {
    folder: TempDir,
    has_ca: bool,
}

impl Secret {
    pub fn new(pair: &Pair, client_ca: Option<&Authority>) -> Self {
        let secret =
            Self { folder: TempDir::new().expect("a folder"), has_ca: client_ca.is_some() };
        secret.replace(pair, client_ca);
        for name in ["cert.pem", "key.pem", "ca.pem"] {
            let link = secret.folder.path().join(name);
            std::os::unix::fs::symlink(Path::new("..data").join(name), link).expect("a link");
        }
        secret
    }

    /// Replaces all files at once.
    pub fn replace(&self, pair: &Pair, client_ca: Option<&Authority>) {
        let data =
            tempfile::Builder::new().tempdir_in(self.folder.path()).expect("a folder").keep();
        fs::write(data.join("cert.pem"), &pair.certificate).expect("written");
        fs::write(data.join("key.pem"), &pair.key).expect("written");
        if let Some(authority) = client_ca {
            fs::write(data.join("ca.pem"), authority.pem()).expect("written");
        }
        let link = self.folder.path().join("..data_tmp");
        std::os::unix::fs::symlink(&data, &link).expect("a link");
        fs::rename(link, self.folder.path().join("..data")).expect("swapped");
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The settings with these files.
    pub fn config(&self, config: Config) -> Config {
        Config {
            tls_cert_file: Some(self.path("cert.pem")),
            tls_key_file: Some(self.path("key.pem")),
            tls_client_ca_file: self.has_ca.then(|| self.path("ca.pem")),
            ..config
        }
    }

    /// The variables of these files.
    pub fn variables(&self) -> Vec<(&'static str, String)> {
        let path = |name| self.path(name).to_str().expect("a plain name").to_owned();
        let mut variables =
            vec![("TLS_CERT_FILE", path("cert.pem")), ("TLS_KEY_FILE", path("key.pem"))];
        if self.has_ca {
            variables.push(("TLS_CLIENT_CA_FILE", path("ca.pem")));
        }
        variables
    }
}

/// Somebody who speaks TLS.
#[derive(Clone, Copy)]
pub struct Caller<'a> {
    pub trusted: &'a Authority,
    pub version: &'static SupportedProtocolVersion,
    pub alpn: &'a [&'a str],
    /// The certificate to show.
    pub own: Option<&'a Pair>,
}

impl Caller<'_> {
    fn connector(&self) -> TlsConnector {
        let mut roots = RootCertStore::empty();
        roots.add(self.trusted.0.der().clone()).expect("a good authority");
        let builder = ClientConfig::builder_with_provider(Arc::new(default_provider()))
            .with_protocol_versions(&[self.version])
            .expect("a known version")
            .with_root_certificates(roots);
        let mut config = match self.own {
            None => builder.with_no_client_auth(),
            Some(own) => {
                let chain = PemObject::pem_slice_iter(own.certificate.as_bytes());
                let chain = chain.collect::<Result<_, _>>().expect("certificates");
                let key = PrivateKeyDer::from_pem_slice(own.key.as_bytes()).expect("a key");
                builder.with_client_auth_cert(chain, key).expect("a pair")
            }
        };
        config.alpn_protocols = self.alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
        TlsConnector::from(Arc::new(config))
    }

    /// Shakes hands.
    pub async fn handshake(&self, address: SocketAddr) -> io::Result<TlsStream<TcpStream>> {
        shake_hands(self.connector(), address).await
    }

    /// A channel to a server.
    pub async fn connect(&self, address: SocketAddr) -> Result<Channel, tonic::transport::Error> {
        let connector = self.connector();
        let endpoint = Endpoint::from_shared(format!("https://{address}")).expect("an address");
        let connect = tower::service_fn(move |_| {
            let stream = shake_hands(connector.clone(), address);
            async { stream.await.map(TokioIo::new) }
        });
        endpoint.connect_with_connector(connect).await
    }

    /// Whether a server answers a call. One may refuse a certificate after the handshake.
    pub async fn is_served(&self, address: SocketAddr) -> bool {
        let Ok(channel) = self.connect(address).await else {
            return false;
        };
        HealthClient::new(channel).check(HealthCheckRequest::default()).await.is_ok()
    }
}

async fn shake_hands(
    connector: TlsConnector,
    address: SocketAddr,
) -> io::Result<TlsStream<TcpStream>> {
    let stream = TcpStream::connect(address).await?;
    // As tonic's own connections do: otherwise some calls wait 40 ms to be sent.
    stream.set_nodelay(true)?;
    connector.connect(ServerName::IpAddress(address.ip().into()), stream).await
}
