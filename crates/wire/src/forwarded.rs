//! Who the client is, where proxies stand in front: `X-Forwarded-For`, and `Forwarded` (RFC 7239).
//!
//! Anybody can write such a field. So each address in the list is believed only as far as the one that added it is: the list is read from
//! its end, where the nearest proxy wrote, and the first address that is no trusted proxy's is the client.

use crate::fields::Fields;
// An address is a value, and nothing here connects to it.
use core::net::{IpAddr, Ipv6Addr, SocketAddrV6};

/// The most addresses that are looked at, from the end of the list. Few chains have more than five, and a client could write many.
const MOST: usize = 32;

/// The client of a request that came from `peer`. `trusted` says whose word counts.
///
/// Without a trusted proxy that is the peer. With proxies alone it is the one that is farthest away. An element that cannot be read, or
/// hides its address, ends the list: the addresses behind it cannot be trusted.
pub fn client(peer: IpAddr, fields: &impl Fields, trusted: impl Fn(&IpAddr) -> bool) -> IpAddr {
    let mut client = peer.to_canonical();
    if !trusted(&client) {
        return client;
    }
    let mut seen = 0;
    // Proxies write one of the two. If both are there, the older one is what proxies that know nothing of the other have added to.
    let mut x_forwarded_for = fields.values("x-forwarded-for").rev().peekable();
    if x_forwarded_for.peek().is_some() {
        for element in x_forwarded_for.flat_map(|list| list.rsplit(|byte| *byte == b',')) {
            seen += 1;
            match address(element.trim_ascii()) {
                Some(next) if seen <= MOST => client = next,
                _ => return client,
            }
            if !trusted(&client) {
                return client;
            }
        }
        return client;
    }
    for list in fields.values("forwarded").rev() {
        let Some(nodes) = nodes_of(list) else { return client };
        for node in nodes.into_iter().rev() {
            seen += 1;
            match node.and_then(|node| address(&node)) {
                Some(next) if seen <= MOST => client = next,
                _ => return client,
            }
            if !trusted(&client) {
                return client;
            }
        }
    }
    client
}

/// An address as proxies write it: with or without a port, an IPv6 address with or without brackets. `unknown` and names are none.
fn address(text: &[u8]) -> Option<IpAddr> {
    let text = str::from_utf8(text).ok()?;
    let address = if let Ok(address) = text.parse::<IpAddr>() {
        address
    } else if let Some(rest) = text.strip_prefix('[') {
        let (address, port) = rest.split_once(']')?;
        if !(port.is_empty() || port.strip_prefix(':').is_some_and(is_port)) {
            return None;
        }
        // With a zone, which means nothing elsewhere.
        let zoned = || format!("[{address}]:0").parse::<SocketAddrV6>().ok().map(|address| *address.ip());
        IpAddr::V6(address.parse::<Ipv6Addr>().ok().or_else(zoned)?)
    } else {
        let (address, port) = text.split_once(':')?;
        if !is_port(port) {
            return None;
        }
        IpAddr::V4(address.parse().ok()?)
    };
    Some(address.to_canonical())
}

/// A port, or one that is hidden (RFC 7239, section 6).
fn is_port(text: &str) -> bool {
    let digits = (1..=5).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_digit());
    digits || text.strip_prefix('_').is_some_and(|rest| !rest.is_empty() && rest.bytes().all(is_obfuscated))
}

const fn is_obfuscated(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-')
}

/// What `for=` says in each element of a `Forwarded`; none in an element without it. None at all if the field is malformed: what stands
/// behind a quote that does not end belongs to nobody.
///
/// Linear in the field's length, which `limits.max_header_bytes` bounds.
fn nodes_of(field: &[u8]) -> Option<Vec<Option<Vec<u8>>>> {
    let mut nodes = Vec::new();
    let mut node = None;
    let mut rest = field.trim_ascii();
    loop {
        if let Some(found) = rest.iter().position(|byte| matches!(byte, b'=' | b',' | b';')).filter(|at| rest[*at] == b'=') {
            let name = rest[..found].trim_ascii();
            let (value, after) = value_of(&rest[found + 1..])?;
            if name.eq_ignore_ascii_case(b"for") && node.replace(value).is_some() {
                return None;
            }
            rest = after.trim_ascii_start();
        } else {
            // An empty pair, as a list may have (RFC 9110, section 5.6.1).
            let end = rest.iter().position(|byte| matches!(byte, b',' | b';')).unwrap_or(rest.len());
            if !rest[..end].trim_ascii().is_empty() {
                return None;
            }
            rest = &rest[end..];
        }
        match rest.split_first() {
            None => {
                nodes.push(node);
                return Some(nodes);
            }
            Some((b';', after)) => rest = after.trim_ascii_start(),
            Some((b',', after)) => {
                nodes.push(node.take());
                rest = after.trim_ascii_start();
            }
            Some(_) => return None,
        }
    }
}

/// A token or a quoted string, and what follows it.
fn value_of(text: &[u8]) -> Option<(Vec<u8>, &[u8])> {
    let text = text.trim_ascii_start();
    let Some(quoted) = text.strip_prefix(b"\"") else {
        let end = text.iter().position(|byte| matches!(byte, b',' | b';')).unwrap_or(text.len());
        return Some((text[..end].trim_ascii().to_vec(), &text[end..]));
    };
    let (mut value, mut bytes) = (Vec::new(), quoted.iter());
    loop {
        match bytes.next()? {
            b'"' => return Some((value, bytes.as_slice())),
            b'\\' => value.push(*bytes.next()?),
            byte => value.push(*byte),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::{HeaderMap, HeaderName, HeaderValue};

    fn of(peer: &str, fields: &[(&str, &str)]) -> String {
        let mut headers = HeaderMap::new();
        for (name, value) in fields {
            headers.append(HeaderName::try_from(*name).unwrap(), HeaderValue::from_bytes(value.as_bytes()).unwrap());
        }
        // Proxies are in 10.0.0.0/8 and in fd00::/8.
        let trusted = |address: &IpAddr| match address {
            IpAddr::V4(address) => address.octets()[0] == 10,
            IpAddr::V6(address) => address.octets()[0] == 0xfd,
        };
        client(peer.parse().unwrap(), &headers, trusted).to_string()
    }

    #[test]
    fn x_forwarded_for() {
        for (fields, expected) in [
            (&[][..], "10.0.0.1"),
            (&["192.0.2.1"], "192.0.2.1"),
            (&["192.0.2.1, 10.0.0.2"], "192.0.2.1"),
            (&["192.0.2.9, 192.0.2.1 ,10.0.0.2"], "192.0.2.1"),
            (&["192.0.2.9", "192.0.2.1, 10.0.0.2", "10.0.0.3"], "192.0.2.1"),
            (&["10.0.0.4, 10.0.0.3"], "10.0.0.4"),
            (&["192.0.2.1:1234"], "192.0.2.1"),
            (&["2001:db8::1"], "2001:db8::1"),
            (&["[2001:db8::1]"], "2001:db8::1"),
            (&["[2001:db8::1]:443"], "2001:db8::1"),
            (&["[fe80::1%3]:443"], "fe80::1"),
            (&["::ffff:192.0.2.1"], "192.0.2.1"),
            (&["::ffff:10.0.0.5"], "10.0.0.5"),
            (&["unknown"], "10.0.0.1"),
            (&["192.0.2.1, unknown, 10.0.0.2"], "10.0.0.2"),
            (&["192.0.2.1,"], "10.0.0.1"),
            (&["192.0.2.1, <script>, 10.0.0.2"], "10.0.0.2"),
            (&["192.0.2.1:"], "10.0.0.1"),
            (&["192.0.2.1:99999999"], "10.0.0.1"),
            (&["[2001:db8::1"], "10.0.0.1"),
            (&["[2001:db8::1]443"], "10.0.0.1"),
            (&["é"], "10.0.0.1"),
        ] {
            let fields: Vec<_> = fields.iter().map(|value| ("x-forwarded-for", *value)).collect();
            assert_eq!(of("10.0.0.1", &fields), expected, "{fields:?}");
            assert_eq!(of("::ffff:10.0.0.1", &fields), expected, "{fields:?}");
            // From somebody else it means nothing.
            assert_eq!(of("203.0.113.7", &fields), "203.0.113.7");
        }
    }

    #[test]
    fn forwarded() {
        for (fields, expected) in [
            (&["for=192.0.2.1"][..], "192.0.2.1"),
            (&["For=\"192.0.2.1\";proto=https;by=10.0.0.1"], "192.0.2.1"),
            (&["proto=http; for=192.0.2.1 , for=10.0.0.2"], "192.0.2.1"),
            (&["for=\"[2001:db8::1]:4711\""], "2001:db8::1"),
            (&["for=\"[2001:db8::1]\", for=\"[fd00::2]:_hidden\""], "2001:db8::1"),
            (&["for=\"192.0.2.1:4711\""], "192.0.2.1"),
            (&["for=\"192.0.2\\.1\""], "192.0.2.1"),
            (&["for=192.0.2.9", "for=192.0.2.1, for=10.0.0.2"], "192.0.2.1"),
            (&["for=unknown"], "10.0.0.1"),
            (&["for=192.0.2.1, for=_hidden, for=10.0.0.2"], "10.0.0.2"),
            (&["for=192.0.2.1, proto=https"], "10.0.0.1"),
            (&["for=192.0.2.1;host=\"a,b;for=192.0.2.2\""], "192.0.2.1"),
            (&["for=192.0.2.1, , for=10.0.0.2"], "10.0.0.2"),
            (&["for=192.0.2.1;for=192.0.2.2"], "10.0.0.1"),
            (&["for=\"192.0.2.1"], "10.0.0.1"),
            (&["for=\"192.0.2.1\"x"], "10.0.0.1"),
            (&["192.0.2.1"], "10.0.0.1"),
            (&[""], "10.0.0.1"),
            (&["for"], "10.0.0.1"),
        ] {
            let fields: Vec<_> = fields.iter().map(|value| ("forwarded", *value)).collect();
            assert_eq!(of("10.0.0.1", &fields), expected, "{fields:?}");
            assert_eq!(of("203.0.113.7", &fields), "203.0.113.7");
        }
        assert_eq!(of("10.0.0.1", &[("forwarded", "for=192.0.2.2"), ("x-forwarded-for", "192.0.2.1")]), "192.0.2.1");
    }

    #[test]
    fn a_long_list_is_not_read_to_its_front() {
        let many = format!("192.0.2.1{}", ", 10.0.0.2".repeat(100));
        assert_eq!(of("10.0.0.1", &[("x-forwarded-for", &many)]), "10.0.0.2");
        let few = format!("192.0.2.1{}", ", 10.0.0.2".repeat(20));
        assert_eq!(of("10.0.0.1", &[("x-forwarded-for", &few)]), "192.0.2.1");
        let many = format!("for=192.0.2.1{}", ", for=10.0.0.2".repeat(100));
        assert_eq!(of("10.0.0.1", &[("forwarded", &many)]), "10.0.0.2");
    }

    proptest::proptest! {
        #[test]
        fn nothing_that_a_client_writes_stops_it(text in "[ -~\\t]{0,200}") {
            for name in ["x-forwarded-for", "forwarded"] {
                let spoofed = format!("{text}, {}198.51.100.1", if name == "forwarded" { "for=" } else { "" });
                // Where the client's own part is malformed, `Forwarded` as a whole cannot be read; nothing else is ever believed.
                let client = of("10.0.0.1", &[(name, &spoofed)]);
                proptest::prop_assert!(client == "198.51.100.1" || (name == "forwarded" && client == "10.0.0.1"), "{}", client);
            }
        }
    }
}
