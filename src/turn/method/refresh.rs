//! Refresh (RFC 8656 §8).

use turn_types::attribute::{Lifetime, RequestedAddressFamily};

use crate::{
    clock::Now,
    turn::{
        Family,
        allocation::{Why, granted},
        auth::Caller,
        refusal::Refusal,
        reply::Success,
        server::{Request, Server},
    },
};

/// The steps of RFC 8656 §8.2.
pub(super) fn refresh(
    server: &mut Server,
    now: Now,
    request: &Request<'_>,
    caller: &Caller,
) -> Result<Success, Refusal> {
    let id = server.allocation_of(request, caller)?;
    let named = super::optional::<RequestedAddressFamily>(&request.message)?;
    let family = named.map(|named| Family::from(named.family()));
    if family.is_some_and(|family| !server.forward.has_family(id, family)) {
        return Err(Refusal::PeerAddressFamilyMismatch);
    }
    let asked = super::optional::<Lifetime>(&request.message)?.map(|lifetime| lifetime.seconds());
    if asked == Some(0) {
        match family {
            Some(family) => server.end_family(id, family, now.mono, Why::Released),
            None => server.end(id, now.mono, Why::Released),
        }
        return Ok(Success::Refreshed { lifetime: std::time::Duration::ZERO });
    }
    let lifetime = granted(asked);
    let tick = server.quotas.tick(now.mono);
    let allocation = server.allocations.get_mut(&id).expect("found above");
    allocation.prolong(family, now.mono + lifetime);
    allocation.seat.tenure().touch(tick);
    server.rearm(id);
    Ok(Success::Refreshed { lifetime })
}
