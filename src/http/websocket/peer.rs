//! What is different with a client of PeerJS: its words, and that it may speak to who is not here yet.

use super::{
    super::{
        Visit,
        switchboard::{Seat, session_id},
    },
    framing::Said,
    line::Desk,
};
use crate::{
    clock::Now,
    credentials::token::Agent,
    signaling::{
        hub::Join,
        message::{ClientFrame, Hello, Incoming, Kind},
        peerjs::{self, Told, Waiting, error, expire},
        refusal::Refusal,
        session::Full,
    },
};

/// A peer with a seat in the hub.
pub(super) struct Peer {
    agent: Agent,
    waiting: Waiting,
}

/// What it hears at once.
#[derive(Default)]
pub(super) struct Answer {
    pub(super) texts: Vec<String>,
    /// It has said that it leaves.
    pub(super) leaves: bool,
}

/// Takes a seat: the session goes on, if there is one, with what was not written yet.
pub(super) fn sit_down(visit: &Visit, desk: &Desk<'_>, agent: &Agent) -> Result<Seat, Refusal> {
    let switchboard = &visit.front.switchboard;
    let resume = switchboard.tell(|hub, _| hub.continuation(agent));
    let hello = Hello { resume, ..Hello::default() };
    let fresh = session_id()?;
    let join = Join { id: None, ice: None, ice_term: None, fresh, ends_with_bye: true, takes_any: true };
    switchboard.join(desk.now, agent, &hello, join, desk.mailbox, desk.index)
}

impl Peer {
    pub(super) fn new(agent: Agent) -> Self {
        Self { agent, waiting: Waiting::default() }
    }

    /// Hears what it says.
    pub(super) fn listen_to(&mut self, visit: &Visit, now: Now, seat: &Seat, said: &Said<'_>) -> Answer {
        let too_large = || Refusal::TooLarge("the message is over the limit");
        let parsed = match said {
            Said::Text(text) if text.len() > visit.front.terms().max_frame => Err(too_large()),
            Said::Text(text) => peerjs::parse(text),
            _ => Err(Refusal::BadFrame("messages are text".into())),
        };
        let mut answer = Answer::default();
        let counted =
            seat.tell(|hub, _| hub.charge(now, &self.agent.id).inspect_err(|why| hub.count_refusal(why)));
        match (parsed, counted) {
            (Ok(peerjs::Said::Told(told)), Err(_)) => answer.texts.push(expire(&told.to, &self.agent.id)),
            (Ok(peerjs::Said::Told(told)), Ok(())) => answer.texts.extend(self.tell(now, seat, told)),
            (Ok(peerjs::Said::Leave), _) => answer.leaves = true,
            (Ok(peerjs::Said::Heartbeat), _) => {}
            (Err(refusal), _) => {
                seat.tell(|hub, _| hub.count_refusal(&refusal));
                answer.texts.push(error(&refusal.to_string()));
            }
        }
        answer
    }

    /// Passes it on, or lets it wait. Gives what the peer is told if neither can be done.
    fn tell(&mut self, now: Now, seat: &Seat, told: Told<'_>) -> Option<String> {
        let is_present = seat.tell(|hub, _| hub.is_present(&self.agent.room, &told.to));
        if is_present {
            return self.flush(now, seat, &told.to).or_else(|| self.pass(now, seat, &told));
        }
        if !told.waits {
            return None;
        }
        let expired = expire(&told.to, &self.agent.id);
        self.waiting.push(now.mono, told).err().map(|Full| expired)
    }

    /// Passes on what waited for a peer that is here now.
    pub(super) fn flush(&mut self, now: Now, seat: &Seat, to: &str) -> Option<String> {
        let mut expired = None;
        for told in self.waiting.take(to) {
            expired = self.pass(now, seat, &told).or(expired);
        }
        expired
    }

    fn pass(&self, now: Now, seat: &Seat, told: &Told<'_>) -> Option<String> {
        let body = Some(&*told.body);
        let frame = ClientFrame::Routed { kind: Kind::Message, to: Some(told.to.as_ref().into()), body };
        let incoming = Incoming { id: None, from: None, frame };
        // What it does not wait for, it does not want to hear of either.
        let to = told.waits.then_some(&*told.to);
        let passed = seat.tell(|hub, _| hub.forward(now, &self.agent.id, &incoming, to));
        passed.err().filter(|_| told.waits).map(|_| expire(&told.to, &self.agent.id))
    }

    /// The hub has this for it: what it hears, in its own words.
    pub(super) fn translate(&self, frame: &[u8]) -> peerjs::Translated {
        peerjs::translate(frame, &self.agent.id)
    }

    /// Whether something waits for that peer.
    pub(super) fn waits_for(&self, peer: &str) -> bool {
        self.waiting.has(peer)
    }

    /// When [`Self::handle_timeout`] is due.
    pub(super) fn deadline(&self) -> Option<std::time::Instant> {
        self.waiting.next()
    }

    /// Who was not here in time. In a large room nobody has said whether they are here by now.
    pub(super) fn handle_timeout(&mut self, now: Now, seat: &Seat) -> Vec<String> {
        let mut texts = Vec::new();
        while let Some(to) = self.waiting.overdue(now.mono) {
            if seat.tell(|hub, _| hub.is_present(&self.agent.room, &to)) {
                texts.extend(self.flush(now, seat, &to));
            } else {
                self.waiting.take(&to);
                texts.push(expire(&to, &self.agent.id));
            }
        }
        texts
    }
}
