//! The server under load, by its URI (RFC 7065).

use std::{
    fmt,
    net::{SocketAddr, ToSocketAddrs},
    str::FromStr,
};

/// What carries the messages between clients and server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    Udp,
    Tcp,
    Tls,
}

impl Transport {
    /// As people call it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Udp => "UDP",
            Self::Tcp => "TCP",
            Self::Tls => "TLS",
        }
    }
}

/// Where clients go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Uri {
    pub host: String,
    pub port: u16,
    pub transport: Transport,
}

impl FromStr for Uri {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (scheme, rest) = text.split_once(':').unwrap_or_default();
        let (place, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (transport, default) = match (scheme.to_ascii_lowercase().as_str(), query) {
            ("turn", "" | "transport=udp") => (Transport::Udp, 3478),
            ("turn", "transport=tcp") => (Transport::Tcp, 3478),
            ("turns", "" | "transport=tcp") => (Transport::Tls, 5349),
            ("turns", "transport=udp") => return Err("there is no TURN over DTLS here".to_owned()),
            _ => {
                return Err(
                    "a TURN URI is turn:HOST[:PORT][?transport=udp|tcp] or turns:HOST[:PORT]".to_owned()
                );
            }
        };
        let (host, port) = split_port(place)?;
        if host.is_empty() {
            return Err("the URI names no host".to_owned());
        }
        Ok(Self { host: host.to_owned(), port: port.unwrap_or(default), transport })
    }
}

/// An IPv6 literal is in brackets.
fn split_port(place: &str) -> Result<(&str, Option<u16>), String> {
    let (host, port) = match place.strip_prefix('[').and_then(|literal| literal.split_once(']')) {
        Some((host, rest)) => (host, rest.strip_prefix(':')),
        None => place.split_once(':').map_or((place, None), |(host, port)| (host, Some(port))),
    };
    let port = port.map(|port| port.parse().map_err(|_| format!("{port:?} is no port")));
    Ok((host, port.transpose()?))
}

impl fmt::Display for Uri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.transport == Transport::Tls { "turns" } else { "turn" };
        let (open, close) = if self.host.contains(':') { ("[", "]") } else { ("", "") };
        write!(f, "{scheme}:{open}{}{close}:{}", self.host, self.port)?;
        f.write_str(if self.transport == Transport::Tcp { "?transport=tcp" } else { "" })
    }
}

impl Uri {
    /// Asks the resolver.
    ///
    /// # Errors
    /// One line for people.
    pub fn resolve(&self) -> Result<SocketAddr, String> {
        let found = (self.host.as_str(), self.port).to_socket_addrs();
        let mut found = found.map_err(|error| format!("{} cannot be resolved: {error}", self.host))?;
        found.next().ok_or_else(|| format!("{} has no address", self.host))
    }
}

#[cfg(test)]
mod tests {
    use super::{Transport, Uri};

    #[test]
    fn uris_are_those_of_rfc_7065() {
        for (text, host, port, transport) in [
            ("turn:127.0.0.1", "127.0.0.1", 3478, Transport::Udp),
            ("turn:a.example:5000?transport=tcp", "a.example", 5000, Transport::Tcp),
            ("turns:[::1]", "::1", 5349, Transport::Tls),
            ("TURN:[2001:db8::1]:1?transport=udp", "2001:db8::1", 1, Transport::Udp),
        ] {
            assert_eq!(text.parse(), Ok(Uri { host: host.to_owned(), port, transport }), "{text}");
        }
        for text in
            ["", "a.example", "stun:a", "turn:", "turn:a:b", "turn:a?transport=sctp", "turns:a?transport=udp"]
        {
            assert!(text.parse::<Uri>().is_err(), "{text}");
        }
    }
}
