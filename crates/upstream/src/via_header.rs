//! `Via` (RFC 9110, section 7.6.3): every request that leaves this node names it, so that one that comes back is known.
//!
//! The name is made up at each start, since two nodes with one name would take each other's requests for their own.
//!
//! A request from a client may start a task that asks the source: a flight, or a question to a peer. What the client's request has in
//! `Via` goes along ([`current`], [`along`]). Without that, two castiers that name each other as origin would not notice:
//!
//! 1. A client asks A for a blob, and A's flight asks B.
//! 2. B's flight asks A. If it named only B, A would not know its own question.
//! 3. A's answer would be to join A's flight, which waits for B. Nobody would answer before a time-out.

use http::{HeaderMap, HeaderValue, Version, header};
use std::{
    hash::{BuildHasher as _, RandomState},
    sync::LazyLock,
};

/// This node's name in `Via`.
static NAME: LazyLock<String> = LazyLock::new(|| format!("castier-{:016x}", RandomState::new().hash_one(std::process::id())));

/// The longest list that is passed on. Each hop adds some 32 bytes.
const LONGEST: usize = 4 << 10;

tokio::task_local! {
    /// What the request that this task works for had in `Via`.
    static BEFORE: HeaderValue;
}

/// What this node adds to a message of this version.
pub fn own(version: Version) -> HeaderValue {
    let version = if version == Version::HTTP_10 { "1.0" } else { "1.1" };
    HeaderValue::try_from(format!("{version} {}", *NAME)).unwrap_or_else(|_| HeaderValue::from_static("1.1 castier"))
}

/// The whole `Via` of a request that this task makes.
pub fn whole() -> HeaderValue {
    let own = own(Version::HTTP_11);
    let joined = BEFORE.try_with(|before| HeaderValue::from_bytes(&[before.as_bytes(), b", ", own.as_bytes()].concat()));
    joined.ok().and_then(Result::ok).unwrap_or(own)
}

/// Whether a value of `Via` names this node.
pub fn names_this_node(value: &[u8]) -> bool {
    let name = NAME.as_bytes();
    value.len() >= name.len() && value.windows(name.len()).any(|part| part == name)
}

/// What a request has in `Via`, as one list.
pub fn of(headers: &HeaderMap) -> Option<HeaderValue> {
    let values: Vec<_> = headers.get_all(header::VIA).iter().map(HeaderValue::as_bytes).collect();
    let length: usize = values.iter().map(|value| value.len() + 2).sum();
    if length == 0 || length > LONGEST { None } else { HeaderValue::from_bytes(&values.join(&b", "[..])).ok() }
}

/// What the request that this task works for had in `Via`.
pub fn current() -> Option<HeaderValue> {
    BEFORE.try_with(Clone::clone).ok()
}

/// Does the work of a request that has this in `Via`.
pub async fn along<T>(before: Option<HeaderValue>, work: impl Future<Output = T>) -> T {
    match before {
        Some(before) => BEFORE.scope(before, work).await,
        None => work.await,
    }
}

/// As [`along`], for work that does not wait.
pub fn sync_along<T>(before: Option<HeaderValue>, work: impl FnOnce() -> T) -> T {
    match before {
        Some(before) => BEFORE.sync_scope(before, work),
        None => work(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_list_grows_and_goes_along() {
        let own = own(Version::HTTP_11);
        assert!(names_this_node(own.as_bytes()) && !names_this_node(b"1.1 castier-0123456789abcdef, 1.1 edge"));
        assert_eq!(whole(), own);
        let mut headers = HeaderMap::new();
        headers.append(header::VIA, HeaderValue::from_static("1.0 one"));
        headers.append(header::VIA, HeaderValue::from_static("1.1 two, 1.1 three"));
        let elsewhere = along(of(&headers), async {
            let before = current();
            tokio::spawn(along(before, async { sync_along(current(), whole) })).await.unwrap()
        })
        .await;
        assert_eq!(elsewhere, format!("1.0 one, 1.1 two, 1.1 three, {}", own.to_str().unwrap()));
        headers.append(header::VIA, HeaderValue::try_from("x".repeat(5000)).unwrap());
        assert_eq!(along(of(&headers), async { whole() }).await, own, "no list grows without end");
    }
}
