//! The kernel's path: channels whose packets are relayed by a program on the interface, before any socket sees them.
//!
//! A mirror, and nothing else: what [`Effect::RouteAdded`] announces is written where the program (`xdp/relay.c`) looks, what
//! [`Effect::RouteRemoved`] names is taken out at once, and what the program has counted goes back to where user space
//! counts. Whatever the program does not take comes to user space as ever.
//!
//! [`Effect::RouteAdded`]: crate::turn::server::Effect::RouteAdded
//! [`Effect::RouteRemoved`]: crate::turn::server::Effect::RouteRemoved

mod attachment; // on which interfaces the program is
mod paths; // by which way somebody is reached
mod rows; // what both sides share

use std::{
    cell::OnceCell,
    collections::{BTreeMap, HashMap, VecDeque},
    error::Error,
    hash::RandomState,
    io,
    net::{IpAddr, SocketAddr},
    os::fd::AsFd,
    sync::{Arc, Mutex, PoisonError, atomic::Ordering::Relaxed},
    time::{Duration, Instant},
};

use aya::{
    Ebpf,
    maps::{HashMap as Hash, Map, MapData, MapError, PerCpuArray},
    programs::{ProgramError, Xdp},
};
use nix::time::{ClockId, clock_gettime};

pub use self::attachment::{Attachments, Mode, Prospect, prospects};
pub use self::rows::Interface;
use self::{
    paths::Paths,
    rows::{Counted, End, Facts, Far, Flow, Hop, Key},
};
use crate::{
    clock,
    turn::{
        Channel, FiveTuple, RelayAddress,
        bandwidth::{Account, Accounts},
        counters::{PASSED, Traffic},
        forward::{Carried, ChannelRoute},
        policy::Reach,
        quota::Quotas,
    },
};

/// The program, and the maps it reads.
const OBJECT: &[u8] = aya::include_bytes_aligned!("../../xdp/relay.o");
/// What it counts is looked at that often.
const LOOK: Duration = Duration::from_secs(1);
/// A flow's memory is not used again before that: so long no run of the program lasts.
const REST: Duration = Duration::from_secs(1);
/// The kernel's tables are asked again that often for who has not been heard, when they change for all, and of so many
/// channels in one look.
const ASK: Duration = Duration::from_secs(2);
const ASKS: usize = 256;
/// Flows end that much earlier in the kernel, if nobody ends them: its clock is that coarse.
const COARSE: Duration = Duration::from_millis(20);

/// What shards share of the program's maps.
pub struct Maps {
    routes: Mutex<Hash<MapData, Key, rows::Route>>,
    flows: &'static [Flow],
    accounts: Accounts,
    passes: Mutex<PerCpuArray<MapData, u64>>,
    interfaces: Mutex<Interfaces>,
}

/// The interfaces that have the program, by the index that routes name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Interfaces {
    all: BTreeMap<u32, Interface>,
    crosses: bool,
}

impl Interfaces {
    /// With `crosses`, packets may go from one to another.
    #[must_use]
    pub fn new(mut all: BTreeMap<u32, Interface>, crosses: bool) -> Self {
        if all.len() == 1 {
            all.values_mut().for_each(|only| only.way = Interface::ANY);
        }
        Self { all, crosses }
    }

    fn get(&self, index: u32) -> Option<Interface> {
        self.all.get(&index).copied()
    }

    fn only(&self) -> Option<Interface> {
        self.all.values().next().copied().filter(|_| self.all.len() == 1)
    }
}

/// Loads the program. It does nothing before it is attached.
///
/// # Errors
/// One line for people: what is missing here.
pub fn load() -> Result<(Maps, Ebpf), String> {
    let mut object = Ebpf::load(OBJECT).map_err(|error| why(&error))?;
    let program: &mut Xdp = program(&mut object)?;
    program.load().map_err(|error: ProgramError| why(&error))?;
    Ok((Maps::of(&mut object)?, object))
}

/// Those whose packets the program is to see.
#[must_use]
pub fn addresses(relays: &[RelayAddress], listen: &[SocketAddr]) -> Vec<IpAddr> {
    relays.iter().map(|relay| relay.bound).chain(listen.iter().map(SocketAddr::ip)).collect()
}

fn program(object: &mut Ebpf) -> Result<&mut Xdp, String> {
    let program = object.program_mut("relay").ok_or("the object has no program")?;
    program.try_into().map_err(|error: ProgramError| why(&error))
}

impl Maps {
    fn of(object: &mut Ebpf) -> Result<Self, String> {
        let mut take = |name| object.take_map(name).ok_or_else(|| format!("the object has no map {name}"));
        let (routes, flows, accounts) = (take("routes")?, take("flows")?, take("accounts")?);
        let passes = take("passes")?;
        let map_error = |error: MapError| why(&error);
        Ok(Self {
            routes: Mutex::new(routes.try_into().map_err(map_error)?),
            flows: mapped(&flows)?,
            accounts: Accounts::new(mapped::<Account>(&accounts)?),
            passes: Mutex::new(passes.try_into().map_err(map_error)?),
            interfaces: Mutex::default(),
        })
    }

    /// The program is on these interfaces.
    pub fn set_interfaces(&self, interfaces: Interfaces) {
        *self.interfaces.lock().unwrap_or_else(PoisonError::into_inner) = interfaces;
    }

    fn interfaces(&self) -> Interfaces {
        self.interfaces.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What agents may relay, where the program sees it, too.
    #[must_use]
    pub fn accounts(&self) -> Accounts {
        self.accounts.clone()
    }

    /// Packets of flows that the program left to user space, in the order of [`PASSED`].
    #[must_use]
    pub fn passes(&self) -> [u64; PASSED.len()] {
        let passes = self.passes.lock().unwrap_or_else(PoisonError::into_inner);
        std::array::from_fn(|why| passes.get(&(why as u32), 0).map_or(0, |of_cores| of_cores.iter().sum()))
    }
}

fn mapped<T: rows::Shared>(map: &Map) -> Result<&'static [T], String> {
    let Map::Array(data) = map else { return Err("the object's maps are of other kinds".to_owned()) };
    let length = data.info().map_err(|error| why(&error))?.max_entries();
    rows::mapped(data.fd().as_fd(), length as usize).map_err(|error| why(&error))
}

/// Why the kernel takes no program, or no maps.
fn why(error: &(dyn Error + 'static)) -> String {
    let (number, said) = cause(error);
    let hint = match number {
        Some(libc::EPERM | libc::EACCES) => {
            "it needs the capabilities CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN"
        }
        Some(libc::ENOSYS | libc::EINVAL) => "this kernel is older than Linux 5.14, or built without it",
        Some(libc::ENOMEM) => "its maps need 20 MiB",
        _ => return said,
    };
    format!("{said}: {hint}")
}

/// What the kernel says, which is at the end of the chain; what the library says of its verifier is too long for a line.
fn cause(error: &(dyn Error + 'static)) -> (Option<i32>, String) {
    let (mut next, mut io) = (Some(error), None);
    while let Some(error) = next {
        io = error.downcast_ref::<io::Error>().or(io);
        next = error.source();
    }
    match io {
        Some(io) => (io.raw_os_error(), io.to_string()),
        None => (None, error.to_string().lines().next().unwrap_or_default().to_owned()),
    }
}

/// One shard's channels in the kernel.
pub struct Mirror {
    maps: Arc<Maps>,
    relays: Vec<RelayAddress>,
    labels: RandomState,
    paths: Paths,
    /// When the kernel's tables were last looked at.
    interfaces: Interfaces,
    flows: HashMap<(FiveTuple, Channel), Mirrored>,
    free: Vec<u32>,
    /// What is not to be used again before that time, in order.
    resting: VecDeque<(Instant, u32)>,
    generation: u32,
    /// What the ticks of quotas are counted from, on the kernel's clock.
    epoch: OnceCell<u64>,
    next_look: Instant,
    is_full: bool,
}

struct Mirrored {
    number: u32,
    ends: [(SocketAddr, SocketAddr); 2],
    /// What the kernel's tables said.
    hops: [Option<Hop>; 2],
    asked: Instant,
    /// The tables have changed since.
    is_doubtful: bool,
    route: ChannelRoute,
    seen: [Counted; 2],
}

impl Mirror {
    /// Of the `shard`-th of so many shards, each of which has its part of the memory.
    #[must_use]
    pub fn new(
        maps: &Arc<Maps>,
        shard: usize,
        shards: usize,
        relays: Vec<RelayAddress>,
        now: Instant,
    ) -> Self {
        let each = maps.flows.len() / shards;
        Self {
            maps: Arc::clone(maps),
            relays,
            labels: RandomState::new(),
            paths: Paths::new(),
            interfaces: Interfaces::default(),
            flows: HashMap::new(),
            free: (shard * each..(shard + 1) * each).map(|number| number as u32).rev().collect(),
            resting: VecDeque::new(),
            generation: 0,
            epoch: OnceCell::new(),
            next_look: now,
            is_full: false,
        }
    }

    /// A channel has come, or lasts longer than it did.
    pub fn add(&mut self, route: &ChannelRoute, quotas: &Quotas, now: Instant) {
        if let Some(mirrored) = self.flows.get_mut(&(route.client, route.channel)) {
            mirrored.route.until = route.until;
            return self.maps.flows[mirrored.number as usize].set_until(end(route, now));
        }
        if self.flows.is_empty() {
            self.next_look = now + LOOK;
        }
        if let Some(ends) = self.ends(route) {
            self.write(route.clone(), ends, quotas, now);
        }
    }

    /// Writes a channel where the program finds it, in the place of what it knew of it.
    fn write(
        &mut self,
        route: ChannelRoute,
        ends: [(SocketAddr, SocketAddr); 2],
        quotas: &Quotas,
        now: Instant,
    ) {
        let account = match route.tenure.account() {
            None => 0,
            Some(None) => return,
            Some(Some((number, account))) => {
                account.epoch.store(*self.epoch.get_or_init(|| epoch(quotas)), Relaxed);
                number + 1
            }
        };
        let Some(number) = self.take_number(now) else { return self.say_full() };
        self.generation = self.generation.wrapping_add(1);
        let interfaces = self.maps.interfaces();
        let hops = ends.map(|(local, remote)| self.paths.hop(&interfaces, local, remote));
        let facts = |at: usize| End::new(ends[at].0, ends[at].1, &self.labels, hops[at]);
        self.maps.flows[number as usize].write(&Facts {
            client: facts(0),
            peer: facts(1),
            until: end(&route, now),
            generation: self.generation,
            account,
            channel: route.channel,
            here: route.reach != Reach::Open,
            crosses: interfaces.crosses,
        });
        let is_written = self.maps.set(&keys(&ends, route.channel), [number, self.generation]);
        let (client, channel) = (route.client, route.channel);
        let seen = Default::default();
        let mirrored = Mirrored { number, ends, hops, asked: now, is_doubtful: false, route, seen };
        self.flows.insert((client, channel), mirrored);
        if !is_written {
            let _ = self.remove(&client, channel, quotas, now);
            self.say_full();
        }
    }

    /// A channel is no more: no packet of it is relayed after this. Gives what was, since the last look.
    pub fn remove(&mut self, client: &FiveTuple, channel: Channel, quotas: &Quotas, now: Instant) -> Carried {
        let Some(mut mirrored) = self.flows.remove(&(*client, channel)) else { return Carried::default() };
        let flow = &self.maps.flows[mirrored.number as usize];
        flow.set_until(0);
        self.maps.forget(&keys(&mirrored.ends, channel));
        self.resting.push_back((now + REST, mirrored.number));
        mirrored.settle(flow, &Clock::new(quotas, now))
    }

    /// What was relayed of each client's channels since the last look, to be told to `tell`.
    pub fn look(&mut self, quotas: &Quotas, now: Instant, mut tell: impl FnMut(&FiveTuple, &Carried)) {
        self.next_look = now + LOOK;
        let clock = Clock::new(quotas, now);
        let interfaces = self.maps.interfaces();
        if self.paths.have_changed() || interfaces != self.interfaces {
            self.flows.values_mut().for_each(|mirrored| mirrored.is_doubtful = true);
            self.interfaces.clone_from(&interfaces);
        }
        let (mut may_ask, mut moved) = (ASKS, Vec::new());
        for ((client, channel), mirrored) in &mut self.flows {
            let flow = &self.maps.flows[mirrored.number as usize];
            let carried = mirrored.settle(flow, &clock);
            if carried != Carried::default() {
                tell(client, &carried);
            }
            let heard = flow.heard();
            let is_silent = heard.contains(&false) && mirrored.asked + ASK <= now;
            if may_ask > 0 && (is_silent || mirrored.is_doubtful) {
                may_ask -= 1;
                if mirrored.has_moved(&mut self.paths, &interfaces, heard, now) {
                    moved.push((*client, *channel));
                }
            }
        }
        for (client, channel) in moved {
            // Anew, and not where the program may be reading.
            let Some(Mirrored { route, ends, .. }) = self.flows.get(&(client, channel)) else { continue };
            let (route, ends) = (route.clone(), *ends);
            let last = self.remove(&client, channel, quotas, now);
            tell(&client, &last);
            self.write(route, ends, quotas, now);
        }
    }

    /// When the next look is due.
    #[must_use]
    pub fn next_look(&self) -> Option<Instant> {
        (!self.flows.is_empty()).then_some(self.next_look)
    }

    /// How many channels there are.
    #[must_use]
    pub fn channels(&self) -> usize {
        self.flows.len()
    }

    /// Our address and the other one, towards the client and towards the peer. `None` for what is left to user space.
    fn ends(&self, route: &ChannelRoute) -> Option<[(SocketAddr, SocketAddr); 2]> {
        let bound = |relay: &RelayAddress, port| SocketAddr::new(relay.bound, port);
        let own = self.relays.get(usize::from(route.relay.relay))?;
        let peer = route.peer.0;
        let relayed = self.relays.iter().find(|relay| relay.public == peer.ip());
        let remote = match (route.reach, relayed) {
            (Reach::Open, None) => peer,
            (Reach::Checked | Reach::Relayed, Some(relay)) => bound(relay, peer.port()),
            _ => return None,
        };
        let client = (plain(route.client.server)?, plain(route.client.client)?);
        let peer = (plain(bound(own, route.relay.port))?, plain(remote)?);
        [client, peer]
            .iter()
            .all(|(local, remote)| local.is_ipv4() == remote.is_ipv4())
            .then_some([client, peer])
    }

    fn take_number(&mut self, now: Instant) -> Option<u32> {
        while let Some((_, number)) = self.resting.front().copied().filter(|(at, _)| *at <= now) {
            self.resting.pop_front();
            self.free.push(number);
        }
        self.free.pop()
    }

    fn say_full(&mut self) {
        if !std::mem::replace(&mut self.is_full, true) {
            tracing::warn!(
                "turn.xdp: no room for more channels in the kernel: user space relays those to come"
            );
        }
    }
}

impl Drop for Mirror {
    fn drop(&mut self) {
        for ((_, channel), mirrored) in &self.flows {
            self.maps.flows[mirrored.number as usize].set_until(0);
            self.maps.forget(&keys(&mirrored.ends, *channel));
        }
    }
}

impl Maps {
    /// Gives whether there was room.
    fn set(&self, keys: &[Key], route: rows::Route) -> bool {
        let mut routes = self.routes.lock().unwrap_or_else(PoisonError::into_inner);
        keys.iter().all(|key| routes.insert(key, route, 0).is_ok())
    }

    fn forget(&self, keys: &[Key]) {
        let mut routes = self.routes.lock().unwrap_or_else(PoisonError::into_inner);
        for key in keys {
            // One that could not be written is not there.
            let _ = routes.remove(key);
        }
    }
}

impl Mirrored {
    /// Tells the tenure of packets since the last look, and gives them.
    fn settle(&mut self, flow: &Flow, clock: &Clock) -> Carried {
        let [to_peer, to_client] = &mut self.seen;
        let (to_peers, heard) = since(to_peer, &flow.to_peer);
        let (to_clients, answered) = since(to_client, &flow.to_client);
        let heard = heard.map(|at| clock.tick(at));
        let active = heard.max(answered.map(|at| clock.tick(at)));
        self.route.tenure.has_carried(heard, active);
        Carried { to_peers: to_peers.0, to_clients: to_clients.0, over_bandwidth: to_peers.1 + to_clients.1 }
    }

    /// Whether the kernel's tables say something else than they did.
    fn has_moved(
        &mut self,
        paths: &mut Paths,
        interfaces: &Interfaces,
        heard: [bool; 2],
        now: Instant,
    ) -> bool {
        (self.asked, self.is_doubtful) = (now, false);
        let hops = self.ends.map(|(local, remote)| paths.hop(interfaces, local, remote));
        let differs = |at: usize| match (hops[at], self.hops[at]) {
            // Whoever is heard says who is next by himself.
            (Some(hop), Some(before)) if heard[at] => hop.interface != before.interface,
            (hop, before) => hop != before,
        };
        differs(0) || differs(1)
    }
}

/// That of the peer's packets, and that of the client's.
fn keys([client, peer]: &[(SocketAddr, SocketAddr); 2], channel: Channel) -> [Key; 2] {
    [rows::key(peer.0, peer.1, None), rows::key(client.0, client.1, Some(channel))]
}

/// When a channel ends by itself, on the kernel's clock.
fn end(route: &ChannelRoute, now: Instant) -> u64 {
    nanoseconds() + nanos(route.until.saturating_duration_since(now).saturating_sub(COARSE))
}

/// What was relayed and dropped since `seen`, and when last, if anything was.
fn since(seen: &mut Counted, count: &Far) -> ((Traffic, u64), Option<u64>) {
    let now = count.read();
    let before = std::mem::replace(seen, now);
    let traffic = Traffic { packets: now.packets - before.packets, bytes: now.bytes - before.bytes };
    let dropped = now.dropped - before.dropped;
    ((traffic, dropped), (traffic.packets + dropped > 0).then_some(now.last))
}

/// From the kernel's clock to that of tenures.
struct Clock {
    nanoseconds: u64,
    tick: u64,
}

impl Clock {
    fn new(quotas: &Quotas, now: Instant) -> Self {
        Self { nanoseconds: nanoseconds(), tick: quotas.tick(now) }
    }

    fn tick(&self, at: u64) -> u64 {
        self.tick.saturating_sub(self.nanoseconds.saturating_sub(at) / 1_000)
    }
}

fn epoch(quotas: &Quotas) -> u64 {
    nanoseconds().saturating_sub(quotas.tick(clock::now().mono) * 1_000)
}

/// CLOCK_MONOTONIC, which the program counts by, too.
fn nanoseconds() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).expect("every Linux has this clock");
    nanos(now.into())
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// An address that says by itself where it is: not one that needs a link beside it, and not that of any interface.
fn plain(at: SocketAddr) -> Option<SocketAddr> {
    let ip = at.ip().to_canonical();
    let needs_link = matches!(ip, IpAddr::V6(v6) if v6.is_unicast_link_local());
    (!needs_link && !ip.is_unspecified()).then_some(SocketAddr::new(ip, at.port()))
}
