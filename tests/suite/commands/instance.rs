//! A `halfway serve` of its own, and clients that come to it.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream, UdpSocket},
    process::Command,
    sync::Arc,
};

use halfway::{clock, credentials::turn_rest::TurnSecrets};
use rustls::{
    ClientConfig, ClientConnection, RootCertStore, StreamOwned,
    pki_types::{CertificateDer, pem::PemObject},
};

use super::{
    super::{front::PATIENCE, turn::client::Client},
    TempDir,
    first_start::Served,
    halfway,
};

/// A `halfway serve` with a configuration that changes.
pub struct Instance {
    pub dir: TempDir,
    pub served: Served,
    pub turn: SocketAddr,
    pub https: String,
    pub admin: String,
}

impl Instance {
    pub fn start(toml: &str) -> Self {
        let dir = TempDir::new();
        dir.write("h.toml", format!("admin.listen = ['127.0.0.1:0']\n{toml}"));
        let serve = ["serve", "--config", "h.toml", "--http-listen", "127.0.0.1:0"];
        let mut command = halfway(&dir, &serve);
        let served =
            Served::start(command.args(["--turn-listen", "127.0.0.1:0", "--public-ip", "127.0.0.1"]));
        let ready = served.expect("ready");
        let at = |what: &str| ready.split(what).nth(1).unwrap().split_whitespace().next().unwrap().to_owned();
        Self { dir, turn: at("turn=").parse().unwrap(), https: at("https="), admin: at("admin="), served }
    }

    /// Gives the line that says what has become of it.
    pub fn reload(&self, toml: &str) -> String {
        self.dir.write("h.toml", format!("admin.listen = ['127.0.0.1:0']\n{toml}"));
        self.signal("-HUP");
        self.served.expect("reloaded")
    }

    pub fn signal(&self, signal: &str) {
        let pid = self.served.pid().to_string();
        assert!(Command::new("kill").args([signal, &pid]).status().unwrap().success());
    }

    /// A request over HTTPS, by who trusts the certificate in the data directory.
    pub fn https(&self, request: &str) -> String {
        let cert = std::fs::read(self.dir.path().join("halfway-data/cert.pem")).unwrap();
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(&cert).unwrap()).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let client = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
        let client = client.unwrap().with_root_certificates(roots).with_no_client_auth();
        let session = ClientConnection::new(Arc::new(client), "localhost".try_into().unwrap()).unwrap();
        let mut stream = StreamOwned::new(session, TcpStream::connect(&self.https).unwrap());
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = [0; 4_096];
        let length = stream.read(&mut answer).unwrap();
        String::from_utf8_lossy(&answer[..length]).into_owned()
    }

    pub fn admin(&self, request: &str) -> String {
        let mut stream = TcpStream::connect(&self.admin).unwrap();
        write!(stream, "{request} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }
}

/// One client over UDP.
pub struct Caller {
    pub socket: UdpSocket,
    client: Client,
    agent: &'static str,
    /// User name and password.
    key: (String, String),
}

impl Caller {
    pub fn new(instance: &Instance, agent: &'static str, secret: &str) -> Self {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.connect(instance.turn).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        let expires = clock::now().unix() + 600;
        let user = TurnSecrets::new(&[secret]).unwrap().mint(agent, expires);
        let key = (user.username, user.credential);
        let mut caller = Self { socket, client: Client::with_secret(secret, expires), agent, key };
        assert_eq!(caller.ask("Allocate"), "Allocate 401 realm nonce");
        caller
    }

    /// An allocation. Gives its relayed address.
    pub fn allocate(&mut self) -> SocketAddr {
        self.say("Allocate auth");
        let heard = self.hear();
        let relayed = heard.strip_prefix("Allocate ok relayed=").and_then(|rest| rest.split(' ').next());
        relayed.unwrap_or_else(|| panic!("{heard}")).parse().unwrap()
    }

    /// The answer, without addresses of the kernel's choice.
    pub fn ask(&mut self, text: &str) -> String {
        self.say(text);
        self.hear().split(" relayed=").next().unwrap().to_owned()
    }

    pub fn say(&mut self, text: &str) {
        self.socket.send(&self.client.say(text, self.agent)).unwrap();
    }

    pub fn hear(&mut self) -> String {
        let mut answer = [0; 2_048];
        let length = self.socket.recv(&mut answer).unwrap();
        self.client.hear(&answer[..length], std::slice::from_ref(&self.key))
    }
}
