//! Where the daemon listens, and what it says about it.

use std::io::Write;
use std::net::IpAddr;
#[cfg(unix)]
use std::path::PathBuf;

use broker_core::Broker;
use tokio::net::TcpListener;

use crate::output::say;

/// Where the daemon listens.
pub(super) enum Listener {
    Tcp(TcpListener, std::net::SocketAddr),
    #[cfg(unix)]
    Unix(tokio::net::UnixListener, PathBuf),
}

impl Listener {
    pub(super) async fn bind(listen: &str) -> Result<Self, String> {
        let fails = |error: &std::io::Error| {
            format!("cannot listen on {listen}: {error}; choose another address with --listen HOST:PORT")
        };
        #[cfg(unix)]
        if let Some(path) = listen.strip_prefix("unix:") {
            let listener = bind_unix(path).map_err(|error| fails(&error))?;
            return Ok(Self::Unix(listener, path.into()));
        }
        let listener = TcpListener::bind(listen).await.map_err(|error| fails(&error))?;
        let address = listener.local_addr().map_err(|error| fails(&error))?;
        Ok(Self::Tcp(listener, address))
    }

    /// What is left of it in the file system, to be removed at the end.
    pub(super) fn file(&self) -> Option<SocketFile> {
        match self {
            Self::Tcp(..) => None,
            #[cfg(unix)]
            Self::Unix(_, path) => socket_identity(path).map(|identity| SocketFile { path: path.clone(), identity }),
        }
    }

    /// Whether only this machine can reach it.
    pub(super) fn is_loopback(&self) -> bool {
        match self {
            Self::Tcp(_, address) => address.ip().is_loopback(),
            #[cfg(unix)]
            Self::Unix(..) => true,
        }
    }
}

/// A socket left by a daemon that was killed is in the way of the next. One that answers is not ours to
/// remove, nor what is no socket: a connection to a plain file is refused too.
#[cfg(unix)]
fn bind_unix(path: &str) -> std::io::Result<tokio::net::UnixListener> {
    use std::io::{Error, ErrorKind};
    match tokio::net::UnixListener::bind(path) {
        Err(error) if error.kind() == ErrorKind::AddrInUse => {
            if socket_identity(path.as_ref()).is_none() {
                return Err(Error::new(ErrorKind::AlreadyExists, "there is a file there that is no socket"));
            }
            let refused = |error: &Error| error.kind() == ErrorKind::ConnectionRefused;
            if !std::os::unix::net::UnixStream::connect(path).is_err_and(|error| refused(&error)) {
                return Err(error);
            }
            std::fs::remove_file(path)?;
            tokio::net::UnixListener::bind(path)
        }
        bound => bound,
    }
}

/// Which file a path is, if it is a socket itself and no link to one.
#[cfg(unix)]
fn socket_identity(path: &std::path::Path) -> Option<(u64, u64)> {
    use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
    let found = std::fs::symlink_metadata(path).ok()?;
    found.file_type().is_socket().then(|| (found.dev(), found.ino()))
}

/// The file of a Unix socket, removed when dropped unless it is another's by now.
pub(super) struct SocketFile {
    #[cfg(unix)]
    path: PathBuf,
    #[cfg(unix)]
    identity: (u64, u64),
}

#[cfg(unix)]
impl Drop for SocketFile {
    fn drop(&mut self) {
        if socket_identity(&self.path) == Some(self.identity) {
            // Left behind it is removed at the next start.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// One line on standard error, for people and scripts; on standard output what to try.
pub(super) fn announce(listener: &Listener, broker: &dyn Broker, scheme: &str, mode: &str) {
    let (address, curl) = match listener {
        Listener::Tcp(_, address) => {
            // A wildcard address cannot be asked; this machine can.
            let host = match address.ip() {
                IpAddr::V4(ip) if ip.is_unspecified() => "127.0.0.1".to_owned(),
                IpAddr::V6(ip) if ip.is_unspecified() => "[::1]".to_owned(),
                IpAddr::V4(ip) => ip.to_string(),
                IpAddr::V6(ip) => format!("[{ip}]"),
            };
            (format!("{scheme}://{address}"), format!("curl -s {scheme}://{host}:{}", address.port()))
        }
        #[cfg(unix)]
        Listener::Unix(_, path) => {
            (format!("unix:{}", path.display()), format!("curl -s --unix-socket {} http://localhost", path.display()))
        }
    };
    say!("broker-http listening on {address} (broker {}{mode})", broker.name());
    let volatile =
        if broker.capabilities().durable { "" } else { "\nMessages are kept in memory: they are gone when it stops." };
    let screen = format!(
        "
Try, from another terminal:

  {curl}/topics/orders.%3E/stream -N
      shows what is published to orders.…, as it comes

  {curl}/topics/orders.created -d '{{\"id\": 42}}' -H 'content-type: application/json'
      publishes a message

  {curl}/subscriptions/billing -X PUT -d '{{\"filter\": \"orders.>\", \"endpoint\": \"http://127.0.0.1:8080/hook\"}}'
      has every message on orders.… pushed to a URL, again and again until it answers 2xx

  {curl}/subscriptions/billing
      shows how that is going; /metrics and /openapi.json show the rest
{volatile}
"
    );
    // Nobody may be reading.
    let _ = std::io::stdout().write_all(screen.as_bytes());
}
