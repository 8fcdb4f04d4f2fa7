//! TLS: accepted clients, server certificates, and reloads.

use std::{fs, net::SocketAddr, path::Path};

use tokio::{io::AsyncReadExt, net::TcpStream, process::Command};
use tokio_rustls::{
    client::TlsStream,
    rustls::{
        ProtocolVersion,
        version::{TLS12, TLS13},
    },
};
use tonic::transport::Channel;
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

use crate::support::{
    App, Client,
    app::{config, config_with, connect, unique_name},
    certificates::{CertificateAuthority, PemIdentity, TlsClient, TlsSecret},
    http2::{PREFACE, connect_raw, read_until_closed},
    postgres::TestDatabase,
    process::Binary,
    readme::{TLS, commands, has_grpcurl},
    wait::{wait_until, with_timeout},
};

const CONFIG: Option<i32> = Some(78);

/// Starts a server with a certificate of this authority. Returns it with its files.
async fn start(
    authority: &CertificateAuthority,
    client_ca: Option<&CertificateAuthority>,
) -> (App, TlsSecret) {
    let secret = TlsSecret::new(&authority.issue(), client_ca);
    (App::start_with(secret.config(config())).await, secret)
}

/// Reads until the server closes the TLS connection, with or without an alert. Returns the bytes.
async fn read_tls_until_closed(event: &str, stream: &mut TlsStream<TcpStream>) -> Vec<u8> {
    let mut received = Vec::new();
    let _ = with_timeout(event, stream.read_to_end(&mut received)).await;
    received
}

#[tokio::test]
async fn calls_are_made_over_tls_1_3_and_1_2() {
    let authority = CertificateAuthority::new();
    let (app, _secret) = start(&authority, None).await;
    for (version, expected) in
        [(&TLS13, ProtocolVersion::TLSv1_3), (&TLS12, ProtocolVersion::TLSv1_2)]
    {
        let caller = TlsClient { version, ..authority.client() };
        let stream = caller.handshake(app.address).await.expect("a handshake");
        assert_eq!(stream.get_ref().1.protocol_version(), Some(expected));
        assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
        let channel = caller.connect(app.address).await.expect("connected");
        let ana = Client::new(channel).signed_up(&unique_name("ana")).await;
        ana.create_todo("over TLS").await;
    }
}

#[tokio::test]
async fn plaintext_connections_are_closed() {
    let authority = CertificateAuthority::new();
    let (app, _secret) = start(&authority, None).await;
    for received in [PREFACE, b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"] {
        let response = read_until_closed(&mut connect_raw(app.address, received).await).await;
        // No bytes, or a TLS alert.
        assert!(response.first().is_none_or(|kind| *kind == 0x15), "{response:?}");
    }
    assert!(authority.client().can_call(app.address).await);
}

#[tokio::test]
async fn a_client_without_alpn_h2_is_refused() {
    let authority = CertificateAuthority::new();
    let (app, _secret) = start(&authority, None).await;
    let other = TlsClient { alpn: &["http/1.1"], ..authority.client() };
    let rejected = other.handshake(app.address).await.expect_err("no common protocol");
    assert!(rejected.to_string().contains("NoApplicationProtocol"), "{rejected}");
    let both = TlsClient { alpn: &["http/1.1", "h2"], ..authority.client() };
    assert!(both.can_call(app.address).await);

    let none = TlsClient { alpn: &[], ..authority.client() };
    let mut stream = none.handshake(app.address).await.expect("a handshake");
    assert_eq!(read_tls_until_closed("the end without ALPN", &mut stream).await, b"");
    assert!(!none.can_call(app.address).await);
}

#[tokio::test]
async fn an_incomplete_handshake_times_out() {
    let authority = CertificateAuthority::new();
    let (app, _secret) = start(&authority, None).await;
    let receive = async |received: &[u8]| {
        read_until_closed(&mut connect_raw(app.address, received).await).await
    };
    let silent = async {
        let mut stream = authority.client().handshake(app.address).await.expect("a handshake");
        read_tls_until_closed("the end after the handshake", &mut stream).await
    };
    // No bytes, a part of a ClientHello, and a handshake without a preface.
    let received = tokio::join!(receive(b""), receive(b"\x16\x03\x01\x02\x00\x01"), silent);
    assert_eq!(received, (vec![], vec![], vec![]));
}

#[tokio::test]
async fn with_a_client_ca_only_clients_with_its_certificates_are_served() {
    let (authority, of_clients) = (CertificateAuthority::new(), CertificateAuthority::new());
    let (app, _secret) = start(&authority, Some(&of_clients)).await;
    let (known, foreign) = (of_clients.issue(), CertificateAuthority::new().issue());
    for version in [&TLS13, &TLS12] {
        let caller = TlsClient { version, ..authority.client() };
        assert!(!caller.can_call(app.address).await, "no certificate");
        let caller = |own| TlsClient { identity: Some(own), ..caller };
        assert!(!caller(&foreign).can_call(app.address).await, "of another authority");
        assert!(caller(&known).can_call(app.address).await);
    }
}

async fn is_alive(channel: &Channel) -> bool {
    let request = HealthCheckRequest::default();
    HealthClient::new(channel.clone()).check(request).await.is_ok()
}

#[tokio::test]
async fn new_connections_use_reloaded_files_and_invalid_files_are_ignored() {
    let (before, after) = (CertificateAuthority::new(), CertificateAuthority::new());
    let secret = TlsSecret::new(&before.issue(), None);
    let database = TestDatabase::create().await;
    let server = server_with(&secret, &database).start();
    let address: SocketAddr = server.address().await.parse().expect("an address");
    let open = before.client().connect(address).await.expect("connected");
    assert!(is_alive(&open).await);

    let unmatched = PemIdentity { key: after.issue().key, ..before.issue() };
    secret.replace(&unmatched, None);
    let warning = server.wait_for_line("failed to reload TLS certificate").await;
    assert!(warning.contains("WARN") && warning.contains("TLS_KEY_FILE"), "{warning}");
    assert!(before.client().can_call(address).await, "the previous certificate stays");

    secret.replace(&after.issue(), None);
    wait_until("the new certificate", async || after.client().can_call(address).await).await;
    assert!(!before.client().can_call(address).await);
    // The client of this connection does not trust the new certificate, so it cannot have
    // reconnected.
    assert!(is_alive(&open).await);
    assert!(!server.output().contains("PRIVATE"), "{}", server.output());
}

#[tokio::test]
async fn a_new_client_ca_replaces_the_previous_one() {
    let (authority, first, second) =
        (CertificateAuthority::new(), CertificateAuthority::new(), CertificateAuthority::new());
    let (app, secret) = start(&authority, Some(&first)).await;
    let (old, new) = (first.issue(), second.issue());
    let caller = |own| TlsClient { identity: Some(own), ..authority.client() };
    assert!(caller(&old).can_call(app.address).await);
    secret.replace(&authority.issue(), Some(&second));
    wait_until("the new CA", async || caller(&new).can_call(app.address).await).await;
    assert!(!caller(&old).can_call(app.address).await);
}

fn server_with(secret: &TlsSecret, database: &TestDatabase) -> Binary {
    with(Binary::server(&database.url()), secret)
}

fn with(run: Binary, secret: &TlsSecret) -> Binary {
    secret.env_vars().into_iter().fold(run, |run, (name, path)| run.env(name, &path))
}

/// Returns the exit code of `healthcheck`.
async fn health(address: &str, arguments: &[&str], secret: Option<&TlsSecret>) -> Option<i32> {
    let run = Binary::new(&[&["healthcheck", "--addr", address], arguments].concat());
    let run = if let Some(secret) = secret { with(run, secret) } else { run };
    let (code, _) = run.output().await;
    code
}

#[tokio::test]
async fn the_healthcheck_accepts_only_the_certificate_of_its_settings() {
    let authority = CertificateAuthority::new();
    let (app, secret) = start(&authority, None).await;
    let address = app.address.to_string();
    assert_eq!(health(&address, &[], Some(&secret)).await, Some(0));
    assert_eq!(health(&address, &["--service", "no.such"], Some(&secret)).await, Some(3));
    let by_name = address.replace("127.0.0.1", "localhost");
    assert_eq!(health(&by_name, &[], Some(&secret)).await, Some(0));
    // Another certificate of the same authority.
    let other = TlsSecret::new(&authority.issue(), None);
    assert_eq!(health(&address, &[], Some(&other)).await, Some(2));
    assert_eq!(health(&address, &[], None).await, Some(3), "in the clear");
    let plain = App::start().await.address.to_string();
    assert_eq!(health(&plain, &[], Some(&secret)).await, Some(2), "TLS where there is none");
}

#[tokio::test]
async fn the_healthcheck_presents_the_servers_certificate_or_its_own() {
    let (authority, of_clients) = (CertificateAuthority::new(), CertificateAuthority::new());
    let (app, secret) = start(&authority, Some(&authority)).await;
    assert_eq!(health(&app.address.to_string(), &[], Some(&secret)).await, Some(0));

    let (app, secret) = start(&authority, Some(&of_clients)).await;
    let address = app.address.to_string();
    assert_eq!(health(&address, &[], Some(&secret)).await, Some(3), "of no client");
    let own = TlsSecret::new(&of_clients.issue(), None);
    let (cert, key) = (own.path("cert.pem"), own.path("key.pem"));
    let path = |path: &Path| path.to_str().expect("a plain name").to_owned();
    let (cert, key) = (path(&cert), path(&key));
    let arguments = ["--cert", &cert, "--key", &key];
    assert_eq!(health(&address, &arguments, Some(&secret)).await, Some(0));
    assert_eq!(health(&address, &arguments, None).await, CONFIG, "without TLS_CERT_FILE");
    assert_eq!(health(&address, &arguments[..2], Some(&secret)).await, Some(64));
}

#[tokio::test]
async fn unusable_files_are_named_before_startup() {
    let (one, other) = (CertificateAuthority::new().issue(), CertificateAuthority::new().issue());
    let cut = one.key[..one.key.len() / 2].to_owned();
    for (variables, expected) in [
        (&["TLS_CERT_FILE=cert"][..], "TLS_KEY_FILE must be set if TLS_CERT_FILE is set"),
        (&["TLS_KEY_FILE=key"], "TLS_CERT_FILE must be set if TLS_KEY_FILE is set"),
        (&["TLS_CLIENT_CA_FILE=cert"], "TLS_CERT_FILE must be set if TLS_CLIENT_CA_FILE is set"),
        (&["TLS_CERT_FILE=none", "TLS_KEY_FILE=key"], "TLS_CERT_FILE none cannot be read"),
        (&["TLS_CERT_FILE=cert", "TLS_KEY_FILE=none"], "TLS_KEY_FILE none cannot be read"),
        (&["TLS_CERT_FILE=key", "TLS_KEY_FILE=key"], "TLS_CERT_FILE key holds no certificate"),
        (&["TLS_CERT_FILE=junk", "TLS_KEY_FILE=key"], "TLS_CERT_FILE junk "),
        (&["TLS_CERT_FILE=cert", "TLS_KEY_FILE=cert"], "TLS_KEY_FILE cert holds no private key"),
        (&["TLS_CERT_FILE=cert", "TLS_KEY_FILE=cut"], "TLS_KEY_FILE cut holds no private key"),
        (
            &["TLS_CERT_FILE=cert", "TLS_KEY_FILE=other"],
            "TLS_KEY_FILE other is not the key of the first in",
        ),
        (
            &["TLS_CERT_FILE=cert", "TLS_KEY_FILE=key", "TLS_CLIENT_CA_FILE=key"],
            "TLS_CLIENT_CA_FILE key holds no certificate",
        ),
    ] {
        // No database exists, so any other order of checks would report the database.
        let mut run = Binary::server("postgres://localhost:1/db")
            .file("cert", &one.certificate)
            .file("key", &one.key)
            .file("other", &other.key)
            .file("cut", &cut)
            .file("junk", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n");
        for (name, file) in variables.iter().filter_map(|variable| variable.split_once('=')) {
            run = run.env(name, file);
        }
        let (code, output) = run.output().await;
        assert_eq!(code, CONFIG, "{variables:?}: {output}");
        assert!(output.contains(expected), "{variables:?}: {output}");
        let secret = one.key.lines().nth(1).expect("a key of several lines");
        assert!(!output.contains(&secret[..8]), "{output}");
    }
}

#[tokio::test]
async fn empty_variables_mean_no_tls() {
    let empty = Some("".into());
    let config = config_with(|config| {
        config.tls.tls_cert_file = empty.clone();
        config.tls.tls_key_file = empty;
    });
    let app = App::start_with(config).await;
    assert!(is_alive(&connect(app.address).await).await);
}

#[tokio::test]
async fn the_documented_certificate_works() {
    let has_openssl = Command::new("openssl").arg("version").output().await.is_ok();
    if !has_openssl || !has_grpcurl().await {
        return;
    }
    let commands = commands(TLS, "Certificates");
    let of = |program: &str| -> String {
        let (_, rest) = commands.split_once(program).expect("an existing entry");
        let ends =
            rest.match_indices('\n').map(|(at, _)| at).find(|at| !rest[..*at].ends_with('\\'));
        format!("{program}{}", &rest[..ends.unwrap_or(rest.len())])
    };
    let dir = tempfile::tempdir().expect("a directory");
    let shell = async |command: String| {
        let shell = Command::new("bash").args(["-euc", &command]).current_dir(&dir).output();
        let shell = shell.await.expect("an installed bash");
        let output = String::from_utf8_lossy(&[shell.stdout, shell.stderr].concat()).into_owned();
        assert!(shell.status.success(), "{command}: {output}");
        output
    };
    shell(of("openssl req")).await;
    let read = |name| fs::read_to_string(dir.path().join(name)).expect("a created file");
    let pair = PemIdentity { certificate: read("cert.pem"), key: read("key.pem") };
    let secret = TlsSecret::new(&pair, None);
    let app = App::start_with(secret.config(config())).await;
    let call = of("grpcurl").replace(":50051", &format!(":{}", app.address.port()));
    let response = shell(call).await;
    assert!(response.contains("SERVING"), "{response}");
    assert_eq!(health(&app.address.to_string(), &[], Some(&secret)).await, Some(0));
}
