//! Verification of access tokens with the public keys alone: PyJWT, golang-jwt and jsonwebtoken.

use std::{
    fs,
    net::SocketAddr,
    path::Path,
    process::Output,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use aws_lc_rs::hmac;
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    net::TcpListener,
};

use super::{Example, shell, text};
use crate::support::{
    App,
    metrics::config_with_metrics,
    tokens::{Jwt, TokenKey, json_string, month, seconds_from_now},
};

const DOCUMENTATION: &str = include_str!("../../../docs/clients.md");

const JWKS: &str = "/.well-known/jwks.json";

/// A key server that returns the key set once, and fails afterwards.
struct FailingKeyServer {
    address: SocketAddr,
    /// The number of requests.
    requests: Arc<AtomicUsize>,
}

impl FailingKeyServer {
    async fn start(key_set: String) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let requests = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&requests);
        tokio::spawn(async move {
            loop {
                let (mut stream, _) = listener.accept().await.expect("a connection");
                let mut head = BufReader::new(&mut stream).lines();
                while head.next_line().await.expect("text").is_some_and(|line| !line.is_empty()) {}
                let status = match counter.fetch_add(1, Ordering::Relaxed) {
                    0 => "200 OK",
                    _ => "503 Service Unavailable",
                };
                let length = key_set.len();
                let response = format!(
                    "HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n\
                     {key_set}"
                );
                stream.write_all(response.as_bytes()).await.expect("sent");
            }
        });
        Self { address, requests }
    }
}

impl Example {
    /// Verifies tokens in one process.
    async fn verify(&self, key_server: SocketAddr, tokens: &[&str]) -> Output {
        let url = format!("http://{key_server}{JWKS}");
        let variables = [("FASTZERO_JWKS_URL", &*url), ("FASTZERO_ACCESS_TOKEN", tokens[0])];
        let command = format!("{} {}", self.verify_command, tokens[1..].join(" "));
        shell(&command, &self.dir, &variables).await
    }

    /// Verifies valid and invalid tokens.
    pub(super) async fn assert_verifies(&self) {
        let app = App::start_with(config_with_metrics()).await;
        let key_server = app.metrics_address.expect("an admin server");
        let ana = app.signed_up("ana").await;
        let valid = &*ana.tokens().access_token;
        let expected = format!("user: {}\nsession: {}\n", ana.user_id(), ana.tokens().session_id);
        let jwt = Jwt::for_client(&ana);
        let of_month = |offset| jwt.clone().with_key(TokenKey::of_month(offset)).signed();
        let not_before = jwt.clone().claim("nbf", seconds_from_now(-1)).signed();
        let output =
            self.verify(key_server, &[valid, &of_month(-1), &of_month(1), &not_before]).await;
        assert_eq!(text(&output.stdout), expected.repeat(4), "{}", text(&output.stderr));
        assert!(output.status.success());

        let key = TokenKey::of_this_month();
        let public_key = URL_SAFE_NO_PAD.decode(key.public_key()).expect("base64url");
        let other_secret = TokenKey::EdDsa("x".repeat(32), month(0));
        let unknown_kid = jwt.clone().with_key(other_secret.clone()).signed();
        for (fault, token) in [
            ("expired", jwt.clone().claim("exp", seconds_from_now(-60)).signed()),
            ("no expiry", jwt.clone().without_field("exp").signed()),
            ("not valid yet", jwt.clone().claim("nbf", seconds_from_now(60)).signed()),
            ("another issuer", jwt.clone().claim("iss", json_string("other")).signed()),
            ("no issuer", jwt.clone().without_field("iss").signed()),
            ("another audience", jwt.clone().claim("aud", json_string("other")).signed()),
            ("no audience", jwt.clone().without_field("aud").signed()),
            ("no user", jwt.clone().without_field("sub").signed()),
            ("no session", jwt.clone().without_field("sid").signed()),
            ("another type", jwt.clone().header("typ", json_string("JWT")).signed()),
            // PyJWT supports this one.
            (
                "a critical field",
                jwt.clone().header("crit", r#"["b64"]"#).header("b64", "true").signed(),
            ),
            ("another key", jwt.signed_with_key(&other_secret)),
            ("an unknown kid", unknown_kid.clone()),
            ("a retired key", of_month(-2)),
            ("no kid", jwt.clone().without_field("kid").signed()),
            ("no signature", jwt.clone().header("alg", json_string("none")).unsigned()),
            ("HS256", jwt.clone().with_key(TokenKey::of_secret()).signed()),
            ("the public key as secret of HS256", {
                let jwt = jwt.clone().header("alg", json_string("HS256"));
                jwt.signed_with(hmac::HMAC_SHA256, public_key)
            }),
            ("garbage", "garbage".to_owned()),
        ] {
            let output = self.verify(key_server, &[&token]).await;
            let (printed, errors) = (text(&output.stdout), text(&output.stderr));
            assert_eq!(output.status.code(), Some(1), "{fault}: {printed}{errors}");
            assert_eq!(printed, "", "{fault}");
            assert!(errors.contains("invalid token: "), "{fault}: {errors}");
        }

        // The keys stay in use while the key server fails, and unknown ones cause one more fetch.
        let key_server = FailingKeyServer::start(app.http_get(JWKS).await.body).await;
        let tokens = [valid, &unknown_kid, &of_month(-2), &unknown_kid, valid];
        let output = self.verify(key_server.address, &tokens).await;
        let (printed, errors) = (text(&output.stdout), text(&output.stderr));
        assert_eq!(printed, expected.repeat(2), "{errors}");
        assert_eq!(errors.matches("invalid token: ").count(), 3, "{errors}");
        assert_eq!(key_server.requests.load(Ordering::Relaxed), 2, "{errors}");
    }
}

#[test]
fn the_documented_verifiers_are_those_of_the_examples() {
    let (_, section) =
        DOCUMENTATION.split_once("\n### Verify a token yourself\n").expect("a section");
    let section = section.split("\n## ").next().unwrap_or(section);
    let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples");
    for (language, program) in [
        ("rust", "rust/src/bin/verify.rs"),
        ("go", "go/verify/main.go"),
        ("python", "python/verify.py"),
    ] {
        let (_, block) = section.split_once(&format!("```{language}\n")).expect("a program");
        let (block, _) = block.split_once("```").expect("its end");
        let program = fs::read_to_string(examples.join(program)).expect("a program");
        assert!(program.contains(block), "the program contains:\n{block}");
    }
}
