//! Admission control: permits for calls, streams and large responses, and the memory budget
//! for their messages.

use std::{sync::Arc, time::Duration};

use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::timeout,
};

use super::client_quota::{ClientLimits, ClientQuota};

/// How long a call waits for a permit: a fraction of any deadline, so that a client whose call
/// is shed can try another replica.
///
/// Test: `calls_beyond_the_limit_are_shed_but_health_calls_are_not`.
const QUEUE_TIMEOUT: Duration = Duration::from_millis(500);

/// Memory for each call permit, in KiB: the request, a response that is not large, the
/// overhead of the call, and calls that wait.
///
/// Test: `incomplete_requests_leave_memory_for_others`.
const MEMORY_PER_CALL_KIB: usize = 48;

/// The smallest memory budget, in KiB: a dozen of the largest requests.
///
/// Test: `calls_without_a_body_hold_no_permit`.
const MIN_MEMORY_KIB: usize = 12 * 1024;

/// Large responses that are being produced or sent at once, each up to 1 MiB.
///
/// Test: `large_responses_are_limited_in_total_and_per_client`.
const MAX_LARGE_RESPONSES: usize = 16;

/// Large responses of one client: three quarters, so that others get some.
///
/// Test: `a_client_that_reads_nothing_leaves_memory_for_others`.
const MAX_LARGE_RESPONSES_PER_CLIENT: usize = MAX_LARGE_RESPONSES / 4 * 3;

/// Health calls of one client at once, streams included: more than probes and load balancers
/// have. With the largest metadata, they take 17 MiB.
///
/// Test: `health_calls_are_limited_per_client`.
const MAX_HEALTH_CALLS_PER_CLIENT: usize = 256;

/// Reflection streams at once. Settings limit the streams of the API.
///
/// Test: `streams_are_limited_in_total`.
const MAX_REFLECTION_STREAMS: usize = 1_024;

/// Reflection streams of one client: as many as half of a connection's concurrent streams.
///
/// Test: `streams_are_limited_in_total`.
const MAX_REFLECTION_STREAMS_PER_CLIENT: usize = 64;

/// The server is overloaded and sheds the call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the server is overloaded")]
pub(crate) struct Overloaded;

/// The permits and the memory budget that all calls share.
#[derive(Debug)]
pub(crate) struct Admission {
    calls: Semaphore,
    queue: Semaphore,
    streams: Arc<Semaphore>,
    reflection_streams: Arc<Semaphore>,
    large_responses: Arc<Semaphore>,
    memory_kib: Arc<Semaphore>,
}

/// Memory reserved for one call, released on drop.
#[derive(Debug)]
pub(crate) struct MemoryReservation {
    /// Of the budget, and counted in the quota.
    memory: OwnedSemaphorePermit,
    /// What the call takes besides its messages.
    overhead_kib: u32,
    quota: Arc<ClientQuota>,
}

/// A permit to produce one large response, held until it is sent.
#[derive(Debug)]
pub(crate) struct LargeResponsePermit {
    _client_permit: OwnedSemaphorePermit,
    _global_permit: OwnedSemaphorePermit,
    _quota: Arc<ClientQuota>,
}

/// A permit for one call in flight.
#[derive(Debug)]
pub(crate) struct CallPermit<'a> {
    _client_permit: tokio::sync::SemaphorePermit<'a>,
    _global_permit: tokio::sync::SemaphorePermit<'a>,
}

/// A permit for one open server stream.
#[derive(Debug)]
pub(crate) struct StreamPermit {
    _client_permit: OwnedSemaphorePermit,
    _global_permit: Option<OwnedSemaphorePermit>,
    _quota: Arc<ClientQuota>,
}

/// Returns the limits of each client, for `max_calls` calls in flight, `max_connections` open
/// connections of the client, and its `max_streams` open streams of the API.
///
/// One client may hold all call permits, but only half of the queue.
pub(crate) fn client_limits(
    max_calls: usize,
    max_connections: usize,
    max_streams: usize,
) -> ClientLimits {
    ClientLimits {
        connections: max_connections,
        calls: max_calls + max_calls.div_ceil(2),
        health_calls: MAX_HEALTH_CALLS_PER_CLIENT,
        streams: max_streams,
        reflection_streams: MAX_REFLECTION_STREAMS_PER_CLIENT,
        large_responses: MAX_LARGE_RESPONSES_PER_CLIENT,
    }
}

fn memory_budget_kib(max_calls: usize) -> usize {
    (max_calls * MEMORY_PER_CALL_KIB).max(MIN_MEMORY_KIB)
}

impl Admission {
    /// Creates permits for `max_calls` calls in flight, a queue of the same length, and
    /// `max_streams` open streams of the API.
    #[must_use]
    pub(crate) fn new(max_calls: usize, max_streams: usize) -> Self {
        Self {
            calls: Semaphore::new(max_calls),
            queue: Semaphore::new(max_calls),
            streams: Arc::new(Semaphore::new(max_streams)),
            reflection_streams: Arc::new(Semaphore::new(MAX_REFLECTION_STREAMS)),
            large_responses: Arc::new(Semaphore::new(MAX_LARGE_RESPONSES)),
            memory_kib: Arc::new(Semaphore::new(memory_budget_kib(max_calls))),
        }
    }

    /// Reserves memory for a call that takes `overhead_kib` besides its messages.
    pub(crate) fn reserve(
        &self,
        quota: &Arc<ClientQuota>,
        overhead_kib: u32,
    ) -> Result<MemoryReservation, Overloaded> {
        let memory = self.try_reserve(quota, overhead_kib).ok_or(Overloaded)?;
        Ok(MemoryReservation { memory, overhead_kib, quota: quota.clone() })
    }

    /// Grows a reservation for a message of `message_kib`. Returns `false`, and changes
    /// nothing, if the budget does not allow it.
    #[must_use]
    pub(crate) fn try_grow(&self, reservation: &mut MemoryReservation, message_kib: u32) -> bool {
        let wanted = reservation.overhead_kib.saturating_add(message_kib);
        let missing = wanted.saturating_sub(reservation.size_kib());
        if missing == 0 {
            return true;
        }
        let more = self.try_reserve(&reservation.quota, missing);
        more.map(|more| reservation.memory.merge(more)).is_some()
    }

    /// Waits for the permit to produce a large response, for at most [`QUEUE_TIMEOUT`], and
    /// before there is a response that would occupy memory meanwhile.
    pub(crate) async fn acquire_large_response(
        &self,
        quota: &Arc<ClientQuota>,
    ) -> Result<LargeResponsePermit, Overloaded> {
        let permits = async {
            let client = quota.large_responses.clone().acquire_owned().await;
            let global = self.large_responses.clone().acquire_owned().await;
            client.ok().zip(global.ok())
        };
        let permits = timeout(QUEUE_TIMEOUT, permits).await.map_err(|_| Overloaded)?;
        let (client_permit, global_permit) = permits.ok_or(Overloaded)?;
        Ok(LargeResponsePermit {
            _client_permit: client_permit,
            _global_permit: global_permit,
            _quota: quota.clone(),
        })
    }

    /// Acquires a permit for one call in flight. Waits in the queue for at most
    /// [`QUEUE_TIMEOUT`].
    pub(crate) async fn acquire_call<'a>(
        &'a self,
        quota: &'a ClientQuota,
    ) -> Result<CallPermit<'a>, Overloaded> {
        let client_permit = quota.calls.try_acquire().map_err(|_| Overloaded)?;
        let global_permit = if let Ok(permit) = self.calls.try_acquire() {
            permit
        } else {
            let _queue_slot = self.queue.try_acquire().map_err(|_| Overloaded)?;
            let permit = timeout(QUEUE_TIMEOUT, self.calls.acquire()).await;
            permit.map_err(|_| Overloaded)?.map_err(|_| Overloaded)?
        };
        Ok(CallPermit { _client_permit: client_permit, _global_permit: global_permit })
    }

    /// Acquires a permit for one stream of the API.
    pub(crate) fn acquire_stream(
        &self,
        quota: &Arc<ClientQuota>,
    ) -> Result<StreamPermit, Overloaded> {
        StreamPermit::acquire(&quota.streams, &self.streams, quota)
    }

    /// Acquires a permit for one reflection stream.
    pub(crate) fn acquire_reflection(
        &self,
        quota: &Arc<ClientQuota>,
    ) -> Result<StreamPermit, Overloaded> {
        StreamPermit::acquire(&quota.reflection_streams, &self.reflection_streams, quota)
    }

    /// Acquires a permit for one call of the health service, unary or a stream. Only the
    /// client's own calls can exhaust it, so that others' load never fails a probe.
    pub(crate) fn acquire_health(quota: &Arc<ClientQuota>) -> Result<StreamPermit, Overloaded> {
        let client = quota.health_calls.clone().try_acquire_owned().map_err(|_| Overloaded)?;
        Ok(StreamPermit { _client_permit: client, _global_permit: None, _quota: quota.clone() })
    }

    /// Reserves memory. A client may hold at most as much as is still free (a dynamic threshold):
    /// one that sends only half of its messages, or does not read its responses, leaves half of
    /// the budget to others, and two such clients leave a third.
    fn try_reserve(&self, quota: &ClientQuota, kib: u32) -> Option<OwnedSemaphorePermit> {
        let held = quota.add_memory(kib);
        let available = self.memory_kib.available_permits();
        let memory = (held <= available)
            .then(|| self.memory_kib.clone().try_acquire_many_owned(kib).ok())
            .flatten();
        if memory.is_none() {
            quota.release_memory(kib);
        }
        memory
    }
}

impl StreamPermit {
    fn acquire(
        client: &Arc<Semaphore>,
        global: &Arc<Semaphore>,
        quota: &Arc<ClientQuota>,
    ) -> Result<Self, Overloaded> {
        let client = client.clone().try_acquire_owned().map_err(|_| Overloaded)?;
        let global = global.clone().try_acquire_owned().map_err(|_| Overloaded)?;
        Ok(Self { _client_permit: client, _global_permit: Some(global), _quota: quota.clone() })
    }
}

impl MemoryReservation {
    fn size_kib(&self) -> u32 {
        u32::try_from(self.memory.num_permits()).unwrap_or(u32::MAX)
    }

    /// Shrinks the reservation to what a message of `message_kib` takes, if it is larger.
    pub(crate) fn shrink_to(&mut self, message_kib: u32) {
        let wanted = self.overhead_kib.saturating_add(message_kib);
        let surplus = self.size_kib().saturating_sub(wanted);
        drop(self.memory.split(surplus as usize));
        self.quota.release_memory(surplus);
    }
}

impl Drop for MemoryReservation {
    fn drop(&mut self) {
        self.quota.release_memory(self.size_kib());
    }
}

#[cfg(test)]
impl Admission {
    pub(crate) fn free_memory_kib(&self) -> u32 {
        u32::try_from(self.memory_kib.available_permits()).unwrap_or(u32::MAX)
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;
    use crate::limits::client_quota::ClientQuotas;

    fn quota(quotas: &Arc<ClientQuotas>, client: u32) -> Arc<ClientQuota> {
        quotas.get(Ipv4Addr::from_bits(client).into())
    }

    #[tokio::test(start_paused = true)]
    async fn large_responses_are_limited_in_total_and_per_client() {
        let (admission, quotas) = (Admission::new(1, 1), ClientQuotas::new(client_limits(1, 1, 1)));
        let mut permits = Vec::new();
        for (client, total) in [(1, 12), (2, 16)] {
            let quota = quota(&quotas, client);
            while let Ok(permit) = admission.acquire_large_response(&quota).await {
                permits.push(permit);
            }
            assert_eq!(permits.len(), total, "client {client}");
        }
    }

    #[test]
    fn streams_are_limited_in_total() {
        let (admission, quotas) =
            (Admission::new(1, 100), ClientQuotas::new(client_limits(1, 1, 7)));
        let mut permits = Vec::new();
        for client in 0..32 {
            let quota = quota(&quotas, client);
            while let Ok(permit) = admission.acquire_stream(&quota) {
                permits.push(permit);
            }
            let open = permits.len();
            while let Ok(permit) = admission.acquire_reflection(&quota) {
                permits.push(permit);
            }
            assert!(permits.len() - open <= 64, "client {client}");
        }
        assert_eq!(permits.len(), 100 + 1_024);
    }
}
