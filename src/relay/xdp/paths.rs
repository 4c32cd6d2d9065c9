//! By which interface somebody is reached, and, for those whom the program has not heard yet, by which machine on it: as the
//! kernel's own tables say.

use std::{
    io,
    net::{IpAddr, SocketAddr},
};

use netlink_packet_core::{NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    link::{LinkAttribute, LinkMessage, LinkXdp},
    neighbour::{NeighbourAttribute, NeighbourMessage, NeighbourState},
    route::{RouteAddress, RouteAttribute, RouteMessage, RouteType, RouteVia},
};
use netlink_sys::{Socket, protocols::NETLINK_ROUTE};

use super::{Interfaces, rows::Hop};

/// The kernel's tables (rtnetlink(7)).
pub struct Paths {
    socket: Option<Socket>,
    /// Tells of what changes.
    changes: Option<Socket>,
    buffer: Vec<u8>,
}

/// RTNLGRP_LINK, RTNLGRP_IPV4_ROUTE, RTNLGRP_IPV6_ROUTE.
const CHANGES: [u32; 3] = [1, 7, 11];
/// Bytes of the longest answer that is read.
const ANSWER: usize = 16_384;

impl Paths {
    /// Where netlink sockets are not to be had, nothing is known.
    pub fn new() -> Self {
        let connected = Socket::new(NETLINK_ROUTE).and_then(|socket| {
            socket.connect(&netlink_sys::SocketAddr::new(0, 0))?;
            Ok(socket)
        });
        let listening = Socket::new(NETLINK_ROUTE).and_then(|mut socket| {
            socket.bind_auto()?;
            CHANGES.iter().try_for_each(|group| socket.add_membership(*group))?;
            Ok(socket)
        });
        Self { socket: connected.ok(), changes: listening.ok(), buffer: Vec::with_capacity(ANSWER) }
    }

    /// The number of the program that is on an interface.
    pub fn program_on(&mut self, interface: u32) -> Option<u32> {
        let mut asked = LinkMessage::default();
        asked.header.index = interface;
        let RouteNetlinkMessage::NewLink(found) = self.ask(RouteNetlinkMessage::GetLink(asked)).ok()? else {
            return None;
        };
        let on_it = found.attributes.into_iter().find_map(|attribute| match attribute {
            LinkAttribute::Xdp(on_it) => Some(on_it),
            _ => None,
        });
        on_it?.into_iter().find_map(|attribute| match attribute {
            LinkXdp::ProgId(number) => Some(number),
            _ => None,
        })
    }

    /// The way from `local` to `remote`, if the program is on its interface.
    pub fn hop(&mut self, interfaces: &Interfaces, local: SocketAddr, remote: SocketAddr) -> Option<Hop> {
        let Some((index, next)) = self.route(local.ip(), remote.ip()) else {
            // Who cannot ask, or has no route, learns where there is but one way.
            return interfaces.only().map(|interface| Hop { interface, next: None });
        };
        let interface = interfaces.get(index)?;
        Some(Hop { interface, next: self.neighbour(index, next) })
    }

    /// Whether routes, or links, have changed since this was last asked.
    pub fn have_changed(&mut self) -> bool {
        let Some(changes) = &self.changes else { return false };
        let mut seen = false;
        loop {
            self.buffer.clear();
            match changes.recv(&mut self.buffer, libc::MSG_DONTWAIT) {
                Ok(_) => seen = true,
                // What it could not hold was a change, too.
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => seen = true,
                Err(_) => return seen,
            }
        }
    }

    fn route(&mut self, local: IpAddr, remote: IpAddr) -> Option<(u32, IpAddr)> {
        let mut asked = RouteMessage::default();
        let bits = if remote.is_ipv4() { 32 } else { 128 };
        asked.header.address_family = family(remote);
        (asked.header.destination_prefix_length, asked.header.source_prefix_length) = (bits, bits);
        asked.attributes =
            vec![RouteAttribute::Destination(remote.into()), RouteAttribute::Source(local.into())];
        let RouteNetlinkMessage::NewRoute(found) = self.ask(RouteNetlinkMessage::GetRoute(asked)).ok()?
        else {
            return None;
        };
        if found.header.kind != RouteType::Unicast {
            return None;
        }
        let (mut interface, mut next) = (None, remote);
        for attribute in found.attributes {
            match attribute {
                RouteAttribute::Oif(index) => interface = Some(index),
                RouteAttribute::Gateway(RouteAddress::Inet(ip)) | RouteAttribute::Via(RouteVia::Inet(ip)) => {
                    next = ip.into();
                }
                RouteAttribute::Gateway(RouteAddress::Inet6(ip))
                | RouteAttribute::Via(RouteVia::Inet6(ip)) => next = ip.into(),
                _ => {}
            }
        }
        Some((interface?, next))
    }

    fn neighbour(&mut self, interface: u32, next: IpAddr) -> Option<[u8; 6]> {
        let mut asked = NeighbourMessage::default();
        (asked.header.family, asked.header.ifindex) = (family(next), interface);
        asked.attributes = vec![NeighbourAttribute::Destination(next.into())];
        let asked = RouteNetlinkMessage::GetNeighbour(asked);
        let RouteNetlinkMessage::NewNeighbour(found) = self.ask(asked).ok()? else { return None };
        use NeighbourState::{Delay, Noarp, Permanent, Probe, Reachable, Stale};
        if !matches!(found.header.state, Delay | Noarp | Permanent | Probe | Reachable | Stale) {
            return None;
        }
        let address = |attribute| match attribute {
            NeighbourAttribute::LinkLayerAddress(bytes) => <[u8; 6]>::try_from(bytes).ok(),
            _ => None,
        };
        found.attributes.into_iter().find_map(address)
    }

    /// Asks, and reads the answer, which is there at once.
    fn ask(&mut self, question: RouteNetlinkMessage) -> io::Result<RouteNetlinkMessage> {
        let socket = self.socket.as_ref().ok_or(io::ErrorKind::Unsupported)?;
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST;
        let mut message = NetlinkMessage::new(header, NetlinkPayload::from(question));
        message.finalize();
        self.buffer.resize(message.header.length as usize, 0);
        message.serialize(&mut self.buffer);
        socket.send(&self.buffer, 0)?;
        self.buffer.clear();
        socket.recv(&mut self.buffer, libc::MSG_DONTWAIT)?;
        match NetlinkMessage::deserialize(&self.buffer).map_err(io::Error::other)?.payload {
            NetlinkPayload::InnerMessage(answer) => Ok(answer),
            NetlinkPayload::Error(error) => Err(error.to_io()),
            _ => Err(io::ErrorKind::InvalidData.into()),
        }
    }
}

fn family(ip: IpAddr) -> AddressFamily {
    if ip.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 }
}
