//! What systemd is told of a service of `Type=notify` (sd_notify(3)): one datagram to the socket it
//! names.

/// Tells systemd this, if it listens; nobody else would.
#[cfg(unix)]
pub(super) fn tell(state: &str) {
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else { return };
    if let Err(error) = send(&path, state.as_bytes()) {
        tracing::warn!(%error, "systemd could not be told {state}");
    }
}

/// Tells systemd that the configuration is being read again; `READY=1` ends it.
pub(super) fn reloading() {
    #[cfg(target_os = "linux")]
    {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
        tell(&format!("RELOADING=1\nMONOTONIC_USEC={}", now.tv_sec * 1_000_000 + now.tv_nsec / 1_000));
    }
}

#[cfg(unix)]
fn send(path: &std::ffi::OsStr, state: &[u8]) -> std::io::Result<()> {
    use std::os::unix::ffi::OsStrExt as _;
    use std::os::unix::net::{SocketAddr, UnixDatagram};
    let socket = UnixDatagram::unbound()?;
    #[cfg(target_os = "linux")]
    if let Some(name) = path.as_bytes().strip_prefix(b"@") {
        use std::os::linux::net::SocketAddrExt as _;
        return socket.send_to_addr(state, &SocketAddr::from_abstract_name(name)?).map(drop);
    }
    socket.send_to_addr(state, &SocketAddr::from_pathname(path)?).map(drop)
}

#[cfg(not(unix))]
pub(super) fn tell(_: &str) {}
