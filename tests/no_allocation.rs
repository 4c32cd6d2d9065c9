//! A relayed ChannelData packet allocates nothing, in either direction, from socket to socket, over UDP and TCP. (Over TLS
//! the library that encrypts allocates a buffer for each record.)
//!
//! A binary of its own: its allocator counts what every thread does.
#![allow(clippy::unwrap_used, reason = "a test may fail loudly")]

use std::{
    alloc::{GlobalAlloc, Layout, System},
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    sync::atomic::{AtomicU64, Ordering::SeqCst},
    time::Duration,
};

use halfway::{
    clock, config,
    credentials::turn_rest::TurnSecrets,
    door::{RelayClient, admission::Admission},
    relay::Relay,
};
use stun_types::{
    attribute::{Nonce, Realm, Username},
    message::{
        IntegrityAlgorithm, LongTermKeyCredentials, Message, MessageIntegrityCredentials, MessageWriteVec,
        Method,
    },
    prelude::{AttributeWrite, MessageWrite, MessageWriteExt},
};
use turn_types::{
    attribute::{ChannelNumber, RequestedTransport, XorPeerAddress, XorRelayedAddress},
    message::{ALLOCATE, CHANNEL_BIND},
};

#[path = "suite/loopback.rs"]
mod loopback;
use loopback::SECRET;

struct Counting;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

// SAFETY: hands everything to the system's allocator.
#[allow(unsafe_code, reason = "that is what an allocator is")]
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, SeqCst);
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// One test, since another one beside it would be counted.
#[test]
fn none_per_packet() {
    let relay = loopback::relay("127.0.0.1:0", 1, 30_000..=39_999);
    let udp = socket();
    udp.connect(relay.listening()[0]).unwrap();
    assert_eq!(allocations_in_10_000_packets(&udp), 0, "over UDP");
    assert_eq!(allocations_in_10_000_packets(&stream(&relay)), 0, "over TCP");
}

fn allocations_in_10_000_packets(client: &impl Client) -> u64 {
    let peer = socket();
    let relayed = open_channel(client, peer.local_addr().unwrap());
    let packet = [&[0x40, 0, 0x04, 0xb0][..], &[7; 1_200]].concat();
    let mut buffer = [0; 2_048];
    let mut both_ways = || {
        client.say(&packet);
        assert_eq!(peer.recv(&mut buffer).unwrap(), 1_200);
        peer.send_to(&packet[4..], relayed).unwrap();
        assert_eq!(client.hear(&mut buffer), 1_204);
    };
    // The first packets touch pages; they may also grow a buffer that stays.
    (0..100).for_each(|_| both_ways());
    let before = ALLOCATIONS.load(SeqCst);
    (0..5_000).for_each(|_| both_ways());
    ALLOCATIONS.load(SeqCst) - before
}

/// A client's side of a transport.
trait Client {
    fn say(&self, message: &[u8]);
    /// The length of the next message.
    fn hear(&self, buffer: &mut [u8]) -> usize;
}

impl Client for UdpSocket {
    fn say(&self, message: &[u8]) {
        self.send(message).unwrap();
    }

    fn hear(&self, buffer: &mut [u8]) -> usize {
        self.recv(buffer).unwrap()
    }
}

impl Client for TcpStream {
    fn say(&self, message: &[u8]) {
        (&mut &*self).write_all(message).unwrap();
    }

    fn hear(&self, buffer: &mut [u8]) -> usize {
        (&mut &*self).read_exact(&mut buffer[..4]).unwrap();
        let header = if buffer[0] < 0x40 { 20 } else { 4 };
        let length = header + usize::from(u16::from_be_bytes([buffer[2], buffer[3]]));
        (&mut &*self).read_exact(&mut buffer[4..length]).unwrap();
        length
    }
}

/// Let in by a door without limits.
fn stream(relay: &Relay) -> TcpStream {
    let http = config::Http {
        listen: vec![],
        certificate: None,
        acme: None,
        allowed_origins: vec![],
        connections_per_address: 0,
        handshakes_per_second_per_address: 0,
        connections_total: 0,
    };
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let server = listener.local_addr().unwrap();
    let stream = TcpStream::connect(server).unwrap();
    let (socket, client) = listener.accept().unwrap();
    socket.set_nonblocking(true).unwrap();
    let permit = Admission::new(&http, 1).admit(clock::now().mono, client.ip()).unwrap();
    relay.welcome(RelayClient { socket, tls: None, client, server, permit });
    stream
}

fn socket() -> UdpSocket {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    socket
}

/// Allocates, binds channel 0x4000 to `peer`; gives the relayed address.
fn open_channel(client: &impl Client, peer: SocketAddr) -> SocketAddr {
    let user = TurnSecrets::new(&[SECRET]).unwrap().mint("counted", clock::now().unix() + 600);
    let key = LongTermKeyCredentials::new(user.username.clone(), user.credential, "halfway".to_owned());
    let transport = RequestedTransport::new(RequestedTransport::UDP);
    let challenge = ask(client, ALLOCATE, None, &[&transport]);
    let challenge = Message::from_bytes(&challenge).unwrap();
    let signed = Signed {
        user: user.username,
        nonce: challenge.attribute::<Nonce>().unwrap().nonce().to_owned(),
        key,
    };

    let answer = ask(client, ALLOCATE, Some(&signed), &[&transport]);
    let answer = Message::from_bytes(&answer).unwrap();
    let relayed = answer.attribute::<XorRelayedAddress>().unwrap().addr(answer.transaction_id());

    let mut bind = Message::builder_request(CHANNEL_BIND, MessageWriteVec::new());
    let peer = XorPeerAddress::new(peer, bind.transaction_id());
    bind.add_attribute(&ChannelNumber::new(0x4000)).unwrap();
    bind.add_attribute(&peer).unwrap();
    exchange(client, signed.sign(bind));
    relayed
}

struct Signed {
    user: String,
    nonce: String,
    key: LongTermKeyCredentials,
}

impl Signed {
    fn sign(&self, mut message: MessageWriteVec) -> Vec<u8> {
        message.add_attribute(&Username::new(&self.user).unwrap()).unwrap();
        message.add_attribute(&Realm::new("halfway").unwrap()).unwrap();
        message.add_attribute(&Nonce::new(&self.nonce).unwrap()).unwrap();
        let credentials = MessageIntegrityCredentials::LongTerm(self.key.clone());
        message.add_message_integrity(&credentials, IntegrityAlgorithm::Sha1).unwrap();
        message.finish()
    }
}

fn ask(
    client: &impl Client,
    method: Method,
    signed: Option<&Signed>,
    attributes: &[&dyn AttributeWrite],
) -> Vec<u8> {
    let mut message = Message::builder_request(method, MessageWriteVec::new());
    attributes.iter().for_each(|attribute| message.add_attribute(*attribute).unwrap());
    let request = match signed {
        Some(signed) => signed.sign(message),
        None => message.finish(),
    };
    exchange(client, request)
}

fn exchange(client: &impl Client, request: Vec<u8>) -> Vec<u8> {
    client.say(&request);
    let mut buffer = [0; 512];
    let length = client.hear(&mut buffer);
    buffer[..length].to_vec()
}
