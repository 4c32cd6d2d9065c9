//! The other nodes: that they live, and what all of them are told.

use std::time::{Duration, Instant};

use bytes::Bytes;
use serde_json::value::RawValue;

use super::{super::Hub, Away, Other};
use crate::{
    clock::Now,
    credentials::token::{AgentId, Room},
    signaling::nodes::{Errand, MAX_LIST, NodeId, Word},
};

/// How often a node says that it is there, and after how long without a word it is given up.
const BEAT: Duration = Duration::from_secs(1);
const SILENT: Duration = Duration::from_millis(3_500);

impl Hub {
    pub(in crate::signaling::hub) fn next_beat(&self) -> Option<Instant> {
        let elsewhere = self.elsewhere.as_ref()?;
        let due = elsewhere.flights.due.front().map(|(at, _)| *at);
        let doubt = elsewhere.doubts.front().map(|(at, ..)| *at);
        let silent = elsewhere.nodes.values().map(|other| other.heard_at + SILENT).min();
        [Some(elsewhere.beat_at), due, doubt, silent].into_iter().flatten().min()
    }

    pub(in crate::signaling::hub) fn keep_in_touch(&mut self, now: Now) {
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

    pub(super) fn beat(&mut self, now: Now) {
        let Some(elsewhere) = &mut self.elsewhere else { return };
        elsewhere.beat_at = now.mono + BEAT;
        let (node, name) = (elsewhere.node, elsewhere.name.clone());
        let beat = Word::Beat { node, name, offer: &elsewhere.offer }.to_bytes();
        if elsewhere.is_up && !elsewhere.has_gone {
            elsewhere.errands.push_back(Errand::ToAll(beat));
        }
    }

    pub(super) fn hear_beat(&mut self, now: Now, node: NodeId, name: String, offer: &RawValue) {
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

    pub(super) fn forget_node(&mut self, now: Now, node: NodeId) {
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
    pub(in crate::signaling::hub) fn say_goodbye(&mut self) {
        let Some(elsewhere) = &mut self.elsewhere else { return };
        elsewhere.has_gone = true;
        let node = elsewhere.node;
        elsewhere.away.clear();
        elsewhere.claims.clear();
        self.say_to_all(&Word::Bye { node });
    }

    pub(super) fn say_all_revoked(&mut self, node: NodeId) {
        let Some(elsewhere) = &mut self.elsewhere else { return };
        for page in elsewhere.revocations.pages(MAX_LIST) {
            let word = Word::Revoked { revoked: &page }.to_bytes();
            elsewhere.errands.push_back(Errand::ToNode(node, word));
        }
    }

    pub(super) fn hear_revoked(&mut self, now: Now, revoked: &RawValue) {
        let Some(elsewhere) = &mut self.elsewhere else { return };
        let Ok(news) = elsewhere.revocations.add_json(revoked.get().as_bytes()) else { return };
        let agents: Vec<AgentId> = news.iter().filter_map(|agent| AgentId::parse(agent)).collect();
        elsewhere.errands.extend(agents.iter().cloned().map(Errand::Free));
        agents.iter().for_each(|agent| self.revoke(now, agent));
    }

    pub(super) fn say_to(&mut self, node: NodeId, word: &Word<'_>) {
        self.say_bytes(node, word.to_bytes());
    }

    pub(super) fn say_bytes(&mut self, node: NodeId, word: Bytes) {
        if let Some(elsewhere) = self.elsewhere.as_mut().filter(|elsewhere| elsewhere.is_up) {
            elsewhere.errands.push_back(Errand::ToNode(node, word));
        }
    }

    pub(super) fn say_to_all(&mut self, word: &Word<'_>) {
        if let Some(elsewhere) = self.elsewhere.as_mut().filter(|elsewhere| elsewhere.is_up) {
            elsewhere.errands.push_back(Errand::ToAll(word.to_bytes()));
        }
    }
}
