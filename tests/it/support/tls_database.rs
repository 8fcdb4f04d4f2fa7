//! A database server whose certificate has X.509 version 1, up to the TLS handshake.

use std::{io, net::SocketAddr, sync::Arc};

use rcgen::KeyPair;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        ServerConfig,
        crypto::aws_lc_rs::{default_provider, sign::any_ecdsa_type},
        pki_types::PrivateKeyDer,
        server::{ClientHello, ResolvesServerCert},
        sign::CertifiedKey,
    },
};
use tokio_util::task::AbortOnDropHandle;

/// The version of a certificate, DER-encoded: `[0] EXPLICIT INTEGER` (RFC 5280, section 4.1).
const VERSION_3: &[u8] = &[0xa0, 3, 2, 1, 2];
const VERSION_1: &[u8] = &[0xa0, 3, 2, 1, 0];

/// The length of an `SSLRequest` (PostgreSQL's manual, message formats).
const SSL_REQUEST_LEN: usize = 8;

/// A server, until it is dropped.
pub struct TlsDatabase {
    pub address: SocketAddr,
    _task: AbortOnDropHandle<()>,
}

#[derive(Debug)]
struct Version1(Arc<CertifiedKey>);

impl ResolvesServerCert for Version1 {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.0.clone())
    }
}

impl TlsDatabase {
    pub async fn with_version_1_certificate() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("a bound port");
        let config = ServerConfig::builder_with_provider(Arc::new(default_provider()))
            .with_safe_default_protocol_versions()
            .expect("supported versions")
            .with_no_client_auth()
            .with_cert_resolver(Arc::new(Version1(Arc::new(version_1_certificate()))));
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let task = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                tokio::spawn(accept(client, acceptor.clone()));
            }
        });
        Self { address, _task: AbortOnDropHandle::new(task) }
    }
}

async fn accept(mut client: TcpStream, acceptor: TlsAcceptor) -> io::Result<()> {
    client.read_exact(&mut [0; SSL_REQUEST_LEN]).await?;
    client.write_all(b"S").await?;
    acceptor.accept(client).await?;
    Ok(())
}

/// Changes the version of a self-signed certificate. Its signature is then invalid, but without
/// verification, no client reads it.
fn version_1_certificate() -> CertifiedKey {
    let names = vec!["localhost".to_owned()];
    let key = KeyPair::generate().expect("a key");
    let params = rcgen::CertificateParams::new(names).expect("valid names");
    let certificate = params.self_signed(&key).expect("a certificate");
    let mut der = certificate.der().to_vec();
    let version = der.windows(VERSION_3.len()).position(|bytes| bytes == VERSION_3);
    let version = version.expect("a version");
    der[version..version + VERSION_1.len()].copy_from_slice(VERSION_1);
    let key = PrivateKeyDer::try_from(key.serialize_der()).expect("a key");
    CertifiedKey::new(vec![der.into()], any_ecdsa_type(&key).expect("an ECDSA key"))
}
