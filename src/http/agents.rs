//! `GET /v1/agents`: who is in the caller's room, a page at a time.

use hyper::{Request, body::Incoming};
use serde::Serialize;
use serde_json::value::RawValue;

use super::{
    Visit,
    problem::Problem,
    routes::{Answer, authorised, json, parameter},
};
use crate::{clock, credentials::token::AgentId};

const DEFAULT_LIMIT: usize = 100;
const MAX_LIMIT: usize = 1000;

/// Bytes of agents on a page, about.
const MAX_PAGE: usize = 1 << 20;

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Body<'a> {
    agents: Vec<Listed<'a>>,
    agent_count: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    next: Option<&'a AgentId>,
}

#[derive(Serialize)]
struct Listed<'a> {
    agent: &'a AgentId,
    #[serde(skip_serializing_if = "Option::is_none")]
    card: Option<&'a RawValue>,
}

pub(super) fn list(visit: &Visit, request: &Request<Incoming>) -> Result<Answer, Problem> {
    let agent = authorised(visit, request, clock::now())?;
    if !agent.scopes.signal {
        return Err(Problem::forbidden("the token lacks the scope signal"));
    }
    for name in ["skill", "tag", "text"] {
        if parameter(request, name)?.is_some() {
            return Err(Problem::bad_request("skill, tag and text are not served"));
        }
    }
    let limit = asked_limit(request)?;
    let after = parameter(request, "after")?.unwrap_or_default();
    let page = visit.front.switchboard.tell(|hub, _| hub.page(&agent.room, &after, limit, MAX_PAGE));
    let agents = page.agents.iter().map(|(agent, card)| Listed { agent, card: card.as_deref() }).collect();
    Ok(json(&Body { agents, agent_count: page.agent_count, next: page.next.as_ref() }))
}

fn asked_limit(request: &Request<Incoming>) -> Result<usize, Problem> {
    let Some(limit) = parameter(request, "limit")? else { return Ok(DEFAULT_LIMIT) };
    let limit = limit.parse().ok().filter(|limit: &usize| *limit > 0);
    Ok(limit.ok_or(Problem::bad_request("limit is not a number above 0"))?.min(MAX_LIMIT))
}
