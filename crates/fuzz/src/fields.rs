//! Fields of heads. Where a target gets a whole head, there is one field on each line.

use crate::{first_line, header_map, text};
use castier_access::password_of;
use castier_blob::Digest;
use castier_cluster::{ASKED, Field, PROOF, Secrets, Twice};
use castier_config::Cluster;
use castier_origin::condition;
use castier_routes::{
    Freshness, Terms, age,
    challenge::{Challenge, challenges, token},
    conditions as validators, freshness as state,
    lfs::Tickets,
    link_header::{self, Rewrite},
    may_keep, merge, preset,
};
use castier_upstream::{size_of, via_header};
use castier_wire::{
    Selection, blob_head, entry_head, expects_continue, forwarded as wire_forwarded, hop_by_hop, is_file, names_this_blob,
    range as wire_range, select,
    trace::{Chance, Trace},
};
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Version, header};
use pingora::http::ResponseHeader;
use std::{
    net::{IpAddr, Ipv4Addr},
    sync::LazyLock,
    time::{Duration, SystemTime},
};

/// Whether a text can stand in a head without bringing another line with it.
fn is_one_line(text: &str) -> bool {
    !text.contains(['\r', '\n', '\0'])
}

// ---- ranges and conditions ----

/// `Range` and the conditions of a GET; before them a line with the blob's size. A part lies within the blob.
pub(crate) fn range(bytes: &[u8]) {
    let (size, fields) = first_line(bytes);
    let size: u64 = text(size).and_then(|size| size.trim().parse().ok()).unwrap_or(100);
    let (headers, digest) = (header_map(fields), Digest::of(b"x"));
    for selection in [select(&Method::GET, &headers, &digest, size), wire_range(&headers, size)] {
        if let Selection::Part { first, last } = selection {
            assert!(first <= last && last < size, "{first}-{last} of {size}");
        }
        for (status, head) in [blob_head(&digest, Some(size), selection), entry_head(&digest, size, selection)] {
            let length = head.get(header::CONTENT_LENGTH).map(|length| length.to_str().unwrap().parse::<u64>().unwrap());
            assert!(length.is_none_or(|length| length <= size));
            assert_eq!(status == StatusCode::PARTIAL_CONTENT, matches!(selection, Selection::Part { .. }));
            if let Some(range) = head.get(header::CONTENT_RANGE).filter(|_| status == StatusCode::PARTIAL_CONTENT) {
                let (first, last, of) = castier_upstream::content_range(range).expect("castier understands its own ranges");
                assert_eq!((Selection::Part { first, last }, of), (selection, Some(size)));
            }
        }
    }
    assert!(matches!(select(&Method::HEAD, &headers, &digest, size), Selection::Whole | Selection::NotModified));
    if headers.get_all(header::RANGE).iter().count() != 1 {
        assert_eq!(wire_range(&headers, size), Selection::Whole);
    }
}

/// `If-Match` and `If-None-Match` of a PUT or DELETE. An entity tag holds for one digest only.
pub(crate) fn conditions(bytes: &[u8]) {
    let headers = header_map(bytes);
    let digests = [Digest::of(b"x"), Digest::of(b"y")];
    let holds = |current: Option<&Digest>| condition(&headers).map(|condition| condition(current));
    let [none, x, y] = [holds(None), holds(Some(&digests[0])), holds(Some(&digests[1]))];
    let of = |name: &HeaderName| headers.get_all(name).iter().count();
    let (wanted, unwanted) = (of(&header::IF_MATCH), of(&header::IF_NONE_MATCH));
    assert_eq!(none, (wanted + unwanted > 0).then_some(wanted == 0), "what is not there has no tag");
    for (digest, holds) in digests.iter().zip([x, y]) {
        let named = |name: &HeaderName| headers.get_all(name).iter().any(|value| has(value, digest));
        if wanted > 0
            && !named(&header::IF_MATCH)
            && !headers.get_all(header::IF_MATCH).iter().any(|value| value.as_bytes().contains(&b'*'))
        {
            assert_eq!(holds, Some(false));
        }
        if names_this_blob(&headers, digest) {
            assert!(named(&header::IF_NONE_MATCH) && holds == Some(false));
        }
    }
}

fn has(value: &HeaderValue, digest: &Digest) -> bool {
    let tag = digest.etag();
    value.as_bytes().windows(tag.len()).any(|part| part == tag.as_bytes())
}

/// `Content-Range`, `Content-Length` and their like in the answer of a source.
pub(crate) fn content_range(bytes: &[u8]) {
    let headers = header_map(bytes);
    for value in headers.get_all(header::CONTENT_RANGE) {
        if let Some((first, last, size)) = castier_upstream::content_range(value) {
            assert!(first <= last && size.is_none_or(|size| last < size));
            let is_plain = |byte: &u8| byte.is_ascii_digit() || b"bytes -/*".contains(byte);
            assert!(value.as_bytes().iter().all(is_plain), "{value:?} has numbers that others read otherwise");
        }
    }
    let mut head = ResponseHeader::build(200, None).unwrap();
    for (name, value) in &headers {
        head.append_header(name.clone(), value.clone()).unwrap();
    }
    if let Some(size) = size_of(&head, &Digest::EMPTY) {
        let first = headers[header::CONTENT_LENGTH].as_bytes().split(|byte| *byte == b',').next().unwrap_or_default().trim_ascii();
        assert!(first.iter().all(u8::is_ascii_digit), "{:?} is read otherwise by others: {size}", first.escape_ascii().to_string());
    }
}

// ---- clients and proxies ----

/// `X-Forwarded-For` and `Forwarded`. A client can write what it likes before the address that a trusted proxy appends.
pub(crate) fn forwarded(bytes: &[u8]) {
    let peer = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1));
    let client = IpAddr::V4(Ipv4Addr::new(203, 0, 113, 9));
    let headers = header_map(bytes);
    assert_eq!(wire_forwarded::client(peer, &headers, |_| false), peer);
    let found = wire_forwarded::client(peer, &headers, |address| *address == peer);
    assert_eq!(found, found.to_canonical());
    wire_forwarded::client(peer, &headers, |_| true);
    // The proxy appends to the last line, or adds one.
    for (name, added) in
        [("x-forwarded-for", "203.0.113.9"), ("forwarded", "for=203.0.113.9"), ("forwarded", "for=\"203.0.113.9:80\";proto=http")]
    {
        if name == "forwarded" && headers.contains_key("x-forwarded-for") {
            continue;
        }
        let mut one_more = headers.clone();
        one_more.append(name, HeaderValue::from_str(added).unwrap());
        assert_eq!(wire_forwarded::client(peer, &one_more, |address| *address == peer), client, "{name}");
        let mut joined = headers.clone();
        if let Some(last) = headers.get_all(name).iter().next_back() {
            joined.remove(name);
            let before: Vec<_> = headers.get_all(name).iter().collect();
            for value in &before[..before.len() - 1] {
                joined.append(name, (*value).clone());
            }
            joined.append(name, HeaderValue::from_bytes(&[last.as_bytes(), b", ", added.as_bytes()].concat()).unwrap());
            let found = wire_forwarded::client(peer, &joined, |address| *address == peer);
            // After a quote that does not end nothing is reliable.
            assert!(found == client || (name == "forwarded" && found == peer), "{name}: {found}");
        }
    }
}

/// `traceparent`, `tracestate` and `X-Request-ID`. What is passed on is valid, and stays the same at the next hop.
pub(crate) fn trace(bytes: &[u8]) {
    let chance = Chance { trace: 5, request: 7, span: 9, sampled: bytes.len().is_multiple_of(2) };
    let trace = Trace::of(&header_map(bytes), chance);
    let told = |trace: &Trace| trace.headers().into_iter().filter_map(|(name, value)| Some((name, value?))).collect::<HeaderMap>();
    let headers = told(&trace);
    let parent = headers["traceparent"].to_str().unwrap();
    assert!(parent.len() == 55 && parent.starts_with("00-") && is_one_line(parent));
    assert!(headers["x-request-id"].to_str().unwrap().bytes().all(|byte| byte.is_ascii_graphic()));
    assert_eq!(headers["x-request-id"].to_str().unwrap(), trace.request_id().to_string());
    let next = Trace::of(&headers, chance);
    assert_eq!(told(&next), headers);
    assert_eq!((next.trace_id().to_string(), next.is_sampled()), (trace.trace_id().to_string(), trace.is_sampled()));
}

/// `Authorization`. The pair of `Basic` has a colon, and is what the header says.
pub(crate) fn authorization(bytes: &[u8]) {
    if let Some((pair, colon)) = password_of(bytes) {
        assert_eq!(pair.iter().position(|byte| *byte == b':'), Some(colon));
        assert!(pair.len() <= bytes.len());
        assert!(bytes.trim_ascii_start()[..5].eq_ignore_ascii_case(b"basic"));
    }
}

/// The fields of a head that decide little: for one hop, expectations, `Via`, a file in a form.
pub(crate) fn fields(bytes: &[u8]) {
    let headers = header_map(bytes);
    let hop: Vec<_> = hop_by_hop(&headers);
    assert!(hop.contains(&header::CONNECTION));
    assert!(![header::CONTENT_LENGTH, header::TRANSFER_ENCODING, header::HOST].iter().any(|framing| hop.contains(framing)));
    assert!(!expects_continue(Version::HTTP_10, &headers));
    expects_continue(Version::HTTP_11, &headers);
    for value in headers.values() {
        is_file(value);
        assert!(!via_header::names_this_node(value.as_bytes()), "nobody guesses the name of this node");
        let own = via_header::own(Version::HTTP_11);
        assert!(via_header::names_this_node(&[value.as_bytes(), b", ", own.as_bytes()].concat()));
    }
    let via = via_header::of(&headers);
    assert!(via.as_ref().is_none_or(|via| via.len() <= 4096));
    let whole = via_header::sync_along(via.clone(), via_header::whole);
    assert!(via_header::names_this_node(whole.as_bytes()));
    if let Some(via) = via {
        assert!(whole.as_bytes().starts_with(via.as_bytes()));
    }
}

// ---- answers of upstreams ----

/// `WWW-Authenticate` on the first line, and a realm's answer with a token after it. No part of them brings another line into a head.
pub(crate) fn challenge(bytes: &[u8]) {
    let (line, body) = first_line(bytes);
    for challenge in challenges(&header_map(&[b"www-authenticate: ", line].concat())) {
        let parts = match challenge {
            Challenge::Basic { realm } => vec![realm],
            Challenge::Bearer { realm, service, scope } => [Some(realm), service, scope].into_iter().flatten().collect(),
        };
        for part in parts {
            assert!(is_one_line(&part) && part.len() <= line.len());
        }
    }
    if let Some((token, lifetime)) = token(body) {
        assert!(!token.is_empty() && token.bytes().all(|byte| byte.is_ascii_graphic()) && lifetime >= Duration::from_secs(60));
        HeaderValue::try_from(format!("Bearer {token}")).unwrap();
    }
}

/// The head of an upstream's answer: whether it is kept, and for how long.
pub(crate) fn freshness(bytes: &[u8]) {
    let headers = header_map(bytes);
    if let Ok(names) = may_keep(StatusCode::OK, &headers, &["accept".to_owned()]) {
        assert!(names.is_sorted() && names.contains(&"accept".to_owned()));
        assert!(names.iter().all(|name| !name.is_empty() && *name == name.to_ascii_lowercase() && name != "*"));
        assert!(!headers.contains_key(header::SET_COOKIE));
    }
    let fetched = SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000);
    let terms = Terms { ttl: None, stale_if_error: Duration::from_secs(3600), negative_ttl: Duration::ZERO };
    let at = |seconds| state(StatusCode::OK, &headers, fetched, fetched + Duration::from_secs(seconds), &terms);
    let order = |freshness| match freshness {
        Freshness::Fresh => 0,
        Freshness::Stale => 1,
        Freshness::Expired => 2,
    };
    assert!([0, 1, 60, 3599, 3600, 1 << 32].map(at).map(order).is_sorted(), "nothing becomes fresh again by waiting");
    assert!(age(&headers, fetched, fetched + Duration::from_secs(60)) >= Duration::from_secs(60));
    for (name, value) in validators(&headers) {
        assert!(name == header::IF_NONE_MATCH || name == header::IF_MODIFIED_SINCE);
        assert!(headers.values().any(|known| *known == value));
    }
    if let Some(tag) = castier_routes::if_range(&headers) {
        assert!(tag.as_bytes().starts_with(b"\""), "{tag:?} is no strong tag");
    }
    let mut kept = HeaderMap::from_iter([(header::CONTENT_LENGTH, HeaderValue::from_static("5"))]);
    merge(&mut kept, &headers);
    assert_eq!(kept.get_all(header::CONTENT_LENGTH).iter().collect::<Vec<_>>(), ["5"]);
    merge(&mut kept.clone(), &headers);
    for rule in preset("oci").unwrap().iter().chain(preset("huggingface").unwrap()) {
        if let Some(digest) = rule.named_digest(&headers) {
            let digest = digest.to_string();
            assert!(headers.values().any(|value| value.to_str().is_ok_and(|value| value.contains(&digest))));
        }
    }
}

/// A `Link` header. What stays is as it was, and no target brings another link with it.
pub(crate) fn link_header(bytes: &[u8]) {
    let Some(line) = text(bytes).filter(|line| is_one_line(line)) else { return };
    let all = |line: &str| {
        let mut all = Vec::new();
        let same = link_header::rewrite(line, |target, relation| {
            all.push((target.to_owned(), relation.to_owned()));
            Rewrite::Keep
        });
        assert_eq!(same, None);
        all
    };
    let links = all(line);
    let mut count = 0;
    let dropped = link_header::rewrite(line, |_, _| {
        count += 1;
        if count % 2 == 0 { Rewrite::Keep } else { Rewrite::Drop }
    });
    let kept: Vec<_> = links.iter().skip(1).step_by(2).cloned().collect();
    assert_eq!(all(dropped.as_deref().unwrap_or(line)), kept);
    let evil = "/x>; rel=\"evil\", <https://evil.example/>\r\ny: z";
    if let Some(replaced) = link_header::rewrite(line, |_, _| Rewrite::Replace(evil.to_owned())) {
        let now = all(&replaced);
        assert!(is_one_line(&replaced));
        assert_eq!(now.len(), links.len());
        for ((target, relation), (_, before)) in now.iter().zip(&links) {
            assert_eq!(relation, before);
            assert!(target.starts_with("/x%3E") && !target.contains(['<', '>', '"', ' ']));
        }
    }
}

// ---- proofs ----

static SECRETS: LazyLock<Secrets> = LazyLock::new(|| {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "0123456789abcdef0123456789abcdef\n").unwrap();
    Secrets::open(&Cluster { secret_file: file.path().to_owned(), ..Cluster::default() }).unwrap()
});

/// A peer's request and its proof: the first line has method and path, the others have the fields. Nobody guesses a proof, and a proof holds for one request only.
pub(crate) fn proof(bytes: &[u8]) {
    let (line, fields) = first_line(bytes);
    let line = String::from_utf8_lossy(line);
    let (method, path) = line.split_once(' ').unwrap_or((&line, "/"));
    let headers = header_map(fields);
    let asked = |headers: &HeaderMap| -> Vec<Option<Vec<u8>>> {
        ASKED.map(|name| headers.get(name).map(|value| value.as_bytes().trim_ascii().to_vec())).to_vec()
    };
    let values = asked(&headers);
    let is_twice = ASKED.iter().any(|name| headers.get_all(*name).iter().count() > 1);
    let fields: [Field<'_>; ASKED.len()] = std::array::from_fn(|at| if is_twice { Err(Twice) } else { Ok(values[at].as_deref()) });
    let guess = headers.get(PROOF).map(HeaderValue::as_bytes);
    assert!(SECRETS.admit(guess, method, path, fields).is_none());
    let (proof, asked) = SECRETS.ask(method, path, &headers);
    let proof = proof.expect("there is a secret");
    let admitted = SECRETS.admit(Some(proof.as_bytes()), method, path, fields);
    assert_eq!(admitted.is_none(), is_twice);
    assert!(!asked.is_answered(StatusCode::OK, &headers));
    let Some(admitted) = admitted else { return };
    assert!(SECRETS.admit(Some(proof.as_bytes()), method, &format!("{path}x"), fields).is_none());
    assert!(SECRETS.admit(Some(proof.as_bytes()), &format!("{method}x"), path, fields).is_none());
    for at in 0..fields.len() {
        let mut other = fields;
        other[at] = if fields[at] == Ok(None) { Ok(Some(b"")) } else { Ok(None) };
        assert!(SECRETS.admit(Some(proof.as_bytes()), method, path, other).is_none(), "{}", ASKED[at]);
    }
    let mut answer = headers.clone();
    answer.remove(PROOF);
    let has_twice = answer.keys().any(|name| answer.get_all(name).iter().count() > 1);
    answer.insert(PROOF, admitted.prove(StatusCode::OK, &answer).expect("there is a secret"));
    assert!(asked.is_answered(StatusCode::OK, &answer) || has_twice);
    assert!(!asked.is_answered(StatusCode::NOT_FOUND, &answer));
}

static TICKETS: LazyLock<Tickets> = LazyLock::new(|| Tickets::new(b"a key for the target"));

/// A ticket of Git LFS: a repository on the first line, the value of `Authorization` after it.
pub(crate) fn ticket(bytes: &[u8]) {
    let (repository, value) = first_line(bytes);
    let (repository, value) = (String::from_utf8_lossy(repository), String::from_utf8_lossy(value));
    let oid = Digest::of(repository.as_bytes());
    assert_eq!(TICKETS.check(&value, &repository, &oid, 5), None);
    let size = value.len() as u64;
    let ticket = TICKETS.issue(&repository, &oid, size, 10);
    assert_eq!([9, 10].map(|now| TICKETS.check(&ticket, &repository, &oid, now)), [Some(size), None]);
    assert_eq!(TICKETS.check(&ticket, &format!("{repository}x"), &oid, 5), None);
    assert_eq!(TICKETS.check(&ticket, &repository, &Digest::EMPTY, 5).is_some(), repository.is_empty());
    assert_eq!(TICKETS.check(&format!("{ticket}{value}"), &repository, &oid, 5).is_some(), value.is_empty());
}
