//! Writing answers: attributes, then MESSAGE-INTEGRITY for who proved a key, then FINGERPRINT for who sent one.

use std::{net::SocketAddr, time::Duration};

use stun_types::{
    AddressFamily,
    attribute::{ErrorCode, Fingerprint, Nonce, Realm, UnknownAttributes, XorMappedAddress},
    message::{IntegrityAlgorithm, IntegrityKey, Message, MessageWriteMutSlice, TransactionId},
    prelude::{AttributeStaticType, AttributeWrite, MessageWrite, MessageWriteExt},
};
use turn_types::attribute::{AddressErrorCode, Lifetime, XorRelayedAddress};

use super::{Family, refusal::Refusal};

/// What a success says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Success {
    /// To Binding: the client's reflexive address.
    Bound { mapped: SocketAddr },
    /// To Allocate.
    Allocated(Allocated),
    /// To Refresh.
    Refreshed { lifetime: Duration },
    /// To CreatePermission and ChannelBind: nothing more.
    Done,
}

/// What a success says to Allocate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Allocated {
    /// Two where both families were asked for and to be had: IPv4 first.
    pub relayed: Vec<SocketAddr>,
    /// Of both families that were asked for, the one that is not to be had, and why.
    pub missing: Option<(Family, Refusal)>,
    /// The client's reflexive address.
    pub mapped: SocketAddr,
    /// What is granted.
    pub lifetime: Duration,
}

/// No answer of ours is longer; a 420 names as many attributes as fit.
const LONGEST: usize = 512;
/// Unknown attributes named in a 420.
const NAMED: usize = 32;

/// Writes the success response to `request`.
pub fn success(request: &Message<'_>, success: Success, key: Option<&IntegrityKey>, reply: &mut Vec<u8>) {
    let mut buffer = [0; LONGEST];
    let mut writer = Message::builder_success(request, MessageWriteMutSlice::new(&mut buffer));
    let transaction = request.transaction_id();
    match success {
        Success::Bound { mapped } => add(&mut writer, &XorMappedAddress::new(mapped, transaction)),
        Success::Allocated(allocated) => add_allocated(&mut writer, &allocated, transaction),
        Success::Refreshed { lifetime } => add(&mut writer, &Lifetime::new(lifetime.as_secs() as u32)),
        Success::Done => {}
    }
    finish(request, writer, key, reply);
}

/// Writes the error response to `request`; `challenge` is the REALM and the NONCE that go with some refusals.
pub fn error(
    request: &Message<'_>,
    refusal: &Refusal,
    challenge: Option<(&str, String)>,
    key: Option<&IntegrityKey>,
    reply: &mut Vec<u8>,
) {
    let mut buffer = [0; LONGEST];
    let mut writer = Message::builder_error(request, MessageWriteMutSlice::new(&mut buffer));
    // Strangers get an empty phrase, which RFC 8489 §14.8 leaves to us: their answers may hit somebody else.
    let reason = if key.is_some() { refusal.reason() } else { "" };
    add(&mut writer, &error_code(refusal, reason));
    if let Refusal::UnknownAttributes(unknown) = refusal {
        add(&mut writer, &UnknownAttributes::new(&unknown[..unknown.len().min(NAMED)]));
    }
    if let Some((realm, nonce)) = challenge {
        add(&mut writer, &Realm::new(realm).expect("the configuration admits only a realm that fits"));
        add(&mut writer, &Nonce::new(&nonce).expect("our nonces are short ASCII"));
    }
    finish(request, writer, key, reply);
}

fn add_allocated(writer: &mut MessageWriteMutSlice<'_>, allocated: &Allocated, transaction: TransactionId) {
    for relayed in &allocated.relayed {
        add(writer, &XorRelayedAddress::new(*relayed, transaction));
    }
    add(writer, &Lifetime::new(allocated.lifetime.as_secs() as u32));
    add(writer, &XorMappedAddress::new(allocated.mapped, transaction));
    if let Some((family, why)) = &allocated.missing {
        let family = match family {
            Family::V4 => AddressFamily::IPV4,
            Family::V6 => AddressFamily::IPV6,
        };
        add(writer, &AddressErrorCode::new(family, error_code(why, why.reason())));
    }
}

fn error_code(refusal: &Refusal, reason: &str) -> ErrorCode {
    ErrorCode::new(refusal.code(), reason).expect("every refusal has a code from 400 to 599")
}

fn add(writer: &mut MessageWriteMutSlice<'_>, attribute: &dyn AttributeWrite) {
    writer.add_attribute(attribute).expect("LONGEST holds every answer");
}

fn finish(
    request: &Message<'_>,
    mut writer: MessageWriteMutSlice<'_>,
    key: Option<&IntegrityKey>,
    reply: &mut Vec<u8>,
) {
    if let Some(key) = key {
        writer
            .add_message_integrity_with_key(key, IntegrityAlgorithm::Sha1)
            .expect("LONGEST holds every answer");
    }
    if request.has_attribute(Fingerprint::TYPE) {
        writer.add_fingerprint().expect("LONGEST holds every answer");
    }
    reply.extend_from_slice(writer.data());
}
