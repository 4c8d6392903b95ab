//! What an IP address is, where it is not an ordinary public one: IANA's two registries of
//! special-purpose addresses, multicast, the metadata services of clouds, and the forms of IPv6 that
//! stand for an IPv4 address.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{Ipv4Net, Ipv6Net};

const fn v4(a: u8, b: u8, c: u8, d: u8, prefix: u8) -> Ipv4Net {
    Ipv4Net::new_assert(Ipv4Addr::new(a, b, c, d), prefix)
}

const fn v6(a: u16, b: u16, c: u16, prefix: u8) -> Ipv6Net {
    Ipv6Net::new_assert(Ipv6Addr::new(a, b, c, 0, 0, 0, 0, 0), prefix)
}

/// Of several networks the first that matches gives the reason. Also what the registry calls
/// globally reachable is no place for an endpoint: anycast services of the network itself.
const SPECIAL_V4: [(Ipv4Net, &str); 22] = [
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
    (v4(192, 31, 196, 0, 24), "an AS112 name server"),
    (v4(192, 52, 193, 0, 24), "a multicast relay"),
    (v4(192, 88, 99, 0, 24), "a 6to4 relay"),
    (v4(192, 168, 0, 0, 16), "private"),
    (v4(192, 175, 48, 0, 24), "an AS112 name server"),
    (v4(198, 18, 0, 0, 15), "for benchmarks"),
    (v4(198, 51, 100, 0, 24), "for documentation"),
    (v4(203, 0, 113, 0, 24), "for documentation"),
    (v4(224, 0, 0, 0, 4), "multicast"),
    (v4(240, 0, 0, 0, 4), "reserved"),
];

const UNSPECIFIED: Ipv6Net = Ipv6Net::new_assert(Ipv6Addr::UNSPECIFIED, 128);
const LOOPBACK: Ipv6Net = Ipv6Net::new_assert(Ipv6Addr::LOCALHOST, 128);
const MAPPED: Ipv6Net = Ipv6Net::new_assert(Ipv6Addr::new(0, 0, 0, 0, 0, 0xffff, 0, 0), 96);
const TRANSLATED: Ipv6Net = Ipv6Net::new_assert(Ipv6Addr::new(0, 0, 0, 0, 0xffff, 0, 0, 0), 96);
const COMPATIBLE: Ipv6Net = v6(0, 0, 0, 96);
const NAT64: Ipv6Net = v6(0x64, 0xff9b, 0, 96);
const NAT64_LOCAL: Ipv6Net = v6(0x64, 0xff9b, 1, 48);
const TEREDO: Ipv6Net = v6(0x2001, 0, 0, 32);
const SIX_TO_FOUR: Ipv6Net = v6(0x2002, 0, 0, 16);

const SPECIAL_V6: [(Ipv6Net, &str); 21] = [
    (Ipv6Net::new_assert(Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254), 128), "a cloud's metadata service"),
    (Ipv6Net::new_assert(Ipv6Addr::new(0xfd20, 0xce, 0, 0, 0, 0, 0, 0x254), 128), "a cloud's metadata service"),
    (UNSPECIFIED, "unspecified"),
    (LOOPBACK, "loopback"),
    (MAPPED, "an IPv4 address mapped to IPv6"),
    (TRANSLATED, "an IPv4 address translated to IPv6"),
    (COMPATIBLE, "an IPv4 address written as IPv6"),
    (NAT64, "an IPv4 address translated by NAT64"),
    (NAT64_LOCAL, "an IPv4 address translated by NAT64"),
    (v6(0x100, 0, 0, 63), "discarded by routers"),
    (TEREDO, "a Teredo tunnel"),
    (v6(0x2001, 0, 0, 23), "reserved for protocols"),
    (v6(0x2001, 0xdb8, 0, 32), "for documentation"),
    (SIX_TO_FOUR, "a 6to4 tunnel"),
    (v6(0x2620, 0x4f, 0x8000, 48), "an AS112 name server"),
    (v6(0x3fff, 0, 0, 20), "for documentation"),
    (v6(0x5f00, 0, 0, 16), "for segment routing"),
    (v6(0xfc00, 0, 0, 7), "private"),
    (v6(0xfe80, 0, 0, 10), "link-local"),
    (v6(0xfec0, 0, 0, 10), "site-local"),
    (v6(0xff00, 0, 0, 8), "multicast"),
];

/// All that is handed out for the public so far.
const GLOBAL_V6: Ipv6Net = v6(0x2000, 0, 0, 3);

/// What `address` is, if it is not an ordinary public one.
pub(crate) fn special(address: IpAddr) -> Option<&'static str> {
    match address {
        IpAddr::V4(address) => SPECIAL_V4.iter().find(|(net, _)| net.contains(&address)).map(|(_, what)| *what),
        IpAddr::V6(address) => SPECIAL_V6
            .iter()
            .find(|(net, _)| net.contains(&address))
            .map(|(_, what)| *what)
            .or_else(|| (!GLOBAL_V6.contains(&address)).then_some("reserved"))
            .or_else(|| isatap(address).and_then(|inner| special(inner.into()))),
    }
}

/// The IPv4 addresses that an IPv6 address stands for: where its packets may come out.
pub(crate) fn embedded(address: IpAddr) -> impl Iterator<Item = IpAddr> {
    let mut found = [None; 2];
    if let IpAddr::V6(address) = address {
        let bits = address.to_bits();
        let at = |shift: u32| Some(Ipv4Addr::from_bits((bits >> shift) as u32));
        let compatible = COMPATIBLE.contains(&address) && address != Ipv6Addr::UNSPECIFIED && !address.is_loopback();
        let last = compatible || [MAPPED, TRANSLATED, NAT64].iter().any(|net| net.contains(&address));
        found = if last {
            [at(0), None]
        } else if NAT64_LOCAL.contains(&address) {
            // RFC 6052, 2.2: within a /48 the address is parted by a zero octet; within a /96 it stands last.
            let parted = ((bits >> 64) as u32 & 0xffff) << 16 | (bits >> 40) as u32 & 0xffff;
            [Some(Ipv4Addr::from_bits(parted)), at(0)]
        } else if SIX_TO_FOUR.contains(&address) {
            [at(80), None]
        } else if TEREDO.contains(&address) {
            // RFC 4380, 4: the server, and the client with its bits turned.
            [at(64), Some(Ipv4Addr::from_bits(!(bits as u32)))]
        } else {
            [isatap(address), None]
        };
    }
    found.into_iter().flatten().map(IpAddr::from)
}

/// RFC 5214, 6.1: an interface identifier of 0:5efe or 200:5efe, then the IPv4 address.
fn isatap(address: Ipv6Addr) -> Option<Ipv4Addr> {
    let bits = address.to_bits();
    let mark = (bits >> 32) as u32;
    (mark & !0x0200_0000 == 0x5efe).then(|| Ipv4Addr::from_bits(bits as u32))
}

#[cfg(test)]
mod tests {
    use ipnet::IpNet;

    use super::*;

    /// A neighbour of a range is public, or belongs to another that is refused.
    #[derive(PartialEq, Debug)]
    enum Beside {
        Public,
        Refused,
    }
    use Beside::{Public, Refused};

    /// Every row of the IANA IPv4 and IPv6 Special-Purpose Address Registries, and multicast; what
    /// lies just below, and what just above.
    const REGISTRIES: [(&str, Beside, Beside); 52] = [
        ("0.0.0.0/8", Refused, Public),
        ("0.0.0.0/32", Refused, Refused),
        ("10.0.0.0/8", Public, Public),
        ("100.64.0.0/10", Public, Public),
        ("127.0.0.0/8", Public, Public),
        ("169.254.0.0/16", Public, Public),
        ("172.16.0.0/12", Public, Public),
        ("192.0.0.0/24", Public, Public),
        ("192.0.0.0/29", Public, Refused),
        ("192.0.0.8/32", Refused, Refused),
        ("192.0.0.9/32", Refused, Refused),
        ("192.0.0.10/32", Refused, Refused),
        ("192.0.0.170/32", Refused, Refused),
        ("192.0.0.171/32", Refused, Refused),
        ("192.0.2.0/24", Public, Public),
        ("192.31.196.0/24", Public, Public),
        ("192.52.193.0/24", Public, Public),
        ("192.88.99.0/24", Public, Public),
        ("192.88.99.2/32", Refused, Refused),
        ("192.168.0.0/16", Public, Public),
        ("192.175.48.0/24", Public, Public),
        ("198.18.0.0/15", Public, Public),
        ("198.51.100.0/24", Public, Public),
        ("203.0.113.0/24", Public, Public),
        ("224.0.0.0/4", Public, Refused),
        ("240.0.0.0/4", Refused, Refused),
        ("255.255.255.255/32", Refused, Refused),
        ("::1/128", Refused, Refused),
        ("::/128", Refused, Refused),
        ("::ffff:0:0/96", Refused, Refused),
        ("64:ff9b::/96", Refused, Refused),
        ("64:ff9b:1::/48", Refused, Refused),
        ("100::/64", Refused, Refused),
        ("100:0:0:1::/64", Refused, Refused),
        ("2001::/23", Public, Public),
        ("2001::/32", Public, Refused),
        ("2001:1::1/128", Refused, Refused),
        ("2001:1::2/128", Refused, Refused),
        ("2001:1::3/128", Refused, Refused),
        ("2001:2::/48", Refused, Refused),
        ("2001:3::/32", Refused, Refused),
        ("2001:4:112::/48", Refused, Refused),
        ("2001:10::/28", Refused, Refused),
        ("2001:20::/28", Refused, Refused),
        ("2001:30::/28", Refused, Refused),
        ("2001:db8::/32", Public, Public),
        ("2002::/16", Public, Public),
        ("2620:4f:8000::/48", Public, Public),
        ("3fff::/20", Public, Public),
        ("5f00::/16", Refused, Refused),
        ("fc00::/7", Refused, Refused),
        ("fe80::/10", Refused, Refused),
    ];

    /// The address so far from this one, if there is one.
    fn beside(address: IpAddr, step: i8) -> Option<IpAddr> {
        match address {
            IpAddr::V4(address) => {
                address.to_bits().checked_add_signed(step.into()).map(|bits| Ipv4Addr::from_bits(bits).into())
            }
            IpAddr::V6(address) => {
                address.to_bits().checked_add_signed(step.into()).map(|bits| Ipv6Addr::from_bits(bits).into())
            }
        }
    }

    #[test]
    fn every_range_ends_where_the_registries_say() {
        for (range, below, above) in REGISTRIES {
            let net: IpNet = range.parse().unwrap();
            for inside in [net.network(), net.broadcast()] {
                assert!(special(inside).is_some(), "{inside} of {range} passes");
            }
            for (address, expected) in [(beside(net.network(), -1), below), (beside(net.broadcast(), 1), above)] {
                let Some(address) = address else {
                    // Nothing lies beside the first and the last of all addresses.
                    assert_eq!(expected, Refused, "{range}");
                    continue;
                };
                let found = if special(address).is_some() { Refused } else { Public };
                assert_eq!(found, expected, "{address} beside {range}");
            }
        }
    }

    #[test]
    fn what_is_beyond_the_registries_is_refused_too() {
        for (address, what) in [
            ("100.100.100.200", "metadata"),
            ("168.63.129.16", "metadata"),
            ("169.254.169.254", "metadata"),
            ("192.0.0.192", "metadata"),
            ("fd00:ec2::254", "metadata"),
            ("fd20:ce::254", "metadata"),
            ("224.0.0.1", "multicast"),
            ("239.255.255.255", "multicast"),
            ("ff02::1", "multicast"),
            ("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", "multicast"),
            ("fec0::1", "site-local"),
            ("4000::1", "reserved"),
            ("1fff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", "reserved"),
            ("::7f00:1", "written as IPv6"),
            ("::ffff:0:7f00:1", "translated"),
            ("2606:4700::5efe:7f00:1", "loopback"),
            ("2606:4700::200:5efe:a00:1", "private"),
        ] {
            let found = special(address.parse().unwrap()).unwrap_or_else(|| panic!("{address} passes"));
            assert!(found.contains(what), "{address}: {found}");
        }
        for public in ["1.1.1.1", "8.8.8.8", "2606:4700::1111", "2a00:1450::1", "2606:4700::5efe:808:808"] {
            assert_eq!(special(public.parse().unwrap()), None, "{public}");
        }
    }

    #[test]
    fn what_an_address_stands_for_is_found() {
        for (address, inner) in [
            ("::ffff:10.1.2.3", &["10.1.2.3"][..]),
            ("::ffff:0:10.1.2.3", &["10.1.2.3"]),
            ("::10.1.2.3", &["10.1.2.3"]),
            ("64:ff9b::10.1.2.3", &["10.1.2.3"]),
            // RFC 6052, 2.4, the row of the 48-bit prefix.
            ("64:ff9b:1:c000:2:2100::", &["192.0.2.33", "0.0.0.0"]),
            ("2002:a01:203::1", &["10.1.2.3"]),
            // RFC 4380, 4: client 10.1.2.3, server 65.54.227.120.
            ("2001:0:4136:e378:8000:63bf:f5fe:fdfc", &["65.54.227.120", "10.1.2.3"]),
            ("2606:4700::5efe:10.1.2.3", &["10.1.2.3"]),
            ("::1", &[]),
            ("::", &[]),
            ("2606:4700::1", &[]),
            ("10.1.2.3", &[]),
        ] {
            let found: Vec<_> = embedded(address.parse().unwrap()).collect();
            let expected: Vec<IpAddr> = inner.iter().map(|inner| inner.parse().unwrap()).collect();
            assert_eq!(found, expected, "{address}");
        }
    }
}
