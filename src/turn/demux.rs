//! What a datagram on the listening port is, by its first bytes (RFC 8656 §12.4, RFC 7983).

use super::{Channel, channel_data};

/// A datagram from a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Datagram<'a> {
    /// ChannelData: the channel and its payload, borrowed.
    ChannelData(Channel, &'a [u8]),
    /// A Send indication, whole.
    Send(&'a [u8]),
    /// Any other STUN message, whole.
    Stun(&'a [u8]),
    /// Nothing that we speak.
    Unknown,
}

/// Type of a Send indication: method 0x006, class indication.
pub const SEND_INDICATION: [u8; 2] = [0x00, 0x16];

/// Sorts a datagram. Nothing is verified beyond the length of ChannelData.
#[must_use]
pub fn sort(datagram: &[u8]) -> Datagram<'_> {
    match datagram.first() {
        Some(0x40..=0x7f) => match channel_data::parse(datagram) {
            Some((channel, payload)) => Datagram::ChannelData(channel, payload),
            None => Datagram::Unknown,
        },
        Some(0x00..=0x3f) if datagram.starts_with(&SEND_INDICATION) => Datagram::Send(datagram),
        Some(0x00..=0x3f) => Datagram::Stun(datagram),
        _ => Datagram::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use super::{Channel, Datagram, sort};

    #[test]
    fn by_the_first_bytes() {
        let channel = Channel::new(0x4001).unwrap();
        assert_eq!(sort(&[0x40, 0x01, 0, 1, 9]), Datagram::ChannelData(channel, &[9]));
        assert_eq!(sort(&[0x00, 0x16, 0, 0]), Datagram::Send(&[0x00, 0x16, 0, 0]));
        assert_eq!(sort(&[0x00, 0x01]), Datagram::Stun(&[0x00, 0x01]));
        for unknown in [&[][..], &[0x80, 0, 0, 0], &[0xff], &[0x40, 0x01, 0, 2, 9], &[0x40]] {
            assert_eq!(sort(unknown), Datagram::Unknown, "{unknown:?}");
        }
    }
}
