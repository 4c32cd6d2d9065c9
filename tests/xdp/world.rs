//! The table of user space, its mirror, and the program, side by side.

use std::{
    collections::{HashMap, HashSet},
    fs,
    net::SocketAddr,
    process::Command,
    sync::Arc,
    time::{Duration, Instant},
};

use aya::{
    Ebpf,
    programs::{TestRun, TestRunOptions, Xdp, xdp::XdpMode},
};
use halfway::{
    clock,
    relay::xdp::{Interface, Interfaces, Maps, Mirror},
    turn::{
        AllocationId, Channel, Family, FiveTuple, PeerAddr, RelayAddress, RelayPort, Transport,
        counters::{Counters, PASSED},
        demux::{Datagram, sort},
        forward::{Carried, ChannelRoute, Forward, Load, RouteChange, ToPeer, Wrap},
        policy::{DeniedPeers, LivePorts, Policy, Reach},
        quota::{Limits, Quotas, Seat},
    },
};

use super::frames::{Checksum, Frame, Ip, Link, mend_header};

/// Clients, and our address that each speaks to.
pub const CLIENTS: [(&str, &str); 4] = [
    ("198.51.7.1:40000", "10.0.0.5:3478"),
    ("9.0.0.2:1001", "10.0.0.5:3478"),
    ("[2606::2]:4000", "[2a00::5]:3478"),
    ("[2606:1:2:3:4:5:6:7]:4001", "[2a00::5]:3479"),
];
pub const PEERS: [&str; 2] = ["1.1.1.1:7", "[2606::9]:9"];
const MTU: usize = 1_500;
// The program's verdicts, of linux/bpf.h.
const XDP_DROP: u32 = 1;
const XDP_PASS: u32 = 2;
const XDP_TX: u32 = 3;
const XDP_REDIRECT: u32 = 4;

/// What became of a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    Pass,
    Drop,
    /// By the first interface or the second.
    Sent {
        interface: u32,
        frame: Frame,
    },
}

/// The program, at both interfaces of a network namespace of its own.
struct Kernel {
    object: Ebpf,
    interfaces: [u32; 2],
}

impl Kernel {
    fn new(mut object: Ebpf) -> Self {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).expect("this test wants root");
        ip("link add one type veth peer name two");
        let program: &mut Xdp = object.program_mut("relay").unwrap().try_into().unwrap();
        let interfaces = ["one", "two"].map(|name| {
            program.attach(name, XdpMode::Driver).unwrap();
            ip(&format!("link set {name} up"));
            nix::net::if_::if_nametoindex(name).unwrap()
        });
        Self { object, interfaces }
    }

    fn run(&mut self, bytes: &[u8], interface: u32) -> (u32, Vec<u8>, Duration) {
        let mut out = vec![0; bytes.len() + 256];
        // struct xdp_md: where the data ends, and where it came in.
        let context = [0, bytes.len() as u32, 0, self.interfaces[interface as usize - 1], 0, 0];
        let context: Vec<u8> = context.into_iter().flat_map(u32::to_ne_bytes).collect();
        let options = TestRunOptions {
            data_in: Some(bytes),
            data_out: Some(&mut out),
            ctx_in: Some(&context),
            ..TestRunOptions::new()
        };
        let program: &mut Xdp = self.object.program_mut("relay").unwrap().try_into().unwrap();
        let result = program.test_run(options).unwrap();
        out.truncate(result.data_size_out as usize);
        (result.return_value, out, result.duration)
    }
}

fn ip(arguments: &str) {
    let done = Command::new("ip").args(arguments.split(' ')).status().unwrap();
    assert!(done.success(), "ip {arguments}");
}

/// An end of a channel: that of the client, or that of the peer.
type End = (FiveTuple, Channel, bool);

pub struct World {
    forward: Forward,
    policy: Policy,
    counters: Counters,
    quotas: Quotas,
    held: HashMap<usize, (AllocationId, Seat)>,
    announced: HashMap<FiveTuple, HashSet<Channel>>,
    /// By which header each end was last heard.
    links: HashMap<End, Link>,
    maps: Arc<Maps>,
    mirror: Mirror,
    kernel: Kernel,
    ahead: Duration,
    last: Carried,
}

impl World {
    pub fn new() -> Self {
        Self::with_limit(0)
    }

    pub fn with_limit(bytes_per_second: u32) -> Self {
        let (maps, object) = halfway::relay::xdp::load().unwrap();
        let maps = Arc::new(maps);
        let relay = |bound: &str, public: &str| RelayAddress {
            bound: bound.parse().unwrap(),
            public: public.parse().unwrap(),
        };
        let relays = vec![relay("10.0.0.5", "5.5.5.5"), relay("2a00::5", "2a00::5")];
        let policy = Policy {
            live: LivePorts::new(relays.len()),
            own_addresses: relays.iter().map(|relay| relay.bound).collect(),
            listeners: Vec::new(),
            allow: Vec::new(),
            deny: Vec::new(),
            denied: DeniedPeers::Refuse,
            signaled: None,
            relays: relays.clone(),
        };
        let quotas = Quotas::sharing(Limits { bytes_per_second, ..Limits::default() }, maps.accounts());
        let mut forward = Forward::default();
        forward.announce();
        let kernel = Kernel::new(object);
        let index = kernel.interfaces[0];
        let only = Interface { index, address: [2, 0, 0, 0, 0, 1], vlan: None, way: index };
        maps.set_interfaces(Interfaces::new([(index, only)].into(), false));
        let mirror = Mirror::new(&maps, 0, 1, relays, clock::now().mono);
        Self {
            forward,
            policy,
            counters: Counters::default(),
            quotas,
            held: HashMap::new(),
            announced: HashMap::new(),
            links: HashMap::new(),
            maps,
            mirror,
            kernel,
            ahead: Duration::ZERO,
            last: Carried::default(),
        }
    }

    /// Clients are behind the first interface, and peers behind the second.
    pub fn between(crosses: bool) -> Self {
        let world = Self::with_limit(0);
        for (name, own, reached) in [("one", "10.0.0.5", "default"), ("two", "10.7.0.5", "1.1.1.1")] {
            ip(&format!("addr add {own}/24 dev {name}"));
            let next = own.replace(".5", ".1");
            ip(&format!("route add {reached} via {next} dev {name}"));
            ip(&format!("neigh add {next} lladdr 02:00:00:00:00:77 dev {name}"));
        }
        let interface = |index| Interface { index, address: [2, 0, 0, 0, 0, 1], vlan: None, way: index };
        let all = world.kernel.interfaces.map(|index| (index, interface(index))).into();
        world.maps.set_interfaces(Interfaces::new(all, crosses));
        world
    }

    /// The route to a peer leads out of the first interface from now on.
    pub fn reroute(&mut self, peer: SocketAddr) {
        ip(&format!("route replace {} via 10.0.0.1 dev one", peer.ip()));
    }

    fn now(&self) -> Instant {
        clock::now().mono + self.ahead
    }

    /// With a relayed address of each family, as peers see them.
    pub fn allocate(&mut self, client: usize) -> [SocketAddr; 2] {
        let seat = self.quotas.take(&CLIENTS[client].0.into(), 0, five_tuple(client), self.now()).unwrap();
        let relays = [0, 1].map(|relay| RelayPort { relay, port: port(client) });
        relays.iter().for_each(|relay| self.policy.live.insert(*relay));
        let relayed = vec![(Family::V4, relays[0]), (Family::V6, relays[1])];
        let id = self.forward.open(relayed, Arc::clone(seat.tenure()));
        self.held.insert(client, (id, seat));
        relays.map(|relay| self.policy.relayed_address(relay))
    }

    /// Gives what the kernel relayed since it was last asked.
    pub fn release(&mut self, client: usize) -> Carried {
        let Some((id, _)) = self.held.remove(&client) else { return Carried::default() };
        let closed = self.forward.close(id);
        closed.relayed.iter().for_each(|relay| self.policy.live.remove(*relay));
        self.follow(None);
        std::mem::take(&mut self.last)
    }

    pub fn bind(&mut self, client: usize, channel: u16, peer: SocketAddr) {
        assert!(self.try_bind(client, channel, peer, None), "{channel:x} to {peer}");
    }

    pub fn bind_for(&mut self, client: usize, channel: u16, peer: SocketAddr, lifetime: Duration) {
        assert!(self.try_bind(client, channel, peer, Some(lifetime)));
    }

    fn try_bind(
        &mut self,
        client: usize,
        channel: u16,
        peer: SocketAddr,
        lifetime: Option<Duration>,
    ) -> bool {
        let Some((id, _)) = self.held.get(&client) else { return false };
        let reach = self.policy.permit(peer.ip()).unwrap();
        let channel = Channel::new(channel).unwrap();
        let is_bound = self.forward.bind(*id, channel, PeerAddr(peer), reach, self.now()).is_ok();
        self.follow(lifetime);
        is_bound
    }

    /// All that ends so long after the start, or before, ends.
    pub fn let_expire(&mut self, after: Duration) {
        self.ahead = after;
        for client in 0..CLIENTS.len() {
            if let Some((id, _)) = self.held.get(&client) {
                self.forward.expire(*id, self.now());
            }
        }
        self.follow(None);
    }

    /// What the shell does with what is announced.
    fn follow(&mut self, lifetime: Option<Duration>) {
        let now = self.now();
        let changes: Vec<_> = self.forward.changes().collect();
        for change in changes {
            match change {
                RouteChange::Added(mut route) => {
                    route.until = lifetime.map_or(route.until, |lifetime| now + lifetime);
                    self.announced.entry(route.client).or_default().insert(route.channel);
                    self.mirror.add(&route, &self.quotas, now);
                }
                RouteChange::Removed(client, channel) => {
                    self.announced.entry(client).or_default().remove(&channel);
                    self.links.retain(|(of, on, _), _| (of, on) != (&client, &channel));
                    self.last += self.mirror.remove(&client, channel, &self.quotas, now);
                }
            }
        }
    }

    pub fn client_says(&self, client: usize, channel: u16, payload: &[u8]) -> Frame {
        let [number, length] = [channel, payload.len() as u16].map(u16::to_be_bytes);
        let FiveTuple { client: from, server: to, .. } = five_tuple(client);
        frame(client as u8, from, to, [&number[..], &length, payload].concat())
    }

    pub fn peer_says(&self, client: usize, peer: SocketAddr, payload: &[u8]) -> Frame {
        let relay = &self.policy.relays[usize::from(peer.is_ipv6())];
        let to = SocketAddr::new(relay.bound, port(client));
        frame(99, self.policy.inward(peer), to, payload.to_vec())
    }

    /// Without a look at user space.
    pub fn run(&mut self, frame: &Frame, interface: u32) -> Verdict {
        let (verdict, out, _) = self.kernel.run(&frame.write(), interface);
        // Of two interfaces, another one is the other one.
        let interface = if verdict == XDP_REDIRECT { 3 - interface } else { interface };
        match verdict {
            XDP_PASS => Verdict::Pass,
            XDP_DROP => Verdict::Drop,
            _ => Verdict::Sent { interface, frame: Frame::read_sent(&out).expect("what leaves is sound") },
        }
    }

    pub fn check(&mut self, frame: &Frame, interface: u32) -> Verdict {
        self.check_bytes(&frame.write(), interface)
    }

    /// Runs the program, and compares with what user space would have done.
    pub fn check_bytes(&mut self, bytes: &[u8], interface: u32) -> Verdict {
        let expected = self.expected(bytes, interface);
        if bytes.len() < 14 {
            // The kernel makes no packet of less.
            return Verdict::Pass;
        }
        let (verdict, out, _) = self.kernel.run(bytes, interface);
        match verdict {
            XDP_PASS => assert_eq!(out, bytes, "untouched"),
            XDP_DROP => return Verdict::Drop,
            _ => {}
        }
        let got = match verdict {
            XDP_PASS => None,
            XDP_TX => Some(interface),
            other => panic!("verdict {other}"),
        };
        let got = got.map(|interface| (interface, Frame::read_sent(&out).expect("what leaves is sound")));
        let start = &bytes[..bytes.len().min(80)];
        assert_eq!(got, expected, "{} bytes: {start:02x?}", bytes.len());
        got.map_or(Verdict::Pass, |(interface, frame)| Verdict::Sent { interface, frame })
    }

    /// What the program has to send, by the decisions of user space's own table; `None`: it has to let it go up.
    fn expected(&mut self, bytes: &[u8], interface: u32) -> Option<(u32, Frame)> {
        let frame = Frame::read(bytes)?;
        let tick = self.quotas.tick(self.now());
        self.forward.begin_batch(tick);
        let (end, payload, to) = self.of_client(&frame).or_else(|| self.of_peer(&frame))?;
        let (end, from, to, payload) = match to {
            Towards::Peer(ToPeer::Out { relay, to }) => {
                let from = SocketAddr::new(self.policy.relays[usize::from(relay.relay)].bound, relay.port);
                ((end.0, end.1, false), from, to, payload)
            }
            Towards::Peer(ToPeer::Here { from, to }) => {
                let peer = PeerAddr(self.policy.relayed_address(from));
                self.wrapped(to, peer, payload)?
            }
            Towards::Client(relay, peer) => self.wrapped(relay, peer, payload)?,
        };
        let link = self.links.get(&end)?.clone();
        let (was_v6, is_v6) = (frame.from.is_ipv6(), to.is_ipv6());
        let length = if is_v6 { 40 } else { 20 } + 8 + payload.len();
        let is_cut = !was_v6 && is_v6 && !frame.ip.dont_fragment && length > 1_280;
        let has_checksum = match frame.checksum {
            Checksum::Unfinished => false,
            Checksum::None => !was_v6 && !is_v6,
            Checksum::Right | Checksum::Wrong => true,
        };
        if frame.ip.hops <= 1 || is_cut || length > MTU || !has_checksum {
            return None;
        }
        let dont_fragment = match (was_v6, is_v6) {
            (_, true) => true,
            (true, false) => length > 1_260,
            (false, false) => frame.ip.dont_fragment,
        };
        let ip = Ip { hops: frame.ip.hops - 1, dont_fragment, ..frame.ip };
        Some((interface, Frame { link: link.reversed(), ip, from, to, payload, checksum: frame.checksum }))
    }

    fn of_client(&mut self, frame: &Frame) -> Option<(End, Vec<u8>, Towards)> {
        let Datagram::ChannelData(channel, payload) = sort(&frame.payload) else { return None };
        let client = FiveTuple { client: frame.from, server: frame.to, transport: Transport::Udp };
        let padding = frame.payload.len() - 4 - payload.len();
        if padding > 3 || !self.announced.get(&client)?.contains(&channel) {
            return None;
        }
        let end = (client, channel, true);
        self.links.insert(end, frame.link.clone());
        let Self { forward, policy, counters, .. } = self;
        let passed = forward.to_peer(policy, counters, &client, channel, Load::one(payload.len()));
        // A relayed address of ours whose allocation is gone: the client was heard all the same.
        let to = passed?.to;
        Some((end, payload.to_vec(), Towards::Peer(to)))
    }

    fn of_peer(&mut self, frame: &Frame) -> Option<(End, Vec<u8>, Towards)> {
        let own = |ip| self.policy.relays.iter().position(|relay| relay.bound == ip);
        // Our own addresses come from nowhere outside.
        if own(frame.from.ip()).is_some() {
            return None;
        }
        let relay = RelayPort { relay: own(frame.to.ip())? as u8, port: frame.to.port() };
        let peer = PeerAddr(frame.from);
        let load = Load::one(frame.payload.len());
        let to = self.forward.to_client(&mut self.counters, relay, peer, load)?.to;
        let Wrap::Channel(channel) = to.wrap else { return None };
        let end = (to.client, channel, false);
        self.links.insert(end, frame.link.clone());
        Some((end, frame.payload.clone(), Towards::Client(relay, peer)))
    }

    /// For the client of `relay`, on its channel to `peer`.
    fn wrapped(
        &mut self,
        relay: RelayPort,
        peer: PeerAddr,
        payload: Vec<u8>,
    ) -> Option<(End, SocketAddr, SocketAddr, Vec<u8>)> {
        let load = Load::one(payload.len());
        let to = self.forward.to_client(&mut self.counters, relay, peer, load)?.to;
        let Wrap::Channel(channel) = to.wrap else { return None };
        let [number, length] = [channel.number(), payload.len() as u16].map(u16::to_be_bytes);
        let end = (to.client, channel, true);
        Some((end, to.client.server, to.client.client, [&number[..], &length, &payload].concat()))
    }

    /// How many of `count` packets pass there.
    pub fn in_user_space(&mut self, client: usize, channel: u16, length: usize, count: usize) -> usize {
        let tick = self.quotas.tick(self.now());
        self.forward.begin_batch(tick);
        let (client, channel) = (five_tuple(client), Channel::new(channel).unwrap());
        let Self { forward, policy, counters, .. } = self;
        let mut pass = || forward.to_peer(policy, counters, &client, channel, Load::one(length)).is_some();
        (0..count).filter(|_| pass()).count()
    }

    /// What the kernel relayed since this was last asked.
    pub fn settle(&mut self) -> Carried {
        let mut sum = Carried::default();
        self.mirror.look(&self.quotas, clock::now().mono + self.ahead, |_, carried| sum += *carried);
        sum
    }

    pub fn passes(&self) -> [u64; PASSED.len()] {
        self.maps.passes()
    }

    /// How long ago the client of this one was heard, and anybody.
    pub fn idle_for(&self, client: usize) -> (Duration, Duration) {
        let tenure = self.held[&client].1.tenure();
        let now = self.quotas.tick(self.now());
        let since = |tick: u64| Duration::from_micros(now - tick);
        (since(tenure.heard()), since(tenure.active()))
    }

    /// Nanoseconds that the program takes for one packet.
    pub fn median(&mut self, frame: &Frame) -> u128 {
        let bytes = frame.write();
        let mut took: Vec<_> = (0..5_000)
            .map(|_| {
                let (verdict, _, took) = self.kernel.run(&bytes, 1);
                assert_eq!(verdict, if frame.ip.hops > 1 { XDP_TX } else { XDP_PASS });
                took.as_nanos()
            })
            .collect();
        took.sort_unstable();
        took[took.len() / 2]
    }

    /// What the clock itself takes, around a run that does nothing.
    pub fn overhead(&mut self) -> u128 {
        let mut took: Vec<_> = (0..5_000).map(|_| self.kernel.run(&[0; 64], 1).2.as_nanos()).collect();
        took.sort_unstable();
        took[took.len() / 2]
    }
}

enum Towards {
    Peer(ToPeer),
    Client(RelayPort, PeerAddr),
}

/// A generator that a number makes repeatable (SplitMix64).
pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((mixed ^ (mixed >> 31)) % bound as u64) as usize
    }

    fn one_in(&mut self, number: usize) -> bool {
        self.below(number) == 0
    }
}

const CHANNELS: usize = 6;

/// What comes and goes.
impl World {
    pub fn step(&mut self, random: &mut Random) {
        let client = random.below(CLIENTS.len());
        if !self.held.contains_key(&client) {
            self.allocate(client);
        }
        if random.one_in(300) {
            self.release(client);
        } else if random.one_in(20) {
            let peer = self.any_peer(random);
            self.try_bind(client, 0x4000 + random.below(CHANNELS) as u16, peer, None);
        } else if random.one_in(2_000) {
            // Ten minutes, of which nobody bound anything anew.
            self.let_expire(self.ahead + Duration::from_secs(610));
        }
    }

    fn any_peer(&self, random: &mut Random) -> SocketAddr {
        match random.below(3) {
            0 => self.policy.relayed_address(RelayPort {
                relay: random.below(2) as u8,
                port: port(random.below(CLIENTS.len())),
            }),
            _ => PEERS[random.below(PEERS.len())].parse().unwrap(),
        }
    }

    /// Mostly what is worth relaying, else what looks like it.
    pub fn any_packet(&mut self, random: &mut Random) -> (Vec<u8>, u32) {
        let client = random.below(CLIENTS.len());
        let length = if random.one_in(4) { 1_400 + random.below(100) } else { random.below(300) };
        let payload: Vec<u8> = (0..length).map(|_| random.below(256) as u8).collect();
        let mut frame = if random.one_in(2) {
            let mut frame = self.client_says(client, 0x4000 + random.below(CHANNELS) as u16, &payload);
            let padding = if random.one_in(3) { random.below(6) } else { 0 };
            frame.payload.extend((0..padding).map(|_| random.below(256) as u8));
            frame
        } else {
            let peer = self.any_peer(random);
            self.peer_says(client, peer, &payload)
        };
        frame.ip.traffic_class = random.below(256) as u8;
        frame.ip.dont_fragment = random.one_in(2);
        if random.one_in(10) {
            frame.ip.hops = random.below(4) as u8;
        }
        if random.one_in(10) {
            let kinds = [Checksum::None, Checksum::Unfinished, Checksum::Wrong];
            frame.checksum = kinds[random.below(kinds.len())];
        }
        if random.one_in(50) {
            frame.link.from[5] = random.below(256) as u8;
        }
        for _ in 0..if random.one_in(30) { random.below(4) } else { 0 } {
            frame.link.tags.push([0x81, 0, 0, random.below(256) as u8]);
        }
        let mut bytes = frame.write();
        for _ in 0..if random.one_in(5) { random.below(4) } else { 0 } {
            let at = random.below(bytes.len().min(90));
            bytes[at] = random.below(256) as u8;
        }
        if random.one_in(2) {
            mend_header(&mut bytes);
        }
        if random.one_in(40) {
            bytes.truncate(14 + random.below(bytes.len() - 14));
        }
        (bytes, if random.one_in(20) { 2 } else { 1 })
    }
}

/// So many allocations with four channels each: KiB that the maps have, and nanoseconds for the packets of one of them, and
/// for those of any.
pub fn crowd(allocations: usize) -> (u64, u128, u128) {
    let mut world = World::new();
    let mut frames = Vec::new();
    let mut seats = Vec::new();
    let now = clock::now().mono;
    for number in 0..allocations {
        let client = SocketAddr::from(([9, 1, (number >> 8) as u8, number as u8], 4_000));
        let of_client = FiveTuple { client, ..five_tuple(0) };
        let seat = world.quotas.take(&"crowd".into(), 0, of_client, now).unwrap();
        for channel in 0..4 {
            let peer = SocketAddr::from(([1, 1, 1, 1 + channel as u8], 5_000));
            let route = ChannelRoute {
                client: of_client,
                channel: Channel::new(0x4000 + channel).unwrap(),
                relay: RelayPort { relay: 0, port: 10_000 + number as u16 },
                peer: PeerAddr(peer),
                reach: Reach::Open,
                until: now + Duration::from_secs(600),
                tenure: Arc::clone(seat.tenure()),
            };
            world.mirror.add(&route, &world.quotas, now);
            let hello = Frame { from: client, ..world.client_says(0, 0x4000 + channel, &[1; 160]) };
            let to = SocketAddr::new(world.policy.relays[0].bound, route.relay.port);
            let back = Frame { to, ..world.peer_says(0, peer, &[2; 160]) };
            frames.extend([hello.write(), back.write()]);
        }
        seats.push(seat);
    }
    // Once around, so that all ways are known.
    for frame in &frames {
        world.kernel.run(frame, 1);
    }
    // One checksum in 65,536 looks unfinished.
    let sent = frames.len();
    frames.retain(|frame| world.kernel.run(frame, 1).0 == XDP_TX);
    assert!(sent - frames.len() < 10, "{} of {sent}", frames.len());
    let mut random = Random(7);
    let mut median = |of: usize| {
        let mut took: Vec<_> = (0..20_000)
            .map(|_| {
                let (verdict, _, took) = world.kernel.run(&frames[random.below(of)], 1);
                assert_eq!(verdict, XDP_TX);
                took.as_nanos()
            })
            .collect();
        took.sort_unstable();
        took[took.len() / 2]
    };
    (locked(), median(8), median(frames.len()))
}

/// KiB of the maps of this process.
fn locked() -> u64 {
    let infos = fs::read_dir("/proc/self/fdinfo").unwrap();
    let texts = infos.filter_map(|info| fs::read_to_string(info.unwrap().path()).ok());
    let maps = texts.filter(|text| text.contains("map_type:"));
    let bytes = maps.filter_map(|text| {
        text.lines().find_map(|line| line.strip_prefix("memlock:")?.trim().parse::<u64>().ok())
    });
    bytes.sum::<u64>() / 1_024
}

fn frame(last: u8, from: SocketAddr, to: SocketAddr, payload: Vec<u8>) -> Frame {
    let link = Link { to: [2, 0, 0, 0, 0, 1], from: [2, 0, 0, 0, 1, last], tags: Vec::new() };
    let ip = Ip { traffic_class: 0xb9, hops: 64, dont_fragment: true };
    Frame { link, ip, from, to, payload, checksum: Checksum::Right }
}

fn five_tuple(client: usize) -> FiveTuple {
    let (client, server) = CLIENTS[client];
    FiveTuple { client: client.parse().unwrap(), server: server.parse().unwrap(), transport: Transport::Udp }
}

fn port(client: usize) -> u16 {
    50_000 + 2 * client as u16
}
