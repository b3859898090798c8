//! Reads one request head from a connection, and checks it against every limit before castier spends memory on the request.
//!
//! Strict on purpose: a head that two parsers could read differently is refused. Only this file decides that.

use crate::http2::frames::PREFACE;
use bytes::{Buf, BufMut, BytesMut};
use castier_cache::{Budget, Lease};
use castier_cluster::{ASKED, Field, PROOF, Twice};
use castier_config::Limits;
use castier_upstream::via_header;
use castier_wire::{Fields, Target};
use http::{
    HeaderName, Method, StatusCode, Version, header,
    uri::{Authority, PathAndQuery},
};
use std::{
    borrow::Cow,
    future::poll_fn,
    io,
    mem::MaybeUninit,
    ops::Range,
    pin::Pin,
    sync::Arc,
    task::{Poll, ready},
    time::Duration,
};
use tokio::{
    io::{AsyncRead, ReadBuf},
    time::{Instant, timeout_at},
};

/// The size of the parser's array on the stack. The configuration does not accept a larger `limits.max_headers`.
const MAX_HEADERS: usize = 256;
/// The most bytes that one read gives.
const READ: usize = 4 << 10;

/// A complete and well-formed request head, at the front of the bytes that were read. Ranges are positions in those bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Head {
    /// Its length, including the empty line.
    pub len: usize,
    /// The method.
    pub method: Method,
    /// The path, without the query.
    path: Range<usize>,
    /// Scheme and authority, before the path; empty in origin form.
    authority: Range<usize>,
    /// The version of HTTP that the client speaks.
    pub version: Version,
    /// Asks to change the protocol, and has no body.
    pub upgrade: bool,
    /// A GET over HTTP/1.1 without a header that changes the answer, except `If-None-Match`. Its answer is the whole blob, or a 304.
    pub plain: bool,
    /// The client wants the connection closed after the answer.
    pub close: bool,
    /// `If-None-Match`. An empty range, which matches no entity tag, if the header is repeated.
    validator: Option<Range<usize>>,
    /// How the request's body is framed.
    pub framing: Framing,
    /// `Via` names this node: this node has sent the request before.
    pub looped: bool,
    /// `User-Agent`.
    user_agent: Option<Range<usize>>,
    /// It has one of the headers in [`INTRODUCING`].
    introduced: bool,
    /// `Authorization`. An empty range, which is no valid one, if the header is repeated.
    authorization: Option<Range<usize>>,
    /// A peer's proof. An empty range, which is no valid proof, if the header is repeated.
    proof: Option<Range<usize>>,
    /// Path and query.
    target: Range<usize>,
    /// The authority of a target in absolute form.
    pub absolute: Option<String>,
}

/// How a request's body is framed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    /// This many bytes; 0 if there is no body.
    Length(u64),
    /// In chunks.
    Chunked,
}

/// Why no request could be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NoHead {
    /// The client closed, or was idle for too long. There is nothing to answer.
    Closed,
    /// Refused, with the status and the reason for the client.
    Refused(StatusCode, String),
    /// `limits.client_memory` is used up, and the head is not complete yet.
    NoMemory,
    /// What came begins a connection of HTTP/2.
    Http2,
}

impl Head {
    /// The path. `bytes` must be the bytes that were parsed, here and below.
    pub fn path<'a>(&self, bytes: &'a [u8]) -> &'a str {
        bytes.get(self.path.clone()).and_then(|path| str::from_utf8(path).ok()).unwrap_or_default()
    }

    /// The proof that the request carries.
    pub fn proof<'a>(&self, bytes: &'a [u8]) -> Option<&'a [u8]> {
        bytes.get(self.proof.clone()?)
    }

    /// `Authorization`.
    pub fn authorization<'a>(&self, bytes: &'a [u8]) -> Option<&'a [u8]> {
        bytes.get(self.authorization.clone()?)
    }

    /// Path and query, as they came.
    pub fn path_and_query<'a>(&self, bytes: &'a [u8]) -> &'a str {
        bytes.get(self.target.clone()).and_then(|target| str::from_utf8(target).ok()).unwrap_or_default()
    }

    /// The host that the request is for: of a target in absolute form its authority, else `Host` (RFC 9112, section 3.2). Parses the head a second time,
    /// since only routes need it.
    pub fn host<'a>(&'a self, bytes: &'a [u8]) -> Option<&'a str> {
        if let Some(authority) = &self.absolute {
            return Some(authority);
        }
        self.field(bytes, "host")
    }

    /// The first value of a header. Parses the head a second time.
    pub fn field<'a>(&self, bytes: &'a [u8], name: &str) -> Option<&'a str> {
        let mut headers = [MaybeUninit::uninit(); MAX_HEADERS];
        let mut request = httparse::Request::new(&mut []);
        request.parse_with_uninit_headers(bytes, &mut headers).ok()?.is_complete().then_some(())?;
        let field = request.headers.iter().find(|header| header.name.eq_ignore_ascii_case(name))?;
        str::from_utf8(field.value.trim_ascii()).ok()
    }

    /// The fields that a proof covers. Parses the head a second time, since only peers' requests need them.
    pub fn asked<'a>(&self, bytes: &'a [u8]) -> Option<[Field<'a>; ASKED.len()]> {
        let mut headers = [MaybeUninit::uninit(); MAX_HEADERS];
        let mut request = httparse::Request::new(&mut []);
        request.parse_with_uninit_headers(bytes, &mut headers).ok()?.is_complete().then_some(())?;
        Some(ASKED.map(|name| {
            let mut named = request.headers.iter().filter(|header| header.name.eq_ignore_ascii_case(name));
            match (named.next(), named.next()) {
                (header, None) => Ok(header.map(|header| header.value.trim_ascii())),
                _ => Err(Twice),
            }
        }))
    }

    /// The value of `If-None-Match`.
    pub fn validator<'a>(&self, bytes: &'a [u8]) -> Option<&'a [u8]> {
        bytes.get(self.validator.clone()?)
    }

    /// `User-Agent`, for the access record.
    pub fn user_agent<'a>(&self, bytes: &'a [u8]) -> Option<Cow<'a, str>> {
        Some(String::from_utf8_lossy(bytes.get(self.user_agent.clone()?)?))
    }

    /// Calls `read` with the fields of the head if it has one of [`INTRODUCING`], else with no fields. Parses the head a second time, since only
    /// logs and traces need them.
    pub fn introduction<T>(&self, bytes: &[u8], read: impl FnOnce(&Parsed<'_, '_>) -> T) -> T {
        let mut headers = [MaybeUninit::uninit(); MAX_HEADERS];
        let mut request = httparse::Request::new(&mut []);
        if self.introduced && request.parse_with_uninit_headers(bytes, &mut headers).is_ok() {
            return read(&Parsed(request.headers));
        }
        read(&Parsed(&[]))
    }

    /// The resource that the path names.
    pub fn target<'a>(&self, bytes: &'a [u8]) -> Target<'a> {
        Target::of(self.path(bytes))
    }
}

/// The fields of a parsed head, without a copy.
pub struct Parsed<'h, 'b>(&'h [httparse::Header<'b>]);

impl Fields for Parsed<'_, '_> {
    fn values<'a>(&'a self, name: &'static str) -> impl DoubleEndedIterator<Item = &'a [u8]> {
        let named = self.0.iter().filter(move |header| header.name.eq_ignore_ascii_case(name));
        named.map(|header| header.value)
    }
}

/// The fields that name the client and the request.
const INTRODUCING: [&str; 4] = ["x-forwarded-for", "forwarded", "traceparent", "x-request-id"];

/// Reads until `ahead` begins with a whole head. Bytes after the head stay in `ahead`, which may hold bytes from an earlier read.
///
/// The first byte must arrive within `wait`, and the whole head within `header_timeout` after it.
///
/// A head that is complete after the first read is not charged to `memory`: this is the case that must be fast, and it holds at most [`READ`]
/// bytes. Any other head takes a lease, which must live as long as the bytes.
///
/// # Errors
/// [`NoHead`]: the client sent no request, or the request is refused.
pub async fn read_head(
    stream: &mut (impl AsyncRead + Unpin),
    ahead: &mut BytesMut,
    limits: &Limits,
    wait: Duration,
    memory: &Arc<Budget>,
) -> Result<(Head, Option<Lease>), NoHead> {
    let max_bytes = usize::try_from(limits.max_header_bytes.get()).unwrap_or(usize::MAX);
    let started = Instant::now();
    let mut begun = !ahead.is_empty();
    let mut deadline = if begun { started + limits.header_timeout.get() } else { started + wait };
    let mut lease: Option<Lease> = None;
    let mut search = Search::default();
    loop {
        // Empty lines before a request have no meaning (RFC 9112, section 2.2). If they stayed, each new byte would parse them again.
        let empty = ahead.iter().take_while(|byte| matches!(byte, b'\r' | b'\n')).count();
        if empty > 0 {
            ahead.advance(empty);
            search = Search::default();
        }
        if search.is_worth_parsing(ahead)
            && let Some(head) = parse(ahead, limits.max_headers)?
        {
            let head = to_origin_form(ahead, head, limits.max_headers)?;
            if head.len > max_bytes {
                return Err(too_large(max_bytes));
            }
            return Ok((head, lease));
        }
        if ahead.len() > max_bytes {
            return Err(too_large(max_bytes));
        }
        if !begun {
            *ahead = BytesMut::new();
        }
        let held = (begun && !ahead.is_empty()).then_some(&mut lease);
        match timeout_at(deadline, read_some(stream, ahead, held, memory)).await {
            Ok(Ok(n)) if n > 0 => {}
            Ok(Err(error)) if error.kind() == io::ErrorKind::OutOfMemory => return Err(NoHead::NoMemory),
            Ok(_) => return Err(NoHead::Closed),
            Err(_) if !begun => return Err(NoHead::Closed),
            Err(_) => {
                let why = format!("the request head did not arrive within {}", limits.header_timeout);
                return Err(NoHead::Refused(StatusCode::REQUEST_TIMEOUT, why));
            }
        }
        if !begun {
            begun = true;
            deadline = Instant::now() + limits.header_timeout.get();
        }
    }
}

/// Decides when to parse a head that arrives in pieces. Each parse begins at the start, so a parse for every byte would cost the square of the
/// length. A head is parsed when its end may have arrived, and each time its length has doubled, so that a malformed one is refused early.
#[derive(Default)]
struct Search {
    /// The first `seen` bytes contain no empty line.
    seen: usize,
    /// Parse when there are this many bytes.
    next: usize,
}

impl Search {
    fn is_worth_parsing(&mut self, bytes: &[u8]) -> bool {
        if bytes.is_empty() {
            return false;
        }
        // The end is `\n\r\n` or `\n\n`. Its first two bytes may be among the bytes that were searched before.
        let from = self.seen.saturating_sub(2);
        let ended = bytes.len() >= self.next
            || bytes[from..].windows(3).any(|end| end == b"\n\r\n")
            || bytes[from..].windows(2).any(|end| end == b"\n\n");
        self.seen = bytes.len();
        if ended {
            self.next = 2 * bytes.len();
        }
        ended
    }
}

/// Reads available bytes and appends them to `ahead`. Returns their number; 0 at the end. The buffer is on the stack, so that an idle
/// connection has none. With `held`, extends that lease to all of `ahead` before `ahead` grows.
async fn read_some(
    stream: &mut (impl AsyncRead + Unpin),
    ahead: &mut BytesMut,
    mut held: Option<&mut Option<Lease>>,
    memory: &Arc<Budget>,
) -> io::Result<usize> {
    poll_fn(|cx| {
        let mut part = [MaybeUninit::uninit(); READ];
        let mut part = ReadBuf::uninit(&mut part);
        ready!(Pin::new(&mut *stream).poll_read(cx, &mut part))?;
        if let Some(held) = &mut held {
            // `BytesMut` at least doubles when it grows.
            let after = ahead.len() + part.filled().len();
            let capacity = if after > ahead.capacity() { after.max(2 * ahead.capacity()) } else { ahead.capacity() };
            if !held.get_or_insert_with(|| memory.empty()).cover(capacity as u64) {
                return Poll::Ready(Err(io::ErrorKind::OutOfMemory.into()));
            }
        }
        ahead.extend_from_slice(part.filled());
        Poll::Ready(Ok(part.filled().len()))
    })
    .await
}

/// The head of a request that came over HTTP/2, as the bytes of an HTTP/1.1 head, and what they say. So one parser decides what a request means, and the
/// same is refused. `ended`: no body follows.
///
/// # Errors
/// [`NoHead::Refused`].
pub fn of_http2(request: &http::request::Parts, ended: bool, limits: &Limits) -> Result<(BytesMut, Head), NoHead> {
    let target = request.uri.path_and_query().map_or("/", PathAndQuery::as_str);
    if !target.starts_with('/') && target != "*" {
        return Err(bad("malformed request target"));
    }
    let mut bytes = BytesMut::with_capacity(512);
    for part in [request.method.as_str(), " ", target, " HTTP/1.1\r\n"] {
        bytes.put_slice(part.as_bytes());
    }
    // `:authority` is what `Host` is in HTTP/1.1. pingora has refused requests in which they differ.
    let host = request.uri.authority().filter(|_| !request.headers.contains_key(header::HOST));
    if let Some(host) = host {
        put_field(&mut bytes, header::HOST.as_str(), host.as_str().as_bytes());
    }
    for (name, value) in &request.headers {
        // How a body is framed is the business of HTTP/2.
        if name != header::TRANSFER_ENCODING && name != header::CONNECTION && name != header::UPGRADE {
            put_field(&mut bytes, name.as_str(), value.as_bytes());
        }
    }
    if !ended && !request.headers.contains_key(header::CONTENT_LENGTH) {
        put_field(&mut bytes, header::TRANSFER_ENCODING.as_str(), b"chunked");
    }
    bytes.put_slice(b"\r\n");
    let max_bytes = usize::try_from(limits.max_header_bytes.get()).unwrap_or(usize::MAX);
    if bytes.len() > max_bytes {
        return Err(too_large(max_bytes));
    }
    let head = parse(&bytes, limits.max_headers)?.ok_or_else(|| bad("malformed request head"))?;
    Ok((bytes, Head { version: Version::HTTP_2, ..head }))
}

fn put_field(bytes: &mut BytesMut, name: &str, value: &[u8]) {
    for part in [name.as_bytes(), b": ", value, b"\r\n"] {
        bytes.put_slice(part);
    }
}

fn too_large(max_bytes: usize) -> NoHead {
    NoHead::Refused(StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE, format!("the request head is larger than {max_bytes} bytes"))
}

/// Rewrites a target in absolute form to origin form, so that the rest of the program sees one form. Drops the authority: castier serves the
/// request itself, for any host name. Only routes look at it.
fn to_origin_form(ahead: &mut BytesMut, head: Head, max_headers: usize) -> Result<Head, NoHead> {
    if head.authority.is_empty() {
        return Ok(head);
    }
    let rest = ahead.split_off(head.authority.end);
    let authority = ahead.get(head.authority.clone()).and_then(|bytes| str::from_utf8(bytes).ok()).unwrap_or_default();
    let absolute = authority.split_once("://").map(|(_, authority)| authority.to_owned());
    ahead.truncate(head.authority.start);
    if !rest.starts_with(b"/") {
        ahead.extend_from_slice(b"/");
    }
    ahead.unsplit(rest);
    let head = parse(ahead, max_headers)?.ok_or_else(|| bad("malformed request target"))?;
    Ok(Head { absolute, ..head })
}

/// Parses a head. `None`: it is not complete yet.
fn parse(bytes: &[u8], max_headers: usize) -> Result<Option<Head>, NoHead> {
    let mut headers = [MaybeUninit::uninit(); MAX_HEADERS];
    let max_headers = max_headers.min(MAX_HEADERS);
    let mut request = httparse::Request::new(&mut []);
    let len = match request.parse_with_uninit_headers(bytes, &mut headers[..max_headers]) {
        Ok(httparse::Status::Complete(len)) => len,
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(httparse::Error::TooManyHeaders) => {
            let why = format!("more than {max_headers} header fields");
            return Err(NoHead::Refused(StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE, why));
        }
        Err(httparse::Error::Version) if bytes.starts_with(&PREFACE[..bytes.len().min(PREFACE.len())]) => return Err(NoHead::Http2),
        Err(httparse::Error::Version) => {
            return Err(NoHead::Refused(StatusCode::HTTP_VERSION_NOT_SUPPORTED, "only HTTP/1.1 and HTTP/1.0 are spoken here".into()));
        }
        Err(error) => return Err(bad(&format!("malformed request head: {error}"))),
    };
    let (Some(method), Some(target), Some(minor)) = (request.method, request.path, request.version) else {
        return Err(bad("malformed request line"));
    };
    let method = Method::from_bytes(method.as_bytes()).map_err(|_| bad("malformed method"))?;
    if method == Method::TRACE {
        // The answer to a relayed TRACE would echo the request as the origin got it, with the origin's credentials.
        return Err(NoHead::Refused(StatusCode::METHOD_NOT_ALLOWED, "TRACE is not served: it would echo what is not the client's".into()));
    }
    if method == Method::CONNECT {
        return Err(NoHead::Refused(StatusCode::METHOD_NOT_ALLOWED, "CONNECT is not served: castier is no forward proxy".into()));
    }
    let (authority, path) = target_of(bytes, target)?;
    let end = target.as_ptr() as usize - bytes.as_ptr() as usize + target.len();
    let whole = path.start..end;
    let (mut plain, mut close) = (method == Method::GET && minor == 1, false);
    let framing = framing(request.headers, minor, &mut plain, &mut close)?;
    let named = |name: &'static str| request.headers.iter().filter(move |header| header.name.eq_ignore_ascii_case(name));
    let upgrade = minor == 1
        && framing == Framing::Length(0)
        && named("upgrade").next().is_some()
        && names_upgrade(named("connection").map(|header| header.value));
    let proof = the_one(bytes, request.headers, &PROOF);
    let authorization = the_one(bytes, request.headers, &header::AUTHORIZATION);
    let looped = named("via").any(|header| via_header::names_this_node(header.value));
    let validator = the_one(bytes, request.headers, &header::IF_NONE_MATCH);
    let user_agent = the_one(bytes, request.headers, &header::USER_AGENT);
    let introduced = request.headers.iter().any(|header| INTRODUCING.iter().any(|name| header.name.eq_ignore_ascii_case(name)));
    Ok(Some(Head {
        user_agent,
        introduced,
        len,
        method,
        authority,
        path,
        version: if minor == 0 { Version::HTTP_10 } else { Version::HTTP_11 },
        upgrade,
        plain,
        close,
        validator,
        framing,
        looped,
        authorization,
        proof,
        target: whole,
        absolute: None,
    }))
}

/// Reads the headers that frame the body. Clears `plain` if a header could change the answer. Sets `close` for `Connection: close`.
fn framing(headers: &[httparse::Header<'_>], minor: u8, plain: &mut bool, close: &mut bool) -> Result<Framing, NoHead> {
    let mut length = None;
    let mut chunked = false;
    let mut hosts = 0;
    for header in headers {
        let is = |name: &str| header.name.eq_ignore_ascii_case(name);
        match header.name.len() {
            4 if is("host") => {
                hosts += 1;
                if !is_host(header.value) {
                    return Err(bad("malformed Host"));
                }
            }
            14 if is("content-length") => {
                // Without the spaces of Unicode: others do not take them for spaces.
                let value = Some(header.value.trim_ascii()).filter(|value| value.iter().all(u8::is_ascii_digit));
                let value: u64 =
                    value.and_then(|value| str::from_utf8(value).ok()?.parse().ok()).ok_or_else(|| bad("malformed Content-Length"))?;
                if length.is_some_and(|before| before != value) {
                    return Err(bad("contradicting Content-Length"));
                }
                length = Some(value);
            }
            17 if is("transfer-encoding") => {
                if !header.value.trim_ascii().eq_ignore_ascii_case(b"chunked") || chunked || minor == 0 {
                    return Err(bad("the only Transfer-Encoding is chunked, over HTTP/1.1"));
                }
                chunked = true;
            }
            10 if is("connection") => {
                let says = |option: &[u8]| header.value.trim_ascii().eq_ignore_ascii_case(option);
                *close |= says(b"close");
                *plain &= *close || says(b"keep-alive");
            }
            5 if is("range") => *plain = false,
            6 if is("expect") => *plain = false,
            7 if is("upgrade") => *plain = false,
            _ => {}
        }
    }
    if hosts > 1 || (hosts == 0 && minor == 1) {
        return Err(bad("HTTP/1.1 wants exactly one Host header field"));
    }
    if chunked && length.is_some() {
        return Err(bad("both Content-Length and Transfer-Encoding"));
    }
    let framing = if chunked { Framing::Chunked } else { Framing::Length(length.unwrap_or(0)) };
    *plain &= framing == Framing::Length(0);
    Ok(framing)
}

/// Whether the values of `Connection` name `Upgrade`. If not, an `Upgrade` header is not meant for this hop (RFC 9110, section 7.8).
pub fn names_upgrade<'a>(connection: impl Iterator<Item = &'a [u8]>) -> bool {
    connection.flat_map(|value| value.split(|byte| *byte == b',')).any(|option| option.trim_ascii().eq_ignore_ascii_case(b"upgrade"))
}

/// Whether the value is a host with an optional port, or empty (RFC 9110, section 7.2).
fn is_host(value: &[u8]) -> bool {
    let plain = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b':');
    // Most hosts consist of plain characters. `Authority` checks the others.
    value.iter().all(plain) || (Authority::try_from(value).is_ok() && !value.contains(&b'@'))
}

/// The position of a header's value in the head. An empty range if the header is repeated: then none of its values counts.
fn the_one(bytes: &[u8], headers: &[httparse::Header<'_>], name: &HeaderName) -> Option<Range<usize>> {
    let mut found =
        headers.iter().filter(|header| header.name.len() == name.as_str().len() && header.name.eq_ignore_ascii_case(name.as_str()));
    let value = found.next()?.value.trim_ascii();
    if found.next().is_some() {
        return Some(0..0);
    }
    let start = value.as_ptr() as usize - bytes.as_ptr() as usize;
    Some(start..start + value.len())
}

/// The positions of authority and path in the head. `/a?b` and `http://host/a?b` both have the path `/a`.
fn target_of(bytes: &[u8], target: &str) -> Result<(Range<usize>, Range<usize>), NoHead> {
    let start = target.as_ptr() as usize - bytes.as_ptr() as usize;
    let skip = match target.find("://") {
        _ if target.starts_with('/') || target == "*" => 0,
        Some(scheme) => target[scheme + 3..].find(['/', '?']).map_or(target.len(), |end| scheme + 3 + end),
        None => return Err(bad("the request target is neither a path nor a URL")),
    };
    let path = &target[skip..];
    // Most paths consist of plain characters. `PathAndQuery` checks the others, which costs more.
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'/' | b'.' | b'-' | b'_' | b'~' | b'%');
    let is_sound = path.bytes().all(plain) || PathAndQuery::try_from(path).is_ok();
    // A target has no fragment. Some readers drop it, and so would see another path.
    if !is_sound || target.contains('#') {
        return Err(bad("the request target has characters that must be percent-encoded"));
    }
    let end = path.find('?').unwrap_or(path.len());
    Ok((start..start + skip, start + skip..start + skip + end))
}

fn bad(why: &str) -> NoHead {
    NoHead::Refused(StatusCode::BAD_REQUEST, why.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn head(text: &str) -> Result<Option<Head>, NoHead> {
        parse(text.as_bytes(), 100)
    }

    fn refused(text: &str) -> u16 {
        match head(text) {
            Err(NoHead::Refused(status, _)) => status.as_u16(),
            other => panic!("{text:?}: {other:?}"),
        }
    }

    #[test]
    fn targets_and_framing() {
        let text = "GET http://a.example:80/cas/abc?x=1 HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello";
        let parsed = head(text).unwrap().unwrap();
        assert_eq!((parsed.path(text.as_bytes()), parsed.framing, parsed.plain), ("/cas/abc", Framing::Length(5), false));
        assert_eq!(&text[parsed.len..], "hello");
        for (absolute, origin) in [
            ("http://b.example:80/cas/abc?x=1", "/cas/abc?x=1"),
            ("http://b", "/"),
            ("HTTP://b?x", "/?x"),
            ("/cas/abc", "/cas/abc"),
            ("*", "*"),
        ] {
            let mut ahead = BytesMut::from(&format!("\r\nOPTIONS {absolute} HTTP/1.1\r\nHost: a\r\n\r\nrest")[..]);
            let parsed = parse(&ahead, 100).unwrap().unwrap();
            let parsed = to_origin_form(&mut ahead, parsed, 100).unwrap();
            let text = String::from_utf8(ahead.to_vec()).unwrap();
            assert_eq!(text, format!("\r\nOPTIONS {origin} HTTP/1.1\r\nHost: a\r\n\r\nrest"));
            assert_eq!((parsed.path(&ahead), &text[parsed.len..]), (origin.split('?').next().unwrap(), "rest"));
        }
        let text = "GET /cas/abc HTTP/1.1\r\nHost: a\r\nAccept: */*\r\nConnection: Keep-Alive\r\n\r\n";
        assert!(head(text).unwrap().unwrap().plain);
        for change in ["Range: bytes=0-1", "Connection: close, X-Hop", "Expect: 100-continue", "Upgrade: h2c", "Transfer-Encoding: chunked"]
        {
            let text = format!("GET /cas/abc HTTP/1.1\r\nHost: a\r\n{change}\r\n\r\n");
            assert!(!head(&text).unwrap().unwrap().plain, "{change}");
        }
        for (lines, close, validator) in [
            ("", false, None),
            ("Connection: Close\r\nIf-None-Match:  \"x\" \r\n", true, Some("\"x\"")),
            ("Connection: keep-alive\r\nConnection: close\r\n", true, None),
            ("If-None-Match: \"x\"\r\nif-none-match: \"x\"\r\n", false, Some("")),
        ] {
            let text = format!("GET /cas/abc HTTP/1.1\r\nHost: a\r\n{lines}\r\n");
            let parsed = head(&text).unwrap().unwrap();
            assert_eq!((parsed.plain, parsed.close, parsed.validator(text.as_bytes())), (true, close, validator.map(str::as_bytes)));
        }
        assert!(!head("GET / HTTP/1.0\r\n\r\n").unwrap().unwrap().plain);
        assert!(!head("HEAD / HTTP/1.1\r\nHost: a\r\n\r\n").unwrap().unwrap().plain);
        assert_eq!(head("GET / HTTP/1.1\r\nHost: a\r\n").unwrap(), None);
    }

    #[test]
    fn the_proof_is_found_if_there_is_one() {
        for (lines, proof) in [
            ("", None),
            ("Castier-Proof:  a proof \r\n", Some("a proof")),
            ("castier-proof:\r\n", Some("")),
            ("castier-proof: one\r\nX: y\r\ncastier-proof: one\r\n", Some("")),
            ("castier-proo: one\r\n", None),
        ] {
            let mut ahead = BytesMut::from(&format!("GET http://b/cas HTTP/1.1\r\nHost: a\r\n{lines}\r\n")[..]);
            let parsed = parse(&ahead, 100).unwrap().unwrap();
            assert_eq!(parsed.proof(&ahead), proof.map(str::as_bytes), "{lines:?}");
            let parsed = to_origin_form(&mut ahead, parsed, 100).unwrap();
            assert_eq!(parsed.proof(&ahead), proof.map(str::as_bytes), "{lines:?}");
        }
    }

    #[test]
    fn refusals() {
        for (status, text) in [
            (400, "GET / HTTP/1.1\r\n\r\n"),
            (400, "GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n"),
            (400, "GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n"),
            (400, "GET / HTTP/1.1\r\nHost: a\r\nContent-Length: +1\r\n\r\n"),
            (400, "GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\u{a0}\r\n\r\n"),
            (400, "GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n"),
            (400, "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n"),
            (400, "POST / HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"),
            (400, "GET /\0 HTTP/1.1\r\nHost: a\r\n\r\n"),
            (400, "GET somewhere HTTP/1.1\r\nHost: a\r\n\r\n"),
            (400, "GET /a#b HTTP/1.1\r\nHost: a\r\n\r\n"),
            (400, "GET /a?b#c HTTP/1.1\r\nHost: a\r\n\r\n"),
            (400, "GET http://a#b/c HTTP/1.1\r\nHost: a\r\n\r\n"),
            (400, "\u{16}\u{3}\u{1}TLS client hello\r\n\r\n"),
            (405, "TRACE / HTTP/1.1\r\nHost: a\r\n\r\n"),
            (405, "CONNECT a:443 HTTP/1.1\r\nHost: a\r\n\r\n"),
            (505, "GET / HTTP/2.0\r\nHost: a\r\n\r\n"),
            (505, "PRI / HTTP/2.0\r\n\r\nSM\r\n\r\n"),
        ] {
            assert_eq!(refused(text), status, "{text:?}");
        }
        assert_eq!(head("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"), Err(NoHead::Http2), "spoken by who knows that this is HTTP/2");
        let many = format!("GET / HTTP/1.1\r\nHost: a\r\n{}\r\n", "X: y\r\n".repeat(100));
        assert_eq!(refused(&many), 431);
    }

    #[tokio::test(start_paused = true)]
    async fn limits_of_size_and_time() {
        let (limits, memory) = (Limits::default(), Budget::new(1 << 20));
        let wait = limits.idle_timeout.get();
        let large = format!("GET / HTTP/1.1\r\nX: {}", "y".repeat(40_000));
        let mut ahead = BytesMut::new();
        let answer = read_head(&mut large.as_bytes(), &mut ahead, &limits, wait, &memory).await;
        assert!(matches!(answer, Err(NoHead::Refused(status, _)) if status == 431), "{answer:?}");
        // A client that sends a byte now and then does not get more time for it.
        let (mut client, mut server) = tokio::io::duplex(64);
        let sender = tokio::spawn(async move {
            for byte in b"GET / HTTP/1.1\r\nHost: a\r\n".iter().cycle() {
                if tokio::io::AsyncWriteExt::write_all(&mut client, &[*byte]).await.is_err() {
                    break;
                }
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        });
        let answer = read_head(&mut server, &mut BytesMut::new(), &limits, wait, &memory).await;
        assert!(matches!(answer, Err(NoHead::Refused(status, _)) if status == 408), "{answer:?}");
        drop(server);
        sender.await.unwrap();
        let answer = read_head(&mut tokio::io::empty(), &mut BytesMut::new(), &limits, wait, &memory).await;
        assert!(matches!(answer, Err(NoHead::Closed)), "{answer:?}");
    }

    #[test]
    fn a_head_that_dribbles_in_is_parsed_a_few_times() {
        let text = format!("GET / HTTP/1.1\r\nHost: a\r\nX: {}\r\n\r\n", "y".repeat(30_000));
        let mut search = Search::default();
        let parsed: Vec<_> = (1..=text.len()).filter(|&len| search.is_worth_parsing(&text.as_bytes()[..len])).collect();
        assert!(parsed.len() < 20 && parsed.last() == Some(&text.len()), "{parsed:?}");
        // The end is not missed, however the pieces fall.
        for end in ["\n\n", "\r\n\r\n", "\n\r\n"] {
            for piece in 1..5 {
                let text = format!("GET / HTTP/1.1\r\nHost: abc{end}");
                let (mut search, mut at) = (Search::default(), 0);
                let found = loop {
                    at = text.len().min(at + piece);
                    let worth = search.is_worth_parsing(&text.as_bytes()[..at]);
                    if at == text.len() {
                        break worth;
                    }
                };
                assert!(found, "{end:?} in pieces of {piece}");
            }
        }
    }

    #[tokio::test]
    async fn a_head_in_pieces_is_paid_for() {
        let (limits, memory) = (Limits::default(), Budget::new(16 << 10));
        let wait = limits.idle_timeout.get();
        let head = |length| format!("GET / HTTP/1.1\r\nHost: a\r\nX: {}\r\n\r\n", "y".repeat(length));
        let (_, lease) = read_head(&mut head(1_000).as_bytes(), &mut BytesMut::new(), &limits, wait, &memory).await.unwrap();
        assert!(lease.is_none(), "it came in one read");
        let (_, lease) = read_head(&mut head(10_000).as_bytes(), &mut BytesMut::new(), &limits, wait, &memory).await.unwrap();
        assert!(lease.is_some(), "it keeps what it took");
        let answer = read_head(&mut head(10_000).as_bytes(), &mut BytesMut::new(), &limits, wait, &memory).await;
        assert!(matches!(answer, Err(NoHead::NoMemory)), "{answer:?}");
        drop(lease);
        assert!(read_head(&mut head(10_000).as_bytes(), &mut BytesMut::new(), &limits, wait, &memory).await.is_ok());
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = parse(&bytes, 10);
        }

        #[test]
        fn no_request_line_panics(target in "[ -~]{0,40}", rest in "[ -~\r\n]{0,80}") {
            let text = format!("GET {target} HTTP/1.1\r\nHost: a\r\n{rest}\r\n\r\n");
            if let Ok(Some(head)) = parse(text.as_bytes(), 10) {
                prop_assert!(text.contains(head.path(text.as_bytes())));
            }
        }
    }
}
