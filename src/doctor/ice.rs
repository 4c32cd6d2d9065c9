//! The list of STUN and TURN servers that the server gives an agent (`GET /v1/ice`).

use std::net::SocketAddr;

use hyper::StatusCode;
use serde::Deserialize;
use tokio::net::lookup_host;

use super::{Check, Visit, https::Server, now};
use crate::bench::turn::{Transport, Uri};

/// What an agent would be configured with.
pub(super) struct Servers {
    pub(super) username: String,
    pub(super) credential: String,
    turn: Vec<Uri>,
    /// Addresses of the STUN server: one of each family at most.
    stun: Vec<SocketAddr>,
    udp: Vec<SocketAddr>,
}

#[derive(Deserialize)]
struct Body {
    #[serde(rename = "iceServers")]
    servers: Vec<Listed>,
}

#[derive(Deserialize)]
struct Listed {
    urls: Vec<String>,
    #[serde(default)]
    username: String,
    #[serde(default)]
    credential: String,
}

impl Servers {
    async fn read(body: &[u8]) -> Result<Self, String> {
        let body: Body = serde_json::from_slice(body).map_err(|error| error.to_string())?;
        let mut found = Self {
            username: String::new(),
            credential: String::new(),
            turn: Vec::new(),
            stun: Vec::new(),
            udp: Vec::new(),
        };
        for listed in body.servers {
            for url in &listed.urls {
                if let Some(place) = url.strip_prefix("stun:") {
                    let uri: Uri = format!("turn:{place}").parse()?;
                    found.stun.extend(addresses(&uri).await);
                } else {
                    found.turn.push(url.parse()?);
                }
            }
            if !listed.username.is_empty() {
                (found.username, found.credential) = (listed.username, listed.credential);
            }
        }
        if let Some(uri) = found.turn.iter().find(|uri| uri.transport == Transport::Udp) {
            found.udp = addresses(uri).await;
        }
        Ok(found)
    }

    pub(super) fn stun(&self) -> impl Iterator<Item = SocketAddr> {
        self.stun.iter().copied()
    }

    /// Addresses of the TURN server over UDP: one of each family at most.
    pub(super) fn over_udp(&self) -> impl Iterator<Item = SocketAddr> {
        self.udp.iter().copied()
    }

    /// Host and port of the first that is reached so.
    pub(super) fn first(&self, transport: Transport) -> Option<(String, u16)> {
        let uri = self.turn.iter().find(|uri| uri.transport == transport)?;
        Some((uri.host.clone(), uri.port))
    }

    /// What the list names, for people.
    fn summary(&self) -> String {
        let mut ways: Vec<_> = self.turn.iter().map(|uri| uri.transport.name()).collect();
        ways.dedup();
        format!("TURN over {}", ways.join(", "))
    }
}

/// One of each family that this host has a way to.
pub(super) async fn addresses(uri: &Uri) -> Vec<SocketAddr> {
    let Ok(found) = lookup_host((&*uri.host, uri.port)).await else {
        return Vec::new();
    };
    let found: Vec<_> = found.collect();
    let first = |ipv4| found.iter().copied().find(|address| address.is_ipv4() == ipv4);
    [first(true), first(false)].into_iter().flatten().filter(|address| has_way(*address)).collect()
}

/// Connecting a datagram socket asks the routes and sends nothing.
fn has_way(to: SocketAddr) -> bool {
    let socket = std::net::UdpSocket::bind(super::any(to));
    socket.is_ok_and(|socket| socket.connect(to).is_ok())
}

/// Asks for the list.
pub(super) async fn asked(server: &Server, visit: &Visit, checks: &mut Vec<Check>) -> Option<Servers> {
    let started = now();
    let check = match server.get("/v1/ice", Some(&visit.token)).await {
        Ok((StatusCode::OK, body)) => match Servers::read(&body).await {
            Ok(servers) => {
                checks.push(
                    Check::ok("ice", format!("credentials for {}", servers.summary())).after(now() - started),
                );
                return Some(servers);
            }
            Err(problem) => {
                Check::fail("ice", format!("the list cannot be read: {problem}"), "is this Halfway?")
            }
        },
        Ok((StatusCode::UNAUTHORIZED, _)) => {
            let advice = "make one on the server: halfway token AGENT; this one is expired, revoked, or another server's";
            Check::fail("ice", "the server refuses the token", advice)
        }
        Ok((StatusCode::FORBIDDEN, _)) => Check::fail(
            "ice",
            "the token is not for ICE",
            "make one with the scope: halfway token AGENT --scope signal,ice",
        ),
        Ok((status, _)) => {
            Check::fail("ice", format!("GET /v1/ice answers {status}"), "is this Halfway, and is it ready?")
        }
        Err(problem) => Check::fail("ice", problem, "look at the server's log"),
    };
    checks.push(check);
    None
}
