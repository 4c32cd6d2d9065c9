//! Who is where: what nodes tell each other of the agents in rooms that they share.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use serde_json::value::RawValue;

use super::{
    super::{Hub, Member},
    Away, HANDED,
};
use crate::{
    clock::Now,
    credentials::token::{AgentId, Room},
    signaling::{
        limits::MAX_CARD,
        message::ServerFrame,
        nodes::{Errand, Listed, MAX_LIST, NodeId, Word},
        registry::Profile,
    },
};

/// An agent that is missing from a list may be on its way to a third node, which has not said so yet: so long.
const DOUBT: Duration = Duration::from_secs(1);

impl Hub {
    /// A room has its first agent here: all others are asked whom they have.
    pub(in crate::signaling::hub) fn ask_about(&mut self, room: &Room) {
        let Some(elsewhere) = self.elsewhere.as_ref().filter(|elsewhere| elsewhere.is_up) else { return };
        let nodes: Vec<NodeId> = elsewhere.nodes.keys().copied().collect();
        for node in nodes {
            self.rooms.get_mut(room).expect("it is there").asked.insert(node);
            self.say_present(node, room, true);
        }
    }

    /// A node has agents in a room, too: from now on it is told of ours, and for a start whom we have.
    pub(super) fn meet(&mut self, node: NodeId, room: &Room) {
        if self.rooms.get_mut(room).is_some_and(|gathering| gathering.nodes.insert(node)) {
            self.say_present(node, room, false);
        }
    }

    /// All agents that we have in a room, in pieces.
    pub(super) fn say_present(&mut self, to: NodeId, room: &Room, asks: bool) {
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

    pub(super) fn listed_by(
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
    pub(super) fn came(&mut self, now: Now, node: NodeId, room: &Room, listed: Listed<'_>, moved: bool) {
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
    pub(super) fn say_came(&mut self, to: NodeId, agent: &AgentId) {
        let Some(node) = self.own_node() else { return };
        let member = &self.members[agent];
        let (room, agent) = (member.room.clone(), as_listed(agent, member));
        let word = Word::Came { node, room, moved: true, agent }.to_bytes();
        self.say_bytes(to, word);
    }

    pub(super) fn changed(&mut self, now: Now, node: NodeId, room: &Room, listed: Listed<'_>) {
        if self.is_away_at(node, room, &listed.agent) {
            self.set_card(now, &listed.agent, listed.card.filter(|card| card.get().len() <= MAX_CARD));
        }
    }

    pub(super) fn set_card(&mut self, now: Now, agent: &AgentId, card: Option<&RawValue>) {
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

    pub(super) fn is_away_at(&self, node: NodeId, room: &Room, agent: &AgentId) -> bool {
        let away = self.elsewhere.as_ref().and_then(|elsewhere| elsewhere.away.get(agent));
        away.is_some_and(|away| away.node == node && away.room == *room)
    }

    /// An agent of another node is gone.
    pub(super) fn lose(&mut self, now: Now, agent: &AgentId) {
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
    pub(in crate::signaling::hub) fn forget_room(&mut self, room: &Room) {
        let Some(gathering) = self.rooms.remove(room) else { return };
        let Some(elsewhere) = &mut self.elsewhere else { return };
        for agent in gathering.everybody.keys() {
            elsewhere.away.remove(agent);
        }
        gathering.nodes.iter().for_each(|node| self.say_empty(*node, room));
    }

    pub(super) fn say_empty(&mut self, to: NodeId, room: &Room) {
        let Some(node) = self.own_node() else { return };
        self.say_to(to, &Word::Empty { node, room: room.clone() });
    }

    /// The card of an agent, wherever it is.
    pub(in crate::signaling::hub) fn card_of(&self, agent: &AgentId) -> Option<&Arc<RawValue>> {
        let away = self.elsewhere.as_ref().and_then(|elsewhere| elsewhere.away.get(agent));
        match (self.members.get(agent), away) {
            (Some(member), _) if member.arriving.is_none() => member.card.as_ref(),
            (_, Some(away)) => away.card.as_ref(),
            (member, None) => member.and_then(|member| member.card.as_ref()),
        }
    }

    /// The room of an agent of another node.
    pub(in crate::signaling::hub) fn room_elsewhere(&self, agent: &str) -> Option<&Room> {
        Some(&self.elsewhere.as_ref()?.away.get(agent)?.room)
    }

    /// Tells the nodes that have agents in a room something of it.
    pub(in crate::signaling::hub) fn post(&mut self, room: &Room, word: &Bytes) {
        let Some(elsewhere) = self.elsewhere.as_mut().filter(|elsewhere| elsewhere.is_up) else { return };
        let nodes = self.rooms.get(room).into_iter().flat_map(|gathering| &gathering.nodes);
        elsewhere.errands.extend(nodes.map(|node| Errand::ToNode(*node, word.clone())));
    }

    /// An agent of ours has left a room.
    pub(in crate::signaling::hub) fn post_gone(&mut self, room: &Room, agent: &AgentId) {
        let Some(node) = self.own_node() else { return };
        self.post(room, &Word::Went { node, room: room.clone(), agent: agent.clone() }.to_bytes());
    }

    /// An agent of ours says something else of itself.
    pub(in crate::signaling::hub) fn post_changed(&mut self, agent: &AgentId) {
        let Some(node) = self.own_node() else { return };
        let member = &self.members[agent];
        let room = member.room.clone();
        let word = Word::Changed { node, room: room.clone(), agent: as_listed(agent, member) }.to_bytes();
        self.post(&room, &word);
    }
}

pub(super) fn as_listed<'a>(agent: &AgentId, member: &'a Member) -> Listed<'a> {
    Listed { agent: agent.clone(), since: member.since, card: member.card.as_deref() }
}
