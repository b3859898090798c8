//! The hosts that a route may be led to, and the addresses that none may lead to.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use url::Host;

/// A list of hosts, such as the key `redirects` of a route.
///
/// | pattern | matches |
/// | --- | --- |
/// | `cdn.example` | this host, at the port that is usual for the scheme |
/// | `cdn.example:8443` | this host at this port |
/// | `*.cdn.example` | each host below `cdn.example`, but not itself; at the usual port |
/// | `*.cdn.example:8443` | the same at this port |
///
/// A host is a name or an address; one of IPv6 stands in brackets. Case does not matter.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hosts(Vec<Pattern>);

#[derive(Clone, Debug, PartialEq, Eq)]
struct Pattern {
    host: Host,
    is_wildcard: bool,
    port: Option<u16>,
}

/// How a list has a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Listed {
    /// By its name or address. Then its address may be private: the operator has written it down.
    Exactly,
    /// Below a wildcard.
    ByWildcard,
}

/// A text that is no pattern for hosts.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no host; write HOST, HOST:PORT, *.HOST or *.HOST:PORT")]
pub struct BadHost(pub String);

impl Hosts {
    /// Parses the patterns.
    ///
    /// # Errors
    /// The first one that is none.
    pub fn parse<T: AsRef<str>>(patterns: &[T]) -> Result<Self, BadHost> {
        let parsed = patterns.iter().map(|text| Pattern::parse(text.as_ref()).ok_or_else(|| BadHost(text.as_ref().to_owned())));
        parsed.collect::<Result<_, _>>().map(Self)
    }

    /// Whether the list has this host, and how. `scheme`: `http` or `https`. `host`: as in a URL.
    pub fn allows(&self, scheme: &str, host: &str, port: u16) -> Option<Listed> {
        let host = parse_host(host)?;
        let listed = |is_wildcard| self.0.iter().any(|pattern| pattern.is_wildcard == is_wildcard && pattern.matches(scheme, &host, port));
        match () {
            () if listed(false) => Some(Listed::Exactly),
            () if listed(true) => Some(Listed::ByWildcard),
            () => None,
        }
    }
}

impl Pattern {
    fn parse(text: &str) -> Option<Self> {
        let (text, is_wildcard) = text.strip_prefix("*.").map_or((text, false), |rest| (rest, true));
        // The last colon, unless it is within the brackets of an address.
        let (host, port) = match text.rsplit_once(':') {
            Some((host, port)) if !port.ends_with(']') => (host, Some(parse_port(port)?)),
            _ => (text, None),
        };
        // A colon that is left is one of an address without brackets.
        let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._[]:".contains(&byte) || byte >= 0x80;
        if !host.bytes().all(is_plain) || (host.contains(':') && !host.starts_with('[')) {
            return None;
        }
        let host = parse_host(host)?;
        (!is_wildcard || matches!(host, Host::Domain(_))).then_some(Self { host, is_wildcard, port })
    }

    fn matches(&self, scheme: &str, host: &Host, port: u16) -> bool {
        let usual = || match scheme {
            "http" => Some(80),
            "https" => Some(443),
            _ => None,
        };
        self.port.or_else(usual) == Some(port)
            && match (&self.host, host) {
                (Host::Domain(own), Host::Domain(name)) if self.is_wildcard => {
                    name.strip_suffix(own).and_then(|before| before.strip_suffix('.')).is_some_and(|before| !before.is_empty())
                }
                (own, host) => !self.is_wildcard && own == host,
            }
    }
}

fn parse_port(text: &str) -> Option<u16> {
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok())?.filter(|port| *port != 0)
}

/// A host in the spelling of URLs. The dot at the end of an absolute name is left out: the host is the same.
fn parse_host(text: &str) -> Option<Host> {
    match Host::parse(text).ok()? {
        Host::Domain(name) => {
            let name = name.strip_suffix('.').unwrap_or(&name);
            let is_sound = !name.is_empty() && name.split('.').all(|label| !label.is_empty());
            is_sound.then(|| Host::Domain(name.to_owned()))
        }
        address => Some(address),
    }
}

/// Whether an address is one that a server on the internet may not lead to: of this machine, of a private network, or of no single machine. Addresses of
/// IPv6 that stand for such an address of IPv4 count too.
pub fn is_private(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => is_private_v4(address),
        IpAddr::V6(address) => is_private_v6(address),
    }
}

const fn is_private_v4(address: Ipv4Addr) -> bool {
    let [a, b, c, _] = address.octets();
    address.is_private()
        || address.is_loopback()
        || address.is_link_local()
        || address.is_multicast()
        || address.is_documentation()
        // "This network", shared addresses of carriers (RFC 6598), protocol assignments, benchmarks, and the reserved rest with the broadcast address.
        || a == 0
        || (a == 100 && b & 0xc0 == 64)
        || (a == 192 && b == 0 && c == 0)
        || (a == 198 && b & 0xfe == 18)
        || a >= 240
}

fn is_private_v6(address: Ipv6Addr) -> bool {
    let segments = address.segments();
    let embedded = |high: u16, low: u16| is_private_v4(Ipv4Addr::from(u32::from(high) << 16 | u32::from(low)));
    match segments {
        // Unspecified, loopback, and compatible addresses (RFC 4291): ::/96. Mapped ones: ::ffff:0:0/96; translated ones (RFC 2765): ::ffff:0:0:0/96.
        [0, 0, 0, 0, 0, 0, 0, 0 | 1] => true,
        [0, 0, 0, 0, 0, 0 | 0xffff, high, low] | [0, 0, 0, 0, 0xffff, 0, high, low] => embedded(high, low),
        // NAT64 (RFC 6052), and its prefix for local use (RFC 8215).
        [0x64, 0xff9b, 0, 0, 0, 0, high, low] => embedded(high, low),
        [0x64, 0xff9b, 1, ..] => true,
        // Teredo (RFC 4380) has the server's address, and the client's with its bits inverted.
        [0x2001, 0, high, low, _, _, not_high, not_low] => embedded(high, low) || embedded(!not_high, !not_low),
        // 6to4 (RFC 3056).
        [0x2002, high, low, ..] => embedded(high, low),
        // ISATAP (RFC 5214).
        [_, _, _, _, 0 | 0x200, 0x5efe, high, low] if embedded(high, low) => true,
        // Discard-only, documentation, unique local, link-local, site-local (once), multicast.
        [0x100, 0, 0, 0, ..] | [0x2001, 0xdb8, ..] | [0x3fff, 0..=0xfff, ..] => true,
        [first, ..] => first & 0xfe00 == 0xfc00 || first & 0xff80 == 0xfe80 || first >= 0xff00,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn hosts_of_a_list() {
        let hosts = Hosts::parse(&[
            "cdn.example",
            "Files.Example:8443",
            "*.s3.example",
            "*.r2.example:9000",
            "10.0.0.1",
            "[fd00::1]:80",
            "bücher.example",
            "a_b.example",
            "dot.example.",
        ])
        .unwrap();
        for (scheme, host, port, expected) in [
            ("https", "cdn.example", 443, Some(Listed::Exactly)),
            ("http", "CDN.example", 80, Some(Listed::Exactly)),
            ("https", "cdn.example.", 443, Some(Listed::Exactly)),
            ("https", "cdn.example", 80, None),
            ("https", "x.cdn.example", 443, None),
            ("https", "files.example", 8443, Some(Listed::Exactly)),
            ("https", "files.example", 443, None),
            ("https", "a.s3.example", 443, Some(Listed::ByWildcard)),
            ("https", "a.b.s3.example", 443, Some(Listed::ByWildcard)),
            ("https", "s3.example", 443, None),
            ("https", ".s3.example", 443, None),
            ("https", "xs3.example", 443, None),
            ("https", "a.s3.example.evil.example", 443, None),
            ("https", "a.r2.example", 9000, Some(Listed::ByWildcard)),
            ("https", "a.r2.example", 443, None),
            ("http", "10.0.0.1", 80, Some(Listed::Exactly)),
            ("http", "0xa.0.0.1", 80, Some(Listed::Exactly)),
            ("http", "10.0.0.10", 80, None),
            ("https", "[fd00::1]", 80, Some(Listed::Exactly)),
            ("https", "[FD00:0::1]", 80, Some(Listed::Exactly)),
            ("https", "[fd00::1]", 443, None),
            ("https", "xn--bcher-kva.example", 443, Some(Listed::Exactly)),
            ("https", "a_b.example", 443, Some(Listed::Exactly)),
            ("https", "dot.example", 443, Some(Listed::Exactly)),
            ("ftp", "cdn.example", 443, None),
            ("ftp", "files.example", 8443, Some(Listed::Exactly)),
            ("https", "", 443, None),
        ] {
            assert_eq!(hosts.allows(scheme, host, port), expected, "{scheme} {host} {port}");
        }
        let both = Hosts::parse(&["*.example", "a.example"]).unwrap();
        assert_eq!(both.allows("https", "a.example", 443), Some(Listed::Exactly));
        assert_eq!(Hosts::default().allows("https", "a.example", 443), None);
    }

    #[test]
    fn what_is_no_host() {
        for text in [
            "",
            "*",
            "*.",
            "*.*.example",
            "a.*.example",
            "a*.example",
            "a:0",
            "a:",
            "a:+1",
            "a:65536",
            "a:b",
            ":80",
            "https://a",
            "a/b",
            "a b",
            "u@a",
            "fd00::1",
            "[fd00::1",
            "[::1]x",
            "*.10.0.0.1",
            "*.[::1]",
            "a..b",
            ".a",
            "a%2eb",
            "a,b",
        ] {
            assert_eq!(Hosts::parse(&["a.example", text]), Err(BadHost(text.into())), "{text}");
        }
    }

    #[test]
    fn private_addresses() {
        for address in [
            "0.0.0.0",
            "0.1.2.3",
            "10.0.0.1",
            "100.64.0.1",
            "100.127.255.255",
            "127.0.0.1",
            "127.9.9.9",
            "169.254.169.254",
            "172.16.0.1",
            "172.31.255.255",
            "192.0.0.1",
            "192.0.2.1",
            "192.168.1.1",
            "198.18.0.1",
            "198.19.255.255",
            "198.51.100.1",
            "203.0.113.1",
            "224.0.0.1",
            "239.255.255.255",
            "240.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "::7f00:1",
            "::ffff:10.0.0.1",
            "::ffff:169.254.169.254",
            "::ffff:0:127.0.0.1",
            "64:ff9b::192.168.0.1",
            "64:ff9b:1::808:808",
            "100::1",
            "2001:db8::1",
            "3fff::1",
            "2002:7f00:1::1",
            "2002:c0a8:101::",
            "2001:0:7f00:1::1",
            "2001:0:808:808:0:0:80ff:fffe",
            "fc00::1",
            "fd12::1",
            "fe80::1",
            "febf::1",
            "fec0::1",
            "ff02::1",
            "2a00::5efe:10.0.0.1",
            "2a00::200:5efe:10.0.0.1",
        ] {
            assert!(is_private(address.parse().unwrap()), "{address}");
        }
        for address in [
            "1.1.1.1",
            "8.8.8.8",
            "9.255.255.255",
            "11.0.0.0",
            "100.63.255.255",
            "100.128.0.0",
            "126.255.255.255",
            "169.253.0.1",
            "172.15.0.1",
            "172.32.0.1",
            "192.0.1.1",
            "192.167.0.1",
            "198.17.0.1",
            "198.20.0.1",
            "223.255.255.255",
            "2606:4700::1111",
            "2a00:1450::1",
            "::ffff:8.8.8.8",
            "64:ff9b::8.8.8.8",
            "2002:808:808::1",
            "2001:0:808:808:0:0:f7f7:f7f7",
            "2001:4860::8888",
            "2a00::5efe:8.8.8.8",
            "3fff:1000::1",
        ] {
            assert!(!is_private(address.parse().unwrap()), "{address}");
        }
    }

    proptest! {
        #[test]
        fn an_address_of_ipv4_is_the_same_within_ipv6(octets: [u8; 4]) {
            let [a, b, c, d] = octets;
            let (high, low) = (u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]));
            let private = is_private(Ipv4Addr::from(octets).into());
            for around in [[0, 0, 0, 0, 0, 0xffff, high, low], [0x64, 0xff9b, 0, 0, 0, 0, high, low], [0x2002, high, low, 1, 2, 3, 4, 5]] {
                prop_assert_eq!(is_private(Ipv6Addr::from(around).into()), private);
            }
        }

        #[test]
        fn no_text_panics(pattern in "[*.a-c:0-9\\[\\]é%]{0,20}", host in "[.a-c:0-9\\[\\]é%]{0,20}") {
            if let Ok(hosts) = Hosts::parse(&[&pattern]) {
                let _ = hosts.allows("https", &host, 443);
            }
            // A host that stands in the list is one of it.
            if let Ok(hosts) = Hosts::parse(&[&host]) && !host.contains(':') {
                prop_assert_eq!(hosts.allows("https", &host, 443), Some(Listed::Exactly));
            }
        }
    }
}
