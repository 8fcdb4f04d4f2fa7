//! The first connection: waiting for the database, and the checks of its encoding.

use std::time::Duration;

use sqlx::{
    ConnectOptions, PgConnection,
    postgres::{PgConnectOptions, PgSslMode},
};
use tokio::time::{Instant, sleep, timeout};

use super::errors::{is_permanent, is_tls_error};
use crate::{rpc::error::Error, types::error_chain::ErrorChain};

/// How long opening a connection may take.
///
/// Test: `an_attempt_to_connect_takes_at_most_two_seconds`.
pub(super) const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// The pause after the first failed attempt. It doubles up to [`MAX_BACKOFF`].
const INITIAL_BACKOFF: Duration = Duration::from_millis(50);

/// The longest pause between two attempts: how long a database may be available before the
/// startup uses it.
///
/// Test: `attempts_to_connect_are_at_most_two_seconds_apart`.
const MAX_BACKOFF: Duration = Duration::from_secs(2);

/// Waits until the database is reachable, for at most `timeout`, and rejects a database that the
/// service cannot use.
pub(crate) async fn connect_and_check(
    options: &PgConnectOptions,
    timeout: Duration,
) -> Result<PgConnection, Error> {
    if matches!(options.get_ssl_mode(), PgSslMode::VerifyCa) {
        tracing::warn!(
            hint = "sslmode=verify-ca accepts certificates of public CAs for any host; use verify-full",
            "database host name not verified"
        );
    }
    let mut connection = connect_with_retry(options, timeout).await?;
    check_encoding(&mut connection).await?;
    Ok(connection)
}

/// Logs each failed attempt, and returns at once where waiting does not help.
async fn connect_with_retry(
    options: &PgConnectOptions,
    max_wait: Duration,
) -> Result<PgConnection, Error> {
    let deadline = Instant::now() + max_wait;
    let mut backoff = INITIAL_BACKOFF;
    loop {
        let error = match timeout(CONNECT_TIMEOUT, options.connect()).await {
            Ok(Ok(connection)) => return Ok(connection),
            Ok(Err(error)) if is_permanent(&error) => return Err(permanent(options, &error)),
            Ok(Err(error)) => Error::from(error),
            Err(_) => Error::DatabaseUnavailable("timed out".into()),
        };
        let (Error::DatabaseUnavailable(source) | Error::Internal(source)) = error else {
            return Err(error);
        };
        if Instant::now() + backoff > deadline {
            let message = format!(
                "cannot reach the database at {} within DATABASE_WAIT_SECONDS: {}",
                display_address(options),
                ErrorChain(&*source)
            );
            return Err(Error::DatabaseUnavailable(message.into()));
        }
        tracing::warn!(
            error = %ErrorChain(&*source),
            host = options.get_host(),
            port = options.get_port(),
            retry_after_ms = u64::try_from(backoff.as_millis()).unwrap_or(u64::MAX),
            "waiting for the database"
        );
        sleep(backoff).await;
        backoff = (backoff * 2).min(MAX_BACKOFF);
    }
}

/// Returns an error that waiting does not fix, with what to change.
fn permanent(options: &PgConnectOptions, error: &sqlx::Error) -> Error {
    let (address, error_text) = (display_address(options), ErrorChain(error).to_string());
    // rustls reads the certificate to verify the handshake, even if it verifies no CA. The type of
    // this error belongs to a crate that sqlx does not export.
    let hint = if error_text.contains("UnsupportedCertVersion") {
        "; the certificate of the server has X.509 version 1, but TLS requires version 3 here, \
         whatever the sslmode: replace it (`openssl req -x509` creates version 3), or set \
         sslmode=disable in DATABASE_URL if the network is trusted"
    } else if is_tls_error(error) {
        "; set sslmode and sslrootcert in DATABASE_URL as the server needs them"
    } else {
        ""
    };
    Error::internal(format!("cannot connect to the database at {address}: {error_text}{hint}"))
}

/// Returns the host and the port, or the directory of the socket.
fn display_address(options: &PgConnectOptions) -> String {
    match options.get_socket() {
        Some(dir) => dir.display().to_string(),
        None => format!("{}:{}", options.get_host(), options.get_port()),
    }
}

/// Rejects a database that cannot store all texts, and warns of one whose own functions fold
/// the case of ASCII letters only.
async fn check_encoding(connection: &mut PgConnection) -> Result<(), Error> {
    let encoding =
        sqlx::query_scalar!(r#"select current_setting('server_encoding') as "encoding!""#)
            .fetch_one(&mut *connection)
            .await?;
    if encoding != "UTF8" {
        let message = format!(
            "the encoding of the database must be UTF8, not {encoding}: create the database with \
             `encoding 'UTF8'`"
        );
        return Err(Error::internal(message));
    }
    // A statement of its own: other encodings may have no Ç.
    let folds = sqlx::query_scalar!(r#"select lower('Ç') = 'ç' as "folds!""#)
        .fetch_one(&mut *connection)
        .await?;
    if !folds {
        let lc_ctype: Option<String> =
            sqlx::query_scalar("select current_setting('lc_ctype', true)")
                .fetch_one(connection)
                .await?;
        tracing::warn!(lc_ctype, "database locale folds ASCII only");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns how long it takes to give up on a database.
    async fn time_to_give_up(options: PgConnectOptions, max_wait: Duration) -> Duration {
        let started = Instant::now();
        let connected = connect_with_retry(&options, max_wait).await;
        assert!(matches!(connected, Err(Error::DatabaseUnavailable(_))), "{connected:?}");
        started.elapsed()
    }

    #[tokio::test(start_paused = true)]
    async fn an_attempt_to_connect_takes_at_most_two_seconds() {
        let silent = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
        let port = silent.local_addr().expect("a bound port").port();
        let options = PgConnectOptions::new_without_pgpass().host("127.0.0.1").port(port);
        let took = time_to_give_up(options, Duration::ZERO).await;
        assert!((2.0..2.5).contains(&took.as_secs_f64()), "{took:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn attempts_to_connect_are_at_most_two_seconds_apart() {
        let options = PgConnectOptions::new_without_pgpass().socket("/nonexistent");
        // The last attempt is at most one pause before the end.
        let took = time_to_give_up(options, Duration::from_mins(1)).await;
        assert!((58.0..=60.0).contains(&took.as_secs_f64()), "{took:?}");
    }
}
