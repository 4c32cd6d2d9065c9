//! The server by HTTPS: directly, or through a proxy; and who vouches for it.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

use bytes::Bytes;
use http_body_util::{BodyExt, Empty, Limited};
use hyper::{
    Request, StatusCode, Uri,
    header::{AUTHORIZATION, HOST},
};
use hyper_util::rt::TokioIo;
use rustls::{
    ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::CryptoProvider,
    pki_types::{CertificateDer, ServerName, UnixTime},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpStream, lookup_host},
    task::JoinSet,
    time::timeout,
};
use tokio_rustls::TlsConnector;
use x509_parser::parse_x509_certificate;

use super::{Check, Outcome, PATIENCE, Visit, now};
use crate::{
    bench::{agent::Stream, client_of, trust_file},
    clock,
    host::Host,
};

/// An answer longer than that is none of ours, in bytes.
const LONGEST_ANSWER: usize = 256 * 1024;
/// A certificate that ends within so many days should have been renewed.
const RENEWED_DAYS: i64 = 14;

/// What is said of a certificate begins so.
const CERTIFICATE: &str = "the certificate";

/// The other end of a stream, our own, and the stream.
type Opened = (SocketAddr, SocketAddr, Box<dyn Stream>);

/// The server, and the way to it.
pub(super) struct Server {
    host: String,
    port: u16,
    proxy: Option<Uri>,
    tls: Arc<ClientConfig>,
    /// Nobody vouches for it, so that nothing may leave this host.
    stays_here: bool,
}

impl Server {
    /// Finds the way, and whether the certificate can be trusted; none if there is no way, or if it leads to somebody who may
    /// not see the token.
    pub(super) async fn reached(visit: &Visit, checks: &mut Vec<Check>) -> Option<Self> {
        let (host, port) = match place(&visit.url) {
            Ok(place) => place,
            Err(problem) => {
                checks.push(Check::fail("https", problem, "name the server so: https://HOST[:PORT]"));
                return None;
            }
        };
        let clients = roots(visit.ca.as_deref()).and_then(|roots| Ok((client_of(roots)?, Seen::client()?)));
        let (trusting, (taking_any, seen)) = match clients {
            Ok(clients) => clients,
            Err(problem) => {
                checks.push(Check::fail("https", problem, "name a readable file of certificates with --ca"));
                return None;
            }
        };
        let mut server = Self { host, port, proxy: None, tls: taking_any, stays_here: false };
        let started = now();
        let (at, ..) = match server.found(visit, checks).await {
            Ok(opened) => opened,
            Err(problem) => {
                let advice = "is the server up, the port open, the name right? If there is a proxy: --proxy http://HOST:PORT";
                checks.push(Check::fail("https", problem, advice));
                return None;
            }
        };
        let way = server
            .proxy
            .as_ref()
            .map_or(format!("{at}"), |proxy| format!("through the proxy {}", shown(proxy)));
        checks.push(Check::ok("https", way).after(now() - started));
        let taking_any = std::mem::replace(&mut server.tls, trusting);
        match server.opened().await {
            Ok(_) => checks.push(seen.lasts()),
            Err(problem) if problem.starts_with(CERTIFICATE) => {
                server.tls = taking_any;
                server.stays_here = server.proxy.is_none() && !visit.insecure && is_own(at.ip());
                checks.push(distrusted(&problem, visit.insecure, server.stays_here));
            }
            Err(problem) => checks.push(Check::fail("https", problem, "it worked a moment ago: try again")),
        }
        checks.iter().all(|check| check.outcome != Outcome::Fail).then_some(server)
    }

    /// The first way that is open: the one that was asked for, the direct one, the proxy of the environment.
    async fn found(&mut self, visit: &Visit, checks: &mut Vec<Check>) -> Result<Opened, String> {
        self.proxy.clone_from(&visit.proxy);
        let problem = match self.opened().await {
            Ok(opened) => return Ok(opened),
            Err(problem) => problem,
        };
        let Some(proxy) = environments_proxy().filter(|_| self.proxy.is_none()) else { return Err(problem) };
        self.proxy = Some(proxy);
        let opened = self.opened().await.map_err(|_| problem.clone())?;
        let advice = "of WebRTC agents only browsers use a proxy; others need a way for TCP to this port";
        checks.push(Check::warn("direct", problem, advice));
        Ok(opened)
    }

    async fn opened(&self) -> Result<Opened, String> {
        let opened = timeout(PATIENCE, self.tls(&self.host, self.port, b"http/1.1")).await;
        opened.unwrap_or_else(|_| {
            Err(format!("{}:{}: no answer for {} ms", self.host, self.port, PATIENCE.as_millis()))
        })
    }

    /// The name to ask for, with the port if it is not that of HTTPS.
    pub(super) fn authority(&self) -> String {
        let host = if self.host.contains(':') { format!("[{}]", self.host) } else { self.host.clone() };
        if self.port == 443 { host } else { format!("{host}:{}", self.port) }
    }

    /// A connection to the server for HTTP/1.1.
    pub(super) async fn connection(&self) -> Result<Box<dyn Stream>, String> {
        Ok(self.opened().await?.2)
    }

    /// A connection over TLS to a port of a host, through the proxy if there is one.
    pub(super) async fn tls(&self, host: &str, port: u16, protocol: &[u8]) -> Result<Opened, String> {
        let stream = match &self.proxy {
            Some(proxy) => through(proxy, host, port).await?,
            None => connected(host, port).await?,
        };
        let (server, local) = ends(&stream)?;
        if self.stays_here && !is_own(server.ip()) {
            return Err(format!("{server} is not this host, and nobody vouches for it"));
        }
        let mut tls = ClientConfig::clone(&self.tls);
        tls.alpn_protocols = vec![protocol.to_vec()];
        let name = ServerName::try_from(host.trim_matches(['[', ']']).to_owned())
            .map_err(|error| error.to_string())?;
        let stream = TlsConnector::from(Arc::new(tls))
            .connect(name, stream)
            .await
            .map_err(|error| explained(&error))?;
        Ok((server, local, Box::new(stream)))
    }

    /// One GET; its status and body.
    ///
    /// # Errors
    /// Why there is no answer.
    pub(super) async fn get(&self, path: &str, token: Option<&str>) -> Result<(StatusCode, Bytes), String> {
        let asked = async {
            let stream = TokioIo::new(self.connection().await?);
            let (mut sender, connection) =
                hyper::client::conn::http1::handshake(stream).await.map_err(|error| error.to_string())?;
            tokio::spawn(connection);
            let mut request = Request::get(path).header(HOST, self.authority());
            if let Some(token) = token {
                request = request.header(AUTHORIZATION, format!("Bearer {token}"));
            }
            let request =
                request.body(Empty::<Bytes>::new()).map_err(|_| "the token is no token".to_owned())?;
            let answer = sender.send_request(request).await.map_err(|error| error.to_string())?;
            let status = answer.status();
            let body = Limited::new(answer.into_body(), LONGEST_ANSWER).collect().await;
            Ok((status, body.map_err(|error| error.to_string())?.to_bytes()))
        };
        timeout(PATIENCE, asked).await.unwrap_or_else(|_| Err(format!("GET {path}: no answer")))
    }
}

/// Host and port of an https URL.
fn place(url: &Uri) -> Result<(String, u16), String> {
    match (url.scheme_str(), url.host()) {
        (Some("https"), Some(host)) => {
            Ok((host.trim_matches(['[', ']']).to_owned(), url.port_u16().unwrap_or(443)))
        }
        _ => Err(format!("{url} is no https URL")),
    }
}

/// The proxy that the environment names, in the spelling that most programs read.
fn environments_proxy() -> Option<Uri> {
    let named = ["HTTPS_PROXY", "https_proxy"].into_iter().find_map(|name| std::env::var(name).ok());
    named?.parse().ok().filter(|proxy: &Uri| proxy.host().is_some())
}

/// Connects to whichever address of the host answers first: a family that leads nowhere costs nothing (RFC 8305).
async fn connected(host: &str, port: u16) -> Result<TcpStream, String> {
    let addresses = lookup_host((host.trim_matches(['[', ']']), port))
        .await
        .map_err(|error| format!("{host}: the name leads nowhere: {error}"))?;
    let mut connecting: JoinSet<_> = addresses.map(TcpStream::connect).collect();
    let mut problem = "the name has no address".to_owned();
    while let Some(connected) = connecting.join_next().await {
        match connected.unwrap_or_else(|error| Err(io::Error::other(error))) {
            Ok(stream) => {
                stream.set_nodelay(true).map_err(|error| error.to_string())?;
                return Ok(stream);
            }
            Err(error) => problem = error.to_string(),
        }
    }
    Err(format!("{host}:{port}: {problem}"))
}

/// A connection over TCP; a proxy passes none of these.
pub(super) async fn tcp(host: &str, port: u16) -> Result<Opened, String> {
    let stream = connected(host, port).await?;
    let (server, local) = ends(&stream)?;
    Ok((server, local, Box::new(stream)))
}

/// The other end of it, and ours.
fn ends(stream: &TcpStream) -> Result<(SocketAddr, SocketAddr), String> {
    let ends = stream.peer_addr().and_then(|server| Ok((server, stream.local_addr()?)));
    ends.map_err(|error| error.to_string())
}

/// Without a password that may be in its URL.
fn shown(proxy: &Uri) -> String {
    format!("{}:{}", proxy.host().unwrap_or_default(), proxy.port_u16().unwrap_or(80))
}

/// Asks the proxy for a connection (RFC 9110 §9.3.6).
async fn through(proxy: &Uri, host: &str, port: u16) -> Result<TcpStream, String> {
    let mut stream = connected(proxy.host().unwrap_or_default(), proxy.port_u16().unwrap_or(80)).await?;
    let failed = |error: io::Error| format!("the proxy {}: {error}", shown(proxy));
    let host =
        if host.contains(':') { format!("[{}]", host.trim_matches(['[', ']'])) } else { host.to_owned() };
    let wanted = format!("CONNECT {host}:{port} HTTP/1.1\r\nHost: {host}:{port}\r\n\r\n");
    stream.write_all(wanted.as_bytes()).await.map_err(failed)?;
    // Byte by byte: what follows the head is not ours to read.
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") && head.len() < 8_192 {
        head.push(stream.read_u8().await.map_err(failed)?);
    }
    match head.split(|byte| *byte == b' ').nth(1) {
        Some(b"200") => Ok(stream),
        _ => {
            let line = String::from_utf8_lossy(head.split(|byte| *byte == b'\r').next().unwrap_or_default())
                .into_owned();
            Err(format!("the proxy {} refuses {host}:{port}: {line}", shown(proxy)))
        }
    }
}

fn is_own(address: IpAddr) -> bool {
    address.is_loopback() || Host::look().is_ok_and(|host| host.addresses.contains(&address))
}

/// The system's certificates, and those of a file.
fn roots(ca: Option<&Path>) -> Result<RootCertStore, String> {
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    if let Some(ca) = ca {
        trust_file(&mut roots, ca)?;
    }
    Ok(roots)
}

/// What is wrong with a certificate, as people say it.
fn explained(error: &io::Error) -> String {
    use rustls::{CertificateError as Certificate, Error as Tls};
    match error.get_ref().and_then(|error| error.downcast_ref::<Tls>()) {
        Some(Tls::InvalidCertificate(Certificate::UnknownIssuer)) => {
            "the certificate is vouched for by nobody that this host trusts".to_owned()
        }
        Some(Tls::InvalidCertificate(Certificate::Expired | Certificate::ExpiredContext { .. })) => {
            "the certificate has ended".to_owned()
        }
        Some(Tls::InvalidCertificate(
            Certificate::NotValidForName | Certificate::NotValidForNameContext { .. },
        )) => "the certificate is for other names than this one".to_owned(),
        Some(Tls::InvalidCertificate(other)) => format!("the certificate is not valid: {other:?}"),
        _ => format!("no TLS: {error}"),
    }
}

/// Nobody vouches for the server.
fn distrusted(problem: &str, insecure: bool, is_own: bool) -> Check {
    let name = "certificate";
    if insecure {
        return Check::warn(name, problem, "give the server a certificate that agents trust");
    }
    if is_own {
        // What is sent to it stays on this host.
        return Check::warn(
            name,
            problem,
            "fine for a trial on this host; agents elsewhere need one that they trust",
        );
    }
    let advice = "trust it by --ca FILE, or go on without by --insecure; browsers and agents refuse it, too";
    Check::fail(name, format!("{problem}; the token was not sent"), advice)
}

/// Takes any certificate, and remembers when it ends. Whoever shows it still has to have its key.
#[derive(Debug)]
struct Seen {
    provider: Arc<CryptoProvider>,
    /// Unix seconds.
    ends: Mutex<Option<i64>>,
}

impl Seen {
    /// A client that takes any, and what it will have seen.
    fn client() -> Result<(Arc<ClientConfig>, Arc<Self>), String> {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let seen = Arc::new(Self { provider: Arc::clone(&provider), ends: Mutex::default() });
        let tls = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| error.to_string())?
            .dangerous()
            .with_custom_certificate_verifier(Arc::clone(&seen) as _)
            .with_no_client_auth();
        Ok((Arc::new(tls), seen))
    }

    /// For how long a certificate that is trusted still is.
    fn lasts(&self) -> Check {
        let ends = self.ends.lock().unwrap_or_else(PoisonError::into_inner).unwrap_or_default();
        let days = ends.saturating_sub(i64::try_from(clock::now().unix()).unwrap_or(i64::MAX)) / 86_400;
        if days < RENEWED_DAYS {
            let advice = "renew it: nobody reaches the server once it has ended";
            return Check::warn("certificate", format!("trusted, but ends in {days} days"), advice);
        }
        Check::ok("certificate", format!("trusted, {days} days left"))
    }
}

impl ServerCertVerifier for Seen {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        if let Ok((_, parsed)) = parse_x509_certificate(certificate) {
            *self.ends.lock().unwrap_or_else(PoisonError::into_inner) =
                Some(parsed.validity().not_after.timestamp());
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(
            message,
            certificate,
            signature,
            &self.provider.signature_verification_algorithms,
        )
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(
            message,
            certificate,
            signature,
            &self.provider.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
