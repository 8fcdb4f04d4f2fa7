//! The admin server: metrics and probes.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use serde_json::Value;
use tokio::{io::AsyncReadExt, net::TcpStream};
use tonic::{Code, Request, Response, client::Grpc, codegen::http::uri::PathAndQuery};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
use tonic_prost::ProstCodec;

use crate::support::{
    App,
    app::{SECRET_KEY, adjusted, connect},
    assert::assert_status,
    metrics::{Scrape, config_with_metrics, http_request, http_request_with},
    postgres::TestDatabase,
    process::Binary,
    proxy::{self, Proxy},
    readme::OBSERVABILITY,
    wait::{wait_until, with_timeout},
};

const ALERTS: &str = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/deploy/alerts.yaml"));
const DASHBOARD: &str = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/deploy/dashboard.json"));

impl Scrape {
    /// Returns the names of all series, with their labels.
    fn names(&self) -> BTreeMap<String, BTreeSet<String>> {
        let series = self.0.lines().filter(|line| !line.starts_with('#'));
        let series = series.map(mentioned).map(|(names, labels)| {
            let name = names.into_iter().next().expect("each has a name");
            (name, labels)
        });
        series.collect()
    }

    /// Asserts that all metrics and labels of a query exist.
    #[track_caller]
    fn assert_metrics_exist(&self, query: &str) {
        let (names, labels) = mentioned(query);
        let exposed = self.names();
        let mut known: BTreeSet<_> = FROM_PROMETHEUS.into_iter().collect();
        for name in &names {
            let labels = exposed.get(name).unwrap_or_else(|| panic!("no {name}, but {query}"));
            known.extend(labels.iter().map(|label| &**label));
        }
        for label in labels {
            assert!(known.contains(&*label), "no {names:?} has the label {label}, but {query}");
        }
    }
}

/// The labels that Prometheus itself adds.
const FROM_PROMETHEUS: [&str; 1] = ["instance"];

/// Returns the metrics and the labels that a text names. Labels are in braces or after `by`.
fn mentioned(text: &str) -> (BTreeSet<String>, BTreeSet<String>) {
    // Quoted words are values of labels.
    let bare: String = text.split('"').step_by(2).collect();
    let lists =
        |start, end| bare.split(start).skip(1).filter_map(move |rest| rest.split(end).next());
    let labels = lists("{", "}").chain(lists("by (", ")")).flat_map(words).map(str::to_owned);
    let metrics = words(&bare)
        .filter(|word| word.starts_with("fastzero_") || word.starts_with("grpc_server_"))
        .map(str::to_owned);
    (metrics.collect(), labels.collect())
}

fn words(text: &str) -> impl Iterator<Item = &str> {
    let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    words.filter(|word| !word.is_empty())
}

const GET_TODO: &str = "fastzero.todo.v1.TodoService/GetTodo";

#[tokio::test]
async fn calls_are_counted_by_method_and_code() {
    let app = App::start_with(config_with_metrics()).await;
    let ana = app.signed_up("ana").await;
    let todo = ana.create_todo("a").await;
    let before = app.scrape().await;
    for _ in 0..3 {
        ana.try_get_todo(&todo.id).await.expect("an existing entry");
    }
    let missing = ana.try_get_todo("01890a5d-ac96-774b-bcce-b302099a8057").await;
    assert_status(missing, Code::NotFound, "TODO_NOT_FOUND");
    let rejected = app.anonymous().try_get_todo(&todo.id).await;
    assert_status(rejected, Code::Unauthenticated, "NOT_AUTHENTICATED");
    let wrong = app.anonymous().logged_in("ana", "not the password").await;
    assert_status(
        wrong.map(drop).map(Response::new),
        Code::Unauthenticated,
        "INCORRECT_CREDENTIALS",
    );
    HealthClient::new(app.channel.clone())
        .check(HealthCheckRequest::default())
        .await
        .expect("a health response");

    let after = app.scrape().await;
    for (method, code, more) in [
        (GET_TODO, "OK", 3.0),
        (GET_TODO, "NOT_FOUND", 1.0),
        (GET_TODO, "UNAUTHENTICATED", 1.0),
        (GET_TODO, "INTERNAL", 0.0),
        ("grpc.health.v1.Health/Check", "OK", 1.0),
        ("fastzero.auth.v1.AuthService/Login", "UNAUTHENTICATED", 1.0),
    ] {
        let counted = after.call_count(method, code) - before.call_count(method, code);
        assert!((counted - more).abs() < 0.1, "{method} {code}: {counted}");
    }
    let started = format!("grpc_server_call_started_total{{grpc_method=\"{GET_TODO}\"}}");
    assert_eq!(before.get(&started), Some(0.0));
    assert_eq!(after.get(&started), Some(5.0));
    for (series, value) in [
        ("fastzero_calls_in_flight", 0.0),
        ("fastzero_calls_shed_total", 0.0),
        ("fastzero_connections", 1.0),
        ("fastzero_database_up", 1.0),
        ("fastzero_password_hashing_jobs", 0.0),
        ("fastzero_log_lines_dropped_total", 0.0),
        ("fastzero_password_failures_total", 1.0),
        ("fastzero_session_cache_users", 1.0),
    ] {
        assert_eq!(after.get(series), Some(value), "{series}");
    }
    // The first of the five calls looks up the session, if the calls take less than the TTL of
    // 5 seconds.
    let checks = |result| format!("fastzero_session_cache_lookups_total{{result=\"{result}\"}}");
    let (hits, misses) = (after.get(&checks("hit")), after.get(&checks("miss")));
    assert_eq!(hits.zip(misses).map(|(hits, misses)| hits + misses), Some(5.0));
    assert!(hits >= Some(3.0), "{hits:?}");
    let build = format!(
        "fastzero_build_info{{version=\"{}\",commit=\"{}\"}}",
        env!("CARGO_PKG_VERSION"),
        env!("FASTZERO_COMMIT"),
    );
    assert_eq!(after.get(&build), Some(1.0), "{}", after.0);
    let state = |state| format!("fastzero_database_connections{{state=\"{state}\"}}");
    let (used, idle) = (after.get(&state("used")), after.get(&state("idle")));
    let open = used.zip(idle).map(|(used, idle)| used + idle);
    assert!(open.is_some_and(|open| (1.0..=4.0).contains(&open)), "{used:?} {idle:?}");

    let other = connect(app.address).await;
    // A client may be connected before the server has accepted the connection.
    app.wait_until_connections(2).await;
    drop(other);
    app.wait_until_connections(1).await;
}

#[tokio::test]
async fn calls_in_flight_and_shed_calls_are_counted() {
    let app = App::start_with(adjusted(config_with_metrics(), |config| {
        config.limits.max_concurrent_calls = 1;
    }))
    .await;
    let ana = app.signed_up("ana").await;
    let todo = ana.create_todo("a").await;
    let mut lock = app.lock_todo(&todo.id).await;
    let held = {
        let (ana, id) = (ana.clone(), todo.id.clone());
        tokio::spawn(async move { ana.try_delete_todo(&id, "").await })
    };
    lock.wait_until_blocked_by(1).await;
    assert_eq!(app.scrape().await.get("fastzero_calls_in_flight"), Some(1.0));
    assert_status(ana.try_get_todo(&todo.id).await, Code::ResourceExhausted, "OVERLOADED");
    assert_eq!(app.scrape().await.get("fastzero_calls_shed_total"), Some(1.0));
    lock.release().await;
    held.await.expect("no panic").expect("deleted");
    assert_eq!(app.scrape().await.get("fastzero_calls_in_flight"), Some(0.0));
}

#[tokio::test]
async fn unknown_methods_share_one_series() {
    let app = App::start_with(config_with_metrics()).await;
    let before = app.scrape().await;
    for path in
        ["/a.B/C", "/a.B/D", "/grpc.health.v1.Health/None", "/fastzero.todo.v1.TodoService/"]
    {
        let mut client = Grpc::new(app.channel.clone());
        client.ready().await.expect("ready");
        let codec = ProstCodec::<HealthCheckRequest, HealthCheckRequest>::default();
        let request = Request::new(HealthCheckRequest::default());
        let rejected = client.unary(request, PathAndQuery::from_static(path), codec).await;
        assert_eq!(rejected.expect_err(path).code(), Code::Unimplemented, "{path}");
    }
    let after = app.scrape().await;
    assert!((after.call_count("other", "UNIMPLEMENTED") - 4.0).abs() < 0.1, "{}", after.0);
    let series = |scrape: &Scrape| scrape.0.matches("_count{").count();
    assert_eq!(series(&after), series(&before) + 1);
}

#[tokio::test]
async fn probes_follow_the_database_and_the_process() {
    let database = TestDatabase::create().await;
    let address = Proxy::reserve_address().await;
    let proxy = Proxy::open(address, &database.options).await;
    let options = proxy::options_via(address, &database.options);
    let app = App::start_via(database, options, config_with_metrics()).await;
    let up = async || app.scrape().await.get("fastzero_database_up");
    assert_eq!((app.http_get("/readyz").await.status, up().await), (200, Some(1.0)));

    proxy.pause();
    wait_until("not ready", async || app.http_get("/readyz").await.status == 503).await;
    assert_eq!(up().await, Some(0.0));
    let healthz = app.http_get("/healthz").await;
    assert_eq!((healthz.status, &*healthz.body), (200, "ok\n"));

    proxy.resume();
    wait_until("ready", async || app.http_get("/readyz").await.status == 200).await;
    assert_eq!(up().await, Some(1.0));
}

#[tokio::test]
async fn readiness_fails_during_the_shutdown_delay() {
    let app = App::start_with(adjusted(config_with_metrics(), |config| {
        config.lifecycle.shutdown_delay_seconds = 10;
    }))
    .await;
    app.shut_down();
    wait_until("not ready", async || app.http_get("/readyz").await.status == 503).await;
    assert_eq!(app.http_get("/healthz").await.status, 200);
    assert_eq!(app.scrape().await.get("fastzero_database_up"), Some(1.0), "the database is up");
}

#[tokio::test]
async fn other_paths_and_methods_are_rejected() {
    let app = App::start_with(config_with_metrics()).await;
    let address = app.metrics_address.expect("metrics are enabled");
    for (method, path, status) in [
        ("GET", "/", 404),
        ("GET", "/metrics/", 404),
        ("POST", "/debug", 404),
        ("GET", "/metrics?name=any", 200),
        ("HEAD", "/metrics", 200),
        ("POST", "/metrics", 405),
        ("DELETE", "/healthz", 405),
        ("PUT", "/readyz", 405),
    ] {
        let response = http_request(address, method, path).await;
        assert_eq!(response.status, status, "{method} {path}");
        assert!(response.head.contains("connection: close"), "{}", response.head);
        assert_eq!(response.head.contains("allow: get, head"), status == 405, "{}", response.head);
        assert_eq!(response.body.is_empty(), method == "HEAD", "{method} {path}");
    }
    assert!(App::start().await.metrics_address.is_none());
}

#[tokio::test]
async fn metrics_have_the_format_that_the_client_accepts() {
    let app = App::start_with(config_with_metrics()).await;
    let address = app.metrics_address.expect("metrics are enabled");
    let fetch = async |accept| http_request_with(address, "GET", "/metrics", accept).await;
    let openmetrics = fetch("Accept: application/openmetrics-text, text/plain;q=0.5\r\n").await;
    assert!(openmetrics.head.contains("application/openmetrics-text; version=1.0.0"));
    assert!(openmetrics.body.ends_with("# EOF\n"));
    let text = fetch("Accept: text/plain\r\n").await;
    assert!(text.head.contains("text/plain; version=0.0.4"), "{}", text.head);
    assert!(!text.body.contains("# EOF") && !text.body.contains("# UNIT"), "{}", text.body);
    // Each sample of a counter follows metadata with its name.
    let counter = "fastzero_log_lines_dropped";
    for line in ["# HELP {}_total ", "# TYPE {}_total counter\n", "\n{}_total "] {
        let line = line.replace("{}", counter);
        assert!(text.body.contains(&line), "{line} in {}", text.body);
    }
    assert!(openmetrics.body.contains(&format!("# TYPE {counter} counter\n")));
    let samples = |body: &str| body.lines().filter(|line| !line.starts_with('#')).count();
    assert_eq!(samples(&text.body), samples(&openmetrics.body));
    for path in ["/healthz", "/readyz"] {
        let probe = http_request_with(address, "GET", path, "Accept: application/json\r\n").await;
        assert_eq!((probe.status, &*probe.body), (200, "ok\n"), "{path}");
    }
}

#[tokio::test]
async fn silent_admin_connections_time_out() {
    let app = App::start_with(config_with_metrics()).await;
    let address = app.metrics_address.expect("metrics are enabled");
    let mut silent = Vec::new();
    for _ in 0..16 {
        silent.push(TcpStream::connect(address).await.expect("connected"));
    }
    // This request waits for a slot.
    let started = Instant::now();
    assert_eq!(app.http_get("/healthz").await.status, 200);
    assert!(started.elapsed() > Duration::from_secs(3), "{:?}", started.elapsed());
    for mut stream in silent {
        let mut received = Vec::new();
        // The server may send an error before it closes.
        let _ = with_timeout("the end", stream.read_to_end(&mut received)).await;
    }
}

#[tokio::test]
async fn the_admin_port_differs_from_the_grpc_port() {
    for (listen, metrics) in
        [("127.0.0.1:50051", "127.0.0.1:50051"), ("127.0.0.1:50051", "0.0.0.0:50051")]
    {
        let (code, output) = Binary::new(&[])
            .env("DATABASE_URL", "postgres://localhost/db")
            .env("SECRET_KEY", SECRET_KEY)
            .env("LISTEN_ADDR", listen)
            .env("METRICS_ADDR", metrics)
            .output()
            .await;
        assert_eq!(code, Some(78), "{output}");
        assert!(output.contains("METRICS_ADDR must have another port"), "{output}");
    }
}

#[tokio::test]
async fn the_documentation_lists_exactly_the_exposed_metrics() {
    let app = App::start_with(config_with_metrics()).await;
    app.create_user("ana").await;
    app.logged_in("ana").await;
    let scrape = app.scrape().await;
    let (_, section) = OBSERVABILITY.split_once("\n## Metrics\n").expect("the section exists");
    let (documented, _) = mentioned(section.split("\n## ").next().unwrap_or_default());
    let parts = ["_bucket", "_sum", "_count"];
    let whole = |name: String| {
        parts.iter().find_map(|part| name.strip_suffix(part)).unwrap_or(&name).to_owned()
    };
    assert_eq!(documented, scrape.names().into_keys().map(whole).collect());
}

#[tokio::test]
async fn alerts_and_dashboard_query_only_exposed_metrics() {
    let app = App::start_with(config_with_metrics()).await;
    let scrape = app.scrape().await;
    let rules = ALERTS.split("expr:").skip(1).filter_map(|rule| rule.split("for:").next());
    rules.for_each(|query| scrape.assert_metrics_exist(query));

    let dashboard: Value = serde_json::from_str(DASHBOARD).expect("JSON");
    let list = |value: &Value| value.as_array().expect("a list").clone();
    let text = |value: &Value| value.as_str().expect("a text").to_owned();
    for variable in list(&dashboard["templating"]["list"]) {
        scrape.assert_metrics_exist(variable["definition"].as_str().unwrap_or_default());
    }
    let mut ids = BTreeSet::new();
    for panel in list(&dashboard["panels"]) {
        assert!(ids.insert(panel["id"].as_u64()), "an id twice: {panel}");
        if panel["type"] == "row" {
            continue;
        }
        assert_eq!(panel["datasource"]["uid"], "${datasource}", "{panel}");
        for target in list(&panel["targets"]) {
            // Legends use only labels of the queried metrics.
            let legend = text(&target["legendFormat"]);
            scrape.assert_metrics_exist(&format!("{} {legend}", text(&target["expr"])));
        }
    }
}

/// Watches last for minutes, and their usual ends have the status UNAVAILABLE or DEADLINE_EXCEEDED.
#[test]
fn alerts_on_the_calls_of_all_methods_leave_watches_out() {
    let all_methods = "grpc_method=~\"fastzero[.].*\"";
    let without_watches =
        format!("{all_methods},grpc_method!=\"fastzero.todo.v1.TodoService/WatchTodos\"");
    let count = |text: &str| ALERTS.matches(text).count();
    assert_eq!(count(all_methods), 3, "an alert is new");
    assert_eq!(count(&without_watches), 3);
}
