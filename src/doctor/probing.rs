//! What a NAT does with packets, found out with one server and an allocation on it (RFC 4787, RFC 5780 in spirit).
//!
//! RFC 5780 wants a server at two addresses. A relay does as well: whatever is sent to a relayed address is handed to us with
//! the address it came from, and the relay writes to whom we say, from a port that a socket here never wrote to.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use stun::{
    agent::TransactionId,
    message::{BINDING_REQUEST, Getter, Message},
    xoraddr::XorMappedAddress,
};
use tokio::{net::UdpSocket, time::timeout};

use crate::bench::turn::Uri;

use super::{
    any, hops,
    ice::{Servers, addresses},
    ipv6::Relayed6,
    nat::Seen,
    relayed::Relayed,
};

/// How often a packet is sent that may be lost, and how long each is waited for.
const TRIES: u32 = 4;
const WAIT: Duration = Duration::from_millis(200);
const KNOCK: &[u8] = b"knock";

/// Nobody lives at these addresses (RFC 5737, RFC 6666): what is written to them opens a mapping and reaches no one.
const NOBODY_V4: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(198, 51, 100, 1)), 9);
const NOBODY_V6: SocketAddr = SocketAddr::new(IpAddr::V6(Ipv6Addr::new(0x100, 0, 0, 0, 0, 0, 0, 1)), 9);

/// As whom a fresh socket is seen by a STUN server.
///
/// # Errors
/// Why there is no answer.
pub(super) async fn mapped(server: SocketAddr) -> Result<SocketAddr, String> {
    Probe::new(server).await?.ask(server).await
}

/// As whom we are seen, and nothing more: without a relay there is nobody else to ask.
pub(super) async fn mapping(server: SocketAddr, seen: &mut Seen) {
    if let Ok(probe) = Probe::new(server).await
        && let Ok(mapped) = probe.ask(server).await
    {
        (seen.local, seen.mapped) = (Some(probe.local), Some(mapped));
    }
}

/// All that one server can show of the NAT in front of us. `second` is another STUN server, at another address.
pub(super) async fn observe(
    server: SocketAddr,
    servers: &Servers,
    relayed: &Relayed,
    second: Option<&str>,
    seen: &mut Seen,
) {
    let (Ok(one), Ok(other)) = (Probe::new(server).await, Probe::new(server).await) else { return };
    let (Ok(mapped), Ok(others)) = (one.ask(server).await, other.ask(server).await) else { return };
    (seen.local, seen.mapped) = (Some(one.local), Some(mapped));
    seen.keeps_ports = Some(mapped.port() == one.local.port() && others.port() == other.local.port());
    if mapped.ip() == relayed.address().ip() {
        // The relay is on this very host, and writes to none of its ports but relayed ones.
    } else if mapped.is_ipv4() == relayed.address().is_ipv4() {
        // Before it has ever written to the relayed address.
        seen.lets_in_other_ports = one.is_reached(async || relayed.send(KNOCK, mapped).await).await;
        if seen.lets_in_other_ports == Some(true) {
            seen.lets_in_strangers = lets_in_strangers(server, relayed, second, seen).await;
        }
    } else if mapped == one.local {
        seen.lets_in_other_ports = is_reached_over_ipv6(&one, server, servers).await;
        if seen.lets_in_other_ports == Some(true) {
            // Without a NAT, a socket that never wrote to anybody has its address all the same.
            seen.lets_in_strangers = match Probe::new(server).await {
                Ok(fresh) => is_reached_over_ipv6(&fresh, server, servers).await,
                Err(_) => None,
            };
        }
    }
    let has_outer = mapped != one.local && mapped.is_ipv4() == one.local.is_ipv4();
    let hairpin = async { if has_outer { Some(meet(&one, mapped, &other, others).await) } else { None } };
    (seen.mapped_elsewhere, seen.hairpin, seen.behind_another) =
        tokio::join!(mapped_elsewhere(&one, relayed), hairpin, hops::behind_another(server));
}

/// Whether a packet gets in from an address that a socket never wrote to; none if there is no way to find out.
async fn lets_in_strangers(
    server: SocketAddr,
    relayed: &Relayed,
    second: Option<&str>,
    seen: &Seen,
) -> Option<bool> {
    if relayed.address().ip() != server.ip() {
        // That is such an address already.
        return Some(true);
    }
    let fresh = Probe::new(server).await.ok()?;
    let at = match second {
        Some(second) => {
            // At the same address it is no other.
            let second = resolved(second, server).await.filter(|second| second.ip() != server.ip())?;
            fresh.ask(second).await.ok()?
        }
        None if seen.keeps_ports? => {
            let nobody = if server.is_ipv4() { NOBODY_V4 } else { NOBODY_V6 };
            // Where there is no NAT, there is no mapping to open: an error is as good.
            let _ = fresh.socket.send_to(b"halfway", nobody).await;
            SocketAddr::new(seen.mapped?.ip(), fresh.local.port())
        }
        None => return None,
    };
    fresh.is_reached(async || relayed.send(KNOCK, at).await).await
}

async fn is_reached_over_ipv6(probe: &Probe, server: SocketAddr, servers: &Servers) -> Option<bool> {
    let relayed = Relayed6::to(probe.local, server, servers).await.ok()?;
    let reached = probe.is_reached(async || relayed.send(KNOCK).await).await;
    relayed.release().await;
    reached
}

async fn resolved(server: &str, like: SocketAddr) -> Option<SocketAddr> {
    let uri: Uri = format!("turn:{server}").parse().ok()?;
    addresses(&uri).await.into_iter().find(|address| address.is_ipv4() == like.is_ipv4())
}

/// As whom the relay sees a socket; that is another port of the server.
async fn mapped_elsewhere(probe: &Probe, relayed: &Relayed) -> Option<SocketAddr> {
    let packet = probe.local.port().to_be_bytes();
    let mut buffer = [0; 64];
    for _ in 0..TRIES {
        probe.socket.send_to(&packet, relayed.address()).await.ok()?;
        let heard = timeout(WAIT, async {
            loop {
                match relayed.receive(&mut buffer).await {
                    Ok((length, from)) if buffer[..length] == packet => break Some(from),
                    Ok(_) => {}
                    Err(_) => break None,
                }
            }
        });
        if let Ok(from) = heard.await {
            return from;
        }
    }
    None
}

/// Whether two sockets here meet by the addresses that the server sees.
async fn meet(one: &Probe, ones: SocketAddr, other: &Probe, others: SocketAddr) -> bool {
    for _ in 0..TRIES {
        // Where packets for those addresses cannot even be sent, they do not meet.
        let _ = one.socket.send_to(b"one", others).await;
        let _ = other.socket.send_to(b"other", ones).await;
        if tokio::select! { met = one.hears(b"other") => met, met = other.hears(b"one") => met } {
            return true;
        }
    }
    false
}

/// A socket here.
struct Probe {
    socket: UdpSocket,
    local: SocketAddr,
}

impl Probe {
    async fn new(server: SocketAddr) -> Result<Self, String> {
        let socket = UdpSocket::bind(any(server)).await.map_err(|error| error.to_string())?;
        let port = socket.local_addr().map_err(|error| error.to_string())?.port();
        // By which of our addresses packets leave; nothing is sent for that.
        let leaving = UdpSocket::bind(any(server)).await.map_err(|error| error.to_string())?;
        leaving.connect(server).await.map_err(|error| error.to_string())?;
        let local = leaving.local_addr().map_err(|error| error.to_string())?.ip();
        Ok(Self { socket, local: SocketAddr::new(local, port) })
    }

    /// As whom the server sees it.
    async fn ask(&self, server: SocketAddr) -> Result<SocketAddr, String> {
        let mut request = Message::new();
        request
            .build(&[Box::<TransactionId>::default(), Box::new(BINDING_REQUEST)])
            .map_err(|error| error.to_string())?;
        let mut buffer = [0; 1_024];
        for _ in 0..TRIES {
            self.socket.send_to(&request.raw, server).await.map_err(|error| error.to_string())?;
            while let Ok(Ok((length, _))) = timeout(WAIT * 2, self.socket.recv_from(&mut buffer)).await {
                let mut answer = Message::new();
                answer.raw = buffer[..length].to_vec();
                if answer.decode().is_ok() && answer.transaction_id == request.transaction_id {
                    let mut mapped = XorMappedAddress::default();
                    mapped
                        .get_from(&answer)
                        .map_err(|error| format!("no mapped address in the answer: {error}"))?;
                    return Ok(SocketAddr::new(mapped.ip, mapped.port));
                }
            }
        }
        Err(format!("no answer to {TRIES} requests"))
    }

    /// Whether packets that the relay sends to it come in; none if the relay does not send there.
    async fn is_reached(&self, knock: impl AsyncFn() -> Result<(), String>) -> Option<bool> {
        for _ in 0..TRIES {
            knock().await.ok()?;
            if self.hears(KNOCK).await {
                return Some(true);
            }
        }
        Some(false)
    }

    async fn hears(&self, packet: &[u8]) -> bool {
        let mut buffer = [0; 64];
        let heard = async {
            loop {
                match self.socket.recv_from(&mut buffer).await {
                    Ok((length, _)) if buffer[..length] == *packet => break,
                    // Another's, or an error that an earlier packet brought about.
                    _ => {}
                }
            }
        };
        timeout(WAIT, heard).await.is_ok()
    }
}
