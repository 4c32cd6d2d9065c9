//! An allocation on the server under examination, by the published `turn` client: an opinion other than our own.

use std::{
    any::Any,
    collections::VecDeque,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use async_trait::async_trait;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf},
    net::UdpSocket,
    sync::Mutex,
    time::{sleep, timeout},
};
use turn::client::{Client, ClientConfig};
use webrtc_util::Conn;

use super::{
    any,
    https::{Server, tcp},
    ice::Servers,
    now,
};
use crate::bench::{agent::Stream, turn::Transport};

/// The largest message: a length of 16 bits behind a header of 20 bytes.
const LARGEST: usize = 20 + 65_535;

/// One allocation.
pub(super) struct Relayed {
    client: Client,
    relay: Box<dyn Conn + Send + Sync>,
    address: SocketAddr,
}

impl Relayed {
    /// # Errors
    /// What the client says of it.
    pub(super) async fn over_udp(server: SocketAddr, servers: &Servers) -> Result<Self, String> {
        let socket = UdpSocket::bind(any(server)).await.map_err(|error| error.to_string())?;
        Self::allocated(server, Arc::new(socket), servers).await
    }

    /// Over TCP, or TLS, through the proxy if there is one.
    ///
    /// # Errors
    /// What the client says of it, or why there is no connection.
    pub(super) async fn over_stream(
        host: &str,
        port: u16,
        transport: Transport,
        through: &Server,
        servers: &Servers,
    ) -> Result<Self, String> {
        let (server, local, stream) = match transport {
            Transport::Tls => through.tls(host, port, b"stun.turn").await?,
            _ => tcp(host, port).await?,
        };
        Self::allocated(server, Arc::new(Framed::new(stream, local, server)), servers).await
    }

    async fn allocated(
        server: SocketAddr,
        conn: Arc<dyn Conn + Send + Sync>,
        servers: &Servers,
    ) -> Result<Self, String> {
        let config = ClientConfig {
            stun_serv_addr: server.to_string(),
            turn_serv_addr: server.to_string(),
            username: servers.username.clone(),
            password: servers.credential.clone(),
            realm: String::new(),
            software: String::new(),
            rto_in_ms: 0,
            conn,
            vnet: None,
        };
        let client = Client::new(config).await.map_err(|error| error.to_string())?;
        client.listen().await.map_err(|error| error.to_string())?;
        let relay = client.allocate().await.map_err(|error| error.to_string())?;
        let address = relay.local_addr().map_err(|error| error.to_string())?;
        Ok(Self { client, relay: Box::new(relay), address })
    }

    /// The relayed address.
    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Sends to a peer; the client asks for the permission first.
    pub(super) async fn send(&self, packet: &[u8], peer: SocketAddr) -> Result<(), String> {
        self.relay.send_to(packet, peer).await.map(drop).map_err(|error| error.to_string())
    }

    /// The next packet from a peer, and which peer that is.
    pub(super) async fn receive(&self, buffer: &mut [u8]) -> Result<(usize, SocketAddr), String> {
        self.relay.recv_from(buffer).await.map_err(|error| error.to_string())
    }

    /// Sends so many packets to our own relayed address, so far apart. Each that is back within `last` of the last one gives
    /// the microseconds it took.
    pub(super) async fn echo(
        &self,
        packets: u32,
        apart: Duration,
        last: Duration,
    ) -> Result<Vec<u32>, String> {
        // The first brings the permission about, which would count as its round trip.
        self.send(b"permission", self.address).await?;
        let sent: Mutex<Vec<Option<Instant>>> = Mutex::new(vec![None; packets as usize]);
        let sending = async {
            for number in 0..packets {
                sent.lock().await[number as usize] = Some(now());
                // One that cannot be sent is one that is lost.
                let _ = self.send(&number.to_be_bytes(), self.address).await;
                sleep(apart).await;
            }
        };
        let mut trips = Vec::new();
        let receiving = async {
            let mut buffer = [0; 64];
            while trips.len() < packets as usize {
                let Ok((length, _)) = self.receive(&mut buffer).await else { break };
                let Ok(number) = <[u8; 4]>::try_from(&buffer[..length]) else { continue };
                if let Some(at) =
                    sent.lock().await.get_mut(u32::from_be_bytes(number) as usize).and_then(Option::take)
                {
                    trips.push(u32::try_from((now() - at).as_micros()).unwrap_or(u32::MAX));
                }
            }
        };
        let _ = timeout(apart * packets + last, async { tokio::join!(sending, receiving) }).await;
        Ok(trips)
    }

    /// Gives it back to the server.
    pub(super) async fn release(self) {
        // A server that does not answer frees it by itself.
        let _ = timeout(Duration::from_millis(500), self.relay.close()).await;
        let _ = self.client.close().await;
    }
}

/// A stream that carries messages, as the client wants it: each with its own length, ChannelData padded to four bytes
/// (RFC 8656 §12.5).
struct Framed {
    reading: Mutex<Reading>,
    writing: Mutex<WriteHalf<Box<dyn Stream>>>,
    local: SocketAddr,
    server: SocketAddr,
}

struct Reading {
    stream: ReadHalf<Box<dyn Stream>>,
    /// What came behind the message before.
    held: VecDeque<u8>,
}

impl Framed {
    fn new(stream: Box<dyn Stream>, local: SocketAddr, server: SocketAddr) -> Self {
        let (stream, writing) = tokio::io::split(stream);
        let reading = Reading { stream, held: VecDeque::new() };
        Self { reading: Mutex::new(reading), writing: Mutex::new(writing), local, server }
    }
}

/// The length of the message that begins so, and with its padding.
fn lengths(head: [u8; 4]) -> (usize, usize) {
    let length = usize::from(u16::from_be_bytes([head[2], head[3]]));
    if head[0] >= 0x40 { (4 + length, 4 + length.next_multiple_of(4)) } else { (20 + length, 20 + length) }
}

#[async_trait]
impl Conn for Framed {
    async fn connect(&self, _: SocketAddr) -> webrtc_util::Result<()> {
        Ok(())
    }

    async fn recv(&self, buffer: &mut [u8]) -> webrtc_util::Result<usize> {
        let mut reading = self.reading.lock().await;
        let Reading { stream, held } = &mut *reading;
        loop {
            if held.len() >= 4 {
                let (length, padded) = lengths([held[0], held[1], held[2], held[3]]);
                if held.len() >= padded {
                    let whole: Vec<u8> = held.drain(..padded).take(length).collect();
                    let fits = whole.len().min(buffer.len());
                    buffer[..fits].copy_from_slice(&whole[..fits]);
                    return Ok(fits);
                }
            }
            let mut piece = [0; 4_096];
            let read = stream.read(&mut piece).await?;
            if read == 0 || held.len() + read > LARGEST + piece.len() {
                return Err(std::io::Error::from(std::io::ErrorKind::UnexpectedEof).into());
            }
            held.extend(&piece[..read]);
        }
    }

    async fn recv_from(&self, buffer: &mut [u8]) -> webrtc_util::Result<(usize, SocketAddr)> {
        Ok((self.recv(buffer).await?, self.server))
    }

    async fn send(&self, message: &[u8]) -> webrtc_util::Result<usize> {
        let padding = [0; 3];
        let missing = message.len().next_multiple_of(4) - message.len();
        let mut writing = self.writing.lock().await;
        writing.write_all(message).await?;
        writing.write_all(&padding[..missing]).await?;
        writing.flush().await?;
        Ok(message.len())
    }

    async fn send_to(&self, message: &[u8], _: SocketAddr) -> webrtc_util::Result<usize> {
        self.send(message).await
    }

    fn local_addr(&self) -> webrtc_util::Result<SocketAddr> {
        Ok(self.local)
    }

    fn remote_addr(&self) -> Option<SocketAddr> {
        Some(self.server)
    }

    async fn close(&self) -> webrtc_util::Result<()> {
        Ok(self.writing.lock().await.shutdown().await?)
    }

    fn as_any(&self) -> &(dyn Any + Send + Sync) {
        self
    }
}
