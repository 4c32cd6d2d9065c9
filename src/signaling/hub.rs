//! Who is here and how one reaches another: the only state of signaling.
//!
//! Frames and `now` go in; what there is to write waits in the sessions, and [`Hub::take_ready`] says for whom.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    ops::Bound,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use serde_json::value::RawValue;

use super::{
    farewell::Farewell,
    limits::{
        BETWEEN_REQUESTS, Bucket, EARLY, INTRODUCED, Limits, MAX_ASIDE_BYTES,
        MAX_ASIDE_BYTES_BETWEEN_REQUESTS, MAX_CARD,
    },
    message::{
        Announced, ClientFrame, Find, Found, Frame, FrameId, Hello, Incoming, Kind, Listed, Rejected, Resume,
        ServerFrame, SessionId, Unnumbered, Welcome,
    },
    nodes::NodeId,
    refusal::{CODES, Refusal},
    registry::{Entry, Page, Profile, Query},
    session::{Full, Gone, Session},
};
use crate::{
    clock::Now,
    credentials::{
        signaled::Signaled,
        token::{Agent, AgentId, Room},
    },
};

mod elsewhere; // the other nodes of a cluster

pub use elsewhere::{Answered, Numbers, Resolution};
use elsewhere::{Arriving, Before, Elsewhere, Waits, kept};

/// An expiry is looked at again at least this often, so that a wall clock that was set is noticed.
const LONGEST_WAIT: Duration = Duration::from_secs(3600);

/// Seconds over which the first tries to come back after a restart are spread.
const RECONNECT: std::ops::RangeInclusive<u64> = 1..=10;

/// Bytes of a `found` that are not the agents.
const FOUND_FRAME: usize = 512;

/// Frames of a welcome that are not the agents and the ICE list.
const WELCOME_FRAME: usize = 1024;

/// All agents, their rooms, sessions and connections.
#[derive(Debug)]
pub struct Hub {
    limits: Limits,
    /// Told what agents say of their addresses, if that matters; else nobody reads it.
    signaled: Option<Signaled>,
    members: HashMap<AgentId, Member>,
    rooms: HashMap<Room, Gathering>,
    connections: HashMap<ConnectionId, Line>,
    /// One for each member.
    deadlines: BTreeSet<(Instant, AgentId)>,
    /// Connections that have something to write since the shell last asked.
    ready: Vec<ConnectionId>,
    /// Sessions that may keep written frames for replay; who began first is first.
    keepers: BTreeMap<u64, AgentId>,
    held_bytes: usize,
    last_connection: u64,
    last_session: u64,
    /// Nobody joins any more.
    closed: bool,
    /// The other nodes, in a cluster.
    elsewhere: Option<Box<Elsewhere>>,
    counters: Counters,
}

/// Who is in a room with an agent of ours.
#[derive(Debug, Default)]
struct Gathering {
    /// With what each agent is found by: a search goes through a whole room, and looks nowhere else.
    everybody: BTreeMap<AgentId, Option<Profile>>,
    /// Agents of ours, seen by others or not yet.
    own: usize,
    /// Of those, who are not seen yet.
    arriving: usize,
    /// Nodes that have agents here, too.
    nodes: BTreeSet<NodeId>,
    /// Nodes that have not said yet whom they have here.
    asked: BTreeSet<NodeId>,
}

/// An agent with a session, connected or expected back.
#[derive(Debug)]
struct Member {
    room: Room,
    card: Option<Arc<RawValue>>,
    /// Unix seconds.
    expires: u64,
    session: Session,
    /// No other session has it.
    serial: u64,
    /// When it began here, in Unix milliseconds: of two nodes that have the same agent, one has it later.
    since: u64,
    /// It is not welcomed yet.
    arriving: Option<Box<Arriving>>,
    /// The last frame that each other node has sent to it.
    heard: BTreeMap<NodeId, u64>,
    /// Whose offer or answer this session has had: the senders' sessions by their serials, the latest last.
    introduced: VecDeque<u64>,
    connection: Option<ConnectionId>,
    /// It comes and goes: what nobody numbered waits for it too.
    by_request: bool,
    /// Set while there is no connection: the end of the resume window.
    gone_at: Option<Instant>,
    deadline: Instant,
    ice_term: Option<IceTerm>,
    /// To whom and from whom there were messages, if they are to be told `bye` at its end.
    correspondents: Option<BTreeSet<AgentId>>,
    /// Its place among the keepers.
    keeper: Option<u64>,
    bucket: Bucket,
}

/// What a connection has to do with us.
#[derive(Debug)]
enum Line {
    Live(AgentId),
    /// Told to go; nothing that it says counts any more.
    Leaving(Option<Farewell>),
}

/// One connection of one agent. Never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ConnectionId {
    serial: u64,
    /// What the shell wants to know when the connection is ready: it means nothing here.
    pub tag: u64,
}

/// What a connection has to write.
#[derive(Debug, PartialEq, Eq)]
pub enum Outgoing<F> {
    Frame(F),
    Close(Farewell),
}

impl Outgoing<Frame<'_>> {
    /// For who cannot write it at once.
    #[must_use]
    pub fn to_bytes(&self) -> Outgoing<Bytes> {
        match self {
            Self::Frame(frame) => Outgoing::Frame(frame.to_bytes()),
            Self::Close(farewell) => Outgoing::Close(*farewell),
        }
    }
}

/// How a connection ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Departure {
    /// The agent said goodbye: its session ends.
    Left,
    /// The same, but what it has with others goes on without us.
    LeftQuietly,
    /// The connection broke: its session waits.
    Dropped,
}

/// What is counted here. `frames_*` and `errors` only grow.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    pub connections: usize,
    pub agents: usize,
    pub rooms: usize,
    pub held_bytes: usize,
    pub frames_in: u64,
    pub frames_out: u64,
    /// Routed frames put into a receiver's window.
    pub delivered: u64,
    /// In the order of [`CODES`].
    pub errors: [u64; CODES.len()],
}

impl Hub {
    #[must_use]
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            signaled: None,
            members: HashMap::new(),
            rooms: HashMap::new(),
            connections: HashMap::new(),
            deadlines: BTreeSet::new(),
            ready: Vec::new(),
            keepers: BTreeMap::new(),
            held_bytes: 0,
            last_connection: 0,
            last_session: 0,
            closed: false,
            elsewhere: None,
            counters: Counters::default(),
        }
    }

    /// Other limits from now on, and who wants to know what agents tell each other of their addresses; what is held stays.
    pub fn adopt(&mut self, limits: Limits, signaled: Option<Signaled>) {
        (self.limits, self.signaled) = (limits, signaled);
    }

    /// A connection said `hello` with a valid token: continues its session or starts the new one `fresh`, and takes
    /// over from an older connection of the same agent. The welcome waits to be written.
    ///
    /// # Errors
    /// When there are too many agents already.
    pub fn join(
        &mut self,
        now: Now,
        agent: &Agent,
        hello: &Hello<'_>,
        join: Join<'_>,
        tag: u64,
    ) -> Result<ConnectionId, Refusal> {
        self.admit(&agent.id)?;
        let connection = self.new_connection(tag);
        self.connections.insert(connection, Line::Live(agent.id.clone()));
        let welcome = self.enter(now, agent, hello, join, Some(connection));
        // It may be over already: another node has the agent later.
        if let Some(member) = self.members.get_mut(&agent.id) {
            member.by_request = false;
            if let Answered::Now(Some(welcome)) = welcome {
                member.session.push_welcome(welcome);
                self.ready.push(connection);
            }
        }
        Ok(connection)
    }

    /// The same for an agent without a connection, which asks by requests. The welcome is the answer, perhaps
    /// [later](Self::take_resolved).
    ///
    /// # Errors
    /// When there are too many agents already, or this one begins too often.
    pub fn join_by_request(
        &mut self,
        now: Now,
        agent: &Agent,
        hello: &Hello<'_>,
        join: Join<'_>,
    ) -> Result<Answered<Bytes>, Refusal> {
        self.admit(&agent.id)?;
        if self.members.contains_key(&agent.id) {
            self.spend(now, &agent.id)?;
        }
        let welcome = self.enter(now, agent, hello, join, None);
        self.member(&agent.id).by_request = true;
        self.set_gone_at(now, &agent.id);
        Ok(match welcome {
            Answered::Now(welcome) => Answered::Now(welcome.expect("a request is answered now or later")),
            Answered::Later(request) => Answered::Later(request),
        })
    }

    /// A request of an agent that has a session, which lives on: the one called `session`, or any in the room.
    ///
    /// # Errors
    /// When the agent has no such session.
    pub fn visit(&mut self, now: Now, agent: &Agent, session: Option<&str>) -> Result<(), Gone> {
        let known = |member: &&mut Member| {
            member.room == agent.room && session.is_none_or(|session| member.session.id().as_str() == session)
        };
        let member = self.members.get_mut(&agent.id).filter(known).ok_or(Gone)?;
        member.expires = member.expires.max(agent.expires);
        if member.connection.is_none() {
            member.by_request = true;
            self.set_gone_at(now, &agent.id);
        }
        Ok(())
    }

    /// Does what a frame of an agent with a session asks for. There is always an answer, perhaps
    /// [later](Self::take_resolved).
    pub fn ask(
        &mut self,
        now: Now,
        agent: &AgentId,
        incoming: Result<Incoming<'_>, Rejected<'_>>,
    ) -> Answered<Bytes> {
        match self.perform(now, agent, incoming) {
            (id, Ok(Done::Later(number))) => {
                self.wait_for(number, Waits::Request { id: kept(id) });
                Answered::Later(number)
            }
            (id, outcome) => Answered::Now(self.respond(id, outcome)),
        }
    }

    /// The same for somebody who hears no more than whether it was done.
    ///
    /// # Errors
    /// When it was not.
    pub fn pass(
        &mut self,
        now: Now,
        agent: &AgentId,
        incoming: Result<Incoming<'_>, Rejected<'_>>,
    ) -> Result<Answered<()>, Refusal> {
        let (_, outcome) = self.perform(now, agent, incoming);
        match outcome.inspect_err(|refusal| self.count_refusal(refusal))? {
            Done::Later(number) => Ok(Answered::Later(number)),
            _ => Ok(Answered::Now(())),
        }
    }

    /// Does what a frame of a client of PeerJS asks for, for one that is `to` be told if it does not get there, and was
    /// [charged](Self::charge) before.
    ///
    /// # Errors
    /// When it was not done.
    pub fn forward(
        &mut self,
        now: Now,
        agent: &AgentId,
        incoming: &Incoming<'_>,
        to: Option<&str>,
    ) -> Result<(), Refusal> {
        let done = self.carry_out(now, agent, incoming).inspect_err(|refusal| self.count_refusal(refusal))?;
        if let (Done::Later(number), Some(to)) = (done, to) {
            let (agent, serial) = (agent.clone(), self.members[agent].serial);
            self.wait_for(number, Waits::Peer { agent, serial, to: to.to_owned() });
        }
        Ok(())
    }

    /// What [`Self::ask`] does, for a `renew`.
    pub fn ask_renewal(
        &mut self,
        now: Now,
        agent: &AgentId,
        id: Option<FrameId<'_>>,
        token: Result<Agent, Refusal>,
    ) -> Bytes {
        let outcome = self.perform_renewal(now, agent, token);
        self.respond(id, outcome)
    }

    /// Counts a request of an agent with a session like a frame.
    ///
    /// # Errors
    /// When there were too many.
    pub fn charge(&mut self, now: Now, agent: &AgentId) -> Result<(), Refusal> {
        self.counters.frames_in += 1;
        self.spend(now, agent)
    }

    /// An agent that asks by requests waits for frames after number `after`: until it leaves, that is its connection.
    ///
    /// # Errors
    /// When it has no such session, or what it asks for is no longer held.
    pub fn listen(
        &mut self,
        now: Now,
        agent: &Agent,
        session: &str,
        after: u64,
        tag: u64,
    ) -> Result<ConnectionId, Gone> {
        self.visit(now, agent, Some(session))?;
        self.with_session(&agent.id, |session, _| session.rewind(after))?;
        let connection = self.new_connection(tag);
        self.connections.insert(connection, Line::Live(agent.id.clone()));
        let member = self.member(&agent.id);
        member.by_request = true;
        member.gone_at = None;
        if let Some(older) = member.connection.replace(connection) {
            self.dismiss(older, Farewell::Replaced);
        }
        self.set_deadline(now, &agent.id);
        self.ready.push(connection);
        Ok(connection)
    }

    /// Takes the frames of one kind that wait for an agent with a session: with that they have arrived.
    pub fn take(&mut self, agent: &AgentId, kind: Kind) -> Vec<Bytes> {
        let taken = self.with_session(agent, |session, _| session.take(kind));
        self.counters.frames_out += taken.len() as u64;
        taken
    }

    /// Does what a frame asks for, or answers why not.
    pub fn handle(&mut self, now: Now, from: ConnectionId, incoming: Result<Incoming<'_>, Rejected<'_>>) {
        let Some(Line::Live(agent)) = self.connections.get(&from) else { return };
        let agent = agent.clone();
        let (id, outcome) = self.perform(now, &agent, incoming);
        self.answer(now, &agent, id, outcome);
    }

    /// The agent showed a fresh token, or something that is none.
    pub fn renew(
        &mut self,
        now: Now,
        from: ConnectionId,
        id: Option<FrameId<'_>>,
        token: Result<Agent, Refusal>,
    ) {
        let Some(Line::Live(agent)) = self.connections.get(&from) else { return };
        let agent = agent.clone();
        let outcome = self.perform_renewal(now, &agent, token);
        self.answer(now, &agent, id, outcome);
    }

    /// What `connection` has to write next. After a `Close` there is nothing more.
    pub fn next_outgoing(&mut self, connection: ConnectionId) -> Option<Outgoing<Frame<'_>>> {
        match self.connections.get_mut(&connection)? {
            Line::Leaving(farewell) => farewell.take().map(Outgoing::Close),
            Line::Live(agent) => {
                let member = self.members.get_mut(agent).expect("a live line has a member");
                if member.arriving.is_some() {
                    return None;
                }
                let is_keeper = member.keeper.is_some();
                let frame = member.session.pop()?;
                self.counters.frames_out += 1;
                if !is_keeper && frame.is_kept() {
                    member.keeper = Some(self.counters.frames_out);
                    self.keepers.insert(self.counters.frames_out, agent.clone());
                }
                Some(Outgoing::Frame(frame))
            }
        }
    }

    /// Whether the connection is told to go.
    #[must_use]
    pub fn is_leaving(&self, connection: ConnectionId) -> bool {
        matches!(self.connections.get(&connection), Some(Line::Leaving(Some(_))))
    }

    /// How long the agent's ICE servers are good, if it has any, and when its token expires, in Unix seconds.
    #[must_use]
    pub fn ice_term(&self, connection: ConnectionId) -> Option<(IceTerm, u64)> {
        let Some(Line::Live(agent)) = self.connections.get(&connection) else { return None };
        let member = &self.members[agent];
        member.ice_term.map(|term| (term, member.expires))
    }

    /// It has others now, told by `frame`; or `None`, and is only to be thought of again.
    pub fn give_ice(&mut self, now: Now, connection: ConnectionId, frame: Option<Bytes>, term: IceTerm) {
        let Some(Line::Live(agent)) = self.connections.get(&connection) else { return };
        let agent = agent.clone();
        self.member(&agent).ice_term = Some(term);
        if let Some(frame) = frame {
            self.push_aside(now, &agent, frame);
        }
    }

    /// Counts a "no" that the shell says itself.
    pub fn count_refusal(&mut self, refusal: &Refusal) {
        let place = CODES.iter().position(|code| *code == refusal.code());
        self.counters.errors[place.expect("every refusal has one of the codes")] += 1;
    }

    /// How to continue an agent's session without anything that was written before: `None` if it has none in the room.
    #[must_use]
    pub fn continuation(&self, agent: &Agent) -> Option<Resume> {
        let member = self.members.get(&agent.id).filter(|member| member.room == agent.room)?;
        Some(Resume {
            session: member.session.id().as_str().to_owned(),
            after: member.session.written_up_to(),
        })
    }

    /// Whether an agent of the room is here, or expected back.
    #[must_use]
    pub fn is_present(&self, room: &Room, agent: &str) -> bool {
        self.members.get(agent).is_some_and(|member| member.room == *room)
            || self.room_elsewhere(agent) == Some(room)
    }

    /// The card of an agent in the room, if there is one.
    #[must_use]
    pub fn card(&self, room: &Room, agent: &AgentId) -> Option<Arc<RawValue>> {
        self.rooms.get(room).filter(|gathering| gathering.everybody.contains_key(agent))?;
        self.card_of(agent).cloned()
    }

    /// An operator ends the agent's session, if it has one.
    pub fn revoke(&mut self, now: Now, agent: &AgentId) {
        self.end(now, agent, Some(Farewell::Revoked));
    }

    /// The connection is over.
    pub fn leave(&mut self, now: Now, connection: ConnectionId, departure: Departure) {
        let Some(Line::Live(agent)) = self.connections.remove(&connection) else { return };
        let stays = self.members[&agent].by_request || !self.limits.resume_window.is_zero();
        if departure == Departure::LeftQuietly {
            self.member(&agent).correspondents = None;
        }
        if departure != Departure::Dropped || !stays {
            self.end(now, &agent, None);
        } else {
            self.detach(now, &agent);
        }
    }

    /// The connection does not take what it is sent: it is told to go, and its session waits.
    pub fn hang_up(&mut self, now: Now, connection: ConnectionId) {
        let Some(Line::Live(agent)) = self.connections.get(&connection) else { return };
        let agent = agent.clone();
        self.detach(now, &agent);
        self.dismiss(connection, Farewell::Slow);
    }

    /// Tells every connection to come back later, spread, forgets all sessions, and lets nobody join.
    pub fn restart(&mut self) {
        self.say_goodbye();
        let agents: Vec<AgentId> = self.members.keys().cloned().collect();
        agents.iter().for_each(|agent| self.unsubscribe(agent));
        let connected =
            std::mem::take(&mut self.members).into_values().filter_map(|member| member.connection);
        for (connection, reconnect_in) in connected.zip(RECONNECT.cycle()) {
            self.dismiss(connection, Farewell::Restarting(reconnect_in));
        }
        self.closed = true;
        self.rooms.clear();
        self.deadlines.clear();
        self.keepers.clear();
        self.held_bytes = 0;
    }

    /// The moment to call [`Hub::handle_timeout`].
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        let own = self.deadlines.first().map(|(at, _)| *at);
        [own, self.next_beat()].into_iter().flatten().min()
    }

    /// Ends sessions whose token or resume window is over, and keeps in touch with the other nodes.
    pub fn handle_timeout(&mut self, now: Now) {
        self.keep_in_touch(now);
        while let Some((_, agent)) = self.deadlines.first().filter(|(at, _)| *at <= now.mono).cloned() {
            let member = &self.members[&agent];
            if member.expires <= now.unix() {
                self.end(now, &agent, Some(Farewell::Expired));
            } else if member.arriving.as_ref().is_some_and(|arriving| arriving.until <= now.mono) {
                self.settle_now(now, &agent);
            } else if member.gone_at.is_some_and(|at| at <= now.mono) {
                self.end(now, &agent, None);
            } else {
                if self.with_session(&agent, |session, _| session.release_due(now.mono)) {
                    self.wake(&agent);
                }
                self.set_deadline(now, &agent);
            }
        }
    }

    /// Connections with something to write since this was last asked.
    pub fn take_ready(&mut self) -> impl Iterator<Item = ConnectionId> + '_ {
        self.ready.drain(..)
    }

    /// At most `limit` of the agents of `room` that fit, in order, beginning after `after`; at least one, then `bytes` at most.
    #[must_use]
    pub fn page(&self, room: &Room, query: &Query, after: &str, limit: usize, bytes: usize) -> Page {
        let Some(Gathering { everybody: all, .. }) = self.rooms.get(room) else {
            return Page { agents: Vec::new(), agent_count: 0, next: None };
        };
        if query.fits(None) {
            let rest = all.range::<str, _>((Bound::Excluded(after), Bound::Unbounded));
            return self.fill_page(all.len(), rest.map(|(agent, _)| agent), limit, bytes);
        }
        let fitting = all.iter().filter(|(_, profile)| query.fits(profile.as_ref()));
        let fitting: Vec<_> = fitting.map(|(agent, _)| agent).collect();
        let rest = fitting.iter().copied().skip_while(|agent| agent.as_str() <= after);
        self.fill_page(fitting.len(), rest, limit, bytes)
    }

    fn fill_page<'a>(
        &self,
        agent_count: usize,
        mut rest: impl Iterator<Item = &'a AgentId>,
        limit: usize,
        bytes: usize,
    ) -> Page {
        let (mut agents, mut size) = (Vec::<Entry>::new(), 0);
        let next = rest.find(|agent| {
            let card = self.card_of(agent).cloned();
            size += listed_size(agent, card.as_deref());
            let is_full = agents.len() >= limit || (size > bytes && !agents.is_empty());
            if !is_full {
                agents.push(Entry { agent: (*agent).clone(), card });
            }
            is_full
        });
        let next = next.and_then(|_| agents.last()).map(|last| last.agent.clone());
        Page { agents, agent_count, next }
    }

    /// How often to ping.
    #[must_use]
    pub fn heartbeat(&self) -> Duration {
        self.limits.heartbeat
    }

    #[must_use]
    pub fn counters(&self) -> Counters {
        Counters {
            connections: self.connections.len(),
            agents: self.members.len(),
            rooms: self.rooms.len(),
            held_bytes: self.held_bytes,
            ..self.counters.clone()
        }
    }
}

/// What the shell brings to a `join`.
#[derive(Debug)]
pub struct Join<'a> {
    /// The id of the `hello`.
    pub id: Option<FrameId<'a>>,
    /// For the welcome; `None` when the token lacks the scope.
    pub ice: Option<&'a RawValue>,
    /// How long those are good.
    pub ice_term: Option<IceTerm>,
    /// The session's name if it is a new one.
    pub fresh: SessionId,
    /// Its correspondents are told `bye` when its session ends, for it cannot say so itself.
    pub ends_with_bye: bool,
    /// Where another node has a session of it, that goes on, whether or not it knows the session's name.
    pub takes_any: bool,
}

/// How long an agent's ICE servers are good.
#[derive(Clone, Copy, Debug)]
pub struct IceTerm {
    /// Unix seconds.
    pub expires: u64,
    /// It should have others then.
    pub renew_at: Instant,
}

/// What a frame led to.
enum Done {
    Delivered,
    /// To so many of the room.
    Broadcast(usize),
    Pong,
    Found(Page),
    Renewed(u64),
    /// It is on its way to another node: by this number it is known what became of it.
    Later(u64),
}

// Frames.
impl Hub {
    fn perform<'a>(
        &mut self,
        now: Now,
        agent: &AgentId,
        incoming: Result<Incoming<'a>, Rejected<'a>>,
    ) -> (Option<FrameId<'a>>, Result<Done, Refusal>) {
        self.counters.frames_in += 1;
        match incoming {
            Ok(incoming) => (incoming.id, self.obey(now, agent, &incoming)),
            Err(rejected) => (rejected.id, self.spend(now, agent).and(Err(rejected.refusal))),
        }
    }

    fn perform_renewal(
        &mut self,
        now: Now,
        agent: &AgentId,
        token: Result<Agent, Refusal>,
    ) -> Result<Done, Refusal> {
        self.counters.frames_in += 1;
        self.spend(now, agent)?;
        self.extend(now, agent, &token?)
    }

    fn obey(&mut self, now: Now, agent: &AgentId, incoming: &Incoming<'_>) -> Result<Done, Refusal> {
        self.spend(now, agent)?;
        self.carry_out(now, agent, incoming)
    }

    fn carry_out(&mut self, now: Now, agent: &AgentId, incoming: &Incoming<'_>) -> Result<Done, Refusal> {
        if incoming.from.as_ref().is_some_and(|from| *from != agent.as_str()) {
            return Err(Refusal::BadFrame("from is not you".into()));
        }
        match &incoming.frame {
            ClientFrame::Routed { kind, to: Some(to), body } => self.route(now, agent, *kind, to, *body),
            ClientFrame::Routed { kind, to: None, body } => self.broadcast(now, agent, *kind, *body),
            ClientFrame::Update { card } => {
                self.replace_card(now, agent, Some(card.unwrap_or(RawValue::NULL)));
                Ok(Done::Delivered)
            }
            ClientFrame::Received { up_to } => {
                self.with_session(agent, |session, _| session.acknowledge(*up_to));
                Ok(Done::Delivered)
            }
            ClientFrame::Ping => Ok(Done::Pong),
            ClientFrame::Hello(_) => Err(Refusal::BadFrame("hello comes once".into())),
            ClientFrame::Find(Find { query, after, limit }) => {
                let (room, after) = (&self.members[agent].room, after.as_deref().unwrap_or_default());
                let bytes = self.limits.max_frame.min(MAX_ASIDE_BYTES / 2).saturating_sub(FOUND_FRAME);
                Ok(Done::Found(self.page(room, query, after, limit.unwrap_or(usize::MAX), bytes)))
            }
            ClientFrame::Renew { .. } => Err(Refusal::Unavailable("renew is not served here")),
        }
    }

    fn spend(&mut self, now: Now, agent: &AgentId) -> Result<(), Refusal> {
        let Some(rate) = self.limits.rate else { return Ok(()) };
        self.member(agent).bucket.take(now.mono, rate).map_err(Refusal::RateLimited)
    }

    fn route(
        &mut self,
        now: Now,
        from: &AgentId,
        kind: Kind,
        to: &str,
        body: Option<&RawValue>,
    ) -> Result<Done, Refusal> {
        if to == from.as_str() {
            return Err(Refusal::BadFrame("to is yourself".into()));
        }
        let (room, serial) = (&self.members[from].room, self.members[from].serial);
        let here = self.members.get_key_value(to).filter(|(_, receiver)| receiver.room == *room);
        let Some((to, _)) = here else { return self.route_elsewhere(now, from, kind, to, body) };
        let to = to.clone();
        let frame = Unnumbered::new(kind, from, Some(&to), body);
        // Before it is on its way: who hears of it may come to the relay at once.
        self.tell_signaled(now, &to, body);
        self.accept(now, from, serial, &to, frame)?;
        self.note_correspondents(from, &to);
        Ok(Done::Delivered)
    }

    /// Takes a frame for an agent of ours, of a sender whose session has that number, wherever it is.
    fn accept(
        &mut self,
        now: Now,
        from: &AgentId,
        serial: u64,
        to: &AgentId,
        frame: Unnumbered,
    ) -> Result<(), Refusal> {
        let kind = frame.kind();
        if kind == Kind::IceCandidate && !self.is_introduced(serial, to) {
            return self.deliver_early(now, from, to, frame);
        }
        let describes = matches!(kind, Kind::Offer | Kind::Answer);
        if !describes {
            // What was said before goes before.
            self.release(from, to);
        }
        self.deliver(to, frame)?;
        if describes {
            self.introduce(from, serial, to);
        } else if kind == Kind::Bye {
            // What comes next belongs to another negotiation.
            self.member(to).introduced.retain(|introduced| *introduced != serial);
        }
        Ok(())
    }

    /// For those who are told of its end.
    fn note_correspondents(&mut self, from: &AgentId, to: &AgentId) {
        for (own, other) in [(from, to), (to, from)] {
            let correspondents = self.members.get_mut(own).and_then(|member| member.correspondents.as_mut());
            if let Some(correspondents) = correspondents
                && correspondents.len() < INTRODUCED
            {
                correspondents.insert(other.clone());
            }
        }
    }

    /// Tells the correspondents of an agent whose session ends, if they are still here and have room.
    fn say_bye(&mut self, agent: &AgentId) {
        let room = self.members[agent].room.clone();
        for other in self.member(agent).correspondents.take().into_iter().flatten() {
            if self.members.get(&other).is_some_and(|member| member.room == room) {
                let _ = self.deliver(&other, Unnumbered::new(Kind::Bye, agent, Some(&other), None));
            } else {
                self.send_bye(agent, &other);
            }
        }
    }

    fn broadcast(
        &mut self,
        now: Now,
        from: &AgentId,
        kind: Kind,
        body: Option<&RawValue>,
    ) -> Result<Done, Refusal> {
        if self.is_crowded(&self.members[from].room) {
            return Err(Refusal::TooLarge("the room is too large for a message to everybody"));
        }
        let frame = Unnumbered::new(kind, from, None, body);
        let room = &self.members[from].room;
        let (here, away): (Vec<_>, Vec<_>) =
            self.others(from).into_iter().partition(|other| self.is_ours(room, other));
        here.iter().for_each(|to| self.release(from, to));
        let reached = here.iter().filter(|to| self.deliver(to, frame.clone()).is_ok()).count();
        Ok(match self.fly_to_room(now, from, &away, &frame, reached) {
            Some(number) => Done::Later(number),
            None => Done::Broadcast(reached),
        })
    }

    /// Puts a frame into the receiver's window.
    ///
    /// # Errors
    /// When that, or all of them together, are full.
    fn deliver(&mut self, to: &AgentId, frame: Unnumbered) -> Result<(), Refusal> {
        self.make_room(to, &frame)?;
        self.with_session(to, |session, limits| session.push(frame, limits))
            .map_err(|Full| Refusal::QueueFull)?;
        self.counters.delivered += 1;
        self.wake(to);
        Ok(())
    }

    /// The same for a candidate that came before its sender's first description, without which it is of no use.
    fn deliver_early(
        &mut self,
        now: Now,
        from: &AgentId,
        to: &AgentId,
        frame: Unnumbered,
    ) -> Result<(), Refusal> {
        self.make_room(to, &frame)?;
        let until = now.mono + EARLY;
        self.with_session(to, |session, limits| session.push_early(from, frame, until, limits))
            .map_err(|Full| Refusal::QueueFull)?;
        self.counters.delivered += 1;
        self.set_deadline(now, to);
        Ok(())
    }

    /// Lets go of what is written, the receiver's first, then everybody's, until all together have room.
    ///
    /// # Errors
    /// When they are full of frames that are not written yet.
    fn make_room(&mut self, to: &AgentId, frame: &Unnumbered) -> Result<(), Refusal> {
        if !self.has_room(frame) {
            self.with_session(to, |session, _| session.forget_written());
        }
        while !self.has_room(frame) {
            let (_, keeper) = self.keepers.pop_first().ok_or(Refusal::QueueFull)?;
            self.member(&keeper).keeper = None;
            self.with_session(&keeper, |session, _| session.forget_written());
        }
        Ok(())
    }

    fn has_room(&self, frame: &Unnumbered) -> bool {
        self.held_bytes + frame.size() <= self.limits.held_bytes
    }

    fn is_introduced(&self, serial: u64, to: &AgentId) -> bool {
        self.members[to].introduced.contains(&serial)
    }

    /// A description of `from` has gone to `to`: candidates that were early follow it, later ones do not wait.
    fn introduce(&mut self, from: &AgentId, serial: u64, to: &AgentId) {
        if self.is_introduced(serial, to) {
            return;
        }
        let introduced = &mut self.member(to).introduced;
        if introduced.len() >= INTRODUCED {
            introduced.pop_front();
        }
        introduced.push_back(serial);
        self.release(from, to);
    }

    fn release(&mut self, from: &AgentId, to: &AgentId) {
        if self.with_session(to, |session, _| session.release(from)) {
            self.wake(to);
        }
    }

    /// On a connection, success without an `id` is silent.
    fn answer(&mut self, now: Now, agent: &AgentId, id: Option<FrameId<'_>>, outcome: Result<Done, Refusal>) {
        if let Ok(Done::Later(number)) = outcome {
            let (agent, serial) = (agent.clone(), self.members[agent].serial);
            return self.wait_for(number, Waits::Agent { agent, serial, id: kept(id) });
        }
        if id.is_some() || !matches!(outcome, Ok(Done::Delivered | Done::Broadcast(_))) {
            let frame = self.respond(id, outcome);
            self.push_aside(now, agent, frame);
        }
    }

    fn respond(&mut self, id: Option<FrameId<'_>>, outcome: Result<Done, Refusal>) -> Bytes {
        let frame = match &outcome {
            Err(refusal) => {
                self.count_refusal(refusal);
                ServerFrame::error(id, refusal)
            }
            Ok(Done::Found(page)) => ServerFrame::Found(Found { id, page }),
            Ok(Done::Pong) => ServerFrame::Pong { id },
            Ok(Done::Renewed(expires)) => {
                ServerFrame::Renewed { id, expires_at: std::time::UNIX_EPOCH + Duration::from_secs(*expires) }
            }
            Ok(Done::Delivered | Done::Later(_)) => ServerFrame::Delivered { id, count: None },
            Ok(Done::Broadcast(count)) => ServerFrame::Delivered { id, count: Some(*count) },
        };
        frame.to_bytes()
    }

    fn extend(&mut self, now: Now, agent: &AgentId, token: &Agent) -> Result<Done, Refusal> {
        let member = self.member(agent);
        if token.id != *agent || token.room != member.room {
            return Err(Refusal::Forbidden("the token is for another agent or another room"));
        }
        if !token.scopes.signal {
            return Err(Refusal::Forbidden("the token lacks the scope signal"));
        }
        member.expires = token.expires;
        self.set_deadline(now, agent);
        Ok(Done::Renewed(token.expires))
    }
}

// Coming and going.
impl Hub {
    fn new_connection(&mut self, tag: u64) -> ConnectionId {
        self.last_connection += 1;
        ConnectionId { serial: self.last_connection, tag }
    }

    fn admit(&self, agent: &AgentId) -> Result<(), Refusal> {
        if self.closed {
            return Err(Refusal::Unavailable("going down: try again soon"));
        }
        if !self.members.contains_key(agent) && self.members.len() >= self.limits.agents {
            return Err(Refusal::Unavailable("too many agents: try again later"));
        }
        Ok(())
    }

    /// Continues the agent's session or starts a new one. Gives the welcome, if it need not wait for other nodes.
    fn enter(
        &mut self,
        now: Now,
        agent: &Agent,
        hello: &Hello<'_>,
        join: Join<'_>,
        connection: Option<ConnectionId>,
    ) -> Answered<Option<Bytes>> {
        self.counters.frames_in += 1;
        self.settle_if_moved(now, agent, hello.resume.as_ref());
        let resumed = self.resume(now, agent, hello.resume.as_ref(), connection);
        if resumed {
            self.replace_card(now, &agent.id, hello.card);
        } else {
            let before = self.whereabouts(agent);
            // Beginning anew is no way around the limits.
            let bucket = self.members.get(&agent.id).map_or(Bucket::new(now.mono), |member| member.bucket);
            self.end(now, &agent.id, Some(Farewell::Replaced));
            self.start(now, agent, hello.card, join.fresh.clone(), connection);
            self.member(&agent.id).bucket = bucket;
            if self.elsewhere.is_some() {
                self.equip(&agent.id, &join);
                return match self.arrive(now, agent, hello, &join, before, connection.is_none()) {
                    Some(request) => Answered::Later(request),
                    None => Answered::Now(None),
                };
            }
            self.appear(now, &agent.id, false);
        }
        self.equip(&agent.id, &join);
        Answered::Now(Some(self.welcome(&agent.id, resumed, join.id, join.ice)))
    }

    fn equip(&mut self, agent: &AgentId, join: &Join<'_>) {
        let member = self.member(agent);
        member.ice_term = join.ice_term;
        if join.ends_with_bye {
            member.correspondents.get_or_insert_default();
        }
    }

    /// Where an agent that begins anew was before. What was asked for it in vain is not asked again.
    fn whereabouts(&mut self, agent: &Agent) -> Before {
        let Some(member) = self.members.get_mut(&agent.id) else { return Before::Unknown };
        match &mut member.arriving {
            None => Before::Here,
            Some(arriving) if member.room == agent.room => Before::Claimed(arriving.take_claim()),
            Some(_) => Before::Unknown,
        }
    }

    fn resume(
        &mut self,
        now: Now,
        agent: &Agent,
        resume: Option<&Resume>,
        connection: Option<ConnectionId>,
    ) -> bool {
        let Some(resume) = resume else { return false };
        let Some(member) = self.members.get(&agent.id) else { return false };
        let is_another = member.room != agent.room || member.session.id().as_str() != resume.session;
        if is_another || member.arriving.is_some() {
            return false;
        }
        if self.with_session(&agent.id, |session, _| session.rewind(resume.after)).is_err() {
            return false;
        }
        let member = self.member(&agent.id);
        member.session.drop_asides();
        member.expires = agent.expires;
        member.gone_at = None;
        if let Some(older) = std::mem::replace(&mut member.connection, connection) {
            self.dismiss(older, Farewell::Replaced);
        }
        self.set_deadline(now, &agent.id);
        true
    }

    fn start(
        &mut self,
        now: Now,
        agent: &Agent,
        card: Option<&RawValue>,
        fresh: SessionId,
        connection: Option<ConnectionId>,
    ) {
        self.last_session += 1;
        let member = Member {
            room: agent.room.clone(),
            card: card.map(|card| Arc::from(card.to_owned())),
            expires: agent.expires,
            session: Session::new(fresh),
            serial: self.last_session,
            since: now.wall.duration_since(std::time::UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64),
            arriving: None,
            heard: BTreeMap::new(),
            introduced: VecDeque::new(),
            connection,
            by_request: connection.is_none(),
            gone_at: None,
            deadline: now.mono,
            ice_term: None,
            correspondents: None,
            keeper: None,
            bucket: Bucket::new(now.mono),
        };
        self.members.insert(agent.id.clone(), member);
        let gathering = self.rooms.entry(agent.room.clone()).or_default();
        gathering.own += 1;
        let is_first = gathering.own == 1;
        self.set_deadline(now, &agent.id);
        if is_first {
            self.ask_about(&agent.room);
        }
    }

    fn welcome(
        &self,
        agent: &AgentId,
        resumed: bool,
        id: Option<FrameId<'_>>,
        ice: Option<&RawValue>,
    ) -> Bytes {
        let Member { room, session, .. } = &self.members[agent];
        let left = self.limits.max_frame.saturating_sub(WELCOME_FRAME + ice.map_or(0, |ice| ice.get().len()));
        let everybody = &self.rooms[room].everybody;
        let mut size = 0;
        let agents = everybody
            .keys()
            .filter(|other| *other != agent)
            .take(self.limits.presence_limit)
            .map(|other| self.listed(other))
            .take_while(|listed| {
                size += listed_size(listed.agent, listed.card);
                size <= left
            })
            .collect();
        ServerFrame::Welcome(Welcome {
            id,
            agent,
            room,
            session: session.id(),
            resumed,
            ice,
            agents,
            agent_count: everybody.len() - 1,
            heartbeat: self.limits.heartbeat.as_secs(),
            limits: self.announced(),
        })
        .to_bytes()
    }

    fn announced(&self) -> Announced {
        Announced {
            max_frame: limited(self.limits.max_frame),
            max_card: MAX_CARD,
            messages_per_second: self.limits.rate.map(|rate| rate.per_second),
            burst: self.limits.rate.map(|rate| rate.burst),
            window_messages: limited(self.limits.window_messages),
            window_bytes: limited(self.limits.window_bytes),
            presence_limit: limited(self.limits.presence_limit),
            resume_window: self.limits.resume_window.as_secs(),
        }
    }

    /// Leaves a session without a connection, to be resumed for a while.
    fn detach(&mut self, now: Now, agent: &AgentId) {
        let member = self.member(agent);
        member.connection = None;
        if !member.by_request {
            member.session.drop_asides();
        }
        self.set_gone_at(now, agent);
    }

    fn set_gone_at(&mut self, now: Now, agent: &AgentId) {
        let window = self.limits.resume_window;
        let member = self.member(agent);
        let window = if member.by_request { window.max(BETWEEN_REQUESTS) } else { window };
        member.gone_at = Some(now.mono + window);
        self.set_deadline(now, agent);
    }

    /// Ends the agent's session, if there is one.
    fn end(&mut self, now: Now, agent: &AgentId, farewell: Option<Farewell>) {
        let Some(member) = self.members.get(agent) else { return };
        let room = member.room.clone();
        let was_seen = member.arriving.as_ref().is_none_or(|arriving| arriving.is_of_another_node());
        // When only its token is over, or it begins anew, its connections with others live on.
        if matches!(farewell, None | Some(Farewell::Revoked)) {
            self.say_bye(agent);
        }
        if was_seen {
            self.tell_ours(now, &room, agent, &ServerFrame::AgentLeft { agent }.to_bytes());
            self.post_gone(&room, agent);
        }
        let member = self.remove(agent);
        if let (Some(connection), Some(farewell)) = (member.connection, farewell) {
            self.dismiss(connection, farewell);
        }
    }

    /// Takes the agent and its session out, as if it had never been here.
    fn remove(&mut self, agent: &AgentId) -> Member {
        self.unsubscribe(agent);
        let mut member = self.members.remove(agent).expect("only called for members");
        self.held_bytes -= member.session.held_bytes();
        self.deadlines.remove(&(member.deadline, agent.clone()));
        member.keeper.map(|place| self.keepers.remove(&place));
        let gathering = self.rooms.get_mut(&member.room).expect("it was there");
        gathering.own -= 1;
        match member.arriving.take() {
            None => _ = gathering.everybody.remove(agent),
            Some(arriving) => {
                gathering.arriving -= 1;
                self.give_up(&member.room, agent, *arriving);
            }
        }
        if self.rooms[&member.room].own == 0 {
            self.forget_room(&member.room);
        }
        member
    }

    fn dismiss(&mut self, connection: ConnectionId, farewell: Farewell) {
        self.connections.insert(connection, Line::Leaving(Some(farewell)));
        self.ready.push(connection);
    }

    /// `None` leaves the card as it is, `null` takes it away.
    fn replace_card(&mut self, now: Now, agent: &AgentId, card: Option<&RawValue>) {
        let Some(card) = card else { return };
        let member = self.member(agent);
        if member.card.as_deref().map(RawValue::get) == Some(card.get()) {
            return;
        }
        member.card = (card.get() != "null").then(|| Arc::from(card.to_owned()));
        if member.arriving.is_some() {
            return;
        }
        let room = member.room.clone();
        let gathering = self.rooms.get_mut(&room).expect("its room is there");
        gathering.everybody.insert(agent.clone(), Profile::of(card));
        let updated = ServerFrame::AgentUpdated(self.listed(agent)).to_bytes();
        self.tell_ours(now, &room, agent, &updated);
        self.post_changed(agent);
    }

    /// Presence of an agent, to all others of the room who are ours and have arrived, unless there are too many.
    fn tell_ours(&mut self, now: Now, room: &Room, agent: &AgentId, news: &Bytes) {
        let Some(gathering) = self.rooms.get(room).filter(|_| !self.is_crowded(room)) else { return };
        let others = gathering.everybody.keys().filter(|other| *other != agent);
        let ours: Vec<AgentId> = others.filter(|other| self.is_ours(room, other)).cloned().collect();
        ours.iter().for_each(|other| self.push_aside(now, other, news.clone()));
    }

    fn set_deadline(&mut self, now: Now, agent: &AgentId) {
        let member = self.members.get_mut(agent).expect("only members have deadlines");
        let left = Duration::from_secs(member.expires.saturating_sub(now.unix())).min(LONGEST_WAIT);
        let expiry = now.mono + left;
        let arrival = member.arriving.as_ref().map(|arriving| arriving.until);
        let deadline = [Some(expiry), member.gone_at, member.session.next_release(), arrival];
        let deadline = deadline.into_iter().flatten().min();
        let deadline = deadline.expect("a token always ends");
        self.deadlines.remove(&(member.deadline, agent.clone()));
        member.deadline = deadline;
        self.deadlines.insert((deadline, agent.clone()));
    }
}

// Looking things up.
impl Hub {
    fn member(&mut self, agent: &AgentId) -> &mut Member {
        self.members.get_mut(agent).expect("only called for members")
    }

    /// Changes a session and keeps the sum of all.
    fn with_session<T>(&mut self, agent: &AgentId, change: impl FnOnce(&mut Session, &Limits) -> T) -> T {
        let session = &mut self.members.get_mut(agent).expect("only called for members").session;
        let before = session.held_bytes();
        let outcome = change(session, &self.limits);
        self.held_bytes = self.held_bytes - before + session.held_bytes();
        outcome
    }

    fn listed<'a>(&'a self, agent: &'a AgentId) -> Listed<'a> {
        Listed { agent, card: self.card_of(agent).map(|card| &**card) }
    }

    /// Whether an agent is in the room at this node: one that is seen there may be at another, and here in another room.
    fn is_ours(&self, room: &Room, agent: &AgentId) -> bool {
        self.members.get(agent).is_some_and(|member| member.room == *room)
    }

    fn others(&self, agent: &AgentId) -> Vec<AgentId> {
        let everybody = &self.rooms[&self.members[agent].room].everybody;
        everybody.keys().filter(|other| *other != agent).cloned().collect()
    }

    fn is_crowded(&self, room: &Room) -> bool {
        self.rooms.get(room).is_some_and(|room| room.everybody.len() > self.limits.presence_limit)
    }

    /// Lost on an agent whose connection broke: it learns the present state when it resumes.
    fn push_aside(&mut self, now: Now, agent: &AgentId, frame: Bytes) {
        let member = self.member(agent);
        let most = match member.connection {
            Some(_) => MAX_ASIDE_BYTES,
            None if member.by_request => MAX_ASIDE_BYTES_BETWEEN_REQUESTS,
            None => return,
        };
        match (member.session.push_aside(frame, most), member.connection) {
            (Ok(()), connection) => self.ready.extend(connection),
            (Err(Full), Some(connection)) => self.hang_up(now, connection),
            (Err(Full), None) => {
                member.session.drop_asides();
                let lost = Refusal::Unavailable("presence was lost: ask GET /v1/agents");
                // There is room for one now.
                let _ = member.session.push_aside(ServerFrame::error(None, &lost).to_bytes(), most);
            }
        }
    }

    fn wake(&mut self, agent: &AgentId) {
        if let Some(connection) = self.members[agent].connection {
            self.ready.push(connection);
        }
    }
}

/// A limit worth telling.
fn limited(limit: usize) -> Option<usize> {
    (limit != usize::MAX).then_some(limit)
}

/// What an agent takes in a list of agents, about.
fn listed_size(agent: &AgentId, card: Option<&RawValue>) -> usize {
    agent.as_str().len() + card.map_or(0, |card| card.get().len()) + 32
}

#[cfg(test)]
mod tests {
    use std::{
        collections::{BTreeMap, BTreeSet},
        fmt::Write,
        time::{Duration, Instant, UNIX_EPOCH},
    };

    use serde_json::{Value, json};

    use super::{ConnectionId, Departure, Farewell, Hello, Hub, Join, Limits, Line, Outgoing, Query};
    use crate::{
        clock::Now,
        credentials::token::{Agent, AgentId, Room, Scopes},
        signaling::{
            limits::Rate,
            message::{self, Resume, SessionId},
            refusal::CODES,
        },
    };

    const T0: u64 = 1_800_000_000;

    fn limits() -> Limits {
        Limits {
            max_frame: 65536,
            window_messages: 256,
            window_bytes: 262_144,
            resume_window: Duration::from_secs(60),
            rate: None,
            presence_limit: 256,
            heartbeat: Duration::from_secs(25),
            agents: 100,
            held_bytes: 1 << 20,
        }
    }

    /// Plays every line `TIME NAME > frame` and `TIME NAME ! event`, and checks that the hub writes exactly the lines
    /// `TIME NAME < frame` after it. A name is a connection; `alice2` is a second connection of `alice`.
    #[track_caller]
    fn check(limits: Limits, capture: &str) {
        let expected: Vec<_> = capture.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
        let mut play = Play::new(limits);
        for line in &expected {
            let [time, name, way, what] = line.splitn(4, ' ').collect::<Vec<_>>()[..] else {
                panic!("{line}")
            };
            if way != "<" {
                play.advance(time.strip_suffix('s').unwrap().parse().unwrap());
                writeln!(play.transcript, "{line}").unwrap();
                play.act(name, way, what);
                play.write_out();
            }
        }
        assert_eq!(play.transcript.lines().collect::<Vec<_>>(), expected, "\n{}", play.transcript);
    }

    struct Play {
        hub: Hub,
        t0: Instant,
        seconds: u64,
        connections: BTreeMap<String, ConnectionId>,
        sessions: BTreeMap<String, String>,
        deaf: Vec<String>,
        woken: BTreeSet<ConnectionId>,
        /// The number that each agent must see next: every frame once, in order.
        next_seq: BTreeMap<String, u64>,
        transcript: String,
    }

    impl Play {
        #[expect(clippy::disallowed_methods, reason = "an Instant cannot be made from nothing")]
        fn new(limits: Limits) -> Self {
            Self {
                hub: Hub::new(limits),
                t0: Instant::now(),
                seconds: 0,
                connections: BTreeMap::new(),
                sessions: BTreeMap::new(),
                deaf: vec![],
                woken: BTreeSet::new(),
                next_seq: BTreeMap::new(),
                transcript: String::new(),
            }
        }

        fn now(&self) -> Now {
            let later = Duration::from_secs(self.seconds);
            Now { mono: self.t0 + later, wall: UNIX_EPOCH + Duration::from_secs(T0) + later }
        }

        fn advance(&mut self, to: u64) {
            while let Some(at) = self.hub.poll_timeout().filter(|at| *at <= self.t0 + Duration::from_secs(to))
            {
                self.seconds = self.seconds.max((at - self.t0).as_secs());
                self.hub.handle_timeout(self.now());
                self.write_out();
            }
            self.seconds = to;
        }

        fn act(&mut self, name: &str, way: &str, what: &str) {
            let now = self.now();
            match (way, what) {
                (">", what) if what.starts_with("hello") => self.hello(name, what),
                (">", what) => {
                    let frame = frame(what);
                    self.hub.handle(now, self.connections[name], message::parse(&frame));
                }
                ("!", "drops") => {
                    self.hub.leave(now, self.connections.remove(name).unwrap(), Departure::Dropped)
                }
                ("!", "leaves") => {
                    self.hub.leave(now, self.connections.remove(name).unwrap(), Departure::Left)
                }
                ("!", "stalls") => self.deaf.push(name.to_owned()),
                ("!", "reads") => self.deaf.retain(|deaf| deaf != name),
                ("!", "too-slow") => self.hub.hang_up(now, self.connections[name]),
                ("!", "renews") => {
                    let token = Ok(agent("alice", "main", T0 + 3600));
                    self.hub.renew(now, self.connections[name], None, token);
                }
                ("!", "restarts") => self.hub.restart(),
                ("!", "waits") => {}
                other => panic!("{other:?}"),
            }
        }

        /// `hello`, with `room=`, `ttl=`, `card=` or `resume=` after it.
        fn hello(&mut self, name: &str, what: &str) {
            let options: BTreeMap<_, _> = what.split(' ').filter_map(|word| word.split_once('=')).collect();
            let ttl: u64 = options.get("ttl").map_or(3600, |ttl| ttl.parse().unwrap());
            let who = name.trim_end_matches(char::is_numeric);
            let agent = agent(who, options.get("room").unwrap_or(&"main"), T0 + self.seconds + ttl);
            let card = options
                .get("card")
                .map(|name| serde_json::value::to_raw_value(&json!({"name": name})).unwrap());
            let resume = options.get("resume").map(|after| Resume {
                session: self.sessions.get(who).cloned().unwrap_or_default(),
                after: after.parse().unwrap(),
            });
            let after = resume.as_ref().map_or(0, |resume| resume.after);
            let hello = Hello { token: None, card: card.as_deref(), resume };
            let fresh = SessionId::from_random(u128::from(self.hub.last_connection).to_be_bytes());
            match self.hub.join(
                self.now(),
                &agent,
                &hello,
                Join { id: None, ice: None, ice_term: None, fresh, ends_with_bye: false, takes_any: false },
                0,
            ) {
                Ok(connection) => {
                    self.connections.insert(name.to_owned(), connection);
                    let resumed = Some(self.hub.members[&agent.id].session.id().as_str())
                        == self.sessions.get(who).map(String::as_str);
                    self.next_seq.insert(who.to_owned(), if resumed { after + 1 } else { 1 });
                }
                Err(refusal) => {
                    writeln!(self.transcript, "{}s {name} < {}", self.seconds, refusal.code()).unwrap()
                }
            }
        }

        fn write_out(&mut self) {
            self.woken.extend(self.hub.take_ready());
            for (name, connection) in self.connections.clone() {
                if self.deaf.contains(&name) {
                    continue;
                }
                while let Some(outgoing) = self.hub.next_outgoing(connection).map(|next| next.to_bytes()) {
                    assert!(self.woken.contains(&connection), "{name} was not woken");
                    let line = match outgoing {
                        Outgoing::Close(farewell) => self.close(&name, farewell),
                        Outgoing::Frame(frame) => {
                            self.summary(&name, &serde_json::from_slice(&frame).unwrap())
                        }
                    };
                    writeln!(self.transcript, "{}s {name} < {line}", self.seconds).unwrap();
                }
                self.woken.remove(&connection);
            }
        }

        fn close(&mut self, name: &str, farewell: Farewell) -> String {
            let connection = self.connections.remove(name).unwrap();
            self.hub.leave(self.now(), connection, Departure::Dropped);
            let frame = farewell.frame().map(|frame| String::from_utf8(frame.to_vec()).unwrap() + " ");
            format!("{}close {}", frame.unwrap_or_default(), farewell.close_code())
        }

        fn summary(&mut self, name: &str, frame: &Value) -> String {
            if let Some(session) = frame["session"].as_str() {
                let who = name.trim_end_matches(char::is_numeric);
                self.sessions.insert(who.to_owned(), session.to_owned());
            }
            if let Some(seq) = frame["seq"].as_u64() {
                let next = self.next_seq.get_mut(name.trim_end_matches(char::is_numeric)).unwrap();
                assert_eq!(seq, *next, "{name} missed or repeated a frame");
                *next += 1;
            }
            let mut line = frame["type"].as_str().unwrap().to_owned();
            for member in [
                "id",
                "seq",
                "from",
                "to",
                "polite",
                "payload",
                "candidate",
                "agent",
                "room",
                "resumed",
                "agentCount",
                "count",
                "code",
                "retryAfter",
                "expiresAt",
            ] {
                if let Some(value) = frame.get(member) {
                    write!(line, " {member}={}", value.to_string().trim_matches('"')).unwrap();
                }
            }
            if let Some(card) = frame.get("card") {
                write!(line, " card={}", card["name"].as_str().unwrap()).unwrap();
            }
            for listed in frame["agents"].as_array().into_iter().flatten() {
                write!(line, " +{}", listed["agent"].as_str().unwrap()).unwrap();
            }
            line
        }
    }

    fn agent(id: &str, room: &str, expires: u64) -> Agent {
        Agent {
            id: AgentId::parse(id).unwrap(),
            room: Room::parse(room).unwrap(),
            scopes: Scopes::default(),
            expires,
            issued: None,
        }
    }

    /// `offer to bob id=7`, or JSON as it is.
    fn frame(what: &str) -> String {
        if what.starts_with('{') {
            return what.to_owned();
        }
        let mut words = what.split(' ');
        let kind = words.next().unwrap();
        let mut frame = json!({"type": kind});
        match kind {
            "offer" | "answer" => frame["sdp"] = json!("v=0"),
            "message" => frame["payload"] = json!(1),
            "iceCandidate" => frame["candidate"] = Value::Null,
            _ => {}
        }
        while let Some(word) = words.next() {
            match word.split_once('=') {
                Some((member, value)) => frame[member] = serde_json::from_str(value).unwrap_or(json!(value)),
                None if word == "to" => frame["to"] = json!(words.next().unwrap()),
                None => panic!("{what}"),
            }
        }
        frame.to_string()
    }

    #[test]
    fn two_agents_meet() {
        check(
            limits(),
            "
            0s alice > hello
            0s alice < welcome agent=alice room=main resumed=false agentCount=0
            1s bob > hello card=Bob
            1s alice < agentJoined agent=bob card=Bob
            1s bob < welcome agent=bob room=main resumed=false agentCount=1 +alice
            2s alice > offer to bob id=7
            2s alice < delivered id=7
            2s bob < offer seq=1 from=alice to=bob polite=true
            2s bob > answer to alice
            2s alice < answer seq=1 from=bob to=alice
            2s bob > iceCandidate to alice
            2s alice < iceCandidate seq=2 from=bob to=alice candidate=null
            2s bob > offer to alice
            2s alice < offer seq=3 from=bob to=alice polite=false
            3s alice > message to bob payload=hi
            3s bob < message seq=2 from=alice to=bob payload=hi
            4s alice > bye to bob
            4s bob < bye seq=3 from=alice to=bob
            5s alice > ping id=x
            5s alice < pong id=x
            5s alice > ping
            5s alice < pong
            6s bob ! leaves
            6s alice < agentLeft agent=bob
            7s alice > bye to bob id=8
            7s alice < error id=8 code=peerUnavailable
            ",
        );
    }

    const ALICE_AND_BOB: &str = "
            0s alice > hello
            0s alice < welcome agent=alice room=main resumed=false agentCount=0
            0s bob > hello
            0s alice < agentJoined agent=bob
            0s bob < welcome agent=bob room=main resumed=false agentCount=1 +alice
            ";

    #[test]
    fn a_candidate_waits_for_its_senders_first_description() {
        check(
            limits(),
            &(ALICE_AND_BOB.to_owned()
                + "
            1s alice > iceCandidate to bob candidate={\"n\":1} id=1
            1s alice < delivered id=1
            2s alice > iceCandidate to bob candidate={\"n\":2}
            3s alice > offer to bob
            3s bob < offer seq=1 from=alice to=bob polite=true
            3s bob < iceCandidate seq=2 from=alice to=bob candidate={\"n\":1}
            3s bob < iceCandidate seq=3 from=alice to=bob candidate={\"n\":2}
            4s alice > iceCandidate to bob
            4s bob < iceCandidate seq=4 from=alice to=bob candidate=null
            5s bob > iceCandidate to alice
            6s bob > answer to alice
            6s alice < answer seq=1 from=bob to=alice
            6s alice < iceCandidate seq=2 from=bob to=alice candidate=null
            7s alice > bye to bob
            7s bob < bye seq=5 from=alice to=bob
            8s alice > iceCandidate to bob
            9s alice > offer to bob
            9s bob < offer seq=6 from=alice to=bob polite=true
            9s bob < iceCandidate seq=7 from=alice to=bob candidate=null
            "),
        );
    }

    #[test]
    fn a_candidate_waits_five_seconds_at_most_and_keeps_its_place() {
        check(
            limits(),
            &(ALICE_AND_BOB.to_owned()
                + "
            1s alice > iceCandidate to bob candidate={\"n\":1}
            2s alice > iceCandidate to bob candidate={\"n\":2}
            6s bob < iceCandidate seq=1 from=alice to=bob candidate={\"n\":1}
            7s bob < iceCandidate seq=2 from=alice to=bob candidate={\"n\":2}
            8s alice > iceCandidate to bob candidate={\"n\":3}
            9s alice > message to bob payload=3
            9s bob < iceCandidate seq=3 from=alice to=bob candidate={\"n\":3}
            9s bob < message seq=4 from=alice to=bob payload=3
            10s alice > iceCandidate to bob candidate={\"n\":4}
            10s alice > message payload=5
            10s bob < iceCandidate seq=5 from=alice to=bob candidate={\"n\":4}
            10s bob < message seq=6 from=alice payload=5
            "),
        );
    }

    #[test]
    fn early_candidates_take_room_and_survive_a_dropped_socket() {
        check(
            Limits { window_messages: 2, ..limits() },
            &(ALICE_AND_BOB.to_owned()
                + "
            1s bob ! drops
            1s alice > iceCandidate to bob candidate={\"n\":1}
            1s alice > iceCandidate to bob candidate={\"n\":2}
            1s alice > iceCandidate to bob candidate={\"n\":3} id=3
            1s alice < error id=3 code=queueFull retryAfter=1
            7s bob2 > hello resume=0
            7s bob2 < welcome agent=bob room=main resumed=true agentCount=1 +alice
            7s bob2 < iceCandidate seq=1 from=alice to=bob candidate={\"n\":1}
            7s bob2 < iceCandidate seq=2 from=alice to=bob candidate={\"n\":2}
            8s alice > iceCandidate to bob candidate={\"n\":4}
            9s alice ! leaves
            9s bob2 < agentLeft agent=alice
            13s bob2 < iceCandidate seq=3 from=alice to=bob candidate={\"n\":4}
            14s bob2 ! waits
            "),
        );
    }

    #[test]
    fn a_new_session_of_the_sender_is_introduced_anew() {
        check(
            limits(),
            &(ALICE_AND_BOB.to_owned()
                + "
            1s alice > offer to bob
            1s bob < offer seq=1 from=alice to=bob polite=true
            2s alice ! leaves
            2s bob < agentLeft agent=alice
            3s alice > hello
            3s alice < welcome agent=alice room=main resumed=false agentCount=1 +bob
            3s bob < agentJoined agent=alice
            4s alice > iceCandidate to bob
            9s bob < iceCandidate seq=2 from=alice to=bob candidate=null
            10s bob ! waits
            "),
        );
    }

    #[test]
    fn rooms_know_nothing_of_each_other() {
        check(
            limits(),
            "
            0s alice > hello
            0s alice < welcome agent=alice room=main resumed=false agentCount=0
            0s eve > hello room=other
            0s eve < welcome agent=eve room=other resumed=false agentCount=0
            1s eve > offer to alice id=1
            1s eve < error id=1 code=peerUnavailable
            1s eve > offer to nobody id=1
            1s eve < error id=1 code=peerUnavailable
            1s eve > {\"type\":\"bye\",\"id\":1,\"to\":\"\\u0000 no id\"}
            1s eve < error id=1 code=peerUnavailable
            1s eve > message id=2
            1s eve < delivered id=2 count=0
            1s eve ! leaves
            ",
        );
    }

    #[test]
    fn a_message_without_to_goes_to_the_room() {
        check(
            limits(),
            "
            0s alice > hello
            0s alice < welcome agent=alice room=main resumed=false agentCount=0
            0s bob > hello
            0s alice < agentJoined agent=bob
            0s bob < welcome agent=bob room=main resumed=false agentCount=1 +alice
            0s carol > hello
            0s alice < agentJoined agent=carol
            0s bob < agentJoined agent=carol
            0s carol < welcome agent=carol room=main resumed=false agentCount=2 +alice +bob
            1s alice > message to bob
            1s bob < message seq=1 from=alice to=bob payload=1
            1s alice > message id=1
            1s alice < delivered id=1 count=2
            1s bob < message seq=2 from=alice payload=1
            1s carol < message seq=1 from=alice payload=1
            ",
        );
    }

    #[test]
    fn cards_change() {
        check(
            limits(),
            "
            0s alice > hello card=A
            0s alice < welcome agent=alice room=main resumed=false agentCount=0
            0s bob > hello
            0s alice < agentJoined agent=bob
            0s bob < welcome agent=bob room=main resumed=false agentCount=1 +alice
            1s alice > {\"type\":\"update\",\"card\":{\"name\":\"B\"},\"id\":1}
            1s alice < delivered id=1
            1s bob < agentUpdated agent=alice card=B
            1s alice > {\"type\":\"update\",\"card\":{\"name\":\"B\"}}
            1s alice > {\"type\":\"update\",\"card\":null}
            1s bob < agentUpdated agent=alice
            ",
        );
    }

    #[test]
    fn nobody_speaks_for_another() {
        check(
            limits(),
            "
            0s alice > hello
            0s alice < welcome agent=alice room=main resumed=false agentCount=0
            0s bob > hello
            0s alice < agentJoined agent=bob
            0s bob < welcome agent=bob room=main resumed=false agentCount=1 +alice
            1s bob > bye to alice from=carol id=1
            1s bob < error id=1 code=badFrame
            1s bob > bye to alice from=bob
            1s alice < bye seq=1 from=bob to=alice
            1s bob > bye to bob id=2
            1s bob < error id=2 code=badFrame
            1s bob > {\"type\":\"hello\",\"id\":3}
            1s bob < error id=3 code=badFrame
            1s bob > nonsense id=4
            1s bob < error id=4 code=badFrame
            1s bob > {\"type\":
            1s bob < error code=badFrame
            ",
        );
    }

    #[test]
    fn the_newest_connection_takes_over() {
        check(
            limits(),
            "
            0s alice > hello
            0s alice < welcome agent=alice room=main resumed=false agentCount=0
            0s bob > hello
            0s alice < agentJoined agent=bob
            0s bob < welcome agent=bob room=main resumed=false agentCount=1 +alice
            1s alice2 > hello
            1s alice < {\"type\":\"replaced\"} close 4005
            1s alice2 < welcome agent=alice room=main resumed=false agentCount=1 +bob
            1s bob < agentLeft agent=alice
            1s bob < agentJoined agent=alice
            2s bob > bye to alice
            2s alice2 < bye seq=1 from=bob to=alice
            3s alice3 > hello room=other
            3s alice2 < {\"type\":\"replaced\"} close 4005
            3s alice3 < welcome agent=alice room=other resumed=false agentCount=0
            3s bob < agentLeft agent=alice
            ",
        );
    }

    #[test]
    fn a_replaced_connection_is_not_listened_to() {
        check(
            limits(),
            "
            0s alice > hello
            0s alice < welcome agent=alice room=main resumed=false agentCount=0
            0s alice ! stalls
            1s alice2 > hello
            1s alice2 < welcome agent=alice room=main resumed=false agentCount=0
            1s alice > ping
            1s alice ! reads
            1s alice < {\"type\":\"replaced\"} close 4005
            ",
        );
    }

    #[test]
    fn a_dropped_connection_is_resumed() {
        check(
            limits(),
            "
            0s alice > hello card=A
            0s alice < welcome agent=alice room=main resumed=false agentCount=0
            0s bob > hello
            0s alice < agentJoined agent=bob
            0s bob < welcome agent=bob room=main resumed=false agentCount=1 +alice
            1s bob > message to alice payload=1
            1s alice < message seq=1 from=bob to=alice payload=1
            1s bob > message to alice payload=2
            1s alice < message seq=2 from=bob to=alice payload=2
            2s alice ! drops
            3s bob > message to alice payload=3 id=3
            3s bob < delivered id=3
            9s alice > hello resume=1
            9s alice < welcome agent=alice room=main resumed=true agentCount=1 +bob
            9s alice < message seq=2 from=bob to=alice payload=2
            9s alice < message seq=3 from=bob to=alice payload=3
            10s alice > received upTo=3 id=1
            10s alice < delivered id=1
            11s alice2 > hello resume=2
            11s alice < {\"type\":\"replaced\"} close 4005
            11s alice2 < welcome agent=alice room=main resumed=false agentCount=1 +bob
            11s bob < agentLeft agent=alice
            11s bob < agentJoined agent=alice
            ",
        );
    }

    #[test]
    fn a_resumed_session_takes_over_from_a_connection_that_still_seems_alive() {
        check(
            limits(),
            "
            0s alice > hello
            0s alice < welcome agent=alice room=main resumed=false agentCount=0
            1s alice2 > hello resume=0
            1s alice < {\"type\":\"replaced\"} close 4005
            1s alice2 < welcome agent=alice room=main resumed=true agentCount=0
            2s alice3 > hello resume=0 room=other
            2s alice2 < {\"type\":\"replaced\"} close 4005
            2s alice3 < welcome agent=alice room=other resumed=false agentCount=0
            ",
        );
    }

    #[test]
    fn after_the_resume_window_the_agent_has_left() {
        check(
            limits(),
            "
            0s alice > hello
            0s alice < welcome agent=alice room=main resumed=false agentCount=0
            0s bob > hello
            0s alice < agentJoined agent=bob
            0s bob < welcome agent=bob room=main resumed=false agentCount=1 +alice
            5s alice ! drops
            64s bob > bye to alice id=1
            64s bob < delivered id=1
            65s bob < agentLeft agent=alice
            66s bob ! waits
            67s bob > bye to alice id=2
            67s bob < error id=2 code=peerUnavailable
            68s alice > hello resume=0
            68s alice < welcome agent=alice room=main resumed=false agentCount=1 +bob
            68s bob < agentJoined agent=alice
            ",
        );
    }

    #[test]
    fn a_session_ends_with_its_token() {
        check(
            limits(),
            "
            0s alice > hello ttl=90
            0s alice < welcome agent=alice room=main resumed=false agentCount=0
            0s bob > hello
            0s alice < agentJoined agent=bob
            0s bob < welcome agent=bob room=main resumed=false agentCount=1 +alice
            90s alice < {\"type\":\"ended\",\"code\":\"expired\"} close 4001
            90s bob < agentLeft agent=alice
            91s bob ! waits
            ",
        );
    }

    #[test]
    fn a_renewed_token_keeps_the_session() {
        check(
            limits(),
            "
            0s alice > hello ttl=90
            0s alice < welcome agent=alice room=main resumed=false agentCount=0
            1s alice ! renews
            1s alice < renewed expiresAt=2027-01-15T09:00:00Z
            90s alice > ping
            90s alice < pong
            91s bob > hello
            91s alice < agentJoined agent=bob
            91s bob < welcome agent=bob room=main resumed=false agentCount=1 +alice
            91s bob ! renews
            91s bob < error code=forbidden
            3600s alice < {\"type\":\"ended\",\"code\":\"expired\"} close 4001
            3600s bob < agentLeft agent=alice
            3601s bob ! waits
            ",
        );
    }

    #[test]
    fn too_many_frames_are_refused_and_say_for_how_long() {
        check(
            Limits { rate: Rate::new(1, 3), ..limits() },
            "
            0s alice > hello
            0s alice < welcome agent=alice room=main resumed=false agentCount=0
            0s alice > ping
            0s alice < pong
            0s alice > ping
            0s alice < pong
            0s alice > nonsense id=1
            0s alice < error id=1 code=badFrame
            0s alice > ping id=2
            0s alice < error id=2 code=rateLimited retryAfter=1
            0s alice > nonsense id=3
            0s alice < error id=3 code=rateLimited retryAfter=1
            1s alice > ping id=4
            1s alice < pong id=4
            ",
        );
    }

    #[test]
    fn a_full_window_is_the_senders_business() {
        check(
            Limits { window_messages: 2, ..limits() },
            "
            0s alice > hello
            0s alice < welcome agent=alice room=main resumed=false agentCount=0
            0s bob > hello
            0s alice < agentJoined agent=bob
            0s bob < welcome agent=bob room=main resumed=false agentCount=1 +alice
            1s alice ! stalls
            1s bob > bye to alice id=1
            1s bob < delivered id=1
            1s bob > bye to alice id=2
            1s bob < delivered id=2
            1s bob > bye to alice id=3
            1s bob < error id=3 code=queueFull retryAfter=1
            1s bob > message id=4
            1s bob < delivered id=4 count=0
            2s alice ! reads
            2s alice < bye seq=1 from=bob to=alice
            2s alice < bye seq=2 from=bob to=alice
            2s bob > bye to alice id=5
            2s alice < bye seq=3 from=bob to=alice
            2s bob < delivered id=5
            ",
        );
    }

    #[test]
    fn a_connection_that_does_not_read_is_closed_and_its_session_waits() {
        check(
            limits(),
            "
            0s alice > hello
            0s alice < welcome agent=alice room=main resumed=false agentCount=0
            0s bob > hello
            0s alice < agentJoined agent=bob
            0s bob < welcome agent=bob room=main resumed=false agentCount=1 +alice
            1s alice ! too-slow
            1s alice < close 4003
            2s bob > bye to alice id=1
            2s bob < delivered id=1
            3s alice > hello resume=0
            3s alice < welcome agent=alice room=main resumed=true agentCount=1 +bob
            3s alice < bye seq=1 from=bob to=alice
            ",
        );
    }

    #[test]
    fn answers_that_nobody_reads_close_the_connection() {
        let mut play = Play::new(limits());
        play.act("alice", ">", "hello");
        play.act("alice", "!", "stalls");
        for _ in 0..2000 {
            play.act("alice", ">", "ping");
        }
        play.act("alice", "!", "reads");
        play.write_out();
        assert_eq!(play.transcript, "0s alice < close 4003\n");
    }

    #[test]
    fn large_rooms_have_no_presence() {
        check(
            Limits { presence_limit: 2, ..limits() },
            "
            0s alice > hello
            0s alice < welcome agent=alice room=main resumed=false agentCount=0
            0s bob > hello
            0s alice < agentJoined agent=bob
            0s bob < welcome agent=bob room=main resumed=false agentCount=1 +alice
            0s carol > hello
            0s carol < welcome agent=carol room=main resumed=false agentCount=2 +alice +bob
            0s dave > hello
            0s dave < welcome agent=dave room=main resumed=false agentCount=3 +alice +bob
            1s alice > message id=1
            1s alice < error id=1 code=tooLarge
            1s carol ! leaves
            2s bob > bye to dave
            2s dave < bye seq=1 from=bob to=dave
            ",
        );
    }

    #[test]
    fn the_instance_holds_so_many_agents() {
        check(
            Limits { agents: 1, ..limits() },
            "
            0s alice > hello
            0s alice < welcome agent=alice room=main resumed=false agentCount=0
            0s bob > hello
            0s bob < unavailable
            0s alice2 > hello
            0s alice < {\"type\":\"replaced\"} close 4005
            0s alice2 < welcome agent=alice room=main resumed=false agentCount=0
            ",
        );
    }

    #[test]
    fn the_windows_of_all_are_bounded_together() {
        let mut play = Play::new(Limits { held_bytes: 100, ..limits() });
        for name in ["alice", "bob", "carol"] {
            play.act(name, ">", "hello");
        }
        play.write_out();
        for to in ["alice", "alice", "bob", "alice", "bob"] {
            play.act("carol", ">", &format!("bye to {to}"));
            play.write_out();
        }
        let delivered = play.transcript.lines().filter(|line| line.contains("bye")).count();
        assert_eq!(delivered, 5, "what is written makes room: {}", play.transcript);
        play.act("alice", "!", "stalls");
        for _ in 0..6 {
            play.act("carol", ">", "bye to alice id=1");
        }
        assert!(play.hub.counters().held_bytes <= 100);
        play.write_out();
        assert!(play.transcript.contains("code=queueFull"));
        for name in ["alice", "bob", "carol"] {
            play.act(name, "!", "leaves");
        }
        assert_eq!(play.hub.counters().held_bytes, 0);
    }

    #[test]
    fn what_others_have_read_fills_nobodys_window() {
        check(
            Limits { held_bytes: 60, ..limits() },
            &(ALICE_AND_BOB.to_owned()
                + "
            1s bob > message to alice payload=12345
            1s alice < message seq=1 from=bob to=alice payload=12345
            2s alice > message to bob payload=12345 id=1
            2s alice < delivered id=1
            2s bob < message seq=1 from=alice to=bob payload=12345
            3s alice ! drops
            3s alice > hello resume=0
            3s alice < welcome agent=alice room=main resumed=false agentCount=1 +bob
            3s bob < agentLeft agent=alice
            3s bob < agentJoined agent=alice
            "),
        );
    }

    #[test]
    fn a_restart_spreads_the_agents_return() {
        let mut play = Play::new(limits());
        for name in ["alice", "bob", "carol"] {
            play.act(name, ">", "hello");
        }
        play.act("bob", "!", "drops");
        play.write_out();
        play.transcript.clear();
        play.act("all", "!", "restarts");
        play.write_out();
        for wait in ["1", "2"] {
            let frame =
                format!("{{\"type\":\"restarting\",\"reconnectIn\":{wait},\"tryFor\":60}} close 1012");
            assert!(play.transcript.contains(&frame), "{}", play.transcript);
        }
        let counters = play.hub.counters();
        assert_eq!((counters.agents, counters.rooms, play.hub.poll_timeout()), (0, 0, None));
    }

    #[test]
    fn a_room_is_listed_in_pages() {
        let mut play = Play::new(limits());
        for name in ["a", "b", "c", "d"] {
            play.act(name, ">", "hello card=x");
        }
        play.act("e", ">", "hello room=other");
        let ids = |after: &str, limit, bytes| {
            let page = play.hub.page(&Room::main(), &Query::default(), after, limit, bytes);
            let ids: Vec<_> = page.agents.iter().map(|entry| entry.agent.as_str().to_owned()).collect();
            (ids.join(""), page.next.map(|next| next.as_str().to_owned()), page.agent_count)
        };
        assert_eq!(ids("", 9, 9999), ("abcd".to_owned(), None, 4));
        assert_eq!(ids("", 2, 9999), ("ab".to_owned(), Some("b".to_owned()), 4));
        assert_eq!(ids("b", 2, 9999), ("cd".to_owned(), None, 4));
        assert_eq!(ids("", 9, 1), ("a".to_owned(), Some("a".to_owned()), 4));
        assert_eq!(play.hub.page(&Room::parse("none").unwrap(), &Query::default(), "", 9, 9).agent_count, 0);
    }

    #[test]
    fn everything_is_counted_and_nothing_stays() {
        let mut play = Play::new(limits());
        play.act("alice", ">", "hello");
        play.act("bob", ">", "hello");
        play.act("alice", ">", "message");
        play.act("alice", ">", "nonsense");
        play.write_out();
        let counters = play.hub.counters();
        assert_eq!((counters.connections, counters.agents, counters.rooms), (2, 2, 1));
        assert_eq!((counters.frames_in, counters.frames_out, counters.delivered), (4, 5, 1));
        let bad_frames = CODES.iter().position(|code| *code == "badFrame").unwrap();
        assert_eq!((counters.errors[bad_frames], counters.errors.iter().sum::<u64>()), (1, 1));
        play.act("alice", "!", "leaves");
        play.act("bob", "!", "drops");
        play.advance(60);
        let counters = play.hub.counters();
        assert_eq!(
            (counters.connections, counters.agents, counters.rooms, counters.held_bytes),
            (0, 0, 0, 0)
        );
    }

    /// What must be true of the hub at any time.
    fn assert_consistent(hub: &Hub) {
        assert_eq!(hub.deadlines.len(), hub.members.len());
        let mut in_rooms = 0;
        for (room, gathering) in &hub.rooms {
            assert!(gathering.own > 0);
            assert!(gathering.everybody.keys().all(|agent| hub.members[agent].room == *room));
            assert_eq!(gathering.own, gathering.everybody.len());
            in_rooms += gathering.own;
        }
        assert_eq!(in_rooms, hub.members.len());
        for (agent, member) in &hub.members {
            assert!(hub.deadlines.contains(&(member.deadline, agent.clone())));
            assert_ne!(member.connection.is_some(), member.gone_at.is_some());
            assert!(!member.session.keeps_written() || member.keeper.is_some());
            if let Some(connection) = member.connection {
                assert!(matches!(&hub.connections[&connection], Line::Live(live) if live == agent));
            }
        }
        let keepers = hub.members.iter().filter_map(|(agent, member)| Some((member.keeper?, agent.clone())));
        assert_eq!(keepers.collect::<BTreeMap<_, _>>(), hub.keepers);
        let live = hub.connections.values().filter(|line| matches!(line, Line::Live(_))).count();
        assert_eq!(live, hub.members.values().filter(|member| member.connection.is_some()).count());
        let held: usize = hub.members.values().map(|member| member.session.held_bytes()).sum();
        assert_eq!(held, hub.held_bytes);
        assert!(held <= hub.limits.held_bytes);
    }

    const WHO: [&str; 4] = ["alice", "bob", "carol", "dave"];
    const WHAT: [&str; 14] = [
        "> hello",
        "> hello room=other",
        "> hello ttl=40 card=X",
        "> hello resume=0",
        "> hello resume=2",
        "! drops",
        "! leaves",
        "! too-slow",
        "! stalls",
        "! reads",
        "> message",
        "> message to alice",
        "> offer to bob id=1",
        "> received upTo=1",
    ];

    proptest::proptest! {
        #[test]
        fn whatever_agents_do_the_hub_is_consistent(
            steps in proptest::collection::vec((0..WHO.len(), 0..WHAT.len(), 0..30_u64), 1..120)
        ) {
            let small = Limits { window_messages: 3, held_bytes: 400, presence_limit: 3, ..limits() };
            let mut play = Play::new(small);
            for (who, what, pause) in steps {
                let (name, (way, what)) = (WHO[who], WHAT[what].split_once(' ').unwrap());
                play.advance(play.seconds + pause / 10);
                if way == "!" || !what.starts_with("hello") {
                    if !play.connections.contains_key(name) {
                        continue;
                    }
                } else if let Some(older) = play.connections.remove(name) {
                    // The older socket breaks just then.
                    play.hub.leave(play.now(), older, Departure::Dropped);
                }
                play.act(name, way, what);
                play.write_out();
                assert_consistent(&play.hub);
            }
            play.deaf.clear();
            play.write_out();
            for (_, connection) in std::mem::take(&mut play.connections) {
                play.hub.leave(play.now(), connection, Departure::Dropped);
            }
            play.advance(play.seconds + 60);
            assert_consistent(&play.hub);
            proptest::prop_assert!(play.hub.members.is_empty() && play.hub.connections.is_empty());
        }

        #[test]
        fn no_text_is_too_odd_to_parse(any: String, text in r#"[{}\[\]",:a-z0-9\\]{0,60}"#) {
            drop(message::parse(&any).map(|frame| format!("{frame:?}")));
            drop(message::parse(&text).map(|frame| format!("{frame:?}")));
        }
    }
}
