//! Quotas and budgets: what calls may take of the server, in total and per client.
//!
//! ```text
//! connection ─ slot (all, client) ─ handshake timeout ─ concurrent streams ─ header list
//!     │
//! call ─ memory budget (all; client: at most as much as is free) ─ request size
//!     │
//!     ├─ unary ── large response permit (all, client) ── queue ── call permit (all, client)
//!     ├─ stream ─ stream permit (all, client)
//!     └─ health ─ health permit (client)
//!     │
//! response ─ memory budget ─ response read timeout ─ connection drain timeout
//! ```
//!
//! A client is an IPv4 address or an IPv6 /64 ([`client_quota`]). [`admission`] holds the
//! permits and the memory budget. [`owner_writes`] limits the writes to the todos of one owner, which
//! wait for each other in the database, and those of all owners that wait. Limits of a single part are constants of that part: HTTP/2 in
//! `transport`, passwords in `crypto::password`, failed logins in `auth::login_throttle`,
//! sign-ups in `user::sign_up_limit`, pages in `rpc::page_token` and `todo::list`, the pool in
//! `database`. The documentation of each limit names the test that fails without it.

pub(crate) mod admission;
pub(crate) mod client_quota;
pub(crate) mod owner_writes;

use std::time::Duration;

/// The longest time for which a unary call runs, queueing included, and the default if the
/// client sends no `grpc-timeout`. No call has work for this long.
///
/// Test: `the_shorter_timeout_counts`.
pub(crate) const MAX_CALL_TIMEOUT: Duration = Duration::from_secs(5);

/// The largest request message, in bytes. The largest valid one, a description of 10,000
/// characters, has 40 KB; larger ones are read to report what is invalid.
///
/// Test: `a_request_above_1_mib_is_out_of_range_and_the_connection_stays_open`.
pub(crate) const MAX_REQUEST_BYTES: usize = 1024 * 1024;

/// The largest request message of the health and reflection services, in bytes: the name of a
/// service or a type. Clients without credentials may keep such streams open.
///
/// Test: `oversized_requests_of_system_services_are_rejected`.
pub(crate) const MAX_SYSTEM_REQUEST_BYTES: usize = 4 * 1024;
