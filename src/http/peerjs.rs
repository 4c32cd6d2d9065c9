//! `/peerjs`: the paths of the PeerJS server, for its clients as they are.
//!
//! A client that knows only our host asks at `/peerjs/id`, `/peerjs/peers` and, for its WebSocket, `/peerjs`; one that was given
//! the path `/peerjs`, at `/peerjs/peerjs/id` and so on.

use aws_lc_rs::rand;
use hyper::{
    Request,
    body::Incoming,
    header::{self, HeaderValue},
};
use serde::Serialize;
use tokio::sync::mpsc;

use super::{
    Visit,
    problem::Problem,
    routes::{self, Answer, may_signal, parameter},
    websocket,
};
use crate::{
    credentials::token::{Agent, AgentId},
    signaling::{
        peerjs::{INVALID_KEY, INVALID_PARAMETERS, KEY, error, id_taken},
        refusal::Refusal,
        registry::Query,
    },
};

/// Bytes of a list of peers, about.
const MAX_LIST: usize = 1 << 20;

/// What is asked for below `/peerjs`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Asked {
    /// What is served here.
    About,
    /// An id that nobody has.
    Id,
    /// Who is here.
    Peers,
    /// The WebSocket; without an upgrade at `/peerjs` itself, what is served here.
    Socket { or_about: bool },
    /// With a key that is not ours.
    Keyless,
}

impl Asked {
    pub(super) fn of(path: &str) -> Option<Self> {
        match path.strip_prefix("/peerjs")? {
            "" => Some(Self::Socket { or_about: true }),
            "/" => Some(Self::About),
            "/id" => Some(Self::Id),
            "/peers" => Some(Self::Peers),
            "/peerjs" => Some(Self::Socket { or_about: false }),
            below => match below.strip_prefix('/')?.split_once('/')? {
                (KEY, "id") => Some(Self::Id),
                (KEY, "peers") => Some(Self::Peers),
                (_, "id" | "peers") => Some(Self::Keyless),
                _ => None,
            },
        }
    }
}

/// Where it is not configured, nothing is there.
pub(super) async fn answer(
    visit: &Visit,
    request: &mut Request<Incoming>,
    accepted: &mpsc::Sender<websocket::Upgrade>,
    asked: Asked,
) -> Result<Answer, Problem> {
    if !visit.front.terms().peerjs {
        return Err(Problem::not_found());
    }
    let upgrades = request.headers().contains_key(header::UPGRADE);
    match asked {
        Asked::Socket { or_about } if upgrades || !or_about => {
            websocket::upgrade_peer(visit, request, accepted).await
        }
        Asked::About | Asked::Socket { .. } => Ok(about()),
        Asked::Id => id(),
        Asked::Peers => peers(visit, request).await,
        Asked::Keyless => Err(Problem::unauthorized(INVALID_KEY)),
    }
}

fn about() -> Answer {
    #[derive(Serialize)]
    struct About {
        name: &'static str,
        description: &'static str,
        website: &'static str,
    }
    routes::json(&About {
        name: "Halfway",
        description: "speaks the protocol of the PeerJS server",
        website: "",
    })
}

/// A random UUID (RFC 9562, version 4). Whoever wants it as a peer's id needs a token for it.
fn id() -> Result<Answer, Problem> {
    let mut bytes = [0; 16];
    rand::fill(&mut bytes).map_err(|_| Problem::unavailable("no randomness"))?;
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    let id = [&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]].join("-");
    let headers = [
        (header::CONTENT_TYPE, HeaderValue::from_static("text/html; charset=utf-8")),
        (header::CACHE_CONTROL, HeaderValue::from_static("no-store")),
    ];
    Ok(routes::with_headers(id.into_bytes().into(), headers))
}

/// The room of who shows a token; to clients as they are, which cannot, it is closed.
async fn peers(visit: &Visit, request: &Request<Incoming>) -> Result<Answer, Problem> {
    let agent = match parameter(request, "token")? {
        Some(token) => visit.front.check_in_time(&token).await?,
        None => routes::authorised(visit, request.headers()).await?,
    };
    let agent = may_signal(agent)?;
    let page = visit
        .front
        .switchboard
        .tell(|hub, _| hub.page(&agent.room, &Query::default(), "", usize::MAX, MAX_LIST));
    Ok(routes::json(&page.agents.iter().map(|entry| &entry.agent).collect::<Vec<&AgentId>>()))
}

/// Who asks for a WebSocket; or what it is told there before it is closed, for a page sees no HTTP status.
pub(super) async fn peer(visit: &Visit, request: &Request<Incoming>) -> Result<Agent, String> {
    let given = |name| parameter(request, name).ok().flatten().filter(|value| !value.is_empty());
    let (Some(id), Some(token), Some(key)) = (given("id"), given("token"), given("key")) else {
        return Err(error(INVALID_PARAMETERS));
    };
    if key != KEY {
        return Err(error(INVALID_KEY));
    }
    let refuse = |refusal: Refusal| error(&format!("Invalid token provided: {refusal}"));
    let agent = visit.front.check_in_time(&token).await.map_err(|refusal| refuse(refusal.into()))?;
    if !agent.scopes.signal {
        return Err(refuse(Refusal::Forbidden("the token lacks the scope signal")));
    }
    if agent.id.as_str() == id { Ok(agent) } else { Err(id_taken()) }
}
