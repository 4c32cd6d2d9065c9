//! What those get who have proved nothing: little, and not for ever.

use super::trace::{ALLOCATED, World};

/// Two answers a second, 20 at once. All the names live in one /24.
fn strict() -> World {
    World { unauthenticated: 2, ..World::default() }
}

/// `who` asks, and is answered, so many times.
fn answered(time: u64, who: &str, count: usize, request: &str, answer: &str) -> String {
    format!("{time}s {who} > {request}\n{time}s {who} < {answer}\n").repeat(count)
}

#[test]
fn over_the_budget_there_is_silence_whatever_is_asked() {
    let mut trace = answered(0, "alice", 10, "Binding", "Binding ok mapped=9.0.0.1:1000");
    trace += &answered(0, "bob", 8, "Allocate auth without=realm", "Allocate 400");
    trace += &answered(0, "bob", 1, "Allocate", "Allocate 401 realm nonce");
    trace += &answered(0, "bob", 1, "Binding unknown=0003", "Binding 420 0x0003");
    for request in [
        "Binding",
        "Binding unknown=0003",
        "Allocate",
        "Allocate auth garbled",
        "Allocate auth without=realm",
        "Allocate auth nonce=stale",
        "Refresh auth secret=guess",
        "CreatePermission",
        "ChannelBind",
    ] {
        trace += &format!("0s carol > {request}\n0s drop budget\n");
    }
    trace += &answered(1, "carol", 2, "Binding", "Binding ok mapped=9.0.0.3:1000");
    trace += "1s carol > Binding\n 1s drop budget\n";
    trace += &answered(30, "carol", 20, "Binding", "Binding ok mapped=9.0.0.3:1000");
    trace += "30s carol > Binding\n 30s drop budget\n";
    strict().check(&trace);
}

#[test]
fn who_holds_an_allocation_is_no_stranger_and_who_proves_a_key_needs_no_budget() {
    let mut trace = String::from(ALLOCATED);
    trace += &answered(0, "carol", 1, "Allocate", "Allocate 401 realm nonce");
    trace += &answered(0, "bob", 18, "Binding", "Binding ok mapped=9.0.0.2:1000");
    trace += "0s bob > Binding\n 0s drop budget\n";
    trace += &answered(0, "alice", 30, "Binding", "Binding ok mapped=9.0.0.1:1000");
    trace += &answered(0, "alice", 30, "Refresh auth nonce=stale", "Refresh 438 realm nonce");
    trace += &answered(0, "carol", 30, "Allocate auth no-transport", "Allocate 400 signed");
    trace += "0s carol > Allocate auth
        0s - take :49153
        0s carol < Allocate ok relayed=5.5.5.5:49153 mapped=9.0.0.3:1000 lifetime=1200 signed
        0s carol > Refresh auth lifetime=0
        0s - close :49153
        0s - ended carol released 0B out 0B in
        0s carol < Refresh ok lifetime=0 signed
        0s carol > Binding
        0s drop budget";
    strict().check(&trace);
}

#[test]
fn zero_is_unlimited() {
    let world = World { unauthenticated: 0, ..World::default() };
    world.check(&answered(0, "alice", 2_000, "Binding", "Binding ok mapped=9.0.0.1:1000"));
}
