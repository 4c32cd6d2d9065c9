//! Frames from agents and to agents, exactly as `docs/protocol.md` writes them.
//!
//! What agents say to each other (SDP, candidates, payloads, cards) is validated as JSON and passed on unread.

use std::{borrow::Cow, fmt, io::Write, time::SystemTime};

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use bytes::Bytes;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::value::RawValue;

use super::{
    limits::MAX_CARD,
    refusal::Refusal,
    registry::{Page, Query},
};
use crate::credentials::token::{AgentId, Room};

/// Deeper JSON than any honest frame: receivers' parsers are recursive, and the small ones fall over near 1,000.
const MAX_DEPTH: usize = 128;

/// Bytes of an `id`.
const MAX_FRAME_ID: usize = 128;

/// An agent's own name for a frame, a string or a number, repeated in the answer.
pub type FrameId<'a> = &'a RawValue;

/// A frame from an agent.
#[derive(Debug)]
pub struct Incoming<'a> {
    pub id: Option<FrameId<'a>>,
    /// Whom the sender claims to be; most say nothing.
    pub from: Option<Cow<'a, str>>,
    pub frame: ClientFrame<'a>,
}

/// A frame that cannot be understood, and its `id` if that much could be read.
#[derive(Debug)]
pub struct Rejected<'a> {
    pub id: Option<FrameId<'a>>,
    pub refusal: Refusal,
}

/// What an agent may say.
#[derive(Debug)]
pub enum ClientFrame<'a> {
    Hello(Hello<'a>),
    /// For another agent, or with no `to` for the room.
    Routed {
        kind: Kind,
        to: Option<Cow<'a, str>>,
        body: Option<&'a RawValue>,
    },
    Find(Find<'a>),
    Update {
        card: Option<&'a RawValue>,
    },
    Received {
        up_to: u64,
    },
    Ping,
    Renew {
        token: Cow<'a, str>,
    },
}

/// The first frame.
#[derive(Debug, Default)]
pub struct Hello<'a> {
    pub token: Option<Cow<'a, str>>,
    pub card: Option<&'a RawValue>,
    pub resume: Option<Resume>,
}

/// Whom to find in the room.
#[derive(Debug, Default)]
pub struct Find<'a> {
    pub query: Query,
    /// Those that come after this one.
    pub after: Option<Cow<'a, str>>,
    /// So many at most; by default as many as a frame holds.
    pub limit: Option<usize>,
}

/// Which session to continue, and from where.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Resume {
    pub session: String,
    /// The last number that arrived.
    pub after: u64,
}

/// What is passed on between agents.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Kind {
    Offer,
    Answer,
    IceCandidate,
    Bye,
    Message,
}

impl Kind {
    /// The frame's `type`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Offer => "offer",
            Self::Answer => "answer",
            Self::IceCandidate => "iceCandidate",
            Self::Bye => "bye",
            Self::Message => "message",
        }
    }

    /// The member that holds what is passed on.
    fn member(self) -> Option<&'static str> {
        match self {
            Self::Offer | Self::Answer => Some("sdp"),
            Self::IceCandidate => Some("candidate"),
            Self::Bye => None,
            Self::Message => Some("payload"),
        }
    }
}

/// Reads one frame. Its size has been checked already.
///
/// # Errors
/// When it is not a frame of the protocol, or one of its parts is too large.
pub fn parse(frame: &str) -> Result<Incoming<'_>, Rejected<'_>> {
    let nameless = |why| Rejected { id: None, refusal: bad(why) };
    if is_too_deep(frame.as_bytes()) {
        return Err(nameless("the frame is nested too deeply"));
    }
    // An array would be taken for the members in their order.
    if !frame.trim_ascii_start().starts_with('{') {
        return Err(nameless("the frame is not one JSON object"));
    }
    let members: Members<'_> =
        serde_json::from_str(frame).map_err(|_| nameless("the frame is not one JSON object"))?;
    let id = members.frame_id().map_err(|refusal| Rejected { id: None, refusal })?;
    members.understand(id).map_err(|refusal| Rejected { id, refusal })
}

/// Refuses a frame unread, but for its id, if that can be found.
#[must_use]
pub fn refuse(frame: &str, refusal: Refusal) -> Rejected<'_> {
    #[derive(Deserialize)]
    struct Named<'a> {
        #[serde(borrow)]
        id: Option<FrameId<'a>>,
    }
    let named = serde_json::from_str(frame).ok();
    Rejected { id: named.and_then(|Named { id }| id.filter(|id| is_sound(id))), refusal }
}

fn is_sound(id: FrameId<'_>) -> bool {
    id.get().len() <= MAX_FRAME_ID
        && id.get().starts_with(|c: char| c == '"' || c == '-' || c.is_ascii_digit())
}

fn bad(why: impl Into<Cow<'static, str>>) -> Refusal {
    Refusal::BadFrame(why.into())
}

/// Whether it is nested deeper than any honest frame: counts brackets outside strings, where there are so many at all.
pub(super) fn is_too_deep(json: &[u8]) -> bool {
    let limit = MAX_DEPTH;
    // Honest frames end here; without a branch, the count takes a fraction of the time of what follows.
    let opening: usize =
        json.iter().map(|byte| usize::from(*byte == b'{') + usize::from(*byte == b'[')).sum();
    if opening <= limit {
        return false;
    }
    let (mut depth, mut in_string, mut escaped) = (0_usize, false, false);
    json.iter().any(|byte| {
        match (in_string, byte) {
            (true, _) if escaped => escaped = false,
            (true, b'\\') => escaped = true,
            (_, b'"') => in_string = !in_string,
            (false, b'{' | b'[') => depth += 1,
            (false, b'}' | b']') => depth = depth.saturating_sub(1),
            _ => {}
        }
        depth > limit
    })
}

/// Every member that some frame has, unread: so that a bad one is named, and the `id` is there to answer with.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Members<'a> {
    #[serde(borrow, default, rename = "type", deserialize_with = "present")]
    kind: Option<&'a RawValue>,
    #[serde(borrow, default, deserialize_with = "present")]
    id: Option<&'a RawValue>,
    #[serde(borrow, default, deserialize_with = "present")]
    from: Option<&'a RawValue>,
    #[serde(borrow, default, deserialize_with = "present")]
    to: Option<&'a RawValue>,
    #[serde(borrow, default, deserialize_with = "present")]
    sdp: Option<&'a RawValue>,
    #[serde(borrow, default, deserialize_with = "present")]
    candidate: Option<&'a RawValue>,
    #[serde(borrow, default, deserialize_with = "present")]
    payload: Option<&'a RawValue>,
    #[serde(borrow, default, deserialize_with = "present")]
    token: Option<&'a RawValue>,
    #[serde(borrow, default, deserialize_with = "present")]
    card: Option<&'a RawValue>,
    #[serde(borrow, default, deserialize_with = "present")]
    resume: Option<&'a RawValue>,
    #[serde(borrow, default, deserialize_with = "present")]
    up_to: Option<&'a RawValue>,
    #[serde(borrow, default, deserialize_with = "present")]
    query: Option<&'a RawValue>,
    #[serde(borrow, default, deserialize_with = "present")]
    after: Option<&'a RawValue>,
    #[serde(borrow, default, deserialize_with = "present")]
    limit: Option<&'a RawValue>,
}

/// `null` is a value here: it ends the candidates.
fn present<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<&'de RawValue>, D::Error> {
    <&RawValue>::deserialize(deserializer).map(Some)
}

impl<'a> Members<'a> {
    fn frame_id(&self) -> Result<Option<FrameId<'a>>, Refusal> {
        match self.id.filter(|id| id.get() != "null") {
            Some(id) if !is_sound(id) => Err(bad("id is neither a short string nor a number")),
            id => Ok(id),
        }
    }

    fn understand(&self, id: Option<FrameId<'a>>) -> Result<Incoming<'a>, Refusal> {
        let from = text(self.from, "from")?;
        Ok(Incoming { id, from, frame: self.frame()? })
    }

    fn frame(&self) -> Result<ClientFrame<'a>, Refusal> {
        let kind = text(self.kind, "type")?.ok_or_else(|| bad("type is missing"))?;
        match &*kind {
            "hello" => self.hello().map(ClientFrame::Hello),
            "offer" => self.routed(Kind::Offer),
            "answer" => self.routed(Kind::Answer),
            "iceCandidate" => self.routed(Kind::IceCandidate),
            "bye" => self.routed(Kind::Bye),
            "message" => self.routed(Kind::Message),
            "find" => self.find().map(ClientFrame::Find),
            "update" => self.update(),
            "received" => self.received(),
            "ping" => Ok(ClientFrame::Ping),
            "renew" => self.renew(),
            _ => Err(bad("unknown type")),
        }
    }

    fn hello(&self) -> Result<Hello<'a>, Refusal> {
        let resume = self.resume.filter(|resume| resume.get() != "null");
        let resume = resume.map(|resume| serde_json::from_str(resume.get())).transpose();
        Ok(Hello {
            token: text(self.token, "token")?,
            card: card(self.card)?,
            resume: resume.map_err(|_| bad("resume is not a session and the number after which to go on"))?,
        })
    }

    fn routed(&self, kind: Kind) -> Result<ClientFrame<'a>, Refusal> {
        let to = text(self.to, "to")?;
        if to.is_none() && kind != Kind::Message {
            return Err(bad("to is missing"));
        }
        Ok(ClientFrame::Routed { kind, to, body: self.body(kind)? })
    }

    fn body(&self, kind: Kind) -> Result<Option<&'a RawValue>, Refusal> {
        let (body, starts): (_, &[char]) = match kind {
            Kind::Offer | Kind::Answer => (self.sdp.ok_or("sdp is missing"), &['"']),
            Kind::IceCandidate => (self.candidate.ok_or("candidate is missing"), &['{', 'n']),
            Kind::Message => (self.payload.ok_or("payload is missing"), &[]),
            Kind::Bye => return Ok(None),
        };
        let body = body.map_err(bad)?;
        if !starts.is_empty() && !body.get().starts_with(starts) {
            let expected = if kind == Kind::IceCandidate { "an object or null" } else { "a string" };
            return Err(bad(format!("{} is not {expected}", kind.member().unwrap_or_default())));
        }
        Ok(Some(body))
    }

    fn find(&self) -> Result<Find<'a>, Refusal> {
        #[derive(Default, Deserialize)]
        struct Asked<'a> {
            #[serde(borrow)]
            skill: Option<Cow<'a, str>>,
            #[serde(borrow)]
            tag: Option<Cow<'a, str>>,
            #[serde(borrow)]
            text: Option<Cow<'a, str>>,
        }
        let asked =
            self.query.map(|query| serde_json::from_str::<Option<Asked<'_>>>(query.get())).transpose();
        let asked = asked.map_err(|_| bad("query is not an object whose skill, tag and text are strings"))?;
        let Asked { skill, tag, text: words } = asked.flatten().unwrap_or_default();
        let query = Query::new(skill.as_deref(), tag.as_deref(), words.as_deref());
        let limit = self.limit.map(|limit| limit.get().parse().ok().filter(|limit| *limit > 0));
        Ok(Find {
            query: query.ok_or_else(|| bad("the text of the query has too many words"))?,
            after: text(self.after, "after")?,
            limit: limit
                .map(|limit| limit.ok_or_else(|| bad("limit is not a number above 0")))
                .transpose()?,
        })
    }

    fn update(&self) -> Result<ClientFrame<'a>, Refusal> {
        self.card.ok_or_else(|| bad("card is missing"))?;
        Ok(ClientFrame::Update { card: card(self.card)? })
    }

    fn received(&self) -> Result<ClientFrame<'a>, Refusal> {
        let up_to = self.up_to.and_then(|up_to| up_to.get().parse().ok());
        Ok(ClientFrame::Received { up_to: up_to.ok_or_else(|| bad("upTo is not a number"))? })
    }

    fn renew(&self) -> Result<ClientFrame<'a>, Refusal> {
        let token = text(self.token, "token")?;
        Ok(ClientFrame::Renew { token: token.ok_or_else(|| bad("token is missing"))? })
    }
}

/// A member that is a string if it is there at all, and not `null`. Most have nothing escaped: what is between the quotes is
/// the string.
fn text<'a>(value: Option<&'a RawValue>, name: &str) -> Result<Option<Cow<'a, str>>, Refusal> {
    let Some(value) = value.map(RawValue::get).filter(|value| *value != "null") else { return Ok(None) };
    let plain = value.strip_prefix('"').and_then(|rest| rest.strip_suffix('"'));
    match plain.filter(|plain| !plain.contains('\\')) {
        Some(plain) => Ok(Some(Cow::Borrowed(plain))),
        None => match serde_json::from_str(value) {
            Ok(text) => Ok(Some(Cow::Owned(text))),
            Err(_) => Err(bad(format!("{name} is not a string"))),
        },
    }
}

/// `null` is no card.
fn card(value: Option<&RawValue>) -> Result<Option<&RawValue>, Refusal> {
    match value {
        None => Ok(None),
        Some(card) if card.get() == "null" => Ok(None),
        Some(card) if card.get().len() > MAX_CARD => Err(Refusal::TooLarge("the card is over 8 KiB")),
        Some(card) if card.get().starts_with('{') => Ok(Some(card)),
        Some(_) => Err(bad("card is not an object")),
    }
}

/// A session's name: unguessable, and useless without its agent's token.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionId(String);

impl SessionId {
    /// From the operating system's randomness, which the shell has.
    #[must_use]
    pub fn from_random(random: [u8; 16]) -> Self {
        Self(BASE64_URL_SAFE_NO_PAD.encode(random))
    }

    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SessionId(…)")
    }
}

/// A frame to an agent that no other agent wrote.
#[derive(Serialize)]
#[serde(tag = "type", rename_all = "camelCase", rename_all_fields = "camelCase")]
pub enum ServerFrame<'a> {
    Welcome(Welcome<'a>),
    Delivered {
        #[serde(skip_serializing_if = "Option::is_none")]
        id: Option<FrameId<'a>>,
        #[serde(skip_serializing_if = "Option::is_none")]
        count: Option<usize>,
    },
    Error {
        #[serde(skip_serializing_if = "Option::is_none")]
        id: Option<FrameId<'a>>,
        code: &'static str,
        message: String,
        #[serde(skip_serializing_if = "Option::is_none")]
        retry_after: Option<u64>,
    },
    Found(Found<'a>),
    AgentJoined(Listed<'a>),
    AgentUpdated(Listed<'a>),
    AgentLeft {
        agent: &'a AgentId,
    },
    Pong {
        #[serde(skip_serializing_if = "Option::is_none")]
        id: Option<FrameId<'a>>,
    },
    Renewed {
        #[serde(skip_serializing_if = "Option::is_none")]
        id: Option<FrameId<'a>>,
        #[serde(serialize_with = "rfc3339")]
        expires_at: SystemTime,
    },
    Restarting {
        reconnect_in: u64,
        try_for: u64,
    },
    Replaced,
    Ended {
        code: &'static str,
    },
    /// For a client of PeerJS alone: what it said did not reach that agent.
    Expired {
        agent: &'a str,
    },
}

/// The first frame to an agent.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Welcome<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<FrameId<'a>>,
    pub agent: &'a AgentId,
    pub room: &'a Room,
    pub session: &'a SessionId,
    pub resumed: bool,
    /// Absent when the token lacks the scope `ice`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ice: Option<&'a RawValue>,
    pub agents: Vec<Listed<'a>>,
    pub agent_count: usize,
    pub heartbeat: u64,
    pub limits: Announced,
}

/// Who was found.
#[derive(Serialize)]
pub struct Found<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<FrameId<'a>>,
    #[serde(flatten)]
    pub page: &'a Page,
}

/// An agent as the others see it.
#[derive(Clone, Copy, Serialize)]
pub struct Listed<'a> {
    pub agent: &'a AgentId,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub card: Option<&'a RawValue>,
}

/// The limits an agent should know of; what is unlimited is absent.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Announced {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_frame: Option<usize>,
    pub max_card: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub messages_per_second: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub burst: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub window_messages: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub window_bytes: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub presence_limit: Option<usize>,
    /// Seconds.
    pub resume_window: u64,
}

fn rfc3339<S: serde::Serializer>(time: &SystemTime, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&humantime::format_rfc3339_seconds(*time))
}

impl ServerFrame<'_> {
    /// As it goes over the wire.
    #[must_use]
    pub fn to_bytes(&self) -> Bytes {
        serde_json::to_vec(self).expect("frames are plain JSON: no map with odd keys, no failing part").into()
    }

    /// The answer to a refused frame.
    #[must_use]
    pub fn error<'a>(id: Option<FrameId<'a>>, refusal: &Refusal) -> ServerFrame<'a> {
        ServerFrame::Error {
            id,
            code: refusal.code(),
            message: refusal.to_string(),
            retry_after: refusal.retry_after(),
        }
    }
}

/// A routed frame without its number: shared by all who receive it, numbered for each when it is written.
#[derive(Clone, Debug)]
pub struct Unnumbered {
    kind: Kind,
    /// What follows the number.
    rest: Bytes,
}

impl Unnumbered {
    /// `from` is stamped here and nowhere else.
    #[must_use]
    pub fn new(kind: Kind, from: &AgentId, to: Option<&AgentId>, body: Option<&RawValue>) -> Self {
        let polite = match (kind, to) {
            (Kind::Offer, Some(to)) if is_polite(to, from) => ",\"polite\":true",
            (Kind::Offer, Some(_)) => ",\"polite\":false",
            _ => "",
        };
        let to = to.map_or(["", "", ""], |to| [",\"to\":\"", to.as_str(), "\""]);
        let body = match (kind.member(), body) {
            (Some(member), Some(body)) => [",\"", member, "\":", body.get()],
            _ => [""; 4],
        };
        let parts = [&["\"from\":\"", from.as_str(), "\""], &to[..], &[polite], &body, &["}"]];
        // Its length is known before it is written: nothing is left over that would have to be given back.
        let length = parts.iter().copied().flatten().map(|part| part.len()).sum();
        let mut rest = String::with_capacity(length);
        parts.iter().copied().flatten().for_each(|part| rest.push_str(part));
        Self { kind, rest: rest.into() }
    }

    /// One that another node has made: its kind, and what follows the number.
    #[must_use]
    pub fn of_parts(kind: Kind, rest: &[u8]) -> Self {
        Self { kind, rest: Bytes::copy_from_slice(rest) }
    }

    #[must_use]
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// What follows the number.
    #[must_use]
    pub fn rest(&self) -> &Bytes {
        &self.rest
    }

    /// What it takes in a window.
    #[must_use]
    pub fn size(&self) -> usize {
        self.rest.len()
    }

    /// As it goes over the wire.
    #[must_use]
    pub fn numbered(&self, seq: u64) -> Frame<'_> {
        Frame { number: Some((self.kind, seq)), rest: Cow::Borrowed(&self.rest) }
    }
}

/// A frame to an agent, to be written.
#[derive(Debug, PartialEq, Eq)]
pub struct Frame<'a> {
    number: Option<(Kind, u64)>,
    /// All of it, or what follows the number.
    rest: Cow<'a, Bytes>,
}

impl Frame<'_> {
    /// Whether its session keeps it for replay.
    #[must_use]
    pub fn is_kept(&self) -> bool {
        self.number.is_some()
    }

    /// As [`Self::write`] does.
    #[must_use]
    pub fn to_bytes(&self) -> Bytes {
        match self.number {
            None => Bytes::clone(&self.rest),
            Some(_) => {
                let mut bytes = Vec::with_capacity(self.length());
                self.write(&mut bytes);
                bytes.into()
            }
        }
    }

    /// In bytes.
    #[must_use]
    pub fn length(&self) -> usize {
        let number = self.number.map_or(0, |(kind, seq)| {
            let digits = seq.checked_ilog10().map_or(1, |log| log as usize + 1);
            NUMBERED.iter().map(|part| part.len()).sum::<usize>() + kind.name().len() + digits
        });
        number + self.rest.len()
    }

    /// As it goes over the wire, to the end of `out`.
    pub fn write(&self, out: &mut Vec<u8>) {
        if let Some((kind, seq)) = self.number {
            let [before_kind, before_seq, after_seq] = NUMBERED;
            out.extend_from_slice(before_kind.as_bytes());
            out.extend_from_slice(kind.name().as_bytes());
            out.extend_from_slice(before_seq.as_bytes());
            write!(out, "{seq}").expect("there is always room in a vector");
            out.extend_from_slice(after_seq.as_bytes());
        }
        out.extend_from_slice(&self.rest);
    }
}

/// One that is not numbered.
impl From<Bytes> for Frame<'_> {
    fn from(frame: Bytes) -> Self {
        Self { number: None, rest: Cow::Owned(frame) }
    }
}

/// Around a frame's kind and its number.
const NUMBERED: [&str; 3] = ["{\"type\":\"", "\",\"seq\":", ","];

/// Who yields in a glare: of any two agents exactly one, whoever offers.
fn is_polite(receiver: &AgentId, sender: &AgentId) -> bool {
    receiver > sender
}

#[cfg(test)]
mod tests {
    use super::{AgentId, ClientFrame, Incoming, Kind, Unnumbered, parse};

    fn refused(frame: &str) -> (String, String) {
        let rejected = parse(frame).unwrap_err();
        let id = rejected.id.map_or(String::new(), |id| id.get().to_owned());
        (id, format!("{}: {}", rejected.refusal.code(), rejected.refusal))
    }

    #[test]
    fn bodies_pass_through_unread() {
        let frame = r#"{"type":"message","id":"x","to":"b","payload":{"a":[1e400,"\ud83d",  null]}}"#;
        let Incoming { id, frame: ClientFrame::Routed { kind, to, body }, .. } = parse(frame).unwrap() else {
            panic!("not routed")
        };
        assert_eq!((id.unwrap().get(), kind, to.as_deref()), (r#""x""#, Kind::Message, Some("b")));
        assert_eq!(body.unwrap().get(), r#"{"a":[1e400,"\ud83d",  null]}"#);
    }

    #[test]
    fn null_ends_the_candidates_and_absent_is_an_error() {
        let frame = parse(r#"{"type":"iceCandidate","to":"b","candidate":null}"#).unwrap().frame;
        let ClientFrame::Routed { body: Some(body), .. } = frame else { panic!("not routed") };
        assert_eq!(body.get(), "null");
        let (_, why) = refused(r#"{"type":"iceCandidate","to":"b"}"#);
        assert_eq!(why, "badFrame: candidate is missing");
    }

    #[test]
    fn bad_frames_are_named_and_answered_by_id() {
        for (frame, id, why) in [
            ("", "", "badFrame: the frame is not one JSON object"),
            ("[]", "", "badFrame: the frame is not one JSON object"),
            ("{}{}", "", "badFrame: the frame is not one JSON object"),
            ("\"offer\"", "", "badFrame: the frame is not one JSON object"),
            (r#"{"id":1,"id":2,"type":"ping"}"#, "", "badFrame: the frame is not one JSON object"),
            (r#"{"id":{},"type":"ping"}"#, "", "badFrame: id is neither a short string nor a number"),
            (r#"{"id":7}"#, "7", "badFrame: type is missing"),
            (r#"{"id":7,"type":7}"#, "7", "badFrame: type is not a string"),
            (r#"{"id":7,"type":"Offer"}"#, "7", "badFrame: unknown type"),
            (r#"{"id":7,"type":"offer","sdp":""}"#, "7", "badFrame: to is missing"),
            (r#"{"id":7,"type":"offer","to":["b"],"sdp":""}"#, "7", "badFrame: to is not a string"),
            (r#"{"id":7,"type":"offer","to":"b"}"#, "7", "badFrame: sdp is missing"),
            (r#"{"id":7,"type":"answer","to":"b","sdp":null}"#, "7", "badFrame: sdp is not a string"),
            (
                r#"{"id":7,"type":"iceCandidate","to":"b","candidate":"a"}"#,
                "7",
                "badFrame: candidate is not an object or null",
            ),
            (r#"{"id":7,"type":"message"}"#, "7", "badFrame: payload is missing"),
            (r#"{"id":7,"type":"update"}"#, "7", "badFrame: card is missing"),
            (r#"{"id":7,"type":"update","card":[]}"#, "7", "badFrame: card is not an object"),
            (r#"{"id":7,"type":"received","upTo":-1}"#, "7", "badFrame: upTo is not a number"),
            (r#"{"id":7,"type":"renew"}"#, "7", "badFrame: token is missing"),
            (r#"{"id":7,"from":7,"type":"ping"}"#, "7", "badFrame: from is not a string"),
            (
                r#"{"id":7,"type":"hello","resume":{"session":"a"}}"#,
                "7",
                "badFrame: resume is not a session and the number after which to go on",
            ),
        ] {
            assert_eq!(refused(frame), (id.to_owned(), why.to_owned()), "{frame}");
        }
        let big = format!(r#"{{"id":7,"type":"hello","card":{{"a":"{}"}}}}"#, "a".repeat(8192));
        assert_eq!(refused(&big).1, "tooLarge: the card is over 8 KiB");
    }

    #[test]
    fn deep_nesting_is_refused_and_brackets_in_strings_are_no_nesting() {
        let deep = format!(r#"{{"type":"message","payload":{}{}}}"#, "[".repeat(60_000), "]".repeat(60_000));
        assert_eq!(refused(&deep).1, "badFrame: the frame is nested too deeply");
        let flat = format!(r#"{{"type":"message","payload":"\"{}"}}"#, "[".repeat(60_000));
        assert!(parse(&flat).is_ok());
    }

    #[test]
    fn of_two_agents_one_is_polite() {
        let [a, b] = ["a", "b"].map(|id| AgentId::parse(id).unwrap());
        let sdp = serde_json::value::to_raw_value("v=0").unwrap();
        let offer = |from, to| {
            let frame = Unnumbered::new(Kind::Offer, from, Some(to), Some(&sdp));
            String::from_utf8(frame.numbered(9).to_bytes().to_vec()).unwrap()
        };
        assert_eq!(
            offer(&a, &b),
            r#"{"type":"offer","seq":9,"from":"a","to":"b","polite":true,"sdp":"v=0"}"#
        );
        assert_eq!(
            offer(&b, &a),
            r#"{"type":"offer","seq":9,"from":"b","to":"a","polite":false,"sdp":"v=0"}"#
        );
    }
}
