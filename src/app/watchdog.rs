//! Tells the service manager that we live, for as long as every part does that others wait for.

use std::{sync::Arc, time::Duration};

use tokio::time::{MissedTickBehavior, interval, timeout};

use crate::{
    http::{Front, websocket::exchange::Exchange},
    relay::Relay,
    systemd,
};

/// Those who must answer: the shards, the hub, and the threads that hold agents.
pub(super) struct Vitals {
    pub(super) relay: Arc<Relay>,
    pub(super) front: Arc<Front>,
    pub(super) exchange: Arc<Exchange>,
}

/// Feeds the watchdog, if there is one, until dropped. Who does not answer in time is named; then nobody is fed, and after
/// `WatchdogSec=` all are ended and started anew.
pub(super) async fn feed(vitals: Vitals) {
    let Some(limit) = systemd::watchdog() else { return };
    let mut pulse = interval(limit / 4);
    pulse.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        pulse.tick().await;
        match vitals.stuck(limit / 2).await {
            None => systemd::alive(),
            Some(who) => tracing::error!("{who} does not answer: the service manager will start us anew"),
        }
    }
}

impl Vitals {
    async fn stuck(&self, patience: Duration) -> Option<String> {
        let (relay, front) = (Arc::clone(&self.relay), Arc::clone(&self.front));
        // Asking waits: for a shard's turn, and for the hub's lock.
        let shards = tokio::task::spawn_blocking(move || relay.stuck());
        let hub = tokio::task::spawn_blocking(move || drop(front.counters()));
        match timeout(patience, shards).await {
            Ok(Ok(None)) => {}
            Ok(Ok(Some(shard))) => return Some(format!("relay shard {shard}")),
            _ => return Some("the relay".to_owned()),
        }
        if timeout(patience, hub).await.is_err() {
            return Some("the hub of signaling".to_owned());
        }
        let threads = timeout(patience, self.exchange.answer()).await;
        threads.is_err().then(|| "a thread that holds agents' connections".to_owned())
    }
}
