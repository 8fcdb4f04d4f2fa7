//! Connections: their limits, and when the server closes them.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use fast_zero::proto::{
    auth::v1::ListSessionsRequest,
    todo::v1::{Todo, UpdateTodoRequest},
};
use prost::Message;
use prost_types::FieldMask;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::interval,
};
use tonic::Code;
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

use super::{LIST, UPDATE, user_with_large_list, whole_list};
use crate::support::{
    App, Client, PASSWORD,
    app::{adjusted, config_with, connect, unique_name},
    health::Watch,
    http2::{
        self, END_HEADERS, END_STREAM, OTHER_CLIENT_IP, PREFACE, connect_raw,
        connect_without_reading, frame, length_prefixed, read_frame, read_until_closed,
    },
    metrics::config_with_metrics as config,
    wait::{wait_until, with_timeout},
};

/// Opens a connection. Returns `None` if the server closes it immediately.
async fn try_connect(address: SocketAddr) -> Option<TcpStream> {
    let mut stream = connect_raw(address, PREFACE).await;
    let mut first = [0; 9];
    let is_open = with_timeout("a response", stream.read_exact(&mut first)).await.is_ok();
    is_open.then_some(stream)
}

#[tokio::test]
async fn connections_are_limited_per_client_and_in_total() {
    for limited in [
        config_with(|config| {
            config.limits.max_connections_per_peer = 3;
        }),
        config_with(|config| {
            config.limits.max_connections = 3;
        }),
    ] {
        // The channel of the app is the first connection.
        let app = App::start_with(limited).await;
        let one = try_connect(app.address).await.expect("the second");
        let _other = try_connect(app.address).await.expect("the third");
        assert!(try_connect(app.address).await.is_none(), "the fourth");
        app.anonymous().create_user("ana").await;
        drop(one);
        wait_until("a slot is free", async || try_connect(app.address).await.is_some()).await;
    }
}

#[tokio::test]
async fn a_connection_has_so_many_calls_in_flight_and_no_more() {
    const CALLS: u32 = 128;
    let app = App::start().await;
    let mut stream = connect_raw(app.address, PREFACE).await;
    let block = http2::header_block("/grpc.health.v1.Health/Check", &[]);
    // The calls wait for their messages.
    let stream_ids = (1..).step_by(2).take(CALLS as usize + 1);
    let calls: Vec<_> =
        stream_ids.flat_map(|id| frame(http2::HEADERS, END_HEADERS, id, &block)).collect();
    stream.write_all(&calls).await.expect("sent");
    let first = loop {
        let frame = with_timeout("a frame", read_frame(&mut stream)).await.expect("a frame");
        if frame.stream != 0 {
            break frame;
        }
    };
    assert_eq!((first.kind, first.stream), (http2::RST_STREAM, 2 * CALLS + 1));
}

#[tokio::test]
async fn the_settings_of_http2_bound_what_a_client_sends() {
    let app = App::start().await;
    let mut stream = connect_raw(app.address, PREFACE).await;
    let mut next = async || with_timeout("a frame", read_frame(&mut stream)).await.expect("open");
    let settings = next().await;
    assert_eq!(settings.kind, http2::SETTINGS);
    for (id, value) in [
        (http2::MAX_CONCURRENT_STREAMS, 128_u32),
        (http2::INITIAL_WINDOW_SIZE, 64 * 1024),
        (http2::MAX_HEADER_LIST_SIZE, 16 * 1024),
    ] {
        let setting = [&id.to_be_bytes()[..], &value.to_be_bytes()].concat();
        let is_sent = settings.payload.chunks(6).any(|sent| sent == setting);
        assert!(is_sent, "setting {id} is not {value}: {settings:?}");
    }
    let update = loop {
        let frame = next().await;
        if frame.kind == http2::WINDOW_UPDATE {
            break frame;
        }
    };
    // The window of a connection begins with 65,535 bytes (RFC 9113, section 6.9.2).
    let increment: u32 = 1024 * 1024 - 65_535;
    assert_eq!((update.stream, update.payload), (0, increment.to_be_bytes().to_vec()));
}

#[tokio::test]
async fn connections_without_a_valid_preface_are_closed() {
    let app = App::start_with(config()).await;
    let started = Instant::now();
    assert_eq!(
        read_until_closed(
            &mut connect_raw(app.address, b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n").await
        )
        .await,
        b""
    );
    assert!(started.elapsed() < Duration::from_secs(4), "an invalid preface, without a timeout");
    for preface in [&b""[..], b"PRI * HTTP/2.0"] {
        assert_eq!(
            read_until_closed(&mut connect_raw(app.address, preface).await).await,
            b"",
            "an incomplete preface"
        );
    }
    assert!(started.elapsed() < Duration::from_secs(20), "{:?}", started.elapsed());
}

#[tokio::test]
async fn a_connection_ends_at_its_maximum_age_without_failing_calls() {
    let app = App::start_with(config_with(|config| {
        config.limits.connection_max_age_seconds = 1;
    }))
    .await;
    let ana = app.signed_up("ana").await;
    let channel = connect(app.address).await;
    let mut health = HealthClient::new(channel.clone());
    let watch = health.watch(HealthCheckRequest::default()).await.expect("a response");
    let mut watch = Watch(watch.into_inner());
    let ended = with_timeout("the end of the stream", watch.wait_until_ended()).await;
    assert_eq!(ended.map(|status| status.code()), Some(Code::Unavailable));
    // The channel reconnects by itself.
    let ana = ana.with_channel(&channel);
    for _ in 0..10 {
        ana.create_todo("a").await;
    }
}

#[tokio::test]
async fn idle_connections_are_closed() {
    let app = App::start_with(config_with(|config| {
        config.limits.connection_idle_seconds = 1;
    }))
    .await;
    let started = Instant::now();
    let mut idle = try_connect(app.address).await.expect("a connection");
    let goaway = read_until_closed(&mut idle).await;
    // The fourth byte of a frame is its type. 0x07 is GOAWAY.
    assert!(goaway.windows(4).any(|bytes| bytes[3] == 0x07), "{goaway:?}");
    assert!(started.elapsed() >= Duration::from_secs(1), "{:?}", started.elapsed());
}

#[tokio::test]
async fn a_trusted_proxy_names_the_client_address() {
    let trusting = config_with(|config| {
        config.listen.trusted_proxies = vec![
            "127.0.0.0/8".parse().expect("a network"),
            "10.0.0.0/8".parse().expect("a network"),
        ];
    });
    let (trusting_app, other_app) =
        (App::start_with(trusting).await, App::start_with(config()).await);
    for (app, forwarded, expected) in [
        (&trusting_app, "192.0.2.7", "192.0.2.7"),
        (&trusting_app, "198.51.100.1, 192.0.2.7, 10.1.2.3", "192.0.2.7"),
        (&trusting_app, "192.0.2.7, unknown", "127.0.0.1"),
        (&trusting_app, "10.0.0.1", "10.0.0.1"),
        (&trusting_app, "192.0.2.7, é, 198.51.100.1", "198.51.100.1"),
        (&other_app, "192.0.2.7", "127.0.0.1"),
    ] {
        let name = unique_name("ana");
        app.create_user(&name).await;
        let proxied = app.anonymous().with_metadata("x-forwarded-for", forwarded);
        let ana = proxied.logged_in(&name, PASSWORD).await.expect("logged in");
        assert_eq!(session_client_ip(&ana).await, expected, "{forwarded}");
    }
}

/// Returns the client address that the caller's session records.
async fn session_client_ip(client: &Client) -> String {
    let sessions = client
        .auth()
        .list_sessions(ListSessionsRequest::default())
        .await
        .expect("listed")
        .into_inner();
    sessions.sessions.into_iter().next().expect("one").peer
}

#[tokio::test]
async fn the_server_serves_calls_during_the_shutdown_delay() {
    let app = App::start_with(config_with(|config| {
        config.lifecycle.shutdown_delay_seconds = 2;
    }))
    .await;
    let ana = app.signed_up("ana").await;
    let mut watch = app.watch("").await;
    with_timeout("SERVING", watch.wait_until_serving()).await;
    app.shut_down();
    with_timeout("NOT_SERVING", watch.wait_until_not_serving()).await;
    // New connections and calls are still served.
    let ana = ana.with_channel(&connect(app.address).await);
    ana.create_todo("a").await;
}

#[tokio::test]
async fn a_stalled_connection_drains_its_other_calls_before_it_closes() {
    // Each blocked call holds a connection to the database.
    let app = App::start_with(adjusted(config(), |config| {
        config.limits.database_max_connections = 16;
    }))
    .await;
    let ana = user_with_large_list(&app).await;
    let todo = ana.create_todo("a").await;
    let lock = app.lock_todo(&todo.id).await;
    let bearer = format!("Bearer {}", ana.tokens().access_token);
    let block = |path| http2::header_block(path, &[("authorization", &bearer)]);
    let call = |path, stream, bytes: &[u8]| {
        let headers = frame(http2::HEADERS, END_HEADERS, stream, &block(path));
        [headers, frame(http2::DATA, END_STREAM, stream, &length_prefixed(bytes))].concat()
    };
    let (mut read, mut write) = connect_raw(app.address, PREFACE).await.into_split();
    let window = http2::settings_frame(http2::INITIAL_WINDOW_SIZE, 1024);
    let list = call(LIST, 1, &whole_list().encode_to_vec());
    write.write_all(&[window, list].concat()).await.expect("sent");

    // One call a second, each blocked by the lock, until the server detects the stall.
    let update = UpdateTodoRequest {
        todo: Some(Todo { etag: String::new(), ..todo }),
        update_mask: Some(FieldMask { paths: vec!["title".to_owned()] }),
    };
    let (mut newest, mut ticks) = (1, interval(Duration::from_secs(1)));
    let goaway =
        async { while read_frame(&mut read).await.expect("a frame").kind != http2::GOAWAY {} };
    let calls = async {
        loop {
            ticks.tick().await;
            newest += 2;
            let update = call(UPDATE, newest, &update.encode_to_vec());
            write.write_all(&update).await.expect("sent");
        }
    };
    tokio::select! {
        () = with_timeout("GOAWAY", goaway) => {}
        () = calls => {}
    }
    lock.release().await;
    let responded = async {
        loop {
            let frame = read_frame(&mut read).await.expect("a frame");
            // An error has no DATA frame.
            if frame.stream == newest && frame.kind == http2::DATA {
                return;
            }
        }
    };
    with_timeout("the response", responded).await;
    read_until_closed(&mut read).await;
    ana.list_todos(whole_list()).await;
}

#[tokio::test]
async fn a_client_that_does_not_read_errors_is_disconnected() {
    let app = App::start_with(config()).await;
    let mut stream =
        connect_without_reading(app.address, OTHER_CLIENT_IP).await.expect("connected");
    stream.write_all(PREFACE).await.expect("sent");
    let block = http2::header_block("/no.Such/Method", &[]);
    let calls = async {
        for stream_id in (1..).step_by(2) {
            let call = frame(http2::HEADERS, END_HEADERS | END_STREAM, stream_id, &block);
            if stream.write_all(&call).await.is_err() {
                return;
            }
        }
    };
    with_timeout("the end of the connection", calls).await;
}
