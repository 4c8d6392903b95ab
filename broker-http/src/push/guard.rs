//! Which addresses may be dialled.
//!
//! Whoever makes a subscription chooses where the daemon connects to, from inside its network. So
//! every address is checked where it is dialled, after name resolution: a name that was harmless
//! when the subscription was made may resolve to a database server when it is pushed to.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use broker_core::{Error, Result};
use ipnet::IpNet;

use crate::Endpoint;
use crate::spec::REDACTED;

use super::special::{embedded, special};

/// Which addresses may be dialled: public ones, and what is allowed here.
///
/// ```
/// use broker_http::push::Guard;
///
/// let guard = Guard::new().allowing("10.1.0.0/16".parse()?).allowing("hooks.internal".parse()?);
/// assert!(guard.check("example.com", "93.184.215.14".parse().unwrap()).is_ok());
/// assert!(guard.check("billing.internal", "10.1.2.3".parse().unwrap()).is_ok());
/// assert!(guard.check("hooks.internal", "192.168.7.1".parse().unwrap()).is_ok());
///
/// let refused = guard.check("billing.internal", "10.2.0.1".parse().unwrap()).unwrap_err();
/// assert!(refused.message().contains("private"), "{refused}");
/// # Ok::<(), broker_core::Error>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct Guard {
    allowed: Vec<Allowed>,
    development: bool,
}

/// What a [`Guard`] allows beyond public addresses: a network (`10.1.0.0/16`), an address, or a host
/// name, which may then resolve to anything. `*.internal` is every name below `internal`.
///
/// ```
/// use broker_http::push::Allowed;
/// assert!("10.1.0.0/16".parse::<Allowed>().is_ok());
/// assert!("10.1.0.0/33".parse::<Allowed>().is_err());
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Allowed(Rule);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Rule {
    Net(IpNet),
    Host(String),
    /// With its leading dot.
    Below(String),
}

impl Guard {
    /// Public addresses only.
    pub fn new() -> Self {
        Self::default()
    }

    /// Allows this too.
    #[must_use]
    pub fn allowing(mut self, allowed: Allowed) -> Self {
        self.allowed.push(allowed);
        self
    }

    /// Development mode: of what is not public, allows loopback and nothing else.
    #[must_use]
    pub fn with_development(mut self, development: bool) -> Self {
        self.development = development;
        self
    }

    /// Whether `address`, to which `host` resolved, may be dialled.
    ///
    /// # Errors
    ///
    /// [`Unauthorized`](broker_core::ErrorKind::Unauthorized), saying what the address is and how to
    /// allow it.
    pub fn check(&self, host: &str, address: IpAddr) -> Result<()> {
        let Some(what) = special(address) else { return Ok(()) };
        if self.development && address.is_loopback() {
            return Ok(());
        }
        let why = if self.allowed.iter().any(|allowed| allowed.names(host)) {
            // A name is trusted wherever it leads.
            return Ok(());
        } else if self.allows(address) {
            // A network that carries IPv4 addresses does not hide what they are.
            let hidden = embedded(address).find(|inner| special(*inner).is_some() && !self.allows(*inner));
            let Some(inner) = hidden else { return Ok(()) };
            format!("it stands for {inner}, which is {}", special(inner).unwrap_or("special"))
        } else {
            format!("it is {what}")
        };
        let whose =
            if host.trim_matches(['[', ']']).parse() == Ok(address) { String::new() } else { format!(" of {host}") };
        Err(Error::new(
            broker_core::ErrorKind::Unauthorized,
            format!("the address {address}{whose} may not be dialled: {why}; the daemon's operator can allow it"),
        ))
    }

    /// Whether `endpoint` may be dialled, as far as its text tells: a name is looked up when it is dialled.
    ///
    /// # Errors
    ///
    /// As [`check`](Self::check).
    ///
    /// ```
    /// use broker_http::push::Guard;
    /// assert!(Guard::new().check_endpoint(&"http://10.0.0.1/hook".parse()?).is_err());
    /// assert!(Guard::new().check_endpoint(&"http://hooks.internal/".parse()?).is_ok());
    /// # Ok::<(), broker_core::Error>(())
    /// ```
    pub fn check_endpoint(&self, endpoint: &Endpoint) -> Result<()> {
        let address = match endpoint.url().host() {
            Some(url::Host::Ipv4(address)) => IpAddr::V4(address),
            Some(url::Host::Ipv6(address)) => IpAddr::V6(address),
            _ => return Ok(()),
        };
        self.check(endpoint.url().host_str().unwrap_or_default(), address)
    }

    fn allows(&self, address: IpAddr) -> bool {
        self.allowed.iter().any(|allowed| matches!(&allowed.0, Rule::Net(net) if net.contains(&address)))
    }
}

impl Allowed {
    fn names(&self, host: &str) -> bool {
        match &self.0 {
            Rule::Net(_) => false,
            Rule::Host(name) => host.eq_ignore_ascii_case(name),
            Rule::Below(suffix) => {
                let at = host.len().saturating_sub(suffix.len());
                at > 0 && host.get(at..).is_some_and(|end| end.eq_ignore_ascii_case(suffix))
            }
        }
    }
}

impl FromStr for Allowed {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let invalid = || {
            // A URL may have a password.
            let secret = text.contains(['@', '?', '=']) || text.contains("//");
            let shown: String = if secret { REDACTED.to_owned() } else { text.chars().take(60).collect() };
            Error::invalid(format!(
                "allowed address {shown:?}: it is a network as 10.1.0.0/16, an address, a host name, or *.NAME for every name below NAME"
            ))
        };
        if let Ok(net) = text.parse::<IpNet>() {
            return Ok(Self(Rule::Net(net.trunc())));
        }
        if let Ok(address) = text.trim_matches(['[', ']']).parse::<IpAddr>() {
            return Ok(Self(Rule::Net(address.into())));
        }
        let (name, below) = text.strip_prefix("*.").map_or((text, false), |name| (name, true));
        let label = |label: &str| {
            !label.is_empty()
                && label.len() <= 63
                && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte))
        };
        let digits = name.rsplit('.').next().is_some_and(|last| last.bytes().all(|byte| byte.is_ascii_digit()));
        if name.len() > 253 || digits || !name.split('.').all(label) {
            return Err(invalid());
        }
        let name = name.to_ascii_lowercase();
        Ok(Self(if below { Rule::Below(format!(".{name}")) } else { Rule::Host(name) }))
    }
}

impl fmt::Display for Allowed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Rule::Net(net) => net.fmt(f),
            Rule::Host(name) => f.write_str(name),
            Rule::Below(suffix) => write!(f, "*{suffix}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(guard: &Guard, host: &str, address: &str) -> Option<String> {
        guard.check(host, address.parse().unwrap()).err().map(|error| error.message().to_owned())
    }

    #[test]
    fn what_is_refused_is_named() {
        let reason = refused(&Guard::new(), "db.internal", "10.0.0.1").unwrap();
        assert!(reason.contains("private") && reason.contains(" of db.internal "), "{reason}");
        let reason = refused(&Guard::new(), "10.0.0.1", "10.0.0.1").unwrap();
        assert!(!reason.contains(" of "), "a host that is an address is not named twice: {reason}");
        assert_eq!(refused(&Guard::new(), "example.com", "93.184.215.14"), None);
    }

    #[test]
    fn a_network_allowed_does_not_hide_what_it_carries() {
        let guard = ["64:ff9b::/96", "2002::/16", "192.168.0.0/16"]
            .into_iter()
            .fold(Guard::new(), |guard, allowed| guard.allowing(allowed.parse().unwrap()));
        for passes in ["64:ff9b::808:808", "2002:808:808::1", "64:ff9b::c0a8:1"] {
            assert_eq!(refused(&guard, "x", passes), None, "{passes}");
        }
        for (address, what) in
            [("64:ff9b::7f00:1", "127.0.0.1"), ("64:ff9b::a9fe:a9fe", "metadata"), ("2002:a00:1::", "private")]
        {
            let reason = refused(&guard, "x", address).unwrap_or_else(|| panic!("{address} passed"));
            assert!(reason.contains(what), "{reason}");
        }
    }

    #[test]
    fn development_allows_loopback_and_nothing_else() {
        let guard = Guard::new().with_development(true);
        for address in ["127.0.0.1", "127.1.2.3", "::1", "8.8.8.8"] {
            assert_eq!(refused(&guard, "localhost", address), None, "{address}");
        }
        for address in ["10.0.0.1", "169.254.169.254", "::ffff:127.0.0.1", "0.0.0.0", "::", "fe80::1"] {
            assert!(refused(&guard, "localhost", address).is_some(), "{address}");
        }
    }

    #[test]
    fn networks_addresses_and_names_can_be_allowed() {
        let guard = ["10.1.2.3/16", "192.168.7.1", "fd00::/8", "[::1]", "Hooks.Internal", "*.svc.local"]
            .into_iter()
            .fold(Guard::new(), |guard, allowed| guard.allowing(allowed.parse().unwrap()));
        for (host, address) in [
            ("x", "10.1.255.1"),
            ("x", "192.168.7.1"),
            ("x", "fd12::1"),
            ("x", "::1"),
            ("hooks.internal", "172.16.0.1"),
            ("HOOKS.internal", "127.0.0.1"),
            ("a.b.svc.local", "127.0.0.1"),
        ] {
            assert_eq!(refused(&guard, host, address), None, "{host} {address}");
        }
        for (host, address) in [
            ("x", "10.2.0.1"),
            ("x", "192.168.7.2"),
            ("x", "127.0.0.1"),
            ("more.hooks.internal", "127.0.0.1"),
            ("evilsvc.local", "127.0.0.1"),
            (".svc.local", "127.0.0.1"),
            ("svc.local", "127.0.0.1"),
        ] {
            assert!(refused(&guard, host, address).is_some(), "{host} {address}");
        }
    }

    #[test]
    fn what_is_allowed_must_parse() {
        for good in ["10.0.0.0/8", "::/0", "::1", "a", "a-b.c_d", "*.internal"] {
            assert!(good.parse::<Allowed>().is_ok(), "{good}");
        }
        for bad in
            ["", "*", "*.", "10.0.0.0/33", "10.0.0", "1.2.3.4.5", "a..b", "http://a", "a b", "a:80", "ä", "*.*.a"]
        {
            let error = bad.parse::<Allowed>().unwrap_err();
            assert_eq!(error.kind(), broker_core::ErrorKind::Invalid, "{bad}");
        }
        assert_eq!("*.Internal".parse::<Allowed>().unwrap().to_string(), "*.internal");
        assert_eq!("10.1.2.3/16".parse::<Allowed>().unwrap().to_string(), "10.1.0.0/16");
    }
}
