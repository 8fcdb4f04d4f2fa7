//! The export of spans, and unavailable collectors.

use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use opentelemetry_proto::tonic::trace::v1::span::SpanKind;
use tokio::net::TcpListener;

use super::{TRACE, binary_exporting_to, client, get_me, of_kind, with_remote_parent};
use crate::support::{
    certificates::{CertificateAuthority, TlsSecret},
    collector::Collector,
    postgres::TestDatabase,
    process::Binary,
    proxy::Proxy,
};

#[tokio::test]
async fn the_shutdown_exports_pending_spans() {
    let (database, collector) = (TestDatabase::create().await, Collector::start().await);
    let run =
        binary_exporting_to(&database, &collector.url()).env("OTEL_BSP_SCHEDULE_DELAY", "3600000");
    let mut server = run.start();
    let ana = client(&server).await.signed_up("ana").await;
    get_me(&with_remote_parent(&ana, TRACE, true)).await;
    assert_eq!(collector.received(), []);
    server.signal(Signal::SIGTERM);
    assert_eq!(server.wait().await.code(), Some(0));
    let spans = collector.spans(TRACE);
    assert_eq!(of_kind(&spans, SpanKind::Server).len(), 1, "{spans:#?}");
    assert!(!server.output().contains("may be lost"), "{}", server.output());
}

#[tokio::test]
async fn an_unavailable_or_silent_collector_delays_neither_calls_nor_shutdown() {
    let silent = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let silent_address = silent.local_addr().expect("a bound listener");
    // A silent collector: accepted connections stay open and unread.
    let accepting = tokio::spawn(async move {
        let mut open = Vec::new();
        while let Ok((stream, _)) = silent.accept().await {
            open.push(stream);
        }
    });
    for address in [Proxy::reserve_address().await, silent_address] {
        let database = TestDatabase::create().await;
        let url = format!("http://{address}");
        // A few calls fill the queue.
        let run = binary_exporting_to(&database, &url).env("OTEL_BSP_MAX_QUEUE_SIZE", "8");
        let mut server = run.start();
        let ana = client(&server).await.signed_up("ana").await;
        let mut longest = Duration::ZERO;
        for _ in 0..300 {
            let started = Instant::now();
            get_me(&ana).await;
            longest = longest.max(started.elapsed());
        }
        assert!(longest < Duration::from_millis(500), "{longest:?}");
        // An export to a silent collector fails late, at its timeout.
        let is_silent = address == silent_address;
        if !is_silent {
            server.wait_for_line("span export failed").await;
        }
        let started = Instant::now();
        server.signal(Signal::SIGTERM);
        assert_eq!(server.wait().await.code(), Some(0), "{}", server.output());
        assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
        let output = server.output();
        assert_eq!(
            output.contains("span flush timed out, spans may be lost"),
            is_silent,
            "{output}"
        );
        assert!(output.matches("span export failed").count() <= 1, "{output}");
    }
    accepting.abort();
}

#[tokio::test]
async fn a_silent_collector_does_not_delay_the_second_signal() {
    let silent = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let url = format!("http://{}", silent.local_addr().expect("a bound listener"));
    let database = TestDatabase::create().await;
    let run = binary_exporting_to(&database, &url).env("SHUTDOWN_DELAY_SECONDS", "3600");
    let mut server = run.start();
    let ana = client(&server).await.signed_up("ana").await;
    get_me(&ana).await;
    server.signal(Signal::SIGTERM);
    server.wait_for_line("shutting down").await;
    let started = Instant::now();
    server.signal(Signal::SIGTERM);
    assert_eq!(server.wait().await.code(), Some(1));
    assert!(started.elapsed() < Duration::from_secs(1), "{:?}", started.elapsed());
}

#[tokio::test]
async fn the_recovery_of_a_collector_is_logged() {
    let (database, address) = (TestDatabase::create().await, Proxy::reserve_address().await);
    let server = binary_exporting_to(&database, &format!("http://{address}")).start();
    let ana = client(&server).await.signed_up("ana").await;
    server.wait_for_line("span export failed").await;
    let _collector =
        Collector::start_on(TcpListener::bind(address).await.expect("the port is still free"));
    get_me(&ana).await;
    server.wait_for_line("span export recovered").await;
}

#[tokio::test]
async fn a_tls_collector_needs_a_certificate_of_a_trusted_authority() {
    let database = TestDatabase::create().await;
    let authority = CertificateAuthority::new();
    let secret = TlsSecret::new(&authority.issue(), None);
    let with_tls = secret.env_vars().into_iter();
    let with_tls =
        with_tls.fold(Binary::server(&database.url()), |run, (name, path)| run.env(name, &path));
    let with_tls = with_tls.start();
    let url = format!("https://{}", with_tls.address().await);
    let server = binary_exporting_to(&database, &url).start();
    client(&server).await.create_user("ana").await;
    let line = server.wait_for_line("span export failed").await;
    assert!(line.contains("UnknownIssuer"), "{line}");
}
