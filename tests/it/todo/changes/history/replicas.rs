//! Two replicas, as processes of their own, and their PostgreSQL, which are killed again and again.

use std::{fmt, ops::Range, path::PathBuf, time::Duration};

use fastrand::Rng;
use nix::sys::signal::Signal;
use tempfile::TempDir;
use tokio::{task::block_in_place, time::Instant};
use tonic::transport::Channel;

use super::World;
use crate::support::{
    app::connect,
    embedded::{Postgres, temp_dir},
    process::{Binary, Process},
    random,
    wait::wait_until,
};

/// Two replicas on their own durable PostgreSQL.
struct Replicas {
    instance_dir: PathBuf,
    /// `None` while it is killed.
    postgres: Option<Postgres>,
    processes: [Process; 2],
    kills: Kills,
    _dir: TempDir,
}

/// How often what was killed.
#[derive(Default)]
struct Kills {
    /// Each time one or both.
    replicas: u32,
    postgres: u32,
    together: u32,
}

impl fmt::Display for Kills {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { replicas, postgres, together } = self;
        write!(
            formatter,
            "{replicas} kills of replicas, {postgres} of PostgreSQL ({together} of them together)"
        )
    }
}

fn start_replica(url: &str) -> Process {
    Binary::server(url).env("RUST_LOG", "warn,fast_zero::server=info").start()
}

async fn channel_to(process: &Process) -> Channel {
    connect(process.address().await.parse().expect("an address")).await
}

impl Replicas {
    fn start() -> Self {
        let dir = temp_dir();
        let instance_dir = dir.path().join("data");
        let postgres = block_in_place(|| Postgres::start(&instance_dir));
        let processes = [start_replica(&postgres.url), start_replica(&postgres.url)];
        Self {
            instance_dir,
            postgres: Some(postgres),
            processes,
            kills: Kills::default(),
            _dir: dir,
        }
    }

    async fn channels(&self) -> [Channel; 2] {
        [channel_to(&self.processes[0]).await, channel_to(&self.processes[1]).await]
    }

    /// Kills and restarts the processes that `number` selects: a replica, PostgreSQL, or several.
    /// Waits until both replicas succeed.
    async fn kill_and_restart(&mut self, number: usize, world: &World, rng: &mut Rng) {
        let first = rng.usize(..2);
        let (killed, kills_postgres): (&[usize], bool) = match number % 5 {
            0 | 3 => (&[first][..], false),
            1 => (&[], true),
            2 => (&[first], true),
            _ => (&[0, 1], rng.bool()),
        };
        let killed = killed.to_vec();
        if kills_postgres {
            let postgres = self.postgres.take().expect("a running process");
            block_in_place(|| postgres.crash(&self.instance_dir));
        }
        for index in &killed {
            self.processes[*index].signal(Signal::SIGKILL);
        }
        self.kills.replicas += u32::try_from(killed.len()).expect("at most two");
        self.kills.postgres += u32::from(kills_postgres);
        self.kills.together += u32::from(kills_postgres && !killed.is_empty());
        if kills_postgres {
            self.postgres = Some(block_in_place(|| Postgres::start(&self.instance_dir)));
        }
        let url = &self.postgres.as_ref().expect("a running process").url;
        for index in killed {
            let process = &mut self.processes[index];
            process.wait().await;
            assert_no_error_logged(process);
            *process = start_replica(url);
            let channel = channel_to(process).await;
            world.channels.lock().expect("not poisoned")[index] = channel;
        }
        let channels = world.channels.lock().expect("not poisoned").clone();
        for channel in &channels {
            let client = world.owners[0].client.clone().with_channel(channel);
            wait_until("a call succeeds", async || client.try_get_user("me").await.is_ok()).await;
        }
    }
}

/// Asserts that no error is logged. An unavailable database is a warning.
fn assert_no_error_logged(process: &Process) {
    let output = process.output();
    assert!(!output.contains("\"level\":\"ERROR\"") && !output.contains("panicked"), "{output}");
}

/// Runs writers and readers, and kills processes after each `between` acknowledged writes, until
/// the duration has passed and there were enough kills, or there is a fault.
pub(super) async fn run_with_kills(
    duration: Duration,
    min_kills: usize,
    between: Range<u64>,
) -> Vec<String> {
    let mut replicas = Replicas::start();
    let channels = replicas.channels().await;
    let world = World::new(channels, true).await;
    let (started, running) = (Instant::now(), world.start());
    let mut rng = Rng::with_seed(random::seed());
    for number in 0.. {
        if !world.faults().is_empty() || number >= min_kills && started.elapsed() >= duration {
            break;
        }
        let until = world.counts.acknowledged.get() + rng.u64(between.clone());
        wait_until("writes are acknowledged", async || {
            world.counts.acknowledged.get() >= until || !world.faults().is_empty()
        })
        .await;
        replicas.kill_and_restart(number, &world, &mut rng).await;
    }
    let channel = channel_to(&replicas.processes[1]).await;
    let faults = world.clone().finish(running, &channel).await;
    replicas.processes.iter().for_each(assert_no_error_logged);
    println!("{:.1?}: {}; {}", started.elapsed(), replicas.kills, world.counts);
    // Faster than a graceful shutdown.
    for process in &replicas.processes {
        process.signal(Signal::SIGKILL);
    }
    let postgres = replicas.postgres.take().expect("a running process");
    block_in_place(|| postgres.crash(&replicas.instance_dir));
    faults
}
