//! Subjects of NATS: where what is said. What agents are called is never a part of one as it is.

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};

use crate::{
    credentials::token::{AgentId, Room},
    signaling::nodes::NodeId,
};

/// All subjects begin with it.
const PREFIX: &str = "halfway";

/// Those of one node.
#[derive(Clone, Copy, Debug)]
pub(super) struct Subjects {
    node: NodeId,
}

impl Subjects {
    pub(super) fn of(node: NodeId) -> Self {
        Self { node }
    }

    /// What is said to all nodes.
    pub(super) fn all() -> String {
        format!("{PREFIX}.all")
    }

    /// What is said to this one.
    pub(super) fn node(self) -> String {
        format!("{PREFIX}.node.{}", self.node)
    }

    /// What is said to an agent of a room: who is in another room hears nothing, and is nobody.
    pub(super) fn agent(self, room: &Room, agent: &AgentId) -> String {
        let [room, agent] = [room.as_str(), agent.as_str()].map(|name| BASE64_URL_SAFE_NO_PAD.encode(name));
        format!("{PREFIX}.to.{room}.{agent}")
    }

    /// That nobody has heard something of ours.
    pub(super) fn nobody(self) -> String {
        format!("{PREFIX}.nobody.{}.*", self.node)
    }

    pub(super) fn nobody_for(self, ticket: u64) -> String {
        format!("{PREFIX}.nobody.{}.{ticket}", self.node)
    }

    /// What that was.
    pub(super) fn ticket(subject: &str) -> Option<u64> {
        subject.rsplit('.').next()?.parse().ok()
    }
}

#[cfg(test)]
mod tests {
    use super::{NodeId, Subjects};
    use crate::credentials::token::{AgentId, Room};

    #[test]
    fn no_name_reaches_out_of_its_place() {
        let node = Subjects::of(NodeId(7));
        let subject = |room: &str, agent: &str| {
            node.agent(&Room::parse(room).unwrap(), &AgentId::parse(agent).unwrap())
        };
        for (room, agent) in
            [("main", "a.b"), ("main", "a/../b"), ("all", "node.0000000000000007"), ("a.b", "c")]
        {
            let subject = subject(room, agent);
            assert_eq!(subject.split('.').count(), 4, "{subject}");
            assert!(subject.starts_with("halfway.to."));
        }
        assert_ne!(subject("a.b", "c"), subject("a", "b.c"));
        let longest = "x".repeat(128);
        assert!(subject(&longest, &longest).len() < 512, "a server takes 4,096 bytes of a line");
        assert_eq!(Subjects::ticket(&node.nobody_for(42)), Some(42));
        assert_eq!(Subjects::ticket("halfway.all"), None);
    }
}
