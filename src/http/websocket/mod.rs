//! WebSockets: a request becomes one here (RFC 6455 §4.2), and then leaves HTTP and its tasks for the [`exchange`].

use aws_lc_rs::digest;
use base64::{Engine, prelude::BASE64_STANDARD};
use hyper::{
    HeaderMap, Request, Response, StatusCode,
    body::Incoming,
    header::{self, HeaderValue},
    upgrade::OnUpgrade,
};
use hyper_util::rt::TokioIo;
use tokio::{net::TcpStream, sync::mpsc};
use tokio_rustls::server::TlsStream;

use super::{
    Visit, peerjs,
    problem::Problem,
    routes::{self, Answer, may_signal},
};
use crate::{credentials::token::Agent, door::admission::Permit};

pub mod exchange; // the threads that hold the connections
pub mod framing; // RFC 6455 §5, as bytes
mod line; // one agent's connection
mod peer; // what is different with a client of PeerJS

use exchange::{Arrival, Exchange};

const SUBPROTOCOL: &str = "halfway.v1";

/// An upgrade that has been agreed to.
#[derive(Debug)]
pub(super) struct Upgrade {
    on: OnUpgrade,
    credential: Credential,
}

/// What the request already said about who asks.
#[derive(Debug)]
enum Credential {
    Checked(Agent),
    /// From the subprotocol. Checked after the upgrade: a browser's page sees close codes, but no HTTP status.
    Offered(String),
    /// It is in the hello.
    None,
    /// A client of PeerJS, which says no hello; or what it is told before it is closed.
    Peer(Result<Agent, String>),
}

/// Answers `GET /v1/ws` (RFC 6455 §4.2).
pub(super) async fn upgrade(
    visit: &Visit,
    request: &mut Request<Incoming>,
    accepted: &mpsc::Sender<Upgrade>,
) -> Result<Answer, Problem> {
    let key = accept_key(handshake_key(request.headers())?);
    let protocols = Protocols::of(request.headers())?;
    let credential = match (routes::bearer(request.headers()), protocols.token) {
        (Some(token), _) => Credential::Checked(may_signal(visit.front.check_in_time(token).await?)?),
        (None, Some(token)) => {
            // Whoever has to be asked about it is asked now: later nobody can wait.
            let _ = visit.front.check_in_time(&token).await;
            Credential::Offered(token)
        }
        (None, None) => Credential::None,
    };
    let mut response = accept(visit, request, accepted, key, credential)?;
    if protocols.offered {
        let headers = response.headers_mut();
        headers.insert(header::SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(SUBPROTOCOL));
    }
    Ok(response)
}

/// The same for a client of PeerJS.
pub(super) async fn upgrade_peer(
    visit: &Visit,
    request: &mut Request<Incoming>,
    accepted: &mpsc::Sender<Upgrade>,
) -> Result<Answer, Problem> {
    let key = accept_key(handshake_key(request.headers())?);
    let peer = peerjs::peer(visit, request).await;
    accept(visit, request, accepted, key, Credential::Peer(peer))
}

fn accept(
    visit: &Visit,
    request: &mut Request<Incoming>,
    accepted: &mpsc::Sender<Upgrade>,
    key: HeaderValue,
    credential: Credential,
) -> Result<Answer, Problem> {
    if *visit.shutdown.borrow() {
        return Err(Problem::unavailable("going down"));
    }
    // One upgrade ends a connection's HTTP, so there is always room.
    let _ = accepted.try_send(Upgrade { on: hyper::upgrade::on(&mut *request), credential });
    let mut response = Response::default();
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let headers = response.headers_mut();
    headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
    headers.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
    headers.insert(header::SEC_WEBSOCKET_ACCEPT, key);
    Ok(response)
}

fn handshake_key(headers: &HeaderMap) -> Result<&HeaderValue, Problem> {
    let lists = |name, wanted: &str| {
        let values = headers.get_all(name).iter().filter_map(|value| value.to_str().ok());
        values.flat_map(|value| value.split(',')).any(|value| value.trim().eq_ignore_ascii_case(wanted))
    };
    let version = headers.get(header::SEC_WEBSOCKET_VERSION).is_some_and(|version| version == "13");
    if !lists(header::UPGRADE, "websocket") || !lists(header::CONNECTION, "upgrade") || !version {
        return Err(Problem::upgrade_required());
    }
    let key = headers.get(header::SEC_WEBSOCKET_KEY);
    let sound = |key: &&HeaderValue| BASE64_STANDARD.decode(key).is_ok_and(|key| key.len() == 16);
    key.filter(sound).ok_or(Problem::bad_request("Sec-WebSocket-Key is not 16 bytes in base64"))
}

fn accept_key(key: &HeaderValue) -> HeaderValue {
    let mut sha1 = digest::Context::new(&digest::SHA1_FOR_LEGACY_USE_ONLY);
    sha1.update(key.as_bytes());
    sha1.update(b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11");
    HeaderValue::try_from(BASE64_STANDARD.encode(sha1.finish())).expect("base64 is a header value")
}

/// What `Sec-WebSocket-Protocol` offers.
struct Protocols {
    offered: bool,
    token: Option<String>,
}

impl Protocols {
    /// None at all is fine: plain clients send no list.
    fn of(headers: &HeaderMap) -> Result<Self, Problem> {
        let values =
            headers.get_all(header::SEC_WEBSOCKET_PROTOCOL).iter().filter_map(|value| value.to_str().ok());
        let names: Vec<_> = values.flat_map(|value| value.split(',')).map(str::trim).collect();
        let offered = names.contains(&SUBPROTOCOL);
        if !names.is_empty() && !offered {
            return Err(Problem::bad_request("the subprotocol here is halfway.v1"));
        }
        let token = names.iter().find_map(|name| name.strip_prefix("bearer.")).map(str::to_owned);
        Ok(Self { offered, token })
    }
}

/// The connection is a WebSocket now.
pub(super) async fn leave_http(visit: Visit, upgrade: Upgrade, permit: Permit, exchange: &Exchange) {
    let Ok(upgraded) = upgrade.on.await else { return };
    let parts = upgraded.downcast::<TokioIo<TlsStream<TcpStream>>>();
    let Ok(parts) = parts else { unreachable!("HTTP has this stream and no other") };
    let (socket, tls) = parts.io.into_inner().into_inner();
    // A connection that is gone already needs no goodbye.
    let Ok(socket) = socket.into_std() else { return };
    let (tls, credential, read) = (Box::new(tls), upgrade.credential, parts.read_buf.into());
    exchange.welcome(Arrival { visit, credential, socket, tls, read, permit });
}

#[cfg(test)]
mod tests {
    use super::{HeaderMap, HeaderValue, Protocols, accept_key, header};

    #[test]
    fn the_vector_of_rfc_6455() {
        let key = HeaderValue::from_static("dGhlIHNhbXBsZSBub25jZQ==");
        assert_eq!(accept_key(&key), "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
    }

    #[test]
    fn a_browser_offers_its_token_as_a_subprotocol() {
        let offer = |list: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(list));
            Protocols::of(&headers).map(|protocols| (protocols.offered, protocols.token)).ok()
        };
        assert_eq!(offer("halfway.v1, bearer.a.b-_.c"), Some((true, Some("a.b-_.c".to_owned()))));
        assert_eq!(offer("halfway.v1"), Some((true, None)));
        assert_eq!(offer("bearer.a.b.c"), None);
        assert_eq!(offer("chat"), None);
    }
}
