//! The PROXY protocol, versions 1 and 2: a proxy in front says at the start of a connection which client it is for
//! (<https://www.haproxy.org/download/3.0/doc/proxy-protocol.txt>).

use pingora::protocols::{Stream, l4::stream::Stream as Socket};
use ppp::{HeaderResult, PartialResult as _, v1, v2};
use std::{
    io,
    net::{IpAddr, SocketAddr},
    time::Duration,
};
use tokio::{io::AsyncReadExt as _, time::timeout};

/// The longest header that is read: one of version 2 with its addresses and some attributes.
const LONGEST: usize = 1024;
/// The longest header of version 1, with the end of its line.
const LONGEST_LINE: usize = 107;

/// The connection begins with something else.
const NONE: &str = "no PROXY header; listen.proxy_protocol is for proxies that send one";

/// Reads the header at the start of a connection, within `limit`. Returns the connection from behind the header, and the client's address; `None` if the
/// proxy speaks for itself (a health check) or does not know it.
///
/// # Errors
/// A text: the connection does not begin with such a header.
pub(crate) async fn read(stream: Stream, limit: Duration) -> Result<(Stream, Option<SocketAddr>), String> {
    let mut socket = *stream.into_any().downcast::<Socket>().map_err(|_| "not a socket".to_owned())?;
    let mut bytes = Vec::with_capacity(LONGEST);
    let (length, client) =
        timeout(limit, read_header(&mut socket, &mut bytes)).await.map_err(|_| "no PROXY header in time".to_owned())??;
    socket.rewind(&bytes[length..]);
    Ok((Box::new(socket), client))
}

async fn read_header(socket: &mut Socket, bytes: &mut Vec<u8>) -> Result<(usize, Option<SocketAddr>), String> {
    loop {
        let left = LONGEST.saturating_sub(bytes.len()) as u64;
        let read = socket.take(left).read_buf(bytes).await.map_err(|error: io::Error| error.to_string())?;
        if read == 0 {
            return Err(if left == 0 { "a PROXY header that does not end" } else { "closed before the end of a PROXY header" }.to_owned());
        }
        if let Some(found) = parse(bytes)? {
            return Ok(found);
        }
    }
}

/// The length of the header, and the client's address. `None`: it is not complete yet.
///
/// # Errors
/// A text: this is no such header.
pub fn parse(bytes: &[u8]) -> Result<Option<(usize, Option<SocketAddr>)>, String> {
    const LINE: &[u8] = b"PROXY ";
    let begins = |with: &[u8]| with.starts_with(&bytes[..bytes.len().min(with.len())]);
    let is_line = begins(LINE);
    // The library takes some other beginnings for a header that is not complete.
    if !is_line && !begins(v2::PROTOCOL_PREFIX) {
        return Err(NONE.to_owned());
    }
    // It takes a line of version 1 that is not complete for a wrong one if it ends in the wrong part.
    if is_line && bytes.len() < LONGEST_LINE && !bytes.windows(2).any(|end| end == b"\r\n") {
        return Ok(None);
    }
    let result = HeaderResult::parse(bytes);
    if result.is_incomplete() {
        // A line that has ended does not become complete.
        return if is_line { Err(NONE.to_owned()) } else { Ok(None) };
    }
    match result {
        // The library takes any byte behind a carriage return for the line feed.
        HeaderResult::V1(Ok(header)) if header.header.ends_with("\r\n") => {
            let client = match header.addresses {
                v1::Addresses::Tcp4(found) => Some(SocketAddr::new(IpAddr::V4(found.source_address), found.source_port)),
                v1::Addresses::Tcp6(found) => Some(SocketAddr::new(IpAddr::V6(found.source_address), found.source_port)),
                v1::Addresses::Unknown => None,
            };
            Ok(Some((header.header.len(), client)))
        }
        HeaderResult::V2(Ok(header)) => {
            let client = match header.addresses {
                _ if header.command == v2::Command::Local => None,
                v2::Addresses::IPv4(found) => Some(SocketAddr::new(IpAddr::V4(found.source_address), found.source_port)),
                v2::Addresses::IPv6(found) => Some(SocketAddr::new(IpAddr::V6(found.source_address), found.source_port)),
                v2::Addresses::Unix(_) | v2::Addresses::Unspecified => None,
            };
            Ok(Some((header.len(), client)))
        }
        HeaderResult::V1(_) | HeaderResult::V2(Err(_)) => Err(NONE.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn both_versions() {
        let one = b"PROXY TCP4 192.0.2.7 192.0.2.1 4711 443\r\nGET /";
        assert_eq!(parse(one), Ok(Some((41, Some("192.0.2.7:4711".parse().unwrap())))));
        let six = b"PROXY TCP6 2001:db8::7 2001:db8::1 4711 443\r\n";
        assert_eq!(parse(six), Ok(Some((six.len(), Some("[2001:db8::7]:4711".parse().unwrap())))));
        assert_eq!(parse(b"PROXY UNKNOWN\r\nGET"), Ok(Some((15, None))));
        for part in 0..41 {
            assert_eq!(parse(&one[..part]), Ok(None), "{part}");
        }
        let mut two = v2::PROTOCOL_PREFIX.to_vec();
        two.extend([0x21, 0x11, 0, 12, 192, 0, 2, 7, 192, 0, 2, 1, 0x12, 0x67, 1, 187]);
        two.extend(b"GET");
        assert_eq!(parse(&two), Ok(Some((28, Some("192.0.2.7:4711".parse().unwrap())))));
        for part in 0..28 {
            assert_eq!(parse(&two[..part]), Ok(None), "{part}");
        }
        // LOCAL: a health check.
        two[12] = 0x20;
        assert_eq!(parse(&two), Ok(Some((28, None))));
        for wrong in [
            &b"GET / HTTP/1.1\r\n"[..],
            b"\x16\x03\x01\x02\x00\x01",
            b"P\rP6 x",
            b"PROXY UNKNOWN \rGET / HTTP/1.1\r\n",
            b"PROXY TCP4 192.0.2.7 192.0.2.1 4711 443\rGET / HTTP/1.1\r\n",
            b"PROXY TCP4 x y 1 2\r\n",
            b"PROXY TCP4 192.0.2.7 192.0.2.1 4711 99999\r\n",
            &[b"PROXY ", &[b'x'; 200][..]].concat(),
        ] {
            assert!(parse(wrong).is_err(), "{wrong:?}");
        }
    }

    proptest! {
        #[test]
        fn never_panics(bytes in prop::collection::vec(any::<u8>(), 0..300), one in any::<bool>()) {
            let mut all = if one { b"PROXY ".to_vec() } else { v2::PROTOCOL_PREFIX.to_vec() };
            let _ = parse(&bytes);
            all.extend(bytes);
            if let Ok(Some((length, _))) = parse(&all) {
                prop_assert!(length <= all.len());
            }
        }
    }
}
