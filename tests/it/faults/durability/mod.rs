//! What was acknowledged outlives every crash.
//!
//! A few users work, each in its own model of what there is. Then PostgreSQL, the server
//! or both are killed in the middle of it and started again, and everything is read and
//! compared with the models. A call that was lost in the crash has two possible outcomes,
//! of which one must be found, as a whole, and stay.

mod service;
mod worker;

use std::{mem, ops::Range, time::Instant};

use fastrand::Rng;
use tokio::{sync::mpsc::unbounded_channel, task::JoinSet};
use tokio_util::sync::CancellationToken;

use self::{service::Service, worker::Worker};
use crate::support::random;

const WORKERS: usize = 8;

/// More sessions than these a worker does not open: far below the limit, at which the
/// service would end the oldest.
const MAX_SESSIONS: usize = 8;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn acknowledged_writes_survive_crashes() {
    outlive(2, 20..60).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes minutes"]
async fn acknowledged_writes_survive_many_crashes() {
    outlive(24, 50..500).await;
}

/// Kills as often, each time after so many acknowledged writes.
async fn outlive(kills: usize, between: Range<usize>) {
    let begun = Instant::now();
    let mut rng = Rng::with_seed(random::seed());
    let mut service = Service::start().await;
    let mut workers = Vec::new();
    for number in 0..WORKERS {
        workers.push(Worker::new(&service, number, rng.fork()).await);
    }
    let mut figures = Figures::default();
    for target in [Target::Both, Target::Postgres, Target::Server].into_iter().cycle().take(kills) {
        let (acknowledge, mut acknowledged) = unbounded_channel();
        let stop = CancellationToken::new();
        let mut working: JoinSet<_> = mem::take(&mut workers)
            .into_iter()
            .map(|worker| worker.work(acknowledge.clone(), stop.clone()))
            .collect();
        drop(acknowledge);
        for _ in 0..rng.usize(between.clone()) {
            acknowledged.recv().await.expect("nothing is lost before the crash");
        }
        service.kill(target);
        stop.cancel();
        while let Some(worker) = working.join_next().await {
            workers.push(worker.expect("no answer was wrong"));
        }
        service.restart(target, &workers[0]).await;
        let checking = workers.into_iter().map(|worker| worker.check(service.channel.clone()));
        let mut checking: JoinSet<_> = checking.collect();
        workers = Vec::new();
        while let Some(checked) = checking.join_next().await {
            let (worker, read_rpc_result) = checked.expect("it is as it should be");
            figures.count(read_rpc_result);
            workers.push(worker);
        }
    }
    let users = service.postgres().fetch_scalar("select count(*)::text from users").await;
    assert_eq!(users, WORKERS.to_string(), "nobody signed up");
    // Faster than an orderly stop of what is thrown away.
    service.kill(Target::Both);

    let sum = |of: fn(&Worker) -> usize| workers.iter().map(of).sum::<usize>();
    let (acknowledged, revoked) =
        (sum(|worker| worker.acknowledged), sum(|worker| worker.revoked.len()));
    let Figures { done, undone } = figures;
    println!(
        "{kills} kills in {:.1?}: {acknowledged} acknowledged writes, {revoked} ended sessions, \
         {} unknown outcomes ({done} done, {undone} not), 0 mismatches",
        begun.elapsed(),
        done + undone,
    );
}

/// What became of the calls whose answer was lost.
#[derive(Default)]
struct Figures {
    done: usize,
    undone: usize,
}

impl Figures {
    fn count(&mut self, read_rpc_result: Option<bool>) {
        match read_rpc_result {
            Some(true) => self.done += 1,
            Some(false) => self.undone += 1,
            None => {}
        }
    }
}

/// What is killed.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Target {
    Both,
    Postgres,
    Server,
}
