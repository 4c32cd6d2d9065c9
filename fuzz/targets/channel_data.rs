//! What a client or a peer sends as data: read, and written again.
#![no_main]

use halfway::turn::{
    channel_data,
    demux::{Datagram, sort},
    indication::{HEADROOM, parse_send, write_data},
};
use libfuzzer_sys::fuzz_target;
use stun_types::message::Message;
use turn_types::attribute::{Data, XorPeerAddress};

fuzz_target!(|bytes: &[u8]| {
    match sort(bytes) {
        Datagram::ChannelData(channel, payload) => {
            let header = channel_data::header(channel, payload.len() as u16);
            assert_eq!(&bytes[..4], header);
            assert_eq!(&bytes[4..4 + payload.len()], payload);
        }
        Datagram::Send(message) => {
            if let Some((peer, payload)) = parse_send(message) {
                // What we read, the codec of the control messages reads too.
                if let Ok(message) = Message::from_bytes(message) {
                    let theirs =
                        message.attribute::<XorPeerAddress>().unwrap().addr(message.transaction_id());
                    assert_eq!((theirs.ip(), theirs.port()), (peer.0.ip(), peer.0.port()));
                    assert_eq!(message.attribute::<Data<'_>>().unwrap().data(), payload);
                }
                let mut buffer = vec![0xaa; HEADROOM];
                buffer.extend_from_slice(payload);
                buffer.extend([0xaa; 3]);
                let written = write_data(&mut buffer, HEADROOM, payload.len(), peer, [7; 12]);
                let message = Message::from_bytes(&buffer[written]).expect("what we write is STUN");
                assert_eq!(message.attribute::<Data<'_>>().unwrap().data(), payload);
            }
        }
        Datagram::Stun(_) | Datagram::Unknown => {}
    }
});
