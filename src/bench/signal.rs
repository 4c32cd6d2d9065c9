//! Agents over WSS: idle, in pairs, in a room, found by their cards, and all back at once after their connections broke.

use std::{
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use hyper::Uri;
use rustls::RootCertStore;
use tokio::{sync::Semaphore, task::JoinSet, time::sleep};

use super::{
    Report, Server,
    agent::{Agent, Speech, Target, is_secure},
    client_of, now, percentile, progress, seconds, trust,
};
use crate::credentials::token::TokenKeys;

/// Agents that connect at the same time, where it is not the storm that is measured.
const CONNECTING: usize = 64;

/// Agents of one room in the storm; one of them stays, and talks to the others meanwhile.
const STORM_ROOM: usize = 20;

/// How long the storm may take.
const STORM_LIMIT: Duration = Duration::from_secs(60);

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Run {
    /// Memory and processor time of agents that are only there
    Idle,
    /// Offers and answers bounced between pairs
    Pairs,
    /// One message to everybody in a room
    Room,
    /// Agents of one room are found by what their cards say
    Find,
    /// All connections break, and all agents come back to their sessions
    Storm,
    /// The server goes and comes again, by whoever measures, and all agents come back; for that is waited for ever
    Restart,
}

/// Whose server it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Protocol {
    Halfway,
    #[value(name = "peerjs")]
    PeerJs,
    Matchbox,
}

/// The load.
#[derive(Clone, Debug)]
pub struct Load {
    /// Nodes of a cluster, at which agents take turns; or one.
    pub urls: Vec<Uri>,
    pub runs: Vec<Run>,
    pub protocol: Protocol,
    pub agents: usize,
    pub time: Duration,
    /// Bytes of what is passed on in each frame.
    pub size: usize,
    pub in_flight: usize,
    /// Frames a second of all pairs together; 0 is as many as there can be.
    pub rate: u64,
    pub pid: Option<u32>,
    /// The certificate to trust.
    pub ca: PathBuf,
    /// Signs the agents' tokens.
    pub keys: Option<TokenKeys>,
}

/// Runs it.
///
/// # Errors
/// One line for people.
pub fn run(load: &Load) -> Result<Report, String> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    runtime.map_err(|error| format!("cannot start: {error}"))?.block_on(async {
        let (target, mut report) = (Arc::new(target(load)?), Report::default());
        for run in &load.runs {
            match run {
                Run::Idle => idle(load, &target, &mut report).await?,
                Run::Pairs => pairs(load, &target, &mut report).await?,
                Run::Room => room(load, &target, &mut report).await?,
                Run::Find => find(load, &target, &mut report).await?,
                Run::Storm => storm(load, &target, &mut report).await?,
                Run::Restart => restart(load, &target, &mut report).await?,
            }
            progress("");
        }
        Ok(report)
    })
}

fn target(load: &Load) -> Result<Target, String> {
    let tls =
        if load.urls.iter().any(is_secure) { trust(&load.ca) } else { client_of(RootCertStore::empty()) }?;
    let speech = match (load.protocol, &load.keys) {
        (Protocol::Halfway, Some(keys)) => Speech::Halfway(Box::new(keys.clone())),
        (Protocol::Halfway, None) => return Err("no key to sign tokens with".to_owned()),
        (Protocol::PeerJs, _) => Speech::PeerJs,
        (Protocol::Matchbox, _) => Speech::Matchbox,
    };
    Ok(Target { urls: load.urls.clone(), tls, speech })
}

/// Connects the agents, in rooms of so many. Each is called `bench-N`.
async fn gather(target: &Arc<Target>, agents: usize, in_room: usize) -> Result<Vec<Agent>, String> {
    let places = Arc::new(Semaphore::new(CONNECTING));
    let mut joining = JoinSet::new();
    for number in 0..agents {
        let (target, places) = (Arc::clone(target), Arc::clone(&places));
        joining.spawn(async move {
            let _place = places.acquire_owned().await;
            (number, target.join(&name(number), &room_of(number, in_room), None).await)
        });
    }
    let mut gathered: Vec<Option<Agent>> = (0..agents).map(|_| None).collect();
    while let Some(joined) = joining.join_next().await {
        let (number, agent) = joined.map_err(|error| error.to_string())?;
        gathered[number] = Some(agent.map_err(|error| {
            format!("agent {number} of {agents}: {error}: a server with limits for one address refuses a load from one \
                     (here http.connections_per_address and http.handshakes_per_second_per_address: 0 lifts them)")
        })?);
        progress(&format!("connecting: {} of {agents}", agents - joining.len()));
    }
    Ok(gathered.into_iter().flatten().collect())
}

fn name(number: usize) -> String {
    format!("bench-{number}")
}

fn room_of(number: usize, in_room: usize) -> String {
    format!("bench-room-{}", number / in_room)
}

async fn idle(load: &Load, target: &Arc<Target>, report: &mut Report) -> Result<(), String> {
    let server = load.pid.map(|pid| Server { pid });
    let before = server.and_then(Server::resident);
    let started = now();
    let agents = gather(target, load.agents, 2).await?;
    report.add("idle", "agents", "agents", agents.len() as f64, "");
    report.add("idle", "connectedIn", "all connected in", seconds(now() - started), "s");
    let mut listening = listen_only(agents);
    let (cpu, from) = (server.and_then(Server::cpu), now());
    count_down("idle", load.time).await;
    if let (Some(server), Some(before)) = (server, before)
        && let (Some(resident), Some(cpu), Some(cpu_then)) = (server.resident(), server.cpu(), cpu)
    {
        let each = (resident - before) / 1024.0 / load.agents as f64;
        report.add("idle", "residentKibEach", "resident memory of the server for each", each, "KiB");
        let share = 100.0 * seconds(cpu.saturating_sub(cpu_then)) / seconds(now() - from);
        report.add("idle", "serverCpuPercent", "of a core", share, "%");
    }
    listening.abort_all();
    while listening.join_next().await.is_some() {}
    Ok(())
}

/// Agents that hear, and answer pings, and say nothing.
fn listen_only(agents: Vec<Agent>) -> JoinSet<()> {
    agents.into_iter().map(|mut agent| async move { while agent.hear().await.is_ok() {} }).collect()
}

/// Latencies in microseconds.
type Samples = Arc<Mutex<Vec<u32>>>;

async fn pairs(load: &Load, target: &Arc<Target>, report: &mut Report) -> Result<(), String> {
    let server = load.pid.map(|pid| Server { pid });
    let mut agents = gather(target, load.agents / 2 * 2, 2).await?;
    let samples = Samples::default();
    let started = now();
    let each = load.rate.checked_div(load.agents as u64).filter(|_| load.rate > 0);
    let mut bouncing = JoinSet::new();
    for number in (0..agents.len()).step_by(2).rev() {
        let (second, first) = (agents.pop(), agents.pop());
        let (Some(first), Some(second)) = (first, second) else { break };
        let address = |agent: &Agent, number| match target.speech {
            Speech::Matchbox => agent.welcome["IdAssigned"].as_str().unwrap_or_default().to_owned(),
            _ => name(number),
        };
        let (to_second, to_first) = (address(&second, number + 1), address(&first, number));
        let bounce = |agent, to, begins: bool| Bounce {
            target: Arc::clone(target),
            agent,
            to,
            begins,
            in_flight: load.in_flight,
            // Half of the frames are answers.
            every: each.map(|each| Duration::from_secs(1) / u32::try_from(each.max(1)).unwrap_or(u32::MAX)),
            // A crowd that speaks in time measures itself.
            place: number as f64 / load.agents as f64,
            padding: "x".repeat(load.size.saturating_sub(20)),
            started,
            samples: Arc::clone(&samples),
        };
        bouncing.spawn(bounce(first, to_second, true).run());
        bouncing.spawn(bounce(second, to_first, false).run());
    }
    // What the first second says is of the start.
    sleep(Duration::from_secs(1)).await;
    let (cpu_then, own_then, from) = (server.and_then(Server::cpu), Server::own().cpu(), now());
    take(&samples);
    count_down("pairs", load.time).await;
    let (took, mut samples) = (seconds(now() - from), take(&samples));
    if let Some(ended) = bouncing.try_join_next() {
        return Err(format!("a pair ended: {}", ended.unwrap_or_else(|error| error.to_string())));
    }
    let frames = samples.len() as f64;
    report.add("pairs", "framesPerSecond", "frames a second", frames / took, "/s");
    report.add("pairs", "p50Us", "from agent to agent, p50", percentile(&mut samples, 50), "µs");
    report.add("pairs", "p99Us", "from agent to agent, p99", percentile(&mut samples, 99), "µs");
    if let (Some(then), Some(cpu)) = (cpu_then, server.and_then(Server::cpu)) {
        report.add(
            "pairs",
            "serverUsPerFrame",
            "the server's CPU for a frame",
            1e6 * seconds(cpu.saturating_sub(then)) / frames,
            "µs",
        );
        report.add(
            "pairs",
            "serverCpuPercent",
            "of a core, the server",
            100.0 * seconds(cpu.saturating_sub(then)) / took,
            "%",
        );
    }
    if let (Some(then), Some(own)) = (own_then, Server::own().cpu()) {
        report.add(
            "pairs",
            "ownCpuPercent",
            "of a core, this load",
            100.0 * seconds(own.saturating_sub(then)) / took,
            "%",
        );
    }
    Ok(())
}

/// One side of a pair.
struct Bounce {
    target: Arc<Target>,
    agent: Agent,
    to: String,
    begins: bool,
    in_flight: usize,
    /// Begins again this often instead of answering.
    every: Option<Duration>,
    /// When in that time it does, from 0 to 1.
    place: f64,
    padding: String,
    started: Instant,
    samples: Samples,
}

impl Bounce {
    /// Until the connection ends; says why.
    async fn run(mut self) -> String {
        match self.bounce().await {
            Ok(never) => never,
            Err(why) => why,
        }
    }

    async fn bounce(&mut self) -> Result<String, String> {
        if self.begins && self.every.is_none() {
            for _ in 0..self.in_flight {
                self.say().await?;
            }
        }
        let every = self.every.unwrap_or(Duration::MAX / 4);
        let first = now() + self.every.unwrap_or_default().mul_f64(self.place);
        let mut ticks = tokio::time::interval_at(first.into(), every);
        loop {
            tokio::select! {
                text = self.agent.hear() => {
                    let Some(at) = said_at(&text?) else { continue };
                    let took = (now() - self.started).as_micros() as u64 - at;
                    lock(&self.samples).push(u32::try_from(took).unwrap_or(u32::MAX));
                    if self.every.is_none() || !self.begins {
                        self.say().await?;
                    }
                }
                _ = ticks.tick(), if self.begins && self.every.is_some() => self.say().await?,
            }
        }
    }

    async fn say(&mut self) -> Result<(), String> {
        let at = (now() - self.started).as_micros();
        let sdp = format!("@{at}@{}", self.padding);
        let frame = self.target.frame(self.begins, &self.to, &sdp);
        self.agent.say(frame).await
    }
}

/// When a frame was said, which it tells between two `@`.
fn said_at(text: &str) -> Option<u64> {
    text.split('@').nth(1)?.parse().ok()
}

async fn room(load: &Load, target: &Arc<Target>, report: &mut Report) -> Result<(), String> {
    let mut agents = gather(target, load.agents, load.agents).await?;
    let samples = Samples::default();
    let started = now();
    let Some(mut speaker) = agents.pop() else { return Ok(()) };
    let listeners = agents.len();
    let mut listening = JoinSet::new();
    for mut agent in agents {
        let samples = Arc::clone(&samples);
        listening.spawn(async move {
            while let Ok(text) = agent.hear().await {
                if let Some(at) = said_at(&text) {
                    lock(&samples).push(((now() - started).as_micros() as u64 - at) as u32);
                }
            }
        });
    }
    let (mut said, until) = (0, now() + load.time);
    while now() < until {
        let at = (now() - started).as_micros();
        let payload = format!("@{at}@{}", "x".repeat(load.size.saturating_sub(20)));
        speaker
            .say(serde_json::json!({"type": "message", "payload": payload, "id": said}).to_string())
            .await?;
        said += 1;
        progress(&format!("room: {said} messages"));
        // So that each has arrived before the next is said.
        sleep(Duration::from_millis(50)).await;
    }
    sleep(Duration::from_millis(500)).await;
    let mut samples = take(&samples);
    report.add("room", "listeners", "agents that hear each message", listeners as f64, "");
    report.add(
        "room",
        "missing",
        "frames that did not arrive",
        (said * listeners - samples.len()) as f64,
        "",
    );
    report.add("room", "p50Us", "from agent to agent, p50", percentile(&mut samples, 50), "µs");
    report.add("room", "p99Us", "from agent to agent, p99", percentile(&mut samples, 99), "µs");
    listening.abort_all();
    while listening.join_next().await.is_some() {}
    Ok(())
}

/// Agents of the same skill, and of the same tag.
const ALIKE: usize = 50;

async fn find(load: &Load, target: &Arc<Target>, report: &mut Report) -> Result<(), String> {
    let mut agents = gather(target, load.agents, load.agents).await?;
    for (number, agent) in agents.iter_mut().enumerate() {
        agent
            .say(
                serde_json::json!({"type": "update", "card": card(number, load.size), "id": number})
                    .to_string(),
            )
            .await?;
        agent.hear_until("\"delivered\"").await?;
        progress(&format!("find: {number} cards"));
    }
    let Some(mut seeker) = agents.pop() else { return Ok(()) };
    let mut listening = listen_only(agents);
    let (mut samples, mut found, until) = (Vec::new(), 0, now() + load.time);
    while now() < until {
        let kind = samples.len() % load.agents.div_ceil(ALIKE);
        let query = match samples.len() % 3 {
            0 => serde_json::json!({"skill": format!("skill-{kind}")}),
            1 => serde_json::json!({"tag": format!("tag-{kind}")}),
            _ => serde_json::json!({"text": format!("speciality-{kind}")}),
        };
        let asked = now();
        seeker.say(serde_json::json!({"type": "find", "query": query, "id": 0}).to_string()).await?;
        let answer = seeker.hear_until("\"found\"").await?;
        samples.push((now() - asked).as_micros() as u32);
        found += answer.matches("\"agent\":").count();
        // Within the usual limit for one agent.
        sleep(Duration::from_millis(25)).await;
    }
    report.add("find", "cards", "cards", load.agents as f64, "");
    report.add("find", "foundEach", "found each time", found as f64 / samples.len() as f64, "");
    report.add("find", "p50Us", "answered after, p50", percentile(&mut samples, 50), "µs");
    report.add("find", "p99Us", "answered after, p99", percentile(&mut samples, 99), "µs");
    listening.abort_all();
    while listening.join_next().await.is_some() {}
    Ok(())
}

/// An A2A Agent Card of about so many bytes.
fn card(number: usize, size: usize) -> serde_json::Value {
    let kind = number / ALIKE;
    serde_json::json!({
        "protocolVersion": "0.3.0", "name": format!("Agent {number}"), "version": "1.0.0",
        "description": format!("Does what nobody else does: speciality-{kind}. {}", "lorem ipsum ".repeat(size / 12)),
        "capabilities": {"streaming": true}, "defaultInputModes": ["text/plain"],
        "skills": [{"id": format!("skill-{kind}"), "name": format!("Skill {kind}"), "tags": [format!("tag-{kind}"), "bench"]}],
    })
}

async fn storm(load: &Load, target: &Arc<Target>, report: &mut Report) -> Result<(), String> {
    let agents = gather(target, load.agents / STORM_ROOM * STORM_ROOM, STORM_ROOM).await?;
    let (mut callers, mut away) = (Vec::new(), Vec::new());
    for (number, agent) in agents.into_iter().enumerate() {
        if number % STORM_ROOM == 0 {
            callers.push((number, agent));
        } else {
            // The connection breaks here, without a word.
            let session = agent.welcome["session"].as_str().unwrap_or_default().to_owned();
            away.push((number, session));
        }
    }
    let mut calling: JoinSet<Result<usize, String>> =
        callers.into_iter().map(|(number, agent)| call(number, agent)).collect();
    let mut delivered = 0;
    while let Some(called) = calling.join_next().await {
        delivered += called.map_err(|error| error.to_string())??;
    }
    let (started, all) = (now(), away.len());
    let mut returning: JoinSet<Option<(Duration, Agent)>> = away
        .into_iter()
        .map(|(number, session)| come_back(Arc::clone(target), number, session, started))
        .collect();
    let (mut times, mut back) = (Vec::new(), Vec::new());
    while let Some(returned) = returning.join_next().await {
        if let Ok(Some((took, agent))) = returned {
            times.push(took.as_millis() as u32);
            back.push(agent);
        }
        progress(&format!("storm: {} of {all} are back", back.len()));
    }
    report.add("storm", "agents", "agents whose connections broke", all as f64, "");
    report.add("storm", "back", "back in their sessions, with what waited", back.len() as f64, "");
    report.add(
        "storm",
        "lost",
        "frames lost of those delivered meanwhile",
        delivered as f64 - back.len() as f64,
        "",
    );
    report.add("storm", "p50Ms", "back after, p50", percentile(&mut times, 50), "ms");
    report.add("storm", "allMs", "all back after", percentile(&mut times, 100), "ms");
    Ok(())
}

async fn restart(load: &Load, target: &Arc<Target>, report: &mut Report) -> Result<(), String> {
    let agents = gather(target, load.agents, STORM_ROOM).await?;
    // On a line of its own, for whoever waits for it.
    eprintln!("restart: all are here");
    let places = Arc::new(Semaphore::new(CONNECTING));
    let mut returning: JoinSet<Instant> = agents
        .into_iter()
        .enumerate()
        .map(|(number, mut agent)| {
            let (target, places) = (Arc::clone(target), Arc::clone(&places));
            async move {
                while agent.hear().await.is_ok() {}
                loop {
                    let place = places.acquire().await;
                    let joined = target.join(&name(number), &room_of(number, STORM_ROOM), None).await;
                    drop(place);
                    if let Ok(mut agent) = joined {
                        let back = now();
                        tokio::spawn(async move { while agent.hear().await.is_ok() {} });
                        return back;
                    }
                    sleep(Duration::from_millis(100)).await;
                }
            }
        })
        .collect();
    let mut back = Vec::new();
    while let Some(returned) = returning.join_next().await {
        back.push(returned.map_err(|error| error.to_string())?);
        progress(&format!("restart: {} are back", back.len()));
    }
    let first = back.iter().min().copied().unwrap_or_else(now);
    let mut times: Vec<u32> = back.iter().map(|back| (*back - first).as_millis() as u32).collect();
    report.add("restart", "agents", "agents that came back", times.len() as f64, "");
    report.add("restart", "p50Ms", "back after the first, p50", percentile(&mut times, 50), "ms");
    report.add("restart", "allMs", "all back after the first", percentile(&mut times, 100), "ms");
    Ok(())
}

/// Says something to each of the room that is away. Gives how many of them were `delivered`.
async fn call(caller: usize, mut agent: Agent) -> Result<usize, String> {
    for number in caller + 1..caller + STORM_ROOM {
        let frame =
            serde_json::json!({"type": "message", "to": name(number), "payload": "@storm@", "id": number});
        agent.say(frame.to_string()).await?;
    }
    let (mut answered, mut delivered) = (0, 0);
    while answered < STORM_ROOM - 1 {
        let text = agent.hear().await?;
        let is_delivered = text.starts_with("{\"type\":\"delivered\"");
        answered += usize::from(is_delivered || text.starts_with("{\"type\":\"error\""));
        delivered += usize::from(is_delivered);
    }
    // It stays connected: who is away must not hear that it left.
    tokio::spawn(async move { while agent.hear().await.is_ok() {} });
    Ok(delivered)
}

/// Tries until it is welcomed back, and has heard what was said meanwhile.
async fn come_back(
    target: Arc<Target>,
    number: usize,
    session: String,
    started: Instant,
) -> Option<(Duration, Agent)> {
    let room = room_of(number, STORM_ROOM);
    let attempts = async {
        loop {
            if let Ok(mut agent) = target.join(&name(number), &room, Some((&session, 0))).await {
                if agent.welcome["resumed"] != true {
                    return None;
                }
                while let Ok(text) = agent.hear().await {
                    if text.contains("@storm@") {
                        return Some((now() - started, agent));
                    }
                }
            }
            sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(STORM_LIMIT, attempts).await.ok().flatten()
}

async fn count_down(run: &str, time: Duration) {
    let until = now() + time;
    while let Some(left) = until.checked_duration_since(now()).filter(|left| !left.is_zero()) {
        progress(&format!("{run}: {} s left", left.as_secs()));
        sleep(left.min(Duration::from_secs(1))).await;
    }
}

fn take(samples: &Samples) -> Vec<u32> {
    std::mem::take(&mut *lock(samples))
}

fn lock(samples: &Samples) -> std::sync::MutexGuard<'_, Vec<u32>> {
    samples.lock().unwrap_or_else(PoisonError::into_inner)
}
