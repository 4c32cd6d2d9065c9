//! What agents are promised holds among nodes, whatever breaks: nodes that crash, links to the engine that break unnoticed, an
//! engine that starts anew, and agents that come back at whichever node they reach.

pub mod engine;
mod world;

use std::{cell::RefCell, collections::BTreeMap};

use halfway::clock;
use proptest::{
    prelude::*,
    test_runner::{RngSeed, TestError, TestRunner},
};

use serde_json::json;

use self::world::World;

pub type Name = &'static str;

/// Whether the tests of one node are to run with their agents at three.
pub fn is_wanted() -> bool {
    std::env::var_os("HALFWAY_SUITE_NODES").is_some()
}

const AGENTS: [Name; 4] = ["alice", "bob", "carol", "dave"];
const ROOMS: [Name; 2] = ["main", "other"];
const NODES: usize = 3;

/// What happens next. What is of no use then does nothing.
#[derive(Clone, Debug)]
enum Step {
    /// Comes to a node, whether or not an older connection seems alive.
    Connect {
        who: Name,
        node: usize,
        room: Name,
        resumes: bool,
    },
    Say {
        who: Name,
        to: Name,
        id: bool,
    },
    SayToAll {
        who: Name,
        id: bool,
    },
    /// Reads all that its node has written for it.
    Read(Name),
    /// Its node writes so many frames that never arrive, and then it is gone. The node knows, or does not.
    Break {
        who: Name,
        lost: usize,
        noticed: bool,
    },
    Leave(Name),
    Update(Name, u8),
    /// A node's words reach the engine.
    Flush(usize),
    /// So many words reach a node, of one of those things that it listens to.
    Hear {
        node: usize,
        which: usize,
        words: usize,
    },
    /// All words reach everybody.
    Settle,
    /// Nothing passes between a node and the engine any more; nobody is told yet.
    Cut(usize),
    /// The node is told that, or that all is well again.
    Notice(usize),
    Mend(usize),
    /// The engine starts anew: what it held is lost, and everybody is told.
    RestartEngine,
    /// A node starts anew with nothing.
    Crash(usize),
    Wait {
        millis: u64,
    },
}

fn step() -> impl Strategy<Value = Step> {
    let who = || prop::sample::select(AGENTS.to_vec());
    let node = || 0..NODES;
    let room = prop_oneof![9 => Just(ROOMS[0]), 1 => Just(ROOMS[1])];
    let pairs: Vec<(Name, Name)> = AGENTS
        .iter()
        .flat_map(|who| AGENTS.iter().filter(move |to| *to != who).map(|to| (*who, *to)))
        .collect();
    prop_oneof![
        30 => (prop::sample::select(pairs), any::<bool>()).prop_map(|((who, to), id)| Step::Say { who, to, id }),
        4 => (who(), any::<bool>()).prop_map(|(who, id)| Step::SayToAll { who, id }),
        10 => (who(), node(), room, proptest::bool::weighted(0.8))
            .prop_map(|(who, node, room, resumes)| Step::Connect { who, node, room, resumes }),
        20 => who().prop_map(Step::Read),
        5 => (who(), 0..4_usize, any::<bool>())
            .prop_map(|(who, lost, noticed)| Step::Break { who, lost, noticed }),
        1 => who().prop_map(Step::Leave),
        2 => (who(), 0..3_u8).prop_map(|(who, card)| Step::Update(who, card)),
        20 => node().prop_map(Step::Flush),
        30 => (node(), 0..6_usize, 1..6_usize).prop_map(|(node, which, words)| Step::Hear { node, which, words }),
        10 => Just(Step::Settle),
        2 => node().prop_map(Step::Cut),
        2 => node().prop_map(Step::Notice),
        3 => node().prop_map(Step::Mend),
        1 => Just(Step::RestartEngine),
        1 => node().prop_map(Step::Crash),
        8 => prop::sample::select(vec![1_u64, 10, 200, 1_000, 2_500, 5_000]).prop_map(|millis| Step::Wait { millis }),
    ]
}

#[test]
fn words_that_make_no_sense_do_nothing() {
    const MOST: u64 = u64::MAX;
    let frames = format!(
        r#"[{{"seq":0,"kind":"offer","rest":""}},{{"seq":{MOST},"kind":"bye","rest":"\"from\":\"x\"}}"}}]"#
    );
    let handed = format!(
        r#"{{"session":"x","since":{MOST},"after":{MOST},"lastSeq":{MOST},"frames":{frames},"early":[{{"from":"x","kind":"iceCandidate",
            "rest":"","millis":{MOST}}}],"introduced":[{MOST}],"heard":[[{MOST},{MOST}]],"correspondents":null,"card":null,"owesMillis":{MOST}}}"#
    );
    let held = |ticket: u64, held: &str| {
        format!(r#"{{"held":{{"node":9,"ticket":{ticket},"room":"main","agent":"alice","held":{held}}}}}"#)
    };
    let mut words: Vec<String> = [
        "",
        "{",
        "null",
        "[]",
        "7",
        "{}",
        r#"{"beat":7}"#,
        r#"{"routed":{"node":9}}"#,
        r#"{"later":{"a":[]}}"#,
    ]
    .map(str::to_owned)
    .to_vec();
    for ticket in [0, 1, MOST] {
        words.push(held(ticket, "\"newer\""));
        words.push(held(ticket, &format!(r#"{{"nothing":{{"since":{MOST}}}}}"#)));
        words.push(held(ticket, &format!(r#"{{"frames":{frames}}}"#)));
        words.push(held(ticket, &format!(r#"{{"session":{handed}}}"#)));
        words.push(format!(r#"{{"answers":{{"answers":[[{ticket},"delivered"],[{ticket},"queueFull"]]}}}}"#));
        words.push(format!(r#"{{"claim":{{"node":9,"ticket":{ticket},"since":{MOST},"wants":"any"}}}}"#));
        words.push(format!(
            r#"{{"routed":{{"node":9,"ticket":{ticket},"kind":"offer","from":"x","serial":0}}}}"#
        ));
        words.push(format!(
            r#"{{"came":{{"node":9,"room":"main","moved":true,"agent":{{"agent":"bob","since":{ticket}}}}}}}"#
        ));
        words.push(format!(r#"{{"yielded":{{"agent":"alice","since":{ticket}}}}}"#));
        words.push(format!(r#"{{"took":{{"node":9,"room":"other","agent":"alice","since":{ticket}}}}}"#));
    }
    for word in &words {
        World::new().stand(word);
    }
    let mut world = World::new();
    words.iter().for_each(|word| world.stand(word));
}

#[test]
fn an_address_is_good_at_all_nodes_for_whom_it_was_delivered_to() {
    let mut world = World::new();
    let books = world.note_addresses();
    for (node, who) in ["alice", "bob"].into_iter().enumerate() {
        world.act(&Step::Connect { who, node, room: ROOMS[0], resumes: false });
        world.act(&Step::Settle);
    }
    for to in ["bob", "nobody"] {
        let candidate = "candidate:1 1 udp 2122260223 203.0.113.9 46154 typ host";
        world.tell("alice", &json!({"type": "offer", "to": to, "sdp": format!("v=0\r\na={candidate}\r\n")}));
        world.act(&Step::Settle);
    }
    let (now, address) = (clock::now(), "203.0.113.9".parse().unwrap());
    for signaled in books {
        assert!(signaled.has_told(now, "bob", address));
        assert!(!signaled.has_told(now, "nobody", address), "names cost nothing: they are not noted");
    }
}

#[test]
fn what_is_delivered_at_another_node_arrives_once_and_in_order_whatever_breaks() {
    let config = ProptestConfig {
        cases: 400,
        failure_persistence: None,
        rng_seed: RngSeed::Fixed(1),
        max_shrink_iters: 20_000,
        ..ProptestConfig::default()
    };
    let tally = RefCell::new(BTreeMap::<&'static str, usize>::new());
    let outcome = TestRunner::new(config).run(&prop::collection::vec(step(), 1..400), |steps| {
        let mut world = World::new();
        steps.iter().for_each(|step| world.act(step));
        world.reunite();
        let mut tally = tally.borrow_mut();
        world.tally.into_iter().for_each(|(what, times)| *tally.entry(what).or_default() += times);
        Ok(())
    });
    if let Err(TestError::Fail(why, steps)) = outcome {
        let script: Vec<_> = steps.iter().map(|step| format!("{step:?}\n")).collect();
        panic!("{why}\n{}", script.concat());
    }
    outcome.unwrap();
    let tally = tally.into_inner();
    for what in [
        "delivered elsewhere",
        "resumed at another node",
        "resumed",
        "replaced",
        "peerUnavailable",
        "unavailable",
        "cut",
        "crashed",
        "engine restarted",
        "lost on the way to the agent",
        "knew who is here",
    ] {
        assert!(tally.get(what).copied().unwrap_or_default() >= 100, "{what}: {tally:?}");
    }
}
