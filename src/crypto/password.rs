//! Passwords: what they may be, and argon2id on a bounded number of threads.

use std::{
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
};

use argon2::{
    ARGON2ID_IDENT, Algorithm, Argon2, Block, Params, Version,
    password_hash::phc::{self, Output, ParamsString, Salt},
};
use secrecy::{ExposeSecret, SecretString};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use crate::types::{
    error_chain::BoxError,
    invalid::InvalidValue,
    text::{self, LineMode},
};

/// Passwords, in characters.
const PASSWORD_LEN: std::ops::RangeInclusive<usize> = 8..=128;

/// Passwords that may wait for each hashing thread. One hash takes some 25 ms, so the last
/// in the queue waits for under half a second, and for two where all processors are busy.
const QUEUE_LEN_PER_THREAD: usize = 16;

/// The most memory, in KiB, and passes that the hash of a row may ask for: a row
/// that somebody tampered with must not exhaust the service.
const MAX_STORED_MEMORY_KIB: u32 = 256 * 1024;
const MAX_STORED_PASSES: u32 = 16;

/// The least memory that is reserved for a hash, in blocks of 1 KiB; only what a hash
/// writes to becomes resident. glibc keeps freed memory of up to 32 MiB for itself,
/// once for each thread that ever hashed, but gives larger pieces back at once.
const MIN_BUFFER_BLOCKS: usize = 33 * 1024;

/// How much nicer a hashing thread is than others: where both want a processor, it has a
/// quarter of it. A hash takes as long as a hundred other calls, which would wait for it.
const NICENESS: i32 = 5;

const SALT_BYTES: usize = 16;
const OUTPUT_BYTES: usize = 32;

/// The cost of a hash: OWASP's floor for argon2id (19 MiB, two passes, one lane).
#[must_use]
pub fn default_params() -> Params {
    Params::DEFAULT
}

/// A password that may be set. It can only be hashed, not stored.
#[derive(Clone, Debug)]
pub struct NewPassword(SecretString);

impl NewPassword {
    /// 8 to 128 characters after NFC, of any kind but control characters.
    pub fn parse(raw: &str) -> Result<Self, InvalidValue> {
        text::reject_control_chars(raw, LineMode::Single)?;
        let password = text::nfc(raw);
        text::check_length(&password, PASSWORD_LEN)?;
        Ok(Self(password.as_ref().into()))
    }

    /// Refuses a password that is one of the user's names, in any case.
    pub fn check_differs_from(&self, names: &[&str]) -> Result<(), InvalidValue> {
        let folded = text::fold_case(self.0.expose_secret());
        if names.iter().any(|name| text::fold_case(name) == folded) {
            return Err(InvalidValue::new("must not be the username or the e-mail address"));
        }
        Ok(())
    }

    /// Whether both are the same.
    #[must_use]
    pub fn equals(&self, attempt: &CandidatePassword) -> bool {
        attempt.0.as_ref().is_some_and(|attempt| attempt.expose_secret() == self.0.expose_secret())
    }
}

/// A password that somebody claims to be theirs. `None` when it cannot be one.
#[derive(Clone, Debug)]
pub struct CandidatePassword(Option<SecretString>);

impl CandidatePassword {
    /// Any text; one that could not have been set as a password is wrong, after the
    /// same work as any other.
    #[must_use]
    pub fn new(raw: &str) -> Self {
        Self(NewPassword::parse(raw).ok().map(|password| password.0))
    }
}

/// The hash of a password, in the PHC string format.
#[derive(Clone, PartialEq, Eq)]
pub struct PasswordHash(String);

impl PasswordHash {
    /// A hash from the database.
    #[must_use]
    pub fn from_stored(phc: String) -> Self {
        Self(phc)
    }

    /// As the database keeps it.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for PasswordHash {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("PasswordHash(…)")
    }
}

/// Why a password could not be hashed or checked.
#[derive(Debug, thiserror::Error)]
pub enum HashingError {
    /// Too many passwords wait already.
    #[error("the password hashing queue is full")]
    QueueFull,
    /// The stored hash is no hash, or asks for more memory or passes than are allowed.
    #[error("a stored password hash is damaged or out of bounds")]
    StoredHash(#[source] Option<BoxError>),
    /// The hashing itself failed.
    #[error("password hashing failed")]
    Failed(#[source] BoxError),
}

impl HashingError {
    fn failed(error: impl Into<BoxError>) -> Self {
        Self::Failed(error.into())
    }
}

/// What comes of checking a password.
#[derive(Debug)]
pub enum PasswordCheck {
    /// It is another one, or there was none to compare it with.
    Mismatch,
    /// It is the right one. `rehashed` is there when the cost of hashes has changed
    /// since it was set.
    Match {
        /// A hash of the same password with today's cost.
        rehashed: Option<PasswordHash>,
    },
}

/// Hashes and checks passwords, on a few threads at a time.
#[derive(Clone, Debug)]
pub struct HashingPool(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    cost: Params,
    /// Compared with when there is no user: takes as long, and is never right.
    dummy_hash: PasswordHash,
    /// One permit for each password that is hashed or waits.
    queue_slots: Arc<Semaphore>,
    queue_capacity: usize,
    /// One permit for each password that is hashed.
    thread_permit: Arc<Semaphore>,
    /// Memory that the next hash finds ready, while passwords wait: 19 MiB of fresh
    /// pages are a page fault for every four blocks.
    spare_buffers: Mutex<Vec<Vec<Block>>>,
}

impl HashingPool {
    /// Hashes with `cost`, `threads` passwords at a time.
    #[must_use]
    pub fn new(threads: usize, cost: Params) -> Self {
        let queue_capacity = threads * (1 + QUEUE_LEN_PER_THREAD);
        let dummy_hash = phc(&cost, &random::<SALT_BYTES>(), &random::<OUTPUT_BYTES>());
        Self(Arc::new(Shared {
            cost,
            dummy_hash: dummy_hash.expect("random bytes of these lengths make a hash"),
            queue_slots: Arc::new(Semaphore::new(queue_capacity)),
            queue_capacity,
            thread_permit: Arc::new(Semaphore::new(threads)),
            spare_buffers: Mutex::default(),
        }))
    }

    /// Takes a place in the queue, before anything else is done for the call;
    /// [`HashingError::QueueFull`] when it is full.
    pub fn try_enqueue(&self) -> Result<QueueSlot, HashingError> {
        let permit = self.0.queue_slots.clone().try_acquire_owned();
        let permit = permit.map_err(|_| HashingError::QueueFull)?;
        Ok(QueueSlot { shared: self.0.clone(), permit: Some(permit) })
    }

    /// How many passwords are hashed or wait.
    #[must_use]
    pub fn queue_len(&self) -> usize {
        self.0.queue_capacity.saturating_sub(self.0.queue_slots.available_permits())
    }
}

/// A place in the queue, for one password.
#[derive(Debug)]
pub struct QueueSlot {
    shared: Arc<Shared>,
    /// Taken when it is dropped.
    permit: Option<OwnedSemaphorePermit>,
}

/// The last one gives the memory back: an idle service holds none.
impl Drop for QueueSlot {
    fn drop(&mut self) {
        self.permit.take();
        if self.shared.queue_slots.available_permits() == self.shared.queue_capacity {
            self.shared.spare_buffers().clear();
        }
    }
}

impl QueueSlot {
    /// Hashes a password that is to be set.
    pub async fn hash(self, password: NewPassword) -> Result<PasswordHash, HashingError> {
        let turn = self.wait_for_thread().await?;
        turn.run(move |shared| shared.hash(&password.0)).await
    }

    /// Waits until a thread is free. Who goes away before that has cost nothing.
    pub async fn wait_for_thread(self) -> Result<HashingThread, HashingError> {
        let thread_permit = self
            .shared
            .thread_permit
            .clone()
            .acquire_owned()
            .await
            .map_err(HashingError::failed)?;
        Ok(HashingThread { place: self, thread_permit })
    }
}

/// The use of a thread, for one password.
#[derive(Debug)]
pub struct HashingThread {
    place: QueueSlot,
    thread_permit: OwnedSemaphorePermit,
}

impl HashingThread {
    /// Checks a password against the stored hash, or, with the same work, against
    /// none.
    pub async fn verify(
        self,
        attempt: CandidatePassword,
        stored: Option<PasswordHash>,
    ) -> Result<PasswordCheck, HashingError> {
        self.run(move |shared| shared.verify(&attempt, stored.as_ref())).await
    }

    /// Runs on a thread of its own. The turn goes along: a call that is dropped
    /// does not stop its hash, which must still count.
    async fn run<T: Send + 'static>(
        self,
        work: impl FnOnce(&Shared) -> Result<T, HashingError> + Send + 'static,
    ) -> Result<T, HashingError> {
        let (tell, told) = oneshot::channel();
        let hashing = move || {
            let Self { place, thread_permit } = self;
            lower_priority();
            let result = work(&place.shared);
            // The thread before the place, whose end may give the memory back.
            drop((thread_permit, place));
            // Nobody may wait for it any more.
            let _ = tell.send(result);
        };
        // One of the runtime's would be as nice for ever, to whatever it does next.
        thread::Builder::new()
            .name("hash".into())
            .spawn(hashing)
            .map_err(|_| HashingError::QueueFull)?;
        told.await.map_err(HashingError::failed)?
    }
}

/// Lets others go first. Where that is not allowed, it is as fair as before.
fn lower_priority() {
    // Elsewhere it would be the whole process.
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
        attempt: &CandidatePassword,
        stored: Option<&PasswordHash>,
    ) -> Result<PasswordCheck, HashingError> {
        let nobody = SecretString::default();
        let password = attempt.0.as_ref().unwrap_or(&nobody);
        let hash = phc::PasswordHash::new(stored.unwrap_or(&self.dummy_hash).as_str())
            .map_err(|error| HashingError::StoredHash(Some(error.into())))?;
        let (cost, salt, expected) = parse_stored(&hash).ok_or(HashingError::StoredHash(None))?;

        let output =
            Output::new(&self.argon2(password, &salt, &cost)?).map_err(HashingError::failed)?;
        // `Output` compares in constant time.
        if output != expected || stored.is_none() || attempt.0.is_none() {
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

/// The parts of a hash that are needed to compare with it, if they are within bounds.
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
    Ok(PasswordHash(hash.to_string()))
}

fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    aws_lc_rs::rand::fill(&mut bytes).expect("the system gives random bytes");
    bytes
}
