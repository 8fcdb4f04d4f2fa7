//! The rate limit of sign-ups per client.
//!
//! A sign-up costs a hash and a row, and reveals which usernames and emails exist; so does a
//! change of a username that is rejected. Both count for the client: an IPv4 address or an IPv6
//! /64. The counts live in the memory of the process: each replica has its own.
//!
//! Not governor: a permit that turns out not to count is returned, which its cells cannot do,
//! and its keyed store is not bounded.

use std::{
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use quick_cache::sync::Cache;
use tokio::time::Instant;

use crate::{
    limits::client_quota::client_key,
    rpc::{caller::ClientIp, error::Error},
};

/// The length of a window.
///
/// Test: `a_client_has_a_number_of_sign_ups_a_minute`.
const WINDOW_LEN: Duration = Duration::from_mins(1);

/// Clients with a window, about 150 bytes each, so 3 MiB at most. Beyond, those that were idle
/// for longest are evicted.
///
/// Test: `windows_are_bounded`.
const MAX_CLIENTS: usize = 20_000;

/// Counts the sign-ups of each client in windows of [`WINDOW_LEN`].
#[derive(Debug)]
pub(crate) struct SignUpLimiter {
    max_per_window: u32,
    clients: Cache<IpAddr, Arc<Mutex<Window>>>,
}

/// The sign-ups of a client since the first of the window.
#[derive(Debug, Default)]
struct Window {
    count: u32,
    /// `None` before the first sign-up.
    ends_at: Option<Instant>,
}

impl SignUpLimiter {
    /// Creates a limiter that allows each client `per_minute` sign-ups.
    #[must_use]
    pub(crate) fn new(per_minute: u32) -> Self {
        Self { max_per_window: per_minute, clients: Cache::new(MAX_CLIENTS) }
    }

    /// Acquires a permit for a sign-up.
    ///
    /// # Errors
    /// [`Error::TooManyAttempts`], with the time until the window ends, if there is none left.
    pub(super) fn try_acquire(
        &self,
        ClientIp { ip, .. }: ClientIp,
        now: Instant,
    ) -> Result<SignUpPermit, Error> {
        let new = || Ok::<_, std::convert::Infallible>(Arc::default());
        let Ok(window) = self.clients.get_or_insert_with(&client_key(ip), new);
        let ends_at = lock(&window).count_one(self.max_per_window, now)?;
        Ok(SignUpPermit { window, ends_at, committed: false })
    }
}

impl Window {
    /// Counts a sign-up, and returns the end of its window.
    fn count_one(&mut self, max: u32, now: Instant) -> Result<Instant, Error> {
        let ends_at = self.ends_at.filter(|ends_at| *ends_at > now).unwrap_or_else(|| {
            self.count = 0;
            now + WINDOW_LEN
        });
        self.ends_at = Some(ends_at);
        if self.count >= max {
            return Err(Error::TooManyAttempts { retry_after: ends_at - now });
        }
        self.count += 1;
        Ok(ends_at)
    }
}

/// A permit for one sign-up. Dropping it without [`Self::commit`] returns it.
#[derive(Debug)]
pub(super) struct SignUpPermit {
    window: Arc<Mutex<Window>>,
    ends_at: Instant,
    committed: bool,
}

impl SignUpPermit {
    /// Makes the permit count.
    pub(super) fn commit(mut self) {
        self.committed = true;
    }
}

impl Drop for SignUpPermit {
    fn drop(&mut self) {
        let mut window = lock(&self.window);
        if !self.committed && window.ends_at == Some(self.ends_at) {
            window.count -= 1;
        }
    }
}

fn lock(window: &Mutex<Window>) -> MutexGuard<'_, Window> {
    window.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client_ip(ip: &str) -> ClientIp {
        ClientIp { ip: ip.parse().expect("an address"), via_trusted_proxy: false }
    }

    /// Counts a sign-up. Returns the retry delay if it is rejected.
    fn rejected(limiter: &SignUpLimiter, ip: &str, now: Instant) -> Option<Duration> {
        match limiter.try_acquire(client_ip(ip), now) {
            Ok(permit) => {
                permit.commit();
                None
            }
            Err(Error::TooManyAttempts { retry_after }) => Some(retry_after),
            Err(error) => panic!("{error}"),
        }
    }

    #[test]
    fn a_client_has_a_number_of_sign_ups_a_minute() {
        let (limiter, start) = (SignUpLimiter::new(3), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        for seconds in [0, 10, 20] {
            assert_eq!(rejected(&limiter, "2001:db8::1", at(seconds)), None);
        }
        assert_eq!(rejected(&limiter, "2001:db8::2", at(20)), Some(Duration::from_secs(40)));
        assert_eq!(rejected(&limiter, "2001:db8:0:1::1", at(20)), None, "another network");
        assert_eq!(rejected(&limiter, "192.0.2.1", at(20)), None);
        for _ in 0..3 {
            assert_eq!(rejected(&limiter, "2001:db8::1", at(60)), None, "the next window");
        }
        assert!(rejected(&limiter, "2001:db8::1", at(60)).is_some());
    }

    #[test]
    fn a_dropped_permit_returns_to_its_window() {
        let (limiter, now) = (SignUpLimiter::new(1), Instant::now());
        let permit = limiter.try_acquire(client_ip("192.0.2.1"), now).expect("available");
        assert!(rejected(&limiter, "192.0.2.1", now).is_some());
        drop(permit);
        let early = limiter.try_acquire(client_ip("192.0.2.1"), now).expect("available again");
        let later = now + WINDOW_LEN;
        assert_eq!(rejected(&limiter, "192.0.2.1", later), None);
        drop(early);
        assert!(rejected(&limiter, "192.0.2.1", later).is_some(), "that was another window");
    }

    #[test]
    fn windows_are_bounded() {
        let (limiter, now) = (SignUpLimiter::new(1), Instant::now());
        for bits in 0..u32::try_from(2 * MAX_CLIENTS).expect("few") {
            let ip = IpAddr::from(std::net::Ipv4Addr::from_bits(bits));
            limiter
                .try_acquire(ClientIp { ip, via_trusted_proxy: false }, now)
                .expect("available")
                .commit();
        }
        assert!(limiter.clients.len() <= MAX_CLIENTS, "{}", limiter.clients.len());
    }
}
