//! A relayed ChannelData packet allocates nothing, in either direction, from socket to socket.
//!
//! A binary of its own: its allocator counts what every thread does.
#![allow(clippy::unwrap_used, reason = "a test may fail loudly")]

use std::{
    alloc::{GlobalAlloc, Layout, System},
    net::{SocketAddr, UdpSocket},
    sync::atomic::{AtomicU64, Ordering::SeqCst},
    time::Duration,
};

use halfway::{clock, credentials::turn_rest::TurnSecrets};
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

#[test]
fn none_per_packet() {
    let relay = loopback::relay("127.0.0.1:0", 1, 30_000..=39_999);
    let client = socket();
    client.connect(relay.listening()[0]).unwrap();
    let peer = socket();
    let relayed = open_channel(&client, peer.local_addr().unwrap());

    let packet = [&[0x40, 0, 0x04, 0xb0][..], &[7; 1_200]].concat();
    let mut buffer = [0; 2_048];
    let mut both_ways = || {
        client.send(&packet).unwrap();
        assert_eq!(peer.recv(&mut buffer).unwrap(), 1_200);
        peer.send_to(&packet[4..], relayed).unwrap();
        assert_eq!(client.recv(&mut buffer).unwrap(), 1_204);
    };
    // The first packets touch pages; they may also grow a buffer that stays.
    (0..100).for_each(|_| both_ways());
    let before = ALLOCATIONS.load(SeqCst);
    (0..5_000).for_each(|_| both_ways());
    assert_eq!(ALLOCATIONS.load(SeqCst) - before, 0, "allocations in 10,000 packets");
}

fn socket() -> UdpSocket {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    socket
}

/// Allocates, binds channel 0x4000 to `peer`; gives the relayed address.
fn open_channel(client: &UdpSocket, peer: SocketAddr) -> SocketAddr {
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
    client: &UdpSocket,
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

fn exchange(client: &UdpSocket, request: Vec<u8>) -> Vec<u8> {
    client.send(&request).unwrap();
    let mut buffer = [0; 512];
    let length = client.recv(&mut buffer).unwrap();
    buffer[..length].to_vec()
}
