//! What the tests of packages check again and again.

use crate::support::{Request, Response, Seen, Upstream};
use std::net::SocketAddr;

/// A whole 200 with these bytes.
#[track_caller]
pub(crate) fn gets(addr: SocketAddr, request: &Request, body: &[u8]) -> Response {
    let answer = request.send(addr);
    assert_eq!(answer.status, 200, "{}: {:?} {}", request.target, answer.headers, answer.text());
    assert_eq!(answer.body.len(), body.len(), "{}: {:?}", request.target, answer.headers);
    assert!(answer.body == body, "{}: wrong bytes: {:?}", request.target, answer.headers);
    answer
}

/// Asks for something that must not arrive: the answer is cut, or is no success. Returns its status, or 0 if it is cut.
#[track_caller]
pub(crate) fn refused(addr: SocketAddr, request: &Request) -> u16 {
    let Ok(answer) = request.try_send(addr) else { return 0 };
    assert!(!matches!(answer.status, 200..=299), "{} came whole: {:?} {}", request.target, answer.headers, answer.body.len());
    answer.status
}

/// The requests since the last time, sorted: method and target.
pub(crate) fn asked(upstream: &Upstream) -> Vec<String> {
    let mut lines: Vec<_> = upstream.take().iter().map(|seen| format!("{} {}", seen.method, seen.target)).collect();
    lines.sort();
    lines
}

/// Whether the answer may be a 304.
pub(crate) fn is_conditional(seen: &Seen) -> bool {
    seen.header("if-none-match").is_some() || seen.header("if-modified-since").is_some()
}

/// All requests since the last time were answered with a 304.
#[track_caller]
pub(crate) fn only_revalidated(upstream: &Upstream) {
    let seen = upstream.take();
    assert!(seen.iter().all(|seen| is_conditional(seen) && seen.status == 304), "{}", crate::support::lines(&seen));
}
