//! An HTTPS front on loopback, and clients that verify its certificate.

use std::{
    iter,
    net::SocketAddr,
    path::Path,
    sync::{Arc, OnceLock, atomic::AtomicBool},
    time::Duration,
};

use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use futures_util::{SinkExt, StreamExt};
use halfway::{
    clock,
    config::{self, Config, File, Overrides, Surroundings},
    credentials::{
        revocations::Revocations,
        signaled::Signaled,
        token::{AgentId, NewToken, Room, Scopes, TokenKeys},
        turn_rest::TurnSecrets,
    },
    data_dir::DataDir,
    door::{self, Door, ToRelay, admission::Admission},
    http::{self, Entrance, Front, Operator, Patience, Terms, ice::IceOffer, websocket::exchange::Exchange},
    relay::Relay,
    revoking::Revoking,
    signaling::{self, limits::Limits},
    tls::{self, Certificate, certificates::Certificates},
};
use http_body_util::{BodyExt, Full};
use hyper::{HeaderMap, Request, StatusCode, body::Bytes, header};
use hyper_util::rt::TokioIo;
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, ServerName, pem::PemObject},
};
use serde_json::{Value, json};
use tokio::{
    net::{TcpListener, TcpSocket, TcpStream},
    sync::{Notify, watch},
    task::JoinHandle,
    time::timeout,
};
use tokio_rustls::{TlsConnector, client::TlsStream};
use tokio_websockets::{ClientBuilder, Message, WebSocketStream, upgrade};

use super::{
    loopback,
    nodes::{
        self,
        engine::{Among, Engine, NODES},
    },
};

pub const SECRET: &str = "the TURN secret of the tests";
/// Of agents' tokens.
pub const KEY: &[u8] = b"the token key of the tests, 32 bytes";

/// Longer than anything here takes; a test that waits so long has failed.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// A front that serves until dropped.
pub struct Host {
    pub public: SocketAddr,
    pub admin: SocketAddr,
    pub front: Arc<Front>,
    pub door: Arc<Door>,
    /// Where relay clients go; there from the first on.
    pub relay: Arc<OnceLock<Relay>>,
    pub ready: Arc<AtomicBool>,
    pub stop: watch::Sender<bool>,
    pub served: JoinHandle<()>,
    admin_served: JoinHandle<()>,
    trust: Arc<ClientConfig>,
    /// Where the tests run among nodes: the others, and the engine.
    others: Vec<Self>,
    _among: Option<Among>,
}

impl Host {
    /// Goes by another configuration and another key of tokens, as after a SIGHUP.
    pub fn reload(&self, toml: &str, token_key: &[u8]) {
        let config = config(toml);
        self.front.adopt(terms(&config, token_key), config.signaling.limits());
        self.door.adopt(&config.http, 10_000);
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.served.abort();
        self.admin_served.abort();
    }
}

/// With these lines of configuration.
pub async fn host(toml: &str) -> Host {
    host_with(toml, |_, _| {}).await
}

/// With so much patience at the door.
pub async fn host_in_haste(toml: &str, handshake: Duration) -> Host {
    host_of(toml, handshake, |patience, _| (patience.head, patience.write) = (handshake, handshake)).await
}

/// With other deadlines and limits too.
pub async fn host_with(toml: &str, change: impl FnOnce(&mut Patience, &mut Limits)) -> Host {
    host_of(toml, door::HANDSHAKE, change).await
}

async fn host_of(toml: &str, handshake: Duration, change: impl FnOnce(&mut Patience, &mut Limits)) -> Host {
    let config = config(toml);
    let (mut patience, mut limits) = (Patience::default(), config.signaling.limits());
    change(&mut patience, &mut limits);
    let mut host = one(&config, handshake, patience, limits.clone()).await;
    if nodes::is_wanted() {
        let engine = Engine::start();
        for _ in 1..NODES {
            host.others.push(one(&config, handshake, patience, limits.clone()).await);
        }
        let fronts: Vec<_> =
            iter::once(&host).chain(&host.others).map(|host| Arc::clone(&host.front)).collect();
        host._among = Some(Among::join(engine, fronts).await);
    }
    host
}

async fn one(config: &Config, handshake: Duration, patience: Patience, limits: Limits) -> Host {
    let ready = Arc::new(AtomicBool::new(true));
    // Nobody is revoked here: nothing is written.
    let nowhere = DataDir::new(Path::new("/nonexistent"));
    let revoking = Revoking::new(Revocations::default(), nowhere, |_| {});
    let front = Front::with_patience(terms(config, KEY), limits, revoking, Arc::clone(&ready), patience);
    serve(config, handshake, front, ready).await
}

fn terms(config: &Config, token_key: &[u8]) -> Terms {
    let offer = IceOffer {
        public_host: config.public_host.clone(),
        public_ips: config.public_ips.clone(),
        turn_ports: vec![3478],
        turns_port: None,
        default_ttl: config.credentials.ttl,
        max_ttl: config.credentials.max_ttl,
    };
    Terms::new(
        config,
        keys(token_key),
        TurnSecrets::new(&[SECRET]).unwrap(),
        offer,
        None,
        &Signaled::default(),
    )
}

async fn serve(config: &Config, handshake: Duration, front: Arc<Front>, ready: Arc<AtomicBool>) -> Host {
    let names = ["localhost".to_owned()];
    let key = tls::self_signed::new_key().unwrap();
    let cert = tls::self_signed::generate(clock::now(), &names, &key).unwrap();
    let public = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let admin = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (public_address, admin_address) = (public.local_addr().unwrap(), admin.local_addr().unwrap());
    let certificates = Certificates::new(Certificate::from_pem(cert.as_bytes(), key.as_bytes()).unwrap());
    let door = Door::new(Admission::new(&config.http, 10_000), certificates.server_config(), handshake);
    let relay = Arc::new(OnceLock::new());
    let to_relay: ToRelay = {
        let relay = Arc::clone(&relay);
        Arc::new(move |client| {
            relay.get_or_init(|| loopback::relay("127.0.0.1:0", 2, 30_000..=35_999)).welcome(client)
        })
    };
    let exchange = Arc::new(Exchange::start().unwrap());
    let entrance = Entrance { door: Arc::clone(&door), to_relay, exchange };
    let metrics = Box::new(|| "halfway_up 1\n".to_owned());
    let operator = Arc::new(Operator { metrics, drain: Notify::new() });
    let (stop, stopped) = watch::channel(false);
    Host {
        public: public_address,
        admin: admin_address,
        served: tokio::spawn(http::serve(Arc::clone(&front), vec![public], entrance, stopped)),
        admin_served: tokio::spawn(http::serve_admin(Arc::clone(&front), vec![admin], operator)),
        front,
        door,
        relay,
        ready,
        stop,
        trust: trust(&cert),
        others: Vec::new(),
        _among: None,
    }
}

fn config(toml: &str) -> Config {
    let file = File::parse(Path::new("test.toml"), toml).unwrap();
    let around = Surroundings { ipv6: true, cores: 1, state_directory: None };
    config::resolve(Some(file), Overrides::default(), &around).unwrap()
}

fn keys(key: &[u8]) -> TokenKeys {
    TokenKeys::new(&[key], Duration::from_secs(31_622_400)).unwrap()
}

fn trust(cert: &str) -> Arc<ClientConfig> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(cert.as_bytes()).unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let client = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    Arc::new(client.with_root_certificates(roots).with_no_client_auth())
}

/// A token of an hour, in the room `main`.
pub fn token(agent: &str) -> String {
    token_with(agent, "main", Scopes::default(), 3600)
}

pub fn token_with(agent: &str, room: &str, scopes: Scopes, seconds: u64) -> String {
    let token = NewToken {
        agent: AgentId::parse(agent).unwrap(),
        room: Room::parse(room).unwrap(),
        scopes,
        ttl: Duration::from_secs(seconds),
    };
    keys(KEY).mint(clock::now(), &token)
}

/// A token that expired an hour ago.
pub fn expired_token(agent: &str) -> String {
    let mut then = clock::now();
    then.wall -= Duration::from_secs(7200);
    let token = NewToken {
        agent: AgentId::parse(agent).unwrap(),
        room: Room::main(),
        scopes: Scopes::default(),
        ttl: Duration::from_secs(3600),
    };
    keys(KEY).mint(then, &token)
}

// HTTP.

pub struct Answer {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: String,
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap()
    }

    pub fn header(&self, name: header::HeaderName) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().unwrap())
    }

    /// Status and code of a problem, whose form is checked.
    pub fn problem(&self) -> (u16, String) {
        assert_eq!(self.header(header::CONTENT_TYPE), "application/problem+json", "{}", self.body);
        let body = self.json();
        assert_eq!(body["status"], self.status.as_u16());
        assert!(body["title"].is_string() && body["detail"].is_string() && body["type"] == "about:blank");
        (self.status.as_u16(), body["code"].as_str().unwrap().to_owned())
    }
}

impl Host {
    /// What all nodes count together, of what the tests look at.
    pub fn signaling(&self) -> signaling::hub::Counters {
        let mut sum = self.front.counters().signaling;
        for other in self.others.iter().map(|other| other.front.counters().signaling) {
            sum.connections += other.connections;
            sum.agents += other.agents;
            sum.frames_in += other.frames_in;
            sum.delivered += other.delivered;
        }
        sum
    }

    /// The node that an agent with this token goes to: any two agents of a test to different ones.
    pub fn at(&self, token: &str) -> &Self {
        let claims = token.split('.').nth(1).and_then(|claims| BASE64_URL_SAFE_NO_PAD.decode(claims).ok());
        let claims: Value =
            claims.and_then(|claims| serde_json::from_slice(&claims).ok()).unwrap_or_default();
        let place = match claims["sub"].as_str().unwrap_or_default() {
            "bob" => 1,
            "carol" => 2,
            _ => 0,
        };
        if place == 0 { self } else { self.others.get(place - 1).unwrap_or(self) }
    }

    pub async fn tls(&self) -> TlsStream<TcpStream> {
        self.secure(TcpStream::connect(self.public).await.unwrap()).await.unwrap()
    }

    pub async fn secure(&self, stream: TcpStream) -> std::io::Result<TlsStream<TcpStream>> {
        self.secure_with(stream, &[]).await
    }

    /// Offers these protocols by ALPN.
    pub async fn secure_with(
        &self,
        stream: TcpStream,
        alpn: &[&str],
    ) -> std::io::Result<TlsStream<TcpStream>> {
        let mut config = ClientConfig::clone(&self.trust);
        config.alpn_protocols = alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
        let connector = TlsConnector::from(Arc::new(config));
        connector.connect(ServerName::try_from("localhost").unwrap(), stream).await
    }

    /// `GET path`, with a token unless it is empty.
    pub async fn get(&self, path: &str, token: &str) -> Answer {
        self.send(request("GET", path, token, &[])).await
    }

    pub async fn send(&self, request: Request<Full<Bytes>>) -> Answer {
        let bearer = request.headers().get(header::AUTHORIZATION).map_or("", |value| value.to_str().unwrap());
        let node = self.at(bearer.strip_prefix("Bearer ").unwrap_or_default());
        timeout(PATIENCE, exchange(TokioIo::new(node.tls().await), request)).await.unwrap()
    }

    pub async fn get_admin(&self, path: &str) -> Answer {
        let stream = TcpStream::connect(self.admin).await.unwrap();
        timeout(PATIENCE, exchange(TokioIo::new(stream), request("GET", path, "", &[]))).await.unwrap()
    }

    /// Comes back when `wanted` is true.
    pub async fn until(&self, wanted: impl Fn(&Self) -> bool) {
        let look = async {
            while !wanted(self) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(PATIENCE, look).await.unwrap();
    }
}

pub fn request(method: &str, path: &str, token: &str, headers: &[(&str, &str)]) -> Request<Full<Bytes>> {
    let mut request = Request::builder().method(method).uri(path).header(header::HOST, "localhost");
    if !token.is_empty() {
        request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
    }
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    request.body(Full::default()).unwrap()
}

/// `POST path` with JSON.
pub fn post(path: &str, token: &str, headers: &[(&str, &str)], body: &Value) -> Request<Full<Bytes>> {
    request("POST", path, token, headers).map(|_| Full::from(body.to_string()))
}

async fn exchange(
    io: impl hyper::rt::Read + hyper::rt::Write + Unpin + Send + 'static,
    request: Request<Full<Bytes>>,
) -> Answer {
    let (mut sender, connection) = hyper::client::conn::http1::handshake(io).await.unwrap();
    let connection = tokio::spawn(connection);
    let (parts, body) = sender.send_request(request).await.unwrap().into_parts();
    let body = body.collect().await.unwrap().to_bytes();
    connection.abort();
    let body = String::from_utf8(body.to_vec()).unwrap();
    Answer { status: parts.status, headers: parts.headers, body }
}

// WebSockets.

/// One agent's connection.
pub struct Client {
    pub socket: WebSocketStream<TlsStream<TcpStream>>,
    pub upgrade: upgrade::Response,
}

/// Where the token goes.
#[derive(Clone, Copy)]
pub enum Via {
    Header,
    Subprotocol,
    Hello,
}

impl Host {
    /// An upgraded connection that has said nothing yet.
    pub async fn knock(
        &self,
        headers: &[(header::HeaderName, &str)],
    ) -> Result<Client, tokio_websockets::Error> {
        let stream = self.tls().await;
        self.knock_on(stream, headers).await
    }

    pub async fn knock_on(
        &self,
        stream: TlsStream<TcpStream>,
        headers: &[(header::HeaderName, &str)],
    ) -> Result<Client, tokio_websockets::Error> {
        self.knock_at(stream, "/v1/ws", headers).await
    }

    pub async fn knock_at(
        &self,
        stream: TlsStream<TcpStream>,
        path: &str,
        headers: &[(header::HeaderName, &str)],
    ) -> Result<Client, tokio_websockets::Error> {
        let uri = format!("wss://localhost:{}{path}", self.public.port());
        let mut builder = ClientBuilder::new().uri(&uri).unwrap();
        for (name, value) in headers {
            builder = builder.add_header(name.clone(), value.parse().unwrap()).unwrap();
        }
        let (socket, upgrade) = timeout(PATIENCE, builder.connect_on(stream)).await.unwrap()?;
        Ok(Client { socket, upgrade })
    }

    /// Says hello with what `more` holds beside it, and is welcomed.
    pub async fn join(&self, token: &str, more: Value) -> (Client, Value) {
        self.join_via(Via::Hello, token, more).await
    }

    pub async fn join_via(&self, via: Via, token: &str, more: Value) -> (Client, Value) {
        let (headers, mut hello) = (vec![], json!({"type": "hello"}));
        let bearer = format!("Bearer {token}");
        let protocols = format!("halfway.v1, bearer.{token}");
        let headers = match via {
            Via::Header => vec![(header::AUTHORIZATION, bearer.as_str())],
            Via::Subprotocol => vec![(header::SEC_WEBSOCKET_PROTOCOL, protocols.as_str())],
            Via::Hello => {
                hello["token"] = json!(token);
                headers
            }
        };
        for (member, value) in more.as_object().into_iter().flatten() {
            hello[member] = value.clone();
        }
        let mut client = self.at(token).knock(&headers).await.unwrap();
        client.say(hello).await;
        let welcome = client.hear().await;
        assert_eq!(welcome["type"], "welcome", "{welcome}");
        (client, welcome)
    }

    /// A connection whose socket holds little, to be slow with.
    pub async fn join_with_small_buffer(&self, token: &str) -> Client {
        let socket = TcpSocket::new_v4().unwrap();
        socket.set_recv_buffer_size(4096).unwrap();
        let node = self.at(token);
        let stream = node.secure(socket.connect(node.public).await.unwrap()).await.unwrap();
        let mut client = self.knock_on(stream, &[]).await.unwrap();
        client.say(json!({"type": "hello", "token": token})).await;
        assert_eq!(client.hear().await["type"], "welcome");
        client
    }
}

/// What a client hears.
#[derive(Debug)]
pub enum Heard {
    Frame(Value),
    Ping,
    Close(u16, String),
    End,
}

impl Client {
    pub async fn say(&mut self, frame: Value) {
        self.say_raw(Message::text(frame.to_string())).await;
    }

    pub async fn say_raw(&mut self, message: Message) {
        timeout(PATIENCE, self.socket.send(message)).await.unwrap().unwrap();
    }

    /// The next frame.
    pub async fn hear(&mut self) -> Value {
        loop {
            match self.hear_anything().await {
                Heard::Frame(frame) => return frame,
                Heard::Ping => {}
                other => panic!("instead of a frame: {other:?}"),
            }
        }
    }

    pub async fn hear_anything(&mut self) -> Heard {
        match timeout(PATIENCE, self.socket.next()).await.expect("something to hear") {
            Some(Ok(message)) if message.is_ping() => Heard::Ping,
            Some(Ok(message)) => match message.as_close() {
                Some((code, reason)) => Heard::Close(code.into(), reason.to_owned()),
                None => Heard::Frame(serde_json::from_slice(message.as_payload()).unwrap()),
            },
            Some(Err(_)) | None => Heard::End,
        }
    }

    /// The close code, whatever comes before it.
    pub async fn hear_close(&mut self) -> u16 {
        loop {
            match self.hear_anything().await {
                Heard::Close(code, _) => return code,
                Heard::End => panic!("no close frame"),
                Heard::Frame(_) | Heard::Ping => {}
            }
        }
    }

    /// Says `frame` with an id, and hears the answer to it.
    pub async fn ask(&mut self, mut frame: Value) -> Value {
        frame["id"] = json!("ask");
        self.say(frame).await;
        let answer = self.hear().await;
        assert_eq!(answer["id"], "ask", "{answer}");
        answer
    }

    pub async fn leave(mut self) {
        self.socket.close().await.unwrap();
    }
}

/// The status of a refused upgrade.
pub fn refused_with(refused: Result<Client, tokio_websockets::Error>) -> u16 {
    match refused.err().expect("a refusal") {
        tokio_websockets::Error::Upgrade(upgrade::Error::DidNotSwitchProtocols(status)) => status,
        other => panic!("{other}"),
    }
}
