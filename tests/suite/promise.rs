//! What agents are promised, whatever breaks: `delivered` means once and in order, checked against a small model.
//!
//! Between the hub and each agent there are bytes under way in both directions, and a connection breaks after any of
//! them: what the hub wrote may not have arrived, what the agent said may not have been heard, and neither side knows.

mod model;
mod world;

use std::{cell::RefCell, collections::BTreeMap, time::Duration};

use halfway::signaling::limits::{Limits, Rate};
use proptest::{
    prelude::*,
    test_runner::{RngSeed, TestError, TestRunner},
};

use self::{model::Name, world::World};

const AGENTS: [Name; 4] = ["alice", "bob", "carol", "dave"];
/// Most agents are in the first one.
const ROOMS: [Name; 2] = ["main", "other"];
const EVERYTHING: usize = usize::MAX;
const AN_HOUR: u64 = 3600;

/// What happens next.
#[derive(Clone, Debug)]
enum Step {
    /// A new connection, whether or not an older one seems alive.
    Connect {
        who: Name,
        room: Name,
        resume: After,
        ttl: u64,
        card: Option<u8>,
    },
    /// Without a connection the agent resumes first. What is late stays under way.
    Say {
        who: Name,
        to: Name,
        what: What,
        id: bool,
        late: bool,
    },
    /// What the agent said reaches the hub.
    Hear(Name),
    /// The hub's side writes so many frames; a connection that takes no more is one that nobody writes to.
    Write(Name, usize),
    /// So many bytes reach the agent.
    Read(Name, usize),
    /// Everything under way arrives.
    Settle(Name),
    /// The connection breaks: so many bytes still arrive, each way. The hub does not know yet.
    Break {
        who: Name,
        down: usize,
        up: usize,
    },
    /// The hub's side sees which connections are broken.
    Notice(Name),
    /// The hub's side gives up a connection that does not read.
    HangUp(Name),
    Leave(Name),
    Renew(Name, u64),
    Wait(u64),
}

/// What `resume` asks for.
#[derive(Clone, Copy, Debug)]
enum After {
    Nothing,
    /// The last frame that the agent saw.
    LastSeen,
    /// One that was never sent.
    Future,
}

#[derive(Clone, Copy, Debug)]
enum What {
    Offer,
    Answer,
    Candidate,
    Bye,
    /// With a payload of so many bytes.
    Message(usize),
    Everybody(usize),
    Received,
    Update(Option<u8>),
    Ping,
    /// In another's name.
    Forged,
    Nonsense,
}

fn limits() -> impl Strategy<Value = Limits> {
    let windows = (3..=8_usize, select(&[400, 1000, EVERYTHING]));
    let rate = prop_oneof![4 => Just(None), 1 => Just(Rate::new(1, 5))];
    let shared = (select(&[600, 1500, EVERYTHING, EVERYTHING]), select(&[1, 2, 3, 100]), rate);
    (windows, shared).prop_map(|((window_messages, window_bytes), (held_bytes, presence_limit, rate))| {
        Limits {
            max_frame: 65536,
            window_messages,
            window_bytes,
            resume_window: Duration::from_secs(60),
            rate,
            presence_limit,
            heartbeat: Duration::from_secs(25),
            agents: 100,
            held_bytes,
        }
    })
}

fn step() -> impl Strategy<Value = Step> {
    let who = || select(&AGENTS);
    let ttl = || prop_oneof![4 => Just(AN_HOUR), 1 => Just(20)];
    let room = prop_oneof![9 => Just(ROOMS[0]), 1 => Just(ROOMS[1])];
    let resume = prop_oneof![7 => Just(After::LastSeen), 2 => Just(After::Nothing), 1 => Just(After::Future)];
    let bytes = || prop_oneof![2 => 0..400_usize, 1 => Just(EVERYTHING)];
    let card = proptest::option::weighted(0.3, 0..3_u8);
    prop_oneof![
        40 => (pair(), what(), any::<bool>(), proptest::bool::weighted(0.3))
            .prop_map(|((who, to), what, id, late)| Step::Say { who, to, what, id, late }),
        4 => (who(), room, resume, ttl(), card).prop_map(|(who, room, resume, ttl, card)| Step::Connect {
            who,
            room,
            resume,
            ttl,
            card
        }),
        3 => who().prop_map(Step::Hear),
        12 => (who(), 1..5_usize).prop_map(|(who, frames)| Step::Write(who, frames)),
        8 => (who(), bytes()).prop_map(|(who, bytes)| Step::Read(who, bytes)),
        10 => who().prop_map(Step::Settle),
        6 => (who(), bytes(), bytes()).prop_map(|(who, down, up)| Step::Break { who, down, up }),
        3 => who().prop_map(Step::Notice),
        1 => who().prop_map(Step::HangUp),
        1 => who().prop_map(Step::Leave),
        1 => (who(), ttl()).prop_map(|(who, ttl)| Step::Renew(who, ttl)),
        5 => select(&[1, 1, 2, 5, 20, 61]).prop_map(Step::Wait),
    ]
}

/// Who speaks to whom: mostly to another, now and then to itself or to nobody.
fn pair() -> impl Strategy<Value = (Name, Name)> {
    let others = |who| AGENTS.into_iter().filter(move |to| *to != who);
    let pairs: Vec<_> = AGENTS.iter().flat_map(|who| others(*who).map(|to| (*who, to))).collect();
    let odd: Vec<_> = AGENTS.iter().flat_map(|who| [(*who, *who), (*who, "nobody")]).collect();
    prop_oneof![15 => select(&pairs), 1 => select(&odd)]
}

fn what() -> impl Strategy<Value = What> {
    let size = || prop_oneof![3 => Just(0), 1 => 0..300_usize];
    prop_oneof![
        8 => size().prop_map(What::Message),
        3 => Just(What::Offer),
        3 => Just(What::Answer),
        6 => Just(What::Candidate),
        2 => Just(What::Bye),
        4 => size().prop_map(What::Everybody),
        2 => Just(What::Received),
        1 => proptest::option::of(0..3_u8).prop_map(What::Update),
        1 => Just(What::Ping),
        1 => Just(What::Forged),
        1 => Just(What::Nonsense),
    ]
}

fn select<T: Clone + std::fmt::Debug + 'static>(from: &[T]) -> impl Strategy<Value = T> + use<T> {
    prop::sample::select(from.to_vec())
}

#[test]
fn what_is_delivered_arrives_once_and_in_order_whatever_breaks() {
    let config = ProptestConfig {
        cases: 520,
        failure_persistence: None,
        rng_seed: RngSeed::Fixed(1),
        max_shrink_iters: 20_000,
        ..ProptestConfig::default()
    };
    let tally = RefCell::new(Tally::default());
    let plays = (limits(), prop::collection::vec(step(), 1..480));
    let outcome = TestRunner::new(config).run(&plays, |(limits, steps)| {
        tally.borrow_mut().add(&play(limits, &steps));
        Ok(())
    });
    if let Err(TestError::Fail(why, (limits, steps))) = outcome {
        let script: Vec<_> = steps.iter().map(|step| format!("{step:?}\n")).collect();
        panic!("{why}\n{limits:?}\n{}", script.concat());
    }
    outcome.unwrap();
    tally.into_inner().assert_telling();
}

/// Plays the steps; then everybody comes back and reads all, and leaves.
fn play(limits: Limits, steps: &[Step]) -> Tally {
    let mut world = World::new(limits);
    for step in steps {
        if world.act(step) {
            world.tally.count("steps");
        }
        world.check();
    }
    world.reunite();
    world.part();
    world.tally.0.insert("early candidates", world.model.early);
    world.tally
}

/// How often what matters happened: a test in which nothing breaks tells nothing.
#[derive(Debug, Default)]
struct Tally(BTreeMap<&'static str, usize>);

impl Tally {
    fn count(&mut self, what: &'static str) {
        *self.0.entry(what).or_default() += 1;
    }

    fn add(&mut self, other: &Self) {
        other.0.iter().for_each(|(what, times)| *self.0.entry(what).or_default() += times);
    }

    fn assert_telling(&self) {
        assert!(self.times("steps") >= 100_000, "{self:?}");
        for what in [
            "cut within a frame",
            "cut before a frame",
            "cut before a frame was heard",
            "replayed",
            "no longer held",
            "taken over",
            "early candidates",
            "knew who is here",
            "slow",
            "expired",
            "badFrame",
            "tooLarge",
            "rateLimited",
            "peerUnavailable",
            "queueFull",
        ] {
            assert!(self.times(what) >= 100, "{what}: {self:?}");
        }
    }

    fn times(&self, what: &str) -> usize {
        self.0.get(what).copied().unwrap_or_default()
    }
}
