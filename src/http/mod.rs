//! Drives `signaling`: routes, WebSocket, ICE lists.

use std::{
    fmt,
    net::IpAddr,
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use hyper::{
    Request,
    body::Incoming,
    header::{self, HeaderValue},
    server::conn::{http1, http2},
    service::service_fn,
};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    sync::{Notify, watch},
    task::JoinSet,
    time::timeout,
};
use tracing::debug;

use crate::{
    clock::{self, Now},
    config::Config,
    credentials::{
        signaled::Signaled,
        token::{Agent, AgentId, TokenKeys, TokenRefusal},
        turn_rest::TurnSecrets,
    },
    door::{Door, Guest, Services, ToRelay, WebClient, listen, turned_true},
    jwks::Jwks,
    revoking::{Lives, Revoking},
    signaling::{self, limits::Limits, message, refusal::Refusal},
};

mod agents; // who is in the room
mod body; // an answer at once, or event by event
pub mod ice; // ICE server lists: pure, so that `halfway ice` prints the same
mod nodes; // the hub among other nodes
pub mod origin; // which web pages may use us
mod peerjs; // the paths of the PeerJS server
pub mod problem; // errors as application/problem+json
mod refresh; // fresh ICE servers for agents that stay
mod routes; // paths, methods, tokens
mod signal; // the same as the WebSocket, by requests
mod switchboard; // the one owner of the hub
pub mod websocket; // agents' connections: from HTTP to threads of their own

use body::Open;
use ice::IceOffer;
use origin::Origins;
use problem::Problem;
use switchboard::Switchboard;
use websocket::exchange::Exchange;

/// Bytes of a request's head.
const MAX_HEAD: usize = 16 * 1024;

/// Header fields of a request.
const MAX_HEADERS: usize = 64;

/// Requests that one HTTP/2 connection may have open.
const MAX_STREAMS: u32 = 32;

/// Everything a request can ask for.
pub struct Front {
    terms: RwLock<Arc<Terms>>,
    patience: Patience,
    switchboard: Arc<Switchboard>,
    revoking: Revoking,
    ready: Arc<AtomicBool>,
    counts: Counts,
}

/// What requests are answered by. It may change while agents are connected.
pub struct Terms {
    tokens: TokenKeys,
    turn: TurnSecrets,
    ice: IceOffer,
    max_frame: usize,
    origins: Origins,
    /// The keys of an outside issuer.
    jwks: Option<Arc<Jwks>>,
    lives: Lives,
    /// Clients of PeerJS are served.
    peerjs: bool,
    /// Where the relay wants to know what agents tell each other of their addresses.
    signaled: Option<Signaled>,
}

impl Terms {
    /// What the configuration says.
    #[must_use]
    pub fn new(
        config: &Config,
        tokens: TokenKeys,
        turn: TurnSecrets,
        ice: IceOffer,
        jwks: Option<Arc<Jwks>>,
        signaled: &Signaled,
    ) -> Self {
        let max_frame = config.signaling.max_frame;
        let origins = Origins::new(&config.http.allowed_origins);
        let lives = Lives { users: config.credentials.max_ttl, tokens: config.auth.max_ttl };
        let (peerjs, signaled) = (config.signaling.peerjs, config.turn.signaled(signaled));
        Self { tokens, turn, ice, max_frame, origins, jwks, lives, peerjs, signaled }
    }
}

/// How long a client may take.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// For a request's head, and between requests.
    pub head: Duration,
    pub hello: Duration,
    /// For taking one frame.
    pub write: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self { head: Duration::from_secs(15), hello: Duration::from_secs(5), write: Duration::from_secs(25) }
    }
}

#[derive(Debug, Default)]
struct Counts {
    requests: AtomicU64,
    problems: AtomicU64,
}

/// What is counted here and in the hub.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    pub signaling: signaling::hub::Counters,
    /// Of a cluster.
    pub nodes: signaling::hub::Numbers,
    /// HTTP requests.
    pub requests: u64,
    /// HTTP requests answered with an error.
    pub problems: u64,
}

impl Front {
    /// `ready` is what `/readyz` answers.
    #[must_use]
    pub fn new(terms: Terms, limits: Limits, revoking: Revoking, ready: Arc<AtomicBool>) -> Arc<Self> {
        Self::with_patience(terms, limits, revoking, ready, Patience::default())
    }

    /// With other deadlines than everybody's, for tests.
    #[must_use]
    pub fn with_patience(
        terms: Terms,
        limits: Limits,
        revoking: Revoking,
        ready: Arc<AtomicBool>,
        patience: Patience,
    ) -> Arc<Self> {
        let switchboard = Arc::new(Switchboard::new(limits.clone(), revoking.revocations().clone()));
        switchboard.tell(|hub, _| hub.adopt(limits, terms.signaled.clone()));
        Arc::new(Self {
            terms: RwLock::new(Arc::new(terms)),
            patience,
            switchboard,
            revoking,
            ready,
            counts: Counts::default(),
        })
    }

    /// Other terms and limits from now on; sessions and connections stay. An agent is told of the limits by its next welcome.
    pub fn adopt(&self, terms: Terms, limits: Limits) {
        self.switchboard.tell(|hub, _| hub.adopt(limits, terms.signaled.clone()));
        self.tell_offer(&terms.ice);
        *self.terms.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(terms);
    }

    /// Whose token this is, for who cannot wait: with a key that is not known it is worth another try, once its issuer has been
    /// asked.
    fn check(&self, now: Now, token: &str) -> Result<Agent, Refusal> {
        let terms = self.terms();
        let checked = terms.tokens.check(now, token);
        let is_asked =
            checked == Err(TokenRefusal::UnknownKey) && terms.jwks.as_ref().is_some_and(|jwks| jwks.ask());
        if is_asked {
            return Err(Refusal::Unavailable("the token's issuer is asked for its key: try again"));
        }
        checked.map_err(Refusal::from)
    }

    /// Whose token this is; its issuer may be asked for the key first.
    async fn check_in_time(&self, token: &str) -> Result<Agent, TokenRefusal> {
        let terms = self.terms();
        let checked = terms.tokens.check(clock::now(), token);
        match &terms.jwks {
            Some(jwks) if checked == Err(TokenRefusal::UnknownKey) && jwks.ask_and_wait().await => {
                terms.tokens.check(clock::now(), token)
            }
            _ => checked,
        }
    }

    /// Ends whatever the agent has, for good.
    async fn revoke(&self, agent: &AgentId) -> Result<(), Problem> {
        self.revoking
            .revoke(agent, self.terms().lives)
            .map_err(|_| Problem::unavailable("too many agents are revoked whose tokens may still live"))?;
        self.switchboard.tell(|hub, now| hub.revoke(now, agent));
        self.tell_revoked(agent.as_str());
        let written = self.revoking.write().await;
        written.map_err(|why| {
            tracing::error!("{agent} is revoked until the next start, and not beyond it: {why}");
            Problem::unavailable(
                "it is revoked until the next start of this host: its data dir cannot be written",
            )
        })?;
        if self.is_alone() {
            return Err(Problem::unavailable(
                "it is revoked on this node; the others, which cannot be reached now, will be told",
            ));
        }
        Ok(())
    }

    /// Writes down what the next process has to know.
    pub async fn settle(&self) {
        self.revoking.settle().await;
    }

    fn terms(&self) -> Arc<Terms> {
        Arc::clone(&self.terms.read().unwrap_or_else(PoisonError::into_inner))
    }

    #[must_use]
    pub fn counters(&self) -> Counters {
        let read = |count: &AtomicU64| count.load(Ordering::Relaxed);
        Counters {
            signaling: self.switchboard.counters(),
            nodes: self.switchboard.tell(|hub, _| hub.numbers()).unwrap_or_default(),
            requests: read(&self.counts.requests),
            problems: read(&self.counts.problems),
        }
    }
}

impl fmt::Debug for Front {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Front")
            .field("ice", &self.terms().ice)
            .field("counts", &self.counts)
            .finish_non_exhaustive()
    }
}

/// What the operator may ask for on a port of its own.
pub struct Operator {
    /// Makes the text of `/metrics`.
    pub metrics: Box<dyn Fn() -> String + Send + Sync>,
    /// Somebody has asked for an end.
    pub drain: Notify,
}

/// Where the public listeners' connections come in, and where those that are not ours go.
#[derive(Clone)]
pub struct Entrance {
    /// Who gets in.
    pub door: Arc<Door>,
    /// Takes relay clients.
    pub to_relay: ToRelay,
    /// Takes agents.
    pub exchange: Arc<Exchange>,
}

/// Serves HTTPS and WSS until `shutdown` turns true, then tells every agent to come back later and returns when all
/// have gone. Dropping the future closes what is left.
pub async fn serve(
    front: Arc<Front>,
    listeners: Vec<TcpListener>,
    entrance: Entrance,
    mut shutdown: watch::Receiver<bool>,
) {
    let mut listening = JoinSet::new();
    for listener in listeners {
        listening.spawn(listen_public(Arc::clone(&front), listener, entrance.clone(), shutdown.clone()));
    }
    let drained = async {
        turned_true(&mut shutdown).await;
        front.ready.store(false, Ordering::Relaxed);
        front.switchboard.tell(|hub, _| hub.restart());
        entrance.exchange.restart();
        while listening.join_next().await.is_some() {}
        front.settle().await;
        entrance.exchange.all_gone().await;
    };
    tokio::select! {
        () = drained => {}
        () = front.switchboard.keep_time() => {}
        () = front.revoking.keep() => {}
    }
}

/// Serves plain HTTP to the operator until dropped: the numbers are wanted most while we drain.
pub async fn serve_admin(front: Arc<Front>, listeners: Vec<TcpListener>, operator: Arc<Operator>) {
    let (_stay, never) = watch::channel(false);
    let mut listening = JoinSet::new();
    for listener in listeners {
        listening.spawn(listen_admin(Arc::clone(&front), listener, Arc::clone(&operator), never.clone()));
    }
    while listening.join_next().await.is_some() {}
}

async fn listen_public(
    front: Arc<Front>,
    listener: TcpListener,
    entrance: Entrance,
    shutdown: watch::Receiver<bool>,
) {
    let welcome = |stream: TcpStream, client: IpAddr| {
        let permit = entrance.door.admit(client)?;
        let visit = Visit::new(&front, &stream, client, None, shutdown.clone())?;
        let Entrance { door, to_relay, exchange } = entrance.clone();
        Some(async move {
            match door.open(stream, permit, Services::All).await {
                Some(Guest::Web(client)) => receive(visit, *client, &exchange).await,
                Some(Guest::Relay(client)) => to_relay(client),
                None => {}
            }
        })
    };
    listen(&listener, shutdown.clone(), welcome).await;
}

/// The place is held for as long as the connection.
async fn receive(visit: Visit, WebClient { stream, h2, permit }: WebClient, exchange: &Exchange) {
    if h2 {
        return serve_streams(&visit, stream).await;
    }
    if let Some(upgrade) = serve_requests(&visit, stream).await {
        websocket::leave_http(visit, upgrade, permit, exchange).await;
    }
}

async fn listen_admin(
    front: Arc<Front>,
    listener: TcpListener,
    operator: Arc<Operator>,
    never: watch::Receiver<bool>,
) {
    let welcome = |stream: TcpStream, client: IpAddr| {
        let visit = Visit::new(&front, &stream, client, Some(Arc::clone(&operator)), never.clone())?;
        Some(async move {
            serve_requests(&visit, stream).await;
        })
    };
    listen(&listener, never.clone(), welcome).await;
}

/// One connection and what it may see.
#[derive(Clone)]
struct Visit {
    front: Arc<Front>,
    client: IpAddr,
    /// Our address as the client reached it.
    reached: IpAddr,
    /// On the operator's port.
    operator: Option<Arc<Operator>>,
    shutdown: watch::Receiver<bool>,
}

impl Visit {
    /// `None` when the connection is gone already.
    fn new(
        front: &Arc<Front>,
        stream: &TcpStream,
        client: IpAddr,
        operator: Option<Arc<Operator>>,
        shutdown: watch::Receiver<bool>,
    ) -> Option<Self> {
        let reached = stream.local_addr().ok()?.ip();
        Some(Self { front: Arc::clone(front), client, reached, operator, shutdown })
    }

    /// A frame, whose size is checked before it is read.
    fn parse<'a>(&self, frame: &'a str) -> Result<message::Incoming<'a>, message::Rejected<'a>> {
        if frame.len() > self.front.terms().max_frame {
            return Err(message::refuse(frame, Refusal::TooLarge("the frame is over the limit")));
        }
        message::parse(frame)
    }
}

/// HTTP/1.1, until a request asks for a WebSocket.
async fn serve_requests(
    visit: &Visit,
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
) -> Option<websocket::Upgrade> {
    let (accepted, mut upgrade) = tokio::sync::mpsc::channel(1);
    let answer = |request: Request<Incoming>| {
        let answered = routes::answer(visit, request, &accepted);
        async { Ok::<_, std::convert::Infallible>(answered.await) }
    };
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(visit.front.patience.head)
        .max_buf_size(MAX_HEAD)
        .max_headers(MAX_HEADERS)
        .serve_connection(TokioIo::new(stream), service_fn(answer))
        .with_upgrades();
    let mut connection = std::pin::pin!(connection);
    let mut shutdown = visit.shutdown.clone();
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = turned_true(&mut shutdown) => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        debug!(client = %visit.client, "HTTP connection ended: {error}");
    }
    upgrade.try_recv().ok()
}

/// HTTP/2: as many requests at once as [`MAX_STREAMS`], and no WebSocket: who wants one connects for it alone.
async fn serve_streams(visit: &Visit, stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) {
    let (nobody, _) = tokio::sync::mpsc::channel(1);
    let (open, mut opened) = watch::channel(0);
    let open = Arc::new(open);
    let answer = |mut request: Request<Incoming>| {
        let open = Open::new(&open);
        name_host(&mut request);
        let (visit, nobody) = (visit.clone(), nobody.clone());
        async move {
            let mut response = routes::answer(&visit, request, &nobody).await;
            response.body_mut().hold(open);
            Ok::<_, std::convert::Infallible>(response)
        }
    };
    let connection = http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .max_concurrent_streams(MAX_STREAMS)
        .max_header_list_size(MAX_HEAD as u32)
        .serve_connection(TokioIo::new(stream), service_fn(answer));
    let mut connection = std::pin::pin!(connection);
    let mut shutdown = visit.shutdown.clone();
    let quiet = async {
        while opened.wait_for(|open| *open == 0).await.is_ok()
            && let Ok(Ok(())) = timeout(visit.front.patience.head, opened.changed()).await
        {}
    };
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = async { tokio::select! { () = quiet => {}, () = turned_true(&mut shutdown) => {} } } => {
            connection.as_mut().graceful_shutdown();
            timeout(visit.front.patience.write, connection).await.unwrap_or(Ok(()))
        }
    };
    if let Err(error) = ended {
        debug!(client = %visit.client, "HTTP/2 connection ended: {error}");
    }
}

/// What HTTP/2 calls `:authority` is `Host` to everybody else.
fn name_host(request: &mut Request<Incoming>) {
    let host = request.uri().authority().and_then(|host| HeaderValue::from_str(host.as_str()).ok());
    if let Some(host) = host {
        request.headers_mut().entry(header::HOST).or_insert(host);
    }
}
