//! Connections that fail before their first call: counted by reason, and logged at a bounded rate.

use std::{
    fmt, io,
    net::SocketAddr,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

use crate::telemetry::metrics::Counter;

/// The interval between two warnings with the same reason. A client that fails all the time must
/// not fill the log.
const WARNING_INTERVAL: Duration = Duration::from_secs(10);

/// Why a connection failed before its first call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ConnectionFailure {
    /// The system call failed, for example at the limit of file descriptors.
    Accept,
    /// `MAX_CONNECTIONS` connections are open.
    ConnectionLimit,
    /// The client has `MAX_CONNECTIONS_PER_PEER` open connections.
    ClientConnectionLimit,
    /// The handshake took too long.
    Timeout,
    /// The client disconnected during the handshake, as a TCP health check does.
    Disconnected,
    /// The client does not start with the preface of HTTP/2.
    NotHttp2,
    /// The client speaks TLS, and the server does not.
    TlsToPlaintext,
    /// The server speaks TLS, and the client does not.
    PlaintextToTls,
    /// The client does not offer HTTP/2 (`h2`) by ALPN.
    Alpn,
    /// The client does not accept the certificate of the server.
    ServerCertificate,
    /// The client has no certificate of a CA in `TLS_CLIENT_CA_FILE`.
    ClientCertificate,
    /// Any other failure of a TLS handshake.
    Tls,
}

impl ConnectionFailure {
    const ALL: [Self; 12] = [
        Self::Accept,
        Self::ConnectionLimit,
        Self::ClientConnectionLimit,
        Self::Timeout,
        Self::Disconnected,
        Self::NotHttp2,
        Self::TlsToPlaintext,
        Self::PlaintextToTls,
        Self::Alpn,
        Self::ServerCertificate,
        Self::ClientCertificate,
        Self::Tls,
    ];

    /// Returns the value of the label `reason`.
    fn reason(self) -> &'static str {
        match self {
            Self::Accept => "accept",
            Self::ConnectionLimit => "connection_limit",
            Self::ClientConnectionLimit => "client_connection_limit",
            Self::Timeout => "timeout",
            Self::Disconnected => "disconnected",
            Self::NotHttp2 => "not_http2",
            Self::TlsToPlaintext => "tls_to_plaintext",
            Self::PlaintextToTls => "plaintext_to_tls",
            Self::Alpn => "alpn",
            Self::ServerCertificate => "server_certificate",
            Self::ClientCertificate => "client_certificate",
            Self::Tls => "tls",
        }
    }
}

/// A failed handshake, with its reason.
#[derive(Debug, thiserror::Error)]
#[error("handshake failed")]
pub(crate) struct HandshakeError {
    pub(super) failure: ConnectionFailure,
    source: io::Error,
}

impl HandshakeError {
    pub(super) fn new(failure: ConnectionFailure, source: io::Error) -> Self {
        Self { failure, source }
    }

    /// Creates the error of a read or a write, after the client has disconnected.
    pub(super) fn disconnected(source: io::Error) -> Self {
        Self::new(ConnectionFailure::Disconnected, source)
    }
}

/// Counts failed connections, and logs them.
#[derive(Debug)]
pub(crate) struct FailureLog {
    /// In the order of [`ConnectionFailure::ALL`].
    by_reason: [ReasonLog; ConnectionFailure::ALL.len()],
}

#[derive(Debug)]
struct ReasonLog {
    counter: Counter,
    warnings: Mutex<WarningLimiter>,
}

impl FailureLog {
    /// Creates a log that counts each reason with its counter.
    #[must_use]
    pub(crate) fn new(counter: impl Fn(&'static str) -> Counter) -> Self {
        let by_reason = ConnectionFailure::ALL.map(|failure| ReasonLog {
            counter: counter(failure.reason()),
            warnings: Mutex::default(),
        });
        Self { by_reason }
    }

    /// Counts a failure, and logs a warning unless there was one with the same reason within the
    /// interval.
    pub(super) fn record(
        &self,
        failure: ConnectionFailure,
        peer_addr: Option<SocketAddr>,
        error: &dyn fmt::Display,
    ) {
        let log = &self.by_reason[failure as usize];
        log.counter.inc();
        let (reason, peer_addr) = (failure.reason(), peer_addr.map(tracing::field::display));
        // A TCP health check disconnects every second or so.
        let suppressed = (failure != ConnectionFailure::Disconnected)
            .then(|| log.warnings.lock().unwrap_or_else(PoisonError::into_inner).admit())
            .flatten();
        if let Some(suppressed) = suppressed {
            tracing::warn!(reason, peer_addr, %error, suppressed, "connection failed");
        } else {
            tracing::debug!(reason, peer_addr, %error, "connection failed");
        }
    }
}

/// Admits one warning per interval.
#[derive(Debug, Default)]
struct WarningLimiter {
    last: Option<Instant>,
    suppressed: u64,
}

impl WarningLimiter {
    /// Returns how many warnings were suppressed since the previous one, or `None` if this one is
    /// suppressed, too.
    fn admit(&mut self) -> Option<u64> {
        if self.last.is_some_and(|last| last.elapsed() < WARNING_INTERVAL) {
            self.suppressed += 1;
            return None;
        }
        self.last = Some(Instant::now());
        Some(std::mem::take(&mut self.suppressed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::error_chain::ErrorChain;

    #[test]
    fn an_error_does_not_contain_the_text_of_its_source() {
        let error = HandshakeError::disconnected(io::Error::other("reset"));
        assert_eq!(error.to_string(), "handshake failed");
        assert_eq!(ErrorChain(&error).to_string(), "handshake failed: reset");
    }

    #[test]
    fn each_reason_has_its_own_place_and_name() {
        let mut names: Vec<_> = ConnectionFailure::ALL.map(ConnectionFailure::reason).into();
        for (index, failure) in ConnectionFailure::ALL.into_iter().enumerate() {
            assert_eq!(failure as usize, index, "{failure:?}");
        }
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), ConnectionFailure::ALL.len());
    }

    #[tokio::test(start_paused = true)]
    async fn one_warning_per_interval_is_logged_with_the_number_of_suppressed_ones() {
        let mut warnings = WarningLimiter::default();
        assert_eq!(warnings.admit(), Some(0));
        assert_eq!((warnings.admit(), warnings.admit()), (None, None));
        tokio::time::advance(WARNING_INTERVAL).await;
        assert_eq!((warnings.admit(), warnings.admit()), (Some(2), None));
    }
}
