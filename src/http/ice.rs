//! ICE server lists: one body for `RTCPeerConnection` and for clients of draft-uberti-behave-turn-rest.

use std::{net::IpAddr, time::Duration};

use serde::{Deserialize, Serialize};

use crate::{
    clock::Now,
    config::Config,
    credentials::turn_rest::{TurnSecrets, TurnUser},
    host::Relays,
};

/// What is really served, and for how long it may be promised.
#[derive(Clone, Debug)]
pub struct IceOffer {
    /// The name in the URLs; `None`: a public address in the asking request's family.
    pub public_host: Option<String>,
    pub public_ips: Vec<IpAddr>,
    /// Ports that answer STUN and TURN, over UDP and TCP.
    pub turn_ports: Vec<u16>,
    /// The port that answers TURN over TLS, once clients can trust its certificate.
    pub turns_port: Option<u16>,
    pub default_ttl: Duration,
    pub max_ttl: Duration,
}

impl IceOffer {
    /// What an instance of this configuration serves, with STUN and TURN on `ports`, over TLS on `turns_port`.
    #[must_use]
    pub fn new(
        config: &Config,
        relays: &Relays,
        ports: impl Iterator<Item = u16>,
        turns_port: Option<u16>,
    ) -> Self {
        let mut turn_ports: Vec<u16> = ports.collect();
        turn_ports.sort_unstable();
        turn_ports.dedup();
        Self {
            public_host: config.public_host.clone(),
            public_ips: relays.addresses.iter().map(|relay| relay.public).collect(),
            turn_ports,
            turns_port,
            default_ttl: config.credentials.ttl,
            max_ttl: config.credentials.max_ttl,
        }
    }

    /// The host part of the URLs for a client that asks from `client` and reached us at `reached`.
    #[must_use]
    pub fn host_for(&self, client: IpAddr, reached: IpAddr) -> String {
        let host = host(self.public_host.as_deref(), &self.public_ips, client);
        host.unwrap_or_else(|| bracketed(&reached.to_canonical().to_string()))
    }

    /// What other nodes should know of this.
    #[must_use]
    pub fn served(&self) -> Served {
        let Self { public_host, public_ips, turn_ports, turns_port, .. } = self.clone();
        Served { public_host, public_ips, turn_ports, turns_port }
    }

    /// How long credentials live: as asked, within the limit and the token's own life.
    #[must_use]
    pub fn lifetime(&self, asked: Option<Duration>, token_left: Duration) -> Duration {
        asked.unwrap_or(self.default_ttl).min(self.max_ttl).min(token_left)
    }
}

/// What a node serves, as it tells the others.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Served {
    public_host: Option<String>,
    public_ips: Vec<IpAddr>,
    turn_ports: Vec<u16>,
    turns_port: Option<u16>,
}

/// What another node serves to one client.
#[derive(Clone, Debug)]
pub struct Elsewhere {
    host: String,
    turn_ports: Vec<u16>,
    turns_port: Option<u16>,
}

impl Served {
    /// `None` where the node has no address to be reached at.
    #[must_use]
    pub fn to(self, client: IpAddr) -> Option<Elsewhere> {
        let host = host(self.public_host.as_deref(), &self.public_ips, client)?;
        Some(Elsewhere { host, turn_ports: self.turn_ports, turns_port: self.turns_port })
    }
}

impl Elsewhere {
    /// Two at most: over UDP, and what passes most firewalls.
    fn urls(&self) -> impl Iterator<Item = String> + '_ {
        let Self { host, turn_ports, turns_port } = self;
        let udp = turn_ports.first().map(|port| format!("turn:{host}:{port}?transport=udp"));
        let tls = turns_port.map(|port| format!("turns:{host}:{port}?transport=tcp"));
        let tcp = || turn_ports.first().map(|port| format!("turn:{host}:{port}?transport=tcp"));
        udp.into_iter().chain(tls.or_else(tcp))
    }
}

/// How a client reaches who has that name, or else these addresses.
fn host(name: Option<&str>, addresses: &[IpAddr], client: IpAddr) -> Option<String> {
    let same_family = |ip: &&IpAddr| ip.is_ipv4() == client.to_canonical().is_ipv4();
    let address = || addresses.iter().find(same_family).or(addresses.first()).map(ToString::to_string);
    name.map(str::to_owned).or_else(address).map(|host| bracketed(&host))
}

/// An IPv6 literal is bracketed in a URL (RFC 3986 §3.2.2); anything else stays as it is.
fn bracketed(host: &str) -> String {
    if host.parse::<std::net::Ipv6Addr>().is_ok() { format!("[{host}]") } else { host.to_owned() }
}

/// Mints a TURN user for `agent` and lists the URLs it is good for, those of other nodes last. Pure: the shell and `halfway ice`
/// share it.
#[must_use]
pub fn ice_list(
    offer: &IceOffer,
    secrets: &TurnSecrets,
    now: Now,
    agent: &str,
    ttl: Duration,
    host: &str,
    elsewhere: &[Elsewhere],
) -> IceList {
    let TurnUser { username, credential } = secrets.mint(agent, now.unix().saturating_add(ttl.as_secs()));
    let ports = &offer.turn_ports;
    let stun = ports.iter().map(|port| format!("stun:{host}:{port}")).collect();
    // The best first: some clients take no other.
    let udp = ports.iter().map(|port| format!("turn:{host}:{port}?transport=udp"));
    let tcp = ports.iter().map(|port| format!("turn:{host}:{port}?transport=tcp"));
    let tls = offer.turns_port.iter().map(|port| format!("turns:{host}:{port}?transport=tcp"));
    let others = elsewhere.iter().flat_map(Elsewhere::urls);
    let turn: Vec<_> = udp.chain(tcp).chain(tls).chain(others).collect();
    IceList {
        ice_servers: vec![
            IceServer { urls: stun, username: None, credential: None },
            IceServer {
                urls: turn.clone(),
                username: Some(username.clone()),
                credential: Some(credential.clone()),
            },
        ],
        ice_transport_policy: "all",
        turn_rest: TurnRest { username, password: credential, ttl: ttl.as_secs(), uris: turn },
        expires_at: humantime::format_rfc3339_seconds(now.wall + ttl).to_string(),
        refresh_after: ttl.as_secs() / 2,
    }
}

/// Goes unchanged into `new RTCPeerConnection(body)`, which ignores the members it does not know.
#[derive(Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct IceList {
    pub ice_servers: Vec<IceServer>,
    pub ice_transport_policy: &'static str,
    #[serde(flatten)]
    pub turn_rest: TurnRest,
    /// RFC 3339.
    pub expires_at: String,
    /// Seconds.
    pub refresh_after: u64,
}

/// One `RTCIceServer`.
#[derive(Clone, Serialize)]
pub struct IceServer {
    pub urls: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub username: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub credential: Option<String>,
}

/// The four fields of draft-uberti-behave-turn-rest.
#[derive(Clone, Serialize)]
pub struct TurnRest {
    pub username: String,
    pub password: String,
    /// Seconds.
    pub ttl: u64,
    pub uris: Vec<String>,
}

impl IceList {
    /// The same list as values of `Link` headers (RFC 9725 §4.6).
    pub fn links(&self) -> impl Iterator<Item = String> + '_ {
        self.ice_servers.iter().flat_map(|server| server.urls.iter().map(|url| server.link(url)))
    }
}

impl IceServer {
    fn link(&self, url: &str) -> String {
        let mut link = format!("<{url}>; rel=\"ice-server\"");
        if let (Some(username), Some(credential)) = (&self.username, &self.credential) {
            link += &format!("; username={}; credential={}", quoted(username), quoted(credential));
            link += "; credential-type=\"password\"";
        }
        link
    }
}

/// A `quoted-string` (RFC 9110 §5.6.4).
fn quoted(text: &str) -> String {
    format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""))
}

/// Passwords stay out of logs, whoever prints this.
impl std::fmt::Debug for IceList {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "IceList({}, …)", self.turn_rest.username)
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant, UNIX_EPOCH};

    use serde_json::json;

    use super::{IceOffer, ice_list, quoted};
    use crate::{clock::Now, credentials::turn_rest::TurnSecrets};

    const HOUR: Duration = Duration::from_secs(3600);

    #[expect(clippy::disallowed_methods, reason = "an Instant cannot be made from nothing")]
    fn t0() -> Now {
        Now { mono: Instant::now(), wall: UNIX_EPOCH + Duration::from_secs(1_795_500_000) }
    }

    fn offer(public_host: Option<&str>, public_ips: &[&str]) -> IceOffer {
        IceOffer {
            public_host: public_host.map(str::to_owned),
            public_ips: public_ips.iter().map(|ip| ip.parse().unwrap()).collect(),
            turn_ports: vec![3478],
            turns_port: Some(443),
            default_ttl: HOUR,
            max_ttl: 24 * HOUR,
        }
    }

    #[test]
    fn the_body_of_the_contract() {
        let offer = offer(Some("turn.example.org"), &[]);
        let secrets = TurnSecrets::new(&["north"]).unwrap();
        let list = ice_list(&offer, &secrets, t0(), "agent-7", HOUR, "turn.example.org", &[]);
        let uris = json!([
            "turn:turn.example.org:3478?transport=udp",
            "turn:turn.example.org:3478?transport=tcp",
            "turns:turn.example.org:443?transport=tcp",
        ]);
        let password = secrets.mint("agent-7", 1_795_503_600).credential;
        assert_eq!(
            serde_json::to_value(&list).unwrap(),
            json!({
                "iceServers": [
                    {"urls": ["stun:turn.example.org:3478"]},
                    {"urls": uris,
                     "username": "1795503600:agent-7", "credential": password},
                ],
                "iceTransportPolicy": "all",
                "username": "1795503600:agent-7",
                "password": password,
                "ttl": 3600,
                "uris": uris,
                "expiresAt": "2026-11-24T07:00:00Z",
                "refreshAfter": 1800,
            })
        );
        let links: Vec<_> = list.links().collect();
        assert_eq!(links[0], r#"<stun:turn.example.org:3478>; rel="ice-server""#);
        let turn = format!(
            "<turn:turn.example.org:3478?transport=udp>; rel=\"ice-server\"; username=\"1795503600:agent-7\"; \
             credential=\"{password}\"; credential-type=\"password\""
        );
        assert_eq!(links.len(), 4);
        assert_eq!(links[1], turn);
        assert!(!format!("{list:?}").contains(&password));
    }

    #[test]
    fn other_nodes_come_last_with_two_urls_each() {
        let secrets = TurnSecrets::new(&["north"]).unwrap();
        let client = "192.0.2.1".parse().unwrap();
        let other = |offer: IceOffer| {
            // As it comes over the wire.
            let told = serde_json::to_string(&offer.served()).unwrap();
            serde_json::from_str::<super::Served>(&told).unwrap().to(client)
        };
        let without_tls = IceOffer { turns_port: None, ..offer(None, &["2001:db8::7", "203.0.113.7"]) };
        let elsewhere: Vec<_> = [offer(Some("b.example.org"), &[]), without_tls, offer(None, &[])]
            .into_iter()
            .filter_map(other)
            .collect();
        let list = ice_list(&offer(Some("a"), &[]), &secrets, t0(), "agent-7", HOUR, "a", &elsewhere);
        assert_eq!(
            list.turn_rest.uris[3..],
            [
                "turn:b.example.org:3478?transport=udp",
                "turns:b.example.org:443?transport=tcp",
                "turn:203.0.113.7:3478?transport=udp",
                "turn:203.0.113.7:3478?transport=tcp",
            ]
        );
    }

    #[test]
    fn the_host_is_in_the_family_that_asks() {
        let ask = |offer: IceOffer, client: &str| {
            offer.host_for(client.parse().unwrap(), "127.0.0.1".parse().unwrap())
        };
        let both = ["203.0.113.5", "2001:db8::5"];
        assert_eq!(ask(offer(Some("turn.example.org"), &both), "::1"), "turn.example.org");
        assert_eq!(ask(offer(Some("2001:db8::7"), &both), "192.0.2.1"), "[2001:db8::7]");
        assert_eq!(ask(offer(None, &both), "192.0.2.1"), "203.0.113.5");
        assert_eq!(ask(offer(None, &both), "::ffff:192.0.2.1"), "203.0.113.5");
        assert_eq!(ask(offer(None, &both), "2001:db8::99"), "[2001:db8::5]");
        assert_eq!(ask(offer(None, &["203.0.113.5"]), "2001:db8::99"), "203.0.113.5");
        assert_eq!(ask(offer(None, &[]), "192.0.2.1"), "127.0.0.1");
    }

    #[test]
    fn credentials_live_as_asked_within_limit_and_token() {
        let offer = offer(None, &[]);
        let minutes = |minutes: u64| Duration::from_secs(60 * minutes);
        assert_eq!(offer.lifetime(None, 48 * HOUR), HOUR);
        assert_eq!(offer.lifetime(Some(minutes(5)), 48 * HOUR), minutes(5));
        assert_eq!(offer.lifetime(Some(48 * HOUR), 48 * HOUR), 24 * HOUR);
        assert_eq!(offer.lifetime(Some(Duration::MAX), minutes(7)), minutes(7));
    }

    #[test]
    fn link_parameters_are_quoted() {
        assert_eq!(quoted(r#"a"b\c"#), r#""a\"b\\c""#);
    }
}
