//! A TURN client's side of the wire, built on the `stun` crate: another implementation than the server's.

use std::net::SocketAddr;

use halfway::credentials::turn_rest::TurnSecrets;
use stun::{
    agent::TransactionId,
    attributes::{
        ATTR_CHANNEL_NUMBER, ATTR_DATA, ATTR_LIFETIME, ATTR_MESSAGE_INTEGRITY, ATTR_NONCE, ATTR_REALM,
        ATTR_UNKNOWN_ATTRIBUTES, ATTR_USERNAME, ATTR_XOR_PEER_ADDRESS, ATTR_XOR_RELAYED_ADDRESS,
        ATTR_XORMAPPED_ADDRESS, AttrType,
    },
    error_code::ErrorCodeAttribute,
    fingerprint::FINGERPRINT,
    integrity::MessageIntegrity,
    message::{
        CLASS_ERROR_RESPONSE, CLASS_INDICATION, CLASS_REQUEST, Getter, METHOD_ALLOCATE, METHOD_BINDING,
        METHOD_CHANNEL_BIND, METHOD_CONNECT, METHOD_CREATE_PERMISSION, METHOD_REFRESH, METHOD_SEND, Message,
        MessageType, Method, Setter,
    },
    xoraddr::XorMappedAddress,
};

use super::trace::START;

/// RFC 8656 §18.12.
const ADDRESS_ERROR_CODE: AttrType = AttrType(0x8001);

pub const REALM: &str = "halfway";
pub const SECRET: &str = "north of the border";

/// What a client remembers.
pub struct Client {
    nonce: Vec<u8>,
    transactions: u64,
    secret: String,
    expires: u64,
}

impl Default for Client {
    fn default() -> Self {
        Self::with_secret(SECRET, START + 36_000)
    }
}

/// What is in a request beyond its method.
struct Words<'a>(Vec<&'a str>);

impl<'a> Words<'a> {
    fn has(&self, word: &str) -> bool {
        self.0.contains(&word)
    }

    fn all(&self, key: &str) -> impl Iterator<Item = &'a str> {
        let prefix = format!("{key}=");
        self.0.iter().filter_map(move |word| word.strip_prefix(&prefix))
    }

    fn get(&self, key: &str) -> Option<&'a str> {
        self.all(key).next()
    }
}

impl Client {
    /// A client whose users are minted with `secret` until `expires` (Unix seconds).
    pub fn with_secret(secret: &str, expires: u64) -> Self {
        Self { nonce: Vec::new(), transactions: 0, secret: secret.to_owned(), expires }
    }

    /// What a client sends, from words like `Allocate auth lifetime=0`.
    ///
    /// Users expire ten hours after the start of time, or at `expires=` seconds from it.
    pub fn say(&mut self, text: &str, default_user: &str) -> Vec<u8> {
        let words = Words(text.split_whitespace().collect());
        match words.0[0] {
            "ChannelData" => channel_data(&words),
            "Send" => self.indication(&words),
            "raw" => hex(words.0[1]),
            method => self.request(method, &words, default_user),
        }
    }

    fn request(&mut self, method: &str, words: &Words<'_>, default_user: &str) -> Vec<u8> {
        let mut message = self.start(MessageType::new(method_of(method), CLASS_REQUEST), words);
        if method == "Allocate" && !words.has("no-transport") {
            let protocol = words.get("transport").map_or(17, |number| number.parse().unwrap());
            message.add(AttrType(0x0019), &[protocol, 0, 0, 0]);
        }
        words.0[1..].iter().for_each(|word| attribute(&mut message, word));
        if words.has("auth") || words.get("user").is_some() {
            self.sign(&mut message, words, default_user);
        }
        for late in words.all("after") {
            attribute(&mut message, &late.replacen(':', "=", 1));
        }
        if words.has("fp") {
            FINGERPRINT.add_to(&mut message).unwrap();
        }
        message.raw
    }

    fn indication(&mut self, words: &Words<'_>) -> Vec<u8> {
        let mut message = self.start(MessageType::new(METHOD_SEND, CLASS_INDICATION), words);
        let (payload, attributes) = words.0[1..].split_last().unwrap();
        attributes.iter().for_each(|word| attribute(&mut message, word));
        message.add(ATTR_DATA, payload.as_bytes());
        message.raw
    }

    fn start(&mut self, kind: MessageType, words: &Words<'_>) -> Message {
        self.transactions += 1;
        let number =
            words.get("tx").map_or(self.transactions, |number| 1_000 + number.parse::<u64>().unwrap());
        let mut id = [0; 12];
        id[4..].copy_from_slice(&number.to_be_bytes());
        let mut message = Message::new();
        message.set_type(kind);
        message.transaction_id = TransactionId(id);
        message.write_header();
        message
    }

    fn sign(&self, message: &mut Message, words: &Words<'_>, default_user: &str) {
        let offset = |offset: &str| START.checked_add_signed(offset.parse().unwrap()).unwrap();
        let expires = words.get("expires").map_or(self.expires, offset);
        let secret = words.get("secret").unwrap_or(&self.secret);
        let agent = words.get("user").unwrap_or(default_user);
        let user = TurnSecrets::new(&[secret]).unwrap().mint(agent, expires);
        let realm = words.get("realm").unwrap_or(REALM);
        let nonce = words.get("nonce").map_or(&*self.nonce, str::as_bytes);
        let without = |name| words.get("without") == Some(name);
        if !without("username") {
            message.add(ATTR_USERNAME, user.username.as_bytes());
        }
        if !without("realm") {
            message.add(ATTR_REALM, realm.as_bytes());
        }
        if !without("nonce") {
            message.add(ATTR_NONCE, nonce);
        }
        integrity(&user.username, &user.credential).add_to(message).unwrap();
        if words.has("garbled") {
            *message.raw.last_mut().unwrap() ^= 1;
        }
    }

    /// What an answer says, in one line; `None` for bytes that are no STUN message.
    pub fn hear(&mut self, bytes: &[u8], keys: &[(String, String)]) -> String {
        if bytes[0] >= 0x40 {
            let channel = u16::from_be_bytes([bytes[0], bytes[1]]);
            return format!("ChannelData {channel:#06x} {}", String::from_utf8_lossy(&bytes[4..]));
        }
        let mut message = Message::new();
        message.unmarshal_binary(bytes).unwrap();
        if let Ok(nonce) = message.get(ATTR_NONCE) {
            self.nonce = nonce;
        }
        describe(&mut message, keys)
    }
}

fn describe(message: &mut Message, keys: &[(String, String)]) -> String {
    let mut words = vec![name_of(message.typ.method).to_owned()];
    if message.typ.class == CLASS_ERROR_RESPONSE {
        let mut code = ErrorCodeAttribute::default();
        code.get_from(message).unwrap();
        words.push(code.code.0.to_string());
    } else if message.typ.class != CLASS_INDICATION {
        words.push("ok".to_owned());
    }
    for (name, kind) in [
        ("peer", ATTR_XOR_PEER_ADDRESS),
        ("relayed", ATTR_XOR_RELAYED_ADDRESS),
        ("mapped", ATTR_XORMAPPED_ADDRESS),
    ] {
        words.extend(addresses(message, kind).map(|address| format!("{name}={address}")));
    }
    if let Ok(lifetime) = message.get(ATTR_LIFETIME) {
        words.push(format!("lifetime={}", u32::from_be_bytes(lifetime[..4].try_into().unwrap())));
    }
    if let Ok(error) = message.get(ADDRESS_ERROR_CODE) {
        words.push(format!("missing={}:{}{:02}", error[0], error[2], error[3]));
    }
    if let Ok(data) = message.get(ATTR_DATA) {
        words.push(String::from_utf8(data).unwrap());
    }
    if let Ok(unknown) = message.get(ATTR_UNKNOWN_ATTRIBUTES) {
        words
            .extend(unknown.chunks(2).map(|kind| format!("{:#06x}", u16::from_be_bytes([kind[0], kind[1]]))));
    }
    words.extend(message.contains(ATTR_REALM).then(|| "realm".to_owned()));
    words.extend(message.contains(ATTR_NONCE).then(|| "nonce".to_owned()));
    if message.contains(ATTR_MESSAGE_INTEGRITY) {
        let good = keys.iter().any(|(user, password)| integrity(user, password).check(message).is_ok());
        words.push(if good { "signed" } else { "BADLY-SIGNED" }.to_owned());
    }
    if message.contains(AttrType(0x8028)) {
        FINGERPRINT.check(message).unwrap();
        words.push("fp".to_owned());
    }
    words.join(" ")
}

/// The addresses of all attributes of one kind; the codec itself decodes the first only.
fn addresses(message: &Message, kind: AttrType) -> impl Iterator<Item = SocketAddr> {
    let values = message.attributes.0.iter().filter(move |attribute| attribute.typ == kind);
    values.map(move |attribute| {
        let mut alone = Message::new();
        alone.transaction_id = message.transaction_id;
        alone.add(kind, &attribute.value);
        let mut address = XorMappedAddress::default();
        address.get_from_as(&alone, kind).unwrap();
        SocketAddr::new(address.ip, address.port)
    })
}

pub fn integrity(user: &str, password: &str) -> MessageIntegrity {
    MessageIntegrity::new_long_term_integrity(user.to_owned(), REALM.to_owned(), password.to_owned())
}

/// One attribute from a word like `lifetime=0`; words that mean something else add nothing.
fn attribute(message: &mut Message, word: &str) {
    let (key, value) = word.split_once('=').unwrap_or((word, ""));
    match key {
        "lifetime" => message.add(ATTR_LIFETIME, &value.parse::<u32>().unwrap().to_be_bytes()),
        "family" => message.add(AttrType(0x0017), &[value.parse().unwrap(), 0, 0, 0]),
        "additional" => message.add(AttrType(0x8000), &[value.parse().unwrap(), 0, 0, 0]),
        "additional-of-the-draft" => message.add(AttrType(0x8032), &[value.parse().unwrap(), 0, 0, 0]),
        "even" => message.add(AttrType(0x0018), &[value.parse::<u8>().unwrap() << 7]),
        "token" => message.add(AttrType(0x0022), &[7; 8]),
        "df" => message.add(AttrType(0x001a), &[]),
        "unknown" => message.add(AttrType(u16::from_str_radix(value, 16).unwrap()), &[1, 2, 3, 4]),
        "channel" => {
            let number = u16::from_str_radix(value, 16).unwrap().to_be_bytes();
            message.add(ATTR_CHANNEL_NUMBER, &[number[0], number[1], 0, 0]);
        }
        "peer" => {
            let peer: SocketAddr = value.parse().unwrap();
            let peer = XorMappedAddress { ip: peer.ip(), port: peer.port() };
            peer.add_to_as(message, ATTR_XOR_PEER_ADDRESS).unwrap();
        }
        "broken" => message.add(AttrType(u16::from_str_radix(value, 16).unwrap()), &[0]),
        _ => {}
    }
}

fn channel_data(words: &Words<'_>) -> Vec<u8> {
    let channel = u16::from_str_radix(words.0[1].trim_start_matches("0x"), 16).unwrap();
    let payload = words.0.get(2).copied().unwrap_or("").as_bytes();
    let length = words.get("length").map_or(payload.len(), |number| number.parse().unwrap());
    let mut bytes = [channel.to_be_bytes(), u16::try_from(length).unwrap().to_be_bytes()].concat();
    bytes.extend_from_slice(payload);
    if words.has("padded") {
        bytes.resize(4 + length.next_multiple_of(4), 0);
    }
    bytes
}

pub fn hex(text: &str) -> Vec<u8> {
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap()).collect()
}

const METHODS: [(&str, Method); 7] = [
    ("Binding", METHOD_BINDING),
    ("Allocate", METHOD_ALLOCATE),
    ("Refresh", METHOD_REFRESH),
    ("CreatePermission", METHOD_CREATE_PERMISSION),
    ("ChannelBind", METHOD_CHANNEL_BIND),
    ("Connect", METHOD_CONNECT),
    ("Data", stun::message::METHOD_DATA),
];

fn method_of(name: &str) -> Method {
    METHODS.iter().find(|(known, _)| *known == name).unwrap_or_else(|| panic!("no method {name}")).1
}

fn name_of(method: Method) -> &'static str {
    METHODS.iter().find(|(_, known)| *known == method).unwrap().0
}
