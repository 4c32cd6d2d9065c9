//! WebSocket frames as a server reads and writes them (RFC 6455 §5); no extension is ever agreed on.
//!
//! A message that comes whole is heard where it lies; only what comes in pieces is copied, and an idle connection owns no
//! buffer.

use std::ops::ControlFlow;

/// Bytes of a control frame's payload (§5.5).
const MAX_CONTROL: usize = 125;

const CONTINUATION: u8 = 0;
const TEXT: u8 = 1;
const BINARY: u8 = 2;
const CLOSE: u8 = 8;
const PING: u8 = 9;
const PONG: u8 = 10;
/// The first byte of a frame that is the last of its message, before the opcode.
const LAST: u8 = 0x80;

/// One client's stream: what has come in part.
#[derive(Debug, Default)]
pub struct Decoder {
    /// The beginning of a frame, still masked.
    partial: Vec<u8>,
    /// The beginning of a message whose frames are not yet all here: whether it is text, and its bytes.
    begun: Option<(bool, Vec<u8>)>,
}

/// What a client said.
#[derive(Debug, PartialEq, Eq)]
pub enum Said<'a> {
    /// To be a frame of the protocol.
    Text(&'a str),
    /// Nobody here reads it.
    Binary,
    /// To be answered by a pong with the same bytes.
    Ping(&'a [u8]),
    /// A sign of life.
    Pong,
    /// With its code, if it gave one.
    Close(Option<u16>),
}

/// Why a client is not listened to any longer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Violation {
    /// Not a frame, or not one that may come now.
    Protocol,
    /// A text that is not UTF-8.
    NotUtf8,
    /// A longer message than is read.
    TooLong,
}

impl Violation {
    /// §7.4.1.
    #[must_use]
    pub fn close_code(self) -> u16 {
        match self {
            Self::Protocol => 1002,
            Self::NotUtf8 => 1007,
            Self::TooLong => 1009,
        }
    }
}

impl Decoder {
    /// Hears all that is whole in `bytes`, which it unmasks, and keeps the rest; until `hear` has had enough.
    ///
    /// # Errors
    /// When a frame is none; also for a message longer than `longest` bytes.
    pub fn read(
        &mut self,
        mut bytes: &mut [u8],
        longest: usize,
        mut hear: impl FnMut(Said<'_>) -> ControlFlow<()>,
    ) -> Result<ControlFlow<()>, Violation> {
        while !bytes.is_empty() {
            let head = if self.partial.is_empty() { Head::read(bytes)? } else { None };
            let (whole, rest) = match head {
                Some(head) if bytes.len() >= head.length(longest)? => {
                    let (frame, rest) = bytes.split_at_mut(head.length(longest)?);
                    (self.accept(head, head.unmask(frame), longest, &mut hear)?, rest)
                }
                _ => {
                    let rest = self.complete(bytes, longest)?;
                    (self.accept_partial(longest, &mut hear)?, rest)
                }
            };
            if whole.is_break() {
                return Ok(whole);
            }
            bytes = rest;
        }
        Ok(ControlFlow::Continue(()))
    }

    /// Bytes of what is not whole yet.
    pub fn held(&self) -> usize {
        self.partial.len() + self.begun.as_ref().map_or(0, |(_, bytes)| bytes.len())
    }

    /// Adds to the frame that has begun until it is whole or `bytes` are used up; gives what is left of them.
    fn complete<'a>(&mut self, mut bytes: &'a mut [u8], longest: usize) -> Result<&'a mut [u8], Violation> {
        while !bytes.is_empty() {
            let wanted = match Head::read(&self.partial)? {
                Some(head) => head.length(longest)?,
                None => self.partial.len() + 1,
            };
            if wanted == self.partial.len() {
                break;
            }
            let (more, rest) = bytes.split_at_mut((wanted - self.partial.len()).min(bytes.len()));
            self.partial.extend_from_slice(more);
            bytes = rest;
        }
        Ok(bytes)
    }

    fn accept_partial(
        &mut self,
        longest: usize,
        hear: &mut impl FnMut(Said<'_>) -> ControlFlow<()>,
    ) -> Result<ControlFlow<()>, Violation> {
        match Head::read(&self.partial)? {
            Some(head) if self.partial.len() == head.length(longest)? => {
                let mut frame = std::mem::take(&mut self.partial);
                self.accept(head, head.unmask(&mut frame), longest, hear)
            }
            _ => Ok(ControlFlow::Continue(())),
        }
    }

    /// One whole frame: a control frame, or a message, or a part of one.
    fn accept(
        &mut self,
        head: Head,
        payload: &[u8],
        longest: usize,
        hear: &mut impl FnMut(Said<'_>) -> ControlFlow<()>,
    ) -> Result<ControlFlow<()>, Violation> {
        match (head.opcode, self.begun.take()) {
            (CLOSE | PING | PONG, begun) => {
                self.begun = begun;
                Ok(hear(control(head.opcode, payload)?))
            }
            (TEXT | BINARY, None) if head.is_last => Ok(hear(message(head.opcode == TEXT, payload)?)),
            (TEXT | BINARY, None) => {
                self.begun = Some((head.opcode == TEXT, payload.to_vec()));
                Ok(ControlFlow::Continue(()))
            }
            (CONTINUATION, Some((is_text, mut bytes))) => {
                if bytes.len() + payload.len() > longest {
                    return Err(Violation::TooLong);
                }
                bytes.extend_from_slice(payload);
                if head.is_last {
                    return Ok(hear(message(is_text, &bytes)?));
                }
                self.begun = Some((is_text, bytes));
                Ok(ControlFlow::Continue(()))
            }
            _ => Err(Violation::Protocol),
        }
    }
}

fn message(is_text: bool, payload: &[u8]) -> Result<Said<'_>, Violation> {
    if !is_text {
        return Ok(Said::Binary);
    }
    str::from_utf8(payload).map(Said::Text).map_err(|_| Violation::NotUtf8)
}

fn control(opcode: u8, payload: &[u8]) -> Result<Said<'_>, Violation> {
    match (opcode, payload) {
        (PING, _) => Ok(Said::Ping(payload)),
        (PONG, _) => Ok(Said::Pong),
        (_, []) => Ok(Said::Close(None)),
        (_, [high, low, reason @ ..]) => {
            let code = u16::from_be_bytes([*high, *low]);
            str::from_utf8(reason).map_err(|_| Violation::NotUtf8)?;
            // §7.4.2; 1004 to 1006 and 1015 are never sent.
            let sound = matches!(code, 1000..=1003 | 1007..=1014 | 3000..=4999);
            if sound { Ok(Said::Close(Some(code))) } else { Err(Violation::Protocol) }
        }
        _ => Err(Violation::Protocol),
    }
}

/// A frame's head.
#[derive(Clone, Copy, Debug)]
struct Head {
    is_last: bool,
    opcode: u8,
    mask: [u8; 4],
    /// Of the head itself.
    size: usize,
    payload: u64,
}

impl Head {
    /// As soon as it is whole.
    fn read(bytes: &[u8]) -> Result<Option<Self>, Violation> {
        let Some(&[first, second]) = bytes.first_chunk() else { return Ok(None) };
        let (is_last, opcode) = (first & LAST != 0, first & 0x0f);
        let is_control = matches!(opcode, CLOSE | PING | PONG);
        let is_known = is_control || opcode <= BINARY;
        // No extension, so no reserved bit; a client masks what it says (§5.1).
        if first & 0x70 != 0 || !is_known || second & 0x80 == 0 {
            return Err(Violation::Protocol);
        }
        let (size, payload) = match second & 0x7f {
            126 => (4, bytes[2..].first_chunk().map(|length| u64::from(u16::from_be_bytes(*length)))),
            127 => (10, bytes[2..].first_chunk().map(|length| u64::from_be_bytes(*length))),
            short => (2, Some(u64::from(short))),
        };
        let Some(payload) = payload else { return Ok(None) };
        if is_control && (!is_last || payload > MAX_CONTROL as u64) {
            return Err(Violation::Protocol);
        }
        let Some(&mask) = bytes[size..].first_chunk() else { return Ok(None) };
        Ok(Some(Self { is_last, opcode, mask, size: size + mask.len(), payload }))
    }

    /// Of the whole frame.
    fn length(&self, longest: usize) -> Result<usize, Violation> {
        match usize::try_from(self.payload) {
            Ok(payload) if payload <= longest.max(MAX_CONTROL) => {
                self.size.checked_add(payload).ok_or(Violation::TooLong)
            }
            _ => Err(Violation::TooLong),
        }
    }

    /// Gives the payload of a frame in the clear (§5.3).
    fn unmask<'a>(&self, frame: &'a mut [u8]) -> &'a [u8] {
        let payload = &mut frame[self.size..];
        let mask = u32::from_ne_bytes(self.mask);
        let (words, rest) = payload.as_chunks_mut::<4>();
        for word in words {
            *word = (u32::from_ne_bytes(*word) ^ mask).to_ne_bytes();
        }
        for (byte, mask) in rest.iter_mut().zip(self.mask) {
            *byte ^= mask;
        }
        payload
    }
}

/// Begins a text message of one frame, whose payload of `length` bytes comes next.
pub fn begin_text(out: &mut Vec<u8>, length: usize) {
    begin(out, TEXT, length);
}

/// Asks for a sign of life.
pub fn write_ping(out: &mut Vec<u8>) {
    write(out, PING, b"");
}

/// Answers a ping.
pub fn write_pong(out: &mut Vec<u8>, payload: &[u8]) {
    write(out, PONG, payload);
}

/// Says goodbye; a `reason` longer than 123 bytes is cut, so ours are short.
pub fn write_close(out: &mut Vec<u8>, code: u16, reason: &str) {
    let reason = &reason.as_bytes()[..reason.len().min(MAX_CONTROL - 2)];
    write(out, CLOSE, &[&code.to_be_bytes(), reason].concat());
}

fn write(out: &mut Vec<u8>, opcode: u8, payload: &[u8]) {
    begin(out, opcode, payload.len());
    out.extend_from_slice(payload);
}

/// What a server says is not masked (§5.1).
fn begin(out: &mut Vec<u8>, opcode: u8, length: usize) {
    out.push(LAST | opcode);
    match length {
        short @ 0..=125 => out.push(short as u8),
        medium @ 126..=0xffff => {
            out.push(126);
            out.extend_from_slice(&(medium as u16).to_be_bytes());
        }
        long => {
            out.push(127);
            out.extend_from_slice(&(long as u64).to_be_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::ops::ControlFlow;

    use proptest::prelude::*;

    use super::{BINARY, CLOSE, CONTINUATION, Decoder, LAST, PING, PONG, Said, TEXT, Violation};

    const LONGEST: usize = 70_000;

    /// As a client writes it.
    fn frame(first: u8, payload: &[u8]) -> Vec<u8> {
        let mut frame = Vec::new();
        super::write(&mut frame, first & 0x0f, payload);
        (frame[0], frame[1]) = (first, frame[1] | 0x80);
        let (head, mask) = (frame.len() - payload.len(), [0x37, 0xfa, 0x21, 0x3d]);
        frame.truncate(head);
        frame.extend(mask);
        frame.extend(payload.iter().zip(mask.iter().cycle()).map(|(byte, mask)| byte ^ mask));
        frame
    }

    /// What is heard of it, in short, and how it ended.
    fn hear(pieces: &[&[u8]]) -> (Vec<String>, Option<Violation>) {
        let (mut decoder, mut heard) = (Decoder::default(), Vec::new());
        for piece in pieces {
            let read = decoder.read(&mut piece.to_vec(), LONGEST, |said| {
                heard.push(match said {
                    Said::Text(text) => text.to_owned(),
                    other => format!("{other:?}"),
                });
                ControlFlow::Continue(())
            });
            if let Err(violation) = read {
                return (heard, Some(violation));
            }
        }
        (heard, None)
    }

    #[track_caller]
    fn check(stream: &[u8], expected: &[&str], violation: Option<Violation>) {
        let expected = (expected.iter().map(ToString::to_string).collect(), violation);
        assert_eq!(hear(&[stream]), expected);
        assert_eq!(hear(&stream.chunks(1).collect::<Vec<_>>()), expected, "byte by byte");
    }

    #[test]
    fn the_vectors_of_rfc_6455() {
        check(&[0x81, 0x85, 0x37, 0xfa, 0x21, 0x3d, 0x7f, 0x9f, 0x4d, 0x51, 0x58], &["Hello"], None);
        let mut out = Vec::new();
        super::write(&mut out, TEXT, b"Hello");
        assert_eq!(out, [0x81, 0x05, 0x48, 0x65, 0x6c, 0x6c, 0x6f]);
        for (length, head) in [(256, &[0x81, 126, 1, 0][..]), (65_536, &[0x81, 127, 0, 0, 0, 0, 0, 1, 0, 0])]
        {
            out.clear();
            super::begin_text(&mut out, length);
            assert_eq!(out, head);
        }
    }

    #[test]
    fn control_frames_come_between_the_frames_of_a_message() {
        let stream = [
            frame(TEXT, b"one "),
            frame(LAST | PING, b"?"),
            frame(CONTINUATION, b""),
            frame(LAST | CONTINUATION, b"message"),
            frame(LAST | PONG, b""),
            frame(LAST | BINARY, &[255; 300]),
            frame(LAST | CLOSE, &[3, 232]),
        ]
        .concat();
        check(&stream, &["Ping([63])", "one message", "Pong", "Binary", "Close(Some(1000))"], None);
    }

    #[test]
    fn what_may_not_come_is_named() {
        let long = frame(LAST | TEXT, &[b'x'; LONGEST + 1]);
        let parts = [frame(TEXT, &[b'x'; LONGEST]), frame(LAST | CONTINUATION, b"x")].concat();
        for (stream, violation) in [
            (&[0x81, 0x05][..], Violation::Protocol),                // not masked
            (&frame(LAST | 0x40 | TEXT, b""), Violation::Protocol),  // a reserved bit
            (&frame(LAST | 3, b""), Violation::Protocol),            // no such opcode
            (&frame(LAST | CONTINUATION, b""), Violation::Protocol), // of nothing
            (&frame(PING, b""), Violation::Protocol),                // in parts
            (&frame(LAST | PING, &[0; 126]), Violation::Protocol),   // too long for a control frame
            (&[frame(TEXT, b""), frame(LAST | TEXT, b"")].concat(), Violation::Protocol), // within a message
            (&frame(LAST | CLOSE, b"\x03"), Violation::Protocol),    // half a code
            (&frame(LAST | CLOSE, &1005_u16.to_be_bytes()), Violation::Protocol),
            (&frame(LAST | CLOSE, b"\x03\xe8\xff"), Violation::NotUtf8),
            (&frame(LAST | TEXT, b"\xff"), Violation::NotUtf8),
            (&long, Violation::TooLong),
            (&long[..14], Violation::TooLong), // told by the length alone
            (&parts, Violation::TooLong),
            (&[0x82, 0xff, 255, 255, 255, 255, 255, 255, 255, 255, 0, 0, 0, 0], Violation::TooLong),
        ] {
            check(stream, &[], Some(violation));
        }
    }

    #[test]
    fn nothing_is_read_after_enough() {
        let mut stream = [frame(LAST | CLOSE, b""), frame(LAST | TEXT, b"late")].concat();
        let mut heard = 0;
        let read = Decoder::default().read(&mut stream, LONGEST, |_| {
            heard += 1;
            ControlFlow::Break(())
        });
        assert_eq!((heard, read), (1, Ok(ControlFlow::Break(()))));
    }

    proptest! {
        #[test]
        fn any_split_is_heard_alike(
            messages in prop::collection::vec(prop::collection::vec("[a-zé]{0,300}", 1..4), 1..8),
            sizes in prop::collection::vec(1..900_usize, 1..40),
        ) {
            let mut stream = Vec::new();
            for parts in &messages {
                for (index, part) in parts.iter().enumerate() {
                    let opcode = if index == 0 { TEXT } else { CONTINUATION };
                    let last = if index + 1 == parts.len() { LAST } else { 0 };
                    stream.extend(frame(last | opcode, part.as_bytes()));
                }
            }
            let (mut rest, mut pieces) = (&stream[..], Vec::new());
            for size in sizes.iter().cycle() {
                if rest.is_empty() { break; }
                let (piece, after) = rest.split_at((*size).min(rest.len()));
                pieces.push(piece);
                rest = after;
            }
            let expected: Vec<_> = messages.iter().map(|parts| parts.concat()).collect();
            prop_assert_eq!(hear(&pieces), (expected, None));
        }
    }

    #[test]
    fn a_length_that_no_memory_holds_is_too_long_even_without_a_limit() {
        let mut frame = [&[0x81, 0xff][..], &[0xff; 8], &[0; 4]].concat();
        let read = Decoder::default().read(&mut frame, usize::MAX, |_| ControlFlow::Continue(()));
        assert_eq!(read, Err(Violation::TooLong));
    }
}
