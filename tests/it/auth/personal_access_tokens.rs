//! Personal access tokens: their life, their limits, and what they may call.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant, SystemTime},
};

use fast_zero::proto::{
    auth::v1::{CreatePersonalAccessTokenRequest, LogoutScope, PersonalAccessToken, TokenKind},
    todo::v1::{ListTodosRequest, WatchTodosRequest},
};
use prost_types::Timestamp;
use tonic::{Code, Status, Streaming};
use tonic_types::StatusExt;
use uuid::Uuid;

use crate::support::{
    App, Client, PASSWORD, RpcResult,
    app::{config_with, unique_name},
    assert::{assert_invalid, assert_status, assert_unauthenticated},
    changes::next_message,
    messages::methods,
    parallel::join_all,
    personal_access_tokens::{SCOPES, TokenText, in_seconds, new_token},
    process::Binary,
    statements::statement_count,
    time::{assert_recent, uuid_timestamp},
    wait::{wait_until, with_timeout},
};

/// The documentation for operators of secret scanners.
const SECURITY_MODEL: &str =
    include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/security-model.md"));

const SECONDS_PER_DAY: u64 = 24 * 3_600;

const EXPIRE_ALL: &str = "update personal_access_tokens set expires_at = now() - interval '1 s'";

/// Lists the todos of the caller, which needs the scope `todo.read`.
async fn list_todos(client: &Client) -> RpcResult<()> {
    let listed = client.todos().list_todos(ListTodosRequest::default()).await;
    listed.map(|response| response.map(|_| ()))
}

/// Returns `true` if the token of a client is valid. Otherwise asserts the reason.
async fn is_valid(client: &Client) -> bool {
    let result = list_todos(client).await;
    let is_valid = result.is_ok();
    if !is_valid {
        let status = assert_unauthenticated(result, "TOKEN_INVALID");
        assert_eq!(status.message(), "Could not validate credentials");
    }
    is_valid
}

#[tokio::test]
async fn a_token_calls_as_its_user_until_it_is_revoked() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let started_at = SystemTime::now();
    let request = CreatePersonalAccessTokenRequest {
        name: "  backup é ".into(),
        scopes: ["todo.write", "todo.read", "todo.write"].map(str::to_owned).into(),
        ..new_token(&[])
    };
    let expire_time = request.expire_time.expect("a time");
    let created = ana.try_create_token(request).await.expect("created").into_inner();
    let token = created.personal_access_token.expect("a token");
    assert_eq!(token.name, "backup é");
    assert_eq!(token.scopes, ["todo.read", "todo.write"]);
    assert_eq!(token.create_time, Some(uuid_timestamp(&token.id)));
    assert_recent(started_at, Duration::ZERO, token.create_time);
    let expected = Timestamp { nanos: expire_time.nanos / 1_000 * 1_000, ..expire_time };
    assert_eq!(token.expire_time, Some(expected));
    assert_eq!(token.last_used_date, "");
    let text = TokenText::parse(&created.secret);
    assert_eq!(text.user_id.to_string(), ana.user_id());
    assert_eq!(text.id.to_string(), token.id);

    let job = ana.clone().with_token(&created.secret);
    let todo = job.create_todo("by a job").await;
    assert_eq!(ana.get_todo(&todo.id).await.title, "by a job");
    ana.log_out(LogoutScope::ThisSession).await;
    assert!(is_valid(&job).await, "a token needs no session");

    let ana = app.logged_in("ana").await;
    ana.try_revoke_token(&token.id).await.expect("revoked");
    assert!(!is_valid(&job).await);
    let again = ana.try_revoke_token(&token.id).await;
    assert_status(again, Code::NotFound, "PERSONAL_ACCESS_TOKEN_NOT_FOUND");
    assert_eq!(ana.list_tokens().await, []);
}

#[tokio::test]
async fn a_users_tokens_are_listed_newest_first() {
    let app = App::start().await;
    let (ana, bob) = (app.signed_up("ana").await, app.signed_up("bob").await);
    let (first, _) = ana.create_token(&["todo.read"]).await;
    app.execute(EXPIRE_ALL).await;
    let (second, _) = ana.create_token(&SCOPES).await;
    let (other, _) = bob.create_token(&["user.read"]).await;
    assert_eq!(second.scopes, SCOPES);
    let listed = ana.list_tokens().await;
    let ids: Vec<_> = listed.iter().map(|token| &token.id).collect();
    assert_eq!(ids, [&second.id, &first.id], "expired ones, too");
    assert_eq!(listed[0], second);
    assert_eq!(bob.list_tokens().await, std::slice::from_ref(&other));

    for id in [&other.id, &Uuid::now_v7().to_string()] {
        let rejected = ana.try_revoke_token(id).await;
        assert_status(rejected, Code::NotFound, "PERSONAL_ACCESS_TOKEN_NOT_FOUND");
    }
    for invalid in ["", "1", &first.id.to_uppercase()] {
        assert_invalid(ana.try_revoke_token(invalid).await, &["id"]);
    }
    assert_eq!(bob.list_tokens().await, [other]);
}

#[tokio::test]
async fn all_invalid_fields_of_a_new_token_are_reported() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let none = CreatePersonalAccessTokenRequest::default();
    let all = ["name", "scopes", "expire_time", "current_password"];
    assert_invalid(ana.try_create_token(none).await, &all);
    for name in [" ", &"x".repeat(101), "two\nlines", "\0"] {
        let request =
            CreatePersonalAccessTokenRequest { name: name.into(), ..new_token(&["todo.read"]) };
        assert_invalid(ana.try_create_token(request).await, &["name"]);
    }
    for scopes in
        [&["todo.delete"][..], &["todo.read", "*"], &["TODO.READ"], &[""], &[" todo.read"]]
    {
        let status = assert_invalid(ana.try_create_token(new_token(scopes)).await, &["scopes"]);
        assert!(SCOPES.iter().all(|scope| status.message().contains(scope)), "{status:?}");
    }
    let past = Timestamp { seconds: 1, nanos: 0 };
    let odd = |nanos| Timestamp { nanos, ..in_seconds(60) };
    let last = Timestamp { seconds: i64::MAX, nanos: i32::MAX };
    for time in [
        past,
        in_seconds(0),
        in_seconds(366 * SECONDS_PER_DAY + 60),
        odd(-1),
        odd(1_000_000_000),
        Timestamp { seconds: i64::MIN, nanos: i32::MIN },
        last,
    ] {
        let request = CreatePersonalAccessTokenRequest {
            expire_time: Some(time),
            ..new_token(&["todo.read"])
        };
        assert_invalid(ana.try_create_token(request).await, &["expire_time"]);
    }
    assert_eq!(ana.list_tokens().await, []);

    for request in [
        CreatePersonalAccessTokenRequest { name: "🦀".repeat(100), ..new_token(&["todo.read"]) },
        CreatePersonalAccessTokenRequest {
            expire_time: Some(in_seconds(366 * SECONDS_PER_DAY - 60)),
            ..new_token(&["todo.read"])
        },
    ] {
        ana.try_create_token(request).await.expect("created");
    }
}

#[tokio::test]
async fn a_token_needs_the_current_password() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let wrong = || CreatePersonalAccessTokenRequest {
        current_password: "wrong password".into(),
        ..new_token(&["todo.read"])
    };
    for _ in 0..10 {
        let rejected = ana.try_create_token(wrong()).await;
        assert_unauthenticated(rejected, "INCORRECT_CREDENTIALS");
    }
    let rejected = ana.try_create_token(new_token(&["todo.read"])).await;
    assert_status(rejected, Code::ResourceExhausted, "TOO_MANY_ATTEMPTS");
    // The failures also count for a login, as those of a password change.
    let rejected = app.anonymous().try_log_in("ana", PASSWORD).await;
    assert_status(rejected, Code::ResourceExhausted, "TOO_MANY_ATTEMPTS");
    assert_eq!(ana.list_tokens().await, []);
    assert!(ana.is_session_active().await);
}

#[tokio::test]
async fn a_creation_that_waits_for_a_password_change_or_a_disabling_fails() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    ana.list_sessions().await;
    for change in ["password_version = password_version + 1", "disabled_at = now()"] {
        let mut lock = app.hold_lock(format!("update users set {change}").leak()).await;
        let creation = tokio::spawn({
            let ana = ana.clone();
            async move { ana.try_create_token(new_token(&["todo.read"])).await }
        });
        lock.wait_until_blocking().await;
        lock.release().await;
        assert_unauthenticated(creation.await.expect("no panic"), "INCORRECT_CREDENTIALS");
    }
    assert_eq!(app.fetch_scalar::<i64>("select count(*) from personal_access_tokens").await, 0);
}

#[tokio::test]
async fn a_password_change_leaves_tokens() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let (_, job) = ana.with_new_token(&["todo.read"]).await;
    ana.change_password(PASSWORD, "another password").await;
    assert!(is_valid(&job).await);
}

#[tokio::test]
async fn a_user_has_at_most_fifty_tokens_that_have_not_expired() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let creations = (0..60).map(|_| {
        let ana = ana.clone();
        async move { ana.try_create_token(new_token(&["todo.read"])).await }
    });
    let mut created = Vec::new();
    for result in join_all(creations.collect::<Vec<_>>()).await {
        match result {
            Ok(response) => created.push(response.into_inner()),
            Err(error) => {
                let reason = "PERSONAL_ACCESS_TOKEN_LIMIT_REACHED";
                assert_status::<()>(Err(error), Code::FailedPrecondition, reason);
            }
        }
    }
    assert_eq!(created.len(), 50);
    assert_eq!(ana.list_tokens().await.len(), 50);

    let bob = app.signed_up("bob").await;
    bob.create_token(&["todo.read"]).await;
    let one = created[0].personal_access_token.as_ref().expect("a token");
    ana.try_revoke_token(&one.id).await.expect("revoked");
    ana.create_token(&["todo.read"]).await;
    let rejected = ana.try_create_token(new_token(&["todo.read"])).await;
    let reason = "PERSONAL_ACCESS_TOKEN_LIMIT_REACHED";
    assert_status(rejected, Code::FailedPrecondition, reason);
}

#[tokio::test]
async fn a_creation_deletes_the_oldest_expired_tokens() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    app.execute(
        "insert into personal_access_tokens (user_id, id, name, scopes, expires_at, secret_hash)
         select users.id, lpad(to_hex(n), 32, '0')::uuid, n, '{}', now() - interval '1 s' * n,
             sha256('')
         from users, generate_series(1, 100) as n",
    )
    .await;
    let (token, _) = ana.create_token(&["todo.read"]).await;
    let listed = ana.list_tokens().await;
    let names: Vec<_> = listed.iter().map(|token| &*token.name).collect();
    let expired: Vec<_> = (51..=100).rev().map(|n: i32| n.to_string()).collect();
    assert_eq!(names[0], token.name);
    assert_eq!(names[1..], expired);
}

/// A kind of credential, and which methods it may call.
struct CredentialKind {
    name: String,
    token: Option<String>,
    access: ExpectedAccess,
}

enum ExpectedAccess {
    /// Only public ones: others fail with this reason.
    Public(&'static str),
    /// Also those with one of these scopes.
    Scopes(Vec<&'static str>),
    All,
}

impl CredentialKind {
    fn new(name: &str, token: impl Into<Option<String>>, access: ExpectedAccess) -> Self {
        Self { name: name.to_owned(), token: token.into(), access }
    }

    /// Returns every kind of credential.
    async fn all(app: &App) -> Vec<Self> {
        use ExpectedAccess::{All, Public, Scopes};
        let ana = app.signed_up("ana").await;
        let (expired, expired_secret) = ana.create_token(&SCOPES).await;
        let expire = format!(
            "update personal_access_tokens set expires_at = now() - interval '1 s' where id = '{}'",
            expired.id
        );
        app.execute(expire.leak()).await;
        let (revoked, revoked_secret) = ana.create_token(&SCOPES).await;
        ana.try_revoke_token(&revoked.id).await.expect("revoked");
        let ended = app.logged_in("ana").await;
        ended.log_out(LogoutScope::ThisSession).await;
        let deleted = app.signed_up("deleted").await;
        let (_, deleted_secret) = deleted.create_token(&SCOPES).await;
        deleted.try_delete_user("me", "").await.expect("deleted");
        let disabled = app.signed_up("disabled").await;
        let (_, disabled_secret) = disabled.create_token(&SCOPES).await;
        app.operate(&["disable", "disabled"]).await;
        wait_until("the user is cut off", async || !disabled.is_session_active().await).await;
        let session = |client: Client| client.tokens().access_token.clone();
        let mut kinds = vec![
            Self::new("none", None, Public("NOT_AUTHENTICATED")),
            Self::new("garbage", "fz_garbage".to_owned(), Public("TOKEN_INVALID")),
            Self::new("an ended session", session(ended), Public("SESSION_REVOKED")),
            Self::new("a revoked token", revoked_secret, Public("TOKEN_INVALID")),
            Self::new("an expired token", expired_secret, Public("TOKEN_EXPIRED")),
            Self::new("a deleted user's token", deleted_secret, Public("TOKEN_INVALID")),
            Self::new("a disabled user's token", disabled_secret, Public("TOKEN_INVALID")),
            Self::new("a disabled user's session", session(disabled), Public("SESSION_REVOKED")),
            Self::new(
                "a token of all scopes",
                ana.create_token(&SCOPES).await.1,
                Scopes(SCOPES.into()),
            ),
        ];
        for scope in SCOPES {
            let (_, secret) = ana.create_token(&[scope]).await;
            kinds.push(Self::new(&format!("a token of {scope}"), secret, Scopes(vec![scope])));
        }
        // Last, because the calls end it.
        kinds.push(Self::new("a session", session(ana), All));
        kinds
    }

    /// Returns the reason for which the credential may not call a method, if it may not.
    fn expected_reason(&self, access: &str, scope: &str) -> Option<&'static str> {
        match &self.access {
            _ if access == "PUBLIC" => None,
            ExpectedAccess::All => None,
            ExpectedAccess::Public(reason) => Some(reason),
            ExpectedAccess::Scopes(scopes) if scopes.contains(&scope) => None,
            ExpectedAccess::Scopes(_) => Some("SCOPE_MISSING"),
        }
    }
}

/// Returns access and scope of each method, as the binary prints them.
async fn printed_access() -> Vec<(String, String, String)> {
    let (code, printed) = Binary::new(&["methods"]).output().await;
    assert_eq!(code, Some(0), "{printed}");
    // The service for tests is not part of the API.
    let lines = printed.lines().filter(|line| !line.contains("fastzero.test"));
    let rows = lines.filter_map(|line| {
        let mut cells = line.split('|').map(str::trim).skip(1);
        let name = cells.next()?.strip_prefix('`')?.strip_suffix('`')?;
        let (access, scope) = (cells.next()?, cells.next()?);
        Some((format!("/{name}"), access.to_owned(), scope.to_owned()))
    });
    rows.collect()
}

#[tokio::test]
async fn every_kind_of_credential_calls_exactly_its_methods() {
    let app = App::start().await;
    let table = printed_access().await;
    let scopes: BTreeSet<_> = table.iter().map(|(_, _, scope)| &**scope).collect();
    assert_eq!(scopes, ["-"].into_iter().chain(SCOPES).collect());
    for kind in CredentialKind::all(&app).await {
        let mut raw = app.raw_client().await;
        if let Some(token) = &kind.token {
            raw = raw.with_metadata("authorization", format!("Bearer {token}"));
        }
        let mut methods = methods();
        // An empty request of `Logout` ends the session.
        methods.sort_by_key(|method| method.name == "Logout");
        for method in methods {
            let printed = table.iter().find(|(path, ..)| *path == method.path);
            let (_, access, scope) =
                printed.unwrap_or_else(|| panic!("{} is not printed", method.path));
            // A method that may be called rejects the empty message, or responds.
            let result = if method.is_stream {
                raw.first_message(&method.path, &[]).await
            } else {
                raw.call(&method.path, &[]).await
            };
            let expected = kind.expected_reason(access, scope);
            let is_denied = |status: &Status| {
                matches!(status.code(), Code::Unauthenticated | Code::PermissionDenied)
            };
            let denied = result.err().filter(is_denied);
            let reason = denied.as_ref().and_then(StatusExt::get_details_error_info);
            let call = format!("{} with {}", method.name, kind.name);
            assert_eq!(reason.as_ref().map(|it| &*it.reason), expected, "{call}");
            if expected == Some("SCOPE_MISSING") {
                let status = assert_status::<()>(
                    Err(denied.expect("denied")),
                    Code::PermissionDenied,
                    "SCOPE_MISSING",
                );
                let info = status.get_details_error_info().expect("asserted");
                let required = if access == "SESSION" { "" } else { scope };
                assert_eq!(info.metadata["required_scope"], required, "{call}");
            }
        }
    }
}

#[tokio::test]
async fn the_token_comes_before_its_scope_and_both_before_the_request() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let (token, secret) = ana.create_token(&["user.read"]).await;
    let raw = app.raw_client().await.with_metadata("authorization", format!("Bearer {secret}"));
    let raw = raw.with_metadata("grpc-timeout", "soon");
    let rejected = raw.call("/fastzero.todo.v1.TodoService/ListTodos", b"\xff").await;
    let status = assert_status(rejected, Code::PermissionDenied, "SCOPE_MISSING");
    assert_eq!(status.message(), "The token may not call this method");
    ana.try_revoke_token(&token.id).await.expect("revoked");
    let rejected = raw.call("/fastzero.todo.v1.TodoService/ListTodos", b"\xff").await;
    assert_unauthenticated(rejected, "TOKEN_INVALID");
}

#[tokio::test]
async fn only_the_right_secret_reveals_that_a_token_has_expired() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let (_, secret) = ana.create_token(&["todo.read"]).await;
    let job = ana.clone().with_token(&secret);
    // A cached row expires by the clock, without leeway.
    assert!(is_valid(&job).await);
    app.execute("update personal_access_tokens set expires_at = now() + interval '700 ms'").await;
    let replica = app.start_replica().await;
    let there = job.clone().with_channel(&replica.channel);
    wait_until("the token expires", async || list_todos(&there).await.is_err()).await;
    let status = assert_unauthenticated(list_todos(&there).await, "TOKEN_EXPIRED");
    assert!(
        status.get_details_error_info().expect("asserted").metadata.contains_key("server_time")
    );
    let guess = TokenText::parse(&secret).with_wrong_secret().encode();
    let guessing = there.with_token(&guess);
    assert_unauthenticated(list_todos(&guessing).await, "TOKEN_INVALID");
}

#[tokio::test]
async fn no_part_of_a_token_can_be_exchanged() {
    let app = App::start().await;
    let (ana, bob) = (app.signed_up("ana").await, app.signed_up("bob").await);
    let (one, other, bobs) = (
        TokenText::parse(&ana.create_token(&SCOPES).await.1),
        TokenText::parse(&ana.create_token(&SCOPES).await.1),
        TokenText::parse(&bob.create_token(&SCOPES).await.1),
    );
    for text in [
        TokenText { user_id: bobs.user_id, ..one },
        TokenText { id: bobs.id, ..one },
        TokenText { secret: bobs.secret, ..one },
        TokenText { id: other.id, ..one },
        TokenText { user_id: bobs.user_id, id: bobs.id, ..one },
        TokenText { user_id: Uuid::now_v7(), ..one },
        one.with_wrong_secret(),
        one.unknown(),
    ] {
        for _ in 0..2 {
            let rejected = list_todos(&ana.clone().with_token(&text.encode())).await;
            assert_unauthenticated(rejected, "TOKEN_INVALID");
        }
        // Whether or not the rows are cached.
        for valid in [one, other, bobs] {
            assert!(is_valid(&ana.clone().with_token(&valid.encode())).await);
        }
    }
}

#[tokio::test]
async fn a_wrong_checksum_and_a_guess_at_a_cached_token_cost_no_statement() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let (_, secret) = ana.create_token(&["todo.read"]).await;
    let text = TokenText::parse(&secret);
    let count = async |token: &str| {
        let request_id = unique_name("token-");
        let client = ana.clone().with_token(token).with_metadata("x-request-id", &request_id);
        let result = list_todos(&client).await;
        (result.is_ok(), statement_count(&request_id))
    };
    let mut wrong = secret.clone().into_bytes();
    wrong[50] = if wrong[50] == b'A' { b'B' } else { b'A' };
    let wrong = String::from_utf8(wrong).expect("ASCII");
    for malformed in [&*wrong, &secret[..93], &format!("{secret}A"), "fz_", "fz_A"] {
        assert_eq!(count(malformed).await, (false, 0), "{malformed}");
    }
    assert_eq!(count(&text.unknown().encode()).await, (false, 1));
    assert_eq!(count(&secret).await, (true, 2));
    assert_eq!(count(&secret).await, (true, 1));
    assert_eq!(count(&text.with_wrong_secret().encode()).await, (false, 0));
}

#[tokio::test]
async fn the_database_stores_only_the_hash_of_a_token() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let (_, secret) = ana.create_token(&["todo.read"]).await;
    let stored = "select secret_hash from personal_access_tokens";
    let stored: Vec<u8> = app.fetch_scalar(stored).await;
    let digest =
        aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, &TokenText::parse(&secret).secret);
    assert_eq!(stored, digest.as_ref());
}

#[tokio::test]
async fn guesses_are_limited_and_a_valid_token_is_never_refused() {
    let app = App::start_with(config_with(|config| {
        config.listen.trusted_proxies = vec!["127.0.0.0/8".parse().expect("a network")];
    }))
    .await;
    let ana = app.signed_up("ana").await;
    let (_, secret) = ana.create_token(&["todo.read"]).await;
    let text = TokenText::parse(&secret);
    let from =
        |ip: &str, token: &str| ana.clone().with_token(token).with_metadata("x-forwarded-for", ip);
    let guess = |ip: &str| from(ip, &text.unknown().encode());
    for _ in 0..100 {
        assert_unauthenticated(list_todos(&guess("192.0.2.1")).await, "TOKEN_INVALID");
    }
    for guess in [guess("192.0.2.1"), from("192.0.2.1", &text.with_wrong_secret().encode())] {
        let status =
            assert_status(list_todos(&guess).await, Code::ResourceExhausted, "TOO_MANY_ATTEMPTS");
        let delay = status.get_details_retry_info().and_then(|info| info.retry_delay);
        let delay = delay.expect("a delay");
        assert!((9 * 60..=600).contains(&delay.as_secs()), "{delay:?}");
    }
    assert_unauthenticated(list_todos(&guess("192.0.2.2")).await, "TOKEN_INVALID");

    // Not in the cache, and while others of the same address guess.
    let guesses = (0..40).map(|_| {
        let guess = guess("192.0.2.1");
        async move { list_todos(&guess).await.is_ok() }
    });
    let guesses = tokio::spawn(join_all(guesses.collect::<Vec<_>>()));
    for _ in 0..5 {
        let (_, secret) = ana.create_token(&["todo.read"]).await;
        list_todos(&from("192.0.2.1", &secret)).await.expect("a valid token");
    }
    assert!(guesses.await.expect("no panic").iter().all(|is_ok| !is_ok));

    // A service that introspects the tokens of others is not over the limit because of theirs.
    let introspecting = from("192.0.2.3", &ana.create_token(&["token.introspect"]).await.1);
    for _ in 0..102 {
        assert!(!introspecting.introspect(&text.unknown().encode()).await.active);
        assert!(!introspecting.introspect(&text.with_wrong_secret().encode()).await.active);
    }
    assert!(introspecting.introspect(&secret).await.active);
    assert_unauthenticated(list_todos(&guess("192.0.2.3")).await, "TOKEN_INVALID");
}

#[tokio::test]
async fn another_replica_rejects_a_revoked_token_within_five_seconds() {
    let app = App::start().await;
    let replica = app.start_replica().await;
    let ana = app.signed_up("ana").await;
    let (token, here) = ana.with_new_token(&["todo.read"]).await;
    let there = here.clone().with_channel(&replica.channel);
    assert!(is_valid(&here).await && is_valid(&there).await);
    ana.try_revoke_token(&token.id).await.expect("revoked");
    let revoked = Instant::now();
    assert!(!is_valid(&here).await, "immediately on the replica that revoked it");
    wait_until("the other replica rejects the token", async || !is_valid(&there).await).await;
    assert!(revoked.elapsed() < Duration::from_secs(6), "{:?}", revoked.elapsed());
}

async fn watch(client: &Client) -> Streaming<fast_zero::proto::todo::v1::WatchTodosResponse> {
    let mut stream = client.watch_todos(WatchTodosRequest::default()).await;
    assert!(next_message(&mut stream).await.caught_up);
    stream
}

/// Returns the error at the end of a watch.
async fn end_of(mut stream: Streaming<fast_zero::proto::todo::v1::WatchTodosResponse>) -> Status {
    with_timeout("the watch ends", async {
        loop {
            match stream.message().await {
                Ok(Some(_)) => {}
                Ok(None) => panic!("the watch ended without an error"),
                Err(status) => return status,
            }
        }
    })
    .await
}

#[tokio::test]
async fn a_watch_ends_with_its_token_on_any_replica() {
    let app = App::start().await;
    let replica = app.start_replica().await;
    let ana = app.signed_up("ana").await;
    let (token, job) = ana.with_new_token(&["todo.read"]).await;
    let (_, other) = ana.with_new_token(&["todo.read"]).await;
    let (here, there) = (watch(&job).await, watch(&job.with_channel(&replica.channel)).await);
    let (mut others, mut sessions) = (watch(&other).await, watch(&ana).await);
    let started = Instant::now();
    ana.try_revoke_token(&token.id).await.expect("revoked");
    for stream in [here, there] {
        let ended = end_of(stream).await;
        let info = ended.get_details_error_info().expect("a reason");
        assert_eq!((ended.code(), &*info.reason), (Code::Unauthenticated, "TOKEN_INVALID"));
    }
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
    ana.create_todo("others watch on").await;
    for stream in [&mut others, &mut sessions] {
        assert_eq!(next_message(stream).await.changes.len(), 1);
    }
}

#[tokio::test]
async fn a_watch_ends_when_its_token_expires() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let request = CreatePersonalAccessTokenRequest {
        expire_time: Some(in_seconds(2)),
        ..new_token(&["todo.read"])
    };
    let created = ana.try_create_token(request).await.expect("created").into_inner();
    let stream = watch(&ana.clone().with_token(&created.secret)).await;
    let ended = end_of(stream).await;
    let info = ended.get_details_error_info().expect("a reason");
    assert_eq!((ended.code(), &*info.reason), (Code::Unauthenticated, "TOKEN_EXPIRED"));
    assert!(info.metadata.contains_key("server_time"));
}

#[tokio::test]
async fn the_last_use_is_stored_once_a_day() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let (token, job) = ana.with_new_token(&["todo.read"]).await;
    let (introspected, secret) = ana.create_token(&["todo.read"]).await;
    let (unused, _) = ana.create_token(&["todo.read"]).await;
    assert!(ana.introspect(&secret).await.active);
    assert!(is_valid(&job).await);
    let last_used = async |token: &PersonalAccessToken| {
        let tokens = ana.list_tokens().await;
        tokens.into_iter().find(|it| it.id == token.id).expect("listed").last_used_date
    };
    let today: String = app.fetch_scalar("select (now() at time zone 'utc')::date::text").await;
    wait_until("the uses are stored", async || {
        last_used(&token).await == today && last_used(&introspected).await == today
    })
    .await;
    assert_eq!(last_used(&unused).await, "");
    let version = "select string_agg(xmin::text, ' ') from personal_access_tokens";
    let stored: String = app.fetch_scalar(version).await;

    // A replica reads the row, and sees that the day is stored.
    let replica = app.start_replica().await;
    assert!(is_valid(&job.clone().with_channel(&replica.channel)).await);
    assert!(is_valid(&job).await);
    assert_eq!(app.fetch_scalar::<String>(version).await, stored);

    app.execute("update personal_access_tokens set last_used_date = '2026-01-01'").await;
    let replica = app.start_replica().await;
    assert!(is_valid(&job.with_channel(&replica.channel)).await);
    wait_until("the next day is stored", async || last_used(&token).await == today).await;
}

#[tokio::test]
async fn a_use_that_is_not_yet_stored_delays_no_call() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let mut jobs = Vec::new();
    for _ in 0..10 {
        jobs.push(ana.with_new_token(&["todo.read"]).await.1);
    }
    let mut lock = app.hold_lock("lock table personal_access_tokens in share mode").await;
    for job in &jobs {
        assert!(is_valid(job).await);
    }
    // The other connections are free for calls.
    lock.wait_until_blocked_by(1).await;
    lock.release().await;
    let used = "select count(*) from personal_access_tokens where last_used_date is not null";
    wait_until("all uses are stored", async || app.fetch_scalar::<i64>(used).await == 10).await;
}

#[tokio::test]
async fn introspection_describes_both_kinds_of_tokens() {
    let app = App::start().await;
    let (ana, bob) = (app.signed_up("ana").await, app.signed_up("bob").await);
    let (_, service) = bob.with_new_token(&["token.introspect"]).await;
    let (token, secret) = ana.create_token(&["user.read", "todo.read"]).await;
    let response = service.introspect(&secret).await;
    assert!(response.active);
    assert_eq!(response.kind(), TokenKind::PersonalAccessToken);
    assert_eq!((response.user_id, response.session_id), (ana.user_id(), String::new()));
    assert_eq!(response.personal_access_token_id, token.id);
    assert_eq!(response.scopes, ["todo.read", "user.read"]);
    assert_eq!(response.expire_time, token.expire_time);

    let response = service.introspect(&ana.tokens().access_token).await;
    assert_eq!((response.active, response.kind()), (true, TokenKind::AccessToken));
    assert_eq!(response.session_id, ana.tokens().session_id);
    assert_eq!(response.personal_access_token_id, "");
    assert!(response.scopes.is_empty());

    let inactive = <_>::default();
    let text = TokenText::parse(&secret);
    for other in [text.with_wrong_secret(), text.unknown()] {
        assert_eq!(service.introspect(&other.encode()).await, inactive);
    }
    assert_eq!(service.introspect("fz_malformed").await, inactive);
    ana.try_revoke_token(&token.id).await.expect("revoked");
    assert_eq!(service.introspect(&secret).await, inactive);
    let (_, secret) = ana.create_token(&["user.read"]).await;
    app.execute(EXPIRE_ALL).await;
    let ana = app.logged_in("ana").await;
    assert_eq!(ana.introspect(&secret).await, inactive);
}

#[tokio::test]
async fn a_secret_scanner_finds_tokens_by_the_documented_expression() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let (_, secret) = ana.create_token(&["todo.read"]).await;
    assert!(SECURITY_MODEL.contains("`fz_[A-Za-z0-9_-]{91}`"));
    let rest = secret.strip_prefix("fz_").expect("the prefix");
    assert_eq!(rest.len(), 91);
    assert!(rest.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_-".contains(&byte)));
}
