//! The other nodes of a cluster: whom they have, what is on its way to them, what comes from there, and how a session moves.
//!
//! What is known of other nodes' agents is what presence told, and only of rooms that have an agent of ours. Nobody is routed
//! by it: a frame goes to whoever hears what is said to its receiver, and the answer is the receiver's.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use serde_json::value::RawValue;

use super::{Done, Farewell, Hub, Join, Member};
use crate::{
    clock::Now,
    credentials::{
        revocations::Revocations,
        signaled,
        token::{Agent, AgentId, Room},
    },
    signaling::{
        limits::MAX_CARD,
        message::{FrameId, Hello, Kind, Resume, ServerFrame, Unnumbered},
        nodes::{
            Carried, Ear, Errand, Handed, Held, Listed, MAX_LIST, Neighbour, NodeId, Outcome, Wants, Word,
        },
        refusal::Refusal,
        registry::Profile,
    },
};

/// How often a node says that it is there, and after how long without a word it is given up.
const BEAT: Duration = Duration::from_secs(1);
const SILENT: Duration = Duration::from_millis(3_500);

/// How long the answer to a frame is waited for.
const ANSWER: Duration = Duration::from_secs(2);

/// How long an agent that comes waits for what other nodes have of it and of its room.
const ARRIVAL: Duration = Duration::from_secs(1);

/// An agent that is missing from a list may be on its way to a third node, which has not said so yet: so long.
const DOUBT: Duration = Duration::from_secs(1);

/// Frames on their way to other nodes, and their bytes.
const MAX_FLYING: usize = 65_536;
const MAX_FLYING_BYTES: usize = 64 << 20;

/// Frames that wait for one agent to have arrived, and their bytes.
const MAX_STASH: usize = 256;
const MAX_STASH_BYTES: usize = 1 << 20;

/// What is said to a sender whose frame may have arrived, or not.
const NO_ANSWER: Refusal = Refusal::Unavailable("another node does not answer: it may have been delivered");
const NO_ENGINE: Refusal = Refusal::Unavailable("the other nodes cannot be reached: try again soon");

const TOO_LARGE: Refusal = Refusal::TooLarge("the frame is more than goes to another node");

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
    /// An agent, on whatever connection its session has.
    Agent { agent: AgentId, serial: u64, id: Option<Box<RawValue>> },
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
    pub(super) request: Option<u64>,
    /// Those that came before the session itself.
    frames: Vec<Carried>,
    /// Its session is one that another node had.
    resumed: bool,
    /// What other nodes have sent to it meanwhile.
    stash: Vec<Stashed>,
    stash_bytes: usize,
    /// Nodes that say that they have it.
    rivals: BTreeSet<NodeId>,
    /// A node that it has gone on to meanwhile.
    next: Option<Claim>,
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

// Frames.
impl Hub {
    /// To an agent that is not here: whoever hears what is said to it answers.
    pub(super) fn route_elsewhere(
        &mut self,
        now: Now,
        from: &AgentId,
        kind: Kind,
        to: &str,
        body: Option<&RawValue>,
    ) -> Result<Done, Refusal> {
        let to = self.elsewhere.as_ref().and(AgentId::parse(to)).ok_or(Refusal::PeerUnavailable)?;
        let frame = Unnumbered::new(kind, from, Some(&to), body);
        self.check_flight(frame.size())?;
        self.tell_signaled(now, &to, body);
        self.note_correspondents(from, &to);
        Ok(Done::Later(self.fly(now, from, &[to], &frame, None)))
    }

    /// To all of a room who are elsewhere, after `reached` who are here. `None` when there are none.
    pub(super) fn fly_to_room(
        &mut self,
        now: Now,
        from: &AgentId,
        to: &[AgentId],
        frame: &Unnumbered,
        reached: usize,
    ) -> Option<u64> {
        let is_possible = !to.is_empty() && self.check_flight(frame.size() * to.len()).is_ok();
        is_possible.then(|| self.fly(now, from, to, frame, Some(reached)))
    }

    fn check_flight(&self, bytes: usize) -> Result<(), Refusal> {
        let elsewhere = self.elsewhere.as_ref().ok_or(Refusal::PeerUnavailable)?;
        let flights = &elsewhere.flights;
        if !elsewhere.is_up {
            Err(NO_ENGINE)
        } else if flights.tickets.len() >= MAX_FLYING || flights.bytes + bytes > MAX_FLYING_BYTES {
            Err(Refusal::QueueFull)
        } else {
            Ok(())
        }
    }

    /// Gives the number of the group, which has nobody yet who waits for it.
    fn fly(
        &mut self,
        now: Now,
        from: &AgentId,
        to: &[AgentId],
        frame: &Unnumbered,
        to_room: Option<usize>,
    ) -> u64 {
        let tickets: Vec<u64> = to.iter().map(|to| self.send(from, to, frame)).collect();
        let elsewhere = self.elsewhere.as_mut().expect("it was sent there");
        let flights = &mut elsewhere.flights;
        let group = tickets[0];
        flights.tickets.extend(tickets.iter().map(|ticket| (*ticket, group)));
        flights.due.push_back((now.mono + ANSWER, group));
        let bytes = frame.size() * to.len();
        flights.bytes += bytes;
        let flight = Group {
            left: tickets.len(),
            tickets,
            reached: to_room.unwrap_or(0),
            to_room: to_room.is_some(),
            refusal: NO_ANSWER,
            bytes,
            waits: Waits::Request { id: None },
        };
        flights.groups.insert(group, flight);
        group
    }

    /// Says a frame to an agent elsewhere; nobody waits for the answer to its ticket yet.
    fn send(&mut self, from: &AgentId, to: &AgentId, frame: &Unnumbered) -> u64 {
        let (room, serial) = (self.members[from].room.clone(), self.members[from].serial);
        let elsewhere = self.elsewhere.as_mut().expect("it is sent there");
        elsewhere.flights.last += 1;
        elsewhere.numbers.frames_out += 1;
        let (node, ticket) = (elsewhere.node, elsewhere.flights.last);
        let word = Word::Routed { node, ticket, kind: frame.kind(), from: from.clone(), serial };
        let word = word.before(frame.rest());
        elsewhere.errands.push_back(Errand::ToAgent { room, agent: to.clone(), ticket, word });
        ticket
    }

    /// Says `bye` to somebody who may be elsewhere; what becomes of it is nobody's business.
    pub(super) fn send_bye(&mut self, from: &AgentId, to: &AgentId) {
        if self.check_flight(0).is_ok() {
            self.send(from, to, &Unnumbered::new(Kind::Bye, from, Some(to), None));
        }
    }

    /// Whoever waits for what becomes of a frame.
    pub(super) fn wait_for(&mut self, group: u64, waits: Waits) {
        let groups = self.elsewhere.as_mut().map(|elsewhere| &mut elsewhere.flights.groups);
        if let Some(group) = groups.and_then(|groups| groups.get_mut(&group)) {
            group.waits = waits;
        }
    }

    /// A frame has come, or not.
    fn answered(&mut self, now: Now, ticket: u64, outcome: Outcome) {
        let Some(elsewhere) = &mut self.elsewhere else { return };
        let flights = &mut elsewhere.flights;
        let Some(number) = flights.tickets.remove(&ticket) else { return };
        let Some(group) = flights.groups.get_mut(&number) else { return };
        match outcome {
            Outcome::Delivered => group.reached += 1,
            Outcome::PeerUnavailable => group.refusal = Refusal::PeerUnavailable,
            Outcome::QueueFull => group.refusal = Refusal::QueueFull,
            Outcome::TooLarge => group.refusal = TOO_LARGE,
        }
        group.left -= 1;
        if group.left == 0 {
            self.conclude(now, number);
        }
    }

    /// All that is known of a frame by now is told to whoever waits for it.
    fn conclude(&mut self, now: Now, number: u64) {
        let Some(elsewhere) = &mut self.elsewhere else { return };
        let flights = &mut elsewhere.flights;
        let Some(group) = flights.groups.remove(&number) else { return };
        flights.bytes -= group.bytes;
        group.tickets.iter().for_each(|ticket| _ = flights.tickets.remove(ticket));
        let outcome = match group.reached {
            reached if group.to_room => Ok(Done::Broadcast(reached)),
            0 => Err(group.refusal),
            _ => Ok(Done::Delivered),
        };
        match group.waits {
            Waits::Agent { agent, serial, id } => {
                if self.has_session(&agent, serial) {
                    self.answer(now, &agent, id.as_deref(), outcome);
                }
            }
            Waits::Peer { agent, serial, to } => {
                if let Err(refusal) = outcome {
                    self.count_refusal(&refusal);
                    if self.has_session(&agent, serial) {
                        let expired = ServerFrame::Expired { agent: &to }.to_bytes();
                        self.push_aside(now, &agent, expired);
                    }
                }
            }
            Waits::Request { id } => {
                let told = outcome.as_ref().map(|_| ()).map_err(Clone::clone);
                let answer = self.respond(id.as_deref(), outcome);
                self.resolve(number, Resolution { answer, outcome: told });
            }
        }
    }

    fn has_session(&self, agent: &AgentId, serial: u64) -> bool {
        self.members.get(agent).is_some_and(|member| member.serial == serial)
    }

    fn resolve(&mut self, number: u64, resolution: Resolution) {
        if let Some(elsewhere) = &mut self.elsewhere {
            elsewhere.resolved.push((number, resolution));
        }
    }

    /// A frame of another node's agent to one that may be ours.
    fn take_routed(&mut self, now: Now, room: &Room, to: &AgentId, said: Stashed) {
        let Some(elsewhere) = &mut self.elsewhere else { return };
        elsewhere.numbers.frames_in += 1;
        let Some(member) = self.members.get_mut(to).filter(|member| member.room == *room) else {
            // Whoever has it by now hears this, too.
            if !elsewhere.away.contains_key(to) {
                elsewhere.answers.entry(said.node).or_default().push((said.ticket, Outcome::PeerUnavailable));
            }
            return;
        };
        let Some(arriving) = &mut member.arriving else { return self.accept_routed(now, to, said) };
        let size = said.frame.size();
        if arriving.stash.len() < MAX_STASH && arriving.stash_bytes + size <= MAX_STASH_BYTES {
            arriving.stash_bytes += size;
            arriving.stash.push(said);
        } else {
            elsewhere.answers.entry(said.node).or_default().push((said.ticket, Outcome::QueueFull));
        }
    }

    fn accept_routed(&mut self, now: Now, to: &AgentId, said: Stashed) {
        let Stashed { node, ticket, from, serial, frame } = said;
        let nodes = self.elsewhere.as_ref().map(|elsewhere| &elsewhere.nodes);
        let heard = &mut self.members.get_mut(to).expect("it is here").heard;
        let last = heard.entry(node).or_default();
        // It moved here while the frame was on its way to both, and had it there.
        if *last >= ticket {
            return;
        }
        *last = ticket;
        if heard.len() > 64 {
            heard.retain(|heard, _| *heard == node || nodes.is_some_and(|nodes| nodes.contains_key(heard)));
        }
        let done = self.accept(now, &from, serial, to, frame);
        if done.is_ok() {
            self.note_correspondents(&from, to);
        }
        if let Some(elsewhere) = &mut self.elsewhere {
            elsewhere.answers.entry(node).or_default().push((ticket, Outcome::of(done)));
        }
    }

    /// Who was told of an address may go through the relay of any node.
    pub(super) fn tell_signaled(&mut self, now: Now, to: &AgentId, body: Option<&RawValue>) {
        let (Some(signaled), Some(body)) = (&self.signaled, body) else { return };
        let addresses = signaled::addresses(body);
        signaled.tell(now, to.as_str(), addresses.iter().copied());
        if !addresses.is_empty() {
            self.say_to_all(&Word::Signaled { agent: to.clone(), addresses });
        }
    }
}

impl Arriving {
    /// Others see it, for another node gave its session away to this one.
    pub(super) fn is_of_another_node(&self) -> bool {
        self.resumed
    }

    /// What was asked, for whoever goes on waiting for it.
    pub(super) fn take_claim(&mut self) -> Option<u64> {
        self.claim.take()
    }
}

// Sessions that move.
impl Hub {
    /// From now on nothing is heard of what others say to the agent.
    pub(super) fn unsubscribe(&mut self, agent: &AgentId) {
        let Some(elsewhere) = &mut self.elsewhere else { return };
        let room = self.members[agent].room.clone();
        elsewhere.errands.push_back(Errand::Unsubscribe(room, agent.clone()));
    }

    /// An agent that has not arrived is gone.
    pub(super) fn give_up(&mut self, room: &Room, agent: &AgentId, arriving: Arriving) {
        let Some(elsewhere) = &mut self.elsewhere else { return };
        if let Some(claim) = arriving.claim {
            elsewhere.claims.remove(&claim);
        }
        if let Some(Claim { node, ticket, .. }) = arriving.next {
            let (node_here, held) = (elsewhere.node, Held::Nothing { since: 0 });
            let word = Word::Held { node: node_here, ticket, room: room.clone(), agent: agent.clone(), held };
            elsewhere.errands.push_back(Errand::ToNode(node, word.to_bytes()));
        }
        for said in arriving.stash {
            elsewhere.answers.entry(said.node).or_default().push((said.ticket, Outcome::PeerUnavailable));
        }
        if let Some(request) = arriving.request {
            let gone = Refusal::Unavailable("the agent has come in another way meanwhile: begin anew");
            let answer = ServerFrame::error(arriving.id.as_deref(), &gone).to_bytes();
            elsewhere.resolved.push((request, Resolution { answer, outcome: Err(gone) }));
        }
    }

    /// An agent began anew here. Other nodes are asked for what they have of it, unless it was here before.
    pub(super) fn arrive(
        &mut self,
        now: Now,
        agent: &Agent,
        hello: &Hello<'_>,
        join: &Join<'_>,
        before: Before,
        by_request: bool,
    ) -> Option<u64> {
        let away = self.elsewhere.as_ref().and_then(|elsewhere| elsewhere.away.get(&agent.id));
        if let Some(since) = away.map(|away| away.since) {
            self.come_after(&agent.id, since);
        }
        let since = self.members[&agent.id].since;
        let elsewhere = self.elsewhere.as_mut().expect("there are other nodes");
        let (room, id) = (agent.room.clone(), agent.id.clone());
        elsewhere.errands.push_back(Errand::Subscribe(room.clone(), id.clone()));
        let claim = match before {
            Before::Here => None,
            Before::Claimed(claim) => claim,
            Before::Unknown if !elsewhere.is_up => None,
            Before::Unknown => {
                elsewhere.flights.last += 1;
                let (node, ticket) = (elsewhere.node, elsewhere.flights.last);
                let wants = match &hello.resume {
                    Some(resume) => Wants::This(resume.clone()),
                    None if join.takes_any => Wants::Any,
                    None => Wants::Fresh,
                };
                let word = Word::Claim { node, ticket, since, wants }.to_bytes();
                let (room, agent) = (room.clone(), id.clone());
                elsewhere.errands.push_back(Errand::ToAgent { room, agent, ticket, word });
                elsewhere.claims.insert(ticket, id.clone());
                Some(ticket)
            }
        };
        let request = by_request.then(|| {
            elsewhere.flights.last += 1;
            elsewhere.flights.last
        });
        let (node, is_up) = (elsewhere.node, elsewhere.is_up);
        if is_up && !matches!(before, Before::Claimed(_)) {
            let took = Word::Took { node, room: room.clone(), agent: id.clone(), since };
            self.say_to_all(&took);
        }
        self.rooms.get_mut(&room).expect("it is there").arriving += 1;
        self.member(&id).arriving = Some(Box::new(Arriving {
            claim,
            until: now.mono + ARRIVAL,
            id: join.id.map(ToOwned::to_owned),
            ice: join.ice.map(ToOwned::to_owned),
            request,
            frames: Vec::new(),
            resumed: false,
            stash: Vec::new(),
            stash_bytes: 0,
            rivals: BTreeSet::new(),
            next: None,
        }));
        self.set_deadline(now, &id);
        self.settle_if_known(now, &id);
        request
    }

    /// Welcomes an agent that has waited for nothing, or for everything that there is.
    fn settle_if_known(&mut self, now: Now, agent: &AgentId) {
        let Some(member) = self.members.get(agent) else { return };
        let Some(arriving) = &member.arriving else { return };
        if arriving.claim.is_none() && self.rooms[&member.room].asked.is_empty() {
            self.settle_now(now, agent);
        }
    }

    /// A session that has come from another node, and is asked for again before it was welcomed, waits for nothing more.
    pub(super) fn settle_if_moved(&mut self, now: Now, agent: &Agent, resume: Option<&Resume>) {
        let member = self.members.get(&agent.id).filter(|member| member.room == agent.room);
        let is_asked_for = member.is_some_and(|member| {
            member.arriving.as_ref().is_some_and(|arriving| arriving.resumed)
                && resume.is_some_and(|resume| resume.session == member.session.id().as_str())
        });
        if is_asked_for {
            self.settle_now(now, &agent.id);
        }
    }

    /// Nothing will come from elsewhere.
    fn settle(&mut self, now: Now, agent: &AgentId) {
        if let Some(arriving) = self.members.get_mut(agent).and_then(|member| member.arriving.as_mut()) {
            arriving.claim = None;
            self.settle_if_known(now, agent);
        }
    }

    /// All that waited for nothing but the room.
    fn settle_room(&mut self, now: Now, room: &Room) {
        let arriving = |member: &Member| member.room == *room && member.arriving.is_some();
        let agents: Vec<AgentId> = match self.rooms.get(room) {
            Some(gathering) if gathering.arriving > 0 => {
                self.members.iter().filter(|(_, m)| arriving(m)).map(|(agent, _)| agent.clone()).collect()
            }
            _ => return,
        };
        agents.iter().for_each(|agent| self.settle_if_known(now, agent));
    }

    /// The agent has arrived: it is present, and welcomed.
    pub(super) fn settle_now(&mut self, now: Now, agent: &AgentId) {
        let member = self.members.get_mut(agent).expect("it arrives");
        let Some(arriving) = member.arriving.take() else { return };
        let room = member.room.clone();
        self.rooms.get_mut(&room).expect("it is there").arriving -= 1;
        if let (Some(claim), Some(elsewhere)) = (arriving.claim, &mut self.elsewhere) {
            elsewhere.claims.remove(&claim);
        }
        self.appear(now, agent, arriving.resumed);
        let Arriving { id, ice, request, resumed, stash, rivals, next, .. } = *arriving;
        let welcome = self.welcome(agent, resumed, id.as_deref(), ice.as_deref());
        match (request, self.members[agent].connection) {
            (Some(request), _) => self.resolve(request, Resolution { answer: welcome, outcome: Ok(()) }),
            (None, Some(connection)) => {
                self.member(agent).session.push_welcome(welcome);
                self.ready.push(connection);
            }
            (None, None) => {}
        }
        self.set_deadline(now, agent);
        stash.into_iter().for_each(|said| self.accept_routed(now, agent, said));
        rivals.iter().for_each(|node| self.say_came(*node, agent));
        if let Some(claim) = next {
            self.give_away(now, &room, agent, &claim);
        }
    }

    /// From now on others see it. An agent that `moved` was seen before, on another node.
    pub(super) fn appear(&mut self, now: Now, agent: &AgentId, moved: bool) {
        let (room, card) = (self.members[agent].room.clone(), self.members[agent].card.clone());
        let away = self.elsewhere.as_mut().and_then(|elsewhere| elsewhere.away.get_mut(agent));
        let seen = away.filter(|away| moved && away.room == room).map(|away| away.card.take());
        match &seen {
            Some(_) => _ = self.elsewhere.as_mut().and_then(|elsewhere| elsewhere.away.remove(agent)),
            None => self.lose(now, agent),
        }
        let gathering = self.rooms.get_mut(&room).expect("it has an agent of ours");
        gathering.everybody.insert(agent.clone(), card.as_deref().and_then(Profile::of));
        let text = |card: &Option<Arc<RawValue>>| card.as_deref().map(|card| card.get().to_owned());
        let news = match seen {
            None => Some(ServerFrame::AgentJoined(self.listed(agent)).to_bytes()),
            Some(seen) if text(&seen) != text(&card) => {
                Some(ServerFrame::AgentUpdated(self.listed(agent)).to_bytes())
            }
            Some(_) => None,
        };
        if let Some(news) = news {
            self.tell_ours(now, &room, agent, &news);
        }
        self.post_came(agent, moved);
    }

    fn post_came(&mut self, agent: &AgentId, moved: bool) {
        let Some(node) = self.elsewhere.as_ref().map(|elsewhere| elsewhere.node) else { return };
        let member = &self.members[agent];
        let room = member.room.clone();
        let word = Word::Came { node, room: room.clone(), moved, agent: as_listed(agent, member) }.to_bytes();
        self.post(&room, &word);
    }

    /// Somebody says that one of our agents is with them now.
    fn claimed(&mut self, now: Now, room: &Room, agent: &AgentId, claim: Claim) {
        let Some(elsewhere) = &self.elsewhere else { return };
        let (own, Claim { node, ticket, since, .. }) = (elsewhere.node, &claim);
        let (node, ticket, since) = (*node, *ticket, *since);
        let Some(member) = self.members.get_mut(agent).filter(|member| member.room == *room) else {
            // Whoever has it answers.
            if elsewhere.away.get(agent).is_none_or(|away| away.node == node) {
                self.say_held(node, ticket, room, agent, Held::Nothing { since: 0 });
            }
            return;
        };
        match &mut member.arriving {
            Some(_) if (member.since, own) > (since, node) => {
                self.say_held(node, ticket, room, agent, Held::Newer);
            }
            // What it asked for may be on its way here: then it goes on from here.
            Some(arriving) if arriving.claim.is_some() => arriving.next = Some(claim),
            Some(_) => {
                self.settle_now(now, agent);
                self.give_away(now, room, agent, &claim);
            }
            None => self.give_away(now, room, agent, &claim),
        }
    }

    fn give_away(&mut self, now: Now, room: &Room, agent: &AgentId, claim: &Claim) {
        let Some(since) = self.members.get(agent).map(|member| member.since) else { return };
        let Claim { node, ticket, ref wants, .. } = *claim;
        match self.hand_over(now, agent, node, wants) {
            Some(handed) => self.send_session(node, ticket, room, agent, handed),
            None => {
                self.end(now, agent, Some(Farewell::Replaced));
                self.say_held(node, ticket, room, agent, Held::Nothing { since });
            }
        }
    }

    fn say_held(&mut self, to: NodeId, ticket: u64, room: &Room, agent: &AgentId, held: Held) {
        let Some(node) = self.elsewhere.as_ref().map(|elsewhere| elsewhere.node) else { return };
        self.say_to(to, &Word::Held { node, ticket, room: room.clone(), agent: agent.clone(), held });
    }

    /// Gives a session away; whoever is in the room sees no change.
    fn hand_over(&mut self, now: Now, agent: &AgentId, node: NodeId, wants: &Wants) -> Option<Handed> {
        let member = self.members.get(agent).filter(|member| member.arriving.is_none())?;
        let after = match wants {
            Wants::Fresh => return None,
            Wants::This(resume) if member.session.id().as_str() == resume.session => resume.after,
            Wants::This(_) => return None,
            Wants::Any => member.session.written_up_to(),
        };
        self.with_session(agent, |session, _| session.rewind(after)).ok()?;
        let member = self.remove(agent);
        let (frames, early) = member.session.carry(now.mono);
        let elsewhere = self.elsewhere.as_mut().expect("there is another node");
        elsewhere.numbers.moved_out += 1;
        if let Some(gathering) = self.rooms.get_mut(&member.room) {
            let (room, card) = (member.room.clone(), member.card.clone());
            gathering.everybody.insert(agent.clone(), card.as_deref().and_then(Profile::of));
            gathering.nodes.insert(node);
            let since = member.since;
            elsewhere.away.insert(agent.clone(), Away { node, since, room, card, list: HANDED });
        }
        if let Some(connection) = member.connection {
            self.dismiss(connection, Farewell::Replaced);
        }
        Some(Handed {
            session: member.session.id().clone(),
            since: member.since,
            after,
            last_seq: member.session.last_seq(),
            frames,
            early,
            introduced: member.introduced.into(),
            heard: member.heard.into_iter().collect(),
            correspondents: member.correspondents.map(|correspondents| correspondents.into_iter().collect()),
            card: member.card.map(|card| RawValue::to_owned(&card)),
            owes_millis: member.bucket.owes(now.mono).as_millis() as u64,
        })
    }

    /// In pieces that the engine takes.
    fn send_session(&mut self, node: NodeId, ticket: u64, room: &Room, agent: &AgentId, mut handed: Handed) {
        let mut piece = (Vec::new(), 0);
        for frame in std::mem::take(&mut handed.frames) {
            piece.1 += frame.rest.len();
            piece.0.push(frame);
            if piece.1 >= MAX_LIST {
                let held = Held::Frames(std::mem::take(&mut piece).0);
                self.say_held(node, ticket, room, agent, held);
            }
        }
        handed.frames = piece.0;
        self.say_held(node, ticket, room, agent, Held::Session(Box::new(handed)));
    }

    /// The answer to a claim.
    fn held(&mut self, now: Now, from: NodeId, ticket: u64, room: &Room, agent: &AgentId, held: Held) {
        let Some(elsewhere) = &mut self.elsewhere else { return };
        let own = elsewhere.node;
        let is_waited_for = elsewhere.claims.contains_key(&ticket);
        let arriving = self.members.get_mut(agent).and_then(|member| member.arriving.as_mut());
        match (held, arriving) {
            (Held::Frames(frames), Some(arriving)) if is_waited_for => arriving.frames.extend(frames),
            (Held::Frames(_), _) => {}
            (Held::Session(handed), Some(_)) if is_waited_for => {
                elsewhere.claims.remove(&ticket);
                elsewhere.numbers.moved_in += 1;
                self.come_after(agent, handed.since);
                self.take_over(now, agent, *handed);
                self.settle(now, agent);
            }
            // Too late: the agent is not here any more, or has begun anew.
            (Held::Session(handed), _) => {
                self.say_to(from, &Word::Went { node: own, room: room.clone(), agent: agent.clone() });
                self.yielded(agent, handed.since);
            }
            (Held::Nothing { .. } | Held::Newer, _) if !is_waited_for => {}
            (Held::Nothing { since }, _) => {
                elsewhere.claims.remove(&ticket);
                self.come_after(agent, since);
                self.settle(now, agent);
            }
            (Held::Newer, _) => {
                elsewhere.claims.remove(&ticket);
                self.end(now, agent, Some(Farewell::Replaced));
            }
        }
    }

    /// Whatever the clocks of the nodes say, an agent is where it came last.
    fn come_after(&mut self, agent: &AgentId, since: u64) {
        if let Some(member) = self.members.get_mut(agent) {
            member.since = member.since.max(since + 1);
        }
    }

    fn take_over(&mut self, now: Now, agent: &AgentId, mut handed: Handed) {
        let Some(member) = self.members.get_mut(agent) else { return };
        let Some(arriving) = &mut member.arriving else { return };
        let mut frames = std::mem::take(&mut arriving.frames);
        frames.append(&mut handed.frames);
        arriving.resumed = true;
        member.introduced.extend(handed.introduced.iter().copied());
        member.heard = handed.heard.iter().copied().collect();
        if let Some(carried) = &handed.correspondents {
            member.correspondents.get_or_insert_default().extend(carried.iter().cloned());
        }
        // What it says of itself now counts; if it says nothing, what it said then.
        if member.card.is_none() {
            member.card = handed.card.take().map(Arc::from);
        }
        member.bucket.owe(now.mono, Duration::from_millis(handed.owes_millis));
        self.with_session(agent, |session, _| session.go_on_with(now.mono, &handed, frames));
    }

    /// An agent comes to another node: whatever it has here in another room has ended. Of two that have only just come, one.
    fn took(&mut self, now: Now, node: NodeId, room: &Room, agent: &AgentId, since: u64) {
        let Some(elsewhere) = &self.elsewhere else { return };
        let own = elsewhere.node;
        match self.members.get(agent).filter(|member| member.room != *room) {
            None => {}
            Some(member) if member.arriving.is_some() && (member.since, own) > (since, node) => {}
            Some(member) => {
                let (agent, since) = (agent.clone(), member.since);
                self.end(now, &agent, Some(Farewell::Replaced));
                self.say_to(node, &Word::Yielded { agent, since });
            }
        }
    }

    /// Others may have heard that it came to us before they heard that it came there.
    fn yielded(&mut self, agent: &AgentId, since: u64) {
        self.come_after(agent, since);
        if self.members.get(agent).is_some_and(|member| member.arriving.is_none()) {
            self.post_came(agent, true);
        }
    }

    /// Two nodes have the same agent, as when neither heard of the other: it stays where it came last. Tells whether not here.
    fn yield_to(&mut self, now: Now, node: NodeId, agent: &AgentId, since: u64) -> bool {
        let Some(elsewhere) = &self.elsewhere else { return false };
        let own = elsewhere.node;
        match self.members.get(agent) {
            Some(member) if (member.since, own) > (since, node) => false,
            Some(_) => {
                self.end(now, agent, Some(Farewell::Replaced));
                true
            }
            None => true,
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

// Who is where.
impl Hub {
    /// A room has its first agent here: all others are asked whom they have.
    pub(super) fn ask_about(&mut self, room: &Room) {
        let Some(elsewhere) = self.elsewhere.as_ref().filter(|elsewhere| elsewhere.is_up) else { return };
        let nodes: Vec<NodeId> = elsewhere.nodes.keys().copied().collect();
        for node in nodes {
            self.rooms.get_mut(room).expect("it is there").asked.insert(node);
            self.say_present(node, room, true);
        }
    }

    /// A node has agents in a room, too: from now on it is told of ours, and for a start whom we have.
    fn meet(&mut self, node: NodeId, room: &Room) {
        if self.rooms.get_mut(room).is_some_and(|gathering| gathering.nodes.insert(node)) {
            self.say_present(node, room, false);
        }
    }

    /// All agents that we have in a room, in pieces.
    fn say_present(&mut self, to: NodeId, room: &Room, asks: bool) {
        let Some(elsewhere) = &mut self.elsewhere else { return };
        elsewhere.last_list += 1;
        let (node, list) = (elsewhere.node, elsewhere.last_list);
        let everybody = self.rooms.get(room).into_iter().flat_map(|gathering| gathering.everybody.keys());
        let ours = everybody.filter(|agent| self.is_ours(room, agent));
        let ours = ours.filter_map(|agent| Some((agent, self.members.get(agent)?)));
        let mut pieces = vec![Vec::new()];
        let mut size = 0;
        for (agent, member) in ours {
            size += 256 + member.card.as_deref().map_or(0, |card| card.get().len());
            if size > MAX_LIST {
                pieces.push(Vec::new());
                size = 0;
            }
            pieces.last_mut().expect("there is one").push(as_listed(agent, member));
        }
        let (last, cares) = (pieces.len() - 1, self.rooms.contains_key(room));
        let words: Vec<Bytes> = pieces
            .into_iter()
            .enumerate()
            .map(|(place, agents)| {
                let room = room.clone();
                Word::Present { node, room, asks, cares, list, is_last: place == last, agents }.to_bytes()
            })
            .collect();
        words.into_iter().for_each(|word| self.say_bytes(to, word));
    }

    fn listed_by(
        &mut self,
        now: Now,
        node: NodeId,
        room: &Room,
        agents: Vec<Listed<'_>>,
        (list, is_last): (u64, bool),
    ) {
        for listed in agents {
            let agent = listed.agent.clone();
            self.came(now, node, room, listed, true);
            if let Some(away) = self.elsewhere.as_mut().and_then(|elsewhere| elsewhere.away.get_mut(&agent))
                && away.node == node
            {
                away.list = list;
            }
        }
        let Some(gathering) = self.rooms.get_mut(room).filter(|_| is_last) else { return };
        gathering.asked.remove(&node);
        if let Some(elsewhere) = &mut self.elsewhere {
            elsewhere.lists.insert(node, list);
            elsewhere.doubts.push_back((now.mono + DOUBT, node, room.clone(), list));
        }
        self.settle_room(now, room);
    }

    /// An agent is present at another node.
    fn came(&mut self, now: Now, node: NodeId, room: &Room, listed: Listed<'_>, moved: bool) {
        let Listed { agent, since, card } = listed;
        // One that arrives here has asked whoever had it; when it has arrived, they are told.
        if let Some(arriving) = self.members.get_mut(&agent).and_then(|member| member.arriving.as_mut()) {
            arriving.rivals.insert(node);
            return;
        }
        if !self.yield_to(now, node, &agent, since) {
            return self.say_came(node, &agent);
        }
        let Some(elsewhere) = self.elsewhere.as_mut().filter(|_| self.rooms.contains_key(room)) else {
            return;
        };
        let card = card.filter(|card| card.get().len() <= MAX_CARD);
        let is_full = elsewhere.away.len() >= self.limits.agents;
        // Whoever comes after a list is not missing from it.
        let list = elsewhere.lists.get(&node).copied().unwrap_or(0);
        match elsewhere.away.get_mut(&agent) {
            Some(away) if (away.since, away.node) > (since, node) => return,
            Some(away) if away.room == *room && moved => {
                (away.node, away.since) = (node, since);
                away.list = list;
                let is_same = away.card.as_deref().map(RawValue::get) == card.map(RawValue::get);
                if !is_same {
                    self.set_card(now, &agent, card);
                }
                return;
            }
            Some(_) => self.lose(now, &agent),
            None if is_full => return,
            None => {}
        }
        let card: Option<Arc<RawValue>> = card.map(|card| Arc::from(card.to_owned()));
        let profile = card.as_deref().and_then(Profile::of);
        // The room may have been left with the last who was there.
        let Some(gathering) = self.rooms.get_mut(room) else { return };
        gathering.everybody.insert(agent.clone(), profile);
        if let Some(elsewhere) = &mut self.elsewhere {
            elsewhere.away.insert(agent.clone(), Away { node, since, room: room.clone(), card, list });
        }
        let news = ServerFrame::AgentJoined(self.listed(&agent)).to_bytes();
        self.tell_ours(now, room, &agent, &news);
    }

    /// Where an agent is, to a node that thinks that it is there.
    fn say_came(&mut self, to: NodeId, agent: &AgentId) {
        let Some(node) = self.elsewhere.as_ref().map(|elsewhere| elsewhere.node) else { return };
        let member = &self.members[agent];
        let (room, agent) = (member.room.clone(), as_listed(agent, member));
        let word = Word::Came { node, room, moved: true, agent }.to_bytes();
        self.say_bytes(to, word);
    }

    fn changed(&mut self, now: Now, node: NodeId, room: &Room, listed: Listed<'_>) {
        if self.is_away_at(node, room, &listed.agent) {
            self.set_card(now, &listed.agent, listed.card.filter(|card| card.get().len() <= MAX_CARD));
        }
    }

    fn set_card(&mut self, now: Now, agent: &AgentId, card: Option<&RawValue>) {
        let Some(away) = self.elsewhere.as_mut().and_then(|elsewhere| elsewhere.away.get_mut(agent)) else {
            return;
        };
        away.card = card.map(|card| Arc::from(card.to_owned()));
        let room = away.room.clone();
        let gathering = self.rooms.get_mut(&room).expect("it has an agent of ours");
        gathering.everybody.insert(agent.clone(), card.and_then(Profile::of));
        let news = ServerFrame::AgentUpdated(self.listed(agent)).to_bytes();
        self.tell_ours(now, &room, agent, &news);
    }

    fn is_away_at(&self, node: NodeId, room: &Room, agent: &AgentId) -> bool {
        let away = self.elsewhere.as_ref().and_then(|elsewhere| elsewhere.away.get(agent));
        away.is_some_and(|away| away.node == node && away.room == *room)
    }

    /// An agent of another node is gone.
    fn lose(&mut self, now: Now, agent: &AgentId) {
        let away = self.elsewhere.as_mut().and_then(|elsewhere| elsewhere.away.remove(agent));
        let Some(Away { room, list, .. }) = away else { return };
        if list == HANDED {
            // Others have not heard that it went there.
            self.post_gone(&room, agent);
        }
        self.tell_ours(now, &room, agent, &ServerFrame::AgentLeft { agent }.to_bytes());
        if let Some(gathering) = self.rooms.get_mut(&room) {
            gathering.everybody.remove(agent);
        }
    }

    /// A room has nobody of ours any more: it is forgotten, and nobody need tell us of it.
    pub(super) fn forget_room(&mut self, room: &Room) {
        let Some(gathering) = self.rooms.remove(room) else { return };
        let Some(elsewhere) = &mut self.elsewhere else { return };
        for agent in gathering.everybody.keys() {
            elsewhere.away.remove(agent);
        }
        gathering.nodes.iter().for_each(|node| self.say_empty(*node, room));
    }

    fn say_empty(&mut self, to: NodeId, room: &Room) {
        let Some(node) = self.elsewhere.as_ref().map(|elsewhere| elsewhere.node) else { return };
        self.say_to(to, &Word::Empty { node, room: room.clone() });
    }

    /// The card of an agent, wherever it is.
    pub(super) fn card_of(&self, agent: &AgentId) -> Option<&Arc<RawValue>> {
        let away = self.elsewhere.as_ref().and_then(|elsewhere| elsewhere.away.get(agent));
        match (self.members.get(agent), away) {
            (Some(member), _) if member.arriving.is_none() => member.card.as_ref(),
            (_, Some(away)) => away.card.as_ref(),
            (member, None) => member.and_then(|member| member.card.as_ref()),
        }
    }

    /// The room of an agent of another node.
    pub(super) fn room_elsewhere(&self, agent: &str) -> Option<&Room> {
        Some(&self.elsewhere.as_ref()?.away.get(agent)?.room)
    }

    /// Tells the nodes that have agents in a room something of it.
    pub(super) fn post(&mut self, room: &Room, word: &Bytes) {
        let Some(elsewhere) = self.elsewhere.as_mut().filter(|elsewhere| elsewhere.is_up) else { return };
        let nodes = self.rooms.get(room).into_iter().flat_map(|gathering| &gathering.nodes);
        elsewhere.errands.extend(nodes.map(|node| Errand::ToNode(*node, word.clone())));
    }

    /// An agent of ours has left a room.
    pub(super) fn post_gone(&mut self, room: &Room, agent: &AgentId) {
        let Some(node) = self.elsewhere.as_ref().map(|elsewhere| elsewhere.node) else { return };
        self.post(room, &Word::Went { node, room: room.clone(), agent: agent.clone() }.to_bytes());
    }

    /// An agent of ours says something else of itself.
    pub(super) fn post_changed(&mut self, agent: &AgentId) {
        let Some(node) = self.elsewhere.as_ref().map(|elsewhere| elsewhere.node) else { return };
        let member = &self.members[agent];
        let room = member.room.clone();
        let word = Word::Changed { node, room: room.clone(), agent: as_listed(agent, member) }.to_bytes();
        self.post(&room, &word);
    }
}

// The nodes.
impl Hub {
    pub(super) fn next_beat(&self) -> Option<Instant> {
        let elsewhere = self.elsewhere.as_ref()?;
        let due = elsewhere.flights.due.front().map(|(at, _)| *at);
        let doubt = elsewhere.doubts.front().map(|(at, ..)| *at);
        let silent = elsewhere.nodes.values().map(|other| other.heard_at + SILENT).min();
        [Some(elsewhere.beat_at), due, doubt, silent].into_iter().flatten().min()
    }

    pub(super) fn keep_in_touch(&mut self, now: Now) {
        let Some(elsewhere) = &mut self.elsewhere else { return };
        let mut overdue = Vec::new();
        while let Some((_, group)) = elsewhere.flights.due.pop_front_if(|(at, _)| *at <= now.mono) {
            if elsewhere.flights.groups.contains_key(&group) {
                elsewhere.numbers.unanswered += 1;
                overdue.push(group);
            }
        }
        let mut doubtful = Vec::new();
        while let Some((_, node, room, list)) = elsewhere.doubts.pop_front_if(|(at, ..)| *at <= now.mono) {
            let is_gone = |away: &Away| away.node == node && away.room == room && away.list < list;
            let gone = elsewhere.away.iter().filter(|(_, away)| is_gone(away));
            doubtful.extend(gone.map(|(agent, _)| agent.clone()));
        }
        let is_silent = |other: &Other| other.heard_at + SILENT <= now.mono;
        let silent = elsewhere.nodes.iter().filter(|(_, other)| is_silent(other)).map(|(node, _)| *node);
        let silent: Vec<NodeId> = silent.collect();
        let is_due = elsewhere.beat_at <= now.mono;
        overdue.into_iter().for_each(|group| self.conclude(now, group));
        doubtful.iter().for_each(|agent| self.lose(now, agent));
        silent.into_iter().for_each(|node| self.forget_node(now, node));
        if is_due {
            self.beat(now);
        }
    }

    fn beat(&mut self, now: Now) {
        let Some(elsewhere) = &mut self.elsewhere else { return };
        elsewhere.beat_at = now.mono + BEAT;
        let (node, name) = (elsewhere.node, elsewhere.name.clone());
        let beat = Word::Beat { node, name, offer: &elsewhere.offer }.to_bytes();
        if elsewhere.is_up && !elsewhere.has_gone {
            elsewhere.errands.push_back(Errand::ToAll(beat));
        }
    }

    fn hear_beat(&mut self, now: Now, node: NodeId, name: String, offer: &RawValue) {
        let Some(elsewhere) = &mut self.elsewhere else { return };
        let is_greeted = elsewhere.nodes.get(&node).is_some_and(|other| other.is_greeted);
        let other = Other { name, offer: offer.to_owned(), heard_at: now.mono, is_greeted: true };
        elsewhere.nodes.insert(node, other);
        if is_greeted {
            return;
        }
        // It may not know of us yet.
        self.beat(now);
        self.say_all_revoked(node);
        let rooms: Vec<Room> = self.rooms.keys().cloned().collect();
        for room in rooms {
            self.say_present(node, &room, true);
        }
    }

    fn forget_node(&mut self, now: Now, node: NodeId) {
        let Some(elsewhere) = &mut self.elsewhere else { return };
        elsewhere.nodes.remove(&node);
        elsewhere.lists.remove(&node);
        let gone = elsewhere.away.iter().filter(|(_, away)| away.node == node);
        let gone: Vec<AgentId> = gone.map(|(agent, _)| agent.clone()).collect();
        gone.iter().for_each(|agent| self.lose(now, agent));
        let mut settled = Vec::new();
        for (room, gathering) in &mut self.rooms {
            gathering.nodes.remove(&node);
            if gathering.asked.remove(&node) {
                settled.push(room.clone());
            }
        }
        settled.iter().for_each(|room| self.settle_room(now, room));
    }

    /// We are going: nobody is here any more.
    pub(super) fn say_goodbye(&mut self) {
        let Some(elsewhere) = &mut self.elsewhere else { return };
        elsewhere.has_gone = true;
        let node = elsewhere.node;
        elsewhere.away.clear();
        elsewhere.claims.clear();
        self.say_to_all(&Word::Bye { node });
    }

    fn say_all_revoked(&mut self, node: NodeId) {
        let Some(elsewhere) = &mut self.elsewhere else { return };
        for page in elsewhere.revocations.pages(MAX_LIST) {
            let word = Word::Revoked { revoked: &page }.to_bytes();
            elsewhere.errands.push_back(Errand::ToNode(node, word));
        }
    }

    fn hear_revoked(&mut self, now: Now, revoked: &RawValue) {
        let Some(elsewhere) = &mut self.elsewhere else { return };
        let Ok(news) = elsewhere.revocations.add_json(revoked.get().as_bytes()) else { return };
        let agents: Vec<AgentId> = news.iter().filter_map(|agent| AgentId::parse(agent)).collect();
        elsewhere.errands.extend(agents.iter().cloned().map(Errand::Free));
        agents.iter().for_each(|agent| self.revoke(now, agent));
    }

    fn say_to(&mut self, node: NodeId, word: &Word<'_>) {
        self.say_bytes(node, word.to_bytes());
    }

    fn say_bytes(&mut self, node: NodeId, word: Bytes) {
        if let Some(elsewhere) = self.elsewhere.as_mut().filter(|elsewhere| elsewhere.is_up) {
            elsewhere.errands.push_back(Errand::ToNode(node, word));
        }
    }

    fn say_to_all(&mut self, word: &Word<'_>) {
        if let Some(elsewhere) = self.elsewhere.as_mut().filter(|elsewhere| elsewhere.is_up) {
            elsewhere.errands.push_back(Errand::ToAll(word.to_bytes()));
        }
    }
}

fn as_listed<'a>(agent: &AgentId, member: &'a Member) -> Listed<'a> {
    Listed { agent: agent.clone(), since: member.since, card: member.card.as_deref() }
}

/// What of an agent's own frame is repeated in the answer that comes later.
pub(super) fn kept(id: Option<FrameId<'_>>) -> Option<Box<RawValue>> {
    id.map(ToOwned::to_owned)
}
