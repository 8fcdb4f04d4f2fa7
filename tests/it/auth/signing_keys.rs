//! The keys of access tokens: their publication, their rotation, and a change of the algorithm.

use clap::ValueEnum;
use fast_zero::{
    Config,
    proto::auth::v1::{ListSigningKeysRequest, SigningKey},
};
use jsonwebtoken::{Algorithm, DecodingKey, Validation, jwk::JwkSet};
use serde::Deserialize;

use crate::support::{
    App, Client,
    app::{Replica, SECRET_KEY, adjusted, config, connect},
    assert::assert_unauthenticated,
    database_clock::MonthEndClock,
    metrics::{config_with_metrics, http_request},
    postgres::TestDatabase,
    process::{Binary, Process},
    system_clock::ClockError,
    tokens::{Jwt, TokenKey, month, seconds_from_now},
    wait::wait_until,
};

const ALGORITHMS: [&str; 2] = ["EdDSA", "HS256"];
const NEW_KEY: &str = "another secret that only the tests know";
const JWKS: &str = "/.well-known/jwks.json";

/// Returns settings with this algorithm.
fn with_algorithm(config: Config, algorithm: &str) -> Config {
    adjusted(config, |config| {
        config.tokens.algorithm = ValueEnum::from_str(algorithm, false).expect("an algorithm");
    })
}

fn algorithm(token: &str) -> String {
    format!("{:?}", jsonwebtoken::decode_header(token).expect("a JWT").alg)
}

fn kid(token: &str) -> String {
    jsonwebtoken::decode_header(token).expect("a JWT").kid.expect("a kid")
}

async fn list_signing_keys(client: &Client) -> Vec<SigningKey> {
    let response = client.auth().list_signing_keys(ListSigningKeysRequest {}).await;
    response.expect("listed").into_inner().keys
}

/// Returns the keys that a server publishes with this secret.
fn published(secret: &str) -> Vec<SigningKey> {
    [-1, 0, 1]
        .map(|offset| TokenKey::EdDsa(secret.to_owned(), month(offset)))
        .map(|key| SigningKey {
            kid: key.kid(),
            kty: "OKP".to_owned(),
            crv: "Ed25519".to_owned(),
            alg: "EdDSA".to_owned(),
            r#use: "sig".to_owned(),
            x: key.public_key(),
        })
        .into()
}

#[tokio::test]
async fn the_signing_keys_are_public_and_the_same_over_grpc_and_http() {
    for algorithm in ALGORITHMS {
        let app = App::start_with(with_algorithm(config_with_metrics(), algorithm)).await;
        let expected = published(SECRET_KEY);
        assert_eq!(list_signing_keys(&app.anonymous()).await, expected);
        assert_eq!(list_signing_keys(&app.anonymous().with_token("garbage")).await, expected);

        let response = app.http_get(JWKS).await;
        assert_eq!(response.status, 200);
        let headers =
            ["\r\ncontent-type: application/jwk-set+json", "\r\ncache-control: max-age=3600"];
        for header in headers {
            assert!(response.head.contains(header), "{}", response.head);
        }
        let value: serde_json::Value = serde_json::from_str(&response.body).expect("JSON");
        let keys = value["keys"].as_array().expect("keys");
        assert_eq!(keys.len(), expected.len());
        for (key, expected) in keys.iter().zip(expected) {
            let SigningKey { kid, kty, crv, alg, r#use, x } = expected;
            let members = [kid, kty, crv, alg, r#use, x];
            for (name, member) in ["kid", "kty", "crv", "alg", "use", "x"].into_iter().zip(members)
            {
                assert_eq!(key[name], member, "{name}");
            }
            assert_eq!(key.as_object().expect("an object").len(), 6, "nothing private: {key}");
        }

        let address = app.metrics_address.expect("an admin server");
        let head = http_request(address, "HEAD", JWKS).await;
        assert_eq!((head.status, &*head.body), (200, ""));
        assert_eq!(http_request(address, "POST", JWKS).await.status, 405);
    }
}

#[tokio::test]
async fn the_key_set_is_unavailable_until_the_database_is_reached() {
    let server = Binary::server("postgres://127.0.0.1:1/none").env("METRICS_ADDR", "127.0.0.1:0");
    let server = server.start();
    let address = server.metrics_address().await.parse().expect("an address");
    assert_eq!(http_request(address, "GET", JWKS).await.status, 503);
}

#[tokio::test]
async fn a_change_of_the_algorithm_invalidates_no_token() {
    for (before, after) in [("EdDSA", "HS256"), ("HS256", "EdDSA")] {
        let mut app = App::start_with(with_algorithm(config(), before)).await;
        let ana = app.signed_up("ana").await;
        assert_eq!(algorithm(&ana.tokens().access_token), before);
        assert!(ana.is_session_active().await);
        app.shut_down();
        (&mut app.server_task).await.expect("stopped");

        let restarted = app.start_replica_with(with_algorithm(config(), after)).await;
        let ana = ana.with_channel(&restarted.channel);
        assert!(ana.is_session_active().await);
        assert!(ana.introspect(&ana.tokens().access_token).await.active);
        let tokens = ana.refresh(&ana.tokens().refresh_token).await;
        assert_eq!(algorithm(&tokens.access_token), after);
        for token in [&tokens.access_token, &ana.tokens().access_token] {
            assert!(ana.clone().with_token(token).is_session_active().await);
        }
    }
}

/// First the new secret is the previous one everywhere, and then the two are swapped.
#[tokio::test]
async fn a_rotation_of_the_secret_in_two_steps_fails_no_call() {
    for algorithm in ALGORITHMS {
        let app = App::start_with(with_algorithm(config(), algorithm)).await;
        let ana = app.signed_up("ana").await;
        let replica = async |current: &str, previous: Option<&str>| {
            let config = adjusted(with_algorithm(config(), algorithm), |config| {
                config.tokens.secret_key = Some(current.into());
                config.tokens.secret_key_previous = previous.map(Into::into);
            });
            app.start_replica_with(config).await
        };
        let prepared = replica(SECRET_KEY, Some(NEW_KEY)).await;
        let swapped = replica(NEW_KEY, Some(SECRET_KEY)).await;
        let at = |replica: &Replica| ana.clone().with_channel(&replica.channel);

        // Each pair of neighboring steps serves at the same time.
        let old = ana.tokens().clone();
        assert!(at(&prepared).is_session_active().await);
        let of_prepared = at(&prepared).refresh(&old.refresh_token).await;
        for client in [ana.clone(), at(&swapped)] {
            assert!(client.with_token(&of_prepared.access_token).is_session_active().await);
        }
        let of_swapped = at(&swapped).refresh(&of_prepared.refresh_token).await;
        assert_ne!(kid(&of_swapped.access_token), kid(&of_prepared.access_token));
        assert!(at(&prepared).with_token(&of_swapped.access_token).is_session_active().await);
        at(&prepared).refresh(&of_swapped.refresh_token).await;
        // The first step had published the keys of the second one.
        let (old_keys, new_keys) = (published(SECRET_KEY), published(NEW_KEY));
        let (both, swapped_keys) =
            (list_signing_keys(&at(&prepared)).await, list_signing_keys(&at(&swapped)).await);
        assert_eq!(both, [old_keys.clone(), new_keys.clone()].concat());
        assert_eq!(swapped_keys, [new_keys, old_keys].concat());

        let finished = replica(NEW_KEY, None).await;
        let client = at(&finished).with_token(&of_swapped.access_token);
        assert!(client.is_session_active().await);
        let rejected = client.with_token(&of_prepared.access_token).try_get_user("me").await;
        assert_unauthenticated(rejected, "TOKEN_INVALID");
    }
}

#[derive(Deserialize)]
struct Claims {
    sub: String,
}

/// Verifies a token as another service does, with a key set that it has.
fn verify(key_set: &str, token: &str) -> Option<Claims> {
    let key_set: JwkSet = serde_json::from_str(key_set).expect("a JWK set");
    let key = DecodingKey::from_jwk(key_set.find(&kid(token))?).expect("a key");
    let mut validation = Validation::new(Algorithm::EdDSA);
    validation.set_issuer(&["fast-zero"]);
    validation.set_audience(&["fast-zero"]);
    Some(jsonwebtoken::decode::<Claims>(token, &key, &validation).ok()?.claims)
}

#[tokio::test]
async fn the_key_changes_with_the_month_of_the_database() {
    let database = TestDatabase::create().await;
    let mut clock = MonthEndClock::new(&database).await;
    clock.set(-60).await;
    // A process of its own, because its IDs follow the clock.
    let server = Binary::server(&database.url()).env("METRICS_ADDR", "127.0.0.1:0").start();
    let address = server.address().await.parse().expect("an address");
    let metrics_address = server.metrics_address().await.parse().expect("an address");
    let ana = Client::new(connect(address).await).signed_up("ana").await;
    let old = ana.tokens().access_token.clone();
    assert_eq!(kid(&old), TokenKey::of_month(0).kid());
    assert!(ana.is_session_active().await);
    let key_set = http_request(metrics_address, "GET", JWKS).await.body;

    clock.set(60).await;
    let next = TokenKey::of_month(1);
    wait_until("the next month", async || list_signing_keys(&ana).await[1].kid == next.kid()).await;
    assert!(ana.is_session_active().await, "the token of the last month");
    let new = ana.refresh(&ana.tokens().refresh_token).await.access_token;
    assert_eq!(kid(&new), next.kid());
    assert!(ana.clone().with_token(&new).is_session_active().await);
    for token in [&old, &new] {
        assert_eq!(verify(&key_set, token).expect("valid").sub, ana.user_id());
    }
    let jwt = Jwt::for_client(&ana).claim("exp", seconds_from_now(40 * 24 * 60 * 60));
    for (offset, is_valid) in
        [(-2, false), (-1, false), (0, true), (1, true), (2, true), (3, false)]
    {
        let token = jwt.clone().with_key(TokenKey::of_month(offset)).signed();
        let response = ana.clone().with_token(&token).try_get_user("me").await;
        if is_valid {
            response.expect("valid");
        } else {
            assert_unauthenticated(response, "TOKEN_INVALID");
        }
    }
}

/// A replica with a wrong system clock, and a client of it.
async fn replica(database: &TestDatabase, clock_error: &ClockError) -> (Process, Client) {
    let replica = Binary::server(&database.url()).with_clock_error(clock_error).start();
    let address = replica.address().await.parse().expect("an address");
    (replica, Client::new(connect(address).await))
}

#[tokio::test]
async fn replicas_with_clocks_a_minute_apart_agree_at_the_end_of_a_month() {
    let database = TestDatabase::create().await;
    let mut clock = MonthEndClock::new(&database).await;
    clock.set(-20).await;
    let errors = (ClockError::of(30), ClockError::of(-30));
    let (_ahead, at_ahead) = replica(&database, &errors.0).await;
    let (_behind, at_behind) = replica(&database, &errors.1).await;
    let ana = at_behind.signed_up("ana").await;
    assert_eq!(kid(&ana.tokens().access_token), TokenKey::of_month(0).kid());
    clock.set(20).await;
    let next = TokenKey::of_month(1).kid();
    let mut refresh_token = ana.tokens().refresh_token.clone();
    let mut access_tokens = vec![ana.tokens().access_token.clone()];
    // The replicas notice one after the other.
    wait_until("both replicas sign with the next key", async || {
        let mut signed_with_next = 0;
        for client in [&at_ahead, &at_behind] {
            let tokens = client.refresh(&refresh_token).await;
            refresh_token = tokens.refresh_token;
            signed_with_next += usize::from(kid(&tokens.access_token) == next);
            access_tokens.push(tokens.access_token);
        }
        for (client, token) in [&at_ahead, &at_behind].into_iter().zip(access_tokens.iter().rev()) {
            assert!(client.clone().with_token(token).is_session_active().await);
        }
        signed_with_next == 2
    })
    .await;
    for client in [&at_ahead, &at_behind] {
        for token in &access_tokens {
            assert!(client.clone().with_token(token).is_session_active().await);
        }
    }
}
