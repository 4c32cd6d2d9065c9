//! Room for a batch of datagrams. What was read stays where it lies until it is sent from there.
#![expect(unsafe_code, reason = "recvmmsg has no safe wrapper")]

use std::{
    io, mem,
    net::{IpAddr, SocketAddr, UdpSocket},
    ops::Range,
    os::fd::AsRawFd,
    ptr,
};

use super::control::{self, Control, read_name};

/// Bytes free before each datagram, for a header to be written in front of it.
pub const ROOM: usize = 64;
/// Bytes read at most: the longest UDP payload, or as many as the kernel coalesces.
const LONGEST: usize = 65_535;
/// From one slot to the next. Odd in lines of the processor's cache: the beginnings of all slots, which is all that short
/// datagrams touch, must not compete for the same few of its places.
const SLOT: usize = ROOM + 65_536 + 20 * 64;

/// Room for datagrams, a slot each, and what the kernel told of those that were read.
pub struct Arena {
    /// Pages are touched only as datagrams fill them.
    bytes: Vec<u8>,
    names: Vec<libc::sockaddr_storage>,
    controls: Vec<Control>,
    vectors: Vec<libc::iovec>,
    headers: Vec<libc::mmsghdr>,
    used: usize,
}

// SAFETY: the pointers in `headers` and `vectors` are into memory that this one owns, wherever it goes.
unsafe impl Send for Arena {}

/// What came into a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arrived {
    /// Who sent it; IPv4 is never in its IPv6-mapped form.
    pub from: SocketAddr,
    /// The local address it was sent to, if the socket was opened to tell.
    pub local: Option<IpAddr>,
    /// Where it begins. [`ROOM`] bytes before it, and at least three behind it, are free.
    pub start: usize,
    /// Bytes of it.
    pub length: usize,
    /// It is several datagrams of so many bytes each, but for the last, which may be shorter; or one.
    pub segment: usize,
}

impl Arrived {
    /// The datagrams, by where they lie.
    pub fn datagrams(self) -> impl Iterator<Item = Range<usize>> {
        let end = self.start + self.length;
        let count = self.length.div_ceil(self.segment.max(1)).max(1);
        (0..count).map(move |index| {
            let start = self.start + index * self.segment;
            start..end.min(start + self.segment)
        })
    }
}

impl Arena {
    /// So many slots, all free.
    #[must_use]
    pub fn new(slots: usize) -> Self {
        // SAFETY: all of these are plain data for which all zeroes are valid.
        let (name, vector, header) = unsafe { (mem::zeroed(), mem::zeroed(), mem::zeroed()) };
        let mut arena = Self {
            bytes: vec![0; slots * SLOT],
            names: vec![name; slots],
            controls: vec![Control::new(); slots],
            vectors: vec![vector; slots],
            headers: vec![header; slots],
            used: 0,
        };
        (0..slots).for_each(|slot| arena.lay_out(slot));
        arena
    }

    /// Once: nothing in here ever moves, and the kernel changes nothing of it but the lengths.
    fn lay_out(&mut self, slot: usize) {
        let start = slot * SLOT + ROOM;
        let space = &mut self.bytes[start..start + LONGEST];
        self.vectors[slot] = libc::iovec { iov_base: space.as_mut_ptr().cast(), iov_len: LONGEST };
        let header = &mut self.headers[slot].msg_hdr;
        header.msg_name = ptr::from_mut(&mut self.names[slot]).cast();
        header.msg_iov = &raw mut self.vectors[slot];
        header.msg_iovlen = 1;
        header.msg_control = self.controls[slot].as_mut_ptr().cast();
        self.offer(slot);
    }

    fn offer(&mut self, slot: usize) {
        let header = &mut self.headers[slot].msg_hdr;
        header.msg_namelen = mem::size_of::<libc::sockaddr_storage>() as u32;
        header.msg_controllen = control::ROOM;
    }

    /// Reads what there is without waiting into free slots, at most `at_most` of them. Gives the slots that it filled.
    ///
    /// # Errors
    /// What the kernel says; `WouldBlock` when there is nothing.
    pub fn receive(&mut self, socket: &UdpSocket, at_most: usize) -> io::Result<Range<usize>> {
        let first = self.used;
        let offered = at_most.min(self.free());
        // SAFETY: the headers of free slots point to buffers that live in `self`, with their true sizes.
        let count = unsafe {
            libc::recvmmsg(
                socket.as_raw_fd(),
                self.headers[first..].as_mut_ptr(),
                offered as u32,
                libc::MSG_DONTWAIT,
                ptr::null_mut(),
            )
        };
        let count = usize::try_from(count).map_err(|_| io::Error::last_os_error())?;
        self.used += count;
        Ok(first..self.used)
    }

    /// What came into a slot; `None` if its source makes no sense, or it was longer than anything may be.
    #[must_use]
    pub fn arrived(&self, slot: usize) -> Option<Arrived> {
        let header = &self.headers[slot];
        if header.msg_hdr.msg_flags & libc::MSG_TRUNC != 0 {
            return None;
        }
        let length = header.msg_len as usize;
        let told = self.controls[slot].read(header.msg_hdr.msg_controllen);
        Some(Arrived {
            from: read_name(&self.names[slot])?,
            local: told.local,
            start: slot * SLOT + ROOM,
            length,
            segment: told.segment.unwrap_or(length).min(length),
        })
    }

    /// Slots in use.
    #[must_use]
    pub fn used(&self) -> usize {
        self.used
    }

    /// Slots that are free.
    #[must_use]
    pub fn free(&self) -> usize {
        self.headers.len() - self.used
    }

    /// All slots are free again; nothing that lies there will be sent any more.
    pub fn clear(&mut self) {
        (0..self.used).for_each(|slot| self.offer(slot));
        self.used = 0;
    }

    /// The first free slot, for its owner to fill otherwise; what it then holds is [kept](Self::keep).
    ///
    /// # Panics
    /// If none is free.
    pub fn lend(&mut self) -> &mut [u8] {
        assert!(self.free() > 0, "a slot is free");
        let start = self.used * SLOT + ROOM;
        &mut self.bytes[start..start + SLOT - ROOM]
    }

    /// The first `length` bytes of the slot that was [lent](Self::lend) are in use. Gives where they lie.
    pub fn keep(&mut self, length: usize) -> Range<usize> {
        let start = self.used * SLOT + ROOM;
        self.used += 1;
        start..start + length
    }

    /// Whether `bytes` are those that lie at `start`.
    #[must_use]
    pub fn holds_at(&self, start: usize, bytes: &[u8]) -> bool {
        self.bytes.get(start..).is_some_and(|there| ptr::eq(there.as_ptr(), bytes.as_ptr()))
    }

    /// What lies there.
    #[must_use]
    pub fn bytes(&self, range: Range<usize>) -> &[u8] {
        &self.bytes[range]
    }

    /// The same, to be written.
    pub fn bytes_mut(&mut self, range: Range<usize>) -> &mut [u8] {
        &mut self.bytes[range]
    }
}
