//! One agent of the load: connects, speaks, hears.

use std::sync::Arc;

use futures_util::{SinkExt, StreamExt};
use hyper::{
    Uri,
    header::{AUTHORIZATION, HeaderValue},
};
use rustls::pki_types::ServerName;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
};
use tokio_rustls::TlsConnector;
use tokio_websockets::{ClientBuilder, Message, WebSocketStream};

use crate::{
    clock,
    credentials::token::{AgentId, NewToken, Room, Scopes, TokenKeys},
};

/// Bytes as they come, with TLS or without.
pub(crate) trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// Where agents connect, and how they prove who they are.
pub(super) struct Target {
    /// Agents take turns among them.
    pub(super) urls: Vec<Uri>,
    pub(super) tls: Arc<rustls::ClientConfig>,
    pub(super) speech: Speech,
}

/// The protocol of the server under load.
pub(super) enum Speech {
    Halfway(Box<TokenKeys>),
    /// The PeerJS server's.
    PeerJs,
    /// That of `matchbox_server`.
    Matchbox,
}

/// One connection, welcomed.
pub(super) struct Agent {
    socket: WebSocketStream<Box<dyn Stream>>,
    pub(super) welcome: Value,
}

impl Target {
    /// Connects an agent, which is called `name` and meets others in `room`.
    pub(super) async fn join(
        &self,
        name: &str,
        room: &str,
        resume: Option<(&str, u64)>,
    ) -> Result<Agent, String> {
        let url = self.url_of(name);
        let stream = self.stream(url).await?;
        let uri = self.address(url, name, room)?;
        let mut upgrade = ClientBuilder::from_uri(uri);
        if let Speech::Halfway(keys) = &self.speech {
            let token = HeaderValue::try_from(format!("Bearer {}", token(keys, name, room)?))
                .map_err(|error| error.to_string())?;
            upgrade = upgrade.add_header(AUTHORIZATION, token).map_err(|error| error.to_string())?;
        }
        let (socket, _) =
            upgrade.connect_on(stream).await.map_err(|error| format!("no WebSocket: {error}"))?;
        let mut agent = Agent { socket, welcome: Value::Null };
        if let Speech::Halfway(_) = self.speech {
            let resume = resume.map(|(session, after)| json!({"session": session, "after": after}));
            agent.say(json!({"type": "hello", "resume": resume}).to_string()).await?;
        }
        let welcome = agent.hear().await?;
        agent.welcome = serde_json::from_str(&welcome).map_err(|_| format!("no welcome but {welcome}"))?;
        Ok(agent)
    }

    /// For one agent always the same.
    fn url_of(&self, name: &str) -> &Uri {
        let number = name.rsplit('-').next().and_then(|number| number.parse().ok()).unwrap_or(0_usize);
        &self.urls[number % self.urls.len()]
    }

    async fn stream(&self, url: &Uri) -> Result<Box<dyn Stream>, String> {
        let host = url.host().unwrap_or_default().trim_matches(['[', ']']).to_owned();
        let secure = is_secure(url);
        let port = url.port_u16().unwrap_or(if secure { 443 } else { 80 });
        let stream =
            TcpStream::connect((&*host, port)).await.map_err(|error| format!("cannot connect: {error}"))?;
        stream.set_nodelay(true).map_err(|error| error.to_string())?;
        if !secure {
            return Ok(Box::new(stream));
        }
        let name = ServerName::try_from(host).map_err(|error| error.to_string())?;
        let stream = TlsConnector::from(Arc::clone(&self.tls)).connect(name, stream).await;
        Ok(Box::new(stream.map_err(|error| format!("no TLS: {error}"))?))
    }

    fn address(&self, url: &Uri, name: &str, room: &str) -> Result<Uri, String> {
        let path = match self.speech {
            Speech::Halfway(_) => "/v1/ws".to_owned(),
            Speech::PeerJs => format!("/peerjs?key=peerjs&id={name}&token={name}&version=1.5.4"),
            Speech::Matchbox => format!("/{room}"),
        };
        let authority = url.authority().map_or("localhost", |authority| authority.as_str());
        format!("ws://{authority}{path}").parse().map_err(|error| format!("{error}"))
    }

    /// An offer or an answer.
    pub(super) fn frame(&self, is_offer: bool, to: &str, sdp: &str) -> String {
        let kind = if is_offer { "offer" } else { "answer" };
        match self.speech {
            Speech::Halfway(_) => json!({"type": kind, "to": to, "sdp": sdp}),
            Speech::PeerJs => json!({"type": kind.to_uppercase(), "dst": to,
                "payload": {"sdp": {"type": kind, "sdp": sdp}, "type": "data", "connectionId": "dc_1"}}),
            Speech::Matchbox => {
                json!({"Signal": {"receiver": to, "data": {if is_offer { "Offer" } else { "Answer" }: sdp}}})
            }
        }
        .to_string()
    }
}

pub(super) fn is_secure(url: &Uri) -> bool {
    matches!(url.scheme_str(), Some("https" | "wss"))
}

fn token(keys: &TokenKeys, name: &str, room: &str) -> Result<String, String> {
    let agent = AgentId::parse(name).ok_or("no name for an agent")?;
    let room = Room::parse(room).ok_or("no name for a room")?;
    let ttl = std::time::Duration::from_secs(3_600);
    Ok(keys.mint(clock::now(), &NewToken { agent, room, scopes: Scopes::default(), ttl }))
}

impl Agent {
    pub(super) async fn say(&mut self, frame: String) -> Result<(), String> {
        self.socket.send(Message::text(frame)).await.map_err(|error| error.to_string())
    }

    /// The next frame that holds this.
    pub(super) async fn hear_until(&mut self, part: &str) -> Result<String, String> {
        loop {
            let frame = self.hear().await?;
            if frame.contains(part) {
                return Ok(frame);
            }
        }
    }

    /// The next frame. Pings are answered on the way.
    pub(super) async fn hear(&mut self) -> Result<String, String> {
        loop {
            match self.socket.next().await {
                Some(Ok(message)) => match message.as_text() {
                    Some(text) => return Ok(text.to_owned()),
                    None if message.is_close() => return Err(format!("closed: {:?}", message.as_close())),
                    None => {}
                },
                Some(Err(error)) => return Err(error.to_string()),
                None => return Err("the connection ended".to_owned()),
            }
        }
    }
}
