//! Finds the client's address behind proxies: `X-Forwarded-For`, and `Forwarded` (RFC 7239).
//!
//! Anybody can send such a field. Each proxy appends the address that it got the request from. So the list is read from its end: while an
//! address is a trusted proxy's, the address before it is reliable. The first address that is not a trusted proxy's is the client.

use crate::fields::Fields;
// Only the type: nothing here opens a connection.
use core::net::{IpAddr, Ipv6Addr, SocketAddrV6};

/// The most addresses that are read, from the end of the list. Few chains have more than five, and a client could send many.
const MOST: usize = 32;

/// The client's address of a request whose connection comes from `peer`. `trusted` says whether an address is a trusted proxy's.
///
/// If `peer` is not a trusted proxy, it is the client. If all addresses are trusted proxies, the client is the first one. An element that
/// is malformed, or hides its address, ends the list: the elements before it are not reliable.
pub fn client(peer: IpAddr, fields: &impl Fields, trusted: impl Fn(&IpAddr) -> bool) -> IpAddr {
    let mut client = peer.to_canonical();
    if !trusted(&client) {
        return client;
    }
    let mut seen = 0;
    // Proxies write one of the two. If both exist, the older one is complete: even proxies that do not know the other one append to it.
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

/// Parses an address as proxies write it: with or without a port, and IPv6 with or without brackets. `unknown` and names give `None`.
fn address(text: &[u8]) -> Option<IpAddr> {
    let text = str::from_utf8(text).ok()?;
    let address = if let Ok(address) = text.parse::<IpAddr>() {
        address
    } else if let Some(rest) = text.strip_prefix('[') {
        let (address, port) = rest.split_once(']')?;
        if !(port.is_empty() || port.strip_prefix(':').is_some_and(is_port)) {
            return None;
        }
        // Without the zone, which has no meaning on other hosts.
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

/// Whether this is a port, or an obfuscated port (RFC 7239, section 6).
fn is_port(text: &str) -> bool {
    let digits = (1..=5).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_digit());
    digits || text.strip_prefix('_').is_some_and(|rest| !rest.is_empty() && rest.bytes().all(is_obfuscated))
}

const fn is_obfuscated(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-')
}

/// The value of `for=` in each element of a `Forwarded`; `None` for an element without it. Returns `None` if the field is malformed:
/// after a quote that does not end, elements cannot be separated.
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
            // A list may have empty elements (RFC 9110, section 5.6.1).
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

/// A token or a quoted string, and the rest of the text.
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
            // From an address that is not a trusted proxy, the field is ignored.
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
        fn no_field_of_a_client_breaks_it(text in "[ -~\\t]{0,200}") {
            for name in ["x-forwarded-for", "forwarded"] {
                let spoofed = format!("{text}, {}198.51.100.1", if name == "forwarded" { "for=" } else { "" });
                // If the client's own part is malformed, the whole `Forwarded` is; then the nearest proxy is the client.
                let client = of("10.0.0.1", &[(name, &spoofed)]);
                proptest::prop_assert!(client == "198.51.100.1" || (name == "forwarded" && client == "10.0.0.1"), "{}", client);
            }
        }
    }
}
