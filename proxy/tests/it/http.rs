//! The request table of the contract, for castier and, where it is the same, for the origin.

use crate::support::{Blob, Castier, Conn, KIB, Lie, LyingOrigin, MIB, RealOrigin, Reply, Request, assert_ledger, get, light};
use std::net::SocketAddr;

const YEAR: &str = "public, max-age=31536000, immutable";

async fn world(config: &str) -> (LyingOrigin, Castier) {
    let origin = LyingOrigin::start().await;
    let castier = Castier::start(&origin.url(), config).await;
    (origin, castier)
}

#[track_caller]
fn assert_blob_headers(reply: &Reply, blob: &Blob, length: u64) {
    let expected = [
        ("content-type", "application/octet-stream".to_owned()),
        ("content-length", length.to_string()),
        ("etag", format!("\"{}\"", blob.digest)),
        ("cache-control", YEAR.to_owned()),
        ("accept-ranges", "bytes".to_owned()),
        ("repr-digest", blob.digest.repr_digest()),
        ("x-content-type-options", "nosniff".to_owned()),
    ];
    for (name, value) in expected {
        assert_eq!(reply.header(name), Some(value.as_str()), "{name}: {:?}", reply.head);
        assert_eq!(reply.head.headers.iter().filter(|(key, _)| key == name).count(), 1, "{name} twice");
    }
    assert!(reply.header("date").is_some_and(|date| date.ends_with(" GMT")), "{:?}", reply.head);
}

#[tokio::test]
async fn headers_of_a_blob() {
    let _turn = light().await;
    let (origin, castier) = world("").await;
    for size in [0, 1, 100 * KIB, 3 * MIB] {
        let blob = origin.blob(size);
        for round in ["cold", "warm"] {
            let reply = get(castier.public, &blob).await;
            reply.assert_is(&blob);
            assert_blob_headers(&reply, &blob, size);
            let head = Request::new("HEAD", blob.path()).send(castier.public).await;
            assert_eq!((head.status, head.body.len()), (200, 0), "{round}");
            assert_blob_headers(&head, &blob, size);
            if size > 0 {
                let part = Request::get(blob.path()).header("Range", "bytes=0-0").send(castier.public).await;
                assert_eq!(part.status, 206);
                assert_blob_headers(&part, &blob, 1);
            }
        }
    }
    let blob = origin.blob(10);
    let cold = Request::new("HEAD", blob.path()).send(castier.public).await;
    assert_eq!(cold.status, 200);
    assert_blob_headers(&cold, &blob, 10);
}

/// One row: headers of the request; expected status, `Content-Range` and part of the body.
type Row = (&'static [(&'static str, &'static str)], u16, Option<&'static str>, (u64, u64));

/// For a blob of 100 bytes. `TAG` stands for its validator, `OTHER` for another's.
const TABLE: &[Row] = &[
    (&[], 200, None, (0, 100)),
    (&[("Range", "bytes=0-0")], 206, Some("bytes 0-0/100"), (0, 1)),
    (&[("Range", "bytes=10-19")], 206, Some("bytes 10-19/100"), (10, 20)),
    (&[("Range", "bytes=90-")], 206, Some("bytes 90-99/100"), (90, 100)),
    (&[("Range", "bytes=-5")], 206, Some("bytes 95-99/100"), (95, 100)),
    (&[("Range", "bytes=-500")], 206, Some("bytes 0-99/100"), (0, 100)),
    (&[("Range", "bytes=0-99999999999999999999999")], 206, Some("bytes 0-99/100"), (0, 100)),
    (&[("Range", "bytes=100-")], 416, Some("bytes */100"), (0, 0)),
    (&[("Range", "bytes=-0")], 416, Some("bytes */100"), (0, 0)),
    (&[("Range", "bytes=9-3")], 200, None, (0, 100)),
    (&[("Range", "bytes=0-1,5-6")], 200, None, (0, 100)),
    (&[("Range", "lines=1-2")], 200, None, (0, 100)),
    (&[("Range", "bytes=x")], 200, None, (0, 100)),
    (&[("Range", "bytes=1-2"), ("Range", "bytes=3-4")], 200, None, (0, 100)),
    (&[("Range", "bytes=1-2"), ("If-Range", "TAG")], 206, Some("bytes 1-2/100"), (1, 3)),
    (&[("Range", "bytes=1-2"), ("If-Range", "W/TAG")], 200, None, (0, 100)),
    (&[("Range", "bytes=1-2"), ("If-Range", "OTHER")], 200, None, (0, 100)),
    (&[("Range", "bytes=1-2"), ("If-Range", "Wed, 21 Oct 2015 07:28:00 GMT")], 200, None, (0, 100)),
    (&[("If-None-Match", "TAG")], 304, None, (0, 0)),
    (&[("If-None-Match", "W/TAG")], 304, None, (0, 0)),
    (&[("If-None-Match", "\"zz\", TAG")], 304, None, (0, 0)),
    (&[("If-None-Match", "*")], 304, None, (0, 0)),
    (&[("If-None-Match", "OTHER")], 200, None, (0, 100)),
    (&[("If-None-Match", "OTHER"), ("Range", "bytes=1-2")], 206, Some("bytes 1-2/100"), (1, 3)),
    (&[("If-None-Match", "TAG"), ("Range", "bytes=100-")], 304, None, (0, 0)),
    (&[("If-Modified-Since", "Wed, 21 Oct 2035 07:28:00 GMT")], 200, None, (0, 100)),
];

async fn assert_row(to: SocketAddr, blob: &Blob, row: &Row) {
    let (headers, status, content_range, (from, end)) = row;
    let (tag, other) = (format!("\"{}\"", blob.digest), format!("\"{}\"", "0".repeat(64)));
    let mut request = Request::get(blob.path());
    for (name, value) in *headers {
        request = request.header(name, value.replace("TAG", &tag).replace("OTHER", &other));
    }
    let reply = request.send(to).await;
    assert_eq!((reply.status, reply.complete, reply.header("content-range")), (*status, true, *content_range), "{headers:?}");
    match status {
        416 => drop(reply.assert_problem(416)),
        304 => {
            assert_eq!((reply.header("etag"), reply.header("cache-control")), (Some(tag.as_str()), Some(YEAR)));
            assert!(reply.body.is_empty());
        }
        _ => assert!(reply.body == blob.bytes(*from, *end), "{headers:?}: the wrong bytes"),
    }
}

#[tokio::test]
async fn conditions_and_ranges() {
    let _turn = light().await;
    let origin = RealOrigin::start().await;
    let castier = Castier::start(&origin.url(), "").await;
    let warm = Blob::new(100);
    Request::new("PUT", warm.path()).body(warm.whole()).send(castier.public).await;
    for row in TABLE {
        let cold = Blob::new(100);
        Request::new("PUT", cold.path()).body(cold.whole()).send(origin.addr).await;
        assert_row(castier.public, &cold, row).await;
        assert_row(castier.public, &warm, row).await;
        assert_row(origin.addr, &warm, row).await;
    }
    assert_ledger(&castier).await;
}

#[tokio::test]
async fn a_client_that_has_it_needs_no_look_up() {
    let _turn = light().await;
    let (origin, castier) = world("").await;
    // Even if the origin does not have the blob: the digest names the content.
    let blob = Blob::new(10);
    for method in ["GET", "HEAD"] {
        let request = Request::new(method, blob.path()).header("If-None-Match", format!("\"{}\"", blob.digest));
        assert_eq!(request.send(castier.public).await.status, 304);
    }
    assert!(origin.requests("GET", &blob).is_empty() && origin.requests("HEAD", &blob).is_empty());
    assert_eq!(assert_ledger(&castier).await.total("castier_flights_total"), 0);
}

#[tokio::test]
async fn what_is_not_a_digest() {
    let _turn = light().await;
    let origin = RealOrigin::start().await;
    let castier = Castier::start(&origin.url(), "").await;
    let digest = Blob::new(1).digest.to_string();
    let names =
        [String::new(), "abc".into(), "g".repeat(64), digest.to_uppercase(), format!("{digest}0"), format!("{digest}/x"), "%00".into()];
    for name in names {
        for method in ["GET", "PUT"] {
            for to in [castier.public, origin.addr] {
                let mut request = Request::new(method, format!("/cas/{name}"));
                if method == "PUT" {
                    request = request.body("x");
                }
                let detail = request.send(to).await.assert_problem(400);
                assert!(detail.contains("64") && detail.contains("lowercase"), "says what would be right: {detail}");
            }
        }
        assert_eq!(Request::new("HEAD", format!("/cas/{name}")).send(castier.public).await.status, 400);
    }
}

#[tokio::test]
async fn a_head_never_downloads() {
    let _turn = light().await;
    let (origin, castier) = world("").await;
    let blob = origin.blob(8 * MIB);
    for _ in 0..3 {
        let head = Request::new("HEAD", blob.path()).send(castier.public).await;
        assert_eq!((head.status, head.header("content-length"), head.body.len()), (200, Some("8388608"), 0));
    }
    assert_eq!((origin.gets(&blob), origin.sent(&blob)), (0, 0));
    assert!(!origin.requests("HEAD", &blob).is_empty());
    let absent = Request::new("HEAD", Blob::new(3).path()).send(castier.public).await;
    assert_eq!((absent.status, absent.body.len()), (404, 0));
    get(castier.public, &blob).await.assert_is(&blob);
    let asked = origin.requests("HEAD", &blob).len();
    assert_eq!(Request::new("HEAD", blob.path()).send(castier.public).await.status, 200);
    assert_eq!(origin.requests("HEAD", &blob).len(), asked, "what is kept needs no question");
    // Of coded bytes the length is not the blob's.
    for (lines, length) in [("Content-Encoding: gzip\r\n", None), ("Content-Encoding: Identity\r\n", Some("7"))] {
        let blob = origin.blob(7);
        origin.always(&blob, Lie { lines, ..Lie::honest().status(200) });
        let reply = Request::new("HEAD", blob.path()).send(castier.public).await;
        assert_eq!((reply.status, reply.header("content-length")), (200, length), "{lines}");
    }
    assert_ledger(&castier).await;
}

#[tokio::test]
async fn keep_alive_and_pipelining() {
    let _turn = light().await;
    let (origin, castier) = world("").await;
    let blobs: Vec<_> = [10, 300 * KIB, 2 * MIB, 0].into_iter().map(|size| origin.blob(size)).collect();
    let mut conn = Conn::open(castier.public).await;
    for blob in blobs.iter().chain(&blobs) {
        conn.ask(&Request::get(blob.path())).await.assert_is(blob);
    }
    // One write, 40 requests: the answers come in order.
    let absent = Blob::new(9);
    let (mut bytes, mut expected) = (Vec::new(), Vec::new());
    for round in 0..8 {
        let blob = &blobs[round % 4];
        let have = Request::get(blob.path()).header("If-None-Match", format!("\"{}\"", blob.digest));
        let requests =
            [Request::get(blob.path()), Request::new("HEAD", blob.path()), have, Request::get(absent.path()), Request::get("/cas/abc")];
        for (request, (method, status)) in requests.into_iter().zip([("GET", 200), ("HEAD", 200), ("GET", 304), ("GET", 404), ("GET", 400)])
        {
            bytes.extend_from_slice(&request.bytes());
            expected.push((blob, method, status));
        }
    }
    conn.send(&bytes).await;
    for (blob, method, status) in expected {
        let reply = conn.reply(method).await;
        assert_eq!(reply.status, status);
        if (method, status) == ("GET", 200) {
            reply.assert_is(blob);
        }
    }
    assert_ledger(&castier).await;
}

#[tokio::test]
async fn connections_close_when_asked_to() {
    let _turn = light().await;
    let (origin, castier) = world("").await;
    let blob = origin.blob(1000);
    for request in [Request::get(blob.path()).header("Connection", "close"), Request::get(blob.path()).http10()] {
        for _ in ["cold", "warm"] {
            let mut conn = Conn::open(castier.public).await;
            conn.ask(&request).await.assert_is(&blob);
            assert!(conn.closed().await);
        }
    }
    let mut conn = Conn::open(castier.public).await;
    let kept = Request::get(blob.path()).http10().header("Connection", "keep-alive");
    let reply = conn.ask(&kept).await;
    reply.assert_is(&blob);
    assert_eq!(reply.header("connection").map(str::to_lowercase).as_deref(), Some("keep-alive"));
    conn.ask(&kept).await.assert_is(&blob);
}

#[tokio::test]
async fn expect_100_continue() {
    let _turn = light().await;
    let (origin, castier) = world("").await;
    let blob = Blob::new(2 * MIB);
    let request = || Request::new("PUT", blob.path()).header("Expect", "100-continue").body(blob.whole());
    let mut conn = Conn::open(castier.public).await;
    conn.send(&request().head_bytes()).await;
    let interim = conn.head().await.unwrap();
    assert!(interim.first.contains(" 100 "), "{interim:?}");
    conn.send(&blob.whole()).await;
    assert_eq!(conn.reply("PUT").await.status, 201);
    // After 100 Continue the connection stays open.
    conn.ask(&Request::get(blob.path())).await.assert_is(&blob);
    // A body that means nothing is called for as well, and over HTTP/1.0 none is.
    conn.send(&Request::get(blob.path()).header("Expect", "100-continue").body("abc").head_bytes()).await;
    assert!(conn.head().await.unwrap().first.contains(" 100 "));
    conn.send(b"abc").await;
    conn.reply("GET").await.assert_is(&blob);
    let old = Blob::new(2 * MIB);
    let from_old = Request::new("PUT", old.path()).http10().header("Expect", "100-continue").body(old.whole());
    assert_eq!(Conn::open(castier.public).await.ask(&from_old).await.status, 201);
    // It exists: 200 at once, and the body stays where it is.
    for known in ["to castier", "to the origin"] {
        let mut conn = Conn::open(castier.public).await;
        conn.send(&request().head_bytes()).await;
        let answer = conn.head().await.unwrap();
        assert!(answer.first.contains(" 200 "), "known {known}: {answer:?}");
        Request::new("POST", format!("/purge/{}", blob.digest)).send(castier.admin).await;
    }
    // Refused at once as well.
    let mut conn = Conn::open(castier.public).await;
    conn.send(&Request::new("PUT", "/cas/abc").header("Expect", "100-continue").body("xyz").head_bytes()).await;
    assert_eq!(conn.reply("PUT").await.status, 400);
    // Beside the one upload, the origin was only asked whether it would want another.
    assert_eq!(origin.requests("PUT", &blob).iter().filter(|seen| seen.head.header("expect").is_none()).count(), 1);
}

#[tokio::test]
async fn absolute_form() {
    let _turn = light().await;
    let (origin, castier) = world("").await;
    let blob = origin.blob(5000);
    for host in ["castier.test", "other.test:81", "127.0.0.1"] {
        let ask = |path: &str| Request::get(format!("http://{host}{path}")).header("Host", host);
        ask(&blob.path()).send(castier.public).await.assert_is(&blob);
        ask("/cas/abc").send(castier.public).await.assert_problem(400);
    }
    assert_eq!(origin.gets(&blob), 1);
    // castier is not an open proxy: it asks the origin for any named host.
    let reply = Request::get("http://other.test/some/path?q=1").header("Host", "other.test").send(castier.public).await;
    let text = String::from_utf8(reply.body).unwrap();
    assert!(text.starts_with("GET /some/path?q=1 HTTP/1.1\n"), "an origin is asked in origin-form: {text}");
    // A query means nothing to a blob.
    Request::get(format!("{}?x=1", blob.path())).send(castier.public).await.assert_is(&blob);
}
