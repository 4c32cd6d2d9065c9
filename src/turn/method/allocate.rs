//! Allocate (RFC 8656 §7).

use std::net::SocketAddr;

use stun_types::{AddressFamily, message::Message, prelude::AttributeStaticType};
use turn_types::attribute::{
    EvenPort, Lifetime, RequestedAddressFamily, RequestedTransport, ReservationToken,
};

use crate::{
    clock::Now,
    turn::{
        Family, RelayPort,
        allocation::{Allocation, granted},
        auth::Caller,
        refusal::Refusal,
        reply::Success,
        server::{Request, Server},
    },
};

/// What an Allocate asks for.
struct Wish {
    transport: u8,
    family: Result<Option<Family>, Refusal>,
    even_port: Option<EvenPort>,
    reserved: bool,
    lifetime: Option<u32>,
}

impl Wish {
    fn parse(message: &Message<'_>) -> Result<Self, Refusal> {
        Ok(Self {
            transport: super::required::<RequestedTransport>(message)?.protocol(),
            family: family(message),
            even_port: super::optional(message)?,
            reserved: message.has_attribute(ReservationToken::TYPE),
            lifetime: super::optional::<Lifetime>(message)?.map(|lifetime| lifetime.seconds()),
        })
    }
}

/// The steps of RFC 8656 §7.2.
pub(super) fn allocate(
    server: &mut Server,
    now: Now,
    request: &Request<'_>,
    caller: &Caller,
) -> Result<Success, Refusal> {
    if caller.has_expired(now) {
        return Err(Refusal::Unauthorized);
    }
    // Step 2: a retransmission never comes here, its answer is kept.
    if server.forward.allocation_of(&request.from).is_some() {
        return Err(Refusal::AllocationMismatch);
    }
    // Step 3.
    let wish = Wish::parse(&request.message)?;
    if wish.transport != RequestedTransport::UDP {
        return Err(Refusal::UnsupportedTransportProtocol);
    }
    // Steps 5 to 7: ports are not reserved here, so no token is ever good.
    let asks_for_family = !matches!(wish.family, Ok(None));
    if wish.reserved && (wish.even_port.is_some() || asks_for_family) {
        return Err(Refusal::BadRequest);
    }
    let family = wish.family?.unwrap_or(Family::V4);
    if wish.reserved || wish.even_port.as_ref().is_some_and(EvenPort::requested) {
        return Err(Refusal::InsufficientCapacity);
    }
    if !server.policy.relays.iter().any(|relay| Family::of(relay.public) == family) {
        return Err(Refusal::AddressFamilyNotSupported);
    }
    // Step 8.
    if server.draining {
        return Err(Refusal::InsufficientCapacity);
    }
    // First, so that nobody loses an idle allocation for one that has no port.
    let even = wish.even_port.is_some();
    let relay = relay_with_port(server, family, even).ok_or(Refusal::InsufficientCapacity)?;
    let seat = server.take_seat(caller.agent(), request.from, now.mono)?;
    let port = server.ports(relay).take(even).expect("it was there a moment ago");
    let relay = RelayPort { relay, port };
    let relayed = SocketAddr::new(server.policy.relays[usize::from(relay.relay)].public, relay.port);
    let lifetime = granted(wish.lifetime);
    let until = now.mono + lifetime;
    server.open(relay, Allocation { seat, relayed, since: now.mono, until, armed: None });
    Ok(Success::Allocated { relayed, mapped: request.from.client, lifetime })
}

/// The family asked for; `Err` for one that does not exist.
fn family(message: &Message<'_>) -> Result<Option<Family>, Refusal> {
    if !message.has_attribute(RequestedAddressFamily::TYPE) {
        return Ok(None);
    }
    let asked =
        message.attribute::<RequestedAddressFamily>().map_err(|_| Refusal::AddressFamilyNotSupported)?;
    Ok(Some(match asked.family() {
        AddressFamily::IPV4 => Family::V4,
        AddressFamily::IPV6 => Family::V6,
    }))
}

/// The first relay address of `family` that has a bound port.
fn relay_with_port(server: &Server, family: Family, even: bool) -> Option<u8> {
    let relays = server.policy.relays.iter().zip(&server.ports);
    let index = relays.map(|(relay, ports)| Family::of(relay.public) == family && ports.has(even));
    index.enumerate().find_map(|(index, fits)| fits.then_some(index as u8))
}
