//! ChannelBind (RFC 8656 §12).

use turn_types::attribute::{ChannelNumber, XorPeerAddress};

use crate::{
    clock::Now,
    turn::{
        Channel, Family, PeerAddr,
        auth::Caller,
        refusal::Refusal,
        reply::Success,
        server::{Request, Server},
    },
};

/// The steps of RFC 8656 §12.2.
pub(super) fn channel_bind(
    server: &mut Server,
    now: Now,
    request: &Request<'_>,
    caller: &Caller,
) -> Result<Success, Refusal> {
    let id = server.allocation_of(request, caller)?;
    let number = super::required::<ChannelNumber>(&request.message)?.channel();
    let channel = Channel::new(number).ok_or(Refusal::BadRequest)?;
    let peer = super::required::<XorPeerAddress>(&request.message)?.addr(request.message.transaction_id());
    if !server.forward.has_family(id, Family::of(peer.ip())) {
        return Err(Refusal::PeerAddressFamilyMismatch);
    }
    let reach = server.policy.permit_port(now, caller.agent(), peer)?;
    server.forward.bind(id, channel, PeerAddr(peer), reach, now.mono)?;
    server.tell_routes();
    server.rearm(id);
    Ok(Success::Done)
}
