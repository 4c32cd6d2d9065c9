//! Packets: from clients to peers, from peers to clients, and between two clients of this host. Each is sent from where
//! it was read.

use std::{
    mem,
    net::{IpAddr, SocketAddr},
    ops::Range,
};

use super::{Listener, RELAY_READ, SLOTS, Shard, owner};
use crate::{
    relay::crossing::{Arrivals, Crosser, GAP, Parcel, SPARE, WAITING},
    turn::{
        Channel, FiveTuple, RelayPort, Transport, channel_data,
        counters::Dropped,
        demux,
        forward::{Load, ToClient, ToPeer, Wrap},
        indication::{self, padding},
    },
    udp::{Arrived, Way, mapped},
};

/// Payloads of one flow, or messages, of equal length as they lie in the arena.
#[derive(Clone, Copy)]
pub(super) struct Payloads {
    /// Where the first begins.
    start: usize,
    /// From one to the next.
    stride: usize,
    load: Load,
    /// Whether a ChannelData header can stand before each of them, where nothing lies that is still to be sent.
    have_room: bool,
}

impl Payloads {
    /// One alone, or a message around it.
    pub(super) fn one(at: Range<usize>) -> Self {
        Self { start: at.start, stride: 0, load: Load::one(at.len()), have_room: true }
    }

    fn first(self) -> Range<usize> {
        self.start..self.start + self.load.length
    }

    fn each(self) -> impl Iterator<Item = Range<usize>> {
        (0..self.load.packets).map(move |packet| {
            let start = self.start + packet * self.stride;
            start..start + self.load.length
        })
    }

    /// The first ones.
    fn at_most(self, packets: usize) -> Self {
        Self { load: Load { packets, ..self.load }, ..self }
    }
}

/// From clients.
impl Shard {
    pub(super) fn read_listener(&mut self, index: usize, at_most: usize) {
        self.make_room(RELAY_READ);
        let listener = &self.listeners[index];
        let Ok(slots) = self.arena.receive(&listener.socket, at_most) else { return };
        let at = listener.at;
        for slot in slots {
            let Some(arrived) = self.arena.arrived(slot) else { continue };
            let server = SocketAddr::new(arrived.local.unwrap_or(at.ip()), at.port());
            let client = FiveTuple { client: arrived.from, server, transport: Transport::Udp };
            if !self.pass_to_other(&client, arrived) {
                self.serve_datagrams(&client, arrived);
            }
        }
    }

    pub(super) fn serve_datagrams(&mut self, client: &FiveTuple, arrived: Arrived) {
        let (mut start, end) = (arrived.start, arrived.start + arrived.length);
        loop {
            let messages = self.alike(start..end, arrived.segment);
            self.reply.clear();
            self.serve_client(client, messages);
            if !self.reply.is_empty() {
                match self.way_to(client) {
                    Some(way) => self.outbox.push(&way, &self.reply, 0..0),
                    None => self.server.count_dropped(Dropped::Unsendable, 1),
                }
            }
            start += messages.load.packets * arrived.segment;
            if start >= end {
                break;
            }
        }
        self.send_if_much();
    }

    /// The first datagram of what the kernel has coalesced, and those behind it with the same ChannelData header.
    fn alike(&self, coalesced: Range<usize>, segment: usize) -> Payloads {
        let start = coalesced.start;
        let length = segment.min(coalesced.len());
        let full = coalesced.len() / segment.max(1);
        let header = |packet: usize| {
            let at = start + packet * segment;
            self.arena.bytes(at..at + channel_data::HEADER)
        };
        let packets = if full > 1 && channel_data::parse(self.arena.bytes(start..start + length)).is_some() {
            (1..full).take_while(|packet| header(*packet) == header(0)).count() + 1
        } else {
            1
        };
        Payloads { start, stride: segment, load: Load { packets, length }, have_room: true }
    }

    /// A message of a client's, or several with the same header; the answer, if there is one, is in `self.reply`.
    pub(super) fn serve_client(&mut self, client: &FiveTuple, messages: Payloads) {
        let message = messages.first();
        match demux::sort(self.arena.bytes(message.clone())) {
            demux::Datagram::ChannelData(channel, payload) => {
                let load = Load { length: payload.len(), ..messages.load };
                let payloads = Payloads { start: message.start + channel_data::HEADER, load, ..messages };
                if let Some(passed) = self.server.to_peer(client, channel, load) {
                    self.deliver(passed.to, payloads.at_most(passed.packets));
                }
            }
            demux::Datagram::Send(bytes) => {
                if let Some((to, payload)) = self.server.send(client, bytes) {
                    let start = message.start + (payload.as_ptr().addr() - bytes.as_ptr().addr());
                    let payload = start..start + payload.len();
                    self.deliver(to, Payloads::one(payload));
                }
            }
            demux::Datagram::Stun(message) => {
                self.server.handle_request(self.now, *client, message, &mut self.reply);
                // Before the next message: it may belong to the allocation that was just made or freed.
                self.apply_effects();
            }
            demux::Datagram::Unknown => self.server.count_dropped(Dropped::Malformed, 1),
        }
    }

    fn deliver(&mut self, to: ToPeer, payloads: Payloads) {
        match to {
            ToPeer::Out { relay, to } => {
                let way = Way { socket: relay_socket(relay), from: None, to };
                payloads.each().for_each(|payload| self.outbox.push(&way, &[], payload));
            }
            ToPeer::Here { from, to } => match owner(to.port, self.mailboxes.len()) {
                shard if shard == self.index => self.arrive(from, to, payloads),
                shard => self.cross(shard, from, to, payloads),
            },
        }
    }
}

/// From peers.
impl Shard {
    pub(super) fn read_relay(&mut self, relay: RelayPort) {
        if self.make_room(RELAY_READ) {
            // All clients share the listeners: they are not to wait for many peers, nor peers for many clients.
            let each = ((SLOTS - RELAY_READ) / self.listeners.len()).max(1);
            (0..self.listeners.len()).for_each(|index| self.read_listener(index, each));
        }
        // Closed by an earlier event of the same batch.
        let Some(socket) = self.sockets.get(relay) else { return };
        let Ok(slots) = self.arena.receive(socket, RELAY_READ) else { return };
        if slots.len() == RELAY_READ {
            self.server.count_dropped(Dropped::Overflow, self.sockets.overflow(relay));
        }
        for slot in slots {
            let Some(Arrived { from, start, length, segment, .. }) = self.arena.arrived(slot) else {
                continue;
            };
            let packets = length.checked_div(segment).unwrap_or(1);
            let (load, is_single) = (Load { packets, length: segment }, segment == length);
            self.serve_peer(relay, from, Payloads { start, stride: segment, load, have_room: is_single });
            let rest = start + packets * segment..start + length;
            if !rest.is_empty() {
                self.serve_peer(relay, from, Payloads { have_room: false, ..Payloads::one(rest) });
            }
        }
        self.send_if_much();
    }

    fn serve_peer(&mut self, relay: RelayPort, from: SocketAddr, payloads: Payloads) {
        if let Some(passed) = self.server.to_client(relay, from, payloads.load) {
            self.wrap(passed.to, payloads.at_most(passed.packets));
        }
    }

    fn wrap(&mut self, ToClient { client, wrap }: ToClient, payloads: Payloads) {
        let packets = payloads.load.packets as u64;
        let wrapped = match client.transport {
            Transport::Udp => self.way_to(&client).map(|way| self.wrap_for_datagrams(&way, wrap, payloads)),
            Transport::Tcp => {
                self.streams.index_of(&client).map(|index| self.wrap_for_stream(index, wrap, payloads))
            }
        };
        if wrapped.is_none() {
            self.server.count_dropped(Dropped::Unsendable, packets);
        }
    }

    fn wrap_for_datagrams(&mut self, way: &Way, wrap: Wrap, payloads: Payloads) {
        let length = payloads.load.length;
        for payload in payloads.each() {
            match wrap {
                Wrap::Channel(channel) if payloads.have_room => {
                    let header = payload.start - channel_data::HEADER..payload.start;
                    self.arena.bytes_mut(header.clone()).copy_from_slice(&header_of(channel, length));
                    self.outbox.push(way, &[], header.start..payload.end);
                }
                Wrap::Channel(channel) => self.outbox.push(way, &header_of(channel, length), payload),
                Wrap::Indication(peer) => {
                    let head = indication::data_head(length, peer, self.next_transaction());
                    self.outbox.push_padded(way, &head, payload, padding(length) as u8);
                }
            }
        }
    }

    /// Messages on a stream are padded (RFC 8656 §12.5).
    fn wrap_for_stream(&mut self, index: usize, wrap: Wrap, payloads: Payloads) {
        let length = payloads.load.length;
        let mut slow = 0;
        for payload in payloads.each() {
            let queued = match wrap {
                Wrap::Channel(channel) => self.queue(index, &header_of(channel, length), payload),
                Wrap::Indication(peer) => {
                    let head = indication::data_head(length, peer, self.next_transaction());
                    self.queue(index, &head, payload)
                }
            };
            slow += u64::from(!queued);
        }
        self.server.count_dropped(Dropped::Unsendable, slow);
    }

    fn queue(&mut self, index: usize, head: &[u8], payload: Range<usize>) -> bool {
        let zeroes = &[0; 3][..padding(payload.len())];
        let queue = |Self { streams, arena, .. }: &mut Self| {
            streams.queue(index, [head, arena.bytes(payload.clone()), zeroes]).is_ok()
        };
        if queue(self) {
            return true;
        }
        // One turn may bring more than may wait: what can leave now makes room. A stream that is broken is closed at the
        // end of the turn, for it may be the one that is being read.
        self.pass_on(index).is_ok() && queue(self)
    }

    /// Indications have no answer: their transaction ids only have to differ.
    fn next_transaction(&mut self) -> [u8; 12] {
        self.indications += 1;
        let mut transaction = *b"data\0\0\0\0\0\0\0\0";
        transaction[4..].copy_from_slice(&self.indications.to_be_bytes());
        transaction
    }

    /// How a datagram gets to a client.
    fn way_to(&self, client: &FiveTuple) -> Option<Way> {
        let index = self.listeners.iter().position(|listener| listener.serves(client))?;
        let at = self.listeners[index].at;
        // A socket with one address has no choice.
        let has_many = at.ip().is_unspecified() && !client.server.ip().is_unspecified();
        let from = Some(client.server.ip()).filter(|_: &IpAddr| has_many);
        let to = if at.is_ipv6() { mapped(client.client) } else { client.client };
        Some(Way { socket: LISTENER | index as u32, from, to })
    }
}

fn header_of(channel: Channel, length: usize) -> [u8; channel_data::HEADER] {
    channel_data::header(channel, length as u16)
}

impl Listener {
    fn serves(&self, client: &FiveTuple) -> bool {
        self.at.port() == client.server.port()
            && (self.at.ip() == client.server.ip() || self.at.ip().is_unspecified())
    }
}

/// Between two clients of this host.
impl Shard {
    /// Payloads for a relayed address of this shard.
    fn arrive(&mut self, from: RelayPort, to: RelayPort, payloads: Payloads) {
        if let Some(passed) = self.server.to_client_from_here(from, to, payloads.load) {
            self.wrap(passed.to, payloads.at_most(passed.packets));
        }
    }

    /// Payloads for a relayed address of another shard.
    fn cross(&mut self, shard: usize, from: RelayPort, to: RelayPort, payloads: Payloads) {
        for payload in payloads.each() {
            if self.parcels[shard].takes(payload.len()) || self.dispatch(shard) {
                self.parcels[shard].push(from, to, self.arena.bytes(payload));
            } else {
                self.server.count_dropped(Dropped::Unsendable, 1);
            }
        }
    }

    /// Gives whether the other shard took the parcel: if not, it stays, to be filled further.
    fn dispatch(&mut self, shard: usize) -> bool {
        let empty = self.spare.pop().unwrap_or_else(|| Parcel::new(self.index));
        let parcel = mem::replace(&mut self.parcels[shard], empty);
        let mailbox = &self.mailboxes[shard];
        match mailbox.crossing.send(parcel) {
            Ok(()) => {
                mailbox.waker.wake();
                true
            }
            Err(parcel) => {
                self.spare.push(mem::replace(&mut self.parcels[shard], parcel));
                false
            }
        }
    }

    /// Whether another shard was too busy to take a parcel.
    pub(super) fn holds_parcels(&self) -> bool {
        self.parcels.iter().any(|parcel| !parcel.is_empty())
    }

    /// What other shards have handed over.
    pub(super) fn take_in(&mut self, arrivals: &Arrivals) {
        while let Some(emptied) = arrivals.next_emptied() {
            self.spare.push(emptied);
        }
        self.spare.truncate(SPARE);
        // Those that come meanwhile have their turn, too.
        for mut parcel in (0..WAITING).map_while(|_| arrivals.next()) {
            self.make_room(1);
            self.arena.lend()[..parcel.bytes().len()].copy_from_slice(parcel.bytes());
            let start = self.arena.keep(parcel.bytes().len()).start;
            for &Crosser { from, to, load, start: offset } in parcel.crossers() {
                let (start, stride) = (start + offset, load.length + GAP);
                self.arrive(from, to, Payloads { start, stride, load, have_room: true });
            }
            parcel.clear();
            self.mailboxes[parcel.home()].crossing.give_back(parcel);
        }
    }
}

/// Out.
impl Shard {
    /// What has been decided leaves. What was read stays where it is.
    pub(super) fn send(&mut self) {
        let (listeners, sockets) = (&self.listeners, &self.sockets);
        let refused = self.outbox.flush(&self.arena, |number| match number & LISTENER {
            0 => sockets.get(socket_relay(number)),
            _ => Some(&listeners[(number - LISTENER) as usize].socket),
        });
        self.server.count_dropped(Dropped::Unsendable, refused);
    }

    fn send_if_much(&mut self) {
        if self.outbox.is_full() {
            self.send();
        }
    }

    /// Everything leaves, and room is made for the next turn.
    pub(super) fn send_all(&mut self) {
        self.clear();
        for shard in 0..self.parcels.len() {
            if !self.parcels[shard].is_empty() {
                self.dispatch(shard);
            }
        }
    }

    /// So many slots are free; gives whether what the others held had to be sent first.
    pub(super) fn make_room(&mut self, slots: usize) -> bool {
        let is_short = self.arena.free() < slots;
        // Of what came nothing may be left to send: then the same slots do again.
        if is_short || self.outbox.is_empty() {
            self.clear();
        }
        is_short
    }

    fn clear(&mut self) {
        self.send();
        self.slots_read += self.arena.used();
        self.arena.clear();
    }
}

/// Ways are numbered: relay sockets by address and port, listeners by index from here.
const LISTENER: u32 = 1 << 31;

fn relay_socket(at: RelayPort) -> u32 {
    u32::from(at.relay) << 16 | u32::from(at.port)
}

fn socket_relay(number: u32) -> RelayPort {
    RelayPort { relay: (number >> 16) as u8, port: number as u16 }
}
