//! The protocol of the PeerJS server, spoken over our own sessions.
//!
//! What a peer says to another, `{"type":"OFFER","dst":"bob","payload":…}`, travels as a `message` whose payload is
//! `{"type":"OFFER","payload":…}`. Who is not here yet is waited for: pages load at different times.

use std::{
    borrow::Cow,
    collections::VecDeque,
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::{farewell::Farewell, message::is_too_deep, refusal::Refusal, session::Full};
use crate::credentials::token::AgentId;

/// The key of every client that was not told another one.
pub const KEY: &str = "peerjs";

/// How long somebody who is not here is waited for.
const WAIT: Duration = Duration::from_secs(5);

/// What one peer's messages may take that wait for others.
const MAX_WAITING: usize = 64;
/// The same in bytes.
const MAX_WAITING_BYTES: usize = 256 << 10;

/// What clients are told where the server of PeerJS has words for it.
pub const INVALID_KEY: &str = "Invalid key provided";
/// The same for an `id`, a `token` or a `key` that is missing.
pub const INVALID_PARAMETERS: &str = "No id, token, or key supplied to websocket server";

/// What a peer says.
#[derive(Debug)]
pub enum Said<'a> {
    /// It is there; nothing else.
    Heartbeat,
    /// Something for another peer.
    Told(Told<'a>),
    /// It leaves, and its connections with others stay.
    Leave,
}

/// Something for another peer.
#[derive(Debug)]
pub struct Told<'a> {
    pub to: Cow<'a, str>,
    /// `{"type":…,"payload":…}`
    pub body: Box<RawValue>,
    /// It is worth waiting for who is not here.
    pub waits: bool,
}

/// Reads one message. Its size has been checked already.
///
/// # Errors
/// When it is none that a peer sends.
pub fn parse(text: &str) -> Result<Said<'_>, Refusal> {
    #[derive(Deserialize)]
    struct Message<'a> {
        #[serde(borrow, rename = "type")]
        kind: Cow<'a, str>,
        #[serde(borrow)]
        dst: Option<Cow<'a, str>>,
        #[serde(borrow)]
        payload: Option<&'a RawValue>,
    }
    let bad = |why: &'static str| Refusal::BadFrame(why.into());
    if is_too_deep(text.as_bytes()) {
        return Err(bad("the message is nested too deeply"));
    }
    // An array would be taken for the members in their order.
    if !text.trim_ascii_start().starts_with('{') {
        return Err(bad("the message is not one of PeerJS"));
    }
    let Message { kind, dst, payload } =
        serde_json::from_str(text).map_err(|_| bad("the message is not one of PeerJS"))?;
    let waits = match (&*kind, &dst) {
        ("HEARTBEAT", _) => return Ok(Said::Heartbeat),
        ("LEAVE", None) => return Ok(Said::Leave),
        ("LEAVE", Some(_)) => false,
        ("OFFER" | "ANSWER" | "CANDIDATE", Some(_)) => true,
        ("OFFER" | "ANSWER" | "CANDIDATE", None) => return Err(bad("dst is missing")),
        _ => return Err(bad("peers send HEARTBEAT, OFFER, ANSWER, CANDIDATE and LEAVE")),
    };
    let body = serde_json::value::to_raw_value(&Body { kind: &kind, payload });
    Ok(Said::Told(Told { to: dst.unwrap_or_default(), body: body.expect("it was JSON before"), waits }))
}

/// What travels as the payload of a `message`.
#[derive(Serialize, Deserialize)]
struct Body<'a> {
    #[serde(rename = "type")]
    kind: &'a str,
    #[serde(borrow, skip_serializing_if = "Option::is_none")]
    payload: Option<&'a RawValue>,
}

/// What the server says.
#[derive(Serialize)]
struct Message<'a> {
    #[serde(rename = "type")]
    kind: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    src: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    dst: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    payload: Option<&'a RawValue>,
}

impl Message<'_> {
    fn text(&self) -> String {
        serde_json::to_string(self).expect("strings and JSON become JSON")
    }
}

/// A frame of ours in the words of PeerJS.
#[derive(Debug, PartialEq, Eq)]
pub enum Translated {
    /// For the client.
    Text(String),
    /// Nothing for the client, but somebody is here now.
    Joined(String),
    /// Nothing that there is a word for.
    Nothing,
}

/// Translates a frame to `own`.
#[must_use]
pub fn translate(frame: &[u8], own: &AgentId) -> Translated {
    #[derive(Deserialize)]
    struct Frame<'a> {
        #[serde(rename = "type")]
        kind: &'a str,
        from: Option<&'a str>,
        agent: Option<&'a str>,
        #[serde(borrow)]
        payload: Option<&'a RawValue>,
    }
    let Ok(Frame { kind, from, agent, payload }) = serde_json::from_slice(frame) else {
        return Translated::Nothing;
    };
    let (kind, payload) = match (kind, payload, agent) {
        ("welcome", ..) => return Translated::Text(said("OPEN", None)),
        ("agentJoined", _, Some(agent)) => return Translated::Joined(agent.to_owned()),
        ("expired", _, Some(agent)) => return Translated::Text(expire(agent, own)),
        ("bye", ..) => ("LEAVE", None),
        ("message", Some(payload), _) => match serde_json::from_str(payload.get()) {
            Ok(Body { kind: kind @ ("OFFER" | "ANSWER" | "CANDIDATE" | "LEAVE"), payload }) => {
                (kind, payload)
            }
            _ => return Translated::Nothing,
        },
        _ => return Translated::Nothing,
    };
    Translated::Text(Message { kind, src: from, dst: Some(own.as_str()), payload }.text())
}

/// `to` was not there in time, or cannot be reached.
#[must_use]
pub fn expire(to: &str, own: &AgentId) -> String {
    Message { kind: "EXPIRE", src: Some(to), dst: Some(own.as_str()), payload: None }.text()
}

/// The client gives up when it hears that.
#[must_use]
pub fn error(why: &str) -> String {
    said("ERROR", Some(why))
}

/// The id belongs to somebody else. The client gives up when it hears that.
#[must_use]
pub fn id_taken() -> String {
    said("ID-TAKEN", Some("ID is taken"))
}

/// What is said before a connection is closed: to a client that is to come back, nothing.
#[must_use]
pub fn farewell(farewell: Farewell) -> Option<String> {
    match farewell {
        Farewell::Replaced => Some(id_taken()),
        Farewell::Expired => Some(error("The token has expired")),
        Farewell::Revoked => Some(error("The token has been revoked")),
        Farewell::Slow | Farewell::Restarting(_) => None,
    }
}

fn said(kind: &str, why: Option<&str>) -> String {
    #[derive(Serialize)]
    struct Why<'a> {
        msg: &'a str,
    }
    let payload =
        why.map(|msg| serde_json::value::to_raw_value(&Why { msg }).expect("a string becomes JSON"));
    Message { kind, src: None, dst: None, payload: payload.as_deref() }.text()
}

/// What one peer said to others who are not here.
#[derive(Debug, Default)]
pub struct Waiting {
    /// The oldest first.
    told: VecDeque<(Instant, Told<'static>)>,
    bytes: usize,
}

impl Waiting {
    /// Keeps it for a while; gives it back where there is no room.
    ///
    /// # Errors
    /// When too much waits already.
    pub fn push(&mut self, now: Instant, told: Told<'_>) -> Result<(), Full> {
        let size = told.body.get().len();
        if self.told.len() >= MAX_WAITING || self.bytes + size > MAX_WAITING_BYTES {
            return Err(Full);
        }
        self.bytes += size;
        self.told.push_back((now + WAIT, Told { to: Cow::Owned(told.to.into_owned()), ..told }));
        Ok(())
    }

    /// Whether anything waits for that peer.
    #[must_use]
    pub fn has(&self, to: &str) -> bool {
        self.told.iter().any(|(_, told)| told.to == to)
    }

    /// Takes all that waits for a peer.
    pub fn take(&mut self, to: &str) -> Vec<Told<'static>> {
        let (taken, rest) = std::mem::take(&mut self.told).into_iter().partition(|(_, told)| told.to == to);
        self.told = rest;
        let taken: VecDeque<(Instant, Told<'static>)> = taken;
        self.bytes -= taken.iter().map(|(_, told)| told.body.get().len()).sum::<usize>();
        taken.into_iter().map(|(_, told)| told).collect()
    }

    /// A peer that has been waited for long enough.
    #[must_use]
    pub fn overdue(&self, now: Instant) -> Option<String> {
        self.told.front().filter(|(until, _)| *until <= now).map(|(_, told)| told.to.clone().into_owned())
    }

    /// When the next will have been.
    #[must_use]
    pub fn next(&self) -> Option<Instant> {
        self.told.front().map(|(until, _)| *until)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::{AgentId, Full, MAX_WAITING, Said, Told, Translated, Waiting, expire, parse, translate};
    use crate::clock;

    fn own() -> AgentId {
        AgentId::parse("bob").unwrap()
    }

    fn told(text: &Value) -> Told<'static> {
        match parse(&text.to_string()).unwrap() {
            Said::Told(told) => Told { to: told.to.into_owned().into(), ..told },
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_one_peer_says_is_what_the_other_hears() {
        for kind in ["OFFER", "ANSWER", "CANDIDATE", "LEAVE"] {
            let said = told(
                &json!({"type": kind, "src": "mallory", "dst": "bob", "payload": {"connectionId": "dc_1"}}),
            );
            assert_eq!((&*said.to, said.waits), ("bob", kind != "LEAVE"));
            let frame =
                json!({"type": "message", "seq": 7, "from": "alice", "to": "bob", "payload": said.body});
            let Translated::Text(heard) = translate(frame.to_string().as_bytes(), &own()) else {
                panic!("{kind}")
            };
            let wanted =
                json!({"type": kind, "src": "alice", "dst": "bob", "payload": {"connectionId": "dc_1"}});
            assert_eq!(serde_json::from_str::<Value>(&heard).unwrap(), wanted);
        }
    }

    #[test]
    fn what_is_no_message_of_a_peer_is_refused() {
        for bad in [
            "",
            "[]",
            r#"["OFFER","a",1]"#,
            "7",
            r#"{"type":7}"#,
            r#"{"type":"EXPIRE","dst":"a"}"#,
            r#"{"type":"OPEN"}"#,
            r#"{"type":"OFFER"}"#,
        ] {
            assert_eq!(parse(bad).unwrap_err().code(), "badFrame", "{bad}");
        }
        let deep =
            format!(r#"{{"type":"OFFER","dst":"a","payload":{}{}}}"#, "[".repeat(1_000), "]".repeat(1_000));
        assert!(parse(&deep).is_err());
        assert!(matches!(parse(r#"{"type":"HEARTBEAT"}"#), Ok(Said::Heartbeat)));
        assert!(matches!(parse(r#"{"type":"LEAVE"}"#), Ok(Said::Leave)));
    }

    #[test]
    fn frames_have_their_words_or_none() {
        let words = |frame: Value| translate(frame.to_string().as_bytes(), &own());
        assert_eq!(
            words(json!({"type": "welcome", "agent": "bob"})),
            Translated::Text(r#"{"type":"OPEN"}"#.into())
        );
        let leave = r#"{"type":"LEAVE","src":"alice","dst":"bob"}"#;
        assert_eq!(words(json!({"type": "bye", "from": "alice"})), Translated::Text(leave.into()));
        assert_eq!(words(json!({"type": "agentJoined", "agent": "carl"})), Translated::Joined("carl".into()));
        for frame in [
            json!({"type": "offer", "from": "alice", "sdp": "v=0"}),
            json!({"type": "message", "from": "alice", "payload": {"type": "OPEN"}}),
            json!({"type": "message", "from": "alice", "payload": 7}),
            json!({"type": "ice", "iceServers": []}),
            json!({"type": "agentLeft", "agent": "carl"}),
        ] {
            assert_eq!(words(frame.clone()), Translated::Nothing, "{frame}");
        }
        assert_eq!(expire("carl", &own()), r#"{"type":"EXPIRE","src":"carl","dst":"bob"}"#);
    }

    #[test]
    fn what_waits_is_bounded_and_taken_by_peer() {
        let (now, mut waiting) = (clock::now().mono, Waiting::default());
        let offer =
            |to: &str, size: usize| told(&json!({"type": "OFFER", "dst": to, "payload": "x".repeat(size)}));
        for number in 0..MAX_WAITING {
            waiting.push(now, offer(if number % 2 == 0 { "a" } else { "b" }, 10)).unwrap();
        }
        assert_eq!(waiting.push(now, offer("a", 10)), Err(Full));
        assert_eq!((waiting.take("a").len(), waiting.has("a"), waiting.has("b")), (32, false, true));
        waiting.push(now, offer("a", 200_000)).unwrap();
        assert_eq!(waiting.push(now, offer("a", 200_000)), Err(Full));
        assert_eq!(waiting.overdue(now), None);
        assert_eq!(waiting.overdue(waiting.next().unwrap()), Some("b".to_owned()));
        waiting.take("b");
        waiting.take("a");
        assert_eq!((waiting.next(), waiting.bytes), (None, 0));
    }
}
