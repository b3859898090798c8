//! `Via` (RFC 9110, section 7.6.3). Every request that this node sends names the node, so that it recognises a request that comes back.
//!
//! Each start makes a new random name. If two nodes had the same name, each would reject the other's requests as loops.
//!
//! A client's request may start a task that sends requests to sources. These repeat the `Via` of the client's request ([`current`],
//! [`along`]). Otherwise two castiers that have each other as origin would not notice the loop:
//!
//! 1. A client asks A for a blob. A starts a flight, which asks B.
//! 2. B starts a flight, which asks A. If its request named only B, A would not recognise its own request.
//! 3. A would let the request join its flight, which waits for B. All requests would wait until a timeout.

use http::{HeaderMap, HeaderValue, Version, header};
use std::{
    hash::{BuildHasher as _, RandomState},
    sync::LazyLock,
};

/// This node's name in `Via`.
static NAME: LazyLock<String> = LazyLock::new(|| format!("castier-{:016x}", RandomState::new().hash_one(std::process::id())));

/// The longest `Via` that is repeated to sources. Each hop adds about 32 bytes.
const LONGEST: usize = 4 << 10;

tokio::task_local! {
    /// The `Via` of the request that this task works for.
    static BEFORE: HeaderValue;
}

/// The entry that this node adds to a message of this version.
pub fn own(version: Version) -> HeaderValue {
    let version = if version == Version::HTTP_10 { "1.0" } else { "1.1" };
    HeaderValue::try_from(format!("{version} {}", *NAME)).unwrap_or_else(|_| HeaderValue::from_static("1.1 castier"))
}

/// The whole `Via` of a request that this task sends.
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

/// The `Via` of a request, as one list.
pub fn of(headers: &HeaderMap) -> Option<HeaderValue> {
    let values: Vec<_> = headers.get_all(header::VIA).iter().map(HeaderValue::as_bytes).collect();
    let length: usize = values.iter().map(|value| value.len() + 2).sum();
    if length == 0 || length > LONGEST { None } else { HeaderValue::from_bytes(&values.join(&b", "[..])).ok() }
}

/// The `Via` of the request that this task works for.
pub fn current() -> Option<HeaderValue> {
    BEFORE.try_with(Clone::clone).ok()
}

/// Runs `work` for a request that has this in `Via`.
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
