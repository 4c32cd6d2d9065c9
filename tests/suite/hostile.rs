//! What strangers and odd agents say goes nowhere but to agents: not into the log, not into a metric.

use std::{
    io::Write,
    sync::{Arc, Mutex},
};

use halfway::metrics;
use hyper::{StatusCode, header};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_websockets::Message;
use tracing_subscriber::fmt::MakeWriter;

use crate::front::{host, post, refused_with, request, token};

/// In everything hostile here.
const CANARY: &str = "canary-5f1d";

/// All that is logged by this process.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Log {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}

#[tokio::test]
async fn nothing_hostile_is_in_the_log_or_in_a_metric() {
    let log = Log::default();
    // Everything of ours: more than an operator ever asks for.
    let filter = tracing_subscriber::EnvFilter::new("halfway=trace");
    let logging = tracing_subscriber::fmt().with_env_filter(filter).with_ansi(false).with_writer(log.clone());
    tracing::subscriber::set_global_default(logging.finish()).unwrap();
    let host = host("signaling.peerjs = true").await;
    let (mut alice, _) = host.join(&token("alice"), json!({"card": {"name": CANARY}})).await;

    let line_end = format!("{CANARY}\r\nx: y\n\u{1b}[31m");
    for frame in [
        json!({"type": CANARY, "id": CANARY}),
        json!({"type": "offer", "to": line_end, "sdp": CANARY}),
        json!({"type": "offer", "to": CANARY, "sdp": line_end}),
        json!({"type": "update", "card": {CANARY: "x".repeat(9_000)}}),
        json!({"type": "renew", "token": CANARY}),
        json!({"type": "ping", "from": CANARY}),
    ] {
        alice.ask(frame).await;
    }
    alice.say_raw(Message::text(format!("{{\"{CANARY}"))).await;
    alice.hear().await;
    alice.say_raw(Message::binary(CANARY)).await;
    alice.hear().await;

    let path = format!("/signal/{CANARY}%0d%0a%1b/offer");
    let simple = host.send(post(&path, &token("alice"), &[], &json!({"sdp": CANARY}))).await;
    assert_eq!(simple.status, StatusCode::NOT_FOUND);
    for (path, token, headers) in [
        (format!("/{CANARY}%0a"), token("alice"), vec![("origin", format!("https://{CANARY}.example"))]),
        (format!("/v1/ice?ttl={CANARY}"), token("alice"), vec![]),
        ("/v1/agents".to_owned(), CANARY.to_owned(), vec![("x-forwarded-for", CANARY.to_owned())]),
        ("/v1/signal?after=0".to_owned(), token("alice"), vec![("halfway-session", CANARY.to_owned())]),
    ] {
        let headers: Vec<_> = headers.iter().map(|(name, value)| (*name, &**value)).collect();
        assert!(host.send(request("GET", &path, &token, &headers)).await.status.is_client_error());
    }
    let bearer = format!("Bearer {CANARY}");
    assert_eq!(refused_with(host.knock(&[(header::AUTHORIZATION, &bearer)]).await), 401);

    // Clients of PeerJS have their token in the URL.
    let secret = token("peer");
    for (id, token) in [("peer", &secret), (CANARY, &secret), ("peer", &CANARY.to_owned())] {
        let path = format!("/peerjs?key=peerjs&id={id}&token={token}");
        let mut peer = host.knock_at(host.tls().await, &path, &[]).await.unwrap();
        peer.hear().await;
        peer.leave().await;
    }

    let mut plain = host.tls().await;
    plain.write_all(format!("{CANARY} / HTTP/9.9\r\n\r\n").as_bytes()).await.unwrap();
    plain.read_to_end(&mut Vec::new()).await.unwrap();

    let text = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
    assert!(text.contains("HTTP connection ended"), "the log is heard: {text}");
    assert!(!text.contains(CANARY) && !text.contains(&secret), "{text}");
    let relay = crate::loopback::relay("127.0.0.1:0", 1, 36_000..=36_999);
    let instance = metrics::Instance { started: 0, certificate_ends: 0, draining: false };
    let page = metrics::page(&instance, &relay.counters(), &host.door.counters(), &host.front.counters());
    assert!(page.contains("halfway_frame_errors_total{code=\"badFrame\"} 4"), "{page}");
    assert!(!page.contains(CANARY), "{page}");
}
