//! The methods, one file each, in the RFC's order of steps.

mod allocate;
mod binding;
mod channel_bind;
mod create_permission;
mod refresh;

pub(super) use binding::binding;
use stun_types::{
    AddressFamily,
    attribute::AttributeType,
    message::Message,
    prelude::{Attribute, AttributeFromRaw, AttributeStaticType},
};
use turn_types::message::{ALLOCATE, CHANNEL_BIND, REFRESH};

use super::{
    Family,
    auth::Caller,
    forward::Unwritten,
    policy::Denied,
    refusal::Refusal,
    reply::Success,
    server::{Request, Server},
};
use crate::clock::Now;

/// A TURN request of an authenticated caller.
pub(super) fn turn(
    server: &mut Server,
    now: Now,
    request: &Request<'_>,
    caller: &Caller,
) -> Result<Success, Refusal> {
    understood(&request.message)?;
    match request.message.method() {
        ALLOCATE => allocate::allocate(server, now, request, caller),
        REFRESH => refresh::refresh(server, now, request, caller),
        CHANNEL_BIND => channel_bind::channel_bind(server, now, request, caller),
        _ => create_permission::create_permission(server, now, request, caller),
    }
}

/// Comprehension-required attributes that we know, whatever the method (RFC 8489 §18.3, RFC 8656 §18). Not among
/// them: DONT-FRAGMENT, which a relay that cannot set the bit must refuse (RFC 8656 §7.2).
const KNOWN: [u16; 19] = [
    0x0001, 0x0006, 0x0008, 0x0009, 0x000a, 0x000c, 0x000d, 0x0012, 0x0013, 0x0014, 0x0015, 0x0016, 0x0017,
    0x0018, 0x0019, 0x001c, 0x001d, 0x0020, 0x0022,
];

/// 420 if there is an attribute that has to be understood and is not.
fn understood(message: &Message<'_>) -> Result<(), Refusal> {
    let must = |kind: &AttributeType| kind.value() < 0x8000 && !KNOWN.contains(&kind.value());
    let unknown: Vec<_> = message.iter_attributes().map(|(_, raw)| raw.get_type()).filter(must).collect();
    if unknown.is_empty() { Ok(()) } else { Err(Refusal::UnknownAttributes(unknown)) }
}

/// An attribute that may be missing, but not broken. The first of several counts.
fn optional<'a, A: AttributeFromRaw<'a> + AttributeStaticType>(
    message: &'a Message<'_>,
) -> Result<Option<A>, Refusal> {
    if message.has_attribute(A::TYPE) { required(message).map(Some) } else { Ok(None) }
}

/// An attribute that may not be missing. The first of several counts.
fn required<'a, A: AttributeFromRaw<'a> + AttributeStaticType>(
    message: &'a Message<'_>,
) -> Result<A, Refusal> {
    message.attribute().map_err(|_| Refusal::BadRequest)
}

impl From<AddressFamily> for Family {
    fn from(family: AddressFamily) -> Self {
        match family {
            AddressFamily::IPV4 => Self::V4,
            AddressFamily::IPV6 => Self::V6,
        }
    }
}

impl From<Denied> for Refusal {
    fn from(Denied: Denied) -> Self {
        Self::Forbidden
    }
}

impl From<Unwritten> for Refusal {
    fn from(why: Unwritten) -> Self {
        match why {
            Unwritten::Conflict => Self::BadRequest,
            Unwritten::Full => Self::InsufficientCapacity,
        }
    }
}
