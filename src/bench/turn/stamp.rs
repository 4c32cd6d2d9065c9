//! What each packet of the load carries, and what is made of it on arrival.

/// The first bytes of a payload: phase, sender, number, time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stamp {
    /// Tells packets of the warm-up, and of former runs, from those that count.
    pub(super) phase: u32,
    pub(super) sender: u32,
    pub(super) number: u32,
    /// Nanoseconds since the load began.
    pub(super) at: u64,
}

impl Stamp {
    /// Bytes of it.
    pub(super) const LENGTH: usize = 20;

    pub(super) fn bytes(self) -> [u8; Self::LENGTH] {
        let mut to = [0; Self::LENGTH];
        to[..4].copy_from_slice(&self.phase.to_be_bytes());
        to[4..8].copy_from_slice(&self.sender.to_be_bytes());
        to[8..12].copy_from_slice(&self.number.to_be_bytes());
        to[12..].copy_from_slice(&self.at.to_be_bytes());
        to
    }

    /// `None` of what is too short to be ours.
    pub(super) fn read(payload: &[u8]) -> Option<Self> {
        let number = |at: usize| Some(u32::from_be_bytes(*payload.get(at..)?.first_chunk()?));
        let at = u64::from_be_bytes(*payload.get(12..)?.first_chunk()?);
        Some(Self { phase: number(0)?, sender: number(4)?, number: number(8)?, at })
    }
}

/// Latencies, by the octave and a 64th of it: a fixed size, whatever there is to count, and within 2 % of the truth.
pub(super) struct Latencies {
    counts: Box<[u64]>,
    total: u64,
}

/// The octave is divided into so many.
const STEPS: u64 = 64;

impl Default for Latencies {
    fn default() -> Self {
        Self { counts: vec![0; bucket(u64::MAX) + 1].into(), total: 0 }
    }
}

impl Latencies {
    pub(super) fn add(&mut self, nanos: u64) {
        self.counts[bucket(nanos)] += 1;
        self.total += 1;
    }

    pub(super) fn clear(&mut self) {
        self.counts.fill(0);
        self.total = 0;
    }

    /// What so many percent do not exceed, in microseconds.
    pub(super) fn percentile(&self, percent: u64) -> f64 {
        let wanted = (self.total * percent).div_ceil(100).max(1);
        let mut seen = 0;
        let reached = self.counts.iter().position(|count| {
            seen += count;
            seen >= wanted
        });
        reached.map_or(f64::NAN, |bucket| nanos(bucket) as f64 / 1_000.0)
    }
}

fn bucket(nanos: u64) -> usize {
    // Up to 64 each nanosecond is one.
    let octave = nanos.checked_ilog2().unwrap_or(0).saturating_sub(STEPS.ilog2());
    (u64::from(octave) * STEPS + (nanos >> octave)) as usize
}

/// Where a bucket begins.
fn nanos(bucket: usize) -> u64 {
    let bucket = bucket as u64;
    let octave = (bucket / STEPS).saturating_sub(1);
    (bucket - octave * STEPS) << octave
}

#[cfg(test)]
mod tests {
    use super::{Latencies, Stamp, bucket, nanos};

    #[test]
    fn what_is_written_is_read() {
        let stamp = Stamp { phase: 1, sender: 2, number: u32::MAX, at: u64::MAX - 7 };
        let payload = stamp.bytes();
        assert_eq!(Stamp::read(&payload), Some(stamp));
        assert_eq!(Stamp::read(&payload[..19]), None);
    }

    #[test]
    fn a_bucket_is_within_two_percent() {
        for exact in [0, 1, 63, 64, 65, 127, 128, 1_000, 54_321, 1_000_000_007, u64::MAX] {
            let about = nanos(bucket(exact));
            assert!(about <= exact && exact - about <= exact / 50, "{exact}: {about}");
        }
    }

    #[test]
    fn percentiles_are_of_what_was_added() {
        let mut latencies = Latencies::default();
        assert!(latencies.percentile(50).is_nan());
        (1..=1_000).for_each(|micros| latencies.add(micros * 1_000));
        assert!((latencies.percentile(50) - 500.0).abs() < 10.0);
        assert!((latencies.percentile(99) - 990.0).abs() < 20.0);
        latencies.clear();
        assert!(latencies.percentile(99).is_nan());
    }
}
