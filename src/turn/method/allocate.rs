//! Allocate (RFC 8656 §7).

use std::net::SocketAddr;

use stun_types::{attribute::AttributeType, message::Message, prelude::AttributeStaticType};
use turn_types::attribute::{
    AdditionalAddressFamily, EvenPort, Lifetime, RequestedAddressFamily, RequestedTransport, ReservationToken,
};

use crate::{
    clock::Now,
    turn::{
        Family, RelayPort,
        allocation::{Allocation, granted},
        auth::Caller,
        refusal::Refusal,
        reply::{Allocated, Success},
        server::{Request, Server},
    },
};

/// The number that ADDITIONAL-ADDRESS-FAMILY had before RFC 8656, and still has for coturn and its clients. Registered for
/// nothing else.
const ADDITIONAL_ADDRESS_FAMILY_OF_THE_DRAFT: AttributeType = AttributeType::new(0x8032);

/// What an Allocate asks for.
struct Wish {
    transport: u8,
    family: Result<Option<Family>, Refusal>,
    /// A second relayed address, of IPv6.
    additional: bool,
    even_port: Option<EvenPort>,
    reserved: bool,
    lifetime: Option<u32>,
}

impl Wish {
    fn parse(message: &Message<'_>) -> Result<Self, Refusal> {
        Ok(Self {
            transport: super::required::<RequestedTransport>(message)?.protocol(),
            family: family(message),
            // Of no other family than IPv6, or the attribute is broken.
            additional: super::optional::<AdditionalAddressFamily>(message)?.is_some()
                || message.has_attribute(ADDITIONAL_ADDRESS_FAMILY_OF_THE_DRAFT),
            even_port: super::optional(message)?,
            reserved: message.has_attribute(ReservationToken::TYPE),
            lifetime: super::optional::<Lifetime>(message)?.map(|lifetime| lifetime.seconds()),
        })
    }

    /// Steps 5 to 8: what excludes each other. Ports are not reserved here, so no token is ever good.
    fn families(&self) -> Result<&'static [Family], Refusal> {
        let asks_for_family = !matches!(self.family, Ok(None));
        let reserves = self.even_port.as_ref().is_some_and(EvenPort::requested);
        if self.reserved && (self.even_port.is_some() || asks_for_family || self.additional)
            || self.additional && (asks_for_family || reserves)
        {
            return Err(Refusal::BadRequest);
        }
        let families: &[Family] = match self.family.clone()? {
            _ if self.additional => &[Family::V4, Family::V6],
            Some(Family::V6) => &[Family::V6],
            Some(Family::V4) | None => &[Family::V4],
        };
        if self.reserved || reserves { Err(Refusal::InsufficientCapacity) } else { Ok(families) }
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
    let families = wish.families()?;
    // First, so that nobody loses an idle allocation for one that has no port.
    let (relays, missing) = relays_with_port(server, families, wish.even_port.is_some())?;
    if server.draining {
        return Err(Refusal::InsufficientCapacity);
    }
    let seat = server.take_seat(caller.agent(), request.from, now.mono)?;
    let ports = take_ports(server, relays, wish.even_port.is_some());
    let public =
        |at: &RelayPort| SocketAddr::new(server.policy.relays[usize::from(at.relay)].public, at.port);
    let relayed: Vec<_> = ports.iter().map(|(_, at)| public(at)).collect();
    let lifetime = granted(wish.lifetime);
    let until = ports.iter().map(|(family, _)| (*family, now.mono + lifetime)).collect();
    server.open(ports, Allocation { seat, relayed: relayed.clone(), since: now.mono, until, armed: None });
    Ok(Success::Allocated(Allocated { relayed, missing, mapped: request.from.client, lifetime }))
}

/// The family asked for; `Err` for one that does not exist.
fn family(message: &Message<'_>) -> Result<Option<Family>, Refusal> {
    if !message.has_attribute(RequestedAddressFamily::TYPE) {
        return Ok(None);
    }
    let asked =
        message.attribute::<RequestedAddressFamily>().map_err(|_| Refusal::AddressFamilyNotSupported)?;
    Ok(Some(asked.family().into()))
}

/// Families, and the relay address of each that has a bound port.
type Relays = Vec<(Family, u8)>;

/// A relay address of each family, and the family that none is to be had of.
///
/// # Errors
/// When none is to be had at all.
fn relays_with_port(
    server: &Server,
    families: &[Family],
    even: bool,
) -> Result<(Relays, Option<(Family, Refusal)>), Refusal> {
    let (mut found, mut missing) = (Relays::new(), Vec::new());
    for family in families {
        match relay_with_port(server, *family, even) {
            Ok(relay) => found.push((*family, relay)),
            Err(why) => missing.push((*family, why)),
        }
    }
    if !found.is_empty() {
        return Ok((found, missing.pop()));
    }
    // One that might be had another time says more than one that never will.
    let (_, why) = missing.into_iter().max_by_key(|(_, why)| why.code()).expect("one family is asked for");
    Err(why)
}

/// The first relay address of `family` that has a bound port.
fn relay_with_port(server: &Server, family: Family, even: bool) -> Result<u8, Refusal> {
    let mut of_family = (0..)
        .zip(server.policy.relays.iter().zip(&server.ports))
        .filter(|(_, (relay, _))| Family::of(relay.public) == family)
        .peekable();
    of_family.peek().ok_or(Refusal::AddressFamilyNotSupported)?;
    of_family
        .find(|(_, (_, ports))| ports.has(even))
        .map(|(index, _)| index)
        .ok_or(Refusal::InsufficientCapacity)
}

fn take_ports(server: &mut Server, relays: Relays, even: bool) -> Vec<(Family, RelayPort)> {
    let take = |(family, relay)| {
        let port = server.ports(relay).take(even).expect("it was there a moment ago");
        (family, RelayPort { relay, port })
    };
    relays.into_iter().map(take).collect()
}
