//! One agent's WebSocket: hello, then frames in and frames out until one side has had enough.

use std::{future::Future, time::Duration};

use aws_lc_rs::{digest, rand};
use base64::{Engine, prelude::BASE64_STANDARD};
use futures_util::{SinkExt, StreamExt};
use hyper::{
    HeaderMap, Request, Response, StatusCode,
    body::Incoming,
    header::{self, HeaderValue},
    upgrade::{OnUpgrade, Upgraded},
};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde_json::value::RawValue;
use tokio::{
    sync::mpsc,
    time::{Instant, Interval, MissedTickBehavior, interval, sleep_until, timeout},
};
use tokio_websockets::{CloseCode, Error, Limits, Message, ServerBuilder, WebSocketStream};

use super::{
    Visit,
    ice::IceList,
    problem::Problem,
    routes::{self, Answer},
    switchboard::Seat,
    turned_true,
};
use crate::{
    clock::{self, Now},
    credentials::token::{Agent, TokenRefusal},
    signaling::{
        farewell::Farewell,
        hub::{Departure, Join, Outgoing},
        message::{self, ClientFrame, Hello, Incoming as IncomingFrame, Rejected, ServerFrame, SessionId},
        refusal::Refusal,
    },
};

const SUBPROTOCOL: &str = "halfway.v1";

/// How long the last frames may take: whoever does not read them is not waited for.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// Frames written before the agent is listened to again.
const AT_ONCE: usize = 64;

/// An upgrade that has been agreed to.
#[derive(Debug)]
pub(super) struct Upgrade {
    on: OnUpgrade,
    credential: Credential,
}

/// What the request already said about who asks.
#[derive(Debug)]
enum Credential {
    Checked(Agent),
    /// From the subprotocol. Checked after the upgrade: a browser's page sees close codes, but no HTTP status.
    Offered(String),
    /// It is in the hello.
    None,
}

/// Answers `GET /v1/ws` (RFC 6455 §4.2).
pub(super) fn upgrade(
    visit: &Visit,
    request: &mut Request<Incoming>,
    accepted: &mpsc::Sender<Upgrade>,
) -> Result<Answer, Problem> {
    let accept = accept_key(handshake_key(request.headers())?);
    let protocols = Protocols::of(request.headers())?;
    let credential = match (routes::bearer(request.headers()), protocols.token) {
        (Some(token), _) => Credential::Checked(may_signal(visit.front.tokens.check(clock::now(), token)?)?),
        (None, Some(token)) => Credential::Offered(token),
        (None, None) => Credential::None,
    };
    if *visit.shutdown.borrow() {
        return Err(Problem::unavailable("going down"));
    }
    // One upgrade ends a connection's HTTP, so there is always room.
    let _ = accepted.try_send(Upgrade { on: hyper::upgrade::on(&mut *request), credential });
    let mut response = Response::default();
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let headers = response.headers_mut();
    headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
    headers.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
    headers.insert(header::SEC_WEBSOCKET_ACCEPT, accept);
    if protocols.offered {
        headers.insert(header::SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(SUBPROTOCOL));
    }
    Ok(response)
}

pub(super) fn may_signal(agent: Agent) -> Result<Agent, Problem> {
    if agent.scopes.signal { Ok(agent) } else { Err(Problem::forbidden("the token lacks the scope signal")) }
}

fn handshake_key(headers: &HeaderMap) -> Result<&HeaderValue, Problem> {
    let lists = |name, wanted: &str| {
        let values = headers.get_all(name).iter().filter_map(|value| value.to_str().ok());
        values.flat_map(|value| value.split(',')).any(|value| value.trim().eq_ignore_ascii_case(wanted))
    };
    let version = headers.get(header::SEC_WEBSOCKET_VERSION).is_some_and(|version| version == "13");
    if !lists(header::UPGRADE, "websocket") || !lists(header::CONNECTION, "upgrade") || !version {
        return Err(Problem::upgrade_required());
    }
    let key = headers.get(header::SEC_WEBSOCKET_KEY);
    let sound = |key: &&HeaderValue| BASE64_STANDARD.decode(key).is_ok_and(|key| key.len() == 16);
    key.filter(sound).ok_or(Problem::bad_request("Sec-WebSocket-Key is not 16 bytes in base64"))
}

fn accept_key(key: &HeaderValue) -> HeaderValue {
    let mut sha1 = digest::Context::new(&digest::SHA1_FOR_LEGACY_USE_ONLY);
    sha1.update(key.as_bytes());
    sha1.update(b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11");
    HeaderValue::try_from(BASE64_STANDARD.encode(sha1.finish())).expect("base64 is a header value")
}

/// What `Sec-WebSocket-Protocol` offers.
struct Protocols {
    offered: bool,
    token: Option<String>,
}

impl Protocols {
    /// None at all is fine: plain clients send no list.
    fn of(headers: &HeaderMap) -> Result<Self, Problem> {
        let values =
            headers.get_all(header::SEC_WEBSOCKET_PROTOCOL).iter().filter_map(|value| value.to_str().ok());
        let names: Vec<_> = values.flat_map(|value| value.split(',')).map(str::trim).collect();
        let offered = names.contains(&SUBPROTOCOL);
        if !names.is_empty() && !offered {
            return Err(Problem::bad_request("the subprotocol here is halfway.v1"));
        }
        let token = names.iter().find_map(|name| name.strip_prefix("bearer.")).map(str::to_owned);
        Ok(Self { offered, token })
    }
}

type Socket = WebSocketStream<TokioIo<Upgraded>>;

/// The connection is a WebSocket now.
pub(super) async fn serve(visit: Visit, upgrade: Upgrade) {
    let Ok(upgraded) = upgrade.on.await else { return };
    // Up to twice the limit a frame is read and refused by name; beyond it the connection is closed with 1009.
    let limits = Limits::default().max_payload_len(visit.front.max_frame.checked_mul(2));
    let mut socket = ServerBuilder::new().limits(limits).serve(TokioIo::new(upgraded));
    let mut shutdown = visit.shutdown.clone();
    let joined = tokio::select! {
        joined = timeout(visit.front.patience.hello, hello(&visit, &mut socket, upgrade.credential)) => joined,
        () = turned_true(&mut shutdown) => return close(socket, 1012, "restarting").await,
    };
    match joined {
        Ok(Ok(guest)) => guest.converse(&visit, socket).await,
        Ok(Err(NoHello::Refused(refusal))) => refuse(&visit, socket, &refusal).await,
        Ok(Err(NoHello::Gone)) => close(socket, 1000, "").await,
        Err(_) => refuse(&visit, socket, &Refusal::BadFrame("hello did not come in time".into())).await,
    }
}

/// Why a connection never got a session.
enum NoHello {
    Gone,
    Refused(Refusal),
}

impl<T: Into<Refusal>> From<T> for NoHello {
    fn from(refusal: T) -> Self {
        Self::Refused(refusal.into())
    }
}

/// Waits for the first frame and finds out who speaks.
async fn hello(visit: &Visit, socket: &mut Socket, credential: Credential) -> Result<Guest, NoHello> {
    let message = loop {
        match socket.next().await {
            Some(Ok(message)) if message.is_close() => return Err(NoHello::Gone),
            Some(Ok(message)) if message.is_text() || message.is_binary() => break message,
            Some(Ok(_)) => {}
            Some(Err(_)) | None => return Err(NoHello::Gone),
        }
    };
    let frame = read(visit, &message).map_err(|rejected| rejected.refusal)?;
    let ClientFrame::Hello(hello) = &frame.frame else {
        return Err(Refusal::BadFrame("the first frame is not hello".into()).into());
    };
    let now = clock::now();
    let agent = match credential {
        Credential::Checked(agent) => agent,
        Credential::Offered(token) => visit.front.tokens.check(now, &token)?,
        Credential::None => {
            let token = hello.token.as_deref().ok_or(Refusal::Token(TokenRefusal::Malformed))?;
            visit.front.tokens.check(now, token)?
        }
    };
    if !agent.scopes.signal {
        return Err(Refusal::Forbidden("the token lacks the scope signal").into());
    }
    sit_down(visit, agent, &frame, hello, now)
}

fn sit_down(
    visit: &Visit,
    agent: Agent,
    frame: &IncomingFrame<'_>,
    hello: &Hello<'_>,
    now: Now,
) -> Result<Guest, NoHello> {
    let list = routes::ice_list(visit, &agent, now, None).ok();
    let ice = list.as_ref().and_then(|list| serde_json::value::to_raw_value(list).ok());
    let fresh = session_id()?;
    let join = Join { id: frame.id, ice: ice.as_deref().map(|ice: &RawValue| ice), fresh };
    let seat = visit.front.switchboard.join(&agent, hello, join)?;
    let ice_expires = list.map(|list| now.unix() + list.turn_rest.ttl);
    Ok(Guest { seat, agent, ice_expires })
}

/// A message as a frame; its size is checked before it is parsed.
fn read<'a>(visit: &Visit, message: &'a Message) -> Result<IncomingFrame<'a>, Rejected<'a>> {
    let nameless = |refusal| Err(Rejected { id: None, refusal });
    if message.as_payload().len() > visit.front.max_frame {
        return nameless(Refusal::TooLarge("the frame is over the limit"));
    }
    if !message.is_text() {
        return nameless(Refusal::BadFrame("frames are text".into()));
    }
    message::parse(message.as_payload())
}

/// A new session's name.
pub(super) fn session_id() -> Result<SessionId, Refusal> {
    random().map(SessionId::from_random).ok_or(Refusal::Unavailable("no randomness"))
}

fn random<const N: usize>() -> Option<[u8; N]> {
    let mut bytes = [0; N];
    rand::fill(&mut bytes).ok().map(|()| bytes)
}

/// An agent with a seat in the hub.
struct Guest {
    seat: Seat,
    agent: Agent,
    /// Until when the last ICE list is good, in Unix seconds.
    ice_expires: Option<u64>,
}

/// Whether the conversation goes on.
enum Next {
    Go,
    /// Nothing more to say.
    End,
}

/// `ice`, in the frame's form.
#[derive(Serialize)]
struct IceFrame<'a> {
    r#type: &'static str,
    #[serde(flatten)]
    list: &'a IceList,
}

impl Guest {
    async fn converse(mut self, visit: &Visit, mut socket: Socket) {
        let mut heartbeat = Heartbeat::new(visit.front.switchboard.tell(|hub, _| hub.heartbeat()));
        let mut ice_at = self.next_ice(clock::now());
        loop {
            if let Next::End = self.write_out(visit, &mut socket).await {
                return;
            }
            tokio::select! {
                // What was heard counts before the next heartbeat asks for it.
                biased;
                message = socket.next() => {
                    heartbeat.heard = true;
                    if let Next::End = self.hear(visit, message) {
                        let _ = timeout(LAST_WORDS, socket.close()).await;
                        return;
                    }
                }
                () = self.seat.woken() => {}
                alive = heartbeat.tick() => {
                    if alive {
                        self.write(visit, socket.send(Message::ping(""))).await;
                    } else {
                        self.hang_up();
                    }
                }
                () = sleep_until(ice_at) => ice_at = self.push_ice(visit),
            }
        }
    }

    /// Writes what waits, up to a limit, so that a busy agent is heard too. It is not read from meanwhile: one that
    /// does not listen cannot go on talking.
    async fn write_out(&self, visit: &Visit, socket: &mut Socket) -> Next {
        for _ in 0..AT_ONCE {
            match self.seat.next_outgoing() {
                Some(Outgoing::Frame(frame)) => self.write(visit, socket.feed(Message::text(frame))).await,
                Some(Outgoing::Close(farewell)) => {
                    say_goodbye(socket, farewell).await;
                    return Next::End;
                }
                None => {
                    self.write(visit, socket.flush()).await;
                    return Next::Go;
                }
            }
        }
        self.seat.wake_again();
        self.write(visit, socket.flush()).await;
        Next::Go
    }

    /// One that is too slow is told to go; a broken connection shows when it is read next.
    async fn write(&self, visit: &Visit, writing: impl Future<Output = Result<(), Error>>) {
        if timeout(visit.front.patience.write, writing).await.is_err() {
            self.hang_up();
        }
    }

    fn hang_up(&self) {
        self.seat.tell(|hub, now, connection| hub.hang_up(now, connection));
    }

    fn hear(&mut self, visit: &Visit, message: Option<Result<Message, Error>>) -> Next {
        let Some(Ok(message)) = message else { return Next::End };
        if message.is_close() {
            self.seat.departure = Departure::Left;
            return Next::End;
        }
        if !message.is_ping() && !message.is_pong() {
            self.take(visit, read(visit, &message));
        }
        Next::Go
    }

    /// Passes a frame to the hub. Tokens are checked here: the hub has no keys.
    fn take(&mut self, visit: &Visit, frame: Result<IncomingFrame<'_>, Rejected<'_>>) {
        if let Ok(IncomingFrame { id, frame: ClientFrame::Renew { token }, .. }) = &frame {
            let token = visit.front.tokens.check(clock::now(), token);
            if let Ok(fresh) = &token
                && (&fresh.id, &fresh.room) == (&self.agent.id, &self.agent.room)
            {
                self.agent.expires = fresh.expires;
            }
            self.seat.tell(|hub, now, connection| hub.renew(now, connection, *id, token));
        } else {
            self.seat.tell(|hub, now, connection| hub.handle(now, connection, frame));
        }
    }

    /// At half the remaining life, a little earlier for some than for others.
    fn next_ice(&self, now: Now) -> Instant {
        let left = self.ice_expires.map_or(86_400, |expires| expires.saturating_sub(now.unix()));
        let [jitter] = random().unwrap_or([0]);
        let half = Duration::from_secs(left) / 2;
        Instant::from_std(now.mono) + (half - half / 10 * u32::from(jitter) / 255).max(Duration::from_secs(1))
    }

    /// Sends fresh credentials if they are good for longer than the old ones, and says when to think of it again.
    fn push_ice(&mut self, visit: &Visit) -> Instant {
        let now = clock::now();
        if let (Some(old), Ok(list)) = (self.ice_expires, routes::ice_list(visit, &self.agent, now, None)) {
            let expires = now.unix() + list.turn_rest.ttl;
            if expires > old {
                self.ice_expires = Some(expires);
                let frame = serde_json::to_vec(&IceFrame { r#type: "ice", list: &list });
                let frame = frame.expect("an ICE list is plain JSON").into();
                self.seat.tell(|hub, now, connection| hub.push(now, connection, frame));
            }
        }
        self.next_ice(now)
    }
}

/// Pings, and knows whether anything came back.
struct Heartbeat {
    pings: Interval,
    heard: bool,
}

impl Heartbeat {
    fn new(every: Duration) -> Self {
        let mut pings = interval(every);
        pings.set_missed_tick_behavior(MissedTickBehavior::Delay);
        pings.reset();
        Self { pings, heard: true }
    }

    /// Comes when it is time to ping; false when nothing was heard since the last one.
    async fn tick(&mut self) -> bool {
        self.pings.tick().await;
        std::mem::take(&mut self.heard)
    }
}

async fn say_goodbye(socket: &mut Socket, farewell: Farewell) {
    let last_words = async {
        if let Some(frame) = farewell.frame() {
            socket.feed(Message::text(frame)).await?;
        }
        socket.send(Message::close(close_code(farewell.close_code()), farewell.reason())).await?;
        socket.close().await
    };
    let _ = timeout(LAST_WORDS, last_words).await;
}

/// Says why there is no session, and closes.
async fn refuse(visit: &Visit, mut socket: Socket, refusal: &Refusal) {
    visit.front.switchboard.tell(|hub, _| hub.count_refusal(refusal));
    let frame = ServerFrame::error(None, refusal).to_bytes();
    let code = match refusal {
        Refusal::Token(TokenRefusal::Expired) => 4001,
        Refusal::Unavailable(_) => 1013,
        _ => 1008,
    };
    let _ = timeout(LAST_WORDS, socket.feed(Message::text(frame))).await;
    close(socket, code, refusal.code()).await;
}

async fn close(mut socket: Socket, code: u16, reason: &str) {
    let last_words = async {
        socket.send(Message::close(close_code(code), reason)).await?;
        socket.close().await
    };
    let _ = timeout(LAST_WORDS, last_words).await;
}

fn close_code(code: u16) -> Option<CloseCode> {
    CloseCode::try_from(code).ok()
}

#[cfg(test)]
mod tests {
    use super::{HeaderMap, HeaderValue, Protocols, accept_key, header};

    #[test]
    fn the_vector_of_rfc_6455() {
        let key = HeaderValue::from_static("dGhlIHNhbXBsZSBub25jZQ==");
        assert_eq!(accept_key(&key), "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
    }

    #[test]
    fn a_browser_offers_its_token_as_a_subprotocol() {
        let offer = |list: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(list));
            Protocols::of(&headers).map(|protocols| (protocols.offered, protocols.token)).ok()
        };
        assert_eq!(offer("halfway.v1, bearer.a.b-_.c"), Some((true, Some("a.b-_.c".to_owned()))));
        assert_eq!(offer("halfway.v1"), Some((true, None)));
        assert_eq!(offer("bearer.a.b.c"), None);
        assert_eq!(offer("chat"), None);
    }
}
