//! Cutting messages out of a TCP or TLS stream (RFC 8656 §12.5, RFC 8489 §6.2.2): each tells its own length.

/// Of the header, so much is needed to know a STUN message and its length, and so much of ChannelData.
const STUN_HEAD: usize = 8;
const CHANNEL_HEAD: usize = 4;
/// Bytes of a STUN header.
const STUN_HEADER: usize = 20;
const COOKIE: [u8; 4] = [0x21, 0x12, 0xa4, 0x42];
/// Room kept for the next message that comes in pieces: a datagram's worth. Most streams wait most of the time.
const KEPT: usize = 2_048;

/// The longest message that a stream may carry: ChannelData with as much as its length can say, padded.
pub const LONGEST: usize = CHANNEL_HEAD + 65_536;

/// One client's stream: the message that has come in part.
#[derive(Debug, Default)]
pub struct Framing {
    partial: Vec<u8>,
    /// The message in `partial` is whole, and was given out.
    given: bool,
}

/// Neither a STUN message nor ChannelData, or longer than allowed: where the next one begins cannot be known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Broken;

impl Framing {
    /// Takes the next whole message, padding included, off `bytes`; `None` when they are used up and the last message,
    /// if any, is not yet whole.
    ///
    /// # Errors
    /// [`Broken`]; also for a message longer than `longest`.
    pub fn next<'m, 's: 'm, 'b: 'm>(
        &'s mut self,
        bytes: &mut &'b [u8],
        longest: usize,
    ) -> Result<Option<&'m [u8]>, Broken> {
        if std::mem::take(&mut self.given) {
            self.forget();
        }
        if self.partial.is_empty()
            && let Some(length) = length(bytes, longest)?
            && let Some((message, rest)) = bytes.split_at_checked(length)
        {
            *bytes = rest;
            return Ok(Some(message));
        }
        self.given = self.complete(bytes, longest)?;
        Ok(self.given.then_some(&self.partial))
    }

    /// Adds to the message that has begun until it is whole or `bytes` are used up.
    fn complete(&mut self, bytes: &mut &[u8], longest: usize) -> Result<bool, Broken> {
        while !bytes.is_empty() {
            let wanted = length(&self.partial, longest)?.unwrap_or(self.partial.len() + 1);
            let (more, rest) = bytes.split_at((wanted - self.partial.len()).min(bytes.len()));
            self.partial.extend_from_slice(more);
            *bytes = rest;
            if length(&self.partial, longest)? == Some(self.partial.len()) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Whether a message has begun and is not yet whole.
    #[must_use]
    pub fn is_within_message(&self) -> bool {
        !self.given && !self.partial.is_empty()
    }

    fn forget(&mut self) {
        self.partial.clear();
        self.partial.shrink_to(KEPT);
    }
}

/// The length of the first message of a stream of our own making, padding included.
#[must_use]
pub fn first_length(stream: &[u8]) -> usize {
    length(stream, usize::MAX).ok().flatten().unwrap_or(stream.len())
}

/// The length of the message that begins here, as soon as it can be known.
fn length(head: &[u8], longest: usize) -> Result<Option<usize>, Broken> {
    let length = match head.first() {
        None => return Ok(None),
        Some(0x00..=0x3f) => stun_length(head)?,
        Some(0x40..=0x7f) => channel_data_length(head),
        Some(0x80..) => return Err(Broken),
    };
    if length.is_some_and(|length| length > longest) { Err(Broken) } else { Ok(length) }
}

fn stun_length(head: &[u8]) -> Result<Option<usize>, Broken> {
    let Some(head) = head.first_chunk::<STUN_HEAD>() else { return Ok(None) };
    let length = usize::from(u16::from_be_bytes([head[2], head[3]]));
    if head.ends_with(&COOKIE) && length % 4 == 0 { Ok(Some(STUN_HEADER + length)) } else { Err(Broken) }
}

fn channel_data_length(head: &[u8]) -> Option<usize> {
    let head = head.first_chunk::<CHANNEL_HEAD>()?;
    let length = usize::from(u16::from_be_bytes([head[2], head[3]]));
    Some(CHANNEL_HEAD + length.next_multiple_of(4))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{Broken, Framing, LONGEST};

    fn channel_data(length: u16) -> Vec<u8> {
        let mut message = [&[0x40, 0x01][..], &length.to_be_bytes()].concat();
        message.resize(4 + usize::from(length), 7);
        message.resize(message.len().next_multiple_of(4), 0);
        message
    }

    fn stun(length: u16) -> Vec<u8> {
        let mut message = [&[0x00, 0x01][..], &length.to_be_bytes(), &[0x21, 0x12, 0xa4, 0x42]].concat();
        message.resize(20 + usize::from(length), 9);
        message
    }

    /// Feeds `pieces` one by one and collects what comes out whole.
    fn cut<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> Result<Vec<Vec<u8>>, Broken> {
        let (mut framing, mut messages) = (Framing::default(), Vec::new());
        for mut piece in pieces {
            while let Some(message) = framing.next(&mut piece, LONGEST)? {
                messages.push(message.to_vec());
            }
            assert!(piece.is_empty());
        }
        assert!(!framing.is_within_message());
        Ok(messages)
    }

    #[test]
    fn byte_by_byte_and_all_at_once() {
        let messages: Vec<_> =
            (0..9).map(channel_data).chain([stun(0), channel_data(1_200), stun(24)]).collect();
        let stream = messages.concat();
        assert_eq!(cut(stream.chunks(1)).unwrap(), messages);
        assert_eq!(cut([&stream[..]]).unwrap(), messages);
    }

    #[test]
    fn twenty_merged_messages_come_apart() {
        let messages: Vec<_> = (1..=20).map(channel_data).collect();
        assert_eq!(cut([&messages.concat()[..]]).unwrap(), messages);
    }

    #[test]
    fn our_own_stream_comes_apart() {
        let messages: Vec<_> = (1..=20).map(channel_data).chain([stun(8)]).collect();
        let stream = messages.concat();
        let mut rest = &stream[..];
        for message in messages {
            let (first, after) = rest.split_at(super::first_length(rest));
            assert_eq!(first, message);
            rest = after;
        }
        assert!(rest.is_empty());
    }

    #[test]
    fn the_longest_channel_data_fits_and_what_is_too_long_does_not() {
        let longest = channel_data(u16::MAX);
        assert_eq!(longest.len(), LONGEST);
        assert_eq!(cut(longest.chunks(1_000)).unwrap(), [longest]);
        let mut framing = Framing::default();
        assert_eq!(
            framing.next(&mut &channel_data(2_000)[..4], 1_024),
            Err(Broken),
            "told by the length alone"
        );
    }

    #[test]
    fn what_is_neither_is_broken_at_once() {
        for stream in [&b"\x80"[..], b"\xff\x00", b"\0\x01\0\0GET ", b"\0\x01\0\x03\x21\x12\xa4\x42"] {
            assert_eq!(cut([stream]), Err(Broken), "{stream:?}");
            assert_eq!(cut(stream.chunks(1)), Err(Broken), "{stream:?}");
        }
    }

    #[test]
    fn memory_of_a_long_message_is_given_back() {
        let mut framing = Framing::default();
        let long = channel_data(60_000);
        for mut piece in long.chunks(100) {
            while framing.next(&mut piece, LONGEST).unwrap().is_some() {}
        }
        assert!(framing.next(&mut &[][..], LONGEST).unwrap().is_none());
        assert!(framing.partial.capacity() <= super::KEPT);
    }

    proptest! {
        #[test]
        fn any_split_gives_the_same_messages(lengths in prop::collection::vec((any::<bool>(), 0..600u16), 1..20), sizes in prop::collection::vec(1..900usize, 1..40)) {
            let messages: Vec<_> = lengths.iter().map(|(is_stun, length)| if *is_stun { stun(length / 4 * 4) } else { channel_data(*length) }).collect();
            let stream = messages.concat();
            let (mut rest, mut pieces) = (&stream[..], Vec::new());
            for size in sizes.iter().cycle() {
                if rest.is_empty() { break; }
                let (piece, after) = rest.split_at((*size).min(rest.len()));
                pieces.push(piece);
                rest = after;
            }
            prop_assert_eq!(cut(pieces).unwrap(), messages);
        }
    }
}
