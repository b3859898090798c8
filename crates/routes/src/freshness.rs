//! For how long an answer that is kept under a name holds, and how it is asked for again (RFC 9111, as a shared cache).

use headers::{CacheControl, ETag, Expires, HeaderMapExt as _, LastModified, SetCookie};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use std::time::{Duration, SystemTime};

/// What the route says, where that replaces or extends what the upstream says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Terms {
    /// How long an answer is fresh, in place of the upstream's own word.
    pub ttl: Option<Duration>,
    /// How long after it was fetched an answer is better than none.
    pub stale_if_error: Duration,
    /// How long a 404 or 410 is remembered.
    pub negative_ttl: Duration,
}

/// The state of a kept answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Freshness {
    /// It may be sent without a question.
    Fresh,
    /// The upstream must be asked. If it cannot answer, this may be sent.
    Stale,
    /// The upstream must be asked, and this is too old to be sent in its stead.
    Expired,
}

/// Why an answer is not kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotKept {
    /// A status other than 200, 404 and 410.
    #[error("its status is not 200, 404 or 410")]
    Status,
    /// `Cache-Control: no-store`.
    #[error("Cache-Control says no-store")]
    NoStore,
    /// `Set-Cookie`: it is for one client.
    #[error("it sets a cookie")]
    Cookie,
    /// `Vary: *`: no request is like another.
    #[error("Vary is *")]
    VaryAll,
}

/// Whether an answer may be kept. `Cache-Control: private` does not forbid it: who may have a kept answer is decided by proofs of access. Returns the request headers that choose between answers, in lower case, sorted: those that the upstream's `Vary` names,
/// and those of the route.
///
/// # Errors
/// Why not.
pub fn may_keep(status: StatusCode, answer: &HeaderMap, vary: &[String]) -> Result<Vec<String>, NotKept> {
    if !matches!(status, StatusCode::OK | StatusCode::NOT_FOUND | StatusCode::GONE) {
        return Err(NotKept::Status);
    }
    if cache_control(answer).is_some_and(|control| control.no_store()) {
        return Err(NotKept::NoStore);
    }
    if answer.typed_get::<SetCookie>().is_some() {
        return Err(NotKept::Cookie);
    }
    let lines = answer.get_all(header::VARY).iter().filter_map(|line| line.to_str().ok());
    let mut names: Vec<_> = lines.flat_map(|line| line.split(',')).map(|name| name.trim().to_ascii_lowercase()).collect();
    if names.iter().any(|name| name == "*") {
        return Err(NotKept::VaryAll);
    }
    names.retain(|name| !name.is_empty());
    names.extend(vary.iter().cloned());
    names.sort_unstable();
    names.dedup();
    Ok(names)
}

/// The state at `now` of an answer that was fetched, or found to hold still, at `fetched`.
pub fn freshness(status: StatusCode, answer: &HeaderMap, fetched: SystemTime, now: SystemTime, terms: &Terms) -> Freshness {
    let held = now.duration_since(fetched).unwrap_or_default();
    let is_absence = status != StatusCode::OK;
    let is_fresh = match terms {
        Terms { negative_ttl, .. } if is_absence => held < *negative_ttl,
        // The operator's word counts from the time when the answer came.
        Terms { ttl: Some(ttl), .. } => held < *ttl,
        Terms { ttl: None, .. } => age(answer, fetched, now) < lifetime(answer),
    };
    match () {
        () if is_fresh => Freshness::Fresh,
        () if held < terms.stale_if_error => Freshness::Stale,
        () => Freshness::Expired,
    }
}

/// The value of `Age` at `now`: how long ago the origin server made the answer, or found that it holds still.
pub fn age(answer: &HeaderMap, fetched: SystemTime, now: SystemTime) -> Duration {
    let before = answer.get(header::AGE).and_then(|age| age.to_str().ok()?.trim().parse().ok()).map_or(Duration::ZERO, Duration::from_secs);
    before.saturating_add(now.duration_since(fetched).unwrap_or_default())
}

/// `Cache-Control`. The names of its directives have no case (RFC 9111, section 5.2), but `headers` compares them with lower case.
fn cache_control(answer: &HeaderMap) -> Option<CacheControl> {
    let lines = answer.get_all(header::CACHE_CONTROL).iter().filter_map(|line| line.to_str().ok()?.to_ascii_lowercase().parse().ok());
    lines
        .map(|line: HeaderValue| (header::CACHE_CONTROL, line))
        .fold(HeaderMap::new(), |mut lower, (name, line)| {
            lower.append(name, line);
            lower
        })
        .typed_get()
}

/// How long the upstream says that its answer is fresh. Nothing is guessed from `Last-Modified`.
fn lifetime(answer: &HeaderMap) -> Duration {
    let control = cache_control(answer);
    if control.as_ref().is_some_and(CacheControl::no_cache) {
        return Duration::ZERO;
    }
    let named = control.and_then(|control| control.s_max_age().or_else(|| control.max_age()));
    let until = || {
        let expires: SystemTime = answer.typed_get::<Expires>()?.into();
        let date: SystemTime = answer.typed_get::<headers::Date>()?.into();
        expires.duration_since(date).ok()
    };
    named.or_else(until).unwrap_or_default()
}

/// The headers of the question whether a kept answer holds still. None: it has no validator, so the whole is asked for again.
pub fn conditions(answer: &HeaderMap) -> Vec<(HeaderName, HeaderValue)> {
    let etag = answer.get(header::ETAG).filter(|_| answer.typed_get::<ETag>().is_some());
    let modified = answer.get(header::LAST_MODIFIED).filter(|_| answer.typed_get::<LastModified>().is_some());
    let named = [(header::IF_NONE_MATCH, etag), (header::IF_MODIFIED_SINCE, modified)];
    named.into_iter().filter_map(|(name, value)| Some((name, value?.clone()))).collect()
}

/// The value of `If-Range` with which a transfer that broke may go on: a strong `ETag`. None: it must begin again.
pub fn if_range(answer: &HeaderMap) -> Option<HeaderValue> {
    let etag = answer.get(header::ETAG).filter(|_| answer.typed_get::<ETag>().is_some())?;
    (!etag.as_bytes().starts_with(b"W/")).then(|| etag.clone())
}

/// The headers of a kept answer after a 304 (RFC 9111, section 3.2): the new ones replace the old ones, except those that describe the body.
pub fn merge(kept: &mut HeaderMap, not_modified: &HeaderMap) {
    const OF_THE_BODY: [HeaderName; 5] =
        [header::CONTENT_LENGTH, header::CONTENT_ENCODING, header::CONTENT_TYPE, header::CONTENT_RANGE, header::TRANSFER_ENCODING];
    let new = |name: &&HeaderName| !OF_THE_BODY.contains(name) && **name != header::CONNECTION;
    for name in not_modified.keys().filter(new) {
        kept.remove(name);
        for value in not_modified.get_all(name) {
            kept.append(name.clone(), value.clone());
        }
    }
    // The answer is as old as the 304 says.
    if !not_modified.contains_key(header::AGE) {
        kept.remove(header::AGE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);
    const TERMS: Terms = Terms { ttl: None, stale_if_error: Duration::from_secs(86_400), negative_ttl: Duration::from_secs(1) };

    fn headers(lines: &[(&str, &str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in lines {
            headers.append(HeaderName::from_bytes(name.as_bytes()).unwrap(), value.parse().unwrap());
        }
        headers
    }

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(1_790_000_000 + seconds)
    }

    #[test]
    fn what_is_kept() {
        let ok = |lines: &[(&str, &str)], vary: &[&str]| {
            may_keep(StatusCode::OK, &headers(lines), &vary.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>())
        };
        assert_eq!(ok(&[], &[]), Ok(Vec::new()));
        assert_eq!(
            ok(&[("vary", "Accept-Encoding, accept"), ("vary", "X-A,")], &["accept"]),
            Ok(["accept", "accept-encoding", "x-a"].map(str::to_owned).into())
        );
        assert_eq!(ok(&[("vary", "accept, *")], &[]), Err(NotKept::VaryAll));
        assert_eq!(ok(&[("cache-control", "public, NO-STORE")], &[]), Err(NotKept::NoStore));
        assert_eq!(ok(&[("set-cookie", "a=b")], &[]), Err(NotKept::Cookie));
        for (status, kept) in [(200, true), (404, true), (410, true), (206, false), (301, false), (401, false), (429, false), (500, false)]
        {
            let status = StatusCode::from_u16(status).unwrap();
            assert_eq!(may_keep(status, &HeaderMap::new(), &[]).is_ok(), kept, "{status}");
        }
    }

    #[test]
    fn how_long_an_answer_is_fresh() {
        let date = ("date", "Mon, 21 Sep 2026 14:13:20 GMT");
        for (lines, fresh_for) in [
            (vec![], 0),
            (vec![("cache-control", "max-age=60")], 60),
            (vec![("cache-control", "max-age=60, s-maxage=10")], 10),
            (vec![("cache-control", "max-age=60"), ("age", "45")], 15),
            (vec![("cache-control", "max-age=60"), ("age", "100")], 0),
            (vec![("cache-control", "max-age=60, no-cache")], 0),
            (vec![date, ("expires", "Mon, 21 Sep 2026 14:14:00 GMT")], 40),
            (vec![date, ("expires", "Mon, 21 Sep 2026 14:00:00 GMT")], 0),
            (vec![date, ("expires", "0")], 0),
            (vec![date, ("expires", "Mon, 21 Sep 2026 14:14:00 GMT"), ("cache-control", "max-age=5")], 5),
            (vec![("last-modified", "Mon, 21 Sep 2020 14:13:20 GMT")], 0),
        ] {
            let (answer, state) = (headers(&lines), |after| freshness(StatusCode::OK, &headers(&lines), at(0), at(after), &TERMS));
            if fresh_for > 0 {
                assert_eq!(state(fresh_for - 1), Freshness::Fresh, "{answer:?}");
            }
            assert_eq!(state(fresh_for), Freshness::Stale, "{answer:?}");
            assert_eq!((state(86_399), state(86_400)), (Freshness::Stale, Freshness::Expired), "{answer:?}");
        }
    }

    #[test]
    fn the_routes_word_counts() {
        let answer = headers(&[("cache-control", "max-age=60"), ("age", "50")]);
        let state = |terms: Terms, status, after| freshness(status, &answer, at(0), at(after), &terms);
        let ttl = Terms { ttl: Some(HOUR), ..TERMS };
        assert_eq!((state(ttl, StatusCode::OK, 3599), state(ttl, StatusCode::OK, 3600)), (Freshness::Fresh, Freshness::Stale));
        let always = Terms { ttl: Some(Duration::ZERO), stale_if_error: Duration::ZERO, ..TERMS };
        assert_eq!(state(always, StatusCode::OK, 0), Freshness::Expired);
        assert_eq!((state(ttl, StatusCode::NOT_FOUND, 0), state(ttl, StatusCode::GONE, 1)), (Freshness::Fresh, Freshness::Stale));
        // A clock that was set back.
        assert_eq!(freshness(StatusCode::OK, &answer, at(100), at(0), &TERMS), Freshness::Fresh);
        assert_eq!(age(&answer, at(0), at(7)), Duration::from_secs(57));
    }

    #[test]
    fn questions() {
        let both = headers(&[("etag", "W/\"x\""), ("last-modified", "Mon, 21 Sep 2026 14:13:20 GMT")]);
        let names = |answer: &HeaderMap| conditions(answer).into_iter().map(|(name, _)| name).collect::<Vec<_>>();
        assert_eq!(names(&both), [header::IF_NONE_MATCH, header::IF_MODIFIED_SINCE]);
        assert_eq!(if_range(&both), None, "a weak validator does not tell bytes apart");
        let strong = headers(&[("etag", "\"x\""), ("last-modified", "yesterday")]);
        assert_eq!((names(&strong), if_range(&strong)), (vec![header::IF_NONE_MATCH], Some(HeaderValue::from_static("\"x\""))));
        let none = headers(&[("etag", "x")]);
        assert_eq!((names(&none), if_range(&none)), (vec![], None));
    }

    #[test]
    fn a_304_renews_the_headers() {
        let mut kept =
            headers(&[("etag", "\"1\""), ("content-length", "5"), ("content-type", "a/b"), ("age", "9"), ("x-a", "1"), ("x-a", "2")]);
        merge(
            &mut kept,
            &headers(&[("etag", "\"1\""), ("content-length", "0"), ("cache-control", "max-age=9"), ("x-a", "3"), ("x-a", "4")]),
        );
        let expected = [
            ("etag", "\"1\""),
            ("content-length", "5"),
            ("content-type", "a/b"),
            ("x-a", "3"),
            ("x-a", "4"),
            ("cache-control", "max-age=9"),
        ];
        assert_eq!(kept, headers(&expected));
    }
}
