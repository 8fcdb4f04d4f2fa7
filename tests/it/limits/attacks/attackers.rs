//! The attackers, on their own thread.

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

/// Attackers from other addresses, on their own thread. Real attackers have other machines, so
/// these have the lowest priority.
pub(super) struct Attackers {
    pub(super) stop: CancellationToken,
    pub(super) steps: Arc<AtomicU64>,
    pub(super) thread: thread::JoinHandle<()>,
}

impl Attackers {
    pub(super) fn start(attack: Attack, service: &Service) -> Self {
        let (stop, steps) = <(CancellationToken, Arc<AtomicU64>)>::default();
        let token = Arc::from(&*service.client.tokens().access_token);
        let (address, client_ip) = (service.address, OTHER_CLIENT_IP);
        let (watchers, steps_of_all) = (service.watchers.clone(), steps.clone());
        let target = Target { address, token, watchers, worker: 0, client_ip, steps: steps_of_all };
        let until = stop.clone();
        let thread = thread::spawn(move || {
            priority::set_lowest();
            let runtime = runtime::Builder::new_current_thread().enable_all().build();
            runtime.expect("a runtime").block_on(async {
                for worker in 0..attack.workers {
                    let client_ip =
                        Ipv4Addr::from_bits(OTHER_CLIENT_IP.to_bits() + worker % attack.addresses);
                    let target = Target { worker, client_ip, ..target.clone() };
                    tokio::spawn(priority::yield_between_polls(repeat(attack, target)));
                }
                until.cancelled().await;
            });
        });
        Self { stop, steps, thread }
    }

    pub(super) fn stop(self) -> u64 {
        self.stop.cancel();
        self.thread.join().expect("the attackers do not panic");
        self.steps.load(Ordering::Relaxed)
    }
}

pub(super) async fn repeat(attack: Attack, target: Target) {
    loop {
        // The server may reject any attack.
        let _ = (attack.work)(target.clone()).await;
        sleep(Duration::from_millis(100)).await;
    }
}
