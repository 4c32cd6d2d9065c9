//! Drives `signaling`: accept, routes, WebSocket, ICE lists.

use std::{
    fmt,
    future::Future,
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use http_body_util::Full;
use hyper::{Response, body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::watch,
    task::JoinSet,
    time::timeout,
};
use tokio_rustls::TlsAcceptor;
use tracing::{debug, warn};

use crate::{
    clock,
    config::Config,
    credentials::{token::TokenKeys, turn_rest::TurnSecrets},
    signaling::{self, limits::Limits},
};

pub mod admission; // connections and handshakes per address
mod agents; // who is in the room
pub mod ice; // ICE server lists: pure, so that `halfway ice` prints the same
pub mod origin; // which web pages may use us
pub mod problem; // errors as application/problem+json
mod routes; // paths, methods, tokens
mod switchboard; // the one owner of the hub
mod websocket; // one agent's connection

use admission::{Admission, Permit};
use ice::IceOffer;
use origin::Origins;
use switchboard::Switchboard;

/// Bytes of a request's head.
const MAX_HEAD: usize = 16 * 1024;

/// Header fields of a request.
const MAX_HEADERS: usize = 64;

/// Everything a request can ask for.
pub struct Front {
    tokens: TokenKeys,
    turn: TurnSecrets,
    ice: IceOffer,
    max_frame: usize,
    origins: Origins,
    admission: Admission,
    patience: Patience,
    switchboard: Arc<Switchboard>,
    ready: Arc<AtomicBool>,
    counts: Counts,
}

/// How long a client may take.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    pub handshake: Duration,
    /// For a request's head, and between requests.
    pub head: Duration,
    pub hello: Duration,
    /// For taking one frame.
    pub write: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            handshake: Duration::from_secs(10),
            head: Duration::from_secs(15),
            hello: Duration::from_secs(5),
            write: Duration::from_secs(25),
        }
    }
}

#[derive(Debug, Default)]
struct Counts {
    requests: AtomicU64,
    problems: AtomicU64,
    refused: AtomicU64,
    handshakes_failed: AtomicU64,
}

/// What is counted here and in the hub.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    pub signaling: signaling::hub::Counters,
    /// Open TCP connections on the public listeners.
    pub connections: usize,
    /// HTTP requests.
    pub requests: u64,
    /// HTTP requests answered with an error.
    pub problems: u64,
    /// Connections closed at once: too many, or too fast.
    pub refused: u64,
    /// TLS handshakes that failed or took too long.
    pub handshakes_failed: u64,
}

impl Front {
    /// `ready` is what `/readyz` answers.
    #[must_use]
    pub fn new(
        config: &Config,
        tokens: TokenKeys,
        turn: TurnSecrets,
        ice: IceOffer,
        ready: Arc<AtomicBool>,
    ) -> Arc<Self> {
        Self::with_patience(config, tokens, turn, ice, ready, Patience::default(), config.signaling.limits())
    }

    /// With other deadlines and limits than everybody's, for tests.
    #[must_use]
    pub fn with_patience(
        config: &Config,
        tokens: TokenKeys,
        turn: TurnSecrets,
        ice: IceOffer,
        ready: Arc<AtomicBool>,
        patience: Patience,
        limits: Limits,
    ) -> Arc<Self> {
        Arc::new(Self {
            tokens,
            turn,
            ice,
            max_frame: limits.max_frame,
            origins: Origins::new(&config.http.allowed_origins),
            admission: Admission::new(&config.http),
            patience,
            switchboard: Arc::new(Switchboard::new(limits)),
            ready,
            counts: Counts::default(),
        })
    }

    #[must_use]
    pub fn counters(&self) -> Counters {
        let read = |count: &AtomicU64| count.load(Ordering::Relaxed);
        Counters {
            signaling: self.switchboard.counters(),
            connections: self.admission.open(),
            requests: read(&self.counts.requests),
            problems: read(&self.counts.problems),
            refused: read(&self.counts.refused),
            handshakes_failed: read(&self.counts.handshakes_failed),
        }
    }
}

impl fmt::Debug for Front {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Front").field("ice", &self.ice).field("counts", &self.counts).finish_non_exhaustive()
    }
}

/// Makes the text of `/metrics`.
pub type Metrics = Arc<dyn Fn() -> String + Send + Sync>;

/// Serves HTTPS and WSS until `shutdown` turns true, then tells every agent to come back later and returns when all
/// have gone. Dropping the future closes what is left.
pub async fn serve(
    front: Arc<Front>,
    listeners: Vec<TcpListener>,
    tls: Arc<rustls::ServerConfig>,
    mut shutdown: watch::Receiver<bool>,
) {
    let mut listening = JoinSet::new();
    for listener in listeners {
        let acceptor = TlsAcceptor::from(Arc::clone(&tls));
        listening.spawn(listen_public(Arc::clone(&front), listener, acceptor, shutdown.clone()));
    }
    let drained = async {
        turned_true(&mut shutdown).await;
        front.ready.store(false, Ordering::Relaxed);
        front.switchboard.tell(|hub, _| hub.restart());
        while listening.join_next().await.is_some() {}
    };
    tokio::select! {
        () = drained => {}
        () = front.switchboard.keep_time() => {}
    }
}

/// Serves plain HTTP to the operator until dropped: the numbers are wanted most while we drain.
pub async fn serve_admin(front: Arc<Front>, listeners: Vec<TcpListener>, metrics: Metrics) {
    let (_stay, never) = watch::channel(false);
    let mut listening = JoinSet::new();
    for listener in listeners {
        listening.spawn(listen_admin(Arc::clone(&front), listener, Arc::clone(&metrics), never.clone()));
    }
    while listening.join_next().await.is_some() {}
}

/// Also when whoever could say so is gone.
async fn turned_true(shutdown: &mut watch::Receiver<bool>) {
    let _ = shutdown.wait_for(|down| *down).await;
}

async fn listen_public(
    front: Arc<Front>,
    listener: TcpListener,
    acceptor: TlsAcceptor,
    shutdown: watch::Receiver<bool>,
) {
    let welcome = |stream: TcpStream, client: IpAddr| {
        let Some(permit) = front.admission.admit(clock::now().mono, client) else {
            front.counts.refused.fetch_add(1, Ordering::Relaxed);
            return None;
        };
        let visit = Visit::new(&front, &stream, client, None, shutdown.clone())?;
        Some(greet(visit, stream, acceptor.clone(), permit))
    };
    listen(&listener, shutdown.clone(), welcome).await;
}

async fn listen_admin(
    front: Arc<Front>,
    listener: TcpListener,
    metrics: Metrics,
    never: watch::Receiver<bool>,
) {
    let welcome = |stream: TcpStream, client: IpAddr| {
        let visit = Visit::new(&front, &stream, client, Some(Arc::clone(&metrics)), never.clone())?;
        Some(converse(visit, stream))
    };
    listen(&listener, never.clone(), welcome).await;
}

/// Accepts until shutdown, then waits for the connections to end.
async fn listen<F>(
    listener: &TcpListener,
    mut shutdown: watch::Receiver<bool>,
    welcome: impl Fn(TcpStream, IpAddr) -> Option<F>,
) where
    F: Future<Output = ()> + Send + 'static,
{
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            () = turned_true(&mut shutdown) => break,
            Some(_) = connections.join_next() => {}
            accepted = listener.accept() => match accepted {
                Ok((stream, client)) => {
                    if let Some(connection) = welcome(stream, client.ip()) {
                        connections.spawn(connection);
                    }
                }
                Err(error) => wait_for_descriptors(&error).await,
            },
        }
    }
    while connections.join_next().await.is_some() {}
}

/// A connection that vanished before it was accepted is nothing; out of descriptors, trying again at once would spin.
async fn wait_for_descriptors(error: &std::io::Error) {
    if error.kind() != std::io::ErrorKind::ConnectionAborted {
        warn!("cannot accept connections: {error}");
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

/// One connection and what it may see.
#[derive(Clone)]
struct Visit {
    front: Arc<Front>,
    client: IpAddr,
    /// Our address as the client reached it.
    reached: IpAddr,
    /// Only for the operator.
    metrics: Option<Metrics>,
    shutdown: watch::Receiver<bool>,
}

impl Visit {
    /// `None` when the connection is gone already.
    fn new(
        front: &Arc<Front>,
        stream: &TcpStream,
        client: IpAddr,
        metrics: Option<Metrics>,
        shutdown: watch::Receiver<bool>,
    ) -> Option<Self> {
        // Frames are small and wanted now.
        stream.set_nodelay(true).ok()?;
        let reached = stream.local_addr().ok()?.ip();
        Some(Self { front: Arc::clone(front), client, reached, metrics, shutdown })
    }
}

async fn greet(visit: Visit, stream: TcpStream, acceptor: TlsAcceptor, _permit: Permit) {
    let handshake = async {
        if speaks_plain_http(&stream).await? {
            explain_https(stream).await?;
            return Ok(None);
        }
        acceptor.accept(stream).await.map(Some)
    };
    match timeout(visit.front.patience.handshake, handshake).await {
        Ok(Ok(Some(stream))) => converse(visit, stream).await,
        Ok(Ok(None)) => {}
        Ok(Err(error)) => {
            visit.front.counts.handshakes_failed.fetch_add(1, Ordering::Relaxed);
            debug!(client = %visit.client, "TLS handshake failed: {error}");
        }
        Err(_) => {
            visit.front.counts.handshakes_failed.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// A method's first letter; TLS begins with 22.
async fn speaks_plain_http(stream: &TcpStream) -> std::io::Result<bool> {
    let mut first = [0];
    let read = stream.peek(&mut first).await?;
    Ok(read == 1 && first[0].is_ascii_uppercase())
}

async fn explain_https(mut stream: TcpStream) -> std::io::Result<()> {
    const ANSWER: &[u8] = b"HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain\r\nContent-Length: 40\r\n\
        Connection: close\r\n\r\nThis is HTTPS: begin the URL with https\n";
    stream.write_all(ANSWER).await?;
    stream.shutdown().await?;
    // Closing with unread bytes would reset the connection before the answer is read.
    tokio::io::copy(&mut stream.take(MAX_HEAD as u64), &mut tokio::io::sink()).await?;
    Ok(())
}

/// HTTP, and a WebSocket once a request asks for it.
async fn converse(visit: Visit, stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) {
    // Boxed, so that an upgraded connection does not carry HTTP's state along for the rest of its life.
    if let Some(upgrade) = Box::pin(serve_requests(&visit, stream)).await {
        websocket::serve(visit, upgrade).await;
    }
}

async fn serve_requests(
    visit: &Visit,
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
) -> Option<websocket::Upgrade> {
    let (accepted, mut upgrade) = tokio::sync::mpsc::channel(1);
    let answer = |request: hyper::Request<Incoming>| {
        let response = routes::answer(visit, request, &accepted);
        async { Ok::<Response<Full<Bytes>>, std::convert::Infallible>(response) }
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
