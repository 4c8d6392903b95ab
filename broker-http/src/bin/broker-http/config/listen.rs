//! What can be told of addresses and origins by their text alone.

use std::net::SocketAddr;

use url::Url;

/// Refuses what could never be listened on.
pub(super) fn check(listen: &str, tls: bool) -> Result<(), String> {
    if let Some(path) = listen.strip_prefix("unix:") {
        if path.is_empty() {
            return Err("listen \"unix:\": a path follows, as in unix:/run/broker-http.sock".to_owned());
        }
        if tls {
            return Err(format!("listen {listen:?}: a Unix socket is served without TLS; leave one of both out"));
        }
        return Ok(());
    }
    // What ends like an address of version 4 has to be one.
    let is_host = |host: &str| !host.contains([':', '/', ' ']) && url::Host::parse(host).is_ok();
    let named = listen.rsplit_once(':').is_some_and(|(host, port)| is_host(host) && port.parse::<u16>().is_ok());
    if named || listen.parse::<SocketAddr>().is_ok() {
        return Ok(());
    }
    Err(format!("listen {listen:?}: it is HOST:PORT, as in 127.0.0.1:2757 or [::1]:2757, or unix:PATH"))
}

/// Whether only this machine can reach a listener there; `None` where it is a name.
pub(super) fn loopback(listen: &str) -> Option<bool> {
    if listen.starts_with("unix:") {
        return Some(true);
    }
    listen.parse::<SocketAddr>().ok().map(|address| address.ip().is_loopback())
}

/// Whether a browser would say this of a page (the serialization of an origin in the HTML standard), in
/// whatever case.
pub(super) fn is_origin(text: &str) -> bool {
    let Ok(url) = Url::parse(text) else { return false };
    let after = text.split_once("://").map_or("", |(_, after)| after);
    url.has_host() && url.username().is_empty() && url.password().is_none() && !after.contains(['/', '?', '#', '\\'])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_told_from_what_is_none() {
        for (listen, reach) in [
            ("127.0.0.1:0", Some(true)),
            ("[::1]:2757", Some(true)),
            ("0.0.0.0:2757", Some(false)),
            ("localhost:2757", None),
            ("unix:/run/x.sock", Some(true)),
        ] {
            check(listen, false).unwrap();
            assert_eq!(loopback(listen), reach, "{listen}");
        }
        for bad in [
            "",
            ":1",
            "2757",
            "127.0.0.1",
            "::1:",
            "a b:1",
            "host:x",
            "host:65536",
            "http://host:1",
            "unix:",
            "256.0.0.1:1",
        ] {
            assert!(check(bad, false).is_err(), "{bad}");
        }
    }

    #[test]
    fn origins_are_told_from_other_urls() {
        for good in ["https://app.example.com", "http://localhost:3000", "HTTPS://App.Example.com", "http://[::1]:1"] {
            assert!(is_origin(good), "{good}");
        }
        for bad in ["*", "app.example.com", "https://a.example/", "https://a.example/x", "https://u@a.example", "null"]
        {
            assert!(!is_origin(bad), "{bad}");
        }
    }
}
