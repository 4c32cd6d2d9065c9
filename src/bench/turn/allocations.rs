//! Allocations themselves: that come and go, and that only are.

use std::time::Duration;

use super::{
    Bench, Run, Server, Spent,
    client::Step,
    crowd::{Crowd, Deaf},
};
use crate::bench::{Report, now, progress};

const TICK: Duration = Duration::from_millis(1);

/// All clients allocate, bind and release, over and over.
pub(super) fn churn(bench: &Bench<'_>, report: &mut Report) -> Result<(), String> {
    let clients = bench.load.clients;
    let mut crowd = bench.crowd(clients)?;
    // The first time each learns its nonce.
    crowd.allocate(clients)?;
    for client in 0..clients {
        crowd.ask(client, Step::Bind(crowd.peer_address(client)))?;
    }
    go_round(&mut crowd, bench.warm_up())?;
    let before = Spent::read(bench);
    let cycles = go_round(&mut crowd, bench.load.time)? as f64;
    let share = Spent::read(bench).since(before);
    crowd.release();
    let name = Run::Churn.name();
    report.add(name, "cyclesPerSecond", "allocated, bound and released", cycles / share.seconds, "/s");
    if let Some(server) = share.server {
        report.add(name, "serverUsPerCycle", "the server's CPU for each", 1e6 * server / cycles, "µs");
    }
    share.add_percents(Run::Churn, report);
    Ok(())
}

/// Gives how many times a client did it all.
fn go_round(crowd: &mut Crowd<'_>, time: Duration) -> Result<u64, String> {
    let until = now() + time;
    let (mut cycles, mut done, mut said) = (0, Vec::new(), u64::MAX);
    while let Some(left) = until.checked_duration_since(now()).filter(|left| !left.is_zero()) {
        crowd.hear(TICK, &mut Deaf)?;
        crowd.take_done(&mut done);
        for (client, step) in done.drain(..) {
            cycles += u64::from(step == Step::Release);
            let next = match step {
                Step::Allocate => Step::Bind(crowd.peer_address(client)),
                Step::Bind(_) | Step::Refresh => Step::Release,
                Step::Release => Step::Allocate,
            };
            crowd.ask(client, next)?;
        }
        crowd.look_after(true)?;
        if std::mem::replace(&mut said, left.as_secs()) != left.as_secs() {
            progress(&format!("churn: {} s left", left.as_secs()));
        }
    }
    Ok(cycles)
}

/// Allocations with a channel each, which then have nothing to do.
pub(super) fn idle(bench: &Bench<'_>, report: &mut Report) -> Result<(), String> {
    let (clients, name) = (bench.load.clients, Run::Idle.name());
    let mut crowd = bench.crowd(clients)?;
    let resident = || bench.under_load().and_then(Server::resident);
    let (memory, before) = (resident(), Spent::read(bench));
    crowd.allocate(clients)?;
    crowd.bind(|crowd, client| Ok(crowd.peer_address(client)))?;
    let share = Spent::read(bench).since(before);
    report.add(name, "allocations", "allocations, each with a channel", clients as f64, "");
    report.add(name, "setUpsPerSecond", "set up", clients as f64 / share.seconds, "/s");
    if let Some(server) = share.server {
        let each = 1e6 * server / clients as f64;
        report.add(name, "serverUsPerSetUp", "the server's CPU for each", each, "µs");
    }
    if let (Some(before), Some(memory)) = (memory, resident()) {
        let each = (memory - before) / 1024.0 / clients as f64;
        report.add(name, "residentKibEach", "resident memory of the server for each", each, "KiB");
    }
    let before = Spent::read(bench);
    hold(&mut crowd, bench.load.time)?;
    if let Some(percent) = Spent::read(bench).since(before).server_percent() {
        report.add(name, "serverCpuPercent", "of a core, the server, while they are idle", percent, "%");
    }
    crowd.release();
    Ok(())
}

fn hold(crowd: &mut Crowd<'_>, time: Duration) -> Result<(), String> {
    let until = now() + time;
    while let Some(left) = until.checked_duration_since(now()).filter(|left| !left.is_zero()) {
        crowd.hear(left.min(10 * TICK), &mut Deaf)?;
        crowd.keep_up(now())?;
        progress(&format!("idle: {} s left", left.as_secs()));
    }
    Ok(())
}
