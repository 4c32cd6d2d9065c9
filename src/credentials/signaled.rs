//! Which addresses agents were told by others of their room: written by signaling, read by the relay where
//! `turn.peer_policy` is `signaled`.
//!
//! It is asked when a permission or a channel is made, and never for a packet.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    net::IpAddr,
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use serde::Deserialize;
use serde_json::value::RawValue;

use crate::clock::Now;

/// Addresses that one agent may have been told; of more, the latest.
const MAX_ADDRESSES: usize = 256;

/// Agents that are remembered; of more, those that were told something, or made use of it, latest.
const MAX_AGENTS: usize = 65_536;

/// How long an address is good: an agent that goes on using it has its permission made anew, which counts.
const GOOD_FOR: Duration = Duration::from_secs(86_400);

/// The addresses that agents were told. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Signaled(Arc<RwLock<Book>>);

#[derive(Debug, Default)]
struct Book {
    by_agent: HashMap<Arc<str>, Told>,
    /// By when they were last told something, or made use of it.
    by_use: BTreeMap<u64, Arc<str>>,
    last_use: u64,
}

/// What one agent was told.
#[derive(Debug, Default)]
struct Told {
    /// The latest last: an address, and until when it is good, in Unix seconds.
    addresses: VecDeque<(IpAddr, u64)>,
    used: u64,
}

impl Signaled {
    /// `agent` was told these addresses by another agent of its room.
    pub fn tell(&self, now: Now, agent: &str, addresses: impl IntoIterator<Item = IpAddr>) {
        let mut addresses = addresses.into_iter().peekable();
        if addresses.peek().is_none() {
            return;
        }
        let until = now.unix().saturating_add(GOOD_FOR.as_secs());
        let mut book = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let told = book.told(agent);
        addresses.for_each(|address| told.add(address.to_canonical(), until));
    }

    /// Whether `agent` was told the address; then it is good for as long again.
    #[must_use]
    pub fn has_told(&self, now: Now, agent: &str, address: IpAddr) -> bool {
        let (now, address) = (now.unix(), address.to_canonical());
        let mut book = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let Some(told) = book.by_agent.get(agent) else { return false };
        let is_good = told.addresses.iter().any(|(known, until)| *known == address && now < *until);
        if is_good {
            book.told(agent).add(address, now.saturating_add(GOOD_FOR.as_secs()));
        }
        is_good
    }
}

impl Book {
    /// What an agent was told, which is of use now.
    fn told(&mut self, agent: &str) -> &mut Told {
        self.last_use += 1;
        let used = self.last_use;
        let name = match self.by_agent.get(agent) {
            Some(told) => self.by_use.remove(&told.used).expect("each has its place"),
            None => self.add(agent),
        };
        self.by_use.insert(used, Arc::clone(&name));
        let told = self.by_agent.get_mut(&name).expect("it is there by now");
        told.used = used;
        told
    }

    fn add(&mut self, agent: &str) -> Arc<str> {
        if self.by_agent.len() >= MAX_AGENTS
            && let Some((_, longest_unused)) = self.by_use.pop_first()
        {
            self.by_agent.remove(&longest_unused);
        }
        let agent: Arc<str> = agent.into();
        self.by_agent.insert(Arc::clone(&agent), Told::default());
        agent
    }
}

impl Told {
    fn add(&mut self, address: IpAddr, until: u64) {
        self.addresses.retain(|(known, _)| *known != address);
        if self.addresses.len() >= MAX_ADDRESSES {
            self.addresses.pop_front();
        }
        self.addresses.push_back((address, until));
    }
}

/// What agents say of where they can be reached: a description, a candidate, what PeerJS puts around either, or the frame of one
/// of them. Names are not looked up.
#[must_use]
pub fn addresses(body: &RawValue) -> Vec<IpAddr> {
    let mut found = Vec::new();
    find_addresses(body, MAX_DEPTH, &mut found);
    found
}

/// As deep as a frame holds a candidate that PeerJS has put around it what it does.
const MAX_DEPTH: usize = 4;

fn find_addresses(body: &RawValue, depth: usize, found: &mut Vec<IpAddr>) {
    #[derive(Deserialize)]
    struct Members<'a> {
        #[serde(borrow)]
        candidate: Option<&'a RawValue>,
        #[serde(borrow)]
        sdp: Option<&'a RawValue>,
        #[serde(borrow)]
        payload: Option<&'a RawValue>,
    }
    if let Ok(text) = serde_json::from_str::<String>(body.get()) {
        found.extend(candidates(&text).take(MAX_ADDRESSES));
    } else if depth > 0
        && let Ok(Members { candidate, sdp, payload }) = serde_json::from_str(body.get())
    {
        let inner = [candidate, sdp, payload].into_iter().flatten();
        inner.for_each(|body| find_addresses(body, depth - 1, found));
    }
}

/// The connection addresses of candidates (RFC 8839 §5.1): of a lone one, or of the lines of a description.
fn candidates(sdp: &str) -> impl Iterator<Item = IpAddr> + '_ {
    sdp.lines().filter_map(|line| {
        let line = line.trim();
        let candidate = line.strip_prefix("a=").unwrap_or(line).strip_prefix("candidate:")?;
        candidate.split_ascii_whitespace().nth(4)?.parse().ok()
    })
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use serde_json::{Value, json, value::to_raw_value};

    use super::{GOOD_FOR, MAX_ADDRESSES, MAX_AGENTS, Signaled, addresses};
    use crate::clock;

    fn read(body: &Value) -> Vec<String> {
        addresses(&to_raw_value(body).unwrap()).iter().map(ToString::to_string).collect()
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn candidates_are_found_where_agents_put_them() {
        let lone = "candidate:1 1 udp 2122260223 203.0.113.9 46154 typ host generation 0";
        let sdp = "v=0\r\nc=IN IP4 198.51.100.1\r\na=candidate:1 1 UDP 1 203.0.113.9 9 typ host\r\n\
                   a=candidate:2 1 tcp 1 2001:db8::9 9 typ host tcptype active\r\na=candidate:3 1 udp 1 some-name.local 9 typ host\r\n";
        let both = vec!["203.0.113.9".to_owned(), "2001:db8::9".to_owned()];
        assert_eq!(read(&json!(sdp)), both);
        assert_eq!(read(&json!({"candidate": lone, "sdpMid": "0"})), both[..1]);
        assert_eq!(read(&json!({"candidate": format!("a={lone}")})), both[..1]);
        // As PeerJS says it.
        let offer = json!({"type": "OFFER", "payload": {"sdp": {"type": "offer", "sdp": sdp}, "connectionId": "dc_1"}});
        assert_eq!(read(&offer), both);
        let candidate =
            json!({"type": "CANDIDATE", "payload": {"candidate": {"candidate": lone, "sdpMid": "0"}}});
        assert_eq!(read(&candidate), both[..1]);
        let frame =
            json!({"type": "iceCandidate", "seq": 1, "from": "alice", "to": "bob", "candidate": candidate});
        assert_eq!(read(&frame), both[..1]);
        for none in [
            json!(null),
            json!(7),
            json!([[lone]]),
            json!({"candidate": ""}),
            json!("candidate:1 1 udp"),
            json!({"text": sdp}),
        ] {
            assert_eq!(read(&none), [""; 0], "{none}");
        }
    }

    #[test]
    fn what_one_agent_was_told_is_for_that_agent_and_for_a_while() {
        let (now, signaled) = (clock::now(), Signaled::default());
        signaled.tell(now, "alice", [ip("203.0.113.9"), ip("::ffff:203.0.113.10")]);
        assert!(signaled.has_told(now, "alice", ip("203.0.113.9")));
        assert!(signaled.has_told(now, "alice", ip("203.0.113.10")));
        assert!(!signaled.has_told(now, "alice", ip("203.0.113.11")));
        assert!(!signaled.has_told(now, "bob", ip("203.0.113.9")));
        assert!(
            signaled.has_told(now + GOOD_FOR / 2, "alice", ip("203.0.113.9")),
            "and with that, as long again"
        );
        assert!(signaled.has_told(now + GOOD_FOR, "alice", ip("203.0.113.9")));
        assert!(!signaled.has_told(now + GOOD_FOR, "alice", ip("203.0.113.10")));
    }

    #[test]
    fn so_much_is_remembered() {
        let (now, signaled) = (clock::now(), Signaled::default());
        for number in 0..=MAX_ADDRESSES as u32 {
            signaled.tell(now, "alice", [IpAddr::from(number.to_be_bytes())]);
        }
        assert!(
            !signaled.has_told(now, "alice", ip("0.0.0.0")) && signaled.has_told(now, "alice", ip("0.0.0.1"))
        );
        let tell_many = |numbers: std::ops::Range<usize>| {
            numbers.for_each(|number| signaled.tell(now, &number.to_string(), [ip("203.0.113.9")]));
        };
        tell_many(0..MAX_AGENTS - 1);
        assert!(signaled.has_told(now, "alice", ip("0.0.0.1")), "and with that, she is not the first to go");
        tell_many(MAX_AGENTS..2 * MAX_AGENTS - 1);
        assert!(signaled.has_told(now, "alice", ip("0.0.0.1")));
        assert!(!signaled.has_told(now, "0", ip("203.0.113.9")));
        tell_many(2 * MAX_AGENTS..3 * MAX_AGENTS);
        assert!(!signaled.has_told(now, "alice", ip("0.0.0.1")));
    }
}
