//! The sockets that the outside reaches: bound here, or handed over by who started us.

use std::{
    io,
    net::{SocketAddr, TcpListener, UdpSocket},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use socket2::{Domain, Protocol, Socket, Type};
use tokio::net;

use crate::{config::Config, host::cannot_listen, relay};

/// All of them. Who serves them has copies: these are for whoever comes after us.
pub(super) struct Listeners {
    /// HTTPS, WSS, and TURN beside them.
    pub(super) https: Vec<TcpListener>,
    /// TURN over TCP, where HTTPS is not.
    pub(super) turn: Vec<TcpListener>,
    /// More ports for TURN over TLS.
    pub(super) tls: Vec<TcpListener>,
    /// Where an authority asks over plain HTTP.
    pub(super) acme: Vec<TcpListener>,
    /// The operator's.
    pub(super) admin: Vec<TcpListener>,
    /// STUN and TURN over UDP: of each address a socket for each shard.
    datagrams: Vec<Vec<UdpSocket>>,
}

/// Where the kernel chooses the port, the one that is free for UDP may be taken for TCP: then another is asked for.
const TRIES: usize = 8;

impl Listeners {
    /// Takes what was `handed` over where it fits the configuration, and binds the rest.
    ///
    /// # Errors
    /// One line that names the address and what is wrong with it.
    pub(super) fn open(config: &Config, mut handed: Handed) -> Result<Self, String> {
        let https = streams(&mut handed, &config.http.listen, "HTTPS", "--http-listen")?;
        let tls = streams(&mut handed, &config.turn.tls_listen, "TURN over TLS", "turn.tls_listen")?;
        let admin = streams(&mut handed, &config.admin.listen, "the operator (/metrics)", "admin.listen")?;
        let acme_at: Vec<_> = config.http.acme.iter().map(|acme| acme.http_listen).collect();
        let acme = streams(&mut handed, &acme_at, "certificates", "http.acme.http_listen")?;
        let (mut turn, mut datagrams) = (Vec::new(), Vec::new());
        for at in &config.turn.listen {
            let (sockets, stream) = turn_at(&mut handed, *at, config, &https)?;
            datagrams.push(sockets);
            turn.extend(stream);
        }
        for at in handed.left() {
            tracing::warn!("{at} was handed over, and is in no listen setting: it is closed");
        }
        Ok(Self { https, turn, tls, acme, admin, datagrams })
    }

    /// For whoever comes after us: of one address in the order of its shards.
    pub(super) fn all(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let Self { https, turn, tls, acme, admin, datagrams } = self;
        let streams = [https, turn, tls, acme, admin].into_iter().flatten().map(AsFd::as_fd);
        streams.chain(datagrams.iter().flatten().map(AsFd::as_fd))
    }

    /// Where something listens that is not TURN's own.
    pub(super) fn others_than_turn(&self) -> Vec<SocketAddr> {
        [&self.https, &self.admin, &self.tls, &self.acme]
            .into_iter()
            .flat_map(|listeners| addresses(listeners))
            .collect()
    }

    /// For tokio to accept from: HTTPS, the operator's, those for the relay alone, and an authority's.
    pub(super) fn streams(&self) -> io::Result<[Vec<net::TcpListener>; 4]> {
        let relay_alone = self.turn.iter().chain(&self.tls);
        Ok([copies(&self.https)?, copies(&self.admin)?, copies(relay_alone)?, copies(&self.acme)?])
    }

    /// For the relay to read: of each address a socket for each shard.
    pub(super) fn datagrams(&self) -> io::Result<Vec<Vec<UdpSocket>>> {
        self.datagrams.iter().map(|each| each.iter().map(UdpSocket::try_clone).collect()).collect()
    }
}

/// STUN and TURN at one address: over UDP, and over TCP, unless HTTPS is there and serves both.
fn turn_at(
    handed: &mut Handed,
    at: SocketAddr,
    config: &Config,
    https: &[TcpListener],
) -> Result<(Vec<UdpSocket>, Option<TcpListener>), String> {
    let https_at = addresses(https);
    let mut tries = if at.port() == 0 { TRIES } else { 1 };
    loop {
        let given = handed.datagrams(at);
        let bound = if given.is_empty() { relay::bind(at, shards(config)) } else { relay::adopt(given) };
        let sockets = bound.map_err(|error| cannot_listen("TURN over UDP", at, "--turn-listen", &error))?;
        let really_at = sockets[0].local_addr().unwrap_or(at);
        if https_at.contains(&really_at) {
            return Ok((sockets, None));
        }
        tries -= 1;
        match stream(handed, really_at) {
            Ok(listener) => return Ok((sockets, Some(listener))),
            Err(error) if tries == 0 => {
                return Err(cannot_listen("TURN over TCP", really_at, "--turn-listen", &error));
            }
            Err(_) => {}
        }
    }
}

/// One for each core, or as configured; fewer where there are few ports.
fn shards(config: &Config) -> usize {
    config.turn.shards.clamp(1, config.turn.relay_ports.len().div_ceil(relay::PORTS_PER_SHARD))
}

fn streams(
    handed: &mut Handed,
    listen: &[SocketAddr],
    what: &str,
    setting: &str,
) -> Result<Vec<TcpListener>, String> {
    let open =
        |at: &SocketAddr| stream(handed, *at).map_err(|error| cannot_listen(what, *at, setting, &error));
    listen.iter().map(open).collect()
}

fn stream(handed: &mut Handed, at: SocketAddr) -> io::Result<TcpListener> {
    handed.stream(at).map_or_else(|| bind(at), Ok)
}

fn bind(at: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(at), Type::STREAM, Some(Protocol::TCP))?;
    if at.is_ipv6() {
        // `[::]` is for both families, as everywhere in the configuration.
        socket.set_only_v6(!at.ip().is_unspecified())?;
    }
    // A restart must not wait for the last connections' TIME_WAIT.
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&at.into())?;
    socket.listen(1_024)?;
    Ok(socket.into())
}

/// Where they are.
pub(super) fn addresses(listeners: &[TcpListener]) -> Vec<SocketAddr> {
    listeners.iter().filter_map(|listener| listener.local_addr().ok()).collect()
}

fn copies<'a>(listeners: impl IntoIterator<Item = &'a TcpListener>) -> io::Result<Vec<net::TcpListener>> {
    listeners.into_iter().map(|listener| net::TcpListener::from_std(listener.try_clone()?)).collect()
}

/// Sockets that somebody else has bound for us. Where they are says what they are for.
#[derive(Default)]
pub(super) struct Handed {
    streams: Vec<(SocketAddr, TcpListener)>,
    datagrams: Vec<(SocketAddr, UdpSocket)>,
}

impl Handed {
    /// # Errors
    /// When one of them is no listener for TCP or UDP.
    pub(super) fn new(sockets: Vec<OwnedFd>) -> Result<Self, String> {
        let mut handed = Self::default();
        for socket in sockets {
            handed.take_in(socket.into()).map_err(|error| {
                format!("a socket that was handed over is of no use: {error} (see Listen… in halfway.socket)")
            })?;
        }
        Ok(handed)
    }

    fn take_in(&mut self, socket: Socket) -> io::Result<()> {
        let at = socket.local_addr()?.as_socket().ok_or_else(|| io::Error::other("it has no IP address"))?;
        socket.set_nonblocking(true)?;
        match socket.r#type()? {
            Type::STREAM => self.streams.push((at, socket.into())),
            Type::DGRAM => self.datagrams.push((at, socket.into())),
            _ => return Err(io::Error::other("it is neither TCP nor UDP")),
        }
        Ok(())
    }

    fn stream(&mut self, wanted: SocketAddr) -> Option<TcpListener> {
        let index = self.streams.iter().position(|(at, _)| is_at(*at, wanted))?;
        Some(self.streams.swap_remove(index).1)
    }

    /// All that share the address of the first that fits.
    fn datagrams(&mut self, wanted: SocketAddr) -> Vec<UdpSocket> {
        let Some(first) = self.datagrams.iter().map(|(at, _)| *at).find(|at| is_at(*at, wanted)) else {
            return Vec::new();
        };
        let (fitting, rest) = self.datagrams.drain(..).partition::<Vec<_>, _>(|(at, _)| *at == first);
        self.datagrams = rest;
        fitting.into_iter().map(|(_, socket)| socket).collect()
    }

    /// Those that nobody wanted.
    fn left(&self) -> impl Iterator<Item = SocketAddr> + '_ {
        let datagrams = self.datagrams.iter().map(|(at, _)| *at);
        self.streams.iter().map(|(at, _)| *at).chain(datagrams)
    }
}

/// Whether a socket at `at` serves `wanted`, whose port may be for others to choose, and whose address any.
fn is_at(at: SocketAddr, wanted: SocketAddr) -> bool {
    let same_ip = at.ip() == wanted.ip() || (at.ip().is_unspecified() && wanted.ip().is_unspecified());
    same_ip && (wanted.port() == 0 || at.port() == wanted.port())
}

#[cfg(test)]
mod tests {
    use super::{Handed, is_at};

    #[test]
    fn what_is_handed_over_is_told_by_where_it_is() {
        let at = |text: &str| text.parse().unwrap();
        assert!(
            is_at(at("[::]:443"), at("0.0.0.0:443")),
            "where IPv6 is off, any address is any IPv4 address"
        );
        assert!(is_at(at("127.0.0.1:40000"), at("127.0.0.1:0")));
        assert!(!is_at(at("[::]:443"), at("[::]:8443")));
        assert!(!is_at(at("[::]:443"), at("127.0.0.1:443")), "that would be open to more than was asked for");
    }

    #[test]
    fn all_sockets_of_an_address_go_together_and_the_rest_is_left() {
        let first = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let other = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let (first_at, other_at) = (first.local_addr().unwrap(), other.local_addr().unwrap());
        let sockets = vec![first.try_clone().unwrap().into(), other.into(), first.into()];
        let mut handed = Handed::new(sockets).unwrap();
        assert_eq!(handed.datagrams(first_at).len(), 2);
        assert!(handed.datagrams(first_at).is_empty() && handed.stream(other_at).is_none());
        assert_eq!(handed.left().collect::<Vec<_>>(), [other_at]);
    }

    #[test]
    fn what_is_no_listener_is_refused() {
        let file = std::fs::File::open("/dev/null").unwrap();
        assert!(Handed::new(vec![file.into()]).is_err());
        let (unix, _) = std::os::unix::net::UnixDatagram::pair().unwrap();
        assert!(Handed::new(vec![unix.into()]).is_err());
    }
}
