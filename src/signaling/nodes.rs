//! What nodes of a cluster say to each other, and what a hub wants of the engine between them.
//!
//! A word is JSON; what an agent wrote follows it as it is, after a line end. A word that is not understood is of another version,
//! and is let go.

use std::{fmt, net::IpAddr};

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::{
    message::{Kind, Resume, SessionId},
    refusal::Refusal,
};
use crate::credentials::token::{AgentId, Room};

/// Bytes of one word's lists, about: what engines take in one piece is a megabyte by default.
pub(super) const MAX_LIST: usize = 256 << 10;

/// One process of a cluster. Another after each start.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct NodeId(pub u64);

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl fmt::Debug for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// What the hub wants done, in this order.
#[derive(Debug)]
pub enum Errand {
    /// From now on hear what is said to this agent.
    Subscribe(Room, AgentId),
    /// And no more.
    Unsubscribe(Room, AgentId),
    /// To whoever hears what is said to the agent. If that is nobody, [`Hub::nobody`](super::hub::Hub::nobody) wants to know,
    /// by this number.
    ToAgent {
        room: Room,
        agent: AgentId,
        ticket: u64,
        word: Bytes,
    },
    ToNode(NodeId, Bytes),
    /// To all others.
    ToAll(Bytes),
    /// An agent was revoked elsewhere: its allocations here end, and it is written down.
    Free(AgentId),
}

/// Where a word was heard.
#[derive(Clone, Copy, Debug)]
pub enum Ear<'a> {
    /// Said to an agent of that room.
    Agent(&'a Room, &'a AgentId),
    /// Said to this node, or to all.
    Node,
}

/// The other nodes that live, as an ICE list needs them.
#[derive(Clone, Debug)]
pub struct Neighbour {
    pub name: String,
    /// What it offers, in the shell's own words.
    pub offer: Box<RawValue>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", rename_all_fields = "camelCase")]
pub(super) enum Word<'a> {
    /// To an agent: a frame of another; what follows its number comes behind the word.
    Routed { node: NodeId, ticket: u64, kind: Kind, from: AgentId, serial: u64 },
    /// To an agent: it is at `node` now, and wants to go on with a session.
    Claim { node: NodeId, ticket: u64, since: u64, wants: Wants },
    /// What became of routed frames.
    Answers { answers: Vec<(u64, Outcome)> },
    /// To who claims an agent.
    Held { node: NodeId, ticket: u64, room: Room, agent: AgentId, held: Held },
    /// All agents that `node` has in a room, a part of them each time.
    Present {
        node: NodeId,
        room: Room,
        /// Wants to know the same of us.
        asks: bool,
        /// It has some, whom others do not see yet among them, and so wants to be told of ours.
        cares: bool,
        /// Of this list; the next list has a larger one.
        list: u64,
        is_last: bool,
        #[serde(borrow)]
        agents: Vec<Listed<'a>>,
    },
    /// `node` has no agent in that room any more.
    Empty { node: NodeId, room: Room },
    /// An agent has come to `node`; `moved`: with the session that it had.
    Came {
        node: NodeId,
        room: Room,
        moved: bool,
        #[serde(borrow)]
        agent: Listed<'a>,
    },
    /// Its card has changed.
    Changed {
        node: NodeId,
        room: Room,
        #[serde(borrow)]
        agent: Listed<'a>,
    },
    /// It has left.
    Went { node: NodeId, room: Room, agent: AgentId },
    /// To all: an agent is at `node` now; who has it in another room has it no more.
    Took { node: NodeId, room: Room, agent: AgentId, since: u64 },
    /// What it had of that agent, since then, has ended.
    Yielded { agent: AgentId, since: u64 },
    /// To all, once a second.
    Beat {
        node: NodeId,
        name: String,
        #[serde(borrow)]
        offer: &'a RawValue,
    },
    /// To all: the node is going.
    Bye { node: NodeId },
    /// Who was revoked, as the data dir has it.
    Revoked {
        #[serde(borrow)]
        revoked: &'a RawValue,
    },
    /// To all: an agent was told these addresses by another of its room.
    Signaled { agent: AgentId, addresses: Vec<IpAddr> },
}

/// An agent of another node.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Listed<'a> {
    pub(super) agent: AgentId,
    /// Unix milliseconds.
    pub(super) since: u64,
    #[serde(borrow, default, skip_serializing_if = "Option::is_none")]
    pub(super) card: Option<&'a RawValue>,
}

/// Which session an agent that came wants to go on with.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Wants {
    /// A new one.
    Fresh,
    This(Resume),
    /// Any, from where its frames are not written yet.
    Any,
}

/// What became of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) enum Outcome {
    Delivered,
    PeerUnavailable,
    QueueFull,
    TooLarge,
}

impl Outcome {
    pub(super) fn of(done: Result<(), Refusal>) -> Self {
        match done {
            Ok(()) => Self::Delivered,
            Err(Refusal::QueueFull) => Self::QueueFull,
            Err(_) => Self::PeerUnavailable,
        }
    }
}

/// What a node has of an agent that is at another one now.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", rename_all_fields = "camelCase")]
pub(super) enum Held {
    /// Nothing that could go on; what there was, and was there since then, has ended.
    Nothing {
        since: u64,
    },
    /// It came here later than there.
    Newer,
    /// The session, or a part of its frames: the last comes with the rest.
    Frames(Vec<Carried>),
    Session(Box<Handed>),
}

/// A frame that goes to another node.
#[derive(Debug, Serialize, Deserialize)]
pub struct Carried {
    pub seq: u64,
    pub kind: Kind,
    pub rest: String,
}

/// A candidate that waits for its sender's first description.
#[derive(Debug, Serialize, Deserialize)]
pub struct CarriedEarly {
    pub from: AgentId,
    pub kind: Kind,
    pub rest: String,
    /// For so long still.
    pub millis: u64,
}

/// A session that goes to another node.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Handed {
    pub session: SessionId,
    /// When it came to the other node.
    pub since: u64,
    pub after: u64,
    pub last_seq: u64,
    /// Not written yet, in order.
    pub frames: Vec<Carried>,
    pub early: Vec<CarriedEarly>,
    /// Whose description it has had.
    pub introduced: Vec<u64>,
    /// The last frame that each node has sent to it.
    pub heard: Vec<(NodeId, u64)>,
    pub correspondents: Option<Vec<AgentId>>,
    pub card: Option<Box<RawValue>>,
    /// Until it may speak as much as ever.
    pub owes_millis: u64,
}

impl Word<'_> {
    pub(super) fn to_bytes(&self) -> Bytes {
        serde_json::to_vec(self).expect("words are plain JSON").into()
    }

    /// With what an agent wrote behind it.
    pub(super) fn before(&self, rest: &[u8]) -> Bytes {
        let mut bytes = Vec::with_capacity(160 + rest.len());
        serde_json::to_writer(&mut bytes, self).expect("words are plain JSON");
        bytes.push(b'\n');
        bytes.extend_from_slice(rest);
        bytes.into()
    }

    /// A word, and what follows it.
    pub(super) fn parse(bytes: &[u8]) -> Option<(Word<'_>, &[u8])> {
        // A card may have line ends of its own: where the word ends is the parser's to say.
        let mut words = serde_json::Deserializer::from_slice(bytes).into_iter();
        let word = words.next()?.ok()?;
        Some((word, bytes.get(words.byte_offset() + 1..).unwrap_or_default()))
    }
}
