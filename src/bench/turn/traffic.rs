//! Packets through the relay, as many as asked for: who sends, when, and what arrives of it.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use super::{
    client,
    crowd::{Crowd, Ear},
    stamp::{Latencies, Stamp},
};
use crate::{
    bench::{now, progress},
    turn::channel_data,
    udp::Way,
};

/// What is due is sent this often.
const TICK: Duration = Duration::from_millis(1);
/// What could not be sent for so long is not sent any more: a load that had to stop is no reason for a flood.
const CATCH_UP: Duration = Duration::from_millis(20);
/// With no rate to keep: packets sent before it is asked what has arrived.
const MANY: usize = 512;
/// Payloads up to this size are copied whole: the kernel has one piece to look at, not two.
const COPIED: usize = 256;
/// Of so many packets, the latency of one is looked at.
const SAMPLED: u32 = 16;

/// Who sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    /// Clients send in their channels.
    FromClients,
    /// Peers send to relayed addresses.
    FromPeers,
    /// Peers send to each other, two and two.
    BetweenPeers,
}

/// How it is sent.
#[derive(Clone, Copy, Debug)]
pub(super) struct Manner {
    /// Bytes of each payload.
    pub(super) size: usize,
    /// Packets a second; 0 is as many as there can be.
    pub(super) rate: u64,
    /// Packets that one sends in a row; with 1, those of different senders alternate.
    pub(super) burst: usize,
}

/// What arrives.
pub(super) struct Tally {
    /// Time is counted from here.
    pub(super) zero: Instant,
    /// The phase that counts.
    pub(super) phase: u32,
    /// Of it.
    pub(super) delivered: u64,
    /// Of this phase or any of the run.
    pub(super) arrived: u64,
    pub(super) latencies: Latencies,
}

impl Tally {
    fn new(phase: u32) -> Self {
        Self { zero: now(), phase, delivered: 0, arrived: 0, latencies: Latencies::default() }
    }

    pub(super) fn nanos(&self) -> u64 {
        (now() - self.zero).as_nanos() as u64
    }

    fn count(&mut self, payload: &[u8]) {
        let Some(stamp) = Stamp::read(payload) else { return };
        // The phase before is the warm-up of this one.
        self.arrived += u64::from(stamp.phase == self.phase || stamp.phase.wrapping_add(1) == self.phase);
        if stamp.phase != self.phase {
            return;
        }
        self.delivered += 1;
        if stamp.number % SAMPLED == 0 {
            let nanos = self.nanos().saturating_sub(stamp.at);
            self.latencies.add(nanos);
        }
    }
}

impl Ear for Tally {
    fn at_client(&mut self, _client: usize, payload: &[u8]) {
        self.count(payload);
    }

    fn at_peer(&mut self, _peer: usize, _from: SocketAddr, payload: &[u8]) {
        self.count(payload);
    }
}

/// One that sends.
struct Sender {
    way: Way,
    sent: u32,
}

/// Packets under way.
pub(super) struct Traffic<'c, 's> {
    crowd: &'c mut Crowd<'s>,
    manner: Manner,
    direction: Direction,
    senders: Vec<Sender>,
    /// Whose turn it is.
    next: usize,
    pace: Pace,
    pub(super) tally: Tally,
    /// What our own kernel took, of this phase.
    pub(super) offered: u64,
    said: u64,
}

impl<'c, 's> Traffic<'c, 's> {
    /// `phase` and the one behind it are told apart from everything else.
    pub(super) fn new(
        crowd: &'c mut Crowd<'s>,
        manner: Manner,
        direction: Direction,
        phase: u32,
    ) -> Result<Self, String> {
        let count = if direction == Direction::BetweenPeers { crowd.peers() } else { crowd.len() };
        let mut senders = Vec::with_capacity(count);
        for client in 0..count {
            let way = match direction {
                Direction::FromClients => Way::connected(client as u32),
                Direction::FromPeers => crowd.way_from_peer(client)?,
                Direction::BetweenPeers => crowd.way_between_peers(client)?,
            };
            senders.push(Sender { way, sent: 0 });
        }
        let tally = Tally::new(phase);
        let pace = Pace { rate: manner.rate, since: tally.zero, sent: 0 };
        Ok(Self { crowd, manner, direction, senders, next: 0, pace, tally, offered: 0, said: u64::MAX })
    }

    /// What follows is the next phase.
    pub(super) fn begin_phase(&mut self) {
        self.tally.phase = self.tally.phase.wrapping_add(1);
        self.tally.delivered = 0;
        self.tally.latencies.clear();
        self.offered = 0;
    }

    /// Sends and hears for some time.
    pub(super) fn go_on(&mut self, name: &str, time: Duration) -> Result<(), String> {
        let until = now() + time;
        loop {
            let now = now();
            if now >= until {
                return Ok(());
            }
            match (self.pace.due(now, self.manner.burst), self.manner.burst) {
                (0, _) => {}
                (due, 1) => self.send_alternating(due)?,
                (due, _) => self.send_rows(due)?,
            }
            let wait = if self.manner.rate == 0 { Duration::ZERO } else { TICK };
            self.crowd.hear(wait, &mut self.tally)?;
            self.crowd.keep_up(now)?;
            self.say(name, until - now);
        }
    }

    /// Hears until nothing has arrived for some time.
    pub(super) fn wait_for_the_last(&mut self, quiet: Duration, at_most: Duration) -> Result<(), String> {
        let end = now() + at_most;
        let (mut seen, mut last) = (self.tally.arrived, now());
        while now() < end && now() - last < quiet {
            self.crowd.hear(TICK, &mut self.tally)?;
            if self.tally.arrived != seen {
                (seen, last) = (self.tally.arrived, now());
            }
        }
        Ok(())
    }

    /// One client after the other sends some in a row.
    fn send_rows(&mut self, due: usize) -> Result<(), String> {
        let mut pushed = 0;
        for _ in 0..due / self.manner.burst {
            pushed += self.push(self.next, self.manner.burst)?;
            self.next = (self.next + 1) % self.senders.len();
            if self.crowd.outbox.is_full() {
                pushed -= self.crowd.flush();
            }
        }
        pushed -= self.crowd.flush();
        self.offered += pushed;
        Ok(())
    }

    /// One packet of each client in turn, each given to the kernel by itself.
    fn send_alternating(&mut self, due: usize) -> Result<(), String> {
        for _ in 0..due {
            let pushed = self.push(self.next, 1)?;
            self.offered += pushed - self.crowd.flush();
            self.next = (self.next + 1) % self.senders.len();
        }
        Ok(())
    }

    /// Gives how many were pushed.
    fn push(&mut self, number: usize, count: usize) -> Result<u64, String> {
        let (at, phase, size) = (self.tally.nanos(), self.tally.phase, self.manner.size);
        let Sender { way, sent } = &mut self.senders[number];
        let mut packet = [0; channel_data::HEADER + COPIED];
        packet[..channel_data::HEADER].copy_from_slice(&client::header(size as u16));
        let from_client = self.direction == Direction::FromClients;
        let on_stream = from_client && self.crowd.is_streams();
        let begin = if from_client { 0 } else { channel_data::HEADER };
        let copied = if size <= COPIED { size } else { Stamp::LENGTH };
        let mut pushed = 0;
        for _ in 0..count {
            let stamp = Stamp { phase, sender: number as u32, number: *sent, at };
            *sent = sent.wrapping_add(1);
            packet[channel_data::HEADER..][..Stamp::LENGTH].copy_from_slice(&stamp.bytes());
            let head = &packet[begin..channel_data::HEADER + copied];
            if on_stream {
                pushed += u64::from(self.crowd.write(number, head, size - copied));
                continue;
            }
            self.crowd.outbox.push(way, head, Crowd::padding(size - copied));
            pushed += 1;
        }
        if on_stream {
            self.crowd.flush_stream(number)?;
        }
        Ok(pushed)
    }

    /// Datagrams that did not fit into the buffers of our own sockets.
    pub(super) fn drops(&self) -> u64 {
        self.crowd.drops()
    }

    /// Once a second.
    fn say(&mut self, name: &str, left: Duration) {
        if left.as_secs() != self.said {
            self.said = left.as_secs();
            progress(&format!("{name}: {} s left", self.said));
        }
    }
}

/// When how much is due.
struct Pace {
    /// A second; 0 is as many as there can be.
    rate: u64,
    since: Instant,
    sent: u64,
}

impl Pace {
    /// Whole bursts, which are taken to be sent.
    fn due(&mut self, now: Instant, burst: usize) -> usize {
        if self.rate == 0 {
            return MANY.next_multiple_of(burst);
        }
        // Whole ticks: how often we look, which is when something arrives, must not shape what is sent.
        let ticks = (now - self.since).as_nanos() / TICK.as_nanos();
        let by_now = ticks * TICK.as_nanos() * u128::from(self.rate) / 1_000_000_000;
        let due = (by_now as u64 - self.sent) / burst as u64 * burst as u64;
        self.sent += due;
        let most = u128::from(self.rate) * CATCH_UP.as_nanos() / 1_000_000_000;
        (due as usize).min((most as usize + 1).next_multiple_of(burst))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{MANY, Pace};
    use crate::bench::now;

    #[test]
    fn a_pace_is_kept_in_whole_bursts_and_not_made_up_for() {
        let since = now();
        for (burst, expected) in [(1, 990), (8, 984)] {
            let mut pace = Pace { rate: 10_000, since, sent: 0 };
            let mut sent = 0;
            for micros in (0..100_000).step_by(300) {
                sent += pace.due(since + Duration::from_micros(micros), burst);
            }
            assert_eq!(sent, expected);
            assert_eq!(pace.due(since + Duration::from_secs(5), burst), 201_usize.next_multiple_of(burst));
        }
        assert_eq!(Pace { rate: 0, since, sent: 0 }.due(since, 1), MANY);
    }
}
