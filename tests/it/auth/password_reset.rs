//! `ResetPassword`, with the codes of an operator.

use std::{sync::Arc, time::Instant};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use fast_zero::proto::auth::v1::ResetPasswordRequest;
use tonic::Code;
use tonic_types::StatusExt;

use crate::support::{
    App, PASSWORD,
    app::config_with,
    assert::{assert_invalid, assert_status, assert_unauthenticated},
    operator::{user_command, with_other_bytes},
    parallel::join_all,
    statements::statement_count,
};

const NEW: &str = "a new password";

/// Reset codes of a client that may be wrong within ten minutes.
const MAX_FAILURES: usize = 100;

/// Returns the code with another secret.
fn with_other_secret(code: &str) -> String {
    with_other_bytes(code, 40)
}

#[tokio::test]
async fn a_code_sets_a_password_once_and_ends_all_sessions_and_tokens() {
    let app = App::start().await;
    let (ana, bob) = (app.signed_up("ana").await, app.signed_up("bob").await);
    app.execute(
        "insert into personal_access_tokens
         select id, id, 'a', array['todo.read'], now() + interval '1 day', null,
             sha256('a') from users",
    )
    .await;
    assert!(ana.is_session_active().await);
    let code = app.reset_code("ana").await;
    app.anonymous().reset_password(&code, NEW).await;
    assert!(!ana.is_session_active().await, "at once on this replica");
    let refreshed = ana.try_refresh(&ana.tokens().refresh_token).await;
    assert_unauthenticated(refreshed, "REFRESH_TOKEN_INVALID");
    let owners = "select string_agg(username, ' ') from personal_access_tokens
                  join users on users.id = user_id";
    assert_eq!(app.fetch_scalar::<String>(owners).await, "bob");
    let old = app.anonymous().try_log_in("ana", PASSWORD).await;
    assert_unauthenticated(old, "INCORRECT_CREDENTIALS");
    app.anonymous().logged_in("ana", NEW).await.expect("the new password");
    let again = app.anonymous().try_reset_password(&code, "yet another password").await;
    let status = assert_unauthenticated(again, "RESET_CODE_INVALID");
    assert_eq!(status.message(), "Could not validate reset code");
    assert!(bob.is_session_active().await);
}

#[tokio::test]
async fn all_invalid_fields_are_reported_and_the_code_stays_valid() {
    let app = App::start().await;
    app.create_user("ana-ana-ana").await;
    let code = app.reset_code("ana-ana-ana").await;
    for (code, new, invalid) in [
        ("", "", &["code", "new_password"][..]),
        ("", "short", &["code", "new_password"]),
        ("x", "short", &["new_password"]),
        ("", NEW, &["code"]),
        (&*code, "short", &["new_password"]),
        (&code, &"a".repeat(129), &["new_password"]),
        (&code, "ANA-ana-ana", &["new_password"]),
        (&code, "ana-ana-ana@EXAMPLE.com", &["new_password"]),
    ] {
        let rejected = app.anonymous().try_reset_password(code, new).await;
        assert_invalid(rejected, invalid);
    }
    app.anonymous().reset_password(&code, NEW).await;
}

#[tokio::test]
async fn a_wrong_superseded_or_malformed_code_is_invalid() {
    let app = App::start().await;
    app.create_user("ana").await;
    app.create_user("bob").await;
    let superseded = app.reset_code("ana").await;
    let code = app.reset_code("ana").await;
    for wrong in [
        &*superseded,
        &with_other_secret(&code),
        &with_other_bytes(&code, 12),
        &with_other_bytes(&with_other_bytes(&code, 40), 12),
        "fzr_",
        &code[..73],
        &format!("{code}="),
        &format!(" {code}"),
        &code.replace("fzr_", "fz_"),
        &code.to_uppercase(),
    ] {
        let rejected = app.anonymous().try_reset_password(wrong, NEW).await;
        assert_unauthenticated(rejected, "RESET_CODE_INVALID");
    }
    app.logged_in("ana").await;
    app.anonymous().reset_password(&code, NEW).await;
}

#[tokio::test]
async fn a_reset_code_is_valid_for_half_an_hour() {
    let app = App::start().await;
    app.create_user("ana").await;
    let code = app.reset_code("ana").await;
    let left = "select extract(epoch from expires_at - now())::float8 from password_reset_codes";
    let left = app.fetch_scalar::<f64>(left).await;
    assert!((1_700.0..=1_801.0).contains(&left), "{left}");
    app.execute("update password_reset_codes set expires_at = now()").await;
    let expired = app.anonymous().try_reset_password(&code, NEW).await;
    assert_unauthenticated(expired, "RESET_CODE_INVALID");
    app.logged_in("ana").await;
}

#[tokio::test]
async fn a_password_change_of_an_intruder_leaves_the_open_code() {
    let app = App::start().await;
    let intruder = app.signed_up("ana").await;
    let code = app.reset_code("ana").await;
    intruder.change_password(PASSWORD, "a password of a thief").await;
    app.anonymous().reset_password(&code, NEW).await;
    assert!(!intruder.is_session_active().await);
    app.anonymous().logged_in("ana", NEW).await.expect("the password of the owner");
}

#[tokio::test]
async fn the_database_stores_only_the_hash_of_a_code() {
    let app = App::start().await;
    app.create_user("ana").await;
    let code = app.reset_code("ana").await;
    let stored = "select code_hash from password_reset_codes";
    let stored = app.fetch_scalar::<Vec<u8>>(stored).await;
    let bytes = URL_SAFE_NO_PAD.decode(&code[4..]).expect("base64url");
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, &bytes[16..48]);
    assert_eq!(stored, digest.as_ref());
}

#[tokio::test]
async fn a_reset_clears_the_lockout_so_that_the_user_logs_in_at_once() {
    let app = App::start().await;
    app.create_user("ana").await;
    for login in ["ana", "ana@example.com"] {
        for _ in 0..10 {
            let rejected = app.anonymous().try_log_in(login, "wrong password").await;
            assert_unauthenticated(rejected, "INCORRECT_CREDENTIALS");
        }
        let locked = app.anonymous().try_log_in(login, PASSWORD).await;
        assert_status(locked, Code::ResourceExhausted, "TOO_MANY_ATTEMPTS");
    }
    let code = app.reset_code("ana").await;
    app.anonymous().reset_password(&code, NEW).await;
    for login in ["ana", "ana@example.com"] {
        app.anonymous().logged_in(login, NEW).await.expect("logged in");
    }
}

#[tokio::test]
async fn two_uses_of_one_code_at_once_set_one_password() {
    let app = App::start().await;
    let ana = app.create_user("ana").await;
    for _ in 0..3 {
        let code = Arc::new(app.reset_code(&ana.id).await);
        let resets = (0..8).map(|number| {
            let (anonymous, code) = (app.anonymous(), code.clone());
            async move {
                let password = format!("{NEW} {number}");
                let reset = anonymous.try_reset_password(&code, &password).await;
                if reset.is_err() {
                    assert_unauthenticated(reset, "RESET_CODE_INVALID");
                    return None;
                }
                Some(password)
            }
        });
        let passwords: Vec<_> = join_all(resets).await.into_iter().flatten().collect();
        assert_eq!(passwords.len(), 1, "{passwords:?}");
        app.anonymous().logged_in("ana", &passwords[0]).await.expect("the new password");
    }
}

#[tokio::test]
async fn a_second_use_that_waits_for_the_first_one_changes_nothing() {
    let app = App::start().await;
    app.create_user("ana").await;
    let code = app.reset_code("ana").await;
    let mut lock = app.hold_lock("select from users for no key update").await;
    let reset = |password: &'static str| {
        let (anonymous, code) = (app.anonymous(), code.clone());
        tokio::spawn(async move { anonymous.try_reset_password(&code, password).await.is_ok() })
    };
    let resets = [reset("the first password"), reset("the second password")];
    lock.wait_until_blocked_by(2).await;
    lock.release().await;
    let [first, second] = resets.map(|reset| async { reset.await.expect("no panic") });
    assert!(first.await ^ second.await, "one of them succeeds");
}

#[tokio::test]
async fn a_password_change_that_waits_for_a_reset_changes_nothing() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let code = app.reset_code("ana").await;
    // The reset holds the row of the user, and waits for a session to delete.
    let mut lock = app.hold_lock("select from sessions for update").await;
    let anonymous = app.anonymous();
    let reset = tokio::spawn(async move { anonymous.reset_password(&code, NEW).await });
    lock.wait_until_blocked_by(1).await;
    let change = tokio::spawn(async move { ana.try_change_password(PASSWORD, "of a thief").await });
    lock.wait_until_blocked_by(2).await;
    lock.release().await;
    reset.await.expect("reset");
    assert_unauthenticated(change.await.expect("no panic"), "INCORRECT_CREDENTIALS");
    app.anonymous().logged_in("ana", NEW).await.expect("the password of the reset");
}

#[tokio::test]
async fn a_code_of_a_user_who_is_disabled_meanwhile_is_invalid() {
    let app = App::start().await;
    app.create_user("ana").await;
    let code = app.reset_code("ana").await;
    // As if the code were still there.
    app.execute("update users set disabled_at = now()").await;
    let rejected = app.anonymous().try_reset_password(&code, NEW).await;
    assert_unauthenticated(rejected, "RESET_CODE_INVALID");
    app.execute("update users set disabled_at = null").await;

    let mut lock = app.hold_lock("update users set disabled_at = now()").await;
    let anonymous = app.anonymous();
    let reset = tokio::spawn(async move { anonymous.try_reset_password(&code, NEW).await });
    lock.wait_until_blocking().await;
    lock.release().await;
    assert_unauthenticated(reset.await.expect("no panic"), "RESET_CODE_INVALID");
    let version = "select password_version from users";
    assert_eq!(app.fetch_scalar::<i64>(version).await, 1, "the password is unchanged");
}

#[tokio::test]
async fn a_code_that_is_superseded_while_the_password_is_hashed_is_invalid() {
    let app = App::start().await;
    app.create_user("ana").await;
    let code = app.reset_code("ana").await;
    let mut lock = app.hold_lock("update password_reset_codes set code_hash = sha256('new')").await;
    let anonymous = app.anonymous();
    let reset = tokio::spawn(async move { anonymous.try_reset_password(&code, NEW).await });
    lock.wait_until_blocking().await;
    lock.release().await;
    assert_unauthenticated(reset.await.expect("no panic"), "RESET_CODE_INVALID");
    app.anonymous().logged_in("ana", PASSWORD).await.expect("the password is unchanged");
}

#[tokio::test]
async fn a_disabled_user_gets_no_code_also_if_its_creation_waits_for_the_disabling() {
    let app = App::start().await;
    app.create_user("ana").await;
    let mut lock = app.hold_lock("update users set disabled_at = now()").await;
    let run = user_command(&app.database, &["reset-password", "ana"]);
    let run = tokio::spawn(async move { run.outputs().await });
    lock.wait_until_blocking().await;
    lock.release().await;
    let (code, stdout, stderr) = run.await.expect("no panic");
    assert_eq!((code, &*stdout), (Some(1), ""), "{stderr}");
    assert!(stderr.contains("ana is disabled: run `fast-zero user enable ana` first"), "{stderr}");
    assert_eq!(app.fetch_scalar::<i64>("select count(*) from password_reset_codes").await, 0);
}

#[tokio::test]
async fn guesses_of_codes_are_limited_per_client_and_a_valid_code_is_never_refused() {
    let app = App::start_with(config_with(|config| {
        config.listen.trusted_proxies = vec!["127.0.0.0/8".parse().expect("a network")];
    }))
    .await;
    app.create_user("ana").await;
    let code = app.reset_code("ana").await;
    let wrong = with_other_secret(&code);
    let client = |ip| app.anonymous().with_metadata("x-forwarded-for", ip);
    let guess = async |ip, code: &str| client(ip).try_reset_password(code, NEW).await;
    for _ in 0..MAX_FAILURES {
        // A typo is no guess.
        assert_unauthenticated(guess("192.0.2.1", "fzr_typo").await, "RESET_CODE_INVALID");
    }
    for _ in 0..MAX_FAILURES {
        assert_unauthenticated(guess("192.0.2.1", &wrong).await, "RESET_CODE_INVALID");
    }
    let rejected = guess("192.0.2.1", &wrong).await;
    let status = assert_status(rejected, Code::ResourceExhausted, "TOO_MANY_ATTEMPTS");
    assert!(status.get_error_details().retry_info().is_some(), "{status:?}");
    assert_unauthenticated(guess("192.0.2.2", &wrong).await, "RESET_CODE_INVALID");
    client("192.0.2.1").logged_in("ana", PASSWORD).await.expect("logins are not affected");
    // Others may share the address.
    client("192.0.2.1").reset_password(&code, NEW).await;
}

#[tokio::test]
async fn a_wrong_code_costs_one_statement_and_no_hash_and_a_typo_none() {
    let app = App::start_with(config_with(|config| {
        // A hash of a second, which a test that hashes would wait for.
        config.tokens.argon2_params = argon2::Params::new(19 * 1024, 100, 1, None).expect("valid");
    }))
    .await;
    app.execute(
        "insert into users values ('00000000-0000-7000-8000-000000000001', 'ana', 'ana',
             'ana@example.com', 'ana@example.com', 'no hash', 1, now(), 1)",
    )
    .await;
    let wrong = with_other_secret(&app.reset_code("ana").await);
    for (code, statements, request_id) in
        [(wrong, 1, "reset-wrong"), ("fzr_typo".to_owned(), 0, "reset-typo")]
    {
        let client = app.anonymous().with_metadata("x-request-id", request_id);
        let started = Instant::now();
        let request = ResetPasswordRequest { code, new_password: NEW.into() };
        let rejected = client.auth().reset_password(request).await;
        assert_unauthenticated(rejected, "RESET_CODE_INVALID");
        assert_eq!(statement_count(request_id), statements, "{request_id}");
        assert!(started.elapsed().as_millis() < 900, "{:?}", started.elapsed());
    }
}
