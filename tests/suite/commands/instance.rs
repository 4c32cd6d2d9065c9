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
    halfway, line,
};
use serde_json::Value;

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
        Self::start_in(TempDir::new(), toml)
    }

    /// In a directory that may have been another's before.
    pub fn start_in(dir: TempDir, toml: &str) -> Self {
        Self::start_by(dir, toml, |_| {})
    }

    /// With more in its environment.
    pub fn start_by(dir: TempDir, toml: &str, change: impl FnOnce(&mut Command)) -> Self {
        dir.write("h.toml", format!("admin.listen = ['127.0.0.1:0']\n{toml}"));
        let mut command = serve(&dir);
        change(&mut command);
        let served = Served::start(&mut command);
        let ready = served.expect("ready");
        let at = |what: &str| ready.split(what).nth(1).unwrap().split_whitespace().next().unwrap().to_owned();
        Self { dir, turn: at("turn=").parse().unwrap(), https: at("https="), admin: at("admin="), served }
    }

    /// Ended without a word: what is left.
    pub fn killed(self) -> TempDir {
        self.signal("-KILL");
        self.dir
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

    /// What [`Web::ask`] gives.
    pub fn ask(&self, request: &str, token: &str, body: &str) -> (u16, Value) {
        self.web().ask(request, token, body)
    }

    pub fn web(&self) -> Web {
        let cert = std::fs::read(self.dir.path().join("halfway-data/cert.pem")).unwrap();
        Web { at: self.https.clone(), cert }
    }

    /// A token that `halfway token` prints.
    pub fn token(&self, args: &[&str]) -> String {
        line(halfway(&self.dir, &["--config", "h.toml", "token"]).args(args))
    }

    pub fn admin(&self, request: &str) -> String {
        let mut stream = TcpStream::connect(&self.admin).unwrap();
        write!(stream, "{request} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }
}

/// Its HTTPS, for other threads too.
pub struct Web {
    at: String,
    cert: Vec<u8>,
}

impl Web {
    /// By who trusts the certificate.
    fn https(&self, request: &str) -> String {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(&self.cert).unwrap()).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let client = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
        let client = client.unwrap().with_root_certificates(roots).with_no_client_auth();
        let session = ClientConnection::new(Arc::new(client), "localhost".try_into().unwrap()).unwrap();
        let mut stream = StreamOwned::new(session, TcpStream::connect(&self.at).unwrap());
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = Vec::new();
        // The other side need not say goodbye.
        let _ = stream.read_to_end(&mut answer);
        String::from_utf8_lossy(&answer).into_owned()
    }

    /// The status and the body of the answer to who shows a token. `request` is the method and the path, and more lines of the
    /// head.
    pub fn ask(&self, request: &str, token: &str, body: &str) -> (u16, Value) {
        let (line, head) = request.split_once('\n').unwrap_or((request, ""));
        let length = body.len();
        let answer = self.https(&format!(
            "{line} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nAuthorization: Bearer {token}\r\n\
             Content-Length: {length}\r\n{head}\r\n{body}"
        ));
        let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
        let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0);
        (status, serde_json::from_str(body).unwrap_or(Value::Null))
    }
}

/// The command that serves in a directory, by its `h.toml`.
pub fn serve(dir: &TempDir) -> Command {
    let mut command = halfway(dir, &["serve", "--config", "h.toml", "--http-listen", "127.0.0.1:0"]);
    command.args(["--turn-listen", "127.0.0.1:0", "--public-ip", "127.0.0.1"]);
    command
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
        Self::until(instance, agent, secret, clock::now().unix() + 600)
    }

    /// Whose user runs out at `expires`, in Unix seconds.
    pub fn until(instance: &Instance, agent: &'static str, secret: &str, expires: u64) -> Self {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.connect(instance.turn).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
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
