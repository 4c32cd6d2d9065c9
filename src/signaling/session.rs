//! One agent's session: the frames for it in order, numbered, and kept until they have arrived.
//!
//! A session outlives its connection. What is written stays for replay as long as there is room; only what is not
//! written yet fills the window.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use bytes::Bytes;

use super::{
    limits::{EARLY, Limits, MAX_ASIDES},
    message::{Frame, Kind, SessionId, Unnumbered},
    nodes::{Carried, CarriedEarly, Handed},
};
use crate::credentials::token::AgentId;

/// Beyond that, agents could not tell one number from the next.
const LAST_NUMBER: u64 = 1 << 53;

/// The frames of one session, written and not.
#[derive(Debug)]
pub struct Session {
    id: SessionId,
    last_seq: u64,
    /// The last number that was written, as far as replay goes.
    written_up_to: u64,
    /// The last number that is no longer held although it was written.
    let_go: u64,
    /// Written, oldest first.
    written: VecDeque<Numbered>,
    /// To be written, in order.
    waiting: VecDeque<Waiting>,
    /// Candidates that came before their sender's first description, in the order in which they came.
    early: Vec<Early>,
    early_bytes: usize,
    written_bytes: usize,
    waiting_frames: usize,
    waiting_bytes: usize,
    asides: usize,
    aside_bytes: usize,
}

#[derive(Debug)]
struct Numbered {
    seq: u64,
    frame: Unnumbered,
}

#[derive(Debug)]
struct Early {
    from: AgentId,
    frame: Unnumbered,
    /// It waits no longer.
    until: Instant,
}

#[derive(Debug)]
enum Waiting {
    Numbered(Numbered),
    /// An answer or presence: of use to the present connection only.
    Aside(Bytes),
}

/// The window holds no more.
#[derive(Debug, PartialEq, Eq)]
pub struct Full;

/// What would have to be replayed is no longer held, or was never sent.
#[derive(Debug, PartialEq, Eq)]
pub struct Gone;

impl Session {
    #[must_use]
    pub fn new(id: SessionId) -> Self {
        Self {
            id,
            last_seq: 0,
            written_up_to: 0,
            let_go: 0,
            written: VecDeque::new(),
            waiting: VecDeque::new(),
            early: Vec::new(),
            early_bytes: 0,
            written_bytes: 0,
            waiting_frames: 0,
            waiting_bytes: 0,
            asides: 0,
            aside_bytes: 0,
        }
    }

    #[must_use]
    pub fn id(&self) -> &SessionId {
        &self.id
    }

    /// The last number that was written, as far as replay goes.
    #[must_use]
    pub fn written_up_to(&self) -> u64 {
        self.written_up_to
    }

    /// Bytes held for delivery and replay.
    #[must_use]
    pub fn held_bytes(&self) -> usize {
        self.written_bytes + self.waiting_bytes + self.early_bytes
    }

    /// Numbers a frame and lets it wait to be written. Written ones make room for it, oldest first.
    ///
    /// # Errors
    /// When the window is full of frames that are not written yet.
    pub fn push(&mut self, frame: Unnumbered, limits: &Limits) -> Result<(), Full> {
        self.make_room(&frame, limits)?;
        self.number(frame);
        Ok(())
    }

    /// Takes a candidate into the window that is to be numbered and written only when it is [released](Self::release),
    /// or at `until`.
    ///
    /// # Errors
    /// When the window is full.
    pub fn push_early(
        &mut self,
        from: &AgentId,
        frame: Unnumbered,
        until: Instant,
        limits: &Limits,
    ) -> Result<(), Full> {
        self.make_room(&frame, limits)?;
        self.early_bytes += frame.size();
        self.early.push(Early { from: from.clone(), frame, until });
        Ok(())
    }

    /// What `from` said early follows now. Tells whether there was anything.
    pub fn release(&mut self, from: &AgentId) -> bool {
        self.release_if(|early| early.from == *from)
    }

    /// What has waited long enough follows now. Tells whether there was anything.
    pub fn release_due(&mut self, now: Instant) -> bool {
        self.release_if(|early| early.until <= now)
    }

    /// When [`Self::release_due`] is next due.
    #[must_use]
    pub fn next_release(&self) -> Option<Instant> {
        self.early.first().map(|early| early.until)
    }

    fn release_if(&mut self, due: impl Fn(&Early) -> bool) -> bool {
        let (due, early): (Vec<Early>, _) = std::mem::take(&mut self.early).into_iter().partition(due);
        self.early = early;
        let any = !due.is_empty();
        for Early { frame, .. } in due {
            self.early_bytes -= frame.size();
            self.number(frame);
        }
        any
    }

    fn make_room(&mut self, frame: &Unnumbered, limits: &Limits) -> Result<(), Full> {
        let size = frame.size();
        let unwritten = self.waiting_frames + self.early.len();
        if unwritten >= limits.window_messages
            || self.waiting_bytes + self.early_bytes + size > limits.window_bytes
        {
            return Err(Full);
        }
        while unwritten + self.written.len() >= limits.window_messages
            || self.held_bytes() + size > limits.window_bytes
        {
            if !self.forget_oldest() {
                break;
            }
        }
        Ok(())
    }

    fn number(&mut self, frame: Unnumbered) {
        self.last_seq += 1;
        self.waiting_frames += 1;
        self.waiting_bytes += frame.size();
        self.waiting.push_back(Waiting::Numbered(Numbered { seq: self.last_seq, frame }));
    }

    /// Lets an answer or presence wait, among `most_bytes` of them.
    ///
    /// # Errors
    /// When too much waits already: the connection does not keep up.
    pub fn push_aside(&mut self, frame: Bytes, most_bytes: usize) -> Result<(), Full> {
        if self.asides >= MAX_ASIDES || self.aside_bytes + frame.len() > most_bytes {
            return Err(Full);
        }
        self.asides += 1;
        self.aside_bytes += frame.len();
        self.waiting.push_back(Waiting::Aside(frame));
        Ok(())
    }

    /// Puts the welcome before everything else.
    pub fn push_welcome(&mut self, frame: Bytes) {
        self.asides += 1;
        self.aside_bytes += frame.len();
        self.waiting.push_front(Waiting::Aside(frame));
    }

    /// The next frame to write.
    pub fn pop(&mut self) -> Option<Frame<'_>> {
        match self.waiting.pop_front()? {
            Waiting::Aside(frame) => {
                self.asides -= 1;
                self.aside_bytes -= frame.len();
                Some(frame.into())
            }
            Waiting::Numbered(numbered) => {
                self.waiting_frames -= 1;
                self.waiting_bytes -= numbered.frame.size();
                self.written_bytes += numbered.frame.size();
                self.written_up_to = numbered.seq;
                self.written.push_back(numbered);
                self.written.back().map(|numbered| numbered.frame.numbered(numbered.seq))
            }
        }
    }

    /// Takes out the frames of one kind that wait to be written: with that they have arrived. Candidates that are early are
    /// among them: who asks for each kind by itself knows what it has.
    pub fn take(&mut self, kind: Kind) -> Vec<Bytes> {
        if kind == Kind::IceCandidate {
            self.release_if(|_| true);
        }
        let mut taken = Vec::new();
        self.waiting.retain(|waiting| match waiting {
            Waiting::Numbered(Numbered { seq, frame }) if frame.kind() == kind => {
                self.waiting_frames -= 1;
                self.waiting_bytes -= frame.size();
                taken.push(frame.numbered(*seq).to_bytes());
                false
            }
            _ => true,
        });
        taken
    }

    /// Lets go of what has arrived.
    pub fn acknowledge(&mut self, up_to: u64) {
        while self.written.front().is_some_and(|oldest| oldest.seq <= up_to) {
            self.forget_oldest();
        }
    }

    /// Goes back to just after number `after`, for a new connection.
    ///
    /// # Errors
    /// When a frame after it is no longer held, or `after` was never sent. Nothing has changed then.
    pub fn rewind(&mut self, after: u64) -> Result<(), Gone> {
        if after > self.written_up_to || after < self.let_go {
            return Err(Gone);
        }
        self.acknowledge(after);
        self.written_up_to = after;
        while let Some(numbered) = self.written.pop_back() {
            self.written_bytes -= numbered.frame.size();
            self.waiting_frames += 1;
            self.waiting_bytes += numbered.frame.size();
            self.waiting.push_front(Waiting::Numbered(numbered));
        }
        Ok(())
    }

    /// What another node needs to go on with this session, once it is [rewound](Self::rewind): its frames in order, and what is
    /// early.
    pub(super) fn carry(&self, now: Instant) -> (Vec<Carried>, Vec<CarriedEarly>) {
        let text = |frame: &Unnumbered| String::from_utf8_lossy(frame.rest()).into_owned();
        let frames = self.waiting.iter().filter_map(|waiting| match waiting {
            Waiting::Numbered(Numbered { seq, frame }) => {
                Some(Carried { seq: *seq, kind: frame.kind(), rest: text(frame) })
            }
            Waiting::Aside(_) => None,
        });
        let early = self.early.iter().map(|Early { from, frame, until }| CarriedEarly {
            from: from.clone(),
            kind: frame.kind(),
            rest: text(frame),
            millis: until.saturating_duration_since(now).as_millis() as u64,
        });
        (frames.collect(), early.collect())
    }

    /// Becomes a session of another node; what has come here meanwhile follows what it brought.
    pub(super) fn go_on_with(&mut self, now: Instant, handed: &Handed, frames: Vec<Carried>) {
        let mut carried = Self::new(handed.session.clone());
        carried.written_up_to = handed.after;
        carried.let_go = handed.after;
        for Carried { seq, kind, rest } in frames {
            carried.last_seq = seq.clamp(1, LAST_NUMBER) - 1;
            carried.number(Unnumbered::of_parts(kind, rest.as_bytes()));
        }
        carried.last_seq = handed.last_seq.min(LAST_NUMBER);
        for CarriedEarly { from, kind, rest, millis } in &handed.early {
            let frame = Unnumbered::of_parts(*kind, rest.as_bytes());
            carried.early_bytes += frame.size();
            let until = now + Duration::from_millis(*millis).min(EARLY);
            carried.early.push(Early { from: from.clone(), frame, until });
        }
        let came = std::mem::replace(self, carried);
        for waiting in came.waiting {
            match waiting {
                Waiting::Numbered(Numbered { frame, .. }) => self.number(frame),
                Waiting::Aside(frame) => {
                    self.asides += 1;
                    self.aside_bytes += frame.len();
                    self.waiting.push_back(Waiting::Aside(frame));
                }
            }
        }
        for early in came.early {
            self.early_bytes += early.frame.size();
            self.early.push(early);
        }
    }

    /// The last number that was given.
    pub(super) fn last_seq(&self) -> u64 {
        self.last_seq
    }

    /// Forgets what only the connection that just ended could use, and gives its memory back.
    pub fn drop_asides(&mut self) {
        self.waiting.retain(|waiting| matches!(waiting, Waiting::Numbered(_)));
        self.waiting.shrink_to_fit();
        (self.asides, self.aside_bytes) = (0, 0);
    }

    /// Whether anything is held for replay alone.
    #[must_use]
    pub fn keeps_written(&self) -> bool {
        !self.written.is_empty()
    }

    /// Lets go of all that is written, when memory is short everywhere.
    pub fn forget_written(&mut self) {
        self.let_go = self.written.back().map_or(self.let_go, |newest| newest.seq);
        self.written = VecDeque::new();
        self.written_bytes = 0;
    }

    fn forget_oldest(&mut self) -> bool {
        let Some(oldest) = self.written.pop_front() else { return false };
        self.written_bytes -= oldest.frame.size();
        self.let_go = oldest.seq;
        true
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{Full, Gone, Limits, Session, SessionId, Unnumbered};
    use crate::{credentials::token::AgentId, signaling::message::Kind};

    fn limits(window_messages: usize, window_bytes: usize) -> Limits {
        Limits {
            max_frame: 65536,
            window_messages,
            window_bytes,
            resume_window: Duration::from_secs(60),
            rate: None,
            presence_limit: 256,
            heartbeat: Duration::from_secs(25),
            agents: 10,
            held_bytes: usize::MAX,
        }
    }

    fn session() -> Session {
        Session::new(SessionId::from_random([0; 16]))
    }

    fn bye() -> Unnumbered {
        Unnumbered::new(Kind::Bye, &AgentId::parse("a").unwrap(), None, None)
    }

    /// The numbers of what is written next.
    fn write(session: &mut Session, frames: usize) -> Vec<u64> {
        let seq = |frame: &[u8]| serde_json::from_slice::<serde_json::Value>(frame).unwrap()["seq"].as_u64();
        (0..frames).map_while(|_| session.pop().map(|frame| seq(&frame.to_bytes()).unwrap_or(0))).collect()
    }

    #[test]
    fn only_unwritten_frames_fill_the_window() {
        let limits = limits(3, 1000);
        let mut session = session();
        for _ in 0..3 {
            session.push(bye(), &limits).unwrap();
        }
        assert_eq!(session.push(bye(), &limits), Err(Full));
        assert_eq!(write(&mut session, 2), [1, 2]);
        session.push(bye(), &limits).unwrap();
        session.push(bye(), &limits).unwrap();
        assert_eq!(session.push(bye(), &limits), Err(Full));
        assert_eq!(session.rewind(0), Err(Gone), "1 and 2 made room");
        assert_eq!(session.rewind(2), Ok(()));
        assert_eq!(write(&mut session, 9), [3, 4, 5]);
    }

    #[test]
    fn bytes_fill_the_window_too() {
        let size = bye().size();
        let limits = limits(100, 2 * size);
        let mut session = session();
        session.push(bye(), &limits).unwrap();
        session.push(bye(), &limits).unwrap();
        assert_eq!(session.push(bye(), &limits), Err(Full));
        write(&mut session, 1);
        session.push(bye(), &limits).unwrap();
        assert_eq!(session.held_bytes(), 2 * size);
    }

    #[test]
    fn resume_replays_what_did_not_arrive() {
        let limits = limits(10, 1000);
        let mut session = session();
        for _ in 0..4 {
            session.push(bye(), &limits).unwrap();
        }
        session.push_aside("0".into(), 1000).unwrap();
        assert_eq!(write(&mut session, 3), [1, 2, 3]);
        assert_eq!(session.rewind(4), Err(Gone), "4 was never written");
        assert_eq!(session.rewind(u64::MAX), Err(Gone));
        assert_eq!(session.rewind(1), Ok(()));
        session.drop_asides();
        session.push_welcome("0".into());
        session.push(bye(), &limits).unwrap();
        assert_eq!(write(&mut session, 9), [0, 2, 3, 4, 5], "the aside is gone, the rest in order");
        assert_eq!(session.rewind(0), Err(Gone), "1 was acknowledged");
        session.acknowledge(4);
        assert_eq!(session.rewind(3), Err(Gone));
        assert_eq!(session.rewind(5), Ok(()));
        assert_eq!((write(&mut session, 9), session.held_bytes()), (vec![], 0));
    }

    #[test]
    fn frames_of_one_kind_are_taken_and_leave_no_gap() {
        let limits = limits(4, 1000);
        let alice = AgentId::parse("a").unwrap();
        let offer = || Unnumbered::new(Kind::Offer, &alice, None, None);
        let mut session = session();
        for frame in [bye(), offer(), bye(), offer()] {
            session.push(frame, &limits).unwrap();
        }
        let taken = session.take(Kind::Offer);
        let seqs = taken
            .iter()
            .map(|frame| serde_json::from_slice::<serde_json::Value>(frame).unwrap()["seq"].clone());
        assert_eq!(seqs.collect::<Vec<_>>(), [2, 4]);
        assert_eq!(session.held_bytes(), 2 * bye().size());
        assert_eq!((session.take(Kind::Offer).len(), write(&mut session, 9)), (0, vec![1, 3]));
        assert_eq!(session.rewind(0), Ok(()), "what was taken is not missed");
        assert_eq!(write(&mut session, 9), [1, 3]);
    }

    #[test]
    fn asides_are_bounded() {
        let mut session = session();
        let pushed = (0..2000).take_while(|_| session.push_aside("{}".into(), 1 << 20).is_ok()).count();
        assert_eq!(pushed, 1024);
        assert_eq!(session.push(bye(), &limits(1, 1000)), Ok(()), "and take no room in the window");
    }
}
