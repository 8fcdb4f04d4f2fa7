//! Connections that fail before their first call: the metric and the log.

use fast_zero::Config;
use tokio::net::TcpStream;

use crate::support::{
    App,
    app::adjusted,
    certificates::{CertificateAuthority, TlsClient, TlsSecret},
    http2::{PREFACE, connect_raw, read_until_closed},
    metrics::config_with_metrics,
    postgres::TestDatabase,
    process::Binary,
    wait::wait_until,
};

const HTTP1: &[u8] = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n";
/// The start of a ClientHello, as long as the preface of HTTP/2.
const CLIENT_HELLO: &[u8] = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03.............";

/// Waits until the server has counted one failure with this reason.
async fn wait_until_counted(app: &App, reason: &str) {
    let series = format!("fastzero_connection_failures_total{{reason=\"{reason}\"}}");
    wait_until(&series, async || app.scrape().await.get(&series) == Some(1.0)).await;
}

#[tokio::test]
async fn clients_without_http2_are_counted_by_reason() {
    let app = App::start_with(config_with_metrics()).await;
    for (sent, reason) in [(HTTP1, "not_http2"), (CLIENT_HELLO, "tls_to_plaintext")] {
        read_until_closed(&mut connect_raw(app.address, sent).await).await;
        wait_until_counted(&app, reason).await;
    }
    drop(TcpStream::connect(app.address).await.expect("connected"));
    wait_until_counted(&app, "disconnected").await;
    read_until_closed(&mut connect_raw(app.address, &PREFACE[..10]).await).await;
    wait_until_counted(&app, "timeout").await;
}

#[tokio::test]
async fn refused_connections_are_counted_by_reason() {
    let limited = |adjust: fn(&mut Config)| adjusted(config_with_metrics(), adjust);
    for (config, reason) in [
        (limited(|config| config.limits.max_connections = 1), "connection_limit"),
        (limited(|config| config.limits.max_connections_per_peer = 1), "client_connection_limit"),
    ] {
        // The channel of the app is the first connection.
        let app = App::start_with(config).await;
        read_until_closed(&mut connect_raw(app.address, PREFACE).await).await;
        wait_until_counted(&app, reason).await;
    }
}

#[tokio::test]
async fn failed_tls_handshakes_are_counted_by_reason() {
    let authority = CertificateAuthority::new();
    let other = CertificateAuthority::new();
    let secret = TlsSecret::new(&authority.issue(), None);
    let app = App::start_with(secret.config(config_with_metrics())).await;
    for (sent, series) in [(PREFACE, 1.0), (HTTP1, 2.0)] {
        read_until_closed(&mut connect_raw(app.address, sent).await).await;
        let reason = "fastzero_connection_failures_total{reason=\"plaintext_to_tls\"}";
        wait_until(reason, async || app.scrape().await.get(reason) == Some(series)).await;
    }
    let client = TlsClient { alpn: &["http/1.1"], ..authority.client() };
    client.handshake(app.address).await.expect_err("no common protocol");
    wait_until_counted(&app, "alpn").await;
    other.client().handshake(app.address).await.expect_err("another authority");
    wait_until_counted(&app, "server_certificate").await;

    let secret = TlsSecret::new(&authority.issue(), Some(&other));
    let app = App::start_with(secret.config(config_with_metrics())).await;
    assert!(!authority.client().can_call(app.address).await, "no client certificate");
    wait_until_counted(&app, "client_certificate").await;
}

#[tokio::test]
async fn the_log_warns_of_each_reason_at_a_bounded_rate() {
    let database = TestDatabase::create().await;
    let server = Binary::server(&database.url()).env("METRICS_ADDR", "127.0.0.1:0").start();
    let address = server.address().await.parse().expect("an address");
    for _ in 0..3 {
        read_until_closed(&mut connect_raw(address, HTTP1).await).await;
    }
    read_until_closed(&mut connect_raw(address, CLIENT_HELLO).await).await;
    let line = server.wait_for_line("\"tls_to_plaintext\"").await;
    for part in ["\"WARN\"", "\"connection failed\"", "\"peer_addr\":\"127.0.0.1:"] {
        assert!(line.contains(part), "{line}");
    }
    assert_eq!(server.output().matches("\"not_http2\"").count(), 1, "{}", server.output());
}

#[tokio::test]
async fn the_start_is_logged_with_version_migrations_and_addresses() {
    let database = TestDatabase::create_empty("template template0 encoding 'UTF8'").await;
    let authority = CertificateAuthority::new();
    let secret = TlsSecret::new(&authority.issue(), None);
    let mut server = Binary::server(&database.url()).env("METRICS_ADDR", "127.0.0.1:0");
    for (name, value) in secret.env_vars() {
        server = server.env(name, &value);
    }
    let server = server.start();
    let serving = server.wait_for_line("\"serving\"").await;
    let admin = format!("\"admin_address\":\"{}\"", server.metrics_address().await);
    assert!(serving.contains(&admin) && serving.contains("\"tls\":true"), "{serving}");
    let starting = server.wait_for_line("\"starting\"").await;
    for part in [env!("CARGO_PKG_VERSION"), env!("FASTZERO_COMMIT")] {
        assert!(starting.contains(&format!("\"{part}\"")), "{starting}");
    }
    let migrated = server.wait_for_line("\"schema migrated\"").await;
    assert!(migrated.contains("0001 users sessions todos, 0002 "), "{migrated}");

    // The next start applies none.
    let server = Binary::server(&database.url()).start();
    let serving = server.wait_for_line("\"serving\"").await;
    assert!(serving.contains("\"tls\":false") && !serving.contains("admin"), "{serving}");
    assert!(!server.output().contains("\"schema migrated\""), "{}", server.output());
}
