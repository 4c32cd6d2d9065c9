//! Round trips: one packet of each client at a time, to its peer and back, both ways through the relay.

use std::{
    collections::VecDeque,
    net::SocketAddr,
    time::{Duration, Instant},
};

use super::{
    Bench, Run, Spent, client,
    crowd::{Crowd, Ear, FIRST_PEER},
    stamp::{Latencies, Stamp},
};
use crate::{
    bench::{Report, now, progress},
    turn::channel_data,
    udp::Way,
};

/// A packet that is not back after so long is lost.
const LOST: Duration = Duration::from_secs(1);
/// How often that is looked for.
const LOOK: Duration = Duration::from_millis(10);
const TICK: Duration = Duration::from_millis(1);

/// Who pings, and what came back.
struct Pings {
    zero: Instant,
    phase: u32,
    /// Of each client: the number of its packet under way, and since when.
    under_way: Vec<(u32, Option<Instant>)>,
    /// Clients that have none.
    idle: VecDeque<usize>,
    /// What peers have to send back.
    echoes: Vec<(usize, SocketAddr, [u8; Stamp::LENGTH])>,
    counts: bool,
    back: u64,
    lost: u64,
    latencies: Latencies,
}

impl Ear for Pings {
    fn at_client(&mut self, client: usize, payload: &[u8]) {
        let Some(stamp) = Stamp::read(payload).filter(|stamp| stamp.phase == self.phase) else { return };
        let (number, since) = &mut self.under_way[client];
        if stamp.number != *number {
            return;
        }
        let Some(since) = since.take() else { return };
        self.idle.push_back(client);
        if self.counts {
            self.back += 1;
            self.latencies.add((now() - since).as_nanos() as u64);
        }
    }

    fn at_peer(&mut self, peer: usize, from: SocketAddr, payload: &[u8]) {
        let is_ours = Stamp::read(payload).is_some_and(|stamp| stamp.phase == self.phase);
        if let Some(stamp) = payload.first_chunk().filter(|_| is_ours) {
            self.echoes.push((peer, from, *stamp));
        }
    }
}

pub(super) fn run(bench: &Bench<'_>, phase: u32, report: &mut Report) -> Result<(), String> {
    let clients = bench.load.clients;
    let mut crowd = bench.crowd(clients)?;
    crowd.allocate(clients)?;
    crowd.bind(|crowd, client| Ok(crowd.peer_address(client)))?;
    let mut pings = Pings {
        zero: now(),
        phase,
        under_way: vec![(0, None); clients],
        idle: (0..clients).collect(),
        echoes: Vec::new(),
        counts: false,
        back: 0,
        lost: 0,
        latencies: Latencies::default(),
    };
    go_on(bench, &mut crowd, &mut pings, bench.warm_up())?;
    pings.counts = true;
    let before = Spent::read(bench);
    go_on(bench, &mut crowd, &mut pings, bench.load.time)?;
    let share = Spent::read(bench).since(before);
    crowd.release();
    let name = Run::Ping.name();
    report.add(name, "roundTripsPerSecond", "round trips", pings.back as f64 / share.seconds, "/s");
    report.add(name, "p50Us", "client, peer and back, p50", pings.latencies.percentile(50), "µs");
    report.add(name, "p99Us", "client, peer and back, p99", pings.latencies.percentile(99), "µs");
    report.add(name, "lost", "packets that did not come back", pings.lost as f64, "");
    share.add_percents(Run::Ping, report);
    Ok(())
}

fn go_on(bench: &Bench<'_>, crowd: &mut Crowd<'_>, pings: &mut Pings, time: Duration) -> Result<(), String> {
    let (begun, mut looked, mut sent, mut said) = (now(), now(), 0, u64::MAX);
    loop {
        let time_is = now();
        if time_is - begun >= time {
            return Ok(());
        }
        let by_now = match bench.load.rate {
            0 => usize::MAX,
            rate => ((time_is - begun).as_secs_f64() * rate as f64) as usize,
        };
        sent += pings.send(crowd, bench.load.size, by_now.saturating_sub(sent))?;
        crowd.hear(TICK, pings)?;
        pings.echo(crowd, bench.load.size);
        crowd.keep_up(time_is)?;
        if time_is - looked >= LOOK {
            looked = time_is;
            pings.give_up(time_is);
        }
        let left = (begun + time - time_is).as_secs();
        if std::mem::replace(&mut said, left) != left {
            progress(&format!("ping: {left} s left"));
        }
    }
}

impl Pings {
    /// Clients that have nothing under way send. Gives how many did.
    fn send(&mut self, crowd: &mut Crowd<'_>, size: usize, at_most: usize) -> Result<usize, String> {
        let count = self.idle.len().min(at_most);
        for client in self.idle.drain(..count) {
            let (number, since) = &mut self.under_way[client];
            *number = number.wrapping_add(1);
            let at = now();
            *since = Some(at);
            let at = (at - self.zero).as_nanos() as u64;
            let stamp = Stamp { phase: self.phase, sender: client as u32, number: *number, at };
            let mut head = [0; channel_data::HEADER + Stamp::LENGTH];
            head[..channel_data::HEADER].copy_from_slice(&client::header(size as u16));
            head[channel_data::HEADER..].copy_from_slice(&stamp.bytes());
            if crowd.is_streams() {
                crowd.write(client, &head, size - Stamp::LENGTH);
                crowd.flush_stream(client)?;
            } else {
                crowd.outbox.push(
                    &Way::connected(client as u32),
                    &head,
                    Crowd::padding(size - Stamp::LENGTH),
                );
            }
        }
        crowd.flush();
        Ok(count)
    }

    /// Peers send back what they got.
    fn echo(&mut self, crowd: &mut Crowd<'_>, size: usize) {
        for (peer, to, stamp) in self.echoes.drain(..) {
            let way = Way { socket: FIRST_PEER + peer as u32, from: None, to };
            crowd.outbox.push(&way, &stamp, Crowd::padding(size - Stamp::LENGTH));
        }
        crowd.flush();
    }

    /// What is lost is not waited for.
    fn give_up(&mut self, now: Instant) {
        for (client, (number, since)) in self.under_way.iter_mut().enumerate() {
            if since.take_if(|since| now - *since >= LOST).is_some() {
                // It counts no more if it comes after all.
                *number = number.wrapping_add(1);
                self.lost += u64::from(self.counts);
                self.idle.push_back(client);
            }
        }
    }
}
