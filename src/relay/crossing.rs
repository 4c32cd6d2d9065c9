//! From one shard to another: packets between two allocations of this host that live in different shards. A parcel for
//! each shard and turn, no lock, and no socket.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering::Relaxed},
    mpsc::{self, Receiver, SyncSender, TrySendError},
};

use crate::turn::{RelayPort, forward::Load};

/// Parcels, and bytes in them, that a shard lets wait: as much as a listener's buffer would. Whoever has more for it goes on
/// filling the next parcel, and drops what that cannot hold.
pub const WAITING: usize = 1_024;
const WAITING_BYTES: usize = 4 << 20;
/// Empty parcels that a shard keeps.
pub const SPARE: usize = 64;
/// Bytes of a parcel: a slot of the arena holds them.
const PARCEL: usize = 64 << 10;
/// Bytes free before each payload: a ChannelData header will stand there.
pub const GAP: usize = 4;

/// Packets for one shard.
#[derive(Debug, Default)]
pub struct Parcel {
    bytes: Vec<u8>,
    crossers: Vec<Crosser>,
    /// The shard that made it, and gets it back.
    home: usize,
}

/// Packets in a row between the same two relayed addresses, of one length.
#[derive(Clone, Copy, Debug)]
pub struct Crosser {
    /// Of the sender.
    pub from: RelayPort,
    /// Of the receiver.
    pub to: RelayPort,
    /// How many there are, and how long.
    pub load: Load,
    /// Where the first payload begins; the others follow, [`GAP`] bytes between them.
    pub start: usize,
}

/// Where a shard receives.
pub struct Arrivals {
    parcels: Receiver<Parcel>,
    /// Bytes that wait.
    waiting: Arc<AtomicUsize>,
    emptied: Receiver<Parcel>,
}

/// How the others reach it.
pub struct Crossing {
    parcels: SyncSender<Parcel>,
    waiting: Arc<AtomicUsize>,
    emptied: SyncSender<Parcel>,
}

impl Crossing {
    /// Both sides.
    pub fn new() -> (Self, Arrivals) {
        let (parcels, arriving) = mpsc::sync_channel(WAITING);
        let (emptied, returning) = mpsc::sync_channel(SPARE);
        let waiting = Arc::new(AtomicUsize::new(0));
        let crossing = Self { parcels, waiting: Arc::clone(&waiting), emptied };
        (crossing, Arrivals { parcels: arriving, waiting, emptied: returning })
    }

    /// Hands over a parcel.
    ///
    /// # Errors
    /// Gives it back when too many wait there already.
    pub fn send(&self, parcel: Parcel) -> Result<(), Parcel> {
        let bytes = parcel.bytes.len();
        if self.waiting.load(Relaxed) + bytes > WAITING_BYTES {
            return Err(parcel);
        }
        self.waiting.fetch_add(bytes, Relaxed);
        self.parcels.try_send(parcel).map_err(|error| {
            self.waiting.fetch_sub(bytes, Relaxed);
            match error {
                TrySendError::Full(parcel) | TrySendError::Disconnected(parcel) => parcel,
            }
        })
    }

    /// A parcel comes home to be filled again.
    pub fn give_back(&self, parcel: Parcel) {
        // Its home may have enough of them.
        let _ = self.emptied.try_send(parcel);
    }
}

impl Arrivals {
    /// The next parcel that waits.
    pub fn next(&self) -> Option<Parcel> {
        let parcel = self.parcels.try_recv().ok()?;
        self.waiting.fetch_sub(parcel.bytes.len(), Relaxed);
        Some(parcel)
    }

    /// One of our own that comes home.
    pub fn next_emptied(&self) -> Option<Parcel> {
        self.emptied.try_recv().ok()
    }
}

impl Parcel {
    /// An empty one.
    pub fn new(home: usize) -> Self {
        Self { home, ..Self::default() }
    }

    /// Which shard made it.
    pub fn home(&self) -> usize {
        self.home
    }

    /// Whether nothing is in it.
    pub fn is_empty(&self) -> bool {
        self.crossers.is_empty()
    }

    /// Whether a payload of `length` bytes still fits. Any fits into an empty one.
    pub fn takes(&self, length: usize) -> bool {
        self.is_empty() || self.bytes.len() + GAP + length <= PARCEL
    }

    /// Puts in a payload on its way from one relayed address to another.
    pub fn push(&mut self, from: RelayPort, to: RelayPort, payload: &[u8]) {
        self.bytes.extend_from_slice(&[0; GAP]);
        let (start, length) = (self.bytes.len(), payload.len());
        match self.crossers.last_mut() {
            Some(last) if (last.from, last.to, last.load.length) == (from, to, length) => {
                last.load.packets += 1;
            }
            _ => self.crossers.push(Crosser { from, to, load: Load::one(length), start }),
        }
        self.bytes.extend_from_slice(payload);
    }

    /// All payloads, as they lie.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Which of them there are.
    pub fn crossers(&self) -> &[Crosser] {
        &self.crossers
    }

    /// Nothing is in it any more.
    pub fn clear(&mut self) {
        self.bytes.clear();
        self.crossers.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::{Crossing, GAP, PARCEL, Parcel, RelayPort, WAITING, WAITING_BYTES};

    const HERE: RelayPort = RelayPort { relay: 0, port: 50_000 };
    const THERE: RelayPort = RelayPort { relay: 0, port: 50_002 };

    #[test]
    fn payloads_cross_in_order() {
        let (crossing, arrivals) = Crossing::new();
        let mut parcel = Parcel::new(3);
        for payload in ["one", "two", "four", ""] {
            parcel.push(HERE, THERE, payload.as_bytes());
        }
        crossing.send(parcel).unwrap();
        let mut arrived = arrivals.next().unwrap();
        let mut payloads = Vec::new();
        for crosser in arrived.crossers() {
            assert_eq!((crosser.from, crosser.to), (HERE, THERE));
            for packet in 0..crosser.load.packets {
                let start = crosser.start + packet * (crosser.load.length + GAP);
                payloads.push(str::from_utf8(&arrived.bytes()[start..start + crosser.load.length]).unwrap());
            }
        }
        assert_eq!(payloads, ["one", "two", "four", ""]);
        arrived.clear();
        assert!(arrived.is_empty() && arrived.home() == 3 && arrivals.next().is_none());
    }

    #[test]
    fn what_waits_for_a_shard_that_does_not_read_is_bounded_in_number_and_bytes() {
        for (size, expected) in [(1, WAITING), (1_200, WAITING_BYTES / PARCEL)] {
            let (crossing, arrivals) = Crossing::new();
            let filled = || {
                let mut parcel = Parcel::new(0);
                parcel.push(HERE, THERE, &vec![7; size]);
                while size > 1 && parcel.takes(size) {
                    parcel.push(HERE, THERE, &vec![7; size]);
                }
                parcel
            };
            let sent = (0..2 * WAITING).take_while(|_| crossing.send(filled()).is_ok()).count();
            assert!((expected..=expected + 1).contains(&sent), "{sent} of {size}");
            assert_eq!(std::iter::from_fn(|| arrivals.next()).count(), sent);
            assert!(crossing.send(filled()).is_ok(), "there is room again");
        }
    }
}
