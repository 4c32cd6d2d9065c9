//! What `serve` makes of a bare directory, and what it says.

use std::{
    fs::File,
    io::{BufRead, BufReader, Read},
    net::{TcpListener, TcpStream, UdpSocket},
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        unix::{fs::PermissionsExt, net::UnixDatagram},
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::mpsc,
    time::Duration,
};

use super::{TempDir, halfway, instance, run};
use halfway::tls::Facts;

const SOON: Duration = Duration::from_secs(20);
/// Everything on loopback, on ports of the kernel's choice.
const SERVE: [&str; 7] =
    ["serve", "--http-listen", "127.0.0.1:0", "--turn-listen", "127.0.0.1:0", "--public-ip", "127.0.0.1"];

/// A running `halfway serve`, ended with the test.
pub struct Served {
    child: Child,
    log: mpsc::Receiver<String>,
}

impl Served {
    pub fn start(command: &mut Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let (lines, log) = mpsc::channel();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        std::thread::spawn(move || {
            stderr.lines().map_while(Result::ok).try_for_each(|line| lines.send(line))
        });
        Self { child, log }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The exit code and the log of one that ends by itself.
    #[track_caller]
    fn refused(mut self) -> (i32, Vec<String>) {
        let mut seen = Vec::new();
        loop {
            match self.log.recv_timeout(SOON) {
                Ok(line) => seen.push(line),
                Err(mpsc::RecvTimeoutError::Disconnected) => break,
                Err(mpsc::RecvTimeoutError::Timeout) => panic!("still running after {seen:#?}"),
            }
        }
        (self.child.wait().unwrap().code().unwrap(), seen)
    }

    /// Waits for a line of the log.
    #[track_caller]
    pub fn expect(&self, wanted: &str) -> String {
        self.expect_after(wanted, &mut Vec::new())
    }

    #[track_caller]
    fn expect_after(&self, wanted: &str, seen: &mut Vec<String>) -> String {
        while let Ok(line) = self.log.recv_timeout(SOON) {
            if line.contains(wanted) {
                return line;
            }
            seen.push(line);
        }
        panic!("no {wanted:?} in {seen:#?}");
    }

    /// The exit code, once it ends by itself.
    pub fn ends(mut self) -> i32 {
        self.child.wait().unwrap().code().unwrap()
    }

    /// Everything on stdout, after SIGTERM.
    pub fn stop(mut self) -> String {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").arg(&pid).status().unwrap().success());
        let mut stdout = String::new();
        self.child.stdout.take().unwrap().read_to_string(&mut stdout).unwrap();
        assert!(self.child.wait().unwrap().success());
        stdout
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// `serve` on loopback, with an admin listener of the kernel's choice too.
fn serve(dir: &TempDir) -> Command {
    dir.write("h.toml", "admin.listen = ['127.0.0.1:0']");
    let mut command = halfway(dir, &SERVE);
    command.args(["--config", "h.toml"]);
    command
}

fn mode(path: &Path) -> u32 {
    std::fs::metadata(path).unwrap().permissions().mode() & 0o7777
}

#[test]
fn the_first_start_makes_secret_and_certificate_and_the_second_keeps_them() {
    let dir = TempDir::new();
    let served = Served::start(&mut serve(&dir));
    served.expect("ready");
    served.stop();
    let data = dir.path().join("halfway-data");
    let (secret, cert, key) = (data.join("secret"), data.join("cert.pem"), data.join("key.pem"));
    assert_eq!((mode(&data), mode(&secret), mode(&cert), mode(&key)), (0o700, 0o600, 0o644, 0o600));
    assert_eq!(std::fs::metadata(&secret).unwrap().len(), 32);
    let names = Facts::of_leaf(&std::fs::read(&cert).unwrap()).unwrap().names;
    assert_eq!(names, ["localhost", "127.0.0.1", "::1"]);
    let files = || [&secret, &cert, &key].map(|path| std::fs::read(path).unwrap());
    let first = files();
    let served = Served::start(&mut serve(&dir));
    served.expect("ready");
    served.stop();
    assert_eq!(files(), first);
    let (code, token, _) = run(&mut halfway(&dir, &["token", "a"]));
    assert_eq!((code, token.split('.').count()), (0, 3));
    let mut left: Vec<_> =
        std::fs::read_dir(&data).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    left.sort();
    assert_eq!(left, ["cert.pem", "key.pem", "secret"], "drafts are removed");
}

#[test]
fn a_new_name_renews_the_certificate_and_keeps_its_key() {
    let dir = TempDir::new();
    let served = Served::start(&mut serve(&dir));
    served.expect("ready");
    served.stop();
    let read = |name: &str| std::fs::read(dir.path().join("halfway-data").join(name)).unwrap();
    let (cert, key) = (read("cert.pem"), read("key.pem"));
    let served = Served::start(serve(&dir).args(["--public-host", "turn.example.org"]));
    served.expect("ready");
    served.stop();
    assert_eq!(read("key.pem"), key);
    assert_ne!(read("cert.pem"), cert);
    assert!(Facts::of_leaf(&read("cert.pem")).unwrap().names.contains(&"turn.example.org".to_owned()));
}

#[test]
fn nothing_but_the_log_is_said_where_no_terminal_is() {
    let dir = TempDir::new();
    let served = Served::start(&mut serve(&dir));
    served.expect("ready");
    assert_eq!(served.stop(), "");
}

#[test]
fn the_log_is_json_when_asked() {
    let dir = TempDir::new();
    let mut command = serve(&dir);
    dir.write("h.toml", "admin.listen = ['127.0.0.1:0']\nlog.format = 'json'");
    let served = Served::start(&mut command);
    let line: serde_json::Value = serde_json::from_str(&served.expect("ready")).unwrap();
    assert_eq!(
        (&line["level"], line["message"].as_str().map(|text| text.starts_with("ready"))),
        (&"INFO".into(), Some(true))
    );
    served.stop();
}

/// Where a service manager is told how it goes.
fn manager(dir: &TempDir) -> (PathBuf, UnixDatagram) {
    let path = dir.path().join("notify");
    let manager = UnixDatagram::bind(&path).unwrap();
    manager.set_read_timeout(Some(SOON)).unwrap();
    (path, manager)
}

#[test]
fn a_service_manager_hears_that_it_is_ready() {
    let dir = TempDir::new();
    let (path, manager) = manager(&dir);
    let served = Served::start(serve(&dir).env("NOTIFY_SOCKET", &path));
    let mut message = [0; 64];
    let length = manager.recv(&mut message).unwrap();
    assert_eq!(&message[..length], b"READY=1\n");
    served.stop();
}

#[test]
fn the_watchdog_is_fed_while_all_is_well_and_a_reload_is_announced() {
    let dir = TempDir::new();
    let (path, manager) = manager(&dir);
    let served = Served::start(serve(&dir).env("NOTIFY_SOCKET", &path).env("WATCHDOG_USEC", "400000"));
    let next = || {
        let mut message = [0; 128];
        let length = manager.recv(&mut message).unwrap();
        String::from_utf8(message[..length].to_vec()).unwrap()
    };
    assert_eq!(next(), "READY=1\n");
    assert_eq!((next(), next()), ("WATCHDOG=1\n".to_owned(), "WATCHDOG=1\n".to_owned()));
    assert!(Command::new("kill").args(["-HUP", &served.pid().to_string()]).status().unwrap().success());
    let reloading = std::iter::repeat_with(next).find(|message| !message.starts_with("WATCHDOG")).unwrap();
    assert!(reloading.starts_with("RELOADING=1\nMONOTONIC_USEC="), "{reloading}");
    assert_eq!(
        std::iter::repeat_with(next).find(|message| !message.starts_with("WATCHDOG")).unwrap(),
        "READY=1\n"
    );
    served.stop();
}

#[test]
fn sockets_that_systemd_has_bound_are_served() {
    let dir = TempDir::new();
    let (streams, datagrams) =
        (TcpListener::bind("127.0.0.1:0").unwrap(), UdpSocket::bind("127.0.0.1:0").unwrap());
    let (https, turn) = (streams.local_addr().unwrap(), datagrams.local_addr().unwrap());
    dir.write("h.toml", "admin.listen = []");
    // A shell opens them as 3 and 4, and names itself.
    let copies = (inherited(&streams), inherited(&datagrams));
    let run = format!(
        "export LISTEN_PID=$$ LISTEN_FDS=2; exec {} serve --config h.toml --public-ip 127.0.0.1 --http-listen {https} \
         --turn-listen {turn} 3<&{} 4<&{}",
        env!("CARGO_BIN_EXE_halfway"),
        copies.0.as_raw_fd(),
        copies.1.as_raw_fd(),
    );
    // Not `sh`: Debian's knows descriptors of one digit only.
    let mut command = Command::new("bash");
    let served = Served::start(command.args(["-c", &run]).current_dir(dir.path()).env_clear());
    let ready = served.expect("ready");
    assert!(ready.contains(&format!("https={https} turn={turn} ")), "{ready}");
    // These are the same sockets: nobody else answers on them.
    let client = UdpSocket::bind("127.0.0.1:0").unwrap();
    client.set_read_timeout(Some(SOON)).unwrap();
    client.send_to(b"\x00\x01\x00\x00\x21\x12\xa4\x42twelve bytes", turn).unwrap();
    assert_eq!(client.recv_from(&mut [0; 64]).unwrap(), (32, turn));
    assert!(TcpStream::connect(https).is_ok());
    served.stop();
}

/// A copy that children inherit, at a number above those that a shell is told to give it.
fn inherited(socket: &impl AsRawFd) -> OwnedFd {
    // SAFETY: a number goes in, and what comes out is nobody else's.
    unsafe { OwnedFd::from_raw_fd(libc::fcntl(socket.as_raw_fd(), libc::F_DUPFD, 10)) }
}

#[test]
fn a_secret_that_others_may_read_is_warned_of() {
    let dir = instance();
    let secret = dir.path().join("halfway-data/secret");
    std::fs::set_permissions(&secret, std::fs::Permissions::from_mode(0o644)).unwrap();
    let served = Served::start(&mut serve(&dir));
    let line = served.expect("may read");
    assert!(line.contains("WARN") && line.contains("chmod 600 ./halfway-data/secret"), "{line}");
    served.expect("ready");
    served.stop();
}

#[test]
fn what_cannot_be_used_is_one_line_and_exit_1() {
    let dir = instance();
    dir.write("file", "");
    dir.write("halfway-data/cert.pem", "nothing");
    dir.write("halfway-data/key.pem", "nothing");
    for (data_dir, expected) in [
        ("file/data", "cannot read file/data/secret: Not a directory"),
        ("/proc/none", "cannot create /proc/none: "),
        ("halfway-data", "halfway-data/cert.pem: no CERTIFICATE block in PEM; remove cert.pem and key.pem"),
    ] {
        let (code, log) = Served::start(serve(&dir).args(["--data-dir", data_dir])).refused();
        assert_eq!(code, 1, "{data_dir}: {log:?}");
        assert_eq!(log.iter().filter(|line| line.contains(expected)).count(), 1, "{data_dir}: {log:?}");
    }
}

#[test]
fn a_taken_port_is_one_line_and_exit_1() {
    let dir = TempDir::new();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let also_taken = UdpSocket::bind("127.0.0.1:0").unwrap();
    let datagrams = also_taken.local_addr().unwrap().to_string();
    for (flag, address, what) in
        [("--http-listen", address, "HTTPS"), ("--turn-listen", datagrams, "TURN over UDP")]
    {
        let (code, log) = Served::start(serve(&dir).args([flag, &address])).refused();
        assert_eq!(code, 1, "{log:?}");
        let line = format!("cannot listen on {address} for {what}");
        assert!(log.len() == 1 && log[0].contains(&line), "{log:?}");
    }
}

#[test]
fn a_terminal_sees_the_quick_start() {
    let dir = TempDir::new();
    let terminal = nix::pty::openpty(None, None).unwrap();
    let child = serve(&dir).stdout(terminal.slave).stderr(Stdio::null()).spawn().unwrap();
    let (lines, seen) = mpsc::channel();
    let served = Served { child, log: seen };
    let screen = BufReader::new(File::from(terminal.master));
    std::thread::spawn(move || screen.lines().map_while(Result::ok).try_for_each(|line| lines.send(line)));
    let mut before = Vec::new();
    served.expect_after("More tokens", &mut before);
    let text = before.join("\n");
    assert!(text.contains("https://127.0.0.1:") && text.contains("wss://127.0.0.1:"), "{text}");
    let curl = before.iter().find(|line| line.trim_start().starts_with("curl")).unwrap();
    assert!(curl.contains("--cacert ./halfway-data/cert.pem -H 'Authorization: Bearer e"), "{curl}");
    assert!(curl.contains("/v1/ice"), "{curl}");
}
