//! A stream, whole and in pieces: the same messages come of it, none is longer than allowed, and each is one.
#![no_main]

use arbitrary::Arbitrary;
use halfway::turn::{
    demux::{Datagram, sort},
    framing::{Broken, Framing},
};
use libfuzzer_sys::fuzz_target;

/// What comes in, and where it is torn apart.
#[derive(Arbitrary, Debug)]
struct Stream {
    messages: Vec<Message>,
    pieces: Vec<u8>,
    stranger: bool,
}

#[derive(Arbitrary, Debug)]
enum Message {
    /// A STUN header with that much behind it.
    Stun { kind: u8, words: u8 },
    /// ChannelData, of any length, even one that is not kept.
    ChannelData { channel: u16, length: u16, kept: bool },
    /// Anything.
    Raw(Vec<u8>),
}

fuzz_target!(|stream: Stream| {
    let bytes: Vec<u8> = stream.messages.iter().take(32).flat_map(Message::bytes).collect();
    let longest = if stream.stranger { 2_048 } else { 65_540 };
    let whole = cut([&bytes[..]].into_iter(), longest);
    let (mut rest, mut pieces) = (&bytes[..], Vec::new());
    for size in stream.pieces.iter().cycle() {
        if rest.is_empty() {
            break;
        }
        let (piece, after) = rest.split_at((usize::from(*size) + 1).min(rest.len()));
        pieces.push(piece);
        rest = after;
    }
    if stream.pieces.is_empty() {
        pieces.push(rest);
    }
    assert_eq!(cut(pieces.into_iter(), longest), whole);
    for message in &whole.0 {
        assert!(message.len() <= longest && message.len() % 4 == 0);
        assert_ne!(sort(message), Datagram::Unknown, "{message:?}");
    }
});

/// The messages up to the break, and whether there was one.
fn cut<'a>(pieces: impl Iterator<Item = &'a [u8]>, longest: usize) -> (Vec<Vec<u8>>, bool) {
    let (mut framing, mut messages) = (Framing::default(), Vec::new());
    for mut piece in pieces {
        loop {
            match framing.next(&mut piece, longest) {
                Ok(Some(message)) => messages.push(message.to_vec()),
                Ok(None) => break,
                Err(Broken) => return (messages, true),
            }
        }
        assert!(piece.is_empty());
    }
    (messages, false)
}

impl Message {
    fn bytes(&self) -> Vec<u8> {
        match self {
            Self::Stun { kind, words } => {
                let length = u16::from(*words) * 4;
                let mut bytes = [&[0, *kind][..], &length.to_be_bytes(), &[0x21, 0x12, 0xa4, 0x42]].concat();
                bytes.resize(20 + usize::from(length), 7);
                bytes
            }
            Self::ChannelData { channel, length, kept } => {
                let channel = 0x4000 | channel & 0x3fff;
                let mut bytes = [channel.to_be_bytes(), length.to_be_bytes()].concat();
                if *kept {
                    bytes.resize(4 + usize::from(*length).next_multiple_of(4), 9);
                }
                bytes
            }
            Self::Raw(bytes) => bytes.clone(),
        }
    }
}
