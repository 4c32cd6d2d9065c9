//! Paths, methods, tokens: which request gets which answer.

use std::{borrow::Cow, sync::atomic::Ordering, time::Duration};

use hyper::{
    HeaderMap, Method, Request, Response, StatusCode,
    body::{Body as _, Incoming},
    header::{self, HeaderName, HeaderValue},
};
use percent_encoding::percent_decode_str;
use serde::Serialize;
use tokio::sync::mpsc;

use super::{
    Visit, agents,
    body::Body,
    ice::{self, IceList},
    origin, peerjs,
    problem::Problem,
    signal, websocket,
};
use crate::{
    clock::{self, Now},
    credentials::token::Agent,
    metrics,
    signaling::message::Kind,
};

/// Bytes of a body that nobody reads: hyper drains a small one, a larger one is refused.
const MAX_BODY: u64 = 65_536;

pub(super) type Answer = Response<Body>;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Route {
    Healthz,
    Readyz,
    Metrics,
    Drain,
    Ice,
    TurnRest,
    Agents,
    /// `/v1/agents/{agent}`
    Agent,
    WebSocket,
    Signal,
    /// `/signal/{agent}/…`, where something of this kind is sent.
    Send(Kind),
    /// The same, where it is taken.
    Take(Kind),
    /// `/peerjs…`
    PeerJs(peerjs::Asked),
}

impl Route {
    fn of(path: &str, is_admin: bool) -> Option<Self> {
        let table = if is_admin { ADMIN } else { PUBLIC };
        let known = table.iter().find(|(known, _)| *known == path).map(|(_, route)| *route);
        known.or_else(|| if is_admin { None } else { Self::of_agent(path) })
    }

    /// One with an agent's id in its path.
    fn of_agent(path: &str) -> Option<Self> {
        if path.strip_prefix(agents::PREFIX).is_some_and(|agent| !agent.is_empty() && !agent.contains('/')) {
            return Some(Self::Agent);
        }
        if let Some(asked) = peerjs::Asked::of(path) {
            return Some(Self::PeerJs(asked));
        }
        let [agent, what] = path.strip_prefix("/signal/")?.split('/').collect::<Vec<_>>()[..] else {
            return None;
        };
        let (_, route) = SIMPLE.iter().find(|(known, _)| *known == what && !agent.is_empty())?;
        Some(*route)
    }

    /// As the header `Allow` has it. HEAD only where GET takes nothing away and waits for nothing.
    fn methods(self) -> &'static str {
        match self {
            Self::Signal => "GET, POST, OPTIONS",
            Self::Agent => "GET, HEAD, DELETE, OPTIONS",
            Self::Send(_) | Self::Drain => "POST, OPTIONS",
            Self::Take(_) | Self::WebSocket | Self::PeerJs(_) => "GET, OPTIONS",
            _ => "GET, HEAD, OPTIONS",
        }
    }

    fn takes(self, method: &Method) -> bool {
        self.methods().split(", ").any(|allowed| allowed == method.as_str())
    }
}

const SIMPLE: [(&str, Route); 6] = [
    ("offer", Route::Send(Kind::Offer)),
    ("answer", Route::Send(Kind::Answer)),
    ("candidate", Route::Send(Kind::IceCandidate)),
    ("offers", Route::Take(Kind::Offer)),
    ("answers", Route::Take(Kind::Answer)),
    ("candidates", Route::Take(Kind::IceCandidate)),
];

const PUBLIC: &[(&str, Route)] = &[
    ("/v1/ice", Route::Ice),
    ("/v1/ws", Route::WebSocket),
    ("/v1/signal", Route::Signal),
    ("/v1/agents", Route::Agents),
    ("/turn", Route::TurnRest),
    ("/healthz", Route::Healthz),
    ("/readyz", Route::Readyz),
];

const ADMIN: &[(&str, Route)] = &[
    ("/metrics", Route::Metrics),
    ("/drain", Route::Drain),
    ("/healthz", Route::Healthz),
    ("/readyz", Route::Readyz),
];

/// Answers one request; an upgrade that was agreed to goes into `accepted`.
pub(super) async fn answer(
    visit: &Visit,
    request: Request<Incoming>,
    accepted: &mpsc::Sender<websocket::Upgrade>,
) -> Answer {
    let counts = &visit.front.counts;
    counts.requests.fetch_add(1, Ordering::Relaxed);
    let terms = visit.front.terms();
    if !terms.origins.allow(request.headers()) {
        counts.problems.fetch_add(1, Ordering::Relaxed);
        return Problem::forbidden("this origin is not in http.allowed_origins").response();
    }
    let origin = request.headers().get(header::ORIGIN).cloned();
    let mut response = route(visit, request, accepted).await.unwrap_or_else(|problem| {
        counts.problems.fetch_add(1, Ordering::Relaxed);
        problem.response()
    });
    terms.origins.share(origin, response.headers_mut());
    response
}

async fn route(
    visit: &Visit,
    mut request: Request<Incoming>,
    accepted: &mpsc::Sender<websocket::Upgrade>,
) -> Result<Answer, Problem> {
    let most = if *request.method() == Method::POST { signal::MAX_BODY as u64 } else { MAX_BODY };
    if request.body().size_hint().lower() > most {
        return Err(Problem::too_large());
    }
    let route = Route::of(request.uri().path(), visit.operator.is_some()).ok_or_else(Problem::not_found)?;
    if !route.takes(request.method()) {
        return Err(Problem::method_not_allowed(route.methods()));
    }
    if *request.method() == Method::OPTIONS {
        return Ok(preflight(route));
    }
    match route {
        Route::Healthz => Ok(text("ok\n")),
        Route::Readyz => readyz(visit),
        Route::Metrics => Ok(metrics(visit, request.headers()).await),
        Route::Drain => Ok(drain(visit)),
        Route::Ice => ice(visit, &request).await,
        Route::TurnRest => turn_rest(visit, &request).await,
        Route::Agents => agents::list(visit, &request).await,
        Route::Agent if *request.method() == Method::DELETE => agents::revoke(visit, &request).await,
        Route::Agent => agents::card(visit, &request).await,
        Route::WebSocket => websocket::upgrade(visit, &mut request, accepted).await,
        Route::Signal if *request.method() == Method::POST => signal::post(visit, request).await,
        Route::Signal => signal::get(visit, request).await,
        Route::PeerJs(asked) => peerjs::answer(visit, &mut request, accepted, asked).await,
        Route::Send(kind) => signal::send(visit, request, kind).await,
        Route::Take(kind) => signal::take(visit, &request, kind).await,
    }
}

fn preflight(route: Route) -> Answer {
    let mut response = empty(StatusCode::NO_CONTENT);
    // All but one path take these, or fewer.
    let methods = if route == Route::Agent { "GET, DELETE" } else { "GET, POST" };
    origin::permit(response.headers_mut(), methods);
    response
}

fn readyz(visit: &Visit) -> Result<Answer, Problem> {
    if visit.front.ready.load(Ordering::Relaxed) {
        Ok(text("ready\n"))
    } else {
        Err(Problem::unavailable("not ready yet, or going down"))
    }
}

/// In OpenMetrics for who says that it reads that, as Prometheus does; else in the text that everybody reads.
async fn metrics(visit: &Visit, headers: &HeaderMap) -> Answer {
    const OPEN: &str = "application/openmetrics-text";
    let operator = visit.operator.clone();
    // Whoever counts waits for each shard's turn.
    let page = move || operator.map_or(String::new(), |operator| (operator.metrics)());
    let page = tokio::task::spawn_blocking(page).await.unwrap_or_default();
    let is_open =
        headers.get(header::ACCEPT).is_some_and(|accept| accept.to_str().unwrap_or("").contains(OPEN));
    let (page, kind) = if is_open {
        (page, "application/openmetrics-text; version=1.0.0; charset=utf-8")
    } else {
        (metrics::in_prometheus_text(&page), "text/plain; version=0.0.4; charset=utf-8")
    };
    with_headers(page.into(), [(header::CONTENT_TYPE, HeaderValue::from_static(kind))])
}

/// It begins at once; what has to end first takes its time.
fn drain(visit: &Visit) -> Answer {
    if let Some(operator) = &visit.operator {
        operator.drain.notify_one();
    }
    let mut response = text("draining\n");
    *response.status_mut() = StatusCode::ACCEPTED;
    response
}

async fn ice(visit: &Visit, request: &Request<Incoming>) -> Result<Answer, Problem> {
    let agent = authorised(visit, request.headers()).await?;
    let list = ice_list(visit, &agent, clock::now(), asked_ttl(request)?)?;
    let mut response = json(&list);
    for link in list.links() {
        // Hosts and agent ids are plain ASCII, so every link is a header value.
        if let Ok(link) = HeaderValue::try_from(link) {
            response.headers_mut().append(header::LINK, link);
        }
    }
    Ok(response)
}

async fn turn_rest(visit: &Visit, request: &Request<Incoming>) -> Result<Answer, Problem> {
    if parameter(request, "service")?.as_deref() != Some("turn") {
        return Err(Problem::bad_request("only service=turn is known"));
    }
    let agent = authorised(visit, request.headers()).await?;
    Ok(json(&ice_list(visit, &agent, clock::now(), None)?.turn_rest))
}

/// The list for this agent on this connection.
pub(super) fn ice_list(
    visit: &Visit,
    agent: &Agent,
    now: Now,
    asked: Option<Duration>,
) -> Result<IceList, Problem> {
    if !agent.scopes.ice {
        return Err(Problem::forbidden("the token lacks the scope ice"));
    }
    let terms = visit.front.terms();
    let token_left = Duration::from_secs(agent.expires.saturating_sub(now.unix()));
    let ttl = terms.ice.lifetime(asked, token_left);
    let (ttl, is_news) = visit.front.revoking.note_user(now, agent.id.as_str(), ttl);
    if is_news {
        visit.front.tell_revoked(agent.id.as_str());
    }
    let host = terms.ice.host_for(visit.client, visit.reached);
    let elsewhere = visit.front.elsewhere(agent.id.as_str(), visit.client);
    Ok(ice::ice_list(&terms.ice, &terms.turn, now, agent.id.as_str(), ttl, &host, &elsewhere))
}

/// `ttl` in whole seconds. A number too large for us is a number still, and is lowered to the limit.
fn asked_ttl(request: &Request<Incoming>) -> Result<Option<Duration>, Problem> {
    let Some(ttl) = parameter(request, "ttl")? else { return Ok(None) };
    let digits = !ttl.is_empty() && ttl.bytes().all(|byte| byte.is_ascii_digit());
    let seconds = ttl.parse().unwrap_or(u64::MAX);
    if !digits || seconds == 0 {
        return Err(Problem::bad_request("ttl is not a number of seconds"));
    }
    Ok(Some(Duration::from_secs(seconds)))
}

/// Whose token the request carries.
pub(super) async fn authorised(visit: &Visit, headers: &HeaderMap) -> Result<Agent, Problem> {
    let token = bearer(headers).ok_or_else(Problem::no_token)?;
    Ok(visit.front.check_in_time(token).await?)
}

/// The agent, if its token is for signaling.
pub(super) fn may_signal(agent: Agent) -> Result<Agent, Problem> {
    if agent.scopes.signal { Ok(agent) } else { Err(Problem::forbidden("the token lacks the scope signal")) }
}

/// An agent's id, as paths have it.
pub(super) fn decoded(agent: &str) -> Result<String, Problem> {
    let decoded = percent_decode_str(agent).decode_utf8().map(Cow::into_owned);
    decoded.map_err(|_| Problem::bad_request("the agent's id is not UTF-8"))
}

/// RFC 6750 §2.1.
pub(super) fn bearer(headers: &HeaderMap) -> Option<&str> {
    let (scheme, token) = headers.get(header::AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
    scheme.eq_ignore_ascii_case("Bearer").then(|| token.trim())
}

/// The first query parameter of this name, decoded as forms encode it (a plus is a space).
pub(super) fn parameter<B>(request: &Request<B>, name: &str) -> Result<Option<String>, Problem> {
    let pairs = request.uri().query().unwrap_or_default().split('&');
    let mut pairs = pairs.map(|pair| pair.split_once('=').unwrap_or((pair, "")));
    let Some((_, value)) = pairs.find(|(key, _)| *key == name) else { return Ok(None) };
    let value = value.replace('+', " ");
    let decoded = percent_decode_str(&value).decode_utf8();
    decoded.map(|value| Some(value.into_owned())).map_err(|_| Problem::bad_request("the query is not UTF-8"))
}

/// Done, and nothing more to say.
pub(super) fn empty(status: StatusCode) -> Answer {
    let mut done = Answer::default();
    *done.status_mut() = status;
    done
}

/// Never stored: what we answer in JSON is secret, or old in a moment.
pub(super) fn json(body: &impl Serialize) -> Answer {
    json_bytes(serde_json::to_vec(body).expect("our answers are plain JSON"))
}

pub(super) fn json_bytes(body: Vec<u8>) -> Answer {
    with_headers(
        body.into(),
        [
            (header::CONTENT_TYPE, HeaderValue::from_static("application/json")),
            (header::CACHE_CONTROL, HeaderValue::from_static("no-store")),
        ],
    )
}

fn text(body: &'static str) -> Answer {
    let plain = HeaderValue::from_static("text/plain; charset=utf-8");
    with_headers(body.into(), [(header::CONTENT_TYPE, plain)])
}

pub(super) fn with_headers(
    body: Body,
    headers: impl IntoIterator<Item = (HeaderName, HeaderValue)>,
) -> Answer {
    let mut response = Response::new(body);
    response.headers_mut().extend(headers);
    response
}
