//! The only table a data packet touches: who may send where.
//!
//! One relation, one owner: client, relayed address, permissions and channels of an allocation live and die together
//! here. The TURN methods write it; every relayed packet reads it.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};

use slab::Slab;

use super::{
    AllocationId, Channel, Family, FiveTuple, PeerAddr, RelayPort, Transport,
    bandwidth::Direction,
    counters::{Counters, Dropped, Traffic},
    indication::{self, LONGEST_ON_STREAM},
    policy::{Policy, Reach},
    quota::Tenure,
};

/// A permission lasts that long after each CreatePermission (RFC 8656 §9).
pub const PERMISSION_LIFETIME: Duration = Duration::from_secs(300);
/// A channel lasts that long after each ChannelBind (RFC 8656 §12).
pub const CHANNEL_LIFETIME: Duration = Duration::from_secs(600);
/// After its end a channel may not be bound to another peer for that long, nor its peer to another channel (§12).
pub const REBIND_GUARD: Duration = Duration::from_secs(300);
/// Permissions, and channels, that one allocation may hold.
pub const PEERS_PER_ALLOCATION: usize = 1_024;

/// Packets of one flow that came together, all of one length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Load {
    /// How many; never 0.
    pub packets: usize,
    /// Bytes of payload in each.
    pub length: usize,
}

impl Load {
    /// One packet with so many bytes of payload.
    #[must_use]
    pub fn one(length: usize) -> Self {
        Self { packets: 1, length }
    }
}

/// What may pass of a [`Load`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Passed<T> {
    /// Where it goes.
    pub to: T,
    /// So many of the packets, the first ones; never 0. The others were dropped.
    pub packets: usize,
}

/// Where a client's packet goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ToPeer {
    /// To a peer elsewhere.
    Out {
        /// The socket it leaves through.
        relay: RelayPort,
        /// Where it is sent.
        to: SocketAddr,
    },
    /// To another allocation of this host, which may be another shard's: no relay socket is crossed.
    Here {
        /// The relayed address it comes from.
        from: RelayPort,
        /// The relayed address it is for.
        to: RelayPort,
    },
}

/// Where a peer's packet goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ToClient {
    /// Whose it is.
    pub client: FiveTuple,
    /// How it is wrapped.
    pub wrap: Wrap,
}

/// How a peer's packet is wrapped for the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wrap {
    /// As ChannelData.
    Channel(Channel),
    /// As a Data indication from that peer.
    Indication(PeerAddr),
}

impl Wrap {
    /// ChannelData may be of any length: clients ask for channels, and know.
    fn is_too_long_for_streams(self, payload: usize) -> bool {
        match self {
            Self::Channel(_) => false,
            Self::Indication(peer) => indication::data_length(peer, payload) > LONGEST_ON_STREAM,
        }
    }
}

/// Why a permission or a channel could not be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unwritten {
    /// The channel has another peer, or the peer another channel.
    Conflict,
    /// [`PEERS_PER_ALLOCATION`] are held.
    Full,
}

/// A channel in force of a client on UDP: all that another path needs to relay its packets as this table would.
#[derive(Clone, Debug)]
pub struct ChannelRoute {
    /// Who sends on it, and hears.
    pub client: FiveTuple,
    /// Its number.
    pub channel: Channel,
    /// The relayed address that the peer sees.
    pub relay: RelayPort,
    /// Who is at the other end.
    pub peer: PeerAddr,
    /// What the permission is worth; never [`Reach::Discarded`].
    pub reach: Reach,
    /// When it ends, unless it is renewed, or taken back before.
    pub until: Instant,
    /// Who is to hear of its packets, and pays for them.
    pub tenure: Arc<Tenure>,
}

/// What has changed for such a path.
#[derive(Clone, Debug)]
pub enum RouteChange {
    /// A channel is in force from now on, or for longer than it was.
    Added(Box<ChannelRoute>),
    /// It is no more.
    Removed(FiveTuple, Channel),
}

/// What such a path has relayed of one channel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Carried {
    /// From the client.
    pub to_peers: Traffic,
    /// To the client.
    pub to_clients: Traffic,
    /// Packets, either way, that were more than the agent may relay.
    pub over_bandwidth: u64,
}

impl std::ops::AddAssign for Carried {
    fn add_assign(&mut self, other: Self) {
        self.to_peers += other.to_peers;
        self.to_clients += other.to_clients;
        self.over_bandwidth += other.over_bandwidth;
    }
}

/// The table.
#[derive(Debug, Default)]
pub struct Forward {
    routes: Slab<Route>,
    by_client: HashMap<FiveTuple, AllocationId>,
    by_relay: HashMap<RelayPort, AllocationId>,
    /// When this batch of packets was read, as tenures count it.
    tick: u64,
    /// For whoever follows the routes; `None` where nobody does.
    changes: Option<Vec<RouteChange>>,
}

#[derive(Debug)]
struct Route {
    client: FiveTuple,
    relayed: Vec<(Family, RelayPort)>,
    permissions: HashMap<IpAddr, Permission>,
    /// In the order of their numbers.
    channels: Vec<Binding>,
    /// The bindings in force, by peer, without those to peers that are discarded.
    channel_of: HashMap<PeerAddr, Channel>,
    to_peers: Traffic,
    to_clients: Traffic,
    tenure: Arc<Tenure>,
}

#[derive(Clone, Copy, Debug)]
struct Permission {
    until: Instant,
    reach: Reach,
}

#[derive(Clone, Copy, Debug)]
struct Binding {
    channel: Channel,
    peer: PeerAddr,
    reach: Reach,
    /// In force until then, guarded against another use for [`REBIND_GUARD`] more.
    until: Instant,
    in_force: bool,
}

/// The path of packets.
impl Forward {
    /// A batch of packets was read at `tick`.
    pub fn begin_batch(&mut self, tick: u64) {
        self.tick = tick;
    }

    /// ChannelData from `client`.
    pub fn to_peer(
        &mut self,
        policy: &Policy,
        counters: &mut Counters,
        client: &FiveTuple,
        channel: Channel,
        load: Load,
    ) -> Option<Passed<ToPeer>> {
        let tick = self.tick;
        let mut drop = |why| drop_for(counters, why, load);
        let Some(route) = self.route_of(client) else { return drop(Dropped::NoAllocation) };
        let Some(binding) = route.binding(channel) else { return drop(Dropped::NoChannel) };
        route.out(policy, counters, binding.peer.0, binding.reach, load, tick)
    }

    /// A Send indication from `client` for `peer`.
    pub fn send(
        &mut self,
        policy: &Policy,
        counters: &mut Counters,
        client: &FiveTuple,
        peer: PeerAddr,
        load: Load,
    ) -> Option<Passed<ToPeer>> {
        let tick = self.tick;
        let mut drop = |why| drop_for(counters, why, load);
        let Some(route) = self.route_of(client) else { return drop(Dropped::NoAllocation) };
        let Some(reach) = route.reach(peer.0.ip()) else { return drop(Dropped::NoPermission) };
        route.out(policy, counters, peer.0, reach, load, tick)
    }

    /// From `peer` to the relayed address `relay`.
    pub fn to_client(
        &mut self,
        counters: &mut Counters,
        relay: RelayPort,
        peer: PeerAddr,
        load: Load,
    ) -> Option<Passed<ToClient>> {
        let mut drop = |why| drop_for(counters, why, load);
        let Some(id) = self.by_relay.get(&relay) else { return drop(Dropped::NoAllocation) };
        let route = &mut self.routes[id.0];
        let wrap = match route.channel_of.get(&peer) {
            Some(channel) => Wrap::Channel(*channel),
            None => match route.reach(peer.0.ip()) {
                Some(Reach::Open | Reach::Checked | Reach::Relayed) => Wrap::Indication(peer),
                Some(Reach::Discarded) => return drop(Dropped::Denied),
                None => return drop(Dropped::NoPermission),
            },
        };
        if route.client.transport == Transport::Tcp && wrap.is_too_long_for_streams(load.length) {
            return drop(Dropped::TooLarge);
        }
        let packets = route.admit(counters, Direction::ToClient, load, self.tick)?;
        route.to_clients.add(packets, load.length);
        counters.to_clients.add(packets, load.length);
        Some(Passed { to: ToClient { client: route.client, wrap }, packets })
    }
}

impl Forward {
    /// The route of a client that has sent a packet, whatever becomes of it.
    fn route_of(&mut self, client: &FiveTuple) -> Option<&mut Route> {
        let route = &mut self.routes[self.by_client.get(client)?.0];
        route.tenure.hear(self.tick);
        Some(route)
    }
}

fn drop_for<T>(counters: &mut Counters, why: Dropped, load: Load) -> Option<T> {
    counters.dropped(why, load.packets as u64);
    None
}

impl Route {
    fn binding(&self, channel: Channel) -> Option<Binding> {
        let index = self.channels.binary_search_by_key(&channel, |binding| binding.channel).ok()?;
        Some(self.channels[index]).filter(|binding| binding.in_force)
    }

    fn reach(&self, ip: IpAddr) -> Option<Reach> {
        self.permissions.get(&ip).map(|permission| permission.reach)
    }

    fn out(
        &mut self,
        policy: &Policy,
        counters: &mut Counters,
        peer: SocketAddr,
        reach: Reach,
        load: Load,
        tick: u64,
    ) -> Option<Passed<ToPeer>> {
        let Some(relay) = self.relay_for(peer) else {
            return drop_for(counters, Dropped::NoPermission, load);
        };
        let to = match reach {
            Reach::Open => ToPeer::Out { relay, to: peer },
            Reach::Checked | Reach::Relayed => match policy.live_relay(peer) {
                Some(to) => ToPeer::Here { from: relay, to },
                None if policy.admits(peer, reach) => ToPeer::Out { relay, to: policy.inward(peer) },
                None => return drop_for(counters, Dropped::Denied, load),
            },
            Reach::Discarded => return drop_for(counters, Dropped::Denied, load),
        };
        let packets = self.admit(counters, Direction::ToPeer, load, tick)?;
        self.to_peers.add(packets, load.length);
        counters.to_peers.add(packets, load.length);
        Some(Passed { to, packets })
    }

    /// How many of the packets its agent may still relay; `None` for none.
    fn admit(&self, counters: &mut Counters, direction: Direction, load: Load, tick: u64) -> Option<usize> {
        let packets = self.tenure.takes(direction, load, tick);
        counters.dropped(Dropped::Bandwidth, (load.packets - packets) as u64);
        self.tenure.touch(tick);
        (packets > 0).then_some(packets)
    }

    fn relay_for(&self, peer: SocketAddr) -> Option<RelayPort> {
        let family = Family::of(peer.ip());
        self.relayed.iter().find(|(of, _)| *of == family).map(|(_, relay)| *relay)
    }
}

/// What the TURN methods write.
impl Forward {
    /// A new allocation: its relayed addresses, one of a family, and who is to hear of its packets.
    pub fn open(&mut self, relayed: Vec<(Family, RelayPort)>, tenure: Arc<Tenure>) -> AllocationId {
        let client = tenure.client;
        let relays: Vec<_> = relayed.iter().map(|(_, relay)| *relay).collect();
        let id = AllocationId(self.routes.insert(Route {
            client,
            relayed,
            permissions: HashMap::new(),
            channels: Vec::new(),
            channel_of: HashMap::new(),
            to_peers: Traffic::default(),
            to_clients: Traffic::default(),
            tenure,
        }));
        self.by_client.insert(client, id);
        self.by_relay.extend(relays.into_iter().map(|relay| (relay, id)));
        id
    }

    /// Routes are announced from now on.
    pub fn announce(&mut self) {
        self.changes = Some(Vec::new());
    }

    /// What has been announced since this was last asked.
    pub fn changes(&mut self) -> impl Iterator<Item = RouteChange> + '_ {
        self.changes.iter_mut().flat_map(|changes| changes.drain(..))
    }

    /// Another path has relayed packets of `client`. Gives whether its allocation is still here.
    pub fn carried(&mut self, counters: &mut Counters, client: &FiveTuple, carried: &Carried) -> bool {
        counters.to_peers += carried.to_peers;
        counters.to_clients += carried.to_clients;
        counters.elsewhere.to_peers += carried.to_peers;
        counters.elsewhere.to_clients += carried.to_clients;
        counters.dropped(Dropped::Bandwidth, carried.over_bandwidth);
        let Some(id) = self.by_client.get(client) else { return false };
        let route = &mut self.routes[id.0];
        route.to_peers += carried.to_peers;
        route.to_clients += carried.to_clients;
        true
    }

    /// A dual allocation loses its relayed address of `family`, and what it held for peers of that family.
    pub fn close_family(&mut self, id: AllocationId, family: Family) -> Option<RelayPort> {
        let route = &mut self.routes[id.0];
        let index = route.relayed.iter().position(|(of, _)| *of == family)?;
        let (_, relay) = route.relayed.remove(index);
        self.by_relay.remove(&relay);
        route.permissions.retain(|ip, _| Family::of(*ip) != family);
        let is_lost = |binding: &Binding| Family::of(binding.peer.0.ip()) == family;
        route.tell_removed(&mut self.changes, is_lost);
        route.channels.retain(|binding| !is_lost(binding));
        route.channel_of.retain(|peer, _| Family::of(peer.0.ip()) != family);
        Some(relay)
    }

    /// The allocation is gone, with everything it held. Gives its relayed addresses and its traffic.
    pub fn close(&mut self, id: AllocationId) -> Closed {
        let route = self.routes.remove(id.0);
        route.tell_removed(&mut self.changes, |_| true);
        self.by_client.remove(&route.client);
        let relayed: Vec<_> = route.relayed.iter().map(|(_, relay)| *relay).collect();
        for relay in &relayed {
            self.by_relay.remove(relay);
        }
        Closed { client: route.client, relayed, to_peers: route.to_peers, to_clients: route.to_clients }
    }

    /// An authentic request came from `client` at `tick`.
    pub fn hear(&self, client: &FiveTuple, tick: u64) {
        if let Some(id) = self.by_client.get(client) {
            self.routes[id.0].tenure.hear(tick);
        }
    }

    /// The allocation of `client`.
    #[must_use]
    pub fn allocation_of(&self, client: &FiveTuple) -> Option<AllocationId> {
        self.by_client.get(client).copied()
    }

    /// Whether the allocation has a relayed address of `family`.
    #[must_use]
    pub fn has_family(&self, id: AllocationId, family: Family) -> bool {
        self.routes[id.0].relayed.iter().any(|(of, _)| *of == family)
    }

    /// The ports of all allocations.
    pub fn relayed(&self) -> impl Iterator<Item = RelayPort> + '_ {
        self.by_relay.keys().copied()
    }

    /// Installs or renews permissions for all of `peers`, or for none.
    ///
    /// # Errors
    /// [`Unwritten::Full`].
    pub fn permit(
        &mut self,
        id: AllocationId,
        peers: &[(IpAddr, Reach)],
        now: Instant,
    ) -> Result<(), Unwritten> {
        let permissions = &mut self.routes[id.0].permissions;
        let fresh = peers.iter().filter(|(ip, _)| !permissions.contains_key(ip)).count();
        if permissions.len() + fresh > PEERS_PER_ALLOCATION {
            return Err(Unwritten::Full);
        }
        for (ip, reach) in peers {
            extend(permissions, *ip, *reach, now + PERMISSION_LIFETIME);
        }
        Ok(())
    }

    /// Binds `channel` to `peer`, or renews that binding; the peer's permission lasts as long as the channel, which is
    /// what clients that stop renewing permissions count on.
    ///
    /// # Errors
    /// [`Unwritten`].
    pub fn bind(
        &mut self,
        id: AllocationId,
        channel: Channel,
        peer: PeerAddr,
        reach: Reach,
        now: Instant,
    ) -> Result<(), Unwritten> {
        let route = &mut self.routes[id.0];
        let index = route.channels.binary_search_by_key(&channel, |binding| binding.channel);
        let same = |binding: &Binding| binding.channel == channel && binding.peer == peer;
        let touches = |binding: &Binding| binding.channel == channel || binding.peer == peer;
        if route.channels.iter().any(|binding| touches(binding) && !same(binding)) {
            return Err(Unwritten::Conflict);
        }
        let holds = |limit: usize| limit >= PEERS_PER_ALLOCATION;
        let permitted = route.permissions.contains_key(&peer.0.ip());
        if (index.is_err() && holds(route.channels.len())) || (!permitted && holds(route.permissions.len())) {
            return Err(Unwritten::Full);
        }
        let until = now + CHANNEL_LIFETIME;
        let binding = Binding { channel, peer, reach, until, in_force: true };
        match index {
            Ok(index) => route.channels[index] = binding,
            Err(index) => route.channels.insert(index, binding),
        }
        extend(&mut route.permissions, peer.0.ip(), reach, until);
        if reach != Reach::Discarded {
            route.channel_of.insert(peer, channel);
            route.tell_added(&mut self.changes, &binding);
        }
        Ok(())
    }

    /// Ends what has run out.
    pub fn expire(&mut self, id: AllocationId, now: Instant) {
        let route = &mut self.routes[id.0];
        route.permissions.retain(|_, permission| permission.until > now);
        route.tell_removed(&mut self.changes, |binding| binding.until <= now);
        for binding in route.channels.iter_mut().filter(|binding| binding.in_force && binding.until <= now) {
            binding.in_force = false;
            route.channel_of.remove(&binding.peer);
        }
        route.channels.retain(|binding| binding.until + REBIND_GUARD > now);
    }

    /// When a permission or a channel of the allocation next runs out.
    #[must_use]
    pub fn next_expiry(&self, id: AllocationId) -> Option<Instant> {
        let route = &self.routes[id.0];
        let channels =
            route.channels.iter().map(|b| if b.in_force { b.until } else { b.until + REBIND_GUARD });
        route.permissions.values().map(|permission| permission.until).chain(channels).min()
    }
}

/// What is announced.
impl Route {
    fn tell_added(&self, changes: &mut Option<Vec<RouteChange>>, binding: &Binding) {
        let Some(changes) = changes.as_mut().filter(|_| self.client.transport == Transport::Udp) else {
            return;
        };
        let Some(relay) = self.relay_for(binding.peer.0) else { return };
        changes.push(RouteChange::Added(Box::new(ChannelRoute {
            client: self.client,
            channel: binding.channel,
            relay,
            peer: binding.peer,
            reach: binding.reach,
            until: binding.until,
            tenure: Arc::clone(&self.tenure),
        })));
    }

    /// Of the channels in force those that `ends` says so of. Nothing is lost by telling of one that was never added.
    fn tell_removed(&self, changes: &mut Option<Vec<RouteChange>>, ends: impl Fn(&Binding) -> bool) {
        let Some(changes) = changes else { return };
        let ended = self.channels.iter().filter(|binding| binding.in_force && ends(binding));
        changes.extend(ended.map(|binding| RouteChange::Removed(self.client, binding.channel)));
    }
}

/// What an allocation leaves behind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Closed {
    /// Whose it was.
    pub client: FiveTuple,
    /// The relayed addresses to close.
    pub relayed: Vec<RelayPort>,
    /// What the client sent.
    pub to_peers: Traffic,
    /// What the client was sent.
    pub to_clients: Traffic,
}

/// A permission is never cut short: the one that a channel holds outlasts a CreatePermission.
fn extend(permissions: &mut HashMap<IpAddr, Permission>, ip: IpAddr, reach: Reach, until: Instant) {
    let permission = permissions.entry(ip).or_insert(Permission { until, reach });
    permission.until = permission.until.max(until);
    permission.reach = reach;
}
