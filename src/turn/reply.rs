//! Writing answers: attributes, then MESSAGE-INTEGRITY for who proved a key, then FINGERPRINT for who sent one.

use std::{net::SocketAddr, time::Duration};

use stun_types::{
    attribute::{ErrorCode, Fingerprint, Nonce, Realm, UnknownAttributes, XorMappedAddress},
    message::{IntegrityAlgorithm, IntegrityKey, Message, MessageWriteMutSlice},
    prelude::{AttributeStaticType, AttributeWrite, MessageWrite, MessageWriteExt},
};
use turn_types::attribute::{Lifetime, XorRelayedAddress};

use super::refusal::Refusal;

/// What a success says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Success {
    /// To Binding: the client's reflexive address.
    Bound { mapped: SocketAddr },
    /// To Allocate.
    Allocated { relayed: SocketAddr, mapped: SocketAddr, lifetime: Duration },
    /// To Refresh.
    Refreshed { lifetime: Duration },
    /// To CreatePermission and ChannelBind: nothing more.
    Done,
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
        Success::Allocated { relayed, mapped, lifetime } => {
            add(&mut writer, &XorRelayedAddress::new(relayed, transaction));
            add(&mut writer, &Lifetime::new(lifetime.as_secs() as u32));
            add(&mut writer, &XorMappedAddress::new(mapped, transaction));
        }
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
    let code =
        ErrorCode::new(refusal.code(), refusal.reason()).expect("every refusal has a code from 400 to 599");
    add(&mut writer, &code);
    if let Refusal::UnknownAttributes(unknown) = refusal {
        add(&mut writer, &UnknownAttributes::new(&unknown[..unknown.len().min(NAMED)]));
    }
    if let Some((realm, nonce)) = challenge {
        add(&mut writer, &Realm::new(realm).expect("the configuration admits only a realm that fits"));
        add(&mut writer, &Nonce::new(&nonce).expect("our nonces are short ASCII"));
    }
    finish(request, writer, key, reply);
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
