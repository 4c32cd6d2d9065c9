//! So many a second, and so many at once: a limit that remembers one number of whoever it limits, the time at which all
//! that was taken is paid off (the generic cell rate algorithm).

/// The clock of a shard's batches has so many ticks in a second.
pub const SECOND: u64 = 1_000_000;

/// A limit on a clock that counts from zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    per_second: u64,
    /// Ticks of the clock in a second.
    second: u64,
    /// The longest debt, in ticks.
    burst: u64,
}

impl Rate {
    /// `per_second` units, and `burst` of them at once, on a clock of `second` ticks a second. `None` for no units,
    /// which is "unlimited" in the configuration.
    #[must_use]
    pub fn new(per_second: u32, burst: u64, second: u64) -> Option<Self> {
        let per_second = u64::from(per_second);
        let burst = burst.saturating_mul(second).checked_div(per_second)?;
        Some(Self { per_second, second, burst })
    }

    /// Units in a second.
    #[must_use]
    pub fn per_second(self) -> u64 {
        self.per_second
    }

    /// The longest debt, in ticks of its clock.
    #[must_use]
    pub fn burst(self) -> u64 {
        self.burst
    }

    /// Takes `units` at `now` for who has paid off what it took at `paid`: gives when these, too, will be paid off.
    /// `None`: not now.
    #[must_use]
    pub fn take(self, paid: u64, now: u64, units: u64) -> Option<u64> {
        let paid = paid.max(now) + (units * self.second).div_ceil(self.per_second);
        (paid - now <= self.burst).then_some(paid)
    }
}

#[cfg(test)]
mod tests {
    use super::Rate;

    #[test]
    fn a_burst_and_then_the_rate() {
        let rate = Rate::new(10, 20, 1_000).unwrap();
        let mut paid = 0;
        let mut take = |now, units| rate.take(paid, now, units).map(|after| paid = after).is_some();
        assert_eq!((0..30).filter(|_| take(5_000, 1)).count(), 20);
        assert!(!take(5_099, 1));
        assert!(take(5_100, 1));
        assert!(!take(5_100, 1));
        assert_eq!((0..300).filter(|step| take(5_200 + step * 10, 1)).count(), 30, "ten a second");
        assert!(take(99_000, 20), "all of it again");
        assert!(!take(99_000, 1));
    }

    #[test]
    fn none_is_unlimited_and_much_is_much() {
        assert_eq!(Rate::new(0, 10, 1_000), None);
        let rate = Rate::new(u32::MAX, u32::MAX.into(), 1_000_000_000).unwrap();
        assert!(rate.take(0, 0, 65_535).is_some_and(|paid| paid < 16_000));
    }
}
