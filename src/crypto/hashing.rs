//! Argon2id hashing of passwords, on a bounded number of threads.

use std::{
    collections::VecDeque,
    fmt,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
};

use argon2::{
    ARGON2ID_IDENT, Algorithm, Argon2, Block, Params, Version,
    password_hash::phc::{self, Output, ParamsString, Salt},
};
use secrecy::{ExposeSecret, SecretString};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use super::password::{CandidatePassword, NewPassword, PasswordHash};
use crate::types::error_chain::BoxError;

/// The number of passwords that may wait for each hashing thread. One hash takes about
/// 25 ms, so the last password in the queue waits less than 500 ms if a CPU is idle. If other
/// threads keep all CPUs busy, hashes give way, and calls that wait for one end at their deadline.
///
/// Test: `passwords_beyond_the_queue_are_rejected`.
const QUEUE_LEN_PER_THREAD: usize = 16;

/// The maximum memory of a stored hash, in KiB: a row that an attacker tampered with must
/// not exhaust the service.
///
/// Test: `a_tampered_hash_does_not_crash_the_server`.
const MAX_STORED_MEMORY_KIB: u32 = 256 * 1024;
/// The maximum number of passes of a stored hash, for the same reason.
///
/// Test: `a_tampered_hash_does_not_crash_the_server`.
const MAX_STORED_PASSES: u32 = 16;

/// The minimum capacity of a hashing buffer, in blocks of 1 KiB. Only blocks that a hash
/// writes to become resident. glibc retains freed allocations of up to 32 MiB for each
/// thread that ever hashed, but returns larger allocations to the system at once.
const MIN_BUFFER_BLOCKS: usize = 33 * 1024;

/// The nice value that is added for a hashing thread: the lowest priority. A hash takes as long
/// as about 100 other calls, which would otherwise wait for it on any core.
const NICENESS: i32 = 19;

const SALT_BYTES: usize = 16;
const OUTPUT_BYTES: usize = 32;

/// Returns the default argon2 parameters: OWASP's minimum for argon2id (19 MiB, two passes,
/// one lane).
#[must_use]
pub fn default_params() -> Params {
    Params::DEFAULT
}

/// An error of hashing or verifying a password.
#[derive(Debug, thiserror::Error)]
pub enum HashingError {
    /// The queue has no free slot.
    #[error("the password hashing queue is full")]
    QueueFull,
    /// The stored hash is malformed, or its parameters are out of bounds.
    #[error("a stored password hash is damaged or out of bounds")]
    StoredHash(#[source] Option<BoxError>),
    /// The hash could not be computed.
    #[error("password hashing failed")]
    Failed(#[source] BoxError),
}

impl HashingError {
    fn failed(error: impl Into<BoxError>) -> Self {
        Self::Failed(error.into())
    }
}

/// The result of verifying a password.
#[derive(Debug)]
pub enum PasswordCheck {
    /// The password differs from the stored one, or there is no stored hash.
    Mismatch,
    /// The password matches. `rehashed` is `Some` if the stored hash has other argon2
    /// parameters than the current ones.
    Match {
        /// A hash of the same password with the current argon2 parameters.
        rehashed: Option<PasswordHash>,
    },
}

/// A bounded pool of threads that hash and verify passwords.
#[derive(Clone, Debug)]
pub struct HashingPool(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    cost: Params,
    /// Verified if there is no user: takes the same time and never matches.
    dummy_hash: PasswordHash,
    /// One permit for each password that is hashed or queued.
    queue_slots: Arc<Semaphore>,
    queue_capacity: usize,
    /// One permit for each password that is hashed, or is the next one of a thread: no thread
    /// waits for the runtime between two passwords.
    thread_permits: Arc<Semaphore>,
    threads: usize,
    work: Mutex<Work>,
    /// Buffers that are reused while the queue is not empty: 19 MiB of fresh memory cost a
    /// page fault for every four blocks.
    spare_buffers: Mutex<Vec<Vec<Block>>>,
}

type Job = Box<dyn FnOnce() + Send>;

/// The work of the hashing threads.
#[derive(Default)]
struct Work {
    next: VecDeque<Job>,
    /// The threads that run. Each ends when there is no next job.
    running: usize,
}

impl fmt::Debug for Work {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Work").field("running", &self.running).finish_non_exhaustive()
    }
}

impl HashingPool {
    /// Creates a pool that hashes up to `threads` passwords at a time with `cost`.
    #[must_use]
    pub fn new(threads: usize, cost: Params) -> Self {
        let queue_capacity = threads * (1 + QUEUE_LEN_PER_THREAD);
        let dummy_hash = phc(&cost, &random::<SALT_BYTES>(), &random::<OUTPUT_BYTES>());
        Self(Arc::new(Shared {
            cost,
            dummy_hash: dummy_hash.expect("random bytes of these lengths make a hash"),
            queue_slots: Arc::new(Semaphore::new(queue_capacity)),
            queue_capacity,
            thread_permits: Arc::new(Semaphore::new(2 * threads)),
            threads,
            work: Mutex::default(),
            spare_buffers: Mutex::default(),
        }))
    }

    /// Acquires a slot in the queue, before any other work for the call. Returns
    /// [`HashingError::QueueFull`] if there is none.
    pub fn try_enqueue(&self) -> Result<QueueSlot, HashingError> {
        let permit = self.0.queue_slots.clone().try_acquire_owned();
        let permit = permit.map_err(|_| HashingError::QueueFull)?;
        Ok(QueueSlot { shared: self.0.clone(), permit: Some(permit) })
    }

    /// Returns the number of passwords that are hashed or queued.
    #[must_use]
    pub fn queue_len(&self) -> usize {
        self.0.queue_capacity.saturating_sub(self.0.queue_slots.available_permits())
    }
}

/// A slot in the queue, for one password.
#[derive(Debug)]
pub struct QueueSlot {
    shared: Arc<Shared>,
    /// `Some` until the slot is dropped.
    permit: Option<OwnedSemaphorePermit>,
}

/// Frees the spare buffers with the last slot, so that an idle service holds none.
impl Drop for QueueSlot {
    fn drop(&mut self) {
        self.permit.take();
        if self.shared.queue_slots.available_permits() == self.shared.queue_capacity {
            self.shared.spare_buffers().clear();
        }
    }
}

impl QueueSlot {
    /// Hashes a new password.
    pub async fn hash(self, password: NewPassword) -> Result<PasswordHash, HashingError> {
        let hashing_thread = self.wait_for_thread().await?;
        hashing_thread.run(move |shared| shared.hash(&password.0)).await
    }

    /// Waits until a thread can take the password next. A call that is dropped before that has cost
    /// no hash.
    pub async fn wait_for_thread(self) -> Result<HashingThread, HashingError> {
        let thread_permit = self
            .shared
            .thread_permits
            .clone()
            .acquire_owned()
            .await
            .map_err(HashingError::failed)?;
        Ok(HashingThread { queue_slot: self, thread_permit })
    }
}

/// A permit to hash one password on a thread.
#[derive(Debug)]
pub struct HashingThread {
    queue_slot: QueueSlot,
    thread_permit: OwnedSemaphorePermit,
}

impl HashingThread {
    /// Verifies a password against the stored hash. Does the same work if there is none.
    pub async fn verify(
        self,
        candidate: CandidatePassword,
        stored: Option<PasswordHash>,
    ) -> Result<PasswordCheck, HashingError> {
        self.run(move |shared| shared.verify(&candidate, stored.as_ref())).await
    }

    /// Runs `work` on a hashing thread, which holds the permits until the end: dropping the call
    /// does not stop the hash, which must still count.
    async fn run<T: Send + 'static>(
        self,
        work: impl FnOnce(&Shared) -> Result<T, HashingError> + Send + 'static,
    ) -> Result<T, HashingError> {
        let (sender, receiver) = oneshot::channel();
        let shared = self.queue_slot.shared.clone();
        let job = Box::new(move || {
            let Self { queue_slot, thread_permit } = self;
            let result = work(&queue_slot.shared);
            // Release the thread before the queue slot: dropping the slot may free the
            // spare buffers.
            drop((thread_permit, queue_slot));
            // The call that waits for the result may have been dropped.
            let _ = sender.send(result);
        });
        shared.start(job)?;
        receiver.await.map_err(HashingError::failed)?
    }
}

impl Shared {
    /// Gives a job to the hashing threads, and starts another one if there are fewer than may run.
    fn start(self: &Arc<Self>, job: Job) -> Result<(), HashingError> {
        let mut work = self.work();
        if work.running < self.threads {
            let shared = self.clone();
            // A thread of the runtime would keep the lower priority for its next work.
            let spawned =
                thread::Builder::new().name("hash".into()).spawn(move || shared.run_jobs());
            match spawned {
                Ok(_) => work.running += 1,
                Err(_) if work.running == 0 => return Err(HashingError::QueueFull),
                // The others take the job.
                Err(_) => {}
            }
        }
        work.next.push_back(job);
        Ok(())
    }

    /// Runs jobs until there are none.
    fn run_jobs(&self) {
        lower_priority();
        while let Some(job) = self.next_job() {
            // The call gets an error, and the thread goes on.
            let _ = catch_unwind(AssertUnwindSafe(job));
        }
    }

    fn next_job(&self) -> Option<Job> {
        let mut work = self.work();
        let job = work.next.pop_front();
        if job.is_none() {
            work.running -= 1;
        }
        job
    }

    fn work(&self) -> MutexGuard<'_, Work> {
        self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Lowers the priority of this thread. If the system forbids it, the priority stays.
fn lower_priority() {
    // On other systems, `nice` would apply to the whole process.
    if cfg!(target_os = "linux") {
        let _ = rustix::process::nice(NICENESS);
    }
}

impl Shared {
    fn hash(&self, password: &SecretString) -> Result<PasswordHash, HashingError> {
        let salt = random::<SALT_BYTES>();
        let output = self.argon2(password, &salt, &self.cost)?;
        phc(&self.cost, &salt, &output).map_err(HashingError::failed)
    }

    fn verify(
        &self,
        candidate: &CandidatePassword,
        stored: Option<&PasswordHash>,
    ) -> Result<PasswordCheck, HashingError> {
        let empty_password = SecretString::default();
        let password = candidate.0.as_ref().unwrap_or(&empty_password);
        let hash = phc::PasswordHash::new(stored.unwrap_or(&self.dummy_hash).as_str())
            .map_err(|error| HashingError::StoredHash(Some(error.into())))?;
        let (cost, salt, expected) = parse_stored(&hash).ok_or(HashingError::StoredHash(None))?;

        let output =
            Output::new(&self.argon2(password, &salt, &cost)?).map_err(HashingError::failed)?;
        // `Output` compares in constant time.
        if output != expected || stored.is_none() || candidate.0.is_none() {
            return Ok(PasswordCheck::Mismatch);
        }
        let outdated = !same_cost(&cost, &self.cost);
        let rehashed = outdated.then(|| self.hash(password)).transpose()?;
        Ok(PasswordCheck::Match { rehashed })
    }

    fn argon2(
        &self,
        password: &SecretString,
        salt: &[u8],
        cost: &Params,
    ) -> Result<[u8; OUTPUT_BYTES], HashingError> {
        let mut memory = self.take_buffer(cost.block_count());
        let mut output = [0; OUTPUT_BYTES];
        Argon2::new(Algorithm::Argon2id, Version::V0x13, cost.clone())
            .hash_password_into_with_memory(
                password.expose_secret().as_bytes(),
                salt,
                &mut output,
                &mut memory[..],
            )
            .map_err(HashingError::failed)?;
        self.spare_buffers().push(memory);
        Ok(output)
    }

    fn take_buffer(&self, blocks: usize) -> Vec<Block> {
        let mut memory = self.spare_buffers().pop().unwrap_or_default();
        memory.reserve(MIN_BUFFER_BLOCKS.max(blocks).saturating_sub(memory.len()));
        memory.resize(blocks, Block::new());
        memory
    }

    fn spare_buffers(&self) -> MutexGuard<'_, Vec<Vec<Block>>> {
        self.spare_buffers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn same_cost(one: &Params, other: &Params) -> bool {
    (one.m_cost(), one.t_cost(), one.p_cost()) == (other.m_cost(), other.t_cost(), other.p_cost())
}

/// Returns the parts of a hash that a comparison needs, or `None` if they are out of bounds.
fn parse_stored(hash: &phc::PasswordHash) -> Option<(Params, Salt, Output)> {
    let output = hash.hash?;
    let stored = Params::try_from(hash).ok()?;
    let within = hash.algorithm == ARGON2ID_IDENT
        && stored.m_cost() <= MAX_STORED_MEMORY_KIB
        && stored.t_cost() <= MAX_STORED_PASSES
        && output.as_bytes().len() == OUTPUT_BYTES;
    within.then_some((stored, hash.salt?, output))
}

fn phc(cost: &Params, salt: &[u8], output: &[u8]) -> Result<PasswordHash, phc::Error> {
    let hash = phc::PasswordHash {
        algorithm: ARGON2ID_IDENT,
        version: Some(Version::V0x13.into()),
        params: ParamsString::try_from(cost).map_err(|_| phc::Error::ParamValueInvalid)?,
        salt: Some(Salt::new(salt)?),
        hash: Some(Output::new(output)?),
    };
    Ok(PasswordHash::from_stored(hash.to_string()))
}

fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    aws_lc_rs::rand::fill(&mut bytes).expect("the system gives random bytes");
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passwords_beyond_the_queue_are_rejected() {
        let pool = HashingPool::new(2, default_params());
        let mut slots = Vec::new();
        let rejected = loop {
            match pool.try_enqueue() {
                Ok(slot) => slots.push(slot),
                Err(error) => break error,
            }
        };
        assert!(matches!(rejected, HashingError::QueueFull), "{rejected}");
        assert_eq!(slots.len(), 2 * (1 + 16));
    }
}
