//! `GET /v1/agents`: who is in the caller's room, a page at a time.

use hyper::{Request, StatusCode, body::Incoming};

use super::{
    Visit,
    problem::Problem,
    routes::{Answer, authorised, decoded, empty, json, json_bytes, may_signal, parameter},
};
use crate::{
    credentials::token::AgentId,
    signaling::{refusal::Refusal, registry::Query},
};

const DEFAULT_LIMIT: usize = 100;
const MAX_LIMIT: usize = 1000;

/// Bytes of agents on a page, about.
const MAX_PAGE: usize = 1 << 20;

/// Where agents are.
pub(super) const PREFIX: &str = "/v1/agents/";

/// `DELETE /v1/agents/{agent}`: whatever it has ends, whichever room it is in, and what it was given counts no more.
pub(super) async fn revoke(visit: &Visit, request: &Request<Incoming>) -> Result<Answer, Problem> {
    let operator = authorised(visit, request.headers()).await?;
    if !operator.scopes.admin {
        return Err(Problem::forbidden("the token lacks the scope admin"));
    }
    let agent = named(request)?;
    visit.front.revoke(&agent).await?;
    tracing::info!(%agent, by = %operator.id, "revoked");
    Ok(empty(StatusCode::NO_CONTENT))
}

/// `GET /v1/agents/{agent}`: its card, as it is.
pub(super) async fn card(visit: &Visit, request: &Request<Incoming>) -> Result<Answer, Problem> {
    let caller = may_signal(authorised(visit, request.headers()).await?)?;
    let agent = named(request)?;
    let card = visit.front.switchboard.tell(|hub, _| hub.card(&caller.room, &agent));
    // Nobody there, and nothing to be seen of who is: alike.
    let card = card.ok_or_else(|| Problem::from(&Refusal::PeerUnavailable))?;
    Ok(json_bytes(card.get().as_bytes().to_vec()))
}

/// The agent in the path.
fn named(request: &Request<Incoming>) -> Result<AgentId, Problem> {
    let agent = decoded(request.uri().path().strip_prefix(PREFIX).unwrap_or_default())?;
    AgentId::parse(&agent).ok_or(Problem::bad_request("an agent's id is 1 to 128 of A-Z a-z 0-9 . _ : @ / -"))
}

/// `GET /v1/agents`.
pub(super) async fn list(visit: &Visit, request: &Request<Incoming>) -> Result<Answer, Problem> {
    let agent = may_signal(authorised(visit, request.headers()).await?)?;
    let [skill, tag, text] = ["skill", "tag", "text"].map(|name| parameter(request, name));
    let query = Query::new(skill?.as_deref(), tag?.as_deref(), text?.as_deref());
    let query = query.ok_or(Problem::bad_request("text has too many words"))?;
    let limit = asked_limit(request)?;
    let after = parameter(request, "after")?.unwrap_or_default();
    let page = visit.front.switchboard.tell(|hub, _| hub.page(&agent.room, &query, &after, limit, MAX_PAGE));
    Ok(json(&page))
}

fn asked_limit(request: &Request<Incoming>) -> Result<usize, Problem> {
    let Some(limit) = parameter(request, "limit")? else { return Ok(DEFAULT_LIMIT) };
    let limit = limit.parse().ok().filter(|limit: &usize| *limit > 0);
    Ok(limit.ok_or(Problem::bad_request("limit is not a number above 0"))?.min(MAX_LIMIT))
}
