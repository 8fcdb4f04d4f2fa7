//! When spans are exported, and collectors that do not answer.

use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use opentelemetry_proto::tonic::trace::v1::span::SpanKind;
use tokio::net::TcpListener;

use super::{TRACE, client, exporting, get_me, of_kind, within};
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
    let run = exporting(&database, &collector.url()).env("OTEL_BSP_SCHEDULE_DELAY", "3600000");
    let mut server = run.start();
    let ana = client(&server).await.signed_up("ana").await;
    get_me(&within(&ana, TRACE, true)).await;
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
    let silent_at = silent.local_addr().expect("it is bound");
    // Accepted connections stay open, and nobody reads them.
    let accepting = tokio::spawn(async move {
        let mut open = Vec::new();
        while let Ok((stream, _)) = silent.accept().await {
            open.push(stream);
        }
    });
    for address in [Proxy::reserve_address().await, silent_at] {
        let database = TestDatabase::create().await;
        let url = format!("http://{address}");
        // Full after a few calls.
        let run = exporting(&database, &url).env("OTEL_BSP_MAX_QUEUE_SIZE", "8");
        let mut server = run.start();
        let ana = client(&server).await.signed_up("ana").await;
        let mut longest = Duration::ZERO;
        for _ in 0..300 {
            let begun = Instant::now();
            get_me(&ana).await;
            longest = longest.max(begun.elapsed());
        }
        assert!(longest < Duration::from_millis(500), "{longest:?}");
        // A silent one may go on to be for a while, before that is a failure.
        let is_silent = address == silent_at;
        if !is_silent {
            server.wait_for_line("span export failed").await;
        }
        let begun = Instant::now();
        server.signal(Signal::SIGTERM);
        assert_eq!(server.wait().await.code(), Some(0), "{}", server.output());
        assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
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
    let url = format!("http://{}", silent.local_addr().expect("it is bound"));
    let database = TestDatabase::create().await;
    let run = exporting(&database, &url).env("SHUTDOWN_DELAY_SECONDS", "3600");
    let mut server = run.start();
    let ana = client(&server).await.signed_up("ana").await;
    get_me(&ana).await;
    server.signal(Signal::SIGTERM);
    server.wait_for_line("shutting down").await;
    let begun = Instant::now();
    server.signal(Signal::SIGTERM);
    assert_eq!(server.wait().await.code(), Some(1));
    assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn the_recovery_of_a_collector_is_logged() {
    let (database, address) = (TestDatabase::create().await, Proxy::reserve_address().await);
    let server = exporting(&database, &format!("http://{address}")).start();
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
    let server = exporting(&database, &url).start();
    client(&server).await.create_user("ana").await;
    let line = server.wait_for_line("span export failed").await;
    assert!(line.contains("UnknownIssuer"), "{line}");
}
