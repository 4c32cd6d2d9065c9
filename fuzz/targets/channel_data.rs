//! What a client or a peer sends as data: read, and written again.
#![no_main]

use halfway::turn::{
    channel_data,
    demux::{Datagram, sort},
    indication::{data_head, padding, parse_send},
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
                let head = data_head(payload.len(), peer, [7; 12]);
                let written = [&head[..], payload, &[0; 3][..padding(payload.len())]].concat();
                let message = Message::from_bytes(&written).expect("what we write is STUN");
                assert_eq!(message.attribute::<Data<'_>>().unwrap().data(), payload);
            }
        }
        Datagram::Stun(_) | Datagram::Unknown => {}
    }
});
