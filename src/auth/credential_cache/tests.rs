//! Tests of the cache, with a paused clock where time passes.

use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::{sync::Notify, task::JoinSet};

use super::*;
use crate::{
    auth::personal_access_tokens::MAX_UNEXPIRED_TOKENS,
    crypto::random_secret::RandomSecret,
    types::id::{PersonalAccessTokenId, SessionId},
};

fn caller() -> Caller {
    session_of(UserId::any())
}

fn session_of(user_id: UserId) -> Caller {
    Caller { user_id, credential: Credential::Session(SessionId::any()) }
}

fn token_of(user_id: UserId) -> Caller {
    let id = PersonalAccessTokenId::any();
    Caller { user_id, credential: Credential::PersonalAccessToken(id) }
}

fn cache() -> CredentialCache {
    CredentialCache::new(SessionCacheMetrics::default())
}

#[expect(clippy::unnecessary_wraps, reason = "the type of a lookup")]
fn active() -> Result<Option<FoundCredential>, Error> {
    let active_until = Instant::now() + Duration::from_hours(1);
    Ok(Some(FoundCredential::Session { active_until }))
}

#[expect(clippy::unnecessary_wraps, reason = "the type of a lookup")]
fn token() -> Result<Option<FoundCredential>, Error> {
    Ok(Some(FoundCredential::PersonalAccessToken(Arc::new(StoredToken {
        user_id: UserId::any(),
        id: PersonalAccessTokenId::any(),
        secret_hash: RandomSecret::generate().hash(),
        scopes: Vec::new(),
        expires_at: time::OffsetDateTime::UNIX_EPOCH,
        last_used_date: None,
        is_use_recorded: false.into(),
    }))))
}

async fn is_active(
    cache: &CredentialCache,
    caller: Caller,
    lookup: impl AsyncFnOnce() -> Result<Option<FoundCredential>, Error>,
) -> Result<bool, Error> {
    cache.find(caller, lookup).await.map(|found| found.is_some())
}

async fn unexpected_lookup() -> Result<Option<FoundCredential>, Error> {
    panic!("the cache needs no lookup")
}

#[tokio::test(start_paused = true)]
async fn a_session_needs_one_lookup_per_ttl() {
    let (sessions, caller) = (cache(), caller());
    assert!(is_active(&sessions, caller, async || active()).await.expect("active"));
    tokio::time::advance(CREDENTIAL_CACHE_TTL.mul_f64(0.999)).await;
    assert!(is_active(&sessions, caller, unexpected_lookup).await.expect("active"));
    tokio::time::advance(CREDENTIAL_CACHE_TTL.mul_f64(0.001)).await;
    assert!(!is_active(&sessions, caller, async || Ok(None)).await.expect("looked up"));
}

#[tokio::test]
async fn concurrent_calls_share_one_lookup() {
    let (sessions, caller) = (Arc::new(cache()), caller());
    let (lookups, begin) = (Arc::new(AtomicUsize::new(0)), Arc::new(Notify::new()));
    let calls: Vec<_> = (0..64)
        .map(|_| {
            let (sessions, lookups, begin) = (sessions.clone(), lookups.clone(), begin.clone());
            tokio::spawn(async move {
                let lookup = async || {
                    lookups.fetch_add(1, Ordering::Relaxed);
                    begin.notified().await;
                    active()
                };
                is_active(&sessions, caller, lookup).await
            })
        })
        .collect();
    begin.notify_one();
    for call in calls {
        assert!(call.await.expect("no panic").expect("active"));
    }
    assert_eq!(lookups.load(Ordering::Relaxed), 1);
    assert_eq!((sessions.metrics.hits.get(), sessions.metrics.misses.get()), (63, 1));
}

#[tokio::test]
async fn a_lookup_that_began_before_a_revocation_does_not_revive_the_session() {
    let (sessions, caller) = (Arc::new(cache()), caller());
    let (began, go_on) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let early = tokio::spawn({
        let (sessions, began, go_on) = (sessions.clone(), began.clone(), go_on.clone());
        async move {
            let lookup = async || {
                began.notify_one();
                go_on.notified().await;
                active()
            };
            is_active(&sessions, caller, lookup).await
        }
    });
    began.notified().await;
    sessions.invalidate(caller.user_id);
    // A later call does not wait for the early lookup, and sees the revocation.
    assert!(!is_active(&sessions, caller, async || Ok(None)).await.expect("looked up"));
    go_on.notify_one();
    assert!(early.await.expect("no panic").expect("active"), "it was active when the lookup began");
    assert!(!is_active(&sessions, caller, unexpected_lookup).await.expect("known"));
}

#[tokio::test]
async fn the_next_call_repeats_a_lookup_that_failed_or_was_dropped() {
    let (sessions, caller) = (Arc::new(cache()), caller());
    let began = Arc::new(Notify::new());
    let dropped = tokio::spawn({
        let (sessions, began) = (sessions.clone(), began.clone());
        async move {
            let lookup = async || {
                began.notify_one();
                std::future::pending().await
            };
            is_active(&sessions, caller, lookup).await
        }
    });
    began.notified().await;
    dropped.abort();
    let failing = async || Err(Error::DeadlineExceeded);
    assert!(is_active(&sessions, caller, failing).await.is_err());
    assert!(is_active(&sessions, caller, async || active()).await.expect("active"));
}

#[tokio::test(start_paused = true)]
async fn calls_that_wait_for_a_lookup_that_fails_fail_with_it() {
    let (sessions, caller) = (Arc::new(cache()), caller());
    let lookups = Arc::new(AtomicUsize::new(0));
    let started = Instant::now();
    let calls = (0..10).map(|_| {
        let (sessions, lookups) = (sessions.clone(), lookups.clone());
        async move {
            let lookup = async || {
                lookups.fetch_add(1, Ordering::Relaxed);
                tokio::time::sleep(Duration::from_secs(2)).await;
                Err(Error::DatabaseUnavailable("timed out".into()))
            };
            is_active(&sessions, caller, lookup).await
        }
    });
    for result in calls.collect::<JoinSet<_>>().join_all().await {
        let error = result.expect_err("the lookup failed");
        assert!(matches!(error, Error::DatabaseUnavailable(_)), "{error:?}");
    }
    assert_eq!(started.elapsed(), Duration::from_secs(2));
    assert_eq!(lookups.load(Ordering::Relaxed), 1);
    assert!(is_active(&sessions, caller, async || active()).await.expect("active"));
}

#[tokio::test]
async fn the_cached_credentials_are_bounded() {
    let cache = cache();
    for _ in 0..MAX_CREDENTIALS {
        let user_id = UserId::any();
        for caller in [session_of(user_id), token_of(user_id)] {
            assert!(is_active(&cache, caller, async || active()).await.expect("active"));
        }
    }
    assert!(cache.users.weight() <= MAX_CREDENTIALS, "{}", cache.users.weight());
}

#[tokio::test(start_paused = true)]
async fn the_credentials_of_a_user_are_bounded() {
    let (cache, user_id) = (cache(), UserId::any());
    let callers: Vec<_> = (0..10 * MAX_CREDENTIALS_PER_USER).map(|_| session_of(user_id)).collect();
    for &caller in &callers {
        tokio::time::advance(Duration::from_millis(1)).await;
        assert!(is_active(&cache, caller, async || active()).await.expect("active"));
    }
    assert_eq!(cache.users.get(&user_id).expect("cached").len(), 66);
    for &newest in callers.iter().rev().take(66) {
        assert!(is_active(&cache, newest, unexpected_lookup).await.expect("cached"));
    }
}

#[tokio::test(start_paused = true)]
async fn all_tokens_of_a_user_need_one_lookup_each() {
    let (cache, user_id) = (cache(), UserId::any());
    let tokens: Vec<_> = (0..MAX_UNEXPIRED_TOKENS).map(|_| token_of(user_id)).collect();
    for &caller in &tokens {
        assert!(is_active(&cache, caller, async || token()).await.expect("found"));
    }
    for _ in 0..3 {
        for &caller in &tokens {
            assert!(is_active(&cache, caller, unexpected_lookup).await.expect("cached"));
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_token_needs_one_lookup_per_ttl_also_if_it_has_expired() {
    let (cache, caller) = (cache(), token_of(UserId::any()));
    assert!(is_active(&cache, caller, async || token()).await.expect("found"));
    assert!(is_active(&cache, caller, unexpected_lookup).await.expect("found"));
    tokio::time::advance(CREDENTIAL_CACHE_TTL).await;
    assert!(!is_active(&cache, caller, async || Ok(None)).await.expect("looked up"));
}

#[tokio::test]
async fn tokens_that_do_not_exist_push_out_no_other() {
    let (cache, known) = (cache(), token_of(UserId::any()));
    assert!(is_active(&cache, known, async || token()).await.expect("found"));
    for _ in 0..10 * MAX_CREDENTIALS_PER_USER {
        for user_id in [known.user_id, UserId::any()] {
            let unknown = token_of(user_id);
            assert!(!is_active(&cache, unknown, async || Ok(None)).await.expect("looked up"));
            // Again, because it may exist by now.
            assert!(is_active(&cache, unknown, async || Err(Error::Overloaded)).await.is_err());
        }
    }
    assert_eq!(cache.len(), 1);
    assert!(is_active(&cache, known, unexpected_lookup).await.expect("cached"));
    assert!(cache.lookups.lock().is_empty());
}

#[tokio::test]
async fn concurrent_calls_of_a_token_that_does_not_exist_share_one_lookup() {
    const CALLS: usize = 64;
    let (cache, caller) = (Arc::new(cache()), token_of(UserId::any()));
    let (started, lookups) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let calls = (0..CALLS).map(|_| {
        let (cache, started, lookups) = (cache.clone(), started.clone(), lookups.clone());
        async move {
            started.fetch_add(1, Ordering::Relaxed);
            let lookup = async || {
                lookups.fetch_add(1, Ordering::Relaxed);
                // The result is not cached, so a call that starts later would look up again.
                while started.load(Ordering::Relaxed) < CALLS {
                    tokio::task::yield_now().await;
                }
                Ok(None)
            };
            is_active(&cache, caller, lookup).await
        }
    });
    for is_active in calls.collect::<JoinSet<_>>().join_all().await {
        assert!(!is_active.expect("looked up"));
    }
    assert_eq!(lookups.load(Ordering::Relaxed), 1);
}
