//! One agent's connection: hello, then frames in and frames out until one side has had enough.

use std::{
    io, mem,
    ops::ControlFlow,
    sync::Arc,
    time::{Duration, Instant},
};

use serde_json::value::RawValue;

use super::{
    super::{
        Visit, refresh, routes,
        switchboard::{Seat, session_id},
    },
    Credential,
    exchange::{Arrival, Mailbox},
    framing::{self, Decoder, Said, Violation},
    peer::{self, Peer},
};
use crate::{
    clock::Now,
    credentials::token::{Agent, TokenRefusal},
    door::admission::Permit,
    poll::has_hung_up,
    signaling::{
        farewell::Farewell,
        hub::{ConnectionId, Departure, Join, Outgoing},
        message::{ClientFrame, Frame, FrameId, Hello, Incoming, Rejected, ServerFrame},
        peerjs::{self, Translated, error},
        refusal::Refusal,
    },
    stream::{Flushed, Spare, Stream},
};

/// How long a client may take to answer our goodbye.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// Bytes that somebody who has not said hello may have us keep, even where frames have no limit.
const LONGEST_HELLO: usize = 128 << 10;

/// Bytes on their way to a client before more is taken from its session.
const ENOUGH: usize = 16 << 10;

/// A client's WebSocket.
pub(super) struct Line {
    pub(super) stream: Stream,
    decoder: Decoder,
    visit: Visit,
    stage: Stage,
    _permit: Permit,
}

enum Stage {
    /// For the hello is waited until then.
    Greeting(Credential, Instant),
    Talking(Box<Guest>),
    /// We said goodbye; for the client's is waited until then.
    Parting(Instant),
}

/// An agent with a seat in the hub.
struct Guest {
    seat: Seat,
    agent: Agent,
    /// It should have fresh ICE servers then.
    ice_at: Option<Instant>,
    heartbeat: Duration,
    ping_at: Instant,
    /// Since the last ping.
    heard: bool,
    /// It speaks PeerJS.
    peer: Option<Box<Peer>>,
}

/// What a thread lends to the line that it attends to.
pub(super) struct Desk<'a> {
    pub(super) now: Now,
    pub(super) spare: &'a mut Spare,
    /// Where to wake the thread.
    pub(super) mailbox: &'a Arc<Mailbox>,
    /// The line's.
    pub(super) index: usize,
    /// Counts what is heard.
    pub(super) frames: &'a mut usize,
}

/// What a line has written.
enum Wrote {
    All,
    /// There is more.
    Enough,
    /// Nothing comes behind it.
    Farewell(Farewell),
}

const GO_ON: ControlFlow<()> = ControlFlow::Continue(());
const END: ControlFlow<()> = ControlFlow::Break(());

impl Line {
    pub(super) fn new(now: Now, arrival: Arrival) -> Self {
        let Arrival { visit, credential, socket, tls, permit, .. } = arrival;
        let until = now.mono + visit.front.patience.hello;
        Self {
            stream: Stream::new(socket, Some(tls)),
            decoder: Decoder::default(),
            visit,
            stage: Stage::Greeting(credential, until),
            _permit: permit,
        }
    }

    /// In the hub, of an agent that has said hello.
    pub(super) fn connection(&self) -> Option<ConnectionId> {
        match &self.stage {
            Stage::Talking(guest) => Some(guest.seat.connection),
            Stage::Greeting(..) | Stage::Parting(_) => None,
        }
    }

    /// Reads once of the socket, and what TLS has decrypted to its end: the poll tells of more bytes, but not of those.
    pub(super) fn read(&mut self, desk: &mut Desk<'_>, piece: &mut [u8]) -> ControlFlow<()> {
        if self.stream.full_since().is_some() {
            return GO_ON;
        }
        let mut read = self.stream.read(desk.spare, piece);
        loop {
            match read {
                Ok(length @ 1..) => self.hear(desk, &mut piece[..length])?,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return GO_ON,
                Ok(0) | Err(_) => return END,
            }
            read = self.stream.read_decrypted(piece);
        }
    }

    /// A client of PeerJS says no hello: what there was to say was in its request.
    ///
    /// Here as for who says hello: who gave this attempt up must not take the session from the next attempt, which may have been
    /// faster.
    pub(super) fn open(&mut self, desk: &mut Desk<'_>) -> ControlFlow<()> {
        let Stage::Greeting(Credential::Peer(credential), _) = &self.stage else { return GO_ON };
        if has_hung_up(&self.stream.socket) {
            return END;
        }
        let seated = match credential {
            Ok(agent) => sit_down_as_peer(&self.visit, desk, agent).map_err(|refusal| {
                self.visit.front.switchboard.tell(|hub, _| hub.count_refusal(&refusal));
                error(&refusal.to_string())
            }),
            Err(text) => Err(text.clone()),
        };
        match seated {
            Ok(guest) => self.stage = Stage::Talking(Box::new(guest)),
            Err(text) => {
                write_text(self.stream.outbox(desk.spare), &text);
                self.part(desk, 1008, "");
            }
        }
        GO_ON
    }

    /// Hears what the client sent.
    pub(super) fn hear(&mut self, desk: &mut Desk<'_>, bytes: &mut [u8]) -> ControlFlow<()> {
        // Up to twice the limit a frame is read and refused by name; beyond it the connection is closed.
        let longest = self.visit.front.terms().max_frame.saturating_mul(2);
        let mut decoder = mem::take(&mut self.decoder);
        let heard = decoder.read(bytes, longest, |said| self.listen_to(desk, &said));
        let is_too_long = matches!(self.stage, Stage::Greeting(..)) && decoder.held() > LONGEST_HELLO;
        self.decoder = decoder;
        let heard = if is_too_long { Err(Violation::TooLong) } else { heard };
        heard.unwrap_or_else(|violation| {
            self.part(desk, violation.close_code(), "");
            GO_ON
        })
    }

    fn listen_to(&mut self, desk: &mut Desk<'_>, said: &Said<'_>) -> ControlFlow<()> {
        if let Stage::Talking(guest) = &mut self.stage {
            guest.heard = true;
        }
        match (said, &mut self.stage) {
            (Said::Close(code), stage) => {
                if let Stage::Talking(guest) = stage {
                    guest.seat.departure = match code {
                        // `peer.disconnect()` of PeerJS gives no code, and keeps the connections with others.
                        None if guest.peer.is_some() => Departure::LeftQuietly,
                        None | Some(1000 | 1001) => Departure::Left,
                        // Something went wrong over there, such as a ping that was not answered in time.
                        Some(_) => Departure::Dropped,
                    };
                }
                // Ours is the answer, unless it came first.
                if !matches!(stage, Stage::Parting(_)) {
                    framing::write_close(self.stream.outbox(desk.spare), code.unwrap_or(1000), "");
                }
                return END;
            }
            (Said::Pong, _) | (_, Stage::Parting(_)) => {}
            (Said::Ping(payload), _) => framing::write_pong(self.stream.outbox(desk.spare), payload),
            (Said::Text(_) | Said::Binary, Stage::Greeting(..)) => return self.greet(desk, said),
            (Said::Text(_) | Said::Binary, Stage::Talking(guest)) => {
                *desk.frames += 1;
                let Some(peer) = &mut guest.peer else {
                    guest.take(&self.visit, desk.now, read(&self.visit, said));
                    return GO_ON;
                };
                let answer = peer.listen_to(&self.visit, desk.now, &guest.seat, said);
                let out = self.stream.outbox(desk.spare);
                answer.texts.iter().for_each(|text| write_text(out, text));
                if answer.leaves {
                    guest.seat.departure = Departure::Left;
                    self.part(desk, 1000, "");
                }
            }
        }
        GO_ON
    }

    /// The first frame is the hello.
    fn greet(&mut self, desk: &mut Desk<'_>, said: &Said<'_>) -> ControlFlow<()> {
        let Stage::Greeting(credential, _) = &self.stage else { return GO_ON };
        if has_hung_up(&self.stream.socket) {
            return END;
        }
        match greeted(&self.visit, desk, credential, said) {
            Ok(guest) => self.stage = Stage::Talking(Box::new(guest)),
            Err(Rejected { id, refusal }) => self.refuse(desk, id, &refusal),
        }
        GO_ON
    }

    /// Takes what the session holds for the client, as much as fits.
    pub(super) fn write_out(&mut self, desk: &mut Desk<'_>) -> ControlFlow<()> {
        let Stage::Talking(guest) = &mut self.stage else { return GO_ON };
        let blocked = self.stream.full_since().is_some();
        let out = self.stream.outbox(desk.spare);
        let Guest { seat, peer, .. } = &mut **guest;
        // Everybody waits while we ask the hub: what PeerJS reads is put into its words afterwards.
        let (mut for_peer, mut size) = (Vec::new(), out.len());
        let wrote = seat.tell(|hub, connection| {
            if blocked && !hub.is_leaving(connection) {
                return Wrote::All;
            }
            while blocked || size < ENOUGH {
                match hub.next_outgoing(connection) {
                    Some(Outgoing::Frame(frame)) => {
                        size += frame.length();
                        match peer {
                            None => write_frame(out, &frame),
                            Some(_) => for_peer.push(frame.to_bytes()),
                        }
                    }
                    Some(Outgoing::Close(farewell)) => return Wrote::Farewell(farewell),
                    None => return Wrote::All,
                }
            }
            Wrote::Enough
        });
        if let Some(peer) = peer {
            let mut joined = Vec::new();
            for frame in for_peer {
                match peer.translate(&frame) {
                    Translated::Text(text) => write_text(out, &text),
                    Translated::Joined(agent) if peer.waits_for(&agent) => joined.push(agent),
                    Translated::Joined(_) | Translated::Nothing => {}
                }
            }
            let texts = joined.iter().filter_map(|agent| peer.flush(desk.now, seat, agent));
            texts.for_each(|text| write_text(out, &text));
        }
        match wrote {
            Wrote::All => {}
            Wrote::Enough => desk.mailbox.ready(desk.index, guest.seat.connection),
            Wrote::Farewell(farewell) => {
                let out = self.stream.outbox(desk.spare);
                if peer.is_some() {
                    peerjs::farewell(farewell).iter().for_each(|text| write_text(out, text));
                } else if let Some(frame) = farewell.frame() {
                    write_frame(out, &frame.into());
                }
                self.part(desk, farewell.close_code(), farewell.reason());
            }
        }
        GO_ON
    }

    /// Passes on what is written; then there is room for more.
    pub(super) fn flush(&mut self, desk: &mut Desk<'_>) -> io::Result<Flushed> {
        let flushed = self.stream.flush(desk.now.mono, desk.spare, <[u8]>::len)?;
        if let (Flushed::Unblocked, Some(connection)) = (flushed, self.connection()) {
            desk.mailbox.ready(desk.index, connection);
        }
        Ok(flushed)
    }

    /// When [`Self::handle_timeout`] is due.
    pub(super) fn deadline(&self) -> Instant {
        match &self.stage {
            Stage::Greeting(_, until) | Stage::Parting(until) => *until,
            Stage::Talking(guest) => {
                let slow = self.stream.full_since().map(|since| since + self.visit.front.patience.write);
                let waited = guest.peer.as_ref().and_then(|peer| peer.deadline());
                [slow, guest.ice_at, waited].into_iter().flatten().fold(guest.ping_at, Instant::min)
            }
        }
    }

    pub(super) fn handle_timeout(&mut self, desk: &mut Desk<'_>) -> ControlFlow<()> {
        let now = desk.now.mono;
        let patience = self.visit.front.patience.write;
        let slow = self.stream.full_since().is_some_and(|since| since + patience <= now);
        match &mut self.stage {
            Stage::Greeting(_, until) if *until <= now => {
                self.refuse(desk, None, &Refusal::BadFrame("hello did not come in time".into()));
            }
            Stage::Parting(until) if *until <= now => return END,
            Stage::Talking(guest) if slow || (guest.ping_at <= now && !guest.heard) => {
                guest.seat.tell(|hub, connection| hub.hang_up(desk.now, connection));
                return self.write_out(desk);
            }
            Stage::Talking(guest) => {
                if guest.ping_at <= now {
                    guest.heard = false;
                    guest.ping_at = now + guest.heartbeat;
                    framing::write_ping(self.stream.outbox(desk.spare));
                }
                if let Some(peer) = &mut guest.peer {
                    let out = self.stream.outbox(desk.spare);
                    peer.handle_timeout(desk.now, &guest.seat).iter().for_each(|text| write_text(out, text));
                }
                if guest.ice_at.is_some_and(|ice_at| ice_at <= now) {
                    guest.ice_at = refresh::push_if_due(&self.visit, desk.now, &guest.agent, &guest.seat);
                }
            }
            Stage::Greeting(..) | Stage::Parting(_) => {}
        }
        GO_ON
    }

    /// Whoever has not said hello yet is to come back later; the hub tells the others.
    pub(super) fn restart(&mut self, desk: &mut Desk<'_>) -> ControlFlow<()> {
        if let Stage::Greeting(..) = self.stage {
            self.part(desk, 1012, "restarting");
        }
        GO_ON
    }

    /// Says why there is no session.
    fn refuse(&mut self, desk: &mut Desk<'_>, id: Option<FrameId<'_>>, refusal: &Refusal) {
        self.visit.front.switchboard.tell(|hub, _| hub.count_refusal(refusal));
        let frame = ServerFrame::error(id, refusal).to_bytes();
        write_frame(self.stream.outbox(desk.spare), &frame.into());
        let code = match refusal {
            Refusal::Token(TokenRefusal::Expired) => 4001,
            Refusal::Token(TokenRefusal::Revoked) => 4002,
            Refusal::Unavailable(_) => 1013,
            _ => 1008,
        };
        self.part(desk, code, refusal.code());
    }

    /// Says goodbye, once.
    fn part(&mut self, desk: &mut Desk<'_>, code: u16, reason: &str) {
        if !matches!(self.stage, Stage::Parting(_)) {
            framing::write_close(self.stream.outbox(desk.spare), code, reason);
            self.stage = Stage::Parting(desk.now.mono + LAST_WORDS);
        }
    }

    /// Nothing is waited for any more.
    pub(super) fn end(&mut self, now: Now, spare: &mut Spare) {
        let _ = self.stream.flush(now.mono, spare, <[u8]>::len);
        self.stream.say_goodbye();
    }
}

fn write_text(out: &mut Vec<u8>, text: &str) {
    framing::begin_text(out, text.len());
    out.extend_from_slice(text.as_bytes());
}

fn write_frame(out: &mut Vec<u8>, frame: &Frame<'_>) {
    framing::begin_text(out, frame.length());
    frame.write(out);
}

/// Finds out who speaks.
fn greeted<'a>(
    visit: &Visit,
    desk: &Desk<'_>,
    credential: &Credential,
    said: &Said<'a>,
) -> Result<Guest, Rejected<'a>> {
    let frame = read(visit, said)?;
    hello(visit, desk, credential, &frame).map_err(|refusal| Rejected { id: frame.id, refusal })
}

fn hello(
    visit: &Visit,
    desk: &Desk<'_>,
    credential: &Credential,
    frame: &Incoming<'_>,
) -> Result<Guest, Refusal> {
    let ClientFrame::Hello(hello) = &frame.frame else {
        return Err(Refusal::BadFrame("the first frame is not hello".into()));
    };
    let agent = match credential {
        Credential::Checked(agent) => agent.clone(),
        Credential::Offered(token) => visit.front.check(desk.now, token)?,
        Credential::None => {
            let token = hello.token.as_deref().ok_or(Refusal::Token(TokenRefusal::Malformed))?;
            visit.front.check(desk.now, token)?
        }
        Credential::Peer(_) => return Err(Refusal::BadFrame("a client of PeerJS says no hello".into())),
    };
    if !agent.scopes.signal {
        return Err(Refusal::Forbidden("the token lacks the scope signal"));
    }
    sit_down(visit, desk, agent, frame, hello)
}

fn sit_down(
    visit: &Visit,
    desk: &Desk<'_>,
    agent: Agent,
    frame: &Incoming<'_>,
    hello: &Hello<'_>,
) -> Result<Guest, Refusal> {
    let now = desk.now;
    let list = routes::ice_list(visit, &agent, now, None).ok();
    let ice = list.as_ref().and_then(|list| serde_json::value::to_raw_value(list).ok());
    let ice_term = list.as_ref().map(|list| refresh::term(now, list));
    let join = Join {
        id: frame.id,
        ice: ice.as_deref().map(|ice: &RawValue| ice),
        ice_term,
        fresh: session_id()?,
        ends_with_bye: false,
        takes_any: false,
    };
    let seat = visit.front.switchboard.join(now, &agent, hello, join, desk.mailbox, desk.index)?;
    let heartbeat = seat.tell(|hub, _| hub.heartbeat());
    let (ice_at, ping_at) = (ice_term.map(|term| term.renew_at), now.mono + heartbeat);
    Ok(Guest { seat, agent, ice_at, heartbeat, ping_at, heard: true, peer: None })
}

fn sit_down_as_peer(visit: &Visit, desk: &Desk<'_>, agent: &Agent) -> Result<Guest, Refusal> {
    let seat = peer::sit_down(visit, desk, agent)?;
    let heartbeat = seat.tell(|hub, _| hub.heartbeat());
    let peer = Some(Box::new(Peer::new(agent.clone())));
    let ping_at = desk.now.mono + heartbeat;
    Ok(Guest { seat, agent: agent.clone(), ice_at: None, heartbeat, ping_at, heard: true, peer })
}

fn read<'a>(visit: &Visit, said: &Said<'a>) -> Result<Incoming<'a>, Rejected<'a>> {
    match said {
        Said::Text(text) => visit.parse(text),
        _ => Err(Rejected { id: None, refusal: Refusal::BadFrame("frames are text".into()) }),
    }
}

impl Guest {
    /// Passes a frame to the hub. Tokens are checked here, once they are paid for: the hub has no keys.
    fn take(&mut self, visit: &Visit, now: Now, frame: Result<Incoming<'_>, Rejected<'_>>) {
        if let Ok(Incoming { id, frame: ClientFrame::Renew { token }, .. }) = &frame {
            let charged = self.seat.tell(|hub, connection| hub.charge_line(now, connection));
            let token = charged.and_then(|()| visit.front.check(now, token));
            self.seat.tell(|hub, connection| hub.renew(now, connection, *id, token));
        } else {
            self.seat.tell(|hub, connection| hub.handle(now, connection, frame));
        }
    }
}
