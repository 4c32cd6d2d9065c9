//! What becomes of packets: those offered, those delivered, and what each costs.

use std::time::Duration;

use super::{
    Bench, Run, Share, Spent,
    crowd::Crowd,
    traffic::{Direction, Manner, Traffic},
    warn_of_limit,
};
use crate::bench::Report;

/// The end is reached when nothing has come for so long, or at most after so long; what a stream holds is not lost.
const QUIET: Duration = Duration::from_millis(100);
const LAST: Duration = Duration::from_secs(1);
const LAST_OF_STREAMS: Duration = Duration::from_secs(5);

/// Of a core: from here on our thread is taken to be busy, and the server's not to be.
const BUSY: f64 = 95.0;
const NOT_BUSY: f64 = 90.0;
/// Offered of what was asked for, and of what was offered lost, in percent.
const FALLS_SHORT: f64 = 95.0;
const LOSES_NOTHING: f64 = 1.0;

/// What was counted.
struct Outcome {
    share: Share,
    offered: u64,
    /// Of what was offered.
    delivered: u64,
    /// In the same time, whenever it was offered.
    arrived: u64,
    /// By our own sockets.
    dropped: u64,
    p50: f64,
    p99: f64,
}

pub(super) fn run(bench: &Bench<'_>, run: Run, phase: u32, report: &mut Report) -> Result<(), String> {
    let clients = if matches!(run, Run::Pair | Run::Direct) {
        bench.load.clients.next_multiple_of(2)
    } else {
        bench.load.clients
    };
    let mut crowd = bench.crowd(clients)?;
    if run != Run::Direct {
        crowd.allocate(clients)?;
    }
    match run {
        Run::Direct => {}
        Run::Pair => crowd.bind(|crowd, client| crowd.relayed(client ^ 1))?,
        _ => crowd.bind(|crowd, client| Ok(crowd.peer_address(client)))?,
    }
    let direction = match run {
        Run::Direct => Direction::BetweenPeers,
        Run::ToClient => Direction::FromPeers,
        _ => Direction::FromClients,
    };
    let outcome = measure(bench, run, &mut crowd, direction, phase)?;
    crowd.release();
    outcome.add(bench, run, report);
    Ok(())
}

fn measure(
    bench: &Bench<'_>,
    run: Run,
    crowd: &mut Crowd<'_>,
    direction: Direction,
    phase: u32,
) -> Result<Outcome, String> {
    let load = bench.load;
    let manner = Manner { size: load.size, rate: load.rate, burst: load.burst };
    let last = if crowd.is_streams() { LAST_OF_STREAMS } else { LAST };
    let mut traffic = Traffic::new(crowd, manner, direction, phase)?;
    traffic.go_on(run.name(), bench.warm_up())?;
    traffic.begin_phase();
    let (before, arrived, dropped) = (Spent::read(bench), traffic.tally.arrived, traffic.drops());
    traffic.go_on(run.name(), load.time)?;
    let (share, arrived) = (Spent::read(bench).since(before), traffic.tally.arrived - arrived);
    traffic.wait_for_the_last(QUIET, last)?;
    Ok(Outcome {
        share,
        offered: traffic.offered,
        delivered: traffic.tally.delivered,
        arrived,
        dropped: traffic.drops().saturating_sub(dropped),
        p50: traffic.tally.latencies.percentile(50),
        p99: traffic.tally.latencies.percentile(99),
    })
}

impl Outcome {
    fn add(&self, bench: &Bench<'_>, run: Run, report: &mut Report) {
        let name = run.name();
        let a_second = |count: u64| count as f64 / self.share.seconds;
        report.add(name, "offeredPerSecond", "packets offered", a_second(self.offered), "/s");
        report.add(name, "deliveredPerSecond", "packets delivered", a_second(self.arrived), "/s");
        report.add(name, "lossPercent", "lost of what was offered", self.loss(), "%");
        if let Some(server) = self.share.server {
            let each = 1e6 * server / self.arrived as f64;
            report.add(name, "serverUsPerPacket", "the server's CPU for a packet delivered", each, "µs");
        }
        if let Some(machine) = self.share.machine {
            let each = 1e6 * machine / self.arrived as f64;
            report.add(name, "machineUsPerPacket", "this machine's CPU for it, all in all", each, "µs");
        }
        self.share.add_percents(run, report);
        report.add(name, "p50Us", "latency, p50", self.p50, "µs");
        report.add(name, "p99Us", "latency, p99", self.p99, "µs");
        let limit = self.limit(bench.load.rate);
        if let Some(why) = &limit {
            warn_of_limit(run, why);
        }
        report.add(name, "generatorLimited", "this load was the limit", f64::from(limit.is_some()), "");
    }

    fn loss(&self) -> f64 {
        100.0 * self.offered.saturating_sub(self.delivered) as f64 / self.offered as f64
    }

    /// Why the figures are of this load, if they are.
    fn limit(&self, rate: u64) -> Option<String> {
        if self.dropped > 0 {
            return Some(format!("its own sockets dropped {} packets that had arrived", self.dropped));
        }
        let offered = self.offered as f64 / self.share.seconds;
        let kept = 100.0 * offered / rate as f64;
        if rate > 0 && kept < FALLS_SHORT {
            return Some(format!("it offered {offered:.0} packets a second where {rate} were asked for"));
        }
        let own = self.share.own_percent()?;
        // With no rate to keep it never rests, also if others have some of its core: who loses nothing is not the limit.
        let loses = self.loss() > LOSES_NOTHING;
        if own < BUSY && (rate > 0 || loses) {
            return None;
        }
        match self.share.server_percent() {
            Some(server) => (server <= NOT_BUSY).then(|| {
                format!(
                    "it sent what it could ({own:.0} % of a core), the server was not busy ({server:.0} %)"
                )
            }),
            None => (!loses).then(|| {
                format!("it sent what it could ({own:.0} % of a core), and the server lost nothing")
            }),
        }
    }
}
