//! Bytes: the vectors of RFC 5769, sizes of answers to strangers, and padding.

use std::time::{Duration, UNIX_EPOCH};

use halfway::{
    clock::{self, Now},
    turn::{FiveTuple, PeerAddr, Transport, indication},
};
use stun_types::message::{
    IntegrityAlgorithm, LongTermKeyCredentials, Message, MessageIntegrityCredentials, ShortTermCredentials,
};

use super::{
    client::Client,
    trace::{START, World},
};

const SHORT_TERM: &str = "VOkJxbRl1RmTxUk/WvJxBt";

fn vector(name: &str) -> Vec<u8> {
    let path = format!("{}/tests/vectors/rfc5769/{name}.hex", env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(path).unwrap();
    super::client::hex(&text.split_whitespace().collect::<String>())
}

#[test]
fn the_vectors_of_rfc_5769_are_authentic() {
    let short: MessageIntegrityCredentials = ShortTermCredentials::new(SHORT_TERM.to_owned()).into();
    let long = LongTermKeyCredentials::new(
        "\u{30de}\u{30c8}\u{30ea}\u{30c3}\u{30af}\u{30b9}".to_owned(),
        "TheMatrIX".to_owned(),
        "example.org".to_owned(),
    );
    for (name, key) in [
        ("request", short.make_key(IntegrityAlgorithm::Sha1)),
        ("response-ipv4", short.make_key(IntegrityAlgorithm::Sha1)),
        ("response-ipv6", short.make_key(IntegrityAlgorithm::Sha1)),
        ("request-long-term", long.make_key(IntegrityAlgorithm::Sha1)),
    ] {
        let mut bytes = vector(name);
        let message = Message::from_bytes(&bytes).unwrap();
        assert!(message.validate_integrity_with_key(&key).is_ok(), "{name}");
        bytes[21] ^= 1;
        assert!(
            Message::from_bytes(&bytes).is_err_and(|_| true)
                || Message::from_bytes(&bytes).unwrap().validate_integrity_with_key(&key).is_err(),
            "{name}, one bit turned"
        );
    }
}

#[test]
fn the_vectors_of_rfc_5769_get_an_answer_where_one_is_due() {
    let now = Now { wall: UNIX_EPOCH + Duration::from_secs(START), ..clock::now() };
    for (name, answered) in
        [("request", true), ("response-ipv4", false), ("response-ipv6", false), ("request-long-term", true)]
    {
        let mut reply = Vec::new();
        World::default().server().handle_request(now, alice(), &vector(name), &mut reply);
        assert_eq!(!reply.is_empty(), answered, "{name}");
    }
}

#[test]
fn seven_allocates_in_a_row_get_seven_identical_answers() {
    for transport in [Transport::Udp, Transport::Tcp] {
        seven_allocates(FiveTuple { transport, ..alice() });
    }
}

fn seven_allocates(from: FiveTuple) {
    // werift retransmits after 50 ms, doubling.
    let start = Now { wall: UNIX_EPOCH + Duration::from_secs(START), ..clock::now() };
    let mut client = Client::default();
    let mut server = World::default().server();
    let mut ask = |at: u64, bytes: &[u8]| {
        let mut reply = Vec::new();
        server.handle_request(start + Duration::from_millis(at), from, bytes, &mut reply);
        reply
    };
    let challenge = client.say("Allocate", "alice");
    client.hear(&ask(0, &challenge), &[]);
    let request = client.say("Allocate auth", "alice");
    let first = ask(10, &request);
    assert!(!first.is_empty());
    for at in [60, 160, 360, 760, 1_560, 3_160] {
        assert_eq!(ask(at, &request), first, "at {at} ms");
    }
    assert_eq!(server.counters().allocations_made, 1);
}

#[test]
fn data_indications_are_padded() {
    for length in 0..=8 {
        let peer = PeerAddr("[2606::1]:7".parse().unwrap());
        let head = indication::data_head(length, peer, [1; 12]);
        let message = [&head[..], &vec![0xaa; length], &[0; 3][..indication::padding(length)]].concat();
        assert_eq!(message.len() % 4, 0);
        assert!(Message::from_bytes(&message).is_ok(), "{length}");
    }
}

fn alice() -> FiveTuple {
    FiveTuple {
        client: "9.0.0.1:1000".parse().unwrap(),
        server: "5.5.5.5:3478".parse().unwrap(),
        transport: Transport::Udp,
    }
}
