//! Fresh ICE servers for agents that stay: pushed at half the life of those they have, however they listen.

use std::time::{Duration, Instant};

use aws_lc_rs::rand;
use serde::Serialize;

use super::{Visit, ice::IceList, routes::ice_list, switchboard::Seat};
use crate::{clock::Now, credentials::token::Agent, signaling::hub::IceTerm};

/// `ice`, in the frame's form.
#[derive(Serialize)]
struct IceFrame<'a> {
    r#type: &'static str,
    #[serde(flatten)]
    list: &'a IceList,
}

/// What an agent has with this list.
pub(super) fn term(now: Now, list: &IceList) -> IceTerm {
    let expires = now.unix() + list.turn_rest.ttl;
    IceTerm { expires, renew_at: renew_at(now, expires) }
}

/// Pushes fresh ones if that is due, and they are good for longer than the old ones. Gives when to ask again.
pub(super) fn push_if_due(visit: &Visit, now: Now, agent: &Agent, seat: &Seat) -> Option<Instant> {
    let (before, token_expires) = seat.tell(|hub, connection| hub.ice_term(connection))?;
    if before.renew_at > now.mono {
        return Some(before.renew_at);
    }
    // The token may have been renewed since.
    let agent = Agent { expires: token_expires, ..agent.clone() };
    let list = ice_list(visit, &agent, now, None).ok();
    let fresh = list.as_ref().map(|list| term(now, list)).filter(|term| term.expires > before.expires);
    let next = fresh.unwrap_or(IceTerm { renew_at: renew_at(now, before.expires), ..before });
    let frame = list.filter(|_| fresh.is_some()).map(|list| {
        let frame = serde_json::to_vec(&IceFrame { r#type: "ice", list: &list });
        frame.expect("an ICE list is plain JSON").into()
    });
    seat.tell(|hub, connection| hub.give_ice(now, connection, frame, next));
    Some(next.renew_at)
}

/// At half the remaining life, a little earlier for some than for others.
fn renew_at(now: Now, expires: u64) -> Instant {
    let left = expires.saturating_sub(now.unix());
    let mut jitter = [0];
    // Without randomness all are asked at once: no harm is done.
    let _ = rand::fill(&mut jitter);
    let half = Duration::from_secs(left) / 2;
    now.mono + (half - half / 10 * u32::from(jitter[0]) / 255).max(Duration::from_secs(1))
}
