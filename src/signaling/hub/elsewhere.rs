//! The other nodes of a cluster: whom they have, what is on its way to them, what comes from there, and how a session moves.
//!
//! What is known of other nodes' agents is what presence told, and only of rooms that have an agent of ours. Nobody is routed
//! by it: a frame goes to whoever hears what is said to its receiver, and the answer is the receiver's.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    sync::Arc,
    time::Instant,
};

use bytes::Bytes;
use serde_json::value::RawValue;

use super::{ConnectionId, Hub};
use crate::{
    clock::Now,
    credentials::{
        revocations::Revocations,
        token::{AgentId, Room},
    },
    signaling::{
        message::{FrameId, Unnumbered},
        nodes::{Carried, Ear, Errand, Neighbour, NodeId, Outcome, Wants, Word},
        refusal::Refusal,
    },
};

mod flights; // frames on their way to other nodes, and those that come
mod moving; // agents that come from another node, and go to one
mod neighbours; // that the others live, and what all are told
mod presence; // who is where

/// What a node knows of the others.
#[derive(Debug)]
pub(super) struct Elsewhere {
    node: NodeId,
    name: String,
    /// What we offer to agents, in the shell's words.
    offer: Box<RawValue>,
    /// It has said goodbye.
    has_gone: bool,
    /// The engine can be reached.
    is_up: bool,
    beat_at: Instant,
    nodes: BTreeMap<NodeId, Other>,
    away: HashMap<AgentId, Away>,
    flights: Flights,
    claims: HashMap<u64, AgentId>,
    last_list: u64,
    /// The last that each node has shown.
    lists: BTreeMap<NodeId, u64>,
    /// Lists by which agents may be gone, and when they are; they all have the same time.
    doubts: VecDeque<(Instant, NodeId, Room, u64)>,
    errands: VecDeque<Errand>,
    /// They go together.
    answers: BTreeMap<NodeId, Vec<(u64, Outcome)>>,
    resolved: Vec<(u64, Resolution)>,
    revocations: Revocations,
    numbers: Numbers,
}

/// What is counted of the others. All but `nodes` only grow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Numbers {
    /// The others that live.
    pub nodes: usize,
    /// Whether the engine can be reached.
    pub is_up: bool,
    /// Agents of others in rooms of ours.
    pub away: usize,
    pub frames_out: u64,
    pub frames_in: u64,
    /// Frames whose answer did not come in time.
    pub unanswered: u64,
    /// Sessions that went on here, and on another node.
    pub moved_in: u64,
    pub moved_out: u64,
}

#[derive(Debug)]
struct Other {
    name: String,
    offer: Box<RawValue>,
    heard_at: Instant,
    /// It has been told what we have since it, or the engine, came.
    is_greeted: bool,
}

/// An agent of another node, in a room that has one of ours.
#[derive(Debug)]
struct Away {
    node: NodeId,
    since: u64,
    room: Room,
    card: Option<Arc<RawValue>>,
    /// The list that it was on last; a later one without it says that it is gone.
    list: u64,
}

/// The list of one that was ours, and that no other node has shown yet.
const HANDED: u64 = u64::MAX;

/// Frames on their way, until somebody says what became of them.
#[derive(Debug, Default)]
struct Flights {
    last: u64,
    /// By its ticket: which group a frame belongs to.
    tickets: HashMap<u64, u64>,
    groups: HashMap<u64, Group>,
    /// They all have the same time.
    due: VecDeque<(Instant, u64)>,
    bytes: usize,
}

/// One frame of an agent, to one other or to a room.
#[derive(Debug)]
struct Group {
    tickets: Vec<u64>,
    /// Whose answer has not come.
    left: usize,
    reached: usize,
    to_room: bool,
    refusal: Refusal,
    bytes: usize,
    waits: Waits,
}

/// Who wants to know what became of a frame.
#[derive(Debug)]
pub(super) enum Waits {
    /// Who asked on this connection. On a later one it may mean something else by the same `id`.
    Connection { asked: ConnectionId, id: Option<Box<RawValue>> },
    /// A client of PeerJS.
    Peer { agent: AgentId, serial: u64, to: String },
    /// A request, which the shell holds.
    Request { id: Option<Box<RawValue>> },
}

/// What a request that had to wait is answered.
#[derive(Debug)]
pub struct Resolution {
    pub answer: Bytes,
    pub outcome: Result<(), Refusal>,
}

/// An answer now, or by that number later.
#[derive(Debug)]
pub enum Answered<T> {
    Now(T),
    Later(u64),
}

/// An agent that has come and is not welcomed yet: other nodes are asked first.
#[derive(Debug)]
pub(super) struct Arriving {
    /// What another node may have of it has not come.
    claim: Option<u64>,
    pub(super) until: Instant,
    id: Option<Box<RawValue>>,
    ice: Option<Box<RawValue>>,
    /// Its welcome is the answer to a request.
    request: Option<u64>,
    /// Those that came before the session itself.
    frames: Vec<Carried>,
    /// Its session is one that another node had.
    resumed: bool,
    /// What other nodes have sent to it meanwhile.
    stash: Vec<Stashed>,
    stash_bytes: usize,
    /// Nodes that say that they have it.
    rivals: BTreeSet<NodeId>,
    /// A node that it has gone on to meanwhile; or such a node has said so, and is still to ask.
    next: Option<Claim>,
    is_late: bool,
}

/// What a node asks for that an agent has come to.
#[derive(Clone, Debug)]
struct Claim {
    node: NodeId,
    ticket: u64,
    since: u64,
    wants: Wants,
}

#[derive(Debug)]
struct Stashed {
    node: NodeId,
    ticket: u64,
    from: AgentId,
    serial: u64,
    frame: Unnumbered,
}

impl Elsewhere {
    /// Tells a node what became of a frame, with all that it is to be told in this turn.
    fn answer(&mut self, node: NodeId, ticket: u64, outcome: Outcome) {
        self.answers.entry(node).or_default().push((ticket, outcome));
    }
}

// What the shell asks.
impl Hub {
    /// Is one node of a cluster from now on, called `name` by people. The engine cannot be reached yet.
    pub fn join_cluster(
        &mut self,
        now: Now,
        node: NodeId,
        name: &str,
        offer: Box<RawValue>,
        revocations: Revocations,
    ) {
        // Sessions of different nodes never have the same number.
        self.last_session = node.0 & !u64::from(u32::MAX);
        self.elsewhere = Some(Box::new(Elsewhere {
            node,
            name: name.to_owned(),
            offer,
            has_gone: false,
            is_up: false,
            beat_at: now.mono,
            nodes: BTreeMap::new(),
            away: HashMap::new(),
            flights: Flights::default(),
            claims: HashMap::new(),
            last_list: 0,
            lists: BTreeMap::new(),
            doubts: VecDeque::new(),
            errands: VecDeque::new(),
            answers: BTreeMap::new(),
            resolved: Vec::new(),
            revocations,
            numbers: Numbers::default(),
        }));
    }

    /// What is offered to agents here has changed.
    pub fn set_offer(&mut self, now: Now, offer: Box<RawValue>) {
        let Some(elsewhere) = &mut self.elsewhere else { return };
        if elsewhere.offer.get() != offer.get() {
            elsewhere.offer = offer;
            elsewhere.beat_at = now.mono;
        }
    }

    /// The engine can be reached, perhaps again: whatever was said meanwhile was not heard.
    pub fn engine_is_up(&mut self, now: Now) {
        let Some(elsewhere) = &mut self.elsewhere else { return };
        elsewhere.is_up = true;
        elsewhere.nodes.values_mut().for_each(|other| other.is_greeted = false);
        self.beat(now);
    }

    /// Nothing gets through.
    pub fn engine_is_down(&mut self, now: Now) {
        let Some(elsewhere) = &mut self.elsewhere else { return };
        elsewhere.is_up = false;
        elsewhere.errands.retain(|errand| {
            matches!(errand, Errand::Subscribe(..) | Errand::Unsubscribe(..) | Errand::Free(_))
        });
        elsewhere.answers.clear();
        let groups: Vec<u64> = elsewhere.flights.due.drain(..).map(|(_, group)| group).collect();
        let claims: Vec<AgentId> = elsewhere.claims.drain().map(|(_, agent)| agent).collect();
        groups.into_iter().for_each(|group| self.conclude(now, group));
        claims.iter().for_each(|agent| self.settle(now, agent));
    }

    /// Whether there is anything to be done among the nodes.
    #[must_use]
    pub fn has_errands(&self) -> bool {
        let any = |elsewhere: &Elsewhere| !elsewhere.errands.is_empty() || !elsewhere.answers.is_empty();
        self.elsewhere.as_deref().is_some_and(any)
    }

    /// What is to be done, in order, since this was last asked.
    pub fn take_errands(&mut self) -> VecDeque<Errand> {
        let Some(elsewhere) = &mut self.elsewhere else { return VecDeque::new() };
        for (node, answers) in std::mem::take(&mut elsewhere.answers) {
            elsewhere.errands.push_back(Errand::ToNode(node, Word::Answers { answers }.to_bytes()));
        }
        std::mem::take(&mut elsewhere.errands)
    }

    /// Requests that waited, by their numbers.
    pub fn take_resolved(&mut self) -> Vec<(u64, Resolution)> {
        self.elsewhere.as_mut().map(|elsewhere| std::mem::take(&mut elsewhere.resolved)).unwrap_or_default()
    }

    /// The others that live.
    #[must_use]
    pub fn neighbours(&self) -> Vec<Neighbour> {
        let others = self.elsewhere.iter().flat_map(|elsewhere| elsewhere.nodes.values());
        others.map(|other| Neighbour { name: other.name.clone(), offer: other.offer.clone() }).collect()
    }

    /// `None` without a cluster.
    #[must_use]
    pub fn numbers(&self) -> Option<Numbers> {
        let elsewhere = self.elsewhere.as_ref()?;
        let (nodes, is_up, away) = (elsewhere.nodes.len(), elsewhere.is_up, elsewhere.away.len());
        Some(Numbers { nodes, is_up, away, ..elsewhere.numbers })
    }

    /// Somebody was revoked here, or given something since: as the data dir has it.
    pub fn tell_revoked(&mut self, revoked: &RawValue) {
        self.say_to_all(&Word::Revoked { revoked });
    }

    /// Nobody hears what was said to an agent, by this number.
    pub fn nobody(&mut self, now: Now, ticket: u64) {
        let Some(elsewhere) = &mut self.elsewhere else { return };
        match elsewhere.claims.remove(&ticket) {
            Some(agent) => self.settle(now, &agent),
            None => self.answered(now, ticket, Outcome::PeerUnavailable),
        }
    }

    /// What was said to an agent, by this number, is more than the engine takes in one piece.
    pub fn too_large(&mut self, now: Now, ticket: u64) {
        self.answered(now, ticket, Outcome::TooLarge);
    }

    /// Another node has said something.
    pub fn hear(&mut self, now: Now, ear: Ear<'_>, bytes: &[u8]) {
        let Some((word, rest)) = Word::parse(bytes) else { return };
        match (word, ear) {
            (Word::Routed { node, ticket, kind, from, serial }, Ear::Agent(room, agent)) => {
                let frame = Unnumbered::of_parts(kind, rest);
                self.take_routed(now, room, agent, Stashed { node, ticket, from, serial, frame });
            }
            (Word::Claim { node, ticket, since, wants }, Ear::Agent(room, agent)) => {
                self.claimed(now, room, agent, Claim { node, ticket, since, wants });
            }
            (word, Ear::Node) => self.hear_node(now, word),
            (_, Ear::Agent(..)) => {}
        }
    }

    /// This one, in a cluster.
    fn own_node(&self) -> Option<NodeId> {
        Some(self.elsewhere.as_ref()?.node)
    }

    fn hear_node(&mut self, now: Now, word: Word<'_>) {
        match word {
            Word::Answers { answers } => {
                answers.into_iter().for_each(|(ticket, outcome)| self.answered(now, ticket, outcome));
            }
            Word::Held { node, ticket, room, agent, held } => {
                self.held(now, node, ticket, &room, &agent, held)
            }
            Word::Present { node, room, asks, cares, list, is_last, agents } => {
                self.listed_by(now, node, &room, agents, (list, is_last));
                if asks && is_last {
                    self.say_present(node, &room, false);
                }
                if cares {
                    self.meet(node, &room);
                }
            }
            Word::Empty { node, room } => {
                if let Some(gathering) = self.rooms.get_mut(&room) {
                    gathering.nodes.remove(&node);
                }
            }
            Word::Came { node, room, moved, agent } => {
                self.came(now, node, &room, agent, moved);
                if self.rooms.contains_key(&room) {
                    self.meet(node, &room);
                } else {
                    self.say_empty(node, &room);
                }
            }
            Word::Changed { node, room, agent } => self.changed(now, node, &room, agent),
            Word::Went { node, room, agent } => {
                if self.is_away_at(node, &room, &agent) {
                    self.lose(now, &agent);
                }
            }
            Word::Took { node, room, agent, since } => self.took(now, node, &room, &agent, since),
            Word::Yielded { agent, since } => self.yielded(&agent, since),
            Word::Beat { node, name, offer } => self.hear_beat(now, node, name, offer),
            Word::Bye { node } => self.forget_node(now, node),
            Word::Revoked { revoked } => self.hear_revoked(now, revoked),
            Word::Signaled { agent, addresses } => {
                if let Some(signaled) = &self.signaled {
                    signaled.tell(now, agent.as_str(), addresses);
                }
            }
            Word::Routed { .. } | Word::Claim { .. } => {}
        }
    }
}

/// Where an agent that begins anew was before.
#[derive(Clone, Copy, Debug)]
pub(super) enum Before {
    /// Here, and so nowhere else.
    Here,
    /// On its way here.
    Claimed(Option<u64>),
    /// Nowhere, or elsewhere.
    Unknown,
}

/// What of an agent's own frame is repeated in the answer that comes later.
pub(super) fn kept(id: Option<FrameId<'_>>) -> Option<Box<RawValue>> {
    id.map(ToOwned::to_owned)
}
