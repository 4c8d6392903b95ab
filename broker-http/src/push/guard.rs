//! Which addresses may be dialled.
//!
//! Whoever makes a subscription chooses where the daemon connects to, from inside its network. So
//! every address is checked where it is dialled, after name resolution: a name that was harmless
//! when the subscription was made may resolve to a database server when it is pushed to.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use broker_core::{Error, Result};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};

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
        if self.allowed.iter().any(|allowed| allowed.matches(host, address)) {
            return Ok(());
        }
        let whose =
            if host.trim_matches(['[', ']']).parse() == Ok(address) { String::new() } else { format!(" of {host}") };
        Err(Error::new(
            broker_core::ErrorKind::Unauthorized,
            format!(
                "the address {address}{whose} may not be dialled: it is {what}; the daemon's operator can allow it"
            ),
        ))
    }
}

impl Allowed {
    fn matches(&self, host: &str, address: IpAddr) -> bool {
        match &self.0 {
            Rule::Net(net) => net.contains(&address),
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
            let shown: String = text.chars().take(60).collect();
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

const fn v4(a: u8, b: u8, c: u8, d: u8, prefix: u8) -> Ipv4Net {
    Ipv4Net::new_assert(Ipv4Addr::new(a, b, c, d), prefix)
}

const fn v6(a: u16, b: u16, c: u16, prefix: u8) -> Ipv6Net {
    Ipv6Net::new_assert(Ipv6Addr::new(a, b, c, 0, 0, 0, 0, 0), prefix)
}

/// Metadata services first: of several networks the first that matches gives the reason. The rest
/// is the IANA registry of special-purpose addresses, without what is globally reachable.
const SPECIAL_V4: [(Ipv4Net, &str); 19] = [
    (v4(169, 254, 169, 254, 32), "a cloud's metadata service"),
    (v4(100, 100, 100, 200, 32), "a cloud's metadata service"),
    (v4(192, 0, 0, 192, 32), "a cloud's metadata service"),
    // Public by its number, the host's own agent by what it is.
    (v4(168, 63, 129, 16, 32), "a cloud's metadata service"),
    (v4(0, 0, 0, 0, 8), "this network"),
    (v4(10, 0, 0, 0, 8), "private"),
    (v4(100, 64, 0, 0, 10), "shared by a carrier's customers"),
    (v4(127, 0, 0, 0, 8), "loopback"),
    (v4(169, 254, 0, 0, 16), "link-local"),
    (v4(172, 16, 0, 0, 12), "private"),
    (v4(192, 0, 0, 0, 24), "reserved for protocols"),
    (v4(192, 0, 2, 0, 24), "for documentation"),
    (v4(192, 88, 99, 0, 24), "a 6to4 relay"),
    (v4(192, 168, 0, 0, 16), "private"),
    (v4(198, 18, 0, 0, 15), "for benchmarks"),
    (v4(198, 51, 100, 0, 24), "for documentation"),
    (v4(203, 0, 113, 0, 24), "for documentation"),
    (v4(224, 0, 0, 0, 4), "multicast"),
    (v4(240, 0, 0, 0, 4), "reserved"),
];

const SPECIAL_V6: [(Ipv6Net, &str); 20] = [
    (Ipv6Net::new_assert(Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254), 128), "a cloud's metadata service"),
    (Ipv6Net::new_assert(Ipv6Addr::new(0xfd20, 0xce, 0, 0, 0, 0, 0, 0x254), 128), "a cloud's metadata service"),
    (Ipv6Net::new_assert(Ipv6Addr::UNSPECIFIED, 128), "unspecified"),
    (Ipv6Net::new_assert(Ipv6Addr::LOCALHOST, 128), "loopback"),
    (Ipv6Net::new_assert(Ipv6Addr::new(0, 0, 0, 0, 0, 0xffff, 0, 0), 96), "an IPv4 address mapped to IPv6"),
    (Ipv6Net::new_assert(Ipv6Addr::new(0, 0, 0, 0, 0xffff, 0, 0, 0), 96), "an IPv4 address translated to IPv6"),
    (v6(0, 0, 0, 96), "an IPv4 address written as IPv6"),
    (v6(0x64, 0xff9b, 0, 96), "an IPv4 address translated by NAT64"),
    (v6(0x64, 0xff9b, 1, 48), "an IPv4 address translated by NAT64"),
    (v6(0x100, 0, 0, 64), "discarded by routers"),
    (v6(0x2001, 0, 0, 32), "a Teredo tunnel"),
    (v6(0x2001, 0, 0, 23), "reserved for protocols"),
    (v6(0x2001, 0xdb8, 0, 32), "for documentation"),
    (v6(0x2002, 0, 0, 16), "a 6to4 tunnel"),
    (v6(0x3fff, 0, 0, 20), "for documentation"),
    (v6(0x5f00, 0, 0, 16), "for segment routing"),
    (v6(0xfc00, 0, 0, 7), "private"),
    (v6(0xfe80, 0, 0, 10), "link-local"),
    (v6(0xfec0, 0, 0, 10), "site-local"),
    (v6(0xff00, 0, 0, 8), "multicast"),
];

/// All that is handed out for the public so far.
const GLOBAL_V6: Ipv6Net = v6(0x2000, 0, 0, 3);

/// What `address` is, if it is not public.
fn special(address: IpAddr) -> Option<&'static str> {
    match address {
        IpAddr::V4(address) => SPECIAL_V4.iter().find(|(net, _)| net.contains(&address)).map(|(_, what)| *what),
        IpAddr::V6(address) => SPECIAL_V6
            .iter()
            .find(|(net, _)| net.contains(&address))
            .map(|(_, what)| *what)
            .or_else(|| (!GLOBAL_V6.contains(&address)).then_some("reserved")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(guard: &Guard, host: &str, address: &str) -> Option<String> {
        guard.check(host, address.parse().unwrap()).err().map(|error| error.message().to_owned())
    }

    #[test]
    fn public_addresses_pass() {
        for address in [
            "1.1.1.1",
            "8.8.8.8",
            "9.255.255.255",
            "11.0.0.0",
            "100.63.255.255",
            "100.128.0.0",
            "126.255.255.255",
            "128.0.0.0",
            "169.253.255.255",
            "172.15.255.255",
            "172.32.0.0",
            "192.0.1.0",
            "192.167.255.255",
            "192.169.0.0",
            "198.17.255.255",
            "198.20.0.0",
            "223.255.255.255",
            "2001:4860:4860::8888",
            "2606:4700::1111",
            "2a00:1450::1",
        ] {
            assert_eq!(refused(&Guard::new(), "host", address), None, "{address}");
        }
    }

    #[test]
    fn the_others_are_refused_and_named() {
        for (address, what) in [
            ("0.0.0.0", "this network"),
            ("0.1.2.3", "this network"),
            ("10.0.0.1", "private"),
            ("10.255.255.255", "private"),
            ("100.64.0.0", "carrier"),
            ("100.100.100.200", "metadata"),
            ("127.0.0.1", "loopback"),
            ("127.255.255.254", "loopback"),
            ("168.63.129.16", "metadata"),
            ("169.254.0.1", "link-local"),
            ("169.254.169.254", "metadata"),
            ("172.16.0.0", "private"),
            ("172.31.255.255", "private"),
            ("192.0.0.192", "metadata"),
            ("192.0.2.1", "documentation"),
            ("192.88.99.1", "6to4"),
            ("192.168.1.1", "private"),
            ("198.19.255.255", "benchmarks"),
            ("198.51.100.7", "documentation"),
            ("203.0.113.7", "documentation"),
            ("224.0.0.1", "multicast"),
            ("240.0.0.1", "reserved"),
            ("255.255.255.255", "reserved"),
            ("::", "unspecified"),
            ("::1", "loopback"),
            ("::7f00:1", "written as IPv6"),
            ("::ffff:127.0.0.1", "mapped"),
            ("::ffff:8.8.8.8", "mapped"),
            ("::ffff:0:127.0.0.1", "translated"),
            ("64:ff9b::a00:1", "NAT64"),
            ("64:ff9b:1::1", "NAT64"),
            ("100::1", "discarded"),
            ("2001::1", "Teredo"),
            ("2001:2::1", "protocols"),
            ("2001:db8::1", "documentation"),
            ("2002:7f00:1::", "6to4"),
            ("3fff::1", "documentation"),
            ("4000::1", "reserved"),
            ("5f00::1", "segment routing"),
            ("fc00::1", "private"),
            ("fd00:ec2::254", "metadata"),
            ("fd12:3456::1", "private"),
            ("fe80::1", "link-local"),
            ("fec0::1", "site-local"),
            ("ff02::1", "multicast"),
        ] {
            let reason = refused(&Guard::new(), "host", address).unwrap_or_else(|| panic!("{address} passed"));
            assert!(reason.contains(what) && reason.contains(" of host "), "{address}: {reason}");
        }
        let reason = refused(&Guard::new(), "10.0.0.1", "10.0.0.1").unwrap();
        assert!(!reason.contains(" of "), "a host that is an address is not named twice: {reason}");
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
