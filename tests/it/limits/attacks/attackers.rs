//! The attackers, on a thread of their own.

use std::{
    net::Ipv4Addr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use tokio::{runtime, time::sleep};
use tokio_util::sync::CancellationToken;

use super::{Attack, Target, service::Service};
use crate::support::{http2::OTHER_CLIENT_IP, priority};

/// Those who attack, on a thread of their own, as somebody else. Elsewhere they have a
/// machine of their own: here they take what the service and its caller leave.
pub(super) struct Attackers {
    pub(super) stop: CancellationToken,
    pub(super) done: Arc<AtomicU64>,
    pub(super) thread: thread::JoinHandle<()>,
}

impl Attackers {
    pub(super) fn begin(attack: Attack, service: &Service) -> Self {
        let (stop, done) = <(CancellationToken, Arc<AtomicU64>)>::default();
        let token = Arc::from(&*service.caller.tokens().access_token);
        let (address, peer) = (service.address, OTHER_CLIENT_IP);
        let target = Target { address, token, worker: 0, peer, done: done.clone() };
        let until = stop.clone();
        let thread = thread::spawn(move || {
            priority::set_lowest();
            let runtime = runtime::Builder::new_current_thread().enable_all().build();
            runtime.expect("a runtime").block_on(async {
                for worker in 0..attack.workers {
                    let peer =
                        Ipv4Addr::from_bits(OTHER_CLIENT_IP.to_bits() + worker % attack.peers);
                    let target = Target { worker, peer, ..target.clone() };
                    tokio::spawn(priority::yield_between_polls(again_and_again(attack, target)));
                }
                until.cancelled().await;
            });
        });
        Self { stop, done, thread }
    }

    pub(super) fn end(self) -> u64 {
        self.stop.cancel();
        self.thread.join().expect("the attackers do not panic");
        self.done.load(Ordering::Relaxed)
    }
}

pub(super) async fn again_and_again(attack: Attack, target: Target) {
    loop {
        // The server may refuse anything.
        let _ = (attack.work)(target.clone()).await;
        sleep(Duration::from_millis(100)).await;
    }
}
