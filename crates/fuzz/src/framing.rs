//! What comes over a connection: heads, bodies, and the header of a proxy in front. How it is cut into reads changes nothing.

use crate::{cuts, first_line, header_map};
use bytes::{Bytes, BytesMut};
use castier::{
    http2::frames::Frames,
    proxy_protocol,
    request_head::{Framing, Head, NoHead, of_http2, read_head},
};
use castier_cache::Budget;
use castier_config::Limits;
use castier_serverkit::multipart::{boundary, first_file};
use castier_upstream::{Answer, Chunks, Expected};
use castier_wire::{Target, forwarded};
use futures::{StreamExt as _, stream};
use http::Method;
use pingora::protocols::http::v1::{client, server};
use std::{
    collections::VecDeque,
    convert::Infallible,
    io::{self, Cursor},
    net::{IpAddr, Ipv4Addr},
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};
use tokio::{
    io::{AsyncRead, ReadBuf},
    runtime::{Builder, Runtime},
};

thread_local! {
    static RUNTIME: Runtime = Builder::new_current_thread().enable_time().build().expect("a runtime");
}

fn run<T>(work: impl Future<Output = T>) -> T {
    RUNTIME.with(|runtime| runtime.block_on(work))
}

/// A connection that gives these pieces, and then ends.
struct Pieces<'a>(VecDeque<&'a [u8]>);

impl AsyncRead for Pieces<'_> {
    fn poll_read(mut self: Pin<&mut Self>, _: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        while let Some(piece) = self.0.pop_front() {
            let here = piece.len().min(buf.remaining());
            buf.put_slice(&piece[..here]);
            if here < piece.len() {
                self.0.push_front(&piece[here..]);
            }
            if here > 0 {
                break;
            }
        }
        Poll::Ready(Ok(()))
    }
}

// ---- request heads ----

/// A request head, as the listener reads it. What castier makes of it is what pingora makes of it.
pub(crate) fn request_head(bytes: &[u8]) {
    let whole = head_of(&[bytes]);
    for pieces in cuts(bytes) {
        match (&whole, &head_of(&pieces)) {
            (Ok(whole), Ok(parted)) => assert_eq!(whole, parted),
            // The end came before it was seen to be malformed.
            (Err(_), Err(NoHead::Closed)) | (Err(NoHead::Closed), Err(_)) => {}
            (Err(NoHead::Refused(whole, _)), Err(NoHead::Refused(parted, _))) => assert_eq!(whole, parted),
            (whole, parted) => panic!("{whole:?} in pieces is {parted:?}"),
        }
    }
    let Ok((head, ahead)) = whole else { return };
    let (text, rest) = ahead.split_at(head.len);
    assert!(bytes.ends_with(rest));
    let again = head_of(&[text]).expect("it is a head in its own spelling");
    let mut own = head.clone();
    own.absolute = None;
    assert_eq!(again, (own, text.to_vec()));

    let (path, target) = (head.path(text), head.path_and_query(text));
    assert!(target.starts_with(path) && (path.starts_with('/') || path == "*"), "{path:?}");
    assert!(!path.contains(['?', '#', '\u{7f}']) && !target.bytes().any(|byte| byte <= b' '), "{path:?}");
    assert!(head.method != Method::TRACE && head.method != Method::CONNECT);
    assert!(!head.plain || (head.method == Method::GET && head.framing == Framing::Length(0)));
    assert!(!head.upgrade || head.framing == Framing::Length(0));
    let named = |name: &str| {
        let lines = text.split(|byte| *byte == b'\n').skip(1);
        lines
            .filter(|line| line.len() > name.len() && line[name.len()] == b':' && line[..name.len()].eq_ignore_ascii_case(name.as_bytes()))
            .count()
    };
    assert!(named("host") <= 1 && named("transfer-encoding") <= 1);
    match head.framing {
        Framing::Chunked => assert!(named("content-length") == 0 && named("transfer-encoding") == 1),
        Framing::Length(_) => assert_eq!(named("transfer-encoding"), 0),
    }
    assert!(!head.plain || named("range") == 0);
    for line in text.split(|byte| *byte == b'\n').filter(|line| line.to_ascii_lowercase().starts_with(b"content-length:")) {
        let length = line[b"content-length:".len()..].trim_ascii();
        assert!(!length.is_empty() && length.iter().all(u8::is_ascii_digit), "{}", length.escape_ascii());
    }
    for (value, name) in
        [(head.authorization(text), "authorization"), (head.proof(text), "castier-proof"), (head.validator(text), "if-none-match")]
    {
        assert_eq!(value.is_some(), named(name) > 0, "{name}");
        assert!(value.is_none_or(|value| !value.iter().any(|byte| matches!(byte, b'\r' | b'\n' | 0))));
    }
    for value in [head.host(text), head.field(text, "host"), head.absolute.as_deref()].into_iter().flatten() {
        assert!(!value.contains(['\r', '\n', '\0']));
    }
    assert!(head.asked(text).is_some());
    head.user_agent(text);
    if let Target::Blob(digest) = head.target(text) {
        assert!(path.ends_with(&digest.to_string()));
    }
    let peer = IpAddr::V4(Ipv4Addr::LOCALHOST);
    let client = head.introduction(text, |fields| forwarded::client(peer, fields, |_| false));
    assert_eq!(client, peer, "nobody but a trusted proxy names another client");
    as_pingora_reads_it(&head, text, rest);
}

/// The frames of an HTTP/2 client: what is counted does not depend on the reads.
pub(crate) fn http2_frames(bytes: &[u8]) {
    let limits = Limits { http2_resets: 2, http2_idle_frames: 3, ..Limits::default() };
    let counted = |pieces: &[&[u8]]| {
        let mut frames = Frames::new(&limits);
        frames.wrote(1000);
        pieces.iter().for_each(|piece| frames.read(piece));
        frames.found()
    };
    let whole = counted(&[bytes]);
    for pieces in cuts(bytes) {
        assert_eq!(counted(&pieces), whole);
    }
}

/// A head that came over HTTP/2: method and target in the first line, a field in each further one. What castier reads is what came, or it refuses.
pub(crate) fn http2_head(bytes: &[u8]) {
    let (first, rest) = first_line(bytes);
    let Some((method, target)) = str::from_utf8(first).ok().and_then(|line| line.split_once(' ')) else { return };
    let Ok(request) = http::Request::builder().method(method).uri(target).body(()) else { return };
    let (mut parts, ()) = request.into_parts();
    parts.headers = header_map(rest);
    for ended in [true, false] {
        let Ok((text, head)) = of_http2(&parts, ended, &Limits::default()) else { continue };
        assert_eq!((&head.method, head.len), (&parts.method, text.len()));
        assert_eq!(head.path(&text), if parts.uri.path().is_empty() { "/" } else { parts.uri.path() });
        assert_eq!(head.path_and_query(&text), parts.uri.path_and_query().map_or("/", |target| target.as_str()));
        assert!(head.absolute.is_none() && !head.upgrade);
        let named = |name: &str| parts.headers.get_all(name).iter().count();
        assert!(named("host") <= 1 && (named("host") == 1 || head.host(&text) == parts.uri.authority().map(|host| host.as_str())));
        assert!(!head.plain || (head.method == Method::GET && head.framing == Framing::Length(0) && named("range") == 0));
        assert!(!ended || head.framing != Framing::Chunked);
    }
}

fn head_of(pieces: &[&[u8]]) -> Result<(Head, Vec<u8>), NoHead> {
    let (limits, memory) = (Limits::default(), Budget::new(1 << 20));
    let mut stream = Pieces(pieces.iter().copied().collect());
    let mut ahead = BytesMut::new();
    let wait = Duration::from_secs(3600);
    let (head, _) = run(read_head(&mut stream, &mut ahead, &limits, wait, &memory))?;
    // How much was read ahead is up to the reads.
    for piece in stream.0 {
        ahead.extend_from_slice(piece);
    }
    Ok((head, ahead.to_vec()))
}

/// pingora reads the same bytes once more for what has no fast path. It must find the same request, and the same body.
fn as_pingora_reads_it(head: &Head, text: &[u8], rest: &[u8]) {
    let (mut body, mut is_over, mut is_changed) = (rest.to_vec(), false, false);
    let length = match head.framing {
        Framing::Length(length) => usize::try_from(length).unwrap_or(usize::MAX).min(rest.len()),
        Framing::Chunked => {
            let mut chunks = Chunks::default();
            let length = chunks.pass(&mut body);
            (is_over, is_changed) = (chunks.is_over(), body != rest);
            length
        }
    };
    body.truncate(length);
    let read = run(async {
        let mut session = server::HttpSession::new(Box::new(Cursor::new([text, &body].concat())));
        session.read_request().await.ok()??;
        let request = session.req_header();
        let found = (request.method.clone(), request.raw_path().to_vec());
        let mut data = Vec::new();
        while let Some(part) = session.read_body_bytes().await.ok()? {
            data.extend_from_slice(&part);
        }
        Some((found, data))
    });
    let Some(((method, target), data)) = read else { return };
    assert_eq!((&method, target.as_slice()), (&head.method, head.path_and_query(text).as_bytes()));
    match head.framing {
        Framing::Length(_) => assert!(head.upgrade || data == body, "a body of another length"),
        Framing::Chunked => {
            assert!(is_over && !is_changed, "pingora takes a body that does not end, or was made invalid");
            assert_eq!(decoded(rest), Some((data, length)));
        }
    }
}

// ---- chunked bodies ----

/// A chunked body. A direct implementation of RFC 9112 agrees about its end.
pub(crate) fn chunks(bytes: &[u8]) {
    let whole = passed(&[bytes]);
    for pieces in cuts(bytes) {
        assert_eq!(whole, passed(&pieces));
    }
    let (seen, is_over) = whole;
    assert!(seen.len() <= bytes.len() && (is_over || seen.len() == bytes.len()));
    if let Some((_, length)) = decoded(bytes) {
        assert!(is_over, "it ends after {length} bytes");
        assert_eq!(seen, bytes[..length], "a well-formed body passes as it is");
    }
}

/// The body as pingora sees it, and whether it has ended.
fn passed(pieces: &[&[u8]]) -> (Vec<u8>, bool) {
    let (mut chunks, mut seen) = (Chunks::default(), Vec::new());
    for piece in pieces {
        let mut piece = piece.to_vec();
        let length = chunks.pass(&mut piece);
        assert!(length == piece.len() || chunks.is_over());
        seen.extend_from_slice(&piece[..length]);
    }
    (seen, chunks.is_over())
}

/// The data of a body that follows the grammar to the letter, and the body's length.
fn decoded(bytes: &[u8]) -> Option<(Vec<u8>, usize)> {
    let (mut data, mut rest) = (Vec::new(), bytes);
    let line = |rest: &mut &[u8]| -> Option<Vec<u8>> {
        let end = rest.windows(2).position(|end| end == b"\r\n")?;
        let line = rest[..end].to_vec();
        *rest = &rest[end + 2..];
        (!line.iter().any(|byte| matches!(byte, b'\r' | b'\n'))).then_some(line)
    };
    loop {
        let size = line(&mut rest)?;
        let digits = size.iter().position(|byte| !byte.is_ascii_hexdigit()).unwrap_or(size.len());
        let length = usize::from_str_radix(str::from_utf8(&size[..digits]).ok()?, 16).ok()?;
        if length == 0 {
            break;
        }
        data.extend_from_slice(rest.get(..length)?);
        rest = rest[length..].strip_prefix(b"\r\n")?;
    }
    while !line(&mut rest)?.is_empty() {}
    Some((data, bytes.len() - rest.len()))
}

// ---- answers of sources ----

/// The answer to a relayed request. The first line has the method, and `upgrade` if the request asks for it. No byte after the answer passes, and pingora
/// finds the same body.
pub(crate) fn answer(bytes: &[u8]) {
    let (asked, bytes) = first_line(bytes);
    let expected = || Expected { head: asked.starts_with(b"HEAD"), upgrade: asked.ends_with(b"upgrade") };
    let whole = answered(&[bytes], expected());
    for pieces in cuts(bytes) {
        assert_eq!(whole, answered(&pieces, expected()));
    }
    let Some((seen, is_over)) = whole else { return };
    assert!(seen.len() <= bytes.len());
    if !is_over || expected().head || expected().upgrade {
        return;
    }
    // pingora gets no more than this, and then the end of the stream.
    let read = run(async {
        let mut session = client::HttpSession::new(Box::new(Cursor::new(seen.clone())));
        loop {
            session.read_response().await.ok()?;
            if !session.get_status()?.is_informational() {
                break;
            }
        }
        let mut data = 0;
        while let Some(part) = session.read_body_bytes().await.ok()? {
            data += part.len();
        }
        Some((session.is_body_done(), data))
    });
    if let Some((is_done, data)) = read {
        assert!(is_done && data <= seen.len());
    }
}

/// What passes to pingora, and whether the answer has ended. `None`: it is no answer.
fn answered(pieces: &[&[u8]], expected: Expected) -> Option<(Vec<u8>, bool)> {
    let (mut answer, mut ahead, mut seen) = (Answer::of(expected), Vec::new(), Vec::new());
    for piece in pieces {
        ahead.extend_from_slice(piece);
        while !ahead.is_empty() && !answer.is_over() {
            let length = answer.pass(&mut ahead).ok()?;
            if length == 0 {
                break;
            }
            seen.extend(ahead.drain(..length));
        }
    }
    Some((seen, answer.is_over()))
}

// ---- the PROXY protocol ----

/// The header of a proxy in front. A beginning of it is incomplete, or wrong like the whole, and never another header.
pub(crate) fn proxy_header(bytes: &[u8]) {
    let whole = proxy_protocol::parse(bytes);
    if let Ok(Some((length, _))) = whole {
        assert!((1..=bytes.len()).contains(&length));
        assert_eq!(proxy_protocol::parse(&bytes[..length]), whole, "what follows does not count");
    }
    for end in 0..bytes.len() {
        match (proxy_protocol::parse(&bytes[..end]), &whole) {
            (Ok(None), _) | (Err(_), Err(_)) => {}
            (part, whole) => assert_eq!(&part, whole, "of {end} bytes"),
        }
    }
}

// ---- forms ----

/// A form: its `Content-Type` on the first line, and the body. What is taken out stands in it.
pub(crate) fn form(bytes: &[u8]) {
    let (line, body) = first_line(bytes);
    let headers = header_map(&[b"content-type: ", line].concat());
    let Ok(Some(boundary)) = boundary(&headers) else { return };
    let most = 4096;
    let whole = file_of(&[body], &boundary, most);
    for pieces in cuts(body).into_iter().rev().take(3) {
        let parted = file_of(&pieces, &boundary, most);
        match (&whole, &parted) {
            (Some(whole), Some(parted)) => assert_eq!(whole, parted),
            (None, None) => {}
            // multer reads on for as long as bytes are there, and so finds an error behind the file.
            (whole, parted) => panic!("{whole:?} in pieces is {parted:?}"),
        }
    }
    if let Some(file) = whole {
        assert!(file.len() as u64 <= most);
        assert!(file.is_empty() || body.windows(file.len()).any(|part| part == file));
    }
}

/// The first file; `None` if there is an error.
fn file_of(pieces: &[&[u8]], boundary: &str, most: u64) -> Option<Vec<u8>> {
    let pieces: Vec<_> = pieces.iter().map(|piece| Ok::<_, Infallible>(Bytes::copy_from_slice(piece))).collect();
    let mut file = first_file(stream::iter(pieces), boundary.to_owned(), most);
    futures::executor::block_on(async {
        let mut bytes = Vec::new();
        while let Some(part) = file.next().await {
            bytes.extend_from_slice(&part.ok()?);
        }
        Some(bytes)
    })
}
