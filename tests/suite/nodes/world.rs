//! Three hubs, an engine between them with words under way, and agents that know only what they hear.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    time::{Duration, UNIX_EPOCH},
};

use bytes::Bytes;
use halfway::{
    clock::{self, Now},
    credentials::{
        revocations::Revocations,
        signaled::Signaled,
        token::{Agent, AgentId, Room, Scopes},
    },
    signaling::{
        hub::{ConnectionId, Departure, Hub, Join, Outgoing},
        limits::Limits,
        message::{self, Hello, Resume, SessionId},
        nodes::{Ear, Errand, NodeId},
        registry::Query,
    },
};
use serde_json::{Value, json, value::RawValue};

use super::{AGENTS, NODES, Name, ROOMS, Step};

const T0: u64 = 1_800_000_000;

/// What a node listens to: an agent of a room, or what is said to itself and to all.
type Listened = Option<(Room, AgentId)>;

pub struct World {
    start: Now,
    millis: u64,
    nodes: Vec<Node>,
    clients: BTreeMap<Name, Client>,
    /// Of each frame: who said it, in which session, to whom, and whether it was called delivered.
    said: Vec<Said>,
    born: u64,
    pub tally: BTreeMap<&'static str, usize>,
}

struct Node {
    id: NodeId,
    hub: Hub,
    /// The engine hears it, and it the engine.
    linked: bool,
    /// What the hub has been told of that.
    is_up: bool,
    subscribed: BTreeSet<(Room, AgentId)>,
    /// Words that the engine has not heard.
    outgoing: VecDeque<Errand>,
    /// Words that the node has not heard, by what they were said to; in each in order.
    incoming: BTreeMap<Listened, VecDeque<Bytes>>,
    /// Who says that nobody heard.
    nobody: VecDeque<u64>,
    /// Connections that are open as far as the node knows.
    lines: BTreeMap<ConnectionId, Name>,
}

#[derive(Default)]
struct Client {
    /// And the node that it is at.
    connection: Option<(usize, ConnectionId)>,
    session: Option<String>,
    last_seen: u64,
    present: BTreeMap<String, Value>,
    room: Name,
    /// Of each sender, and connection of it, the last number, in this session: what is under way while a sender goes to
    /// another node may come behind what it says there.
    heard: BTreeMap<(String, u64), u64>,
    /// Numbers of frames, in this session.
    has: BTreeSet<u64>,
    /// Ids whose answers have not come, and the connection that they were said over, which alone may answer them.
    waits: BTreeMap<u64, u64>,
    /// Counts its connections.
    line: u64,
    /// The node has not said that it is welcome.
    greeted: bool,
}

struct Said {
    from: Name,
    to: Option<Name>,
    /// The sender's connection.
    line: u64,
    /// The only session that the receiver had anywhere then; there may be others while nodes do not hear of each other.
    session: Option<String>,
    delivered: bool,
    node: usize,
}

fn limits() -> Limits {
    Limits {
        max_frame: 65_536,
        window_messages: 10_000,
        window_bytes: usize::MAX,
        resume_window: Duration::from_secs(60),
        rate: None,
        presence_limit: 100,
        heartbeat: Duration::from_secs(25),
        agents: 100,
        held_bytes: usize::MAX,
    }
}

impl World {
    pub fn new() -> Self {
        let start = Now { wall: UNIX_EPOCH + Duration::from_secs(T0), ..clock::now() };
        let mut world = Self {
            start,
            millis: 0,
            nodes: Vec::new(),
            clients: AGENTS
                .iter()
                .map(|who| (*who, Client { room: ROOMS[0], ..Client::default() }))
                .collect(),
            said: Vec::new(),
            born: 0,
            tally: BTreeMap::new(),
        };
        for _ in 0..NODES {
            let node = world.node();
            world.nodes.push(node);
        }
        world.settle();
        world
    }

    fn count(&mut self, what: &'static str) {
        *self.tally.entry(what).or_default() += 1;
    }

    fn now(&self) -> Now {
        self.start + Duration::from_millis(self.millis)
    }

    /// A new one, which the engine can reach.
    fn node(&mut self) -> Node {
        self.born += 1;
        // High parts that differ, as random ones do.
        let id = NodeId(self.born << 40 | self.born);
        let mut hub = Hub::new(limits());
        hub.join_cluster(self.now(), id, "node", RawValue::NULL.to_owned(), Revocations::default());
        hub.engine_is_up(self.now());
        Node {
            id,
            hub,
            linked: true,
            is_up: true,
            subscribed: BTreeSet::new(),
            outgoing: VecDeque::new(),
            incoming: BTreeMap::new(),
            nobody: VecDeque::new(),
            lines: BTreeMap::new(),
        }
    }

    pub fn act(&mut self, step: &Step) {
        match *step {
            Step::Connect { who, node, room, resumes } => self.connect(who, node, room, resumes),
            Step::Say { who, to, id } => self.say(who, Some(to), id),
            Step::SayToAll { who, id } => self.say(who, None, id),
            Step::Read(who) => self.read(who),
            Step::Break { who, lost, noticed } => self.break_off(who, lost, noticed),
            Step::Leave(who) => self.leave(who),
            Step::Update(who, card) => {
                self.tell(who, &json!({"type": "update", "card": {"number": card}}));
            }
            Step::Flush(node) => self.flush(node),
            Step::Hear { node, which, words } => self.hear(node, which, words),
            Step::Settle => self.settle(),
            Step::Cut(node) => self.cut(node),
            Step::Notice(node) => self.notice(node),
            Step::Mend(node) => self.mend(node),
            Step::RestartEngine => {
                self.count("engine restarted");
                (0..NODES).for_each(|node| self.cut(node));
                (0..NODES).for_each(|node| self.mend(node));
            }
            Step::Crash(node) => self.crash(node),
            Step::Wait { millis } => self.wait(millis),
        }
    }

    /// From now on nodes note which addresses agents are told. Gives what each of them notes.
    pub fn note_addresses(&mut self) -> Vec<Signaled> {
        let noting = self.nodes.iter_mut().map(|node| {
            let signaled = Signaled::default();
            node.hub.adopt(limits(), Some(signaled.clone()));
            signaled
        });
        noting.collect()
    }

    // Agents.

    fn connect(&mut self, who: Name, node: usize, room: Name, resumes: bool) {
        self.drop_line(who);
        let client = &self.clients[who];
        let resume = client.session.clone().filter(|_| resumes && client.room == room);
        let resume = resume.map(|session| Resume { session, after: client.last_seen });
        self.born += 1;
        let fresh = SessionId::from_random(u128::from(self.born).to_be_bytes());
        let hello = Hello { token: None, card: None, resume };
        let join =
            Join { id: None, ice: None, ice_term: None, fresh, ends_with_bye: false, takes_any: false };
        let now = self.now();
        let connection = self.nodes[node].hub.join(now, &agent(who, room), &hello, join, 0).unwrap();
        self.nodes[node].lines.insert(connection, who);
        let client = self.clients.get_mut(who).unwrap();
        client.connection = Some((node, connection));
        client.line += 1;
        client.room = room;
        client.greeted = false;
    }

    /// The agent turns its back on the connection that it has; its node does not know.
    fn drop_line(&mut self, who: Name) -> Option<(usize, ConnectionId)> {
        self.clients.get_mut(who).unwrap().connection.take()
    }

    fn say(&mut self, who: Name, to: Option<Name>, has_id: bool) {
        let Some((node, _)) = self.clients[who].connection else { return };
        let number = self.said.len() as u64;
        let mut frame = json!({"type": "message", "payload": number});
        if let Some(to) = to {
            frame["to"] = json!(to);
        }
        if has_id {
            frame["id"] = json!(number);
            let client = self.clients.get_mut(who).unwrap();
            client.waits.insert(number, client.line);
        }
        let session = to.and_then(|to| self.only_session(to));
        let line = self.clients[who].line;
        self.said.push(Said { from: who, to, line, session, delivered: false, node });
        self.tell(who, &frame);
    }

    /// The session of an agent, if there is one in all, and it is the one that the agent knows.
    fn only_session(&self, who: Name) -> Option<String> {
        let client = &self.clients[who];
        let anywhere = ROOMS.map(|room| agent(who, room));
        let sessions =
            self.nodes.iter().flat_map(|node| anywhere.iter().filter_map(|it| node.hub.continuation(it)));
        let all: Vec<String> = sessions.map(|resume| resume.session).collect();
        client.session.clone().filter(|session| all == [session.clone()])
    }

    pub fn tell(&mut self, who: Name, frame: &Value) {
        let Some((node, connection)) = self.clients[who].connection else { return };
        let (now, frame) = (self.now(), frame.to_string());
        self.nodes[node].hub.handle(now, connection, message::parse(&frame));
    }

    fn read(&mut self, who: Name) {
        while let Some((node, connection)) = self.clients[who].connection {
            match self.nodes[node].hub.next_outgoing(connection).map(|next| next.to_bytes()) {
                Some(Outgoing::Frame(frame)) => {
                    self.arrive(who, node, &serde_json::from_slice(&frame).unwrap())
                }
                Some(Outgoing::Close(farewell)) => {
                    self.count(farewell.reason());
                    self.close(node, connection, Departure::Dropped);
                    self.drop_line(who);
                }
                None => return,
            }
        }
    }

    fn arrive(&mut self, who: Name, node: usize, frame: &Value) {
        let client = self.clients.get_mut(who).unwrap();
        match frame["type"].as_str().unwrap() {
            "welcome" => {
                client.greeted = true;
                let agents = frame["agents"].as_array().unwrap();
                client.present = agents.iter().map(listed).collect();
                let session = frame["session"].as_str().unwrap().to_owned();
                if frame["resumed"] == false {
                    (client.last_seen, client.heard, client.has) = Default::default();
                    client.session = Some(session);
                } else {
                    assert_eq!(client.session, Some(session), "what is resumed is what was asked for");
                    self.count("resumed");
                }
            }
            "agentJoined" | "agentUpdated" => {
                let (agent, card) = listed(frame);
                client.present.insert(agent, card);
            }
            "agentLeft" => _ = client.present.remove(frame["agent"].as_str().unwrap()),
            "delivered" => {
                let number = frame["id"].as_u64().unwrap();
                client.be_answered(number, frame);
                let to = self.said[number as usize].to;
                let only = to.and_then(|to| self.only_session(to));
                let said = &mut self.said[number as usize];
                said.delivered = said.session.is_some() && said.session == only;
                if to.is_some_and(|to| self.clients[to].connection.is_some_and(|(other, _)| other != node)) {
                    self.count("delivered elsewhere");
                }
            }
            "error" => {
                if let Some(number) = frame["id"].as_u64() {
                    client.be_answered(number, frame);
                }
                let codes = ["peerUnavailable", "unavailable"];
                let code = codes.iter().find(|code| frame["code"] == **code);
                self.count(code.unwrap_or_else(|| panic!("{frame}")));
            }
            "message" => self.passed_on(who, frame),
            _ => panic!("{frame}"),
        }
    }

    fn passed_on(&mut self, who: Name, frame: &Value) {
        let client = self.clients.get_mut(who).unwrap();
        let seq = frame["seq"].as_u64().unwrap();
        assert_eq!(seq, client.last_seen + 1, "{who} missed a frame or sees it again");
        client.last_seen = seq;
        let (from, number) = (frame["from"].as_str().unwrap(), frame["payload"].as_u64().unwrap());
        let Said { from: said_by, to, line, .. } = &self.said[number as usize];
        let before = client.heard.insert((from.to_owned(), *line), number);
        assert!(before.is_none_or(|before| before < number), "{who} hears {from} {before:?}, then {number}");
        assert!(client.has.insert(number), "{who} hears {number} twice");
        assert!(*said_by == from && to.is_none_or(|to| to == who), "{frame}");
    }

    /// So many frames are written and never read.
    fn break_off(&mut self, who: Name, lost: usize, noticed: bool) {
        let Some((node, connection)) = self.drop_line(who) else { return };
        for _ in 0..lost {
            if let Some(Outgoing::Close(_)) | None =
                self.nodes[node].hub.next_outgoing(connection).map(|next| next.to_bytes())
            {
                break;
            }
            self.count("lost on the way to the agent");
        }
        if noticed {
            self.close(node, connection, Departure::Dropped);
        }
    }

    fn leave(&mut self, who: Name) {
        if let Some((node, connection)) = self.drop_line(who) {
            self.close(node, connection, Departure::Left);
            self.clients.get_mut(who).unwrap().session = None;
        }
    }

    fn close(&mut self, node: usize, connection: ConnectionId, departure: Departure) {
        let now = self.now();
        self.nodes[node].lines.remove(&connection);
        self.nodes[node].hub.leave(now, connection, departure);
    }

    // The engine.

    /// What a node wants said reaches the engine, and whoever listens.
    fn flush(&mut self, from: usize) {
        let node = &mut self.nodes[from];
        node.outgoing.extend(node.hub.take_errands());
        while let Some(errand) = self.nodes[from].outgoing.pop_front() {
            match errand {
                Errand::Subscribe(room, agent) => _ = self.nodes[from].subscribed.insert((room, agent)),
                Errand::Unsubscribe(room, agent) => {
                    self.nodes[from].subscribed.remove(&(room.clone(), agent.clone()));
                    self.nodes[from].incoming.remove(&Some((room, agent)));
                }
                Errand::Free(_) => {}
                _ if !self.nodes[from].linked => {}
                Errand::ToAgent { room, agent, ticket, word } => {
                    let to = (room, agent);
                    let hears = |(place, node): &(usize, &mut Node)| {
                        *place != from && node.linked && node.subscribed.contains(&to)
                    };
                    let listeners = self.nodes.iter_mut().enumerate().filter(hears);
                    let heard = listeners.map(|(_, node)| node.put(Some(to.clone()), &word)).count();
                    if heard == 0 {
                        self.nodes[from].nobody.push_back(ticket);
                    }
                }
                Errand::ToNode(id, word) => {
                    let hears = |node: &&mut Node| node.linked && node.id == id;
                    self.nodes.iter_mut().filter(hears).for_each(|node| node.put(None, &word));
                }
                Errand::ToAll(word) => {
                    let others = self.nodes.iter_mut().enumerate().filter(|(place, _)| *place != from);
                    others.filter(|(_, node)| node.linked).for_each(|(_, node)| node.put(None, &word));
                }
            }
        }
    }

    fn hear(&mut self, place: usize, which: usize, words: usize) {
        let now = self.now();
        let node = &mut self.nodes[place];
        let ears: Vec<Listened> = node.incoming.keys().cloned().collect();
        if which == ears.len() {
            let heard: Vec<u64> = node.nobody.drain(..words.min(node.nobody.len())).collect();
            heard.into_iter().for_each(|ticket| node.hub.nobody(now, ticket));
        }
        let Some(listened) = ears.get(which) else { return };
        for _ in 0..words {
            let queue = node.incoming.get_mut(listened);
            let Some(word) = queue.and_then(VecDeque::pop_front) else { break };
            let ear = listened.as_ref().map_or(Ear::Node, |(room, agent)| Ear::Agent(room, agent));
            node.hub.hear(now, ear, &word);
            // It may have been unsubscribed from by what was heard.
            let errands = node.hub.take_errands();
            for errand in errands {
                if let Errand::Unsubscribe(room, agent) = &errand {
                    node.incoming.remove(&Some((room.clone(), agent.clone())));
                    node.subscribed.remove(&(room.clone(), agent.clone()));
                }
                node.outgoing.push_back(errand);
            }
        }
        node.incoming.retain(|_, queue| !queue.is_empty());
    }

    fn settle(&mut self) {
        loop {
            (0..NODES).for_each(|node| self.flush(node));
            let is_quiet = |node: &Node| node.incoming.is_empty() && node.nobody.is_empty();
            if self.nodes.iter().all(is_quiet) {
                return;
            }
            for node in 0..NODES {
                for which in (0..=self.nodes[node].incoming.len()).rev() {
                    self.hear(node, which, usize::MAX);
                }
            }
        }
    }

    fn cut(&mut self, node: usize) {
        self.count("cut");
        let node = &mut self.nodes[node];
        node.linked = false;
        node.incoming.clear();
        node.nobody.clear();
    }

    fn notice(&mut self, node: usize) {
        let now = self.now();
        let node = &mut self.nodes[node];
        if node.is_up && !node.linked {
            node.is_up = false;
            node.hub.engine_is_down(now);
        }
    }

    fn mend(&mut self, node: usize) {
        if self.nodes[node].linked {
            return;
        }
        self.notice(node);
        // What was on its way when it broke is lost.
        self.flush(node);
        let now = self.now();
        let node = &mut self.nodes[node];
        (node.linked, node.is_up) = (true, true);
        node.hub.engine_is_up(now);
    }

    fn crash(&mut self, node: usize) {
        self.count("crashed");
        for client in self.clients.values_mut() {
            if client.connection.is_some_and(|(at, _)| at == node) {
                client.connection = None;
            }
        }
        self.nodes[node] = self.node();
    }

    fn wait(&mut self, millis: u64) {
        self.millis += millis;
        let now = self.now();
        for node in &mut self.nodes {
            node.hub.handle_timeout(now);
        }
    }

    /// A node with an agent that has just come hears that, whatever it is said to, and goes on.
    pub fn stand(&mut self, word: &str) {
        self.connect("alice", 0, "main", false);
        let (room, alice, now) = (Room::main(), AgentId::parse("alice").unwrap(), self.now());
        for ear in [Ear::Agent(&room, &alice), Ear::Node] {
            self.nodes[0].hub.hear(now, ear, word.as_bytes());
        }
        self.settle();
        self.wait(5_000);
        self.connect("alice", 0, "main", false);
        self.wait(5_000);
        self.settle();
        assert_eq!(self.nodes[0].hub.counters().agents, 1);
    }

    // In the end.

    /// All is well again: everybody comes back, hears everything, and knows who is here.
    pub fn reunite(&mut self) {
        (0..NODES).for_each(|node| self.mend(node));
        self.calm();
        for (place, who) in AGENTS.into_iter().enumerate() {
            let (before, room) = (self.clients[who].connection, self.clients[who].room);
            self.connect(who, (place + self.said.len()) % NODES, room, true);
            self.calm();
            self.read(who);
            let moved = before.is_some_and(|(node, _)| node != self.clients[who].connection.unwrap().0);
            if moved && self.clients[who].last_seen > 0 {
                self.count("resumed at another node");
            }
        }
        self.calm();
        AGENTS.iter().for_each(|who| self.read(who));
        self.check_promises();
        self.check_presence();
    }

    fn calm(&mut self) {
        for _ in 0..12 {
            self.settle();
            self.wait(500);
            AGENTS.iter().for_each(|who| self.read(who));
        }
        self.settle();
    }

    fn check_promises(&self) {
        for (who, client) in &self.clients {
            let waits: Vec<_> = client.waits.iter().filter(|(_, line)| **line == client.line).collect();
            assert!(waits.is_empty(), "{who} has no answer to {waits:?}");
        }
        for (number, said) in self.said.iter().enumerate() {
            let Said { from, to: Some(to), session, delivered: true, .. } = said else { continue };
            let receiver = &self.clients[to];
            // Its session is the one that it had: then it was that which took the frame.
            if receiver.session.is_some() && receiver.session == *session {
                let has = receiver.has.contains(&(number as u64));
                assert!(has, "{to} misses {number} of {from}, said at node {}", said.node);
            }
        }
    }

    fn check_presence(&mut self) {
        for room in ROOMS {
            let here = |who: &&Name| self.clients[**who].room == room;
            let expected: BTreeSet<String> =
                AGENTS.iter().filter(here).map(|who| (*who).to_owned()).collect();
            for who in expected.clone() {
                let client = &self.clients[who.as_str()];
                let (node, _) = client.connection.unwrap_or_else(|| panic!("{who} is not connected"));
                let mut known: BTreeSet<String> = client.present.keys().cloned().collect();
                known.insert(who.clone());
                assert_eq!(known, expected, "what {who} knows of {room}");
                let page = self.nodes[node].hub.page(
                    &Room::parse(room).unwrap(),
                    &Query::default(),
                    "",
                    100,
                    usize::MAX,
                );
                let listed: BTreeSet<String> =
                    page.agents.iter().map(|entry| entry.agent.as_str().to_owned()).collect();
                assert_eq!(listed, expected, "what {who}'s node knows of {room}");
                let cards: BTreeMap<String, Value> = page
                    .agents
                    .iter()
                    .filter(|entry| entry.agent.as_str() != who)
                    .map(|entry| {
                        let card = entry.card.as_ref().map(|card| serde_json::from_str(card.get()).unwrap());
                        (entry.agent.as_str().to_owned(), card.unwrap_or_default())
                    })
                    .collect();
                assert_eq!(client.present, cards, "what {who} knows of cards");
                *self.tally.entry("knew who is here").or_default() += 1;
            }
        }
        let agents: usize = self.nodes.iter().map(|node| node.hub.counters().agents).sum();
        assert_eq!(agents, AGENTS.len(), "each agent is at one node");
    }
}

impl Client {
    /// Once, and over the connection that it was said over.
    fn be_answered(&mut self, number: u64, frame: &Value) {
        assert_eq!(self.waits.remove(&number), Some(self.line), "{frame} where nothing waits for it");
    }
}

impl Node {
    fn put(&mut self, listened: Listened, word: &Bytes) {
        self.incoming.entry(listened).or_default().push_back(word.clone());
    }
}

fn agent(who: Name, room: Name) -> Agent {
    Agent {
        id: AgentId::parse(who).unwrap(),
        room: Room::parse(room).unwrap(),
        scopes: Scopes::default(),
        expires: T0 + 1_000_000,
        issued: None,
    }
}

fn listed(frame: &Value) -> (String, Value) {
    (frame["agent"].as_str().unwrap().to_owned(), frame["card"].clone())
}
