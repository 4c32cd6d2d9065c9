//! HTTPS on loopback: every route, status and header.

use std::{sync::atomic::Ordering, time::Duration};

use base64::{Engine, prelude::BASE64_STANDARD};
use halfway::{
    clock,
    credentials::{token::Scopes, turn_rest::TurnSecrets},
};
use hyper::{StatusCode, header};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

use crate::front::{Host, PATIENCE, SECRET, expired_token, host, host_in_haste, request, token, token_with};

const NAMED: &str = "public_host = \"turn.example.org\"";

#[tokio::test]
async fn an_ice_list_is_handed_out() {
    let host = host(NAMED).await;
    let before = clock::now().unix();
    let answer = host.get("/v1/ice", &token("agent-7")).await;
    assert_eq!(answer.status, StatusCode::OK);
    assert_eq!(answer.header(header::CACHE_CONTROL), "no-store");
    assert_eq!(answer.header(header::CONTENT_TYPE), "application/json");
    let body = answer.json();
    let username = body["username"].as_str().unwrap();
    let (expires, agent) = username.split_once(':').unwrap();
    let expires: u64 = expires.parse().unwrap();
    assert_eq!(agent, "agent-7");
    // The default is an hour, and so is the token, which was minted a moment ago.
    assert!((before + 3598..=before + 3610).contains(&expires));
    let password = TurnSecrets::new(&[SECRET]).unwrap().mint("agent-7", expires).credential;
    // No turns: where the certificate is self-signed.
    let uris =
        json!(["turn:turn.example.org:3478?transport=udp", "turn:turn.example.org:3478?transport=tcp"]);
    assert_eq!(
        body["iceServers"],
        json!([
            {"urls": ["stun:turn.example.org:3478"]},
            {"urls": uris, "username": username, "credential": password},
        ])
    );
    assert_eq!(body["iceTransportPolicy"], "all");
    assert_eq!((&body["password"], &body["uris"]), (&json!(password), &uris));
    let ttl = body["ttl"].as_u64().unwrap();
    assert_eq!(body["refreshAfter"].as_u64(), Some(ttl / 2));
    let expires_at = humantime::parse_rfc3339(body["expiresAt"].as_str().unwrap()).unwrap();
    assert_eq!(expires_at.duration_since(std::time::UNIX_EPOCH).unwrap().as_secs(), expires);
    let links: Vec<_> =
        answer.headers.get_all(header::LINK).iter().map(|link| link.to_str().unwrap()).collect();
    let turn = ["udp", "tcp"].map(|transport| {
        format!(
            "<turn:turn.example.org:3478?transport={transport}>; rel=\"ice-server\"; username=\"{username}\"; \
             credential=\"{password}\"; credential-type=\"password\""
        )
    });
    assert_eq!(links, ["<stun:turn.example.org:3478>; rel=\"ice-server\"", &turn[0], &turn[1]]);
}

#[tokio::test]
async fn credentials_live_as_long_as_asked_and_allowed() {
    let host = host("[credentials]\nttl = \"10m\"\nmax_ttl = \"20m\"").await;
    let long = token("a");
    let short = token_with("a", "main", Scopes::default(), 120);
    let ttl = |answer: Value| answer["ttl"].as_u64().unwrap();
    assert_eq!(ttl(host.get("/v1/ice", &long).await.json()), 600);
    assert_eq!(ttl(host.get("/v1/ice?ttl=60", &long).await.json()), 60);
    assert_eq!(ttl(host.get("/v1/ice?ttl=1201", &long).await.json()), 1200);
    assert_eq!(ttl(host.get("/v1/ice?ttl=99999999999999999999999", &long).await.json()), 1200);
    assert!(ttl(host.get("/v1/ice?ttl=1200", &short).await.json()) <= 120, "never outlives the token");
    for bad in ["", "0", "-1", "+1", "1.5", "1h", "%31x", "%ff"] {
        let answer = host.get(&format!("/v1/ice?ttl={bad}"), &long).await;
        assert_eq!(answer.problem(), (400, "badRequest".into()), "{bad:?}");
    }
}

#[tokio::test]
async fn without_a_name_the_list_holds_an_address() {
    let v4 = host("public_ips = [\"203.0.113.5\", \"2001:db8::5\"]").await;
    assert_eq!(stun_of(&v4).await, "stun:203.0.113.5:3478");
    let v6 = host("public_ips = [\"2001:db8::5\"]").await;
    assert_eq!(stun_of(&v6).await, "stun:[2001:db8::5]:3478");
    let nothing = host("").await;
    assert_eq!(stun_of(&nothing).await, "stun:127.0.0.1:3478");
}

async fn stun_of(host: &Host) -> String {
    let body = host.get("/v1/ice", &token("a")).await.json();
    body["iceServers"][0]["urls"][0].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn clients_of_the_draft_get_their_four_fields() {
    let host = host(NAMED).await;
    let answer = host.get("/turn?service=turn&username=x&key=y&api=z", &token("a")).await;
    assert_eq!((answer.status, answer.header(header::CACHE_CONTROL)), (StatusCode::OK, "no-store"));
    let body = answer.json();
    let mut names: Vec<_> = body.as_object().unwrap().keys().map(String::as_str).collect();
    names.sort_unstable();
    assert_eq!(names, ["password", "ttl", "uris", "username"]);
    for bad in ["/turn", "/turn?service=", "/turn?service=stun"] {
        assert_eq!(host.get(bad, &token("a")).await.problem(), (400, "badRequest".into()));
    }
    assert_eq!(host.get("/turn?service=turn", "").await.problem(), (401, "unauthorized".into()));
}

#[tokio::test]
async fn tokens_are_needed_and_good_for_their_scopes_only() {
    let host = host("").await;
    let none = Scopes::NONE;
    for path in ["/v1/ice", "/turn?service=turn", "/v1/agents"] {
        let unauthorized = host.get(path, "").await;
        assert_eq!(unauthorized.header(header::WWW_AUTHENTICATE), "Bearer");
        assert_eq!(unauthorized.problem(), (401, "unauthorized".into()), "{path}");
        for bad in ["x", "a.b.c", &token("a")[1..], &"a".repeat(9000)] {
            assert_eq!(host.get(path, bad).await.problem(), (401, "unauthorized".into()), "{path}");
        }
        let expired = host.get(path, &expired_token("a")).await;
        assert_eq!(expired.header(header::WWW_AUTHENTICATE), "Bearer error=\"invalid_token\"");
        assert_eq!(expired.problem(), (401, "expired".into()), "{path}");
        let powerless = token_with("a", "main", Scopes { admin: true, ..none }, 60);
        assert_eq!(host.get(path, &powerless).await.problem(), (403, "forbidden".into()), "{path}");
        let in_the_url = format!("{path}{}token={}", if path.contains('?') { '&' } else { '?' }, token("a"));
        assert_eq!(host.get(&in_the_url, "").await.status, StatusCode::UNAUTHORIZED);
    }
    let basic = request("GET", "/v1/ice", "", &[("authorization", "Basic YTpi")]);
    assert_eq!(host.send(basic).await.problem(), (401, "unauthorized".into()));
    let lower = request("GET", "/v1/ice", "", &[("authorization", &format!("bearer {}", token("a")))]);
    assert_eq!(host.send(lower).await.status, StatusCode::OK);
}

#[tokio::test]
async fn agents_are_found_by_their_cards_and_cards_are_there_to_read() {
    let host = host("").await;
    let a2a = json!({
        "protocolVersion": "0.3.0", "name": "Planner", "url": "https://planner.example/a2a", "version": "1.0.0",
        "skills": [{"id": "route", "name": "Route", "description": "Finds the way", "tags": ["maps"]}],
    });
    let plain = json!({"name": "Painter", "skills": ["paint"], "tags": ["art", "maps"]});
    let (mut anna, _) = host.join(&token("anna"), json!({"card": a2a})).await;
    let (_berta, _) = host.join(&token("berta"), json!({"card": plain})).await;
    let (mut carl, _) = host.join(&token("carl"), json!({})).await;
    let (_zoe, _) =
        host.join(&token_with("zoe", "elsewhere", Scopes::default(), 60), json!({"card": a2a})).await;
    for (query, found) in [
        (json!({"skill": "route"}), vec!["anna"]),
        (json!({"skill": "ROUTE", "text": "way finds"}), vec!["anna"]),
        (json!({"tag": "maps"}), vec!["anna", "berta"]),
        (json!({"tag": "maps", "skill": "paint"}), vec!["berta"]),
        (json!({"text": "pa"}), vec!["berta"]),
        (json!({"text": "nobody"}), vec![]),
        (json!({}), vec!["anna", "berta", "carl"]),
    ] {
        let answer = carl.ask(json!({"type": "find", "query": query})).await;
        assert_eq!(
            (&answer["type"], &answer["agentCount"]),
            (&json!("found"), &json!(found.len())),
            "{query}"
        );
        let names: Vec<_> =
            answer["agents"].as_array().unwrap().iter().map(|entry| &entry["agent"]).collect();
        assert_eq!(names, found, "{query}");
        let path: String = query
            .as_object()
            .unwrap()
            .iter()
            .map(|(key, value)| format!("&{key}={}", value.as_str().unwrap().replace(' ', "%20")))
            .collect();
        let listed =
            host.get(&format!("/v1/agents?{}", path.trim_start_matches('&')), &token("carl")).await.json();
        assert_eq!((&listed["agents"], &listed["agentCount"]), (&answer["agents"], &answer["agentCount"]));
    }
    let page = carl.ask(json!({"type": "find", "query": {"tag": "maps"}, "limit": 1})).await;
    assert_eq!(
        (&page["agentCount"], &page["next"], &page["agents"][0]["card"]),
        (&json!(2), &json!("anna"), &a2a)
    );
    let page = carl.ask(json!({"type": "find", "query": {"tag": "maps"}, "limit": 1, "after": "anna"})).await;
    assert_eq!((&page["agents"][0]["agent"], &page["next"]), (&json!("berta"), &Value::Null));
    for bad in [json!({"query": []}), json!({"query": {"tag": 7}}), json!({"limit": 0}), json!({"after": 1})]
    {
        let mut frame = bad.clone();
        frame["type"] = "find".into();
        assert_eq!(carl.ask(frame).await["code"], "badFrame", "{bad}");
    }
    // Its card as it is, for its room alone.
    let card = |agent: &str| {
        let path = format!("/v1/agents/{agent}");
        let host = &host;
        async move { host.get(&path, &token("carl")).await }
    };
    assert_eq!(card("anna").await.json(), a2a);
    for nobody in ["carl", "zoe", "nobody"] {
        assert_eq!(card(nobody).await.problem(), (404, "peerUnavailable".into()), "{nobody}");
    }
    // Presence brings it along, and another one is found at once.
    anna.say(json!({"type": "update", "card": {"skills": ["swim"]}})).await;
    assert_eq!(
        carl.hear().await,
        json!({"type": "agentUpdated", "agent": "anna", "card": {"skills": ["swim"]}})
    );
    assert_eq!(carl.ask(json!({"type": "find", "query": {"skill": "swim"}})).await["agentCount"], 1);
    assert_eq!(carl.ask(json!({"type": "find", "query": {"skill": "route"}})).await["agentCount"], 0);
}

#[tokio::test]
async fn who_is_found_fits_a_frame() {
    let host = host("signaling = { max_frame = 4096, presence_limit = 2 }").await;
    let mut all = Vec::new();
    for number in 0..8 {
        let card = json!({"tags": ["big"], "description": "x".repeat(900)});
        all.push(host.join(&token(&format!("agent-{number}")), json!({"card": card})).await.0);
    }
    let (mut found, mut after) = (Vec::new(), Value::Null);
    loop {
        let mut find = json!({"type": "find", "query": {"tag": "big"}});
        if after.is_string() {
            find["after"] = after;
        }
        let page = all[7].ask(find).await;
        assert!(page.to_string().len() <= 4_096 && page["agentCount"] == 8, "{page}");
        let agents = page["agents"].as_array().unwrap();
        assert!((1..8).contains(&agents.len()));
        found.extend(agents.iter().map(|entry| entry["agent"].clone()));
        after = page["next"].clone();
        if after.is_null() {
            break;
        }
    }
    assert_eq!(found, (0..8).map(|number| json!(format!("agent-{number}"))).collect::<Vec<_>>());
}

#[tokio::test]
async fn the_room_is_listed_in_pages() {
    let host = host("").await;
    let mut clients = Vec::new();
    for agent in ["a", "b", "c"] {
        clients.push(host.join(&token(agent), json!({"card": {"name": agent}})).await);
    }
    clients.push(host.join(&token_with("z", "elsewhere", Scopes::default(), 60), json!({})).await);
    let list = |query: &'static str| host.get(query, TOKEN.get_or_init(|| token("a")));
    assert_eq!(
        list("/v1/agents").await.json(),
        json!({"agents": [
            {"agent": "a", "card": {"name": "a"}},
            {"agent": "b", "card": {"name": "b"}},
            {"agent": "c", "card": {"name": "c"}},
        ], "agentCount": 3})
    );
    let page = list("/v1/agents?limit=2").await.json();
    assert_eq!((&page["agents"][1]["agent"], &page["next"]), (&json!("b"), &json!("b")));
    let page = list("/v1/agents?limit=2&after=b").await.json();
    assert_eq!((&page["agents"][0]["agent"], &page["next"]), (&json!("c"), &Value::Null));
    for bad in [
        "/v1/agents?limit=0",
        "/v1/agents?limit=x",
        "/v1/agents?limit=",
        "/v1/agents?after=%ff",
        "/v1/agents?text=a+a%20a%20a%20a%20a%20a%20a%20a%20a%20a%20a%20a%20a%20a%20a%20a%20a",
    ] {
        assert_eq!(list(bad).await.problem(), (400, "badRequest".into()), "{bad}");
    }
    // As forms and most libraries encode a space.
    let card = json!({"skills": ["legal texts"]});
    assert_eq!(clients[2].0.ask(json!({"type": "update", "card": card})).await["type"], "delivered");
    assert_eq!(list("/v1/agents?skill=legal+texts").await.json()["agentCount"], 1);
    assert_eq!(
        host.get("/v1/agents", &token_with("x", "empty", Scopes::default(), 60)).await.json()["agentCount"],
        0
    );
}

static TOKEN: std::sync::OnceLock<String> = std::sync::OnceLock::new();

#[tokio::test]
async fn health_is_told_on_both_listeners_and_numbers_on_one() {
    let host = host("").await;
    let head = host.send(request("HEAD", "/readyz", "", &[])).await;
    assert_eq!((head.status, head.body.as_str()), (StatusCode::OK, ""), "as load balancers ask");
    for path in ["/healthz", "/readyz"] {
        assert_eq!(host.get(path, "").await.status, StatusCode::OK);
        assert_eq!(host.get_admin(path).await.status, StatusCode::OK);
    }
    let metrics = host.get_admin("/metrics").await;
    assert_eq!(metrics.header(header::CONTENT_TYPE), "text/plain; version=0.0.4; charset=utf-8");
    assert_eq!(metrics.body, "halfway_up 1\n");
    assert_eq!(host.get("/metrics", "").await.problem(), (404, "notFound".into()));
    assert_eq!(host.get_admin("/v1/ice").await.problem(), (404, "notFound".into()));
    host.ready.store(false, Ordering::Relaxed);
    let unready = host.get("/readyz", "").await;
    assert_eq!(unready.header(header::RETRY_AFTER), "5");
    assert_eq!(unready.problem(), (503, "unavailable".into()));
    assert_eq!(host.get("/healthz", "").await.status, StatusCode::OK);
}

#[tokio::test]
async fn other_paths_and_methods_are_refused() {
    let host = host("").await;
    for path in ["/", "/v1", "/v1/ice/", "/v1/ICE", "/v1/../healthz", "/v1/ice%2f", "//v1/ice"] {
        assert_eq!(host.get(path, &token("a")).await.problem(), (404, "notFound".into()), "{path}");
    }
    for method in ["POST", "PUT", "DELETE", "PATCH", "TRACE", "BREW"] {
        let answer = host.send(request(method, "/v1/ice", &token("a"), &[])).await;
        assert_eq!(answer.header(header::ALLOW), "GET, HEAD, OPTIONS");
        assert_eq!(answer.problem(), (405, "badRequest".into()), "{method}");
    }
    let counters = host.front.counters();
    assert_eq!((counters.requests, counters.problems), (13, 13));
}

#[tokio::test]
async fn large_requests_are_refused() {
    let host = host("").await;
    let mut stream = host.tls().await;
    stream.write_all(b"GET /healthz HTTP/1.1\r\nHost: a\r\nContent-Length: 65537\r\n\r\n").await.unwrap();
    assert_eq!(status_line(&mut stream).await, "HTTP/1.1 413 Payload Too Large");
    let long = "a".repeat(20_000);
    let answer = host.send(request("GET", "/healthz", "", &[("x-long", &long)])).await;
    assert_eq!(answer.status, StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE);
    let names: Vec<_> = (0..70).map(|n| format!("x-{n}")).collect();
    let many: Vec<_> = names.iter().map(|name| (name.as_str(), "1")).collect();
    let answer = host.send(request("GET", "/healthz", "", &many)).await;
    assert_eq!(answer.status, StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE);
    let mut stream = host.tls().await;
    stream.write_all(b"\x05\x01\x02 nonsense\r\n\r\n").await.unwrap();
    assert_eq!(status_line(&mut stream).await, "HTTP/1.1 400 Bad Request");
    assert_eq!(host.get("/healthz", "").await.status, StatusCode::OK);
}

async fn status_line(stream: &mut (impl AsyncReadExt + Unpin)) -> String {
    let mut answer = Vec::with_capacity(4096);
    timeout(PATIENCE, stream.read_buf(&mut answer)).await.unwrap().unwrap();
    String::from_utf8(answer).unwrap().lines().next().unwrap().to_owned()
}

#[tokio::test]
async fn pages_of_allowed_origins_may_ask() {
    let host = host("[http]\nallowed_origins = [\"https://app.example\"]").await;
    let from = |origin: &'static str, method: &'static str| {
        host.send(request(method, "/v1/ice", TOKEN.get_or_init(|| token("a")), &[("origin", origin)]))
    };
    let allowed = from("https://app.example", "GET").await;
    assert_eq!(allowed.status, StatusCode::OK);
    assert_eq!(allowed.header(header::ACCESS_CONTROL_ALLOW_ORIGIN), "https://app.example");
    assert_eq!(allowed.header(header::VARY), "Origin");
    assert_eq!(allowed.header(header::ACCESS_CONTROL_EXPOSE_HEADERS), "Link, Retry-After");
    assert_eq!(from("https://localhost", "GET").await.status, StatusCode::OK, "the same origin");
    for other in ["https://evil.example", "https://app.example.evil.example", "http://localhost", "null"] {
        let refused = from(other, "GET").await;
        assert_eq!(refused.header(header::ACCESS_CONTROL_ALLOW_ORIGIN), "");
        assert_eq!(refused.problem(), (403, "forbidden".into()), "{other}");
        assert_eq!(from(other, "OPTIONS").await.problem().0, 403);
    }
    let preflight = from("https://app.example", "OPTIONS").await;
    assert_eq!((preflight.status, preflight.body.as_str()), (StatusCode::NO_CONTENT, ""));
    assert_eq!(preflight.header(header::ACCESS_CONTROL_ALLOW_METHODS), "GET, POST");
    assert_eq!(
        preflight.header(header::ACCESS_CONTROL_ALLOW_HEADERS),
        "Authorization, Content-Type, Halfway-Session, Last-Event-ID"
    );
    assert_eq!(preflight.header(header::LINK), "", "a preflight mints nothing");
    let origin = [("origin", "https://app.example")];
    let preflight = host.send(request("OPTIONS", "/v1/agents/agent-7", "", &origin)).await;
    assert_eq!(preflight.header(header::ACCESS_CONTROL_ALLOW_METHODS), "GET, DELETE", "a page may revoke");
    let refusal = host.send(request("GET", "/v1/ice", "", &[("origin", "https://app.example")])).await;
    assert_eq!(refusal.header(header::ACCESS_CONTROL_ALLOW_ORIGIN), "https://app.example", "pages see why");
}

#[tokio::test]
async fn all_origins_may_be_allowed() {
    let host = host("[http]\nallowed_origins = [\"*\"]").await;
    let answer = host.send(request("GET", "/v1/ice", &token("a"), &[("origin", "null")])).await;
    assert_eq!(answer.header(header::ACCESS_CONTROL_ALLOW_ORIGIN), "*");
    assert_eq!(answer.status, StatusCode::OK);
}

#[tokio::test]
async fn plain_http_on_the_https_port_is_told_so() {
    let host = host("").await;
    let mut stream = TcpStream::connect(host.public).await.unwrap();
    stream.write_all(b"GET /v1/ice HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    let read = async {
        stream.read_to_string(&mut answer).await.unwrap();
    };
    timeout(PATIENCE, read).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 400 Bad Request\r\n"), "{answer}");
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.contains(&format!("Content-Length: {}\r\n", body.len())));
    assert!(body.contains("HTTPS"));
}

#[tokio::test]
async fn garbage_and_silence_end_in_time_and_harm_nobody() {
    let host = host_in_haste("", Duration::from_millis(100)).await;
    for garbage in [&b"\x16\x03\x01\xff\xff garbage"[..], b"\x02\x00", b"\xff", b"halfway", b""] {
        let mut stream = TcpStream::connect(host.public).await.unwrap();
        stream.write_all(garbage).await.unwrap();
        let mut rest = Vec::new();
        // A reset is as good as an end.
        timeout(PATIENCE, stream.read_to_end(&mut rest)).await.unwrap().ok();
    }
    let mut slow = host.tls().await;
    slow.write_all(b"GET /healthz HTTP/1.1\r\nHost:").await.unwrap();
    let mut rest = Vec::new();
    timeout(PATIENCE, slow.read_to_end(&mut rest)).await.unwrap().ok();
    let five_failed = |host: &Host| {
        let counters = host.door.counters();
        counters.connections == 0 && counters.handshakes_failed == 5
    };
    host.until(five_failed).await;
    assert_eq!(host.get("/healthz", "").await.status, StatusCode::OK);
}

#[tokio::test]
async fn an_address_has_so_many_connections() {
    let host = host("[http]\nconnections_per_address = 2").await;
    let first = host.tls().await;
    let _second = host.tls().await;
    let third = TcpStream::connect(host.public).await.unwrap();
    assert!(timeout(PATIENCE, host.secure(third)).await.unwrap().is_err());
    assert_eq!(host.door.counters().refused, 1);
    drop(first);
    host.until(|host| host.door.counters().connections == 1).await;
    assert_eq!(host.get("/healthz", "").await.status, StatusCode::OK);
}

#[tokio::test]
async fn a_connection_serves_many_requests() {
    let host = host("").await;
    let mut stream = host.tls().await;
    for _ in 0..3 {
        stream.write_all(b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
        assert_eq!(status_line(&mut stream).await, "HTTP/1.1 200 OK");
    }
}

#[tokio::test]
async fn a_websocket_is_asked_for_properly() {
    let host = host("").await;
    let answer = host.get("/v1/ws", &token("a")).await;
    assert_eq!(answer.header(header::UPGRADE), "websocket");
    assert_eq!(answer.problem(), (426, "badRequest".into()));
    let key = BASE64_STANDARD.encode([7; 16]);
    let proper = [
        ("upgrade", "websocket"),
        ("connection", "keep-alive, Upgrade"),
        ("sec-websocket-version", "13"),
        ("sec-websocket-key", &key),
    ];
    let with = |name, value| {
        let mut headers = proper;
        headers.iter_mut().find(|header| header.0 == name).unwrap().1 = value;
        host.send(request("GET", "/v1/ws", TOKEN.get_or_init(|| token("a")), &headers))
    };
    assert_eq!(with("upgrade", "h2c").await.problem(), (426, "badRequest".into()));
    assert_eq!(with("connection", "keep-alive").await.problem(), (426, "badRequest".into()));
    assert_eq!(with("sec-websocket-version", "8").await.problem(), (426, "badRequest".into()));
    assert_eq!(with("sec-websocket-key", "c2hvcnQ=").await.problem(), (400, "badRequest".into()));
    let mut chat = proper.to_vec();
    chat.push(("sec-websocket-protocol", "chat"));
    assert_eq!(host.send(request("GET", "/v1/ws", "", &chat)).await.problem(), (400, "badRequest".into()));
}
