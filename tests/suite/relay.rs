//! The relay on real sockets, spoken to by the published `turn` client: another implementation than ours.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use halfway::{
    clock,
    credentials::turn_rest::TurnSecrets,
    relay::{Link, Relay},
};
use tokio::{net::UdpSocket, time::timeout};
use turn::client::{Client, ClientConfig};
use webrtc_util::Conn;

use super::loopback::{self, SECRET};

const PATIENCE: Duration = Duration::from_secs(10);

fn start(listen: &str) -> Relay {
    loopback::relay(listen, 2, 40_000..=48_999)
}

async fn client(relay: &Relay, from: &str) -> Client {
    let expires = clock::now().unix() + 600;
    let user = TurnSecrets::new(&[SECRET]).unwrap().mint("interop", expires);
    let server = relay.listening()[0].to_string();
    let client = Client::new(ClientConfig {
        stun_serv_addr: server.clone(),
        turn_serv_addr: server,
        username: user.username,
        password: user.credential,
        realm: String::new(),
        software: String::new(),
        rto_in_ms: 0,
        conn: Arc::new(UdpSocket::bind(from).await.unwrap()),
        vnet: None,
    })
    .await
    .unwrap();
    client.listen().await.unwrap();
    client
}

/// Sends back what it gets, until the test ends.
async fn echo() -> SocketAddr {
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let at = socket.local_addr().unwrap();
    tokio::spawn(async move {
        let mut buffer = [0; 2_048];
        while let Ok((length, from)) = socket.recv_from(&mut buffer).await {
            socket.send_to(&buffer[..length], from).await.unwrap();
        }
    });
    at
}

#[tokio::test]
async fn the_turn_client_moves_thousands_of_packets_and_loses_none() {
    let relay = start("127.0.0.1:0");
    let client = client(&relay, "127.0.0.1:0").await;
    let conn = client.allocate().await.unwrap();
    let peer = echo().await;
    let mut buffer = [0; 2_048];
    // The first travel in Send indications, until the client has its channel bound.
    for number in 0..5_000_u32 {
        let mut packet = vec![0; 4 + number as usize % 1_200];
        packet[..4].copy_from_slice(&number.to_be_bytes());
        conn.send_to(&packet, peer).await.unwrap();
        let (length, from) = timeout(PATIENCE, conn.recv_from(&mut buffer)).await.unwrap().unwrap();
        assert_eq!((&buffer[..length], from), (&packet[..], peer));
    }
    let counters = relay.counters();
    assert_eq!((counters.to_peers.packets, counters.to_clients.packets), (5_000, 5_000));
    assert_eq!(counters.allocations, 1);
    conn.close().await.unwrap();
    client.close().await.unwrap();
}

/// libjuice does not wait for the answer to CreatePermission or ChannelBind before it sends.
#[tokio::test]
async fn data_right_behind_its_request_is_not_lost() {
    use super::turn::client;
    let relay = start("127.0.0.1:0");
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    socket.connect(relay.listening()[0]).await.unwrap();
    let peer = UdpSocket::bind("0.0.0.0:0").await.unwrap();
    let port = peer.local_addr().unwrap().port();
    let mut buffer = [0; 1_024];
    let mut alice = client::Client::with_secret(SECRET, clock::now().unix() + 600);
    for text in ["Allocate", "Allocate auth"] {
        socket.send(&alice.say(text, "alice")).await.unwrap();
        let length = timeout(PATIENCE, socket.recv(&mut buffer)).await.unwrap().unwrap();
        alice.hear(&buffer[..length], &[]);
    }
    for run in 0..500_u16 {
        let at = format!("127.1.{}.{}:{port}", run / 250, run % 250 + 1);
        let number = 0x4000 + run;
        for text in [
            format!("CreatePermission auth peer={at}"),
            format!("Send peer={at} a{run}"),
            format!("ChannelBind auth peer={at} channel={number:x}"),
            format!("ChannelData {number:x} b{run}"),
        ] {
            socket.send(&alice.say(&text, "alice")).await.unwrap();
        }
        for expected in [format!("a{run}"), format!("b{run}")] {
            let length = timeout(PATIENCE, peer.recv(&mut buffer)).await.unwrap().unwrap();
            assert_eq!(String::from_utf8_lossy(&buffer[..length]), expected);
        }
    }
}

#[tokio::test]
async fn two_clients_meet_through_their_relayed_addresses() {
    let relay = start("127.0.0.1:0");
    let (alice, bob) = (client(&relay, "127.0.0.1:0").await, client(&relay, "127.0.0.1:0").await);
    let (a, b) = (alice.allocate().await.unwrap(), bob.allocate().await.unwrap());
    let (at_a, at_b) = (a.local_addr().unwrap(), b.local_addr().unwrap());
    let mut buffer = [0; 64];
    // Bob's permission for Alice comes with his first packet, which may come to Alice before hers for him.
    b.send_to(b"knock", at_a).await.unwrap();
    a.send_to(b"knock", at_b).await.unwrap();
    for number in 0..100_u8 {
        a.send_to(&[number], at_b).await.unwrap();
        let answer = loop {
            let (length, from) = timeout(PATIENCE, b.recv_from(&mut buffer)).await.unwrap().unwrap();
            assert_eq!(from, at_a);
            if length == 1 {
                break buffer[0];
            }
        };
        assert_eq!(answer, number);
    }
}

#[tokio::test]
async fn a_dual_stack_listener_answers_each_family_from_the_address_it_was_asked_at() {
    let relay = start("[::]:0");
    let port = relay.listening()[0].port();
    for (from, to, mapped_family) in
        [("127.0.0.1:0", "127.0.0.1", 1), ("127.0.0.1:0", "127.0.0.9", 1), ("[::1]:0", "::1", 2)]
    {
        let socket = UdpSocket::bind(from).await.unwrap();
        // Connected: an answer from any other address would not be heard.
        socket.connect((to, port)).await.unwrap();
        socket.send(&super::turn::client::hex("000100002112a442000000000000000000000007")).await.unwrap();
        let mut buffer = [0; 128];
        let length = timeout(PATIENCE, socket.recv(&mut buffer)).await.unwrap().unwrap();
        assert_eq!(length, if mapped_family == 1 { 32 } else { 44 }, "{to}");
        assert_eq!(buffer[25], mapped_family, "{to}");
    }
}

#[tokio::test]
async fn noise_disturbs_nobody() {
    let relay = start("127.0.0.1:0");
    let client = client(&relay, "127.0.0.1:0").await;
    let conn = client.allocate().await.unwrap();
    let peer = echo().await;
    let noise = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let mut bytes = vec![0_u8; 65_507];
    let mut seed = 1_u64;
    let mut buffer = [0; 64];
    for round in 0..2_000_usize {
        let length = if round % 100 == 0 { bytes.len() } else { round % 300 };
        for byte in &mut bytes[..length.min(300)] {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            *byte = (seed >> 33) as u8;
        }
        noise.send_to(&bytes[..length], relay.listening()[0]).await.unwrap();
        if round % 20 == 0 {
            conn.send_to(b"still here", peer).await.unwrap();
            let (length, _) = timeout(PATIENCE, conn.recv_from(&mut buffer)).await.unwrap().unwrap();
            assert_eq!(&buffer[..length], b"still here");
        }
    }
    let counters = relay.counters();
    assert_eq!((counters.allocations, counters.to_clients.packets), (1, 100));
    assert!(counters.drops.iter().sum::<u64>() > 1_000, "{counters:?}");
}

#[tokio::test]
async fn a_relay_that_cannot_be_handed_over_goes_on_for_everybody() {
    let relay = start("127.0.0.1:0");
    let links = || (0..relay.shards()).map(|_| Link::pair().unwrap()).unzip::<_, _, Vec<_>, Vec<_>>();
    let before = client(&relay, "127.0.0.1:0").await;
    let (peer, mut buffer) = (echo().await, [0; 4]);
    let conn = before.allocate().await.unwrap();
    let (ours, theirs) = links();
    // Of the process that was to follow nothing is left.
    drop(theirs);
    let why = relay.hand_over(ours).unwrap_err();
    assert!(why.starts_with("relay shard 0 cannot be handed over: "), "{why}");
    relay.go_on();
    conn.send_to(b"here", peer).await.unwrap();
    timeout(PATIENCE, conn.recv_from(&mut buffer)).await.unwrap().unwrap();
    for _ in 0..8 {
        // Clients of all shards, old and new.
        client(&relay, "127.0.0.1:0").await.allocate().await.unwrap();
    }
    let (ours, _theirs) = links();
    relay.hand_over(ours).unwrap();
    assert_eq!(relay.counters().allocations, 9, "they are served through the other process");
}

#[test]
fn a_taken_port_is_not_shared_with_another_instance() {
    let relay = start("127.0.0.1:0");
    let error = halfway::relay::bind(relay.listening()[0], 2).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::AddrInUse);
}
