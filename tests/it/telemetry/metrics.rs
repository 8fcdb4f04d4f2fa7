//! The port for metrics and probes.

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
    metrics::{Scrape, config_with_metrics, http_request},
    postgres::TestDatabase,
    process::Binary,
    proxy::{self, Proxy},
    readme::OBSERVABILITY,
    wait::{wait_until, with_timeout},
};

const ALERTS: &str = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/deploy/alerts.yaml"));
const DASHBOARD: &str = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/deploy/dashboard.json"));

impl Scrape {
    /// The names of all series, and their labels.
    fn names(&self) -> BTreeMap<String, BTreeSet<String>> {
        let series = self.0.lines().filter(|line| !line.starts_with('#'));
        let series = series.map(mentioned).map(|(names, labels)| {
            let name = names.into_iter().next().expect("each has a name");
            (name, labels)
        });
        series.collect()
    }

    /// All that a query reads is there.
    #[track_caller]
    fn assert_answers(&self, query: &str) {
        let (names, labels) = mentioned(query);
        let there = self.names();
        let mut known: BTreeSet<_> = FROM_PROMETHEUS.into_iter().collect();
        for name in &names {
            let labels = there.get(name).unwrap_or_else(|| panic!("no {name}, but {query}"));
            known.extend(labels.iter().map(|label| &**label));
        }
        for label in labels {
            assert!(known.contains(&*label), "no {names:?} has the label {label}, but {query}");
        }
    }
}

/// The labels that Prometheus itself gives to what it reads.
const FROM_PROMETHEUS: [&str; 1] = ["instance"];

/// The metrics that a text names, and the labels: those in braces, and those after `by`.
fn mentioned(text: &str) -> (BTreeSet<String>, BTreeSet<String>) {
    // What is quoted are values.
    let bare: String = text.split('"').step_by(2).collect();
    let lists =
        |begin, end| bare.split(begin).skip(1).filter_map(move |rest| rest.split(end).next());
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
        ana.try_get_todo(&todo.id).await.expect("it is there");
    }
    let missing = ana.try_get_todo("01890a5d-ac96-774b-bcce-b302099a8057").await;
    assert_status(missing, Code::NotFound, "TODO_NOT_FOUND");
    let refused = app.anonymous().try_get_todo(&todo.id).await;
    assert_status(refused, Code::Unauthenticated, "NOT_AUTHENTICATED");
    let wrong = app.anonymous().logged_in("ana", "not the password").await;
    assert_status(
        wrong.map(drop).map(Response::new),
        Code::Unauthenticated,
        "INCORRECT_CREDENTIALS",
    );
    HealthClient::new(app.channel.clone())
        .check(HealthCheckRequest::default())
        .await
        .expect("health answers");

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
    // Her session was looked up at the first of her five calls, if they took no 5 seconds.
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
    // A client is connected before the server has accepted it.
    app.wait_until_connections(2).await;
    drop(other);
    app.wait_until_connections(1).await;
}

#[tokio::test]
async fn calls_under_way_and_turned_away_are_counted() {
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
async fn methods_that_do_not_exist_are_one_series() {
    let app = App::start_with(config_with_metrics()).await;
    let before = app.scrape().await;
    for path in
        ["/a.B/C", "/a.B/D", "/grpc.health.v1.Health/None", "/fastzero.todo.v1.TodoService/"]
    {
        let mut client = Grpc::new(app.channel.clone());
        client.ready().await.expect("ready");
        let codec = ProstCodec::<HealthCheckRequest, HealthCheckRequest>::default();
        let request = Request::new(HealthCheckRequest::default());
        let refused = client.unary(request, PathAndQuery::from_static(path), codec).await;
        assert_eq!(refused.expect_err(path).code(), Code::Unimplemented, "{path}");
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
    let way = proxy::options_via(address, &database.options);
    let app = App::start_via(database, way, config_with_metrics()).await;
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
async fn the_stop_is_told_before_it_comes() {
    let app = App::start_with(adjusted(config_with_metrics(), |config| {
        config.lifecycle.shutdown_delay_seconds = 10;
    }))
    .await;
    app.shut_down();
    wait_until("not ready", async || app.http_get("/readyz").await.status == 503).await;
    assert_eq!(app.http_get("/healthz").await.status, 200);
    assert_eq!(app.scrape().await.get("fastzero_database_up"), Some(1.0), "that is not it");
}

#[tokio::test]
async fn there_is_nothing_else() {
    let app = App::start_with(config_with_metrics()).await;
    let address = app.metrics_address.expect("it has metrics");
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
        let answer = http_request(address, method, path).await;
        assert_eq!(answer.status, status, "{method} {path}");
        assert!(answer.head.contains("connection: close"), "{}", answer.head);
        assert_eq!(answer.head.contains("allow: get, head"), status == 405, "{}", answer.head);
        assert_eq!(answer.body.is_empty(), method == "HEAD", "{method} {path}");
    }
    assert!(App::start().await.metrics_address.is_none());
}

#[tokio::test]
async fn who_says_nothing_takes_no_place_for_long() {
    let app = App::start_with(config_with_metrics()).await;
    let address = app.metrics_address.expect("it has metrics");
    let mut silent = Vec::new();
    for _ in 0..16 {
        silent.push(TcpStream::connect(address).await.expect("connected"));
    }
    // Waits for a place.
    let begun = Instant::now();
    assert_eq!(app.http_get("/healthz").await.status, 200);
    assert!(begun.elapsed() > Duration::from_secs(3), "{:?}", begun.elapsed());
    for mut stream in silent {
        let mut said = Vec::new();
        // Closed, whether or not with a word on it.
        let _ = with_timeout("the end", stream.read_to_end(&mut said)).await;
    }
}

#[tokio::test]
async fn the_port_is_another_than_that_of_grpc() {
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
async fn what_is_documented_is_what_there_is() {
    let app = App::start_with(config_with_metrics()).await;
    app.create_user("ana").await;
    app.logged_in("ana").await;
    let scrape = app.scrape().await;
    let (_, section) = OBSERVABILITY.split_once("\n## Metrics\n").expect("the section is there");
    let (documented, _) = mentioned(section.split("\n## ").next().unwrap_or_default());
    let parts = ["_bucket", "_sum", "_count"];
    let whole = |name: String| {
        parts.iter().find_map(|part| name.strip_suffix(part)).unwrap_or(&name).to_owned()
    };
    assert_eq!(documented, scrape.names().into_keys().map(whole).collect());
}

#[tokio::test]
async fn alerts_and_dashboard_read_what_there_is() {
    let app = App::start_with(config_with_metrics()).await;
    let scrape = app.scrape().await;
    let rules = ALERTS.split("expr:").skip(1).filter_map(|rule| rule.split("for:").next());
    rules.for_each(|query| scrape.assert_answers(query));

    let dashboard: Value = serde_json::from_str(DASHBOARD).expect("it is JSON");
    let list = |value: &Value| value.as_array().expect("a list").clone();
    let text = |value: &Value| value.as_str().expect("a text").to_owned();
    for variable in list(&dashboard["templating"]["list"]) {
        scrape.assert_answers(variable["definition"].as_str().unwrap_or_default());
    }
    let mut ids = BTreeSet::new();
    for panel in list(&dashboard["panels"]) {
        assert!(ids.insert(panel["id"].as_u64()), "an id twice: {panel}");
        if panel["type"] == "row" {
            continue;
        }
        assert_eq!(panel["datasource"]["uid"], "${datasource}", "{panel}");
        for target in list(&panel["targets"]) {
            // Their labels, too, are of what is read.
            let legend = text(&target["legendFormat"]);
            scrape.assert_answers(&format!("{} {legend}", text(&target["expr"])));
        }
    }
}
