//! CreatePermission (RFC 8656 §10).

use std::net::IpAddr;

use stun_types::prelude::{Attribute, AttributeFromRaw, AttributeStaticType};
use turn_types::attribute::XorPeerAddress;

use crate::{
    clock::Now,
    turn::{
        Family,
        auth::Caller,
        policy::Reach,
        refusal::Refusal,
        reply::Success,
        server::{Request, Server},
    },
};

/// All of the peers, or none (RFC 8656 §10.2). Their ports do not matter.
pub(super) fn create_permission(
    server: &mut Server,
    now: Now,
    request: &Request<'_>,
    caller: &Caller,
) -> Result<Success, Refusal> {
    let id = server.allocation_of(request, caller)?;
    let peers = peers(request)?;
    if peers.iter().any(|ip| !server.forward.has_family(id, Family::of(*ip))) {
        return Err(Refusal::PeerAddressFamilyMismatch);
    }
    let permit = |ip: IpAddr| {
        Ok::<(IpAddr, Reach), Refusal>((ip, server.policy.permit_agent(now, caller.agent(), ip)?))
    };
    let permitted = peers.into_iter().map(permit).collect::<Result<Vec<_>, _>>()?;
    server.forward.permit(id, &permitted, now.mono)?;
    server.rearm(id);
    Ok(Success::Done)
}

/// The addresses of all peers, each once.
fn peers(request: &Request<'_>) -> Result<Vec<IpAddr>, Refusal> {
    let transaction = request.message.transaction_id();
    let mut peers = Vec::new();
    for (_, raw) in
        request.message.iter_attributes().filter(|(_, raw)| raw.get_type() == XorPeerAddress::TYPE)
    {
        let peer = XorPeerAddress::from_raw_ref(&raw).map_err(|_| Refusal::BadRequest)?;
        peers.push(peer.addr(transaction).ip());
    }
    peers.sort_unstable();
    peers.dedup();
    if peers.is_empty() { Err(Refusal::BadRequest) } else { Ok(peers) }
}
