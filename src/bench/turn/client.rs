//! A TURN client: messages in, requests out. It owns no socket and reads no clock, and does one thing at a time.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use stun_types::{
    attribute::{ErrorCode, Nonce, Realm, Username},
    message::{
        IntegrityAlgorithm, IntegrityKey, LongTermKeyCredentials, Message, MessageClass, MessageWriteVec,
        Method, StunWriteError, TransactionId,
    },
    prelude::{MessageWrite, MessageWriteExt},
};
use turn_types::{
    AddressFamily,
    attribute::{
        ChannelNumber, Lifetime, RequestedAddressFamily, RequestedTransport, XorPeerAddress,
        XorRelayedAddress,
    },
    message::{ALLOCATE, CHANNEL_BIND, REFRESH},
};

use crate::{
    credentials::turn_rest::TurnUser,
    turn::{Channel, channel_data},
};

/// The one channel of a client.
pub(crate) const CHANNEL: u16 = 0x4000;

/// Retransmission over UDP (RFC 8489 §6.2.1): the first after so long, each later one after twice as long as the one before.
const FIRST_WAIT: Duration = Duration::from_millis(500);
/// Requests sent at most, and how long after the last of them there is an end, in first waits.
const REQUESTS: u32 = 7;
const LAST_WAIT: u32 = 16;
/// Over a stream nothing is sent again (§6.2.2).
const STREAM_WAIT: Duration = Duration::from_millis(39_500);
/// A nonce may grow stale while a request is under way; one that always does is no nonce.
const CHALLENGES: u32 = 4;
/// Other ports that a client tries.
const MOVES: u32 = 8;

/// What a client asks of the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    Allocate,
    /// Binds the channel.
    Bind(SocketAddr),
    Refresh,
    Release,
}

impl Step {
    fn method(self) -> Method {
        match self {
            Self::Allocate => ALLOCATE,
            Self::Bind(_) => CHANNEL_BIND,
            Self::Refresh | Self::Release => REFRESH,
        }
    }

    /// As the RFC calls the request.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Allocate => "Allocate",
            Self::Bind(_) => "ChannelBind",
            Self::Refresh | Self::Release => "Refresh",
        }
    }
}

/// What became of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Heard {
    /// It is none of ours.
    Nothing,
    /// The [request](Client::request) has changed and has to be sent.
    Challenge,
    /// The same, but from another port: the server still knows an allocation of this one (RFC 8656 §7.4).
    Taken,
    /// That is done.
    Done(Step),
}

/// What time has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Due {
    Nothing,
    /// To send the [request](Client::request) again.
    Again,
    /// To give up, and not wait for an answer any longer.
    Silence(Step),
}

/// One client.
pub(crate) struct Client {
    user: TurnUser,
    /// It speaks over a stream.
    reliable: bool,
    /// It wants a relayed address of IPv6.
    ipv6: bool,
    /// What the server said last.
    realm: String,
    nonce: String,
    /// Of `user` in `realm`.
    key: Option<IntegrityKey>,
    relayed: Option<SocketAddr>,
    bound: Option<SocketAddr>,
    pending: Option<Pending>,
    /// How often it has tried another port, for one allocation.
    moves: u32,
    /// It has had an allocation before.
    released: bool,
}

/// A request without an answer.
struct Pending {
    step: Step,
    id: TransactionId,
    request: Vec<u8>,
    sent: u32,
    next: Instant,
    wait: Duration,
    signed: bool,
    challenges: u32,
}

impl Client {
    pub(crate) fn new(user: TurnUser, reliable: bool, ipv6: bool) -> Self {
        let (realm, nonce) = (String::new(), String::new());
        Self {
            user,
            reliable,
            ipv6,
            realm,
            nonce,
            key: None,
            relayed: None,
            bound: None,
            pending: None,
            moves: 0,
            released: false,
        }
    }

    /// Its address at the server, once it has one.
    pub(crate) fn relayed(&self) -> Option<SocketAddr> {
        self.relayed
    }

    /// Whether it has released an allocation.
    pub(crate) fn has_released(&self) -> bool {
        self.released
    }

    /// Begins something, in place of what it had not done yet. Its [request](Self::request) has to be sent.
    pub(crate) fn ask(&mut self, step: Step, now: Instant) -> Result<(), String> {
        self.begin(step, 0, now)
    }

    fn begin(&mut self, step: Step, challenges: u32, now: Instant) -> Result<(), String> {
        let signed = self.key.is_some();
        let (id, request) = self.write(step).map_err(|error| format!("cannot write a request: {error}"))?;
        let wait = if self.reliable { STREAM_WAIT } else { FIRST_WAIT };
        let next = now + wait;
        self.pending = Some(Pending { step, id, request, sent: 1, next, wait, signed, challenges });
        Ok(())
    }

    /// What is to be sent.
    pub(crate) fn request(&self) -> &[u8] {
        self.pending.as_ref().map_or(&[], |pending| &pending.request)
    }

    /// Whether it waits for an answer.
    pub(crate) fn is_busy(&self) -> bool {
        self.pending.is_some()
    }

    /// What its channel is bound to.
    pub(crate) fn bound(&self) -> Option<SocketAddr> {
        self.bound
    }

    fn write(&self, step: Step) -> Result<(TransactionId, Vec<u8>), StunWriteError> {
        let mut message = Message::builder_request(step.method(), MessageWriteVec::new());
        let id = message.transaction_id();
        match step {
            Step::Allocate => {
                message.add_attribute(&RequestedTransport::new(RequestedTransport::UDP))?;
                if self.ipv6 {
                    message.add_attribute(&RequestedAddressFamily::new(AddressFamily::IPV6))?;
                }
            }
            Step::Bind(peer) => {
                message.add_attribute(&ChannelNumber::new(CHANNEL))?;
                message.add_attribute(&XorPeerAddress::new(peer, id))?;
            }
            Step::Refresh => message.add_attribute(&Lifetime::new(600))?,
            Step::Release => message.add_attribute(&Lifetime::new(0))?,
        }
        if let Some(key) = &self.key {
            message.add_attribute(&Username::new(&self.user.username)?)?;
            message.add_attribute(&Realm::new(&self.realm)?)?;
            message.add_attribute(&Nonce::new(&self.nonce)?)?;
            message.add_message_integrity_with_key(key, IntegrityAlgorithm::Sha1)?;
        }
        Ok((id, message.finish()))
    }

    /// A message of the server's. Its integrity is not checked: what is measured is the server, not a client's work.
    ///
    /// # Errors
    /// One line for people: the request was refused.
    pub(crate) fn hear(&mut self, message: &[u8], now: Instant) -> Result<Heard, String> {
        let Ok(message) = Message::from_bytes(message) else { return Ok(Heard::Nothing) };
        let answers = |pending: &mut Pending| pending.id == message.transaction_id() && message.is_response();
        let Some(pending) = self.pending.take_if(answers) else { return Ok(Heard::Nothing) };
        if message.class() == MessageClass::Error {
            return self.be_refused(&pending, &message, now);
        }
        match pending.step {
            Step::Allocate => {
                let relayed = message.attribute::<XorRelayedAddress>();
                let relayed =
                    relayed.map_err(|_| "the server's answer to Allocate has no relayed address")?;
                self.relayed = Some(relayed.addr(message.transaction_id()));
                self.moves = 0;
            }
            Step::Release => self.forget(),
            Step::Bind(peer) => self.bound = Some(peer),
            Step::Refresh => {}
        }
        Ok(Heard::Done(pending.step))
    }

    fn be_refused(&mut self, pending: &Pending, answer: &Message<'_>, now: Instant) -> Result<Heard, String> {
        let error = answer.attribute::<ErrorCode>().map_err(|_| "the server's error has no code")?;
        let code = error.code();
        let is_challenge = (code == 401 && !pending.signed) || code == 438;
        if is_challenge && pending.challenges < CHALLENGES {
            let told = (answer.attribute::<Realm>(), answer.attribute::<Nonce>());
            let (Ok(realm), Ok(nonce)) = told else {
                return Err(format!("the server's {code} names no realm and nonce"));
            };
            self.challenge(realm.realm(), nonce.nonce());
            self.begin(pending.step, pending.challenges + 1, now)?;
            return Ok(Heard::Challenge);
        }
        if code == 437 && pending.step == Step::Release {
            // There is none any more, or was none yet.
            self.forget();
            return Ok(Heard::Done(Step::Release));
        }
        if code == 437 && pending.step == Step::Allocate && self.moves < MOVES {
            self.moves += 1;
            self.begin(pending.step, 0, now)?;
            return Ok(Heard::Taken);
        }
        Err(refusal(pending.step, code, error.reason()))
    }

    fn forget(&mut self) {
        (self.relayed, self.bound, self.released) = (None, None, true);
    }

    fn challenge(&mut self, realm: &str, nonce: &str) {
        nonce.clone_into(&mut self.nonce);
        if self.key.is_none() || self.realm != realm {
            realm.clone_into(&mut self.realm);
            let TurnUser { username, credential } = self.user.clone();
            let credentials = LongTermKeyCredentials::new(username, credential, self.realm.clone());
            self.key = Some(credentials.make_key(IntegrityAlgorithm::Sha1));
        }
    }

    /// To be asked now and then.
    pub(crate) fn due(&mut self, now: Instant) -> Due {
        let Some(pending) = &mut self.pending else { return Due::Nothing };
        if now < pending.next {
            return Due::Nothing;
        }
        if self.reliable || pending.sent == REQUESTS {
            let step = pending.step;
            self.pending = None;
            return Due::Silence(step);
        }
        pending.sent += 1;
        pending.wait *= 2;
        pending.next = now + if pending.sent == REQUESTS { FIRST_WAIT * LAST_WAIT } else { pending.wait };
        Due::Again
    }
}

/// What the channel's packets begin with.
pub(crate) fn header(size: u16) -> [u8; channel_data::HEADER] {
    channel_data::header(Channel::new(CHANNEL).expect("it is in the range"), size)
}

/// One line for people, with what to do about it.
fn refusal(step: Step, code: u16, reason: &str) -> String {
    let method = step.name();
    // It goes to a terminal.
    let said: String = reason.chars().filter(|char| !char.is_control()).collect();
    let reason = if said.trim().is_empty() { ErrorCode::default_reason_for_code(code) } else { said.trim() };
    let hint = match (code, step) {
        (401 | 441, _) => ": the user or the password is not the server's (--user and --password, or --secret)".to_owned(),
        (403, Step::Bind(peer)) => format!(
            ": it relays to no such peer as {}: let it (here turn.allow_peers), or choose another with --peer-ip",
            peer.ip()
        ),
        (440 | 443, _) => ": it relays to no peers of that address family: choose another with --peer-ip".to_owned(),
        (486, _) => ": a quota is reached: lift it (here turn.allocations_per_agent or turn.allocations_total), or with \
                     --secret let each client have a user of its own"
            .to_owned(),
        (508, _) => ": it has no ports left to relay from (here turn.relay_ports), or no descriptors for them (LimitNOFILE)".to_owned(),
        _ => String::new(),
    };
    format!("the server refuses {method}: {code} {reason}{hint}")
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use stun_types::{
        attribute::{ErrorCode, Nonce, Realm, Username},
        message::{Message, MessageWriteVec},
        prelude::{MessageWrite, MessageWriteExt},
    };
    use turn_types::attribute::{Lifetime, XorRelayedAddress};

    use super::{Client, Due, Heard, REQUESTS, Step};
    use crate::{bench::now, credentials::turn_rest::TurnUser};

    const RELAYED: &str = "192.0.2.1:50000";

    fn client(reliable: bool) -> (Client, Instant) {
        let user = TurnUser { username: "u".to_owned(), credential: "p".to_owned() };
        (Client::new(user, reliable, false), now())
    }

    /// The server's answer to the client's request: an error with this code, or success.
    fn answer(client: &Client, error: Option<(u16, &str)>) -> Vec<u8> {
        let request = Message::from_bytes(client.request()).unwrap();
        let Some((code, nonce)) = error else {
            let mut success = Message::builder_success(&request, MessageWriteVec::new());
            let relayed = XorRelayedAddress::new(RELAYED.parse().unwrap(), request.transaction_id());
            success.add_attribute(&relayed).unwrap();
            return success.finish();
        };
        let mut refusal = Message::builder_error(&request, MessageWriteVec::new());
        refusal.add_attribute(&ErrorCode::builder(code).reason("Go\x1b Away").build().unwrap()).unwrap();
        refusal.add_attribute(&Realm::new("r").unwrap()).unwrap();
        refusal.add_attribute(&Nonce::new(nonce).unwrap()).unwrap();
        refusal.finish()
    }

    fn nonce(request: &[u8]) -> Option<String> {
        let request = Message::from_bytes(request).unwrap();
        assert_eq!(request.attribute::<Username>().is_ok(), request.attribute::<Nonce>().is_ok());
        Some(request.attribute::<Nonce>().ok()?.nonce().to_owned())
    }

    #[test]
    fn it_learns_realm_and_nonce_allocates_binds_refreshes_and_releases() {
        let (mut client, now) = client(false);
        client.ask(Step::Allocate, now).unwrap();
        assert_eq!(nonce(client.request()), None);
        let challenge = answer(&client, Some((401, "first")));
        assert_eq!(client.hear(&challenge, now), Ok(Heard::Challenge));
        assert_eq!(nonce(client.request()).unwrap(), "first");
        assert_eq!(client.hear(&challenge, now), Ok(Heard::Nothing), "its request is another one by now");
        assert_eq!(client.hear(&answer(&client, None), now), Ok(Heard::Done(Step::Allocate)));
        assert_eq!(client.relayed(), RELAYED.parse().ok());

        let bind = Step::Bind("192.0.2.2:7".parse().unwrap());
        for step in [bind, Step::Refresh, bind, Step::Release] {
            client.ask(step, now).unwrap();
            assert!(client.is_busy());
            assert_eq!(client.hear(&answer(&client, None), now), Ok(Heard::Done(step)));
            assert!(!client.is_busy());
        }
        assert_eq!((client.relayed(), client.bound()), (None, None));
    }

    #[test]
    fn a_stale_nonce_is_replaced_but_not_for_ever() {
        let (mut client, now) = client(true);
        client.ask(Step::Allocate, now).unwrap();
        for (code, next) in [(401, "a"), (438, "b"), (438, "c"), (438, "d")] {
            let stale = answer(&client, Some((code, next)));
            assert_eq!(client.hear(&stale, now), Ok(Heard::Challenge));
            assert_eq!(nonce(client.request()).unwrap(), next);
        }
        let stale = answer(&client, Some((438, "e")));
        assert!(client.hear(&stale, now).unwrap_err().contains("438"));
    }

    #[test]
    fn a_refusal_is_one_line_that_says_what_to_do() {
        for (step, code, hint) in [
            (Step::Allocate, 401, "--password"),
            (Step::Allocate, 486, "turn.allocations_per_agent"),
            (Step::Allocate, 508, "turn.relay_ports"),
            (Step::Bind("10.0.0.1:7".parse().unwrap()), 403, "turn.allow_peers"),
        ] {
            let (mut client, now) = client(false);
            client.challenge("r", "n");
            client.ask(step, now).unwrap();
            let refused = client.hear(&answer(&client, Some((code, "n"))), now).unwrap_err();
            assert!(refused.contains(&code.to_string()) && refused.contains(hint), "{refused}");
            assert!(!refused.contains(char::is_control), "{refused:?}");
        }
    }

    #[test]
    fn requests_are_sent_again_over_udp_alone_and_not_for_ever() {
        let (mut datagrams, start) = client(false);
        datagrams.ask(Step::Refresh, start).unwrap();
        let request = datagrams.request().to_vec();
        let at = |millis| start + Duration::from_millis(millis);
        assert_eq!(datagrams.due(at(499)), Due::Nothing);
        // RFC 8489 §6.2.1
        for millis in [500, 1_500, 3_500, 7_500, 15_500, 31_500] {
            assert_eq!(datagrams.due(at(millis)), Due::Again, "{millis}");
            assert_eq!(datagrams.due(at(millis)), Due::Nothing);
            assert_eq!(datagrams.request(), request);
        }
        assert_eq!(datagrams.due(at(39_499)), Due::Nothing);
        assert_eq!(datagrams.due(at(39_500)), Due::Silence(Step::Refresh));
        assert!(!datagrams.is_busy() && REQUESTS == 7);

        let (mut stream, start) = client(true);
        stream.ask(Step::Refresh, start).unwrap();
        assert_eq!(stream.due(start + Duration::from_secs(39)), Due::Nothing);
        assert_eq!(stream.due(start + Duration::from_secs(40)), Due::Silence(Step::Refresh));
    }

    #[test]
    fn what_was_asked_for_is_what_is_sent() {
        let (mut client, now) = client(false);
        for (step, seconds) in [(Step::Refresh, Some(600)), (Step::Release, Some(0)), (Step::Allocate, None)]
        {
            client.ask(step, now).unwrap();
            let request = Message::from_bytes(client.request()).unwrap();
            assert_eq!(request.method(), step.method());
            let lifetime = request.attribute::<Lifetime>().ok();
            assert_eq!(lifetime.map(|lifetime| lifetime.seconds()), seconds);
        }
    }
}
