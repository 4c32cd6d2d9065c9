//! One shard's TURN server: requests and time in; replies, and effects for the shell, out.

use std::{
    collections::{HashMap, VecDeque},
    net::SocketAddr,
    sync::Arc,
    time::Instant,
};

use ipnet::IpNet;
use stun_types::message::{BINDING, Message, MessageClass};
use turn_types::message::{ALLOCATE, CHANNEL_BIND, CREATE_PERMISSION, REFRESH};

use super::{
    AllocationId, Channel, Family, FiveTuple, PeerAddr, RelayPort, Transport,
    allocation::{Allocation, Ended, Why},
    answers::Answers,
    auth::{Auth, Caller},
    counters::{Counters, Dropped, PortCounts},
    forward::{Carried, ChannelRoute, Forward, Load, Passed, RouteChange, ToClient, ToPeer},
    indication, method,
    policy::{DeniedPeers, Policy},
    ports::Ports,
    quota::{Quotas, Seat, Tenure},
    refusal::Refusal,
    reply,
    strangers::Strangers,
    timers::Timers,
};
use crate::{
    clock::Now,
    credentials::{signaled::Signaled, turn_rest::TurnSecrets},
};

/// One shard's world.
#[derive(Debug)]
pub struct Server {
    shard: usize,
    pub(super) auth: Auth,
    pub(super) policy: Policy,
    pub(super) quotas: Quotas,
    strangers: Strangers,
    /// By relay address.
    pub(super) ports: Vec<Ports>,
    pub(super) forward: Forward,
    pub(super) allocations: HashMap<AllocationId, Allocation>,
    timers: Timers,
    answers: Answers,
    effects: VecDeque<Effect>,
    counters: Counters,
    pub(super) draining: bool,
}

/// What a server is built from.
#[derive(Debug)]
pub struct Setup {
    /// Which of the shards that share the quotas this is.
    pub shard: usize,
    /// Who may ask.
    pub auth: Auth,
    /// Which peers may be reached.
    pub policy: Policy,
    /// How many allocations may be held.
    pub quotas: Quotas,
    /// How many answers strangers get.
    pub strangers: Strangers,
    /// The ports that this shard may use, for each relay address.
    pub ports: Vec<Vec<u16>>,
    /// Whether [`Effect::RouteAdded`] and [`Effect::RouteRemoved`] are wanted.
    pub announces_routes: bool,
}

/// What may change while allocations live.
#[derive(Clone, Debug)]
pub struct Rules {
    /// Who mints the users.
    pub secrets: TurnSecrets,
    /// CIDRs that may be relayed to although the default list denies them.
    pub allow: Vec<IpNet>,
    /// CIDRs denied on top of the default list.
    pub deny: Vec<IpNet>,
    /// How a denied peer is answered.
    pub denied: DeniedPeers,
    /// What agents were told of addresses, where that matters.
    pub signaled: Option<Signaled>,
    /// How many answers strangers get.
    pub strangers: Strangers,
}

/// What the shell has to do.
#[derive(Clone, Debug)]
pub enum Effect {
    /// A port of the reserve is live: read its socket from now on.
    TakeRelay(RelayPort),
    /// Close its socket.
    CloseRelay(RelayPort),
    /// A channel may be relayed by another path, too. Only where routes are announced.
    RouteAdded(Box<ChannelRoute>),
    /// It may not any more, from now on.
    RouteRemoved(FiveTuple, Channel),
    /// An allocation has ended: one line for the operator.
    Ended(Ended),
    /// Another shard's allocation made room for one here: have that shard [`Server::reclaim`] it.
    Reclaim(Arc<Tenure>),
}

/// A STUN request and who sent it.
pub(super) struct Request<'a> {
    pub(super) message: Message<'a>,
    pub(super) from: FiveTuple,
}

/// What packets and time do.
impl Server {
    /// A server without allocations.
    #[must_use]
    pub fn new(setup: Setup) -> Self {
        let mut forward = Forward::default();
        if setup.announces_routes {
            forward.announce();
        }
        Self {
            shard: setup.shard,
            auth: setup.auth,
            policy: setup.policy,
            quotas: setup.quotas,
            strangers: setup.strangers,
            ports: setup.ports.into_iter().map(Ports::new).collect(),
            forward,
            allocations: HashMap::new(),
            timers: Timers::default(),
            answers: Answers::default(),
            effects: VecDeque::new(),
            counters: Counters::default(),
            draining: false,
        }
    }

    /// No new allocations from now on; those that live may go on.
    pub fn drain(&mut self) {
        self.draining = true;
    }

    /// New allocations again.
    pub fn admit(&mut self) {
        self.draining = false;
    }

    /// Goes by other rules from now on. What has been granted stays granted until its time is over: a permission for five
    /// minutes, a channel for ten.
    pub fn adopt(&mut self, rules: Rules) {
        let Rules { secrets, allow, deny, denied, signaled, strangers } = rules;
        self.auth.secrets = secrets;
        self.policy = Policy { allow, deny, denied, signaled, ..self.policy.clone() };
        self.strangers = strangers;
    }

    /// A batch of packets was read at `now`.
    pub fn begin_batch(&mut self, now: Now) {
        self.forward.begin_batch(self.quotas.tick(now.mono));
    }

    /// ChannelData from a client.
    pub fn to_peer(&mut self, client: &FiveTuple, channel: Channel, load: Load) -> Option<Passed<ToPeer>> {
        self.forward.to_peer(&self.policy, &mut self.counters, client, channel, load)
    }

    /// A Send indication from a client: where its payload goes, and the payload.
    pub fn send<'a>(&mut self, client: &FiveTuple, message: &'a [u8]) -> Option<(ToPeer, &'a [u8])> {
        let Some((peer, payload)) = indication::parse_send(message) else {
            self.counters.dropped(Dropped::Malformed, 1);
            return None;
        };
        let load = Load::one(payload.len());
        let passed = self.forward.send(&self.policy, &mut self.counters, client, peer, load)?;
        Some((passed.to, payload))
    }

    /// From a peer, to the socket of a relayed address.
    pub fn to_client(&mut self, relay: RelayPort, from: SocketAddr, load: Load) -> Option<Passed<ToClient>> {
        let peer = PeerAddr(self.policy.outward(from));
        self.forward.to_client(&mut self.counters, relay, peer, load)
    }

    /// From another allocation of this host, as [`ToPeer::Here`] says.
    pub fn to_client_from_here(
        &mut self,
        from: RelayPort,
        to: RelayPort,
        load: Load,
    ) -> Option<Passed<ToClient>> {
        let peer = PeerAddr(self.policy.relayed_address(from));
        self.forward.to_client(&mut self.counters, to, peer, load)
    }

    /// Another path has relayed packets of a channel of `client`. Gives whether its allocation is still here.
    pub fn carried(&mut self, client: &FiveTuple, carried: &Carried) -> bool {
        self.forward.carried(&mut self.counters, client, carried)
    }

    /// The shell, too, drops packets.
    pub fn count_dropped(&mut self, why: Dropped, packets: u64) {
        self.counters.dropped(why, packets);
    }

    /// Any STUN message but a Send indication. At most one answer, back where it came from, is appended to `reply`.
    pub fn handle_request(&mut self, now: Now, from: FiveTuple, message: &[u8], reply: &mut Vec<u8>) {
        let Some(request) = Request::parse(from, message) else {
            return self.counters.dropped(Dropped::Malformed, 1);
        };
        if let Some(answer) = self.answers.get(now.mono, &from, request.message.transaction_id()) {
            return reply.extend_from_slice(answer);
        }
        match request.message.method() {
            BINDING => self.answer_binding(now, &request, reply),
            ALLOCATE | REFRESH | CREATE_PERMISSION | CHANNEL_BIND => self.answer_turn(now, &request, reply),
            // RFC 8489 §6.3: a method that is not supported is dropped in silence.
            _ => self.counters.dropped(Dropped::Malformed, 1),
        }
    }

    /// Ends what has run out by `now`.
    pub fn handle_timeout(&mut self, now: Now) {
        while let Some(id) = self.timers.due(now.mono) {
            let allocation = self.allocations.get_mut(&id).expect("a deadline goes when its allocation goes");
            allocation.armed = None;
            if let Some(family) = allocation.run_out(now.mono) {
                self.end_family(id, family, now.mono, Why::Expired);
            } else {
                self.forward.expire(id, now.mono);
                self.tell_routes();
                self.rearm(id);
            }
        }
    }

    /// Ends an allocation of this shard whose seat has been taken back.
    pub fn reclaim(&mut self, idle: &Arc<Tenure>, now: Instant) {
        let Some(id) = self.forward.allocation_of(&idle.client) else { return };
        // The client may have another one by now.
        if Arc::ptr_eq(self.allocations[&id].seat.tenure(), idle) {
            self.end(id, now, Why::Reclaimed);
        }
    }

    /// Ends all allocations of an agent.
    pub fn revoke(&mut self, agent: &str, now: Instant) {
        let own = self.allocations.iter().filter(|(_, allocation)| &**allocation.agent() == agent);
        let own: Vec<_> = own.map(|(id, _)| *id).collect();
        own.into_iter().for_each(|id| self.end(id, now, Why::Revoked));
    }

    /// The stream of `client` has closed, and with it ends its allocation.
    pub fn hang_up(&mut self, client: &FiveTuple, now: Instant) {
        if let Some(id) = self.forward.allocation_of(client) {
            self.end(id, now, Why::Disconnected);
        }
    }

    /// Whether `client` holds an allocation.
    #[must_use]
    pub fn holds_allocation(&self, client: &FiveTuple) -> bool {
        self.forward.allocation_of(client).is_some()
    }

    /// When [`Self::handle_timeout`] is next due.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.timers.next()
    }

    /// What the shell has to do next.
    pub fn poll_effect(&mut self) -> Option<Effect> {
        self.effects.pop_front()
    }

    /// The ports of one relay address, for the shell to bind ahead of demand.
    pub fn ports(&mut self, relay: u8) -> &mut Ports {
        &mut self.ports[usize::from(relay)]
    }

    /// Ports that were bound ahead of demand, and that no allocation will take any more: for the shell to close.
    pub fn release_reserve(&mut self) -> Vec<RelayPort> {
        let each = self.ports.iter_mut().enumerate();
        let released = each.flat_map(|(relay, ports)| {
            ports.release().map(move |port| RelayPort { relay: relay as u8, port })
        });
        released.collect()
    }

    /// Whether new allocations are refused.
    #[must_use]
    pub fn is_draining(&self) -> bool {
        self.draining
    }

    /// Who holds an allocation.
    pub fn clients(&self) -> impl Iterator<Item = FiveTuple> + '_ {
        self.allocations.values().map(|allocation| allocation.seat.tenure().client)
    }

    /// The ports of all allocations.
    pub fn relayed(&self) -> impl Iterator<Item = RelayPort> + '_ {
        self.forward.relayed()
    }

    /// Another process on this host says whether an allocation of its own holds `bound`, a local address.
    pub fn lives_elsewhere(&self, bound: SocketAddr, is_live: bool) {
        self.policy.set_elsewhere(bound, is_live);
    }

    /// There is no other process any more.
    pub fn nothing_lives_elsewhere(&self) {
        self.policy.live.clear_elsewhere();
    }

    /// The quotas, which all shards share.
    #[must_use]
    pub fn quotas(&self) -> &Quotas {
        &self.quotas
    }

    /// The counts since the start.
    #[must_use]
    pub fn counters(&self) -> Counters {
        let mut ports = PortCounts::default();
        self.ports.iter().for_each(|of_relay| ports += of_relay.count());
        let allocations = self.allocations.len() as u64;
        Counters { allocations, ports, deadlines: self.timers.len() as u64, ..self.counters }
    }
}

impl<'a> Request<'a> {
    /// A request and nothing behind it.
    fn parse(from: FiveTuple, bytes: &'a [u8]) -> Option<Self> {
        let message = Message::from_bytes(bytes).ok()?;
        let length = usize::from(u16::from_be_bytes([bytes[2], bytes[3]]));
        let whole = bytes.len() == 20 + length;
        (whole && message.class() == MessageClass::Request).then_some(Self { message, from })
    }
}

/// Answering.
impl Server {
    fn answer_binding(&mut self, now: Now, request: &Request<'_>, reply: &mut Vec<u8>) {
        if !self.may_answer(now, &request.from) {
            return;
        }
        match method::binding(request) {
            Ok(success) => {
                self.counters.bindings += 1;
                reply::success(&request.message, success, None, reply);
            }
            Err(refusal) => self.refuse(now, request, &refusal, None, reply),
        }
    }

    fn answer_turn(&mut self, now: Now, request: &Request<'_>, reply: &mut Vec<u8>) {
        let holds_allocation = self.holds_allocation(&request.from);
        // Before anything else in the request is looked at: some clients ask for more than they repeat.
        match self.auth.authenticate(now, &request.from, &request.message, holds_allocation) {
            Ok(caller) => self.answer_caller(now, request, &caller, reply),
            Err(refusal) if self.may_answer(now, &request.from) => {
                self.refuse(now, request, &refusal, None, reply)
            }
            Err(_) => {}
        }
    }

    /// Whether somebody who has proved nothing is answered. Who holds an allocation on this five-tuple has, before.
    fn may_answer(&mut self, now: Now, from: &FiveTuple) -> bool {
        let answered =
            self.holds_allocation(from) || self.strangers.admit(from.client.ip(), self.quotas.tick(now.mono));
        if !answered {
            self.counters.dropped(Dropped::Budget, 1);
        }
        answered
    }

    fn answer_caller(&mut self, now: Now, request: &Request<'_>, caller: &Caller, reply: &mut Vec<u8>) {
        let start = reply.len();
        self.forward.hear(&request.from, self.quotas.tick(now.mono));
        match method::turn(self, now, request, caller) {
            Ok(success) => reply::success(&request.message, success, Some(caller.key()), reply),
            Err(refusal) => self.refuse(now, request, &refusal, Some(caller), reply),
        }
        if matches!(request.message.method(), ALLOCATE | REFRESH) {
            self.answers.put(now.mono, request.from, request.message.transaction_id(), &reply[start..]);
        }
    }

    fn refuse(
        &mut self,
        now: Now,
        request: &Request<'_>,
        refusal: &Refusal,
        caller: Option<&Caller>,
        reply: &mut Vec<u8>,
    ) {
        self.counters.refused(refusal);
        let challenge = refusal.challenges().then(|| self.auth.challenge(now, &request.from));
        reply::error(&request.message, refusal, challenge, caller.map(Caller::key), reply);
    }
}

/// What the methods do to allocations.
impl Server {
    /// The caller's own allocation on this five-tuple.
    pub(super) fn allocation_of(
        &self,
        request: &Request<'_>,
        caller: &Caller,
    ) -> Result<AllocationId, Refusal> {
        let id = self.forward.allocation_of(&request.from).ok_or(Refusal::AllocationMismatch)?;
        // Credentials rotate: another expiry of the same agent is the same user.
        let owned = self.allocations[&id].agent() == caller.agent();
        if owned { Ok(id) } else { Err(Refusal::WrongCredentials) }
    }

    /// Opens an allocation on ports that were taken from the reserve.
    pub(super) fn open(&mut self, relayed: Vec<(Family, RelayPort)>, allocation: Allocation) {
        for (_, relay) in &relayed {
            self.policy.live.insert(*relay);
            self.effects.push_back(Effect::TakeRelay(*relay));
        }
        let on_stream = allocation.seat.tenure().client.transport == Transport::Tcp;
        let id = self.forward.open(relayed, Arc::clone(allocation.seat.tenure()));
        self.allocations.insert(id, allocation);
        self.counters.allocations_made += 1;
        self.counters.allocations_on_streams += u64::from(on_stream);
        self.rearm(id);
    }

    /// Ends an allocation with everything it holds.
    pub(super) fn end(&mut self, id: AllocationId, now: Instant, why: Why) {
        let closed = self.forward.close(id);
        self.tell_routes();
        let allocation =
            self.allocations.remove(&id).expect("the table and this map hold the same allocations");
        self.timers.set(id, allocation.armed, None);
        self.counters.allocations_on_streams -= u64::from(closed.client.transport == Transport::Tcp);
        closed.relayed.into_iter().for_each(|relay| self.give_back(relay));
        self.counters.ended[why as usize] += 1;
        self.effects.push_back(Effect::Ended(Ended {
            agent: Arc::clone(allocation.agent()),
            client: closed.client,
            relayed: allocation.relayed,
            lived: now.saturating_duration_since(allocation.since),
            to_peers: closed.to_peers,
            to_clients: closed.to_clients,
            why,
        }));
    }

    /// Ends one family of a dual allocation; with the last family ends the allocation.
    pub(super) fn end_family(&mut self, id: AllocationId, family: Family, now: Instant, why: Why) {
        let allocation = self.allocations.get_mut(&id).expect("only live allocations end");
        if allocation.until.len() == 1 {
            return self.end(id, now, why);
        }
        allocation.until.retain(|(of, _)| *of != family);
        if let Some(relay) = self.forward.close_family(id, family) {
            self.tell_routes();
            self.give_back(relay);
        }
        self.rearm(id);
    }

    /// Announces what has become of routes.
    pub(super) fn tell_routes(&mut self) {
        self.effects.extend(self.forward.changes().map(|change| match change {
            RouteChange::Added(route) => Effect::RouteAdded(route),
            RouteChange::Removed(client, channel) => Effect::RouteRemoved(client, channel),
        }));
    }

    fn give_back(&mut self, relay: RelayPort) {
        self.policy.live.remove(relay);
        self.ports(relay.relay).give_back(relay.port);
        self.effects.push_back(Effect::CloseRelay(relay));
    }

    /// A seat for one more allocation of the caller: at the quota, that of one which is not needed any more.
    pub(super) fn take_seat(
        &mut self,
        agent: &Arc<str>,
        from: FiveTuple,
        now: Instant,
    ) -> Result<Seat, Refusal> {
        if let Some(seat) = self.quotas.take(agent, self.shard, from, now) {
            return Ok(seat);
        }
        let idle = self.quotas.reclaim(agent, &from, now).ok_or(Refusal::AllocationQuotaReached)?;
        if idle.shard == self.shard {
            self.reclaim(&idle, now);
        } else {
            self.effects.push_back(Effect::Reclaim(idle));
        }
        self.quotas.take(agent, self.shard, from, now).ok_or(Refusal::AllocationQuotaReached)
    }

    /// Sets the deadline of an allocation after it has changed.
    pub(super) fn rearm(&mut self, id: AllocationId) {
        let allocation = self.allocations.get_mut(&id).expect("only live allocations change");
        let ends = allocation.until.iter().map(|(_, until)| *until);
        let next = ends.chain(self.forward.next_expiry(id)).min();
        self.timers.set(id, std::mem::replace(&mut allocation.armed, next), next);
    }
}
