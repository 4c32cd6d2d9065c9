//! A client's connection, driven by a thread with a [`Poll`](crate::poll::Poll): bytes in, bytes out, with TLS or without.
//!
//! An idle one owns a socket, a TLS session and no buffer. What is to be sent gathers until the end of the batch, so
//! that it leaves in one write.

use std::{
    io::{self, Read, Write},
    net::TcpStream,
    ops::DerefMut,
    time::Instant,
};

use rustls::{ConnectionCommon, ServerConnection, SideData};

/// Emptied buffers kept for the next connection, and how much each may hold.
const SPARE: usize = 32;
const SPARE_SIZE: usize = 64 << 10;
/// Bytes read of a TLS connection at once: more than the session itself would read.
const ENCRYPTED: usize = 16 << 10;

/// Bytes of the buffer that is read to: what is read at once, and the longest TLS record that had come in part before it.
pub const PIECE: usize = 2 * ENCRYPTED + 1_024;

/// One connection; the side of TLS that we are on is a client's only where we are the load.
pub struct Stream<T = ServerConnection> {
    /// Not blocking; to be watched.
    pub socket: TcpStream,
    tls: Option<Box<T>>,
    pending: Vec<u8>,
    /// Of `pending`, what has been passed on.
    passed: usize,
    /// The kernel's buffer is full since then.
    full_since: Option<Instant>,
}

/// What the connections of a thread share.
pub struct Spare {
    /// Buffers that one has emptied, for the next.
    emptied: Vec<Vec<u8>>,
    /// Where TLS is read to.
    encrypted: Box<[u8]>,
}

impl Default for Spare {
    fn default() -> Self {
        Self { emptied: Vec::new(), encrypted: vec![0; ENCRYPTED].into() }
    }
}

/// What a flush came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flushed {
    /// Everything is on its way.
    All,
    /// The kernel's buffer is full; `first`: since this very flush.
    Blocked {
        /// Whether the socket has to be watched for room from now on.
        first: bool,
    },
    /// All of it, after it had been blocked.
    Unblocked,
}

impl<T, S> Stream<T>
where
    T: DerefMut<Target = ConnectionCommon<S>>,
    S: SideData,
{
    /// The session may hold bytes that were read with the handshake.
    pub fn new(socket: TcpStream, mut tls: Option<Box<T>>) -> Self {
        if let Some(tls) = &mut tls {
            // The limit is that on what is pending.
            tls.set_buffer_limit(None);
        }
        Self { socket, tls, pending: Vec::new(), passed: 0, full_since: None }
    }

    /// Whether it is encrypted.
    pub fn is_tls(&self) -> bool {
        self.tls.is_some()
    }

    /// Reads what there is of the client's bytes into a `buffer` of [`PIECE`]; 0 at their end.
    ///
    /// # Errors
    /// `WouldBlock` when there is nothing yet; anything else when the connection is gone, or its TLS is broken.
    pub fn read(&mut self, spare: &mut Spare, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.read_decrypted(buffer) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                done => return done,
            }
            let Some(tls) = &mut self.tls else { return self.socket.read(buffer) };
            let length = self.socket.read(&mut spare.encrypted)?;
            if length == 0 {
                return Ok(0);
            }
            match decrypt(tls, &spare.encrypted[..length], buffer) {
                // Part of a record, or something of TLS's own.
                Ok(0) => {}
                Ok(length) => return Ok(length),
                Err(error) => {
                    // The alert that says what was wrong.
                    let _ = tls.write_tls(&mut self.socket);
                    return Err(error);
                }
            }
            // An answer of TLS's own, to a key update for instance.
            if tls.wants_write() {
                let _ = tls.write_tls(&mut self.socket);
            }
        }
    }

    /// The same of what needs no more from the socket.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn read_decrypted(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.tls.as_mut().map_or(Err(io::ErrorKind::WouldBlock.into()), |tls| tls.reader().read(buffer))
    }

    /// Bytes that wait to be sent.
    pub fn pending(&self) -> usize {
        self.pending.len()
    }

    /// Where to put what is to be sent, at the end.
    pub fn outbox(&mut self, spare: &mut Spare) -> &mut Vec<u8> {
        if self.pending.capacity() == 0 {
            self.pending = spare.emptied.pop().unwrap_or_default();
        }
        &mut self.pending
    }

    /// Since when the client has taken nothing of what is pending; `None` while it does.
    pub fn full_since(&self) -> Option<Instant> {
        self.full_since
    }

    /// Passes on what is pending, as far as the kernel takes it; over TLS in records, of which `record` says how many
    /// bytes of what is left the next one holds.
    ///
    /// # Errors
    /// When the connection is gone.
    pub fn flush(
        &mut self,
        now: Instant,
        spare: &mut Spare,
        record: impl Fn(&[u8]) -> usize,
    ) -> io::Result<Flushed> {
        match self.pass_on(record) {
            Ok(()) => {
                let mut empty = std::mem::take(&mut self.pending);
                self.passed = 0;
                if spare.emptied.len() < SPARE && (1..=SPARE_SIZE).contains(&empty.capacity()) {
                    empty.clear();
                    spare.emptied.push(empty);
                }
                Ok(if self.full_since.take().is_some() { Flushed::Unblocked } else { Flushed::All })
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                let first = self.full_since.is_none();
                if first || self.passed > 0 {
                    self.full_since = Some(now);
                }
                self.pending.drain(..self.passed);
                self.passed = 0;
                Ok(Flushed::Blocked { first })
            }
            Err(error) => Err(error),
        }
    }

    fn pass_on(&mut self, record: impl Fn(&[u8]) -> usize) -> io::Result<()> {
        let Some(tls) = &mut self.tls else {
            while self.passed < self.pending.len() {
                self.passed += taken(self.socket.write(&self.pending[self.passed..]))?;
            }
            return Ok(());
        };
        loop {
            while tls.wants_write() {
                taken(tls.write_tls(&mut Socket(&self.socket)))?;
            }
            if self.passed == self.pending.len() {
                return Ok(());
            }
            // All of it is taken: there is no limit here but that on what is pending.
            while let left @ [_, ..] = &self.pending[self.passed..] {
                let record = record(left).clamp(1, left.len());
                tls.writer().write_all(&left[..record])?;
                self.passed += record;
            }
        }
    }

    /// Without it, the other side of a TLS connection would have to take the end for an attack (RFC 8446 §6.1).
    pub fn say_goodbye(&mut self) {
        if let Some(tls) = &mut self.tls {
            tls.send_close_notify();
            let _ = tls.write_tls(&mut self.socket);
        }
    }
}

/// Gives how many bytes of `clear` it filled. They are taken out of the session as they come, which would not hold all.
fn decrypt<S: SideData>(
    tls: &mut ConnectionCommon<S>,
    mut encrypted: &[u8],
    clear: &mut [u8],
) -> io::Result<usize> {
    let mut filled = 0;
    // Nothing is read behind the client's last word.
    while !encrypted.is_empty() && tls.read_tls(&mut encrypted)? > 0 {
        let state = tls.process_new_packets().map_err(io::Error::other)?;
        let end = filled + state.plaintext_bytes_to_read();
        tls.reader().read_exact(&mut clear[filled..end])?;
        filled = end;
    }
    Ok(filled)
}

/// A socket to which one slice goes as one slice: the kernel takes a list of one for more work than that.
struct Socket<'a>(&'a TcpStream);

impl Write for Socket<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes)
    }

    fn write_vectored(&mut self, slices: &[io::IoSlice<'_>]) -> io::Result<usize> {
        if let [only] = slices { self.0.write(only) } else { self.0.write_vectored(slices) }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A stream that takes nothing more is over.
fn taken(written: io::Result<usize>) -> io::Result<usize> {
    match written {
        Ok(0) => Err(io::ErrorKind::WriteZero.into()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::{Flushed, Spare, Stream};
    use crate::clock;

    #[test]
    fn emptied_buffers_are_passed_on() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let connect = || {
            let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            (Stream::<rustls::ServerConnection>::new(listener.accept().unwrap().0, None), client)
        };
        let ((mut first, _alice), (mut second, _bob)) = (connect(), connect());
        let (now, mut spare) = (clock::now().mono, Spare::default());
        first.outbox(&mut spare).extend_from_slice(b"hello");
        let buffer = first.pending.as_ptr();
        assert_eq!(first.flush(now, &mut spare, <[u8]>::len).unwrap(), Flushed::All);
        assert_eq!(first.pending.capacity(), 0, "an idle stream owns no buffer");
        assert_eq!(second.outbox(&mut spare).as_ptr(), buffer);
    }
}
