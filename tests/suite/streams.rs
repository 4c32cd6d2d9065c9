//! Relay clients on TCP and TLS, on the port that serves HTTPS, too: the door, the split, and the streams themselves.

use std::{net::SocketAddr, time::Duration};

use halfway::{clock, door::Services};
use http_body_util::{BodyExt, Empty, Full};
use hyper::{Request, StatusCode, body::Bytes};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpStream, UdpSocket},
    time::timeout,
};

use super::{
    front::{Host, PATIENCE, host, host_in_haste, token},
    loopback::SECRET,
    turn::client::Client,
};

/// A relay client on any stream.
struct Streaming<S> {
    stream: S,
    client: Client,
    received: Vec<u8>,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Streaming<S> {
    fn new(stream: S) -> Self {
        let client = Client::with_secret(SECRET, clock::now().unix() + 600);
        Self { stream, client, received: Vec::new() }
    }

    /// With an allocation.
    async fn allocated(stream: S) -> Self {
        let mut alice = Self::new(stream);
        assert!(alice.ask("Allocate").await.starts_with("Allocate 401"));
        let allocated = alice.ask("Allocate auth").await;
        assert!(allocated.starts_with("Allocate ok relayed="), "{allocated}");
        alice
    }

    fn say(&mut self, text: &str) -> Vec<u8> {
        self.client.say(text, "alice")
    }

    async fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).await.unwrap();
    }

    /// The next message, with its padding.
    async fn next(&mut self) -> Vec<u8> {
        loop {
            if let Some(length) = whole(&self.received) {
                return self.received.drain(..length).collect();
            }
            let mut piece = [0; 4_096];
            let length = timeout(PATIENCE, self.stream.read(&mut piece)).await.unwrap().unwrap();
            assert_ne!(length, 0, "the stream has ended");
            self.received.extend_from_slice(&piece[..length]);
        }
    }

    async fn hear(&mut self) -> String {
        let message = self.next().await;
        self.client.hear(&message, &[])
    }

    async fn ask(&mut self, text: &str) -> String {
        let request = self.say(text);
        self.send(&request).await;
        self.hear().await
    }

    /// Comes back when the other side has ended the stream.
    async fn until_closed(&mut self) {
        let mut rest = Vec::new();
        // A reset is as good as an end.
        timeout(PATIENCE, self.stream.read_to_end(&mut rest)).await.unwrap().ok();
    }
}

/// The length of the first message, if it is all there.
fn whole(bytes: &[u8]) -> Option<usize> {
    let head = bytes.first_chunk::<4>()?;
    let length = usize::from(u16::from_be_bytes([head[2], head[3]]));
    let length = if head[0] < 0x40 { 20 + length } else { 4 + length.next_multiple_of(4) };
    (bytes.len() >= length).then_some(length)
}

async fn tcp(host: &Host) -> TcpStream {
    TcpStream::connect(host.public).await.unwrap()
}

fn allocations(host: &Host) -> u64 {
    host.relay.get().map_or(0, |relay| relay.counters().allocations)
}

/// A peer that sends back what it gets.
async fn echo() -> SocketAddr {
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let at = socket.local_addr().unwrap();
    tokio::spawn(async move {
        let mut buffer = vec![0; 65_536];
        while let Ok((length, from)) = socket.recv_from(&mut buffer).await {
            socket.send_to(&buffer[..length], from).await.unwrap();
        }
    });
    at
}

#[tokio::test]
async fn one_port_serves_the_web_and_the_relay() {
    let host = host("").await;
    // Bare STUN; TLS that says it is for TURN; TLS that says nothing.
    let turn = host.secure_with(tcp(&host).await, &["stun.turn"]).await.unwrap();
    assert_eq!(turn.get_ref().1.alpn_protocol(), Some(&b"stun.turn"[..]));
    let mut bare = Streaming::allocated(tcp(&host).await).await;
    let mut named = Streaming::allocated(turn).await;
    let mut unnamed = Streaming::allocated(host.tls().await).await;
    assert_eq!(host.relay.get().unwrap().counters().streams, [1, 2]);
    let web = host.get("/v1/agents", &token("alice")).await;
    assert_eq!(web.status, StatusCode::OK);
    for reply in
        [bare.ask("Refresh auth").await, named.ask("Refresh auth").await, unnamed.ask("Refresh auth").await]
    {
        assert!(reply.starts_with("Refresh ok"), "{reply}");
    }
}

#[tokio::test]
async fn alpn_decides_where_it_is_offered() {
    let host = host("").await;
    for (offered, agreed) in [
        (&["http/1.1"][..], Some("http/1.1")),
        (&["h2", "http/1.1"], Some("h2")),
        (&["stun.nat-discovery"], Some("stun.nat-discovery")),
        (&["http/1.1", "stun.turn"], Some("stun.turn")),
        (&[], None),
    ] {
        let stream = host.secure_with(tcp(&host).await, offered).await.unwrap();
        assert_eq!(stream.get_ref().1.alpn_protocol(), agreed.map(str::as_bytes), "{offered:?}");
    }
    let mut web = Streaming::new(host.secure_with(tcp(&host).await, &["http/1.1"]).await.unwrap());
    let stun = web.say("Binding");
    web.send(&stun).await;
    web.until_closed().await;
    assert!(host.relay.get().is_none(), "who says HTTP gets HTTP");
}

#[tokio::test]
async fn http_2_answers_like_http_1() {
    let host = host("").await;
    let stream = host.secure_with(tcp(&host).await, &["h2"]).await.unwrap();
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    for path in ["/healthz", "/v1/agents", "/healthz"] {
        let request = Request::get(format!("https://localhost{path}"))
            .header("authorization", format!("Bearer {}", token("alice")))
            // The same origin is told by :authority here.
            .header("origin", "https://localhost")
            .body(Empty::<Bytes>::new())
            .unwrap();
        let answer = timeout(PATIENCE, sender.send_request(request)).await.unwrap().unwrap();
        assert_eq!((answer.status(), answer.version()), (StatusCode::OK, hyper::Version::HTTP_2));
        assert!(!answer.into_body().collect().await.unwrap().to_bytes().is_empty());
    }
    // There is no switching of protocols in HTTP/2 (RFC 9113 §8.6).
    let upgrade = Request::get("https://localhost/v1/ws").body(Empty::<Bytes>::new()).unwrap();
    assert_eq!(sender.send_request(upgrade).await.unwrap().status(), StatusCode::UPGRADE_REQUIRED);
}

#[tokio::test]
async fn a_quiet_http_2_connection_ends() {
    let host = host_in_haste("", Duration::from_millis(100)).await;
    let stream = host.secure_with(tcp(&host).await, &["h2"]).await.unwrap();
    let mut quiet = Streaming::new(stream);
    quiet.send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await;
    quiet.until_closed().await;
    host.until(|host| host.door.counters().connections == 0).await;
}

#[tokio::test]
async fn a_poll_over_http_2_is_not_quiet() {
    let host = host_in_haste("", Duration::from_millis(100)).await;
    let stream = host.secure_with(tcp(&host).await, &["h2"]).await.unwrap();
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
    let ended = tokio::spawn(connection);
    let mut ask = async |method: &str, session: &str, body: &'static str| {
        let request = Request::builder()
            .method(method)
            .uri("https://localhost/v1/signal?wait=1")
            .header("authorization", format!("Bearer {}", token("alice")))
            .header("halfway-session", session)
            .body(Full::<Bytes>::from(body));
        let mut request = request.unwrap();
        if session.is_empty() {
            request.headers_mut().remove("halfway-session");
        }
        let answer = timeout(PATIENCE, sender.send_request(request)).await.unwrap().unwrap();
        answer.into_body().collect().await.unwrap().to_bytes()
    };
    let welcome: serde_json::Value =
        serde_json::from_slice(&ask("POST", "", r#"[{"type":"hello"}]"#).await).unwrap();
    let session = welcome[0]["session"].as_str().unwrap().to_owned();
    // Ten times as long as a connection without a request may be quiet.
    assert_eq!(ask("GET", &session, "").await, "[]");
    timeout(PATIENCE, ended).await.expect("and then it is").unwrap().unwrap();
}

#[tokio::test]
async fn frames_in_any_pieces() {
    let host = host("").await;
    let peer = echo().await;
    let mut alice = Streaming::allocated(host.tls().await).await;
    let bound = alice.ask(&format!("ChannelBind auth channel=4000 peer={peer}")).await;
    assert!(bound.starts_with("ChannelBind ok"), "{bound}");
    // Of every length there is padding for, each byte in a record of its own.
    for payload in ["a", "bb", "ccc", "dddd", "eeeee"] {
        let message = alice.say(&format!("ChannelData 4000 {payload} padded"));
        for byte in message.chunks(1) {
            alice.send(byte).await;
            alice.stream.flush().await.unwrap();
        }
        assert_eq!(alice.next().await, message, "comes back padded with zeroes");
    }
    // Twenty in one.
    let many: Vec<_> =
        (0..20).map(|n| alice.say(&format!("ChannelData 4000 {} padded", "x".repeat(n + 1)))).collect();
    alice.send(&many.concat()).await;
    for message in many {
        assert_eq!(alice.next().await, message);
    }
    // As long as UDP lets it be.
    let longest = alice.say(&format!("ChannelData 4000 {} padded", "y".repeat(65_507)));
    alice.send(&longest).await;
    assert_eq!(alice.next().await, longest);
}

/// TLS decrypts more at once than is read at once; the rest must not wait for the next packet.
#[tokio::test]
async fn a_request_behind_much_data_is_answered() {
    let host = host("").await;
    let peer = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let mut alice = Streaming::allocated(host.tls().await).await;
    let bound =
        alice.ask(&format!("ChannelBind auth channel=4000 peer={}", peer.local_addr().unwrap())).await;
    assert!(bound.starts_with("ChannelBind ok"), "{bound}");
    // A record as long as they come, and a short one right behind it, so many times.
    let long = alice.say(&format!("ChannelData 4000 {} padded", "x".repeat(16_380)));
    for times in (1..=12).cycle().take(120) {
        for _ in 0..times {
            alice.send(&long).await;
            let refresh = alice.say("Refresh auth");
            alice.send(&refresh).await;
        }
        for _ in 0..times {
            let answer = alice.hear().await;
            assert!(answer.starts_with("Refresh ok"), "{times}: {answer}");
        }
    }
}

#[tokio::test]
async fn requests_and_the_data_behind_them_in_one_write() {
    let host = host("").await;
    let peer = echo().await;
    let mut alice = Streaming::allocated(tcp(&host).await).await;
    let all = [
        alice.say(&format!("CreatePermission auth peer={peer}")),
        alice.say(&format!("Send peer={peer} hello")),
        alice.say(&format!("ChannelBind auth channel=4001 peer={peer}")),
        alice.say("ChannelData 4001 four padded"),
    ];
    alice.send(&all.concat()).await;
    let mut heard = Vec::new();
    for _ in 0..4 {
        heard.push(alice.hear().await);
    }
    assert!(heard[0].starts_with("CreatePermission ok"), "{heard:?}");
    assert!(heard[1].starts_with("ChannelBind ok"), "{heard:?}");
    // The echo of the first may find the channel bound or not.
    assert!(heard[2].ends_with("hello") || heard[2].contains("hell"), "{heard:?}");
    assert_eq!(heard[3], "ChannelData 0x4001 four");
}

#[tokio::test]
async fn a_retransmission_on_a_stream_gets_the_identical_answer() {
    let host = host("").await;
    let mut alice = Streaming::new(host.tls().await);
    alice.ask("Allocate").await;
    let request = alice.say("Allocate auth");
    alice.send(&request.repeat(7)).await;
    let first = alice.next().await;
    for _ in 1..7 {
        assert_eq!(alice.next().await, first);
    }
    assert_eq!(allocations(&host), 1);
}

#[tokio::test]
async fn a_stream_that_ends_frees_its_allocation() {
    let host = host("").await;
    let polite = Streaming::allocated(host.tls().await).await;
    let rude = Streaming::allocated(tcp(&host).await).await;
    assert_eq!(allocations(&host), 2);
    let mut stream = polite.stream;
    stream.shutdown().await.unwrap();
    // A reset.
    socket2::SockRef::from(&rude.stream).set_linger(Some(Duration::ZERO)).unwrap();
    drop(rude);
    host.until(|host| allocations(host) == 0 && host.door.counters().connections == 0).await;
    assert_eq!(host.relay.get().unwrap().counters().streams, [0, 0]);
}

#[tokio::test]
async fn what_cannot_be_told_apart_any_more_ends_the_stream() {
    let host = host("").await;
    // A length that is no multiple of four, a wrong cookie, an unknown first byte, more than a stranger may say.
    let broken: [&[u8]; 4] = [
        b"\0\x01\0\x01\x21\x12\xa4\x42",
        b"\0\x01\0\0GET / HTTP/1.1",
        b"\x80",
        b"\0\x01\x20\0\x21\x12\xa4\x42",
    ];
    for bytes in broken {
        let mut alice = Streaming::new(tcp(&host).await);
        assert!(alice.ask("Binding").await.starts_with("Binding ok"));
        alice.send(bytes).await;
        alice.until_closed().await;
    }
    host.until(|host| host.door.counters().connections == 0).await;
    let mut known = Streaming::allocated(tcp(&host).await).await;
    // Who holds an allocation may send as much as ChannelData can hold; what nobody bound goes nowhere.
    let longest = known.say(&format!("ChannelData 4000 {} padded", "z".repeat(65_535)));
    known.send(&longest).await;
    assert!(known.ask("Refresh auth").await.starts_with("Refresh ok"));
}

#[tokio::test]
async fn a_client_that_does_not_read_loses_packets_and_harms_nobody() {
    let host = host("").await;
    let peer = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let at = peer.local_addr().unwrap();
    let mut stuck = Streaming::allocated(tcp(&host).await).await;
    let bound = stuck.ask(&format!("ChannelBind auth channel=4000 peer={at}")).await;
    assert!(bound.starts_with("ChannelBind ok"), "{bound}");
    let knock = stuck.say("ChannelData 4000 knock padded");
    stuck.send(&knock).await;
    let (_, relayed) = peer.recv_from(&mut [0; 64]).await.unwrap();
    // More than the kernel and we hold for it.
    let payload = vec![7; 60_000];
    let dropped = || host.relay.get().unwrap().counters().drops.iter().sum::<u64>();
    let fill = async {
        while dropped() == 0 {
            for _ in 0..20 {
                peer.send_to(&payload, relayed).await.unwrap();
            }
            tokio::task::yield_now().await;
        }
    };
    timeout(PATIENCE, fill).await.unwrap();
    let mut other = Streaming::allocated(tcp(&host).await).await;
    assert!(other.ask("Refresh auth").await.starts_with("Refresh ok"));
    // Whole messages were dropped: what does arrive is intact.
    let first = stuck.next().await;
    assert_eq!((first.len(), &first[4..]), (60_004, &payload[..]));
    assert_eq!(stuck.next().await.len(), 60_004);
}

#[tokio::test]
async fn a_port_for_relay_clients_serves_no_web() {
    let host = host("").await;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = listener.local_addr().unwrap();
    let (client, accepted) = tokio::join!(TcpStream::connect(at), listener.accept());
    let (stream, from) = accepted.unwrap();
    let permit = host.door.admit(from.ip()).unwrap();
    let opening = host.door.open(stream, permit, Services::Relay);
    let asking = async {
        let mut web = Streaming::new(host.secure_with(client.unwrap(), &["http/1.1"]).await.unwrap());
        web.until_closed().await;
    };
    let (guest, ()) = tokio::join!(async { opening.await.is_none() }, asking);
    assert!(guest);
    assert_eq!(host.door.counters().connections, 0);
}
