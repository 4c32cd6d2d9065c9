//! The front door for TCP: who gets in, and which service a connection is for.
//!
//! Every port takes TLS and bare STUN alike and tells them apart by the first byte. Behind TLS, ALPN tells a relay client
//! from a web client (RFC 7443); where a client offers none, its first bytes do. So one port, 443, is enough for all.

use std::{
    future::Future,
    io,
    net::{IpAddr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use rustls::{ServerConfig, ServerConnection};
use socket2::{SockRef, TcpKeepalive};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::watch,
    task::JoinSet,
    time::timeout,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tracing::{debug, warn};

use crate::{clock, config, tls};

pub mod admission; // connections and handshakes per address

use admission::{Admission, Permit};

/// For a TLS handshake, and once more for the first bytes behind it.
pub const HANDSHAKE: Duration = Duration::from_secs(10);
/// Who takes nothing of what it is sent for so long, or does not answer the kernel's questions, is gone (RFC 9293 §3.8.3).
const UNANSWERED: Duration = Duration::from_secs(30);
/// A connection without a packet for so long is asked whether it still is there.
const QUIET: Duration = Duration::from_secs(60);
/// Bytes read from who speaks HTTP without TLS, so that it reads our answer.
const PLAIN_HTTP: u64 = 16 * 1024;

/// Who gets in, and as what.
pub struct Door {
    admission: Admission,
    acceptor: TlsAcceptor,
    handshake: Duration,
    handshakes: AtomicU64,
    handshakes_failed: AtomicU64,
    refused: AtomicU64,
}

/// Which services are behind a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Services {
    /// HTTPS, WSS and the relay.
    All,
    /// The relay alone.
    Relay,
}

/// A connection and what it is for.
pub enum Guest {
    /// HTTPS or WSS.
    Web(Box<WebClient>),
    /// STUN and TURN.
    Relay(RelayClient),
}

/// A connection that speaks HTTP.
pub struct WebClient {
    /// The handshake is over.
    pub stream: TlsStream<TcpStream>,
    /// HTTP/2 was agreed on.
    pub h2: bool,
    /// Its place.
    pub permit: Permit,
}

/// A connection that speaks STUN.
pub struct RelayClient {
    /// Not blocking.
    pub socket: std::net::TcpStream,
    /// The session, which may hold bytes that were read with the handshake; `None` without TLS.
    pub tls: Option<Box<ServerConnection>>,
    /// Whose it is.
    pub client: SocketAddr,
    /// Our address as the client reached it.
    pub server: SocketAddr,
    /// Its place.
    pub permit: Permit,
}

/// Takes relay clients.
pub type ToRelay = Arc<dyn Fn(RelayClient) + Send + Sync>;

/// What has happened at the door.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Connections open now, whatever they are for.
    pub connections: usize,
    /// Connections closed at once: too many, or too fast.
    pub refused: u64,
    /// TLS handshakes that succeeded.
    pub handshakes: u64,
    /// Connections that spoke nothing we know, or took too long to.
    pub handshakes_failed: u64,
}

impl Door {
    /// `handshake` is [`HANDSHAKE`] but for tests.
    #[must_use]
    pub fn new(admission: Admission, tls: Arc<ServerConfig>, handshake: Duration) -> Arc<Self> {
        Arc::new(Self {
            admission,
            acceptor: TlsAcceptor::from(tls),
            handshake,
            handshakes: AtomicU64::new(0),
            handshakes_failed: AtomicU64::new(0),
            refused: AtomicU64::new(0),
        })
    }

    /// The counts, now.
    #[must_use]
    pub fn counters(&self) -> Counters {
        Counters {
            connections: self.admission.open(),
            refused: self.refused.load(Relaxed),
            handshakes: self.handshakes.load(Relaxed),
            handshakes_failed: self.handshakes_failed.load(Relaxed),
        }
    }

    /// Other limits from now on, as [`Admission::adopt`].
    pub fn adopt(&self, config: &config::Http, connections: usize) {
        self.admission.adopt(config, connections);
    }

    /// A place for one more connection from `ip`; `None` where it is one too many.
    pub fn admit(&self, ip: IpAddr) -> Option<Permit> {
        let permit = self.admission.admit(clock::now().mono, ip);
        if permit.is_none() {
            self.refused.fetch_add(1, Relaxed);
        }
        permit
    }

    /// Finds out what a connection is for. `None`: for nothing that is behind this port; it is closed.
    pub async fn open(&self, stream: TcpStream, permit: Permit, services: Services) -> Option<Guest> {
        let client = stream.peer_addr().ok()?;
        find_out_who_vanishes(&stream).ok()?;
        let guest = match self.tell(stream, permit).await {
            Ok(guest) => guest?,
            Err(error) => {
                self.handshakes_failed.fetch_add(1, Relaxed);
                debug!(%client, "not let in: {error}");
                return None;
            }
        };
        let served = services == Services::All || matches!(guest, Guest::Relay(_));
        served.then_some(guest)
    }

    async fn tell(&self, stream: TcpStream, permit: Permit) -> io::Result<Option<Guest>> {
        // Frames and relayed packets are small and wanted now.
        stream.set_nodelay(true)?;
        match self.in_time(first_byte(&stream)).await? {
            None => Ok(None),
            Some(TLS) => self.tell_behind_tls(stream, permit).await,
            Some(first) if is_stun(first) => {
                RelayClient::new(stream, None, permit).map(|client| Some(Guest::Relay(client)))
            }
            Some(b'A'..=b'Z') => self.in_time(explain_https(stream)).await.map(|()| None),
            Some(_) => Err(io::Error::other("neither TLS nor STUN")),
        }
    }

    async fn tell_behind_tls(&self, stream: TcpStream, permit: Permit) -> io::Result<Option<Guest>> {
        let mut stream = self.in_time(self.acceptor.accept(stream)).await?;
        self.handshakes.fetch_add(1, Relaxed);
        let protocol = stream.get_ref().1.alpn_protocol().map(<[u8]>::to_vec);
        if protocol.as_deref() == Some(tls::ALPN_ACME) {
            // The handshake was all that an authority wanted (RFC 8737 §3).
            return Ok(None);
        }
        let for_relay = match protocol.as_deref() {
            Some(protocol) => tls::ALPN_RELAY.contains(&protocol),
            None => match self.in_time(stream.fill_buf()).await?.first() {
                Some(first) => is_stun(*first),
                None => return Ok(None),
            },
        };
        if for_relay {
            let (stream, session) = stream.into_inner();
            let client = RelayClient::new(stream, Some(Box::new(session)), permit)?;
            return Ok(Some(Guest::Relay(client)));
        }
        let h2 = protocol.as_deref() == Some(tls::ALPN_H2);
        Ok(Some(Guest::Web(Box::new(WebClient { stream, h2, permit }))))
    }

    async fn in_time<T>(&self, what: impl Future<Output = io::Result<T>>) -> io::Result<T> {
        timeout(self.handshake, what).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
    }
}

impl RelayClient {
    fn new(stream: TcpStream, tls: Option<Box<ServerConnection>>, permit: Permit) -> io::Result<Self> {
        let (client, server) = (canonical(stream.peer_addr()?), canonical(stream.local_addr()?));
        Ok(Self { socket: stream.into_std()?, tls, client, server, permit })
    }
}

/// Whether or not it is being sent anything.
fn find_out_who_vanishes(stream: &TcpStream) -> io::Result<()> {
    let options = SockRef::from(stream);
    options.set_tcp_user_timeout(Some(UNANSWERED))?;
    options.set_tcp_keepalive(&TcpKeepalive::new().with_time(QUIET).with_interval(UNANSWERED / 3))
}

/// IPv4 is never in its IPv6-mapped form.
fn canonical(address: SocketAddr) -> SocketAddr {
    match address.ip().to_canonical() {
        IpAddr::V4(ip) => (ip, address.port()).into(),
        IpAddr::V6(_) => address,
    }
}

/// A TLS record with a handshake message in it.
const TLS: u8 = 22;

/// The two highest bits of a STUN message are 0 (RFC 8489 §5); what follows them is a method that is in use.
fn is_stun(first: u8) -> bool {
    first <= 1
}

/// `None` when the client has gone.
async fn first_byte(stream: &TcpStream) -> io::Result<Option<u8>> {
    let mut first = [0];
    let read = stream.peek(&mut first).await?;
    Ok((read == 1).then_some(first[0]))
}

async fn explain_https(mut stream: TcpStream) -> io::Result<()> {
    const ANSWER: &[u8] = b"HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain\r\nContent-Length: 40\r\n\
        Connection: close\r\n\r\nThis is HTTPS: begin the URL with https\n";
    stream.write_all(ANSWER).await?;
    stream.shutdown().await?;
    // Closing with unread bytes would reset the connection before the answer is read.
    tokio::io::copy(&mut stream.take(PLAIN_HTTP), &mut tokio::io::sink()).await?;
    Ok(())
}

/// Lets relay clients in at ports of their own until `shutdown` turns true.
pub async fn serve_relay(
    door: Arc<Door>,
    listeners: Vec<TcpListener>,
    to_relay: ToRelay,
    shutdown: watch::Receiver<bool>,
) {
    let mut listening = JoinSet::new();
    for listener in listeners {
        let (door, to_relay, shutdown) = (Arc::clone(&door), Arc::clone(&to_relay), shutdown.clone());
        listening.spawn(async move {
            let welcome = |stream: TcpStream, client: IpAddr| {
                let permit = door.admit(client)?;
                let (door, to_relay) = (Arc::clone(&door), Arc::clone(&to_relay));
                Some(async move {
                    if let Some(Guest::Relay(client)) = door.open(stream, permit, Services::Relay).await {
                        to_relay(client);
                    }
                })
            };
            listen(&listener, shutdown, welcome).await;
        });
    }
    while listening.join_next().await.is_some() {}
}

/// Accepts until `shutdown` turns true, then waits for the connections to end.
pub async fn listen<F>(
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

/// Also when whoever could say so is gone.
pub async fn turned_true(shutdown: &mut watch::Receiver<bool>) {
    let _ = shutdown.wait_for(|down| *down).await;
}

/// A connection that vanished before it was accepted is nothing; out of descriptors, trying again at once would spin.
async fn wait_for_descriptors(error: &io::Error) {
    if error.kind() != io::ErrorKind::ConnectionAborted {
        warn!("cannot accept connections: {error}");
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}
