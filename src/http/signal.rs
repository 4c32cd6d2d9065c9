//! Signaling without WebSockets: frames in arrays, a long poll, an event stream; and the simplest form of all.

use std::{fmt::Write, time::Duration};

use bytes::Bytes;
use http_body_util::{BodyExt, Limited};
use hyper::{
    HeaderMap, Request, StatusCode,
    body::Incoming,
    header::{self, HeaderName, HeaderValue},
};
use serde::Deserialize;
use serde_json::value::RawValue;
use tokio::{
    sync::mpsc,
    time::{interval, sleep, timeout},
};

use super::{
    Visit,
    body::Body,
    problem::Problem,
    refresh,
    routes::{self, Answer, may_signal, parameter},
    switchboard::{Asking, Listener, Ready, session_id, until},
};
use crate::{
    clock::{self, Now},
    credentials::token::Agent,
    signaling::{
        hub::{Join, Outgoing},
        message::{ClientFrame, Hello, Incoming as IncomingFrame, Kind, Rejected},
    },
};

/// Bytes of one request's frames.
pub(super) const MAX_BODY: usize = 1 << 20;

/// Frames of one request, and of one answer.
const MAX_FRAMES: usize = 256;

/// Bytes of one answer's frames, about.
const MAX_ANSWER: usize = 1 << 20;

/// How long a poll may wait, and does by default: proxies cut at 30 s and above.
const MAX_WAIT: u64 = 60;
const WAIT: u64 = 25;

const SESSION: HeaderName = HeaderName::from_static("halfway-session");
const LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");

/// `POST /v1/signal`: an array of frames; for each there is one in the array of answers.
pub(super) async fn post(visit: &Visit, request: Request<Incoming>) -> Result<Answer, Problem> {
    let agent = speaker(visit, request.headers()).await?;
    let session = request.headers().get(SESSION).cloned();
    let body = read(visit, request).await?;
    let raw: Vec<&RawValue> = serde_json::from_slice(&body)
        .map_err(|_| Problem::bad_request("the body is not an array of frames"))?;
    if raw.is_empty() || raw.len() > MAX_FRAMES {
        return Err(Problem::bad_request("a request holds 1 to 256 frames"));
    }
    let mut frames = raw.iter().map(|raw| visit.parse(raw.get()));
    let mut answers = Vec::with_capacity(raw.len());
    if session.is_none() {
        answers.push(Ready::Now(welcome(visit, &agent, frames.next()).await?));
    }
    let session = session.as_ref().map(session_name).transpose()?;
    // One by one: everybody waits while the hub is asked.
    for frame in frames {
        answers.push(ask(visit, &agent, session, frame)?);
    }
    let mut frames = Vec::with_capacity(answers.len());
    for answer in answers {
        frames.push(answer.frame().await);
    }
    Ok(array(&frames))
}

/// The answer to a frame. Tokens are checked here, once they are paid for: the hub has no keys.
fn ask(
    visit: &Visit,
    agent: &Agent,
    session: Option<&str>,
    frame: Result<IncomingFrame<'_>, Rejected<'_>>,
) -> Result<Ready<Bytes>, Problem> {
    if let Ok(IncomingFrame { id, frame: ClientFrame::Renew { token }, .. }) = &frame {
        let charged = attending(visit, agent, session, |asking, now| asking.hub.charge(now, &agent.id))?;
        let token = charged.and_then(|()| visit.front.check(clock::now(), token));
        return attending(visit, agent, session, |asking, now| {
            Ready::Now(asking.hub.ask_renewal(now, &agent.id, *id, token))
        });
    }
    attending(visit, agent, session, |asking, now| {
        let answer = asking.hub.ask(now, &agent.id, frame);
        asking.ready(answer)
    })
}

/// Does one thing in the hub for an agent that has a session: the one called `session`, or any.
fn attending<T>(
    visit: &Visit,
    agent: &Agent,
    session: Option<&str>,
    act: impl FnOnce(&mut Asking<'_>, Now) -> T,
) -> Result<T, Problem> {
    visit.front.switchboard.ask(|asking, now| {
        asking.hub.visit(now, agent, session).map_err(|_| Problem::gone())?;
        Ok(act(asking, now))
    })
}

/// The answer to a `hello`, with which a session begins or goes on.
async fn welcome(
    visit: &Visit,
    agent: &Agent,
    first: Option<Result<IncomingFrame<'_>, Rejected<'_>>>,
) -> Result<Bytes, Problem> {
    let no_hello =
        Problem::bad_request("the first frame is not hello, and there is no Halfway-Session header");
    let first = first.ok_or(no_hello.clone())?.map_err(|rejected| Problem::from(&rejected.refusal))?;
    let ClientFrame::Hello(hello) = &first.frame else { return Err(no_hello) };
    sit_down(visit, agent, first.id, hello, false).await
}

/// One that `takes_any` session goes on with what another node has of it.
async fn sit_down(
    visit: &Visit,
    agent: &Agent,
    id: Option<&RawValue>,
    hello: &Hello<'_>,
    takes_any: bool,
) -> Result<Bytes, Problem> {
    let now = clock::now();
    let list = routes::ice_list(visit, agent, now, None).ok();
    let ice = list.as_ref().and_then(|list| serde_json::value::to_raw_value(list).ok());
    let fresh = session_id().map_err(|refusal| Problem::from(&refusal))?;
    let ice_term = list.as_ref().map(|list| refresh::term(now, list));
    let join = Join { id, ice: ice.as_deref(), ice_term, fresh, ends_with_bye: false, takes_any };
    let joined = visit.front.switchboard.join_by_request(agent, hello, join);
    let joined = joined.map_err(|refusal| Problem::from(&refusal))?;
    joined.welcome().await.map_err(|refusal| Problem::from(&refusal))
}

/// `GET /v1/signal`: what there is after number `after`, as soon as there is something.
pub(super) async fn get(visit: &Visit, request: Request<Incoming>) -> Result<Answer, Problem> {
    let agent = speaker(visit, request.headers()).await?;
    let session = request.headers().get(SESSION).ok_or(Problem::bad_request("send Halfway-Session"))?;
    let streams = request
        .headers()
        .get(header::ACCEPT)
        .is_some_and(|accept| accept.to_str().is_ok_and(|accept| accept.contains("text/event-stream")));
    let after = match request.headers().get(LAST_EVENT_ID).filter(|_| streams) {
        Some(id) => id.to_str().ok().and_then(|id| id.parse().ok()),
        None => number(&request, "after", 0)?,
    };
    let after = after.ok_or(Problem::bad_request("after is not a number"))?;
    let wait =
        number(&request, "wait", WAIT)?.ok_or(Problem::bad_request("wait is not a number of seconds"))?;
    let session = session_name(session)?;
    charge(visit, &agent, Some(session))?;
    let listener = visit.front.switchboard.listen(&agent, session, after).map_err(|_| Problem::gone())?;
    if streams {
        return Ok(stream(visit, agent, listener));
    }
    Ok(array(&poll(visit, &agent, &listener, Duration::from_secs(wait.min(MAX_WAIT))).await))
}

/// A whole number in the query; `None` when it is something else.
fn number(request: &Request<Incoming>, name: &str, default: u64) -> Result<Option<u64>, Problem> {
    Ok(parameter(request, name)?.map_or(Some(default), |text| text.parse().ok()))
}

/// Takes what waits, or the first that comes.
async fn poll(visit: &Visit, agent: &Agent, listener: &Listener, wait: Duration) -> Vec<Bytes> {
    let mut over = std::pin::pin!(sleep(wait));
    let (mut frames, mut size) = (Vec::new(), 0);
    loop {
        let ice_at = refresh::push_if_due(visit, clock::now(), agent, &listener.seat);
        while frames.len() < MAX_FRAMES && size < MAX_ANSWER {
            match listener.next_outgoing() {
                Some(Outgoing::Frame(frame)) => {
                    size += frame.len();
                    frames.push(frame);
                }
                Some(Outgoing::Close(farewell)) => {
                    frames.extend(farewell.frame());
                    return frames;
                }
                None => break,
            }
        }
        if !frames.is_empty() {
            return frames;
        }
        tokio::select! {
            () = listener.woken() => {}
            () = until(ice_at) => {}
            () = over.as_mut() => return frames,
        }
    }
}

/// An event stream (HTML, "Server-sent events"): one event a frame, its id the frame's number.
fn stream(visit: &Visit, agent: Agent, listener: Listener) -> Answer {
    let (events, body) = mpsc::channel(1);
    tokio::spawn(send_events(visit.clone(), agent, listener, events));
    routes::with_headers(
        Body::events(body),
        [
            (header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream")),
            (header::CACHE_CONTROL, HeaderValue::from_static("no-store")),
            // nginx would hold events back.
            (HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no")),
        ],
    )
}

async fn send_events(visit: Visit, agent: Agent, listener: Listener, events: mpsc::Sender<Bytes>) {
    let patience = visit.front.patience.write;
    let mut heartbeat = interval(listener.heartbeat());
    loop {
        let ice_at = refresh::push_if_due(&visit, clock::now(), &agent, &listener.seat);
        let piece = match listener.next_outgoing() {
            Some(Outgoing::Frame(frame)) => event(&frame),
            Some(Outgoing::Close(farewell)) => {
                if let Some(frame) = farewell.frame() {
                    let _ = timeout(patience, events.send(event(&frame))).await;
                }
                return;
            }
            None => tokio::select! {
                () = listener.woken() => continue,
                () = until(ice_at) => continue,
                // The first comes at once: proxies and clients see that the stream is there.
                _ = heartbeat.tick() => Bytes::from_static(b": \n\n"),
                () = events.closed() => return,
            },
        };
        match timeout(patience, events.send(piece)).await {
            Ok(Ok(())) => {}
            // It went away, or does not read: its session waits.
            Ok(Err(_)) | Err(_) => return,
        }
    }
}

fn event(frame: &[u8]) -> Bytes {
    #[derive(Deserialize)]
    struct Numbered {
        seq: Option<u64>,
    }
    let text = String::from_utf8_lossy(frame);
    let mut event = String::with_capacity(text.len() + 32);
    if let Ok(Numbered { seq: Some(seq) }) = serde_json::from_slice(frame) {
        let _ = writeln!(event, "id: {seq}");
    }
    // What an agent wrote may hold line ends between its tokens; each line is a field of its own.
    for line in text.split(['\r', '\n']).filter(|line| !line.is_empty()) {
        let _ = writeln!(event, "data: {line}");
    }
    event.push('\n');
    event.into()
}

/// `POST /signal/{receiver}/…`: one offer, answer or candidate, from an agent that need not have a session yet.
pub(super) async fn send(visit: &Visit, request: Request<Incoming>, kind: Kind) -> Result<Answer, Problem> {
    #[derive(Deserialize)]
    struct Said<'a> {
        #[serde(borrow)]
        sdp: Option<&'a RawValue>,
        #[serde(borrow)]
        candidate: Option<&'a RawValue>,
    }
    let agent = speaker(visit, request.headers()).await?;
    let to = named(&request)?;
    let body = read(visit, request).await?;
    let said: Said<'_> =
        serde_json::from_slice(&body).map_err(|_| Problem::bad_request("the body is not an object"))?;
    let (member, value) = match kind {
        Kind::IceCandidate => ("candidate", said.candidate),
        _ => ("sdp", said.sdp),
    };
    // `"candidate":null` and no candidate are alike here.
    let value = value.map_or("null", RawValue::get);
    let to = serde_json::to_string(&to).unwrap_or_default();
    let frame = format!("{{\"type\":\"{}\",\"to\":{to},\"{member}\":{value}}}", kind.name());
    attend(visit, &agent).await?;
    let frame = visit.parse(&frame);
    let passed = attending(visit, &agent, None, |asking, now| {
        let passed = asking.hub.pass(now, &agent.id, frame);
        passed.map(|passed| asking.ready(passed))
    })?;
    let passed = passed.map_err(|refusal| Problem::from(&refusal))?;
    passed.outcome().await.map_err(|refusal| Problem::from(&refusal))?;
    Ok(routes::empty(StatusCode::ACCEPTED))
}

/// `GET /signal/{self}/…`: takes what waits of one kind.
pub(super) async fn take(visit: &Visit, request: &Request<Incoming>, kind: Kind) -> Result<Answer, Problem> {
    let agent = speaker(visit, request.headers()).await?;
    if named(request)? != agent.id.as_str() {
        return Err(Problem::forbidden("what waits for another agent is not yours"));
    }
    attend(visit, &agent).await?;
    charge(visit, &agent, None)?;
    Ok(array(&visit.front.switchboard.tell(|hub, now| {
        hub.visit(now, &agent, None).map(|()| hub.take(&agent.id, kind)).unwrap_or_default()
    })))
}

/// Sees to it that the agent has a session.
async fn attend(visit: &Visit, agent: &Agent) -> Result<(), Problem> {
    if visit.front.switchboard.tell(|hub, now| hub.visit(now, agent, None)).is_err() {
        sit_down(visit, agent, None, &Hello::default(), true).await?;
    }
    Ok(())
}

fn charge(visit: &Visit, agent: &Agent, session: Option<&str>) -> Result<(), Problem> {
    let charged = attending(visit, agent, session, |asking, now| asking.hub.charge(now, &agent.id))?;
    charged.map_err(|refusal| Problem::from(&refusal))
}

/// The agent in the path: `/signal/{agent}/…`.
fn named(request: &Request<Incoming>) -> Result<String, Problem> {
    routes::decoded(request.uri().path().split('/').nth(2).unwrap_or_default())
}

async fn speaker(visit: &Visit, headers: &HeaderMap) -> Result<Agent, Problem> {
    may_signal(routes::authorised(visit, headers).await?)
}

/// The body, once it is known who sends it.
async fn read(visit: &Visit, request: Request<Incoming>) -> Result<Bytes, Problem> {
    let body = Limited::new(request.into_body(), MAX_BODY);
    match timeout(visit.front.patience.head, body.collect()).await {
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(_)) => Err(Problem::too_large()),
        Err(_) => Err(Problem::bad_request("the body did not come in time")),
    }
}

fn session_name(value: &HeaderValue) -> Result<&str, Problem> {
    value.to_str().map_err(|_| Problem::gone())
}

fn array(frames: &[Bytes]) -> Answer {
    let mut body = Vec::with_capacity(frames.iter().map(|frame| frame.len() + 1).sum::<usize>() + 2);
    body.push(b'[');
    for (place, frame) in frames.iter().enumerate() {
        if place > 0 {
            body.push(b',');
        }
        body.extend_from_slice(frame);
    }
    body.push(b']');
    routes::json_bytes(body)
}
