//! What one setting's text means. Every refusal is the end of a line that names the setting.

use std::{
    net::{IpAddr, SocketAddr},
    ops::RangeInclusive,
    str::FromStr,
    time::Duration,
};

use ipnet::IpNet;

use super::{NatsServer, Secret};
use crate::{
    jwks,
    relay::xdp::Mode,
    turn::policy::{DeniedPeers, PeerPolicy},
};

pub(super) fn address(text: &str) -> Result<IpAddr, String> {
    let address =
        IpAddr::from_str(text).map_err(|_| format!("{text:?} is not an IP address"))?.to_canonical();
    if address.is_unspecified() || address.is_multicast() {
        return Err(format!("{text:?} is not the address of a host"));
    }
    Ok(address)
}

pub(super) fn listen(text: &str) -> Result<SocketAddr, String> {
    text.parse().map_err(|_| {
        format!(r#"{text:?} is not an address and a port, such as "[::]:8443" or "192.0.2.1:443""#)
    })
}

/// A lone address is the network of that one host.
pub(super) fn network(text: &str) -> Result<IpNet, String> {
    let network = text.parse().or_else(|_| text.parse::<IpAddr>().map(IpNet::from));
    network
        .map(|network: IpNet| network.trunc())
        .map_err(|_| format!(r#"{text:?} is not a CIDR, such as "10.0.0.0/8" or "fd00::/8""#))
}

pub(super) fn ports(text: &str) -> Result<RangeInclusive<u16>, String> {
    let port = |text: &str| text.trim().parse::<u16>().ok().filter(|&port| port != 0);
    let range = text.split_once('-').and_then(|(first, last)| Some((port(first)?, port(last)?)));
    match range {
        Some((first, last)) if first <= last => Ok(first..=last),
        Some(_) => Err(format!("{text:?} is the wrong way round: the lower port comes first")),
        None => Err(format!(r#"{text:?} is not a range of ports from 1 to 65535, such as "49152-65535""#)),
    }
}

/// Long enough for anything here, short enough that no sum with it overflows.
const LONGEST: Duration = Duration::from_secs(100 * 366 * 86_400);

pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    let duration = humantime::parse_duration(text)
        .map_err(|_| format!(r#"{text:?} is not a length of time, such as "90s", "1h" or "30d""#))?;
    if duration > LONGEST { Err(format!("{text:?} is longer than 100 years")) } else { Ok(duration) }
}

/// For what is counted in whole seconds and makes no sense without one.
pub(crate) fn lifetime(text: &str) -> Result<Duration, String> {
    let lifetime = Duration::from_secs(duration(text)?.as_secs());
    if lifetime.is_zero() { Err(format!("{text:?} is shorter than a second")) } else { Ok(lifetime) }
}

/// A name or an address, alone. The brackets of an IPv6 address are taken off.
pub(super) fn host(text: &str) -> Result<Option<String>, String> {
    let bare = text.strip_prefix('[').and_then(|text| text.strip_suffix(']')).unwrap_or(text);
    if text.is_empty() {
        Ok(None)
    } else if IpAddr::from_str(bare).is_ok() {
        address(bare).map(|address| Some(address.to_string()))
    } else if is_host_name(text) {
        Ok(Some(text.to_ascii_lowercase()))
    } else {
        Err(format!(r#"{text:?} is not a host name: give the name alone, such as "turn.example.org""#))
    }
}

/// A name, or an address, that an authority certifies. It cannot check a wildcard in the ways that we can answer.
pub(super) fn domain(text: &str) -> Result<String, String> {
    if text.starts_with("*.") {
        return Err(format!(
            "{text:?} is a wildcard, for which authorities want a DNS record: name each host"
        ));
    }
    host(text)?.ok_or_else(|| "an empty name".to_owned())
}

pub(super) fn email(text: &str) -> Result<Option<String>, String> {
    let is_address = text.split_once('@').is_some_and(|(user, host)| !user.is_empty() && is_host_name(host));
    let is_plain = text.bytes().all(|byte| byte.is_ascii_graphic() && byte != b',' && byte != b'?');
    match text {
        "" => Ok(None),
        _ if is_address && is_plain => Ok(Some(text.to_owned())),
        _ => Err(format!(r#"{text:?} is not an email address, such as "admin@example.org""#)),
    }
}

/// Where an ACME authority is.
pub(super) fn directory(text: &str) -> Result<String, String> {
    https(text).map(|_| text.to_owned())
}

fn https(text: &str) -> Result<hyper::Uri, String> {
    let uri = text.parse::<hyper::Uri>().ok();
    let is_https = |uri: &hyper::Uri| uri.scheme_str() == Some("https") && uri.host().is_some();
    uri.filter(is_https).ok_or_else(|| format!("{text:?} is not an https URL"))
}

/// Where an issuer shows its keys: a file, or an `https` URL; `None` for nothing.
pub(super) fn jwks(text: &str) -> Result<Option<jwks::Source>, String> {
    if text.is_empty() {
        Ok(None)
    } else if text.contains("://") {
        https(text).map(|url| Some(jwks::Source::Url(url)))
    } else {
        Ok(Some(jwks::Source::File(text.into())))
    }
}

/// A server of NATS.
pub(super) fn nats(text: &str) -> Result<NatsServer, String> {
    let known = ["nats://", "tls://"].iter().find_map(|scheme| Some((*scheme, text.strip_prefix(scheme)?)));
    let server = known.and_then(|(scheme, rest)| {
        let (login, place) =
            rest.rsplit_once('@').map_or((None, rest), |(login, place)| (Some(login), place));
        let address = format!("{scheme}{place}").parse::<async_nats::ServerAddr>().ok()?;
        let login = login.map(|login| match login.split_once(':') {
            Some((user, password)) => (unescaped(user), Some(unescaped(password))),
            None => (unescaped(login), None),
        });
        (!address.host().is_empty()).then_some(NatsServer { address, login })
    });
    // What may be a password is not repeated.
    let shown = text.rsplit('@').next().unwrap_or(text);
    server.ok_or_else(|| {
        format!(
            r#"{shown:?} is not the URL of a NATS server, such as "nats://10.0.0.7:4222" or "tls://nats.example.org""#
        )
    })
}

fn unescaped(text: &str) -> String {
    percent_encoding::percent_decode_str(text).decode_utf8_lossy().into_owned()
}

/// A node's name; `None` for nothing.
pub(super) fn node(text: &str) -> Result<Option<String>, String> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    match text {
        "" => Ok(None),
        text if text.len() <= 64 && text.bytes().all(allowed) => Ok(Some(text.to_owned())),
        _ => Err(format!("{text:?} is not a name of 1 to 64 of A-Z a-z 0-9 . _ -")),
    }
}

/// Whether it has the two parts of such a file.
pub(super) fn is_nats_credentials(text: &str) -> bool {
    ["-----BEGIN NATS USER JWT-----", "-----BEGIN USER NKEY SEED-----"].iter().all(|part| text.contains(part))
}

fn is_host_name(text: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
    let label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(allowed)
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    // A name that ends in a number is read as an IPv4 address by browsers, and this one is none.
    let numeric_end =
        text.rsplit('.').next().is_some_and(|last| last.bytes().all(|byte| byte.is_ascii_digit()));
    text.len() <= 253 && text.split('.').all(label) && !numeric_end
}

/// An origin as browsers write it, or `*`.
pub(super) fn origin(text: &str) -> Result<String, String> {
    let authority =
        text.split_once("://").filter(|(scheme, _)| !scheme.is_empty()).map(|(_, authority)| authority);
    let is_origin =
        authority.is_some_and(|authority| !authority.is_empty() && !authority.contains(['/', '?', '#', ' ']));
    if text == "*" || is_origin {
        Ok(text.to_ascii_lowercase())
    } else {
        Err(format!(r#"{text:?} is not an origin, such as "https://app.example.org", nor "*""#))
    }
}

/// RFC 8489 §14.9: fewer than 128 characters, and of bytes no more either, for every challenge to a stranger bears it; the
/// quotes would end the string that clients hash.
pub(super) fn realm(text: &str) -> Result<String, String> {
    let fits =
        (1..128).contains(&text.len()) && !text.contains(['"', '\\']) && !text.contains(char::is_control);
    if fits {
        Ok(text.to_owned())
    } else {
        Err("must be 1 to 127 bytes, without quotes or backslashes".to_owned())
    }
}

/// Never says what the secret is.
pub(super) fn secret(text: &str, at_least: usize) -> Result<Secret, String> {
    if text.len() < at_least {
        return Err(format!("a secret of {} bytes is too weak: {at_least} bytes at least", text.len()));
    }
    Ok(Secret(text.to_owned()))
}

pub(super) fn denied_peers(text: &str) -> Result<DeniedPeers, String> {
    match text {
        "refuse" => Ok(DeniedPeers::Refuse),
        "discard" => Ok(DeniedPeers::Discard),
        _ => Err(format!(r#"{text:?} is neither "refuse" nor "discard""#)),
    }
}

pub(super) fn peer_policy(text: &str) -> Result<PeerPolicy, String> {
    match text {
        "open" => Ok(PeerPolicy::Open),
        "signaled" => Ok(PeerPolicy::Signaled),
        _ => Err(format!(r#"{text:?} is neither "open" nor "signaled""#)),
    }
}

pub(super) fn xdp(text: &str) -> Result<Option<Mode>, String> {
    match text {
        "off" => Ok(None),
        "auto" => Ok(Some(Mode::Auto)),
        "driver" => Ok(Some(Mode::Driver)),
        "generic" => Ok(Some(Mode::Generic)),
        _ => Err(format!(r#"{text:?} is none of "auto", "driver", "generic" and "off""#)),
    }
}

pub(super) fn log_filter(text: &str) -> Result<String, String> {
    let parsed = tracing_subscriber::filter::Builder::default().parse(text);
    parsed
        .map(|_| text.to_owned())
        .map_err(|_| format!(r#"{text:?} is not a log filter, such as "info" or "info,halfway=debug""#))
}

/// Whether lines are JSON.
pub(super) fn log_format(text: &str) -> Result<bool, String> {
    match text {
        "text" => Ok(false),
        "json" => Ok(true),
        _ => Err(format!(r#"{text:?} is neither "text" nor "json""#)),
    }
}

#[cfg(test)]
mod tests {
    use super::{
        address, directory, domain, duration, email, host, lifetime, listen, log_filter, network, origin,
        ports, realm, secret,
    };

    #[test]
    fn addresses() {
        assert_eq!(address("::ffff:192.0.2.1").unwrap().to_string(), "192.0.2.1");
        for bad in ["", "::", "0.0.0.0", "224.0.0.1", "ff02::1", "host", "192.0.2.1:80", "192.0.2.256"] {
            assert!(address(bad).is_err(), "{bad:?}");
        }
        assert!(listen("[::]:8443").is_ok());
        for bad in ["", "8443", ":8443", "localhost:8443", "::8443", "1.2.3.4:70000"] {
            assert!(listen(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn networks() {
        assert_eq!(network("10.1.2.3/8").unwrap().to_string(), "10.0.0.0/8");
        assert_eq!(network("fd00::1").unwrap().to_string(), "fd00::1/128");
        for bad in ["", "10.0.0.0/33", "10.0.0/8", "/8", "10.0.0.0/", "example.org/8"] {
            assert!(network(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn port_ranges() {
        assert_eq!(ports("49152-65535"), Ok(49152..=65535));
        assert_eq!(ports("7-7"), Ok(7..=7));
        assert!(ports("65535-49152").unwrap_err().contains("wrong way round"));
        for bad in ["", "-", "1", "0-9", "1-65536", "1-2-3", "a-b", "-1-5"] {
            assert!(ports(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn lengths_of_time() {
        assert_eq!(duration("1h 30m").unwrap().as_secs(), 5400);
        assert_eq!(duration("0s").unwrap().as_secs(), 0);
        for bad in ["", "1", "h", "-1s", "200y", "99999999999999999999s"] {
            assert!(duration(bad).is_err(), "{bad:?}");
        }
        assert!(lifetime("999ms").is_err());
    }

    #[test]
    fn hosts() {
        for (text, expected) in [
            ("turn.Example.org", Some("turn.example.org")),
            ("localhost", Some("localhost")),
            ("[2001:db8::5]", Some("2001:db8::5")),
            ("203.0.113.5", Some("203.0.113.5")),
            ("", None),
        ] {
            assert_eq!(host(text), Ok(expected.map(str::to_owned)), "{text}");
        }
        for bad in
            ["https://a.org", "a.org:80", "a b", "-a.org", "a..org", "203.0.113.500", "a/b", "ä.org", "::"]
        {
            assert!(host(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn what_authorities_are_told() {
        assert_eq!(domain("Turn.example.org"), Ok("turn.example.org".to_owned()));
        assert_eq!(domain("[2001:db8::5]"), Ok("2001:db8::5".to_owned()));
        assert!(domain("*.example.org").unwrap_err().contains("wildcard"));
        assert!(domain("").is_err() && domain("https://a.org").is_err());
        assert_eq!(email(""), Ok(None));
        assert_eq!(email("admin@example.org"), Ok(Some("admin@example.org".to_owned())));
        for bad in ["admin", "@example.org", "a@b@c", "a b@example.org", "a@example.org?x", "a,b@example.org"]
        {
            assert!(email(bad).is_err(), "{bad:?}");
        }
        assert!(directory("https://localhost:14000/dir").is_ok());
        assert!(directory("http://localhost/dir").is_err() && directory("here").is_err());
    }

    #[test]
    fn origins() {
        assert_eq!(origin("https://App.example.org:8080"), Ok("https://app.example.org:8080".to_owned()));
        assert!(origin("*").is_ok());
        for bad in ["", "app.example.org", "https://", "https://a.org/", "://a", "https://a b"] {
            assert!(origin(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn realms() {
        assert!(realm(&"x".repeat(127)).is_ok());
        for bad in ["", "a\"b", "a\nb", &"x".repeat(128), &"é".repeat(64)] {
            assert!(realm(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_weak_secret_is_refused_and_not_repeated() {
        let refusal = secret("hunter2", 16).unwrap_err();
        assert!(refusal.contains("7 bytes") && !refusal.contains("hunter2"), "{refusal}");
        assert!(secret("0123456789abcdef", 16).is_ok());
    }

    #[test]
    fn log_filters() {
        assert!(log_filter("info,halfway=debug").is_ok());
        assert!(log_filter("halfway=loud").is_err());
    }
}
