//! The four-byte header of ChannelData (RFC 8656 §12.4): a view, and writing in place.

use super::Channel;

/// Bytes before the payload.
pub const HEADER: usize = 4;

/// The channel and the payload of a ChannelData datagram. Bytes beyond the length are padding (or not; UDP senders
/// may do either, §12.5) and left out. `None` for a bad channel or a length that promises more than there is.
#[must_use]
pub fn parse(datagram: &[u8]) -> Option<(Channel, &[u8])> {
    let (header, rest) = datagram.split_first_chunk::<HEADER>()?;
    let channel = Channel::new(u16::from_be_bytes([header[0], header[1]]))?;
    let length = usize::from(u16::from_be_bytes([header[2], header[3]]));
    Some((channel, rest.get(..length)?))
}

/// The header in front of a payload of `length` bytes.
#[must_use]
pub fn header(channel: Channel, length: u16) -> [u8; HEADER] {
    let ([c0, c1], [l0, l1]) = (channel.number().to_be_bytes(), length.to_be_bytes());
    [c0, c1, l0, l1]
}

#[cfg(test)]
mod tests {
    use super::{Channel, header, parse};

    #[test]
    fn what_is_written_is_read() {
        let channel = Channel::new(0x7ffe).unwrap();
        for length in [0usize, 1, 3, 4, 1200] {
            let mut datagram = header(channel, u16::try_from(length).unwrap()).to_vec();
            datagram.extend(std::iter::repeat_n(7, length));
            assert_eq!(parse(&datagram), Some((channel, &datagram[4..])));
            datagram.extend([0; 3]);
            assert_eq!(parse(&datagram), Some((channel, &datagram[4..4 + length])), "padded");
        }
    }

    #[test]
    fn a_length_that_lies_is_refused() {
        assert_eq!(parse(&[0x40, 0, 0, 5, 1, 2, 3, 4]), None);
        assert_eq!(parse(&[0x3f, 0xff, 0, 0]), None);
        assert_eq!(parse(&[0x40, 0, 0]), None);
    }
}
