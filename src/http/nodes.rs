//! The hub among other nodes: what passes between it and the engine, and what other nodes offer to agents here.

use std::{
    collections::VecDeque,
    hash::{DefaultHasher, Hash, Hasher},
    net::IpAddr,
};

use bytes::Bytes;
use serde_json::value::to_raw_value;

use super::{
    Front,
    ice::{Elsewhere, IceOffer, Served},
};
use crate::signaling::nodes::{Ear, Errand, NodeId};

/// Other nodes in an ICE list: each one more that a client asks for a relayed address.
const OTHERS: usize = 2;

impl Front {
    /// Is one node of a cluster from now on.
    pub fn join_cluster(&self, node: NodeId, name: &str) {
        let (offer, revocations) = (self.terms().ice.served(), self.revoking.revocations().clone());
        let offer = to_raw_value(&offer).expect("an offer is plain JSON");
        self.switchboard.tell(|hub, now| hub.join_cluster(now, node, name, offer, revocations));
    }

    /// What the hub wants done, once there is something. What the relay has to do with it is done.
    pub async fn errands(&self) -> VecDeque<Errand> {
        let errands = self.switchboard.errands().await;
        for errand in &errands {
            if let Errand::Free(agent) = errand {
                self.revoking.follow(agent);
            }
        }
        errands
    }

    /// Other nodes have said these, in that order.
    pub fn hear(&self, ear: Ear<'_>, words: &[Bytes]) {
        self.switchboard.tell(|hub, now| words.iter().for_each(|word| hub.hear(now, ear, word)));
    }

    /// Nobody hears what was said to these agents, by the numbers of that.
    pub fn nobody(&self, tickets: &[u64]) {
        self.switchboard.tell(|hub, now| tickets.iter().for_each(|ticket| hub.nobody(now, *ticket)));
    }

    /// The engine takes nothing so large.
    pub fn too_large_for_nodes(&self, ticket: u64) {
        self.switchboard.tell(|hub, now| hub.too_large(now, ticket));
    }

    pub fn engine_is_up(&self) {
        self.switchboard.tell(|hub, now| hub.engine_is_up(now));
    }

    pub fn engine_is_down(&self) {
        self.switchboard.tell(|hub, now| hub.engine_is_down(now));
    }

    /// What is offered here has changed.
    pub(super) fn tell_offer(&self, offer: &IceOffer) {
        let offer = to_raw_value(&offer.served()).expect("an offer is plain JSON");
        self.switchboard.tell(|hub, now| hub.set_offer(now, offer));
    }

    /// The agent was revoked, or was given something since it was.
    pub(super) fn tell_revoked(&self, agent: &str) {
        if let Some(revoked) = self.revoking.revocations().of(agent) {
            self.switchboard.tell(|hub, _| hub.tell_revoked(&revoked));
        }
    }

    /// Whether what was said to the other nodes has gone there.
    pub(super) fn is_alone(&self) -> bool {
        self.switchboard.tell(|hub, _| hub.numbers().is_some_and(|numbers| !numbers.is_up))
    }

    /// What an agent may use of other nodes: for one agent mostly the same, for all agents all of them.
    pub(super) fn elsewhere(&self, agent: &str, client: IpAddr) -> Vec<Elsewhere> {
        let mut neighbours = self.switchboard.tell(|hub, _| hub.neighbours());
        neighbours.sort_by_cached_key(|neighbour| {
            let mut hasher = DefaultHasher::new();
            (agent, &neighbour.name).hash(&mut hasher);
            hasher.finish()
        });
        let served = neighbours.iter().filter_map(|one| serde_json::from_str::<Served>(one.offer.get()).ok());
        served.filter_map(|served| served.to(client)).take(OTHERS).collect()
    }
}
