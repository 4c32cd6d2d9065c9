//! What an instance keeps: its secret, and its self-signed certificate.

use std::{
    fmt,
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use crate::{
    clock::Now,
    credentials::keyring::InstanceSecret,
    tls::{Certificate, self_signed},
};

/// The directory of one instance.
#[derive(Clone, Debug)]
pub struct DataDir(PathBuf);

impl DataDir {
    #[must_use]
    pub fn new(path: &Path) -> Self {
        Self(path.to_owned())
    }

    /// Where the self-signed certificate is, for agents to trust.
    #[must_use]
    pub fn cert_path(&self) -> PathBuf {
        self.0.join("cert.pem")
    }

    /// The instance's secret, which must exist: only `serve` makes one.
    ///
    /// # Errors
    /// One line, with the directory, when there is none or it cannot be used.
    pub fn secret(&self) -> Result<InstanceSecret, DataDirError> {
        let path = self.0.join("secret");
        let bytes = fs::read(&path).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => DataDirError::NoSecret(self.0.clone()),
            _ => DataDirError::Io { path: path.clone(), doing: "read", error },
        })?;
        warn_if_others_read(&path);
        InstanceSecret::from_bytes(&bytes).ok_or(DataDirError::WrongSize { path, found: bytes.len() })
    }

    /// The instance's secret, made at the first start.
    ///
    /// # Errors
    /// One line, with the file, when it can neither be read nor made.
    pub fn secret_or_new(&self) -> Result<InstanceSecret, DataDirError> {
        match self.secret() {
            Err(DataDirError::NoSecret(_)) => {}
            found => return found,
        }
        self.create()?;
        let new = InstanceSecret::generate().map_err(|_| DataDirError::NoRandomness)?;
        // Another process may have been first: whoever was, there is one secret.
        self.write_new("secret", new.as_bytes())?;
        self.secret()
    }

    /// The self-signed certificate for `names`: made at the first start, and again when it nears its end or lacks a
    /// name. Its key stays the same. A certificate from elsewhere, put here by hand, is served and left alone.
    ///
    /// # Errors
    /// One line, with the file, when it can neither be used nor made.
    pub fn certificate(&self, now: Now, names: &[String]) -> Result<Certificate, DataDirError> {
        let (cert_path, key_path) = (self.cert_path(), self.0.join("key.pem"));
        if let (Some(cert), Some(key)) = (read_if_there(&cert_path)?, read_if_there(&key_path)?) {
            let found = Certificate::from_pem(&cert, &key)
                .map_err(|error| DataDirError::Unusable { path: cert_path, why: error.to_string() })?;
            if !found.is_self_signed() || self_signed::still_serves(&cert, now, names) {
                return Ok(found);
            }
        }
        self.new_certificate(now, names)
    }

    fn new_certificate(&self, now: Now, names: &[String]) -> Result<Certificate, DataDirError> {
        let (cert_path, key_path) = (self.cert_path(), self.0.join("key.pem"));
        let unusable = |path: &Path, why: String| DataDirError::Unusable { path: path.to_owned(), why };
        let kept = read_if_there(&key_path)?.and_then(|bytes| String::from_utf8(bytes).ok());
        let key = kept.clone().map_or_else(self_signed::new_key, Ok);
        let key = key.map_err(|error| unusable(&key_path, error.to_string()))?;
        let cert = self_signed::generate(now, names, &key)
            .map_err(|error| unusable(&key_path, error.to_string()))?;
        let key_is_new = kept.is_none();
        if let Err(error) = self.keep_self_signed(&cert, key_is_new.then_some(&key)) {
            // Nobody is served better by our not starting: a disk may be full for an hour.
            tracing::warn!(
                "{error}; the self-signed certificate is in memory alone, and another after the next start"
            );
        }
        Certificate::from_pem(cert.as_bytes(), key.as_bytes())
            .map_err(|error| unusable(&cert_path, error.to_string()))
    }

    fn keep_self_signed(&self, cert: &str, new_key: Option<&String>) -> Result<(), DataDirError> {
        self.create()?;
        if let Some(key) = new_key {
            self.write_new("key.pem", key.as_bytes())?;
        }
        self.replace("cert.pem", cert.as_bytes(), 0o644)
    }

    /// Where a file of this name is kept.
    #[must_use]
    pub fn path_of(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// A private file that was kept here, if it is there.
    ///
    /// # Errors
    /// One line, with the file, when it cannot be read.
    pub fn kept(&self, name: &str) -> Result<Option<Vec<u8>>, DataDirError> {
        read_if_there(&self.0.join(name))
    }

    /// Keeps a private file, in place of the one of this name; whole or not at all.
    ///
    /// # Errors
    /// One line, with the file, when it cannot be written.
    pub fn keep(&self, name: &str, bytes: &[u8]) -> Result<(), DataDirError> {
        self.create()?;
        self.replace(name, bytes, 0o600)
    }

    fn create(&self) -> Result<(), DataDirError> {
        let made = DirBuilder::new().recursive(true).mode(0o700).create(&self.0);
        made.map_err(|error| io_error(&self.0, "create", error))?;
        self.sweep();
        Ok(())
    }

    /// Removes drafts of processes that were ended in the middle of writing.
    fn sweep(&self) {
        let Ok(entries) = fs::read_dir(&self.0) else { return };
        for name in entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()) {
            let writer = name.strip_prefix('.').and_then(|name| name.rsplit_once('.')?.1.parse::<u32>().ok());
            if writer.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists()) {
                fs::remove_file(self.0.join(name)).ok();
            }
        }
    }

    /// Writes a private file that was not there before; whole or not at all. One that is there is left alone.
    fn write_new(&self, name: &str, bytes: &[u8]) -> Result<(), DataDirError> {
        let (path, draft) = (self.0.join(name), self.draft(name));
        write_synced(&draft, bytes, 0o600).map_err(|error| io_error(&path, "write", error))?;
        let placed = match fs::hard_link(&draft, &path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            // A file system without hard links.
            Err(_) if !path.exists() => fs::rename(&draft, &path),
            placed => placed,
        };
        fs::remove_file(&draft).ok();
        placed.and_then(|()| sync_dir(&self.0)).map_err(|error| io_error(&path, "write", error))
    }

    fn replace(&self, name: &str, bytes: &[u8], mode: u32) -> Result<(), DataDirError> {
        let (path, draft) = (self.0.join(name), self.draft(name));
        let written = write_synced(&draft, bytes, mode).and_then(|()| fs::rename(&draft, &path));
        written.and_then(|()| sync_dir(&self.0)).map_err(|error| io_error(&path, "write", error))
    }

    /// No other process writes to this name; one of the same number that died may have left it.
    fn draft(&self, name: &str) -> PathBuf {
        let draft = self.0.join(format!(".{name}.{}", std::process::id()));
        fs::remove_file(&draft).ok();
        draft
    }
}

/// Why the data directory is of no use, in one line for people.
#[derive(Debug)]
pub enum DataDirError {
    NoSecret(PathBuf),
    WrongSize { path: PathBuf, found: usize },
    Unusable { path: PathBuf, why: String },
    Io { path: PathBuf, doing: &'static str, error: io::Error },
    NoRandomness,
}

impl fmt::Display for DataDirError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoSecret(dir) => write!(
                f,
                "there is no secret in the data directory {}: start `halfway serve` once, or name another with --data-dir",
                dir.display()
            ),
            Self::WrongSize { path, found } => write!(
                f,
                "{} has {found} bytes where a secret has 32: restore it, or remove it for a new one (all tokens end)",
                path.display()
            ),
            Self::Unusable { path, why } => {
                write!(f, "{}: {why}; remove cert.pem and key.pem for new ones", path.display())
            }
            Self::Io { path, doing, error } => write!(f, "cannot {doing} {}: {error}", path.display()),
            Self::NoRandomness => f.write_str("the operating system has no randomness to give"),
        }
    }
}

fn io_error(path: &Path, doing: &'static str, error: io::Error) -> DataDirError {
    DataDirError::Io { path: path.to_owned(), doing, error }
}

fn read_if_there(path: &Path) -> Result<Option<Vec<u8>>, DataDirError> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(io_error(path, "read", error)),
    }
}

fn write_synced(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

fn sync_dir(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

fn warn_if_others_read(path: &Path) {
    if fs::metadata(path).is_ok_and(|metadata| metadata.mode() & 0o077 != 0) {
        tracing::warn!("others on this host may read {0}: run `chmod 600 {0}`", path.display());
    }
}
