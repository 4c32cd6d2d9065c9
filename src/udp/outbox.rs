//! What is to be sent: grouped by where it goes, in order within one way, and equal neighbours as one train (GSO).
#![expect(unsafe_code, reason = "sendmmsg with control data has no safe wrapper")]

use std::{
    io, mem,
    net::{IpAddr, SocketAddr, UdpSocket},
    ops::Range,
    os::fd::AsRawFd,
    ptr,
};

use super::{
    arena::Arena,
    control::{Control, Name},
};

/// Trains given to the kernel at once.
const TRAINS: usize = 64;
/// Datagrams of one train (UDP_MAX_SEGMENTS; kernels since 6.10 take twice as many).
const TRAIN_PACKETS: usize = 64;
/// Bytes of one train: what one IPv4 packet holds.
const TRAIN_BYTES: usize = 65_507;
/// More than this, and it is time to [flush](Outbox::flush).
const MANY_PACKETS: usize = 4_096;
const MANY_BYTES: usize = 256 << 10;

/// Where a datagram leaves and goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Way {
    /// Its owner's number for the socket.
    pub socket: u32,
    /// The local address, if the socket has several.
    pub from: Option<IpAddr>,
    /// In the form that the socket knows: for one of IPv6, [mapped](super::mapped). Port 0, which nothing can be sent to,
    /// is where the socket is [connected](Self::connected) to.
    pub to: SocketAddr,
}

/// Datagrams to be sent. Their bytes stay where they lie, in an [`Arena`], or are copied in here.
#[derive(Default)]
pub struct Outbox {
    segmentation: bool,
    copied: Vec<u8>,
    packets: Vec<Packet>,
    runs: Vec<Run>,
    /// The runs by way, and in the order in which they came.
    order: Vec<(u64, u32)>,
    // For the kernel, of one socket:
    vectors: Vec<libc::iovec>,
    /// Of each packet, its first vector.
    first_vectors: Vec<usize>,
    trains: Vec<Train>,
    names: Vec<Name>,
    controls: Vec<Control>,
    headers: Vec<libc::mmsghdr>,
}

// SAFETY: the pointers in it are made and used within one call of `flush`.
unsafe impl Send for Outbox {}

/// Neighbours that go the same way.
struct Run {
    way: Way,
    first: usize,
    count: usize,
}

/// One datagram: what was copied, what lies in the arena, zeroes.
struct Packet {
    copied: u32,
    copied_length: u32,
    body: u32,
    body_length: u32,
    padding: u8,
}

/// Datagrams that the kernel gets as one.
struct Train {
    way: Way,
    /// Packets, as [`Outbox::first_vectors`] counts them.
    packets: Range<usize>,
    segment: usize,
    bytes: usize,
    /// A shorter one ends it.
    ended: bool,
}

impl Packet {
    fn length(&self) -> usize {
        self.copied_length as usize + self.body_length as usize + usize::from(self.padding)
    }
}

impl Outbox {
    /// An empty one; without `segmentation` the kernel gets each datagram by itself.
    #[must_use]
    pub fn new(segmentation: bool) -> Self {
        Self { segmentation, ..Self::default() }
    }

    /// A datagram of `head`, which is copied, and of what lies at `body` in the arena.
    pub fn push(&mut self, way: &Way, head: &[u8], body: Range<usize>) {
        self.push_padded(way, head, body, 0);
    }

    /// The same, with up to 255 zeroes behind it.
    pub fn push_padded(&mut self, way: &Way, head: &[u8], body: Range<usize>, padding: u8) {
        match self.runs.last_mut() {
            Some(run) if run.way == *way => run.count += 1,
            _ => self.runs.push(Run { way: *way, first: self.packets.len(), count: 1 }),
        }
        self.packets.push(Packet {
            copied: self.copied.len() as u32,
            copied_length: head.len() as u32,
            body: body.start as u32,
            body_length: body.len() as u32,
            padding,
        });
        self.copied.extend_from_slice(head);
    }

    /// Whether nothing waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.packets.is_empty()
    }

    /// Whether so much waits that it should leave.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.packets.len() >= MANY_PACKETS || self.copied.len() >= MANY_BYTES
    }

    /// Sends all, without waiting. Gives how many datagrams the kernel would not take: a full buffer, no route, no socket.
    pub fn flush<'s>(&mut self, arena: &Arena, sockets: impl Fn(u32) -> Option<&'s UdpSocket>) -> u64 {
        self.sort();
        let (mut refused, mut next) = (0, 0);
        while next < self.order.len() {
            let number = self.way(next).socket;
            let end = (next..self.order.len()).find(|index| self.way(*index).socket != number);
            let end = end.unwrap_or(self.order.len());
            refused += match sockets(number) {
                Some(socket) => {
                    self.couple(arena, next..end);
                    self.send(socket)
                }
                None => self.order[next..end].iter().map(|(_, run)| self.runs[*run as usize].count).sum(),
            };
            next = end;
        }
        self.copied.clear();
        self.packets.clear();
        self.runs.clear();
        self.order.clear();
        refused as u64
    }

    /// What goes one way becomes neighbours; a socket's ways are, too.
    fn sort(&mut self) {
        self.order.extend(self.runs.iter().enumerate().map(|(index, run)| (run.way.key(), index as u32)));
        self.order.sort_unstable();
    }

    fn way(&self, index: usize) -> &Way {
        &self.runs[self.order[index].1 as usize].way
    }

    /// Makes trains of some of the ordered runs.
    fn couple(&mut self, arena: &Arena, order: Range<usize>) {
        self.vectors.clear();
        self.first_vectors.clear();
        self.trains.clear();
        for index in order {
            let run = &self.runs[self.order[index].1 as usize];
            for packet in &self.packets[run.first..run.first + run.count] {
                let number = self.first_vectors.len();
                self.first_vectors.push(self.vectors.len());
                push_vectors(&mut self.vectors, packet, &self.copied, arena);
                let length = packet.length();
                match self.trains.last_mut() {
                    Some(train) if self.segmentation && train.takes(&run.way, length) => train.add(length),
                    _ => self.trains.push(Train::new(run.way, number, length)),
                }
            }
        }
        self.first_vectors.push(self.vectors.len());
    }

    /// Gives how many datagrams were refused.
    fn send(&mut self, socket: &UdpSocket) -> usize {
        (0..self.trains.len())
            .step_by(TRAINS)
            .map(|first| self.send_trains(socket, first..self.trains.len().min(first + TRAINS)))
            .sum()
    }

    fn send_trains(&mut self, socket: &UdpSocket, trains: Range<usize>) -> usize {
        if let [Train { way: way @ Way { from: None, .. }, packets, .. }] = &self.trains[trains.clone()]
            && let &[vector] =
                &self.vectors[self.first_vectors[packets.start]..self.first_vectors[packets.end]]
        {
            return usize::from(!send_plain(socket, way, vector));
        }
        self.address(trains.clone());
        let (mut sent, mut refused) = (0, 0);
        while sent < trains.len() {
            let headers = &mut self.headers[sent..];
            // SAFETY: the headers point to names, controls and vectors of `self`, and these to bytes of `self` and of the
            // arena that `flush` borrows; the kernel only reads them, but for the lengths it writes into the headers.
            let count = unsafe {
                let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
                libc::sendmmsg(socket.as_raw_fd(), headers.as_mut_ptr(), headers.len() as u32, flags)
            };
            if let Ok(count @ 1..) = usize::try_from(count) {
                sent += count;
                continue;
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                refused += self.send_otherwise(socket, trains.start + sent, sent, &error);
                sent += 1;
            }
        }
        refused
    }

    /// Names, control messages and headers of some trains.
    fn address(&mut self, trains: Range<usize>) {
        self.names.clear();
        self.controls.clear();
        self.headers.clear();
        // None of them may move from here on.
        self.names.reserve(trains.len());
        self.controls.reserve(trains.len());
        for train in &self.trains[trains] {
            let (name, name_length) = train.way.name();
            self.names.push(name);
            let mut control = Control::new();
            let mut control_length = 0;
            if let Some(from) = train.way.from {
                control_length = control.write_source(control_length, train.way.to.is_ipv6(), from);
            }
            if train.packets.len() > 1 {
                control_length = control.write_segment(control_length, train.segment as u16);
            }
            self.controls.push(control);
            let vectors = self.first_vectors[train.packets.start]..self.first_vectors[train.packets.end];
            // SAFETY: msghdr is plain data for which all zeroes are valid.
            let mut header: libc::mmsghdr = unsafe { mem::zeroed() };
            if name_length > 0 {
                header.msg_hdr.msg_name = ptr::from_mut(self.names.last_mut().expect("just pushed")).cast();
                header.msg_hdr.msg_namelen = name_length;
            }
            header.msg_hdr.msg_iovlen = vectors.len();
            header.msg_hdr.msg_iov = self.vectors[vectors].as_mut_ptr();
            if control_length > 0 {
                let control = self.controls.last_mut().expect("just pushed");
                header.msg_hdr.msg_control = control.as_mut_ptr().cast();
                header.msg_hdr.msg_controllen = control_length;
            }
            self.headers.push(header);
        }
    }

    /// What the kernel would not take as a train may go datagram by datagram.
    fn send_otherwise(
        &mut self,
        socket: &UdpSocket,
        train: usize,
        header: usize,
        error: &io::Error,
    ) -> usize {
        let packets = self.trains[train].packets.clone();
        // EIO: the device cannot do it. EINVAL, EMSGSIZE: one datagram is longer than the path lets pass whole.
        let of_trains = matches!(error.raw_os_error(), Some(libc::EIO | libc::EINVAL | libc::EMSGSIZE));
        if packets.len() == 1 || !of_trains {
            return packets.len();
        }
        if error.raw_os_error() == Some(libc::EIO) {
            self.segmentation = false;
            tracing::info!(
                "the network device cannot send UDP in trains (GSO): datagrams are sent one by one"
            );
        }
        packets.filter(|packet| !self.send_single(socket, *packet, header)).count()
    }

    /// One datagram of the train whose header it is.
    fn send_single(&mut self, socket: &UdpSocket, packet: usize, header: usize) -> bool {
        let vectors = self.first_vectors[packet]..self.first_vectors[packet + 1];
        let mut single = self.headers[header].msg_hdr;
        // The segment is the last of the control messages.
        single.msg_controllen -= Control::SEGMENT;
        if single.msg_controllen == 0 {
            single.msg_control = ptr::null_mut();
        }
        single.msg_iovlen = vectors.len();
        single.msg_iov = self.vectors[vectors].as_mut_ptr();
        // SAFETY: as in `send_trains`.
        let sent = unsafe {
            libc::sendmsg(socket.as_raw_fd(), &raw const single, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL)
        };
        sent >= 0
    }
}

impl Way {
    /// To where the socket is connected: the kernel has looked up the route already.
    #[must_use]
    pub fn connected(socket: u32) -> Self {
        Self { socket, from: None, to: SocketAddr::from(([0; 4], 0)) }
    }

    /// Address and length of the destination, none if the socket has one.
    fn name(&self) -> (Name, u32) {
        let (name, length) = Name::of(self.to);
        (name, if self.to.port() == 0 { 0 } else { length })
    }

    /// Ways through one socket are neighbours. Two that have the same number by chance only make shorter trains.
    fn key(&self) -> u64 {
        let ip = match self.to.ip() {
            IpAddr::V4(ip) => u64::from(ip.to_bits()),
            IpAddr::V6(ip) => {
                let bits = ip.to_bits();
                (bits >> 64) as u64 ^ bits as u64
            }
        };
        let mixed = (ip ^ u64::from(self.to.port()) << 40).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        u64::from(self.socket) << 32 | mixed >> 32
    }
}

impl Train {
    fn new(way: Way, packet: usize, length: usize) -> Self {
        // An empty datagram is nothing to cut into pieces.
        Self { way, packets: packet..packet + 1, segment: length, bytes: length, ended: length == 0 }
    }

    fn takes(&self, way: &Way, length: usize) -> bool {
        !self.ended
            && (1..=self.segment).contains(&length)
            && self.packets.len() < TRAIN_PACKETS
            && self.bytes + length <= TRAIN_BYTES
            && self.way == *way
    }

    fn add(&mut self, length: usize) {
        self.packets.end += 1;
        self.bytes += length;
        self.ended = length < self.segment;
    }
}

/// One datagram that lies in one place: the system call with the least to look at.
fn send_plain(socket: &UdpSocket, way: &Way, vector: libc::iovec) -> bool {
    let (name, length) = way.name();
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: the vector is of bytes that `flush` borrows, the name is on this stack; the kernel only reads them.
    let sent = unsafe {
        let name = if length > 0 { (&raw const name).cast() } else { ptr::null() };
        libc::sendto(socket.as_raw_fd(), vector.iov_base, vector.iov_len, flags, name, length)
    };
    sent >= 0
}

/// What there is to pad with.
static ZEROES: [u8; 256] = [0; 256];

fn push_vectors(vectors: &mut Vec<libc::iovec>, packet: &Packet, copied: &[u8], arena: &Arena) {
    let mut push = |bytes: &[u8]| {
        vectors.push(libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() });
    };
    if packet.copied_length > 0 {
        push(&copied[packet.copied as usize..][..packet.copied_length as usize]);
    }
    if packet.body_length > 0 {
        let body = packet.body as usize;
        push(arena.bytes(body..body + packet.body_length as usize));
    }
    if packet.padding > 0 {
        push(&ZEROES[..usize::from(packet.padding)]);
    }
}

#[cfg(test)]
mod tests {
    use std::{
        net::{SocketAddr, UdpSocket},
        os::fd::AsRawFd,
        time::Duration,
    };

    use super::{Arena, Outbox, TRAIN_PACKETS, Way};
    use crate::udp::{coalesce, mapped};

    fn socket(at: &str) -> (UdpSocket, SocketAddr) {
        let socket = UdpSocket::bind(at).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let at = socket.local_addr().unwrap();
        (socket, at)
    }

    fn to(to: SocketAddr) -> Way {
        Way { socket: 0, from: None, to }
    }

    /// What comes, a number of bytes a datagram.
    fn lengths(socket: &UdpSocket, count: usize) -> Vec<usize> {
        let mut buffer = [0; 65_536];
        (0..count).map(|_| socket.recv(&mut buffer).unwrap()).collect()
    }

    #[test]
    fn each_way_keeps_its_order_whatever_the_lengths_and_the_neighbours() {
        for segmentation in [true, false] {
            let (mut outbox, arena) = (Outbox::new(segmentation), Arena::new(1));
            let (sender, _) = socket("127.0.0.1:0");
            let (peers, ats): (Vec<_>, Vec<_>) = (0..3).map(|_| socket("127.0.0.1:0")).unzip();
            let sizes = [100, 100, 60, 100, 0, 100, 200, 200, 200, 1, 1_000, 1_000, 999, 1_000];
            for (number, size) in sizes.into_iter().enumerate() {
                for at in &ats {
                    let head: Vec<u8> = (0..size.min(40)).map(|_| number as u8).collect();
                    outbox.push(&to(*at), &head, 0..size - head.len());
                }
            }
            assert_eq!(outbox.flush(&arena, |_| Some(&sender)), 0);
            for peer in &peers {
                let mut buffer = [0xff; 2_048];
                for (number, size) in sizes.into_iter().enumerate() {
                    assert_eq!(peer.recv(&mut buffer).unwrap(), size);
                    assert!(size == 0 || usize::from(buffer[0]) == number);
                }
            }
            assert!(outbox.is_empty());
        }
    }

    #[test]
    fn equal_neighbours_are_one_train_also_when_they_were_pushed_between_others() {
        let (mut outbox, arena) = (Outbox::new(true), Arena::new(1));
        let (sender, _) = socket("127.0.0.1:0");
        let (peers, ats): (Vec<_>, Vec<_>) = (0..2).map(|_| socket("127.0.0.1:0")).unzip();
        for _ in 0..TRAIN_PACKETS + 2 {
            ats.iter().for_each(|at| outbox.push(&to(*at), b"head", 0..500));
        }
        outbox.flush(&arena, |_| Some(&sender));
        assert_eq!(outbox.trains.len(), 2 * 2);
        for peer in &peers {
            assert_eq!(lengths(peer, TRAIN_PACKETS + 2), [504; TRAIN_PACKETS + 2]);
        }
    }

    #[test]
    fn a_train_arrives_in_one_slot_and_is_told_apart() {
        let (mut outbox, mut arena) = (Outbox::new(true), Arena::new(4));
        let (sender, from) = socket("127.0.0.1:0");
        let (peer, at) = socket("127.0.0.1:0");
        coalesce(&peer).unwrap();
        for length in [700, 700, 700, 33] {
            outbox.push_padded(&to(at), b"abc", 0..length - 4, 1);
        }
        outbox.flush(&arena, |_| Some(&sender));
        let slots = arena.receive(&peer, 4).unwrap();
        assert_eq!(slots, 0..1);
        let arrived = arena.arrived(0).unwrap();
        assert_eq!((arrived.from, arrived.length, arrived.segment), (from, 2_133, 700));
        let lengths: Vec<_> = arrived.datagrams().map(|datagram| datagram.len()).collect();
        assert_eq!(lengths, [700, 700, 700, 33]);
        for datagram in arrived.datagrams() {
            assert!(arena.bytes(datagram).starts_with(b"abc"));
        }
    }

    #[test]
    fn a_connected_socket_needs_no_destination() {
        for segmentation in [true, false] {
            let (mut outbox, arena) = (Outbox::new(segmentation), Arena::new(1));
            let ((sender, _), (peer, at)) = (socket("127.0.0.1:0"), socket("127.0.0.1:0"));
            sender.connect(at).unwrap();
            // Also alone, and in one piece.
            for (count, body) in [(5, 0..100), (1, 0..0)] {
                (0..count).for_each(|_| outbox.push(&Way::connected(0), b"head", body.clone()));
                assert_eq!(outbox.flush(&arena, |_| Some(&sender)), 0);
                assert_eq!(lengths(&peer, count), vec![4 + body.len(); count]);
            }
            outbox.push(&Way::connected(0), b"head", 0..0);
            assert_eq!(outbox.flush(&arena, |_| Some(&peer)), 1, "this one is not");
        }
    }

    #[test]
    fn what_no_train_can_carry_goes_by_itself() {
        let (mut outbox, arena) = (Outbox::new(true), Arena::new(1));
        let (sender, _) = socket("[::]:0");
        let (peer, at) = socket("127.0.0.1:0");
        let way = Way { from: Some("127.0.0.1".parse().unwrap()), ..to(mapped(at)) };
        // Two are longer than one packet may be, even here.
        (0..2).for_each(|_| outbox.push(&way, b"x", 0..33_000));
        assert_eq!(outbox.flush(&arena, |_| Some(&sender)), 0);
        assert_eq!(lengths(&peer, 2), [33_001; 2]);
    }

    #[test]
    fn a_path_that_is_too_narrow_for_a_train_is_none_for_its_datagrams() {
        let (mut outbox, arena) = (Outbox::new(true), Arena::new(1));
        let (sender, _) = socket("[::1]:0");
        let (peer, at) = socket("[::1]:0");
        let mtu: libc::c_int = 1_280;
        // SAFETY: the option takes an int, and is given one with its size.
        let done = unsafe {
            let (mtu, size) = ((&raw const mtu).cast(), size_of_val(&mtu) as u32);
            libc::setsockopt(sender.as_raw_fd(), libc::IPPROTO_IPV6, libc::IPV6_MTU, mtu, size)
        };
        assert_eq!(done, 0);
        (0..3).for_each(|_| outbox.push(&to(at), b"x", 0..2_000));
        assert_eq!(outbox.flush(&arena, |_| Some(&sender)), 0);
        assert_eq!(outbox.trains.len(), 1);
        assert_eq!(lengths(&peer, 3), [2_001; 3]);
    }

    #[test]
    fn what_cannot_leave_is_counted_and_holds_up_nothing() {
        let (mut outbox, arena) = (Outbox::new(true), Arena::new(1));
        let (sender, _) = socket("127.0.0.1:0");
        let (peer, at) = socket("127.0.0.1:0");
        // Broadcast needs a permission of its own, and nobody knows a socket 7.
        let nowhere: SocketAddr = "255.255.255.255:9".parse().unwrap();
        for _ in 0..3 {
            outbox.push(&to(nowhere), b"x", 0..10);
            outbox.push(&to(at), b"x", 0..10);
            outbox.push(&Way { socket: 7, ..to(at) }, b"x", 0..10);
        }
        // Longer than a datagram may be.
        outbox.push(&to(at), b"head", 0..65_535);
        assert_eq!(outbox.flush(&arena, |number| (number == 0).then_some(&sender)), 7);
        assert_eq!(lengths(&peer, 3), [11; 3]);
    }
}
