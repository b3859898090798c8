//! Malformed input: a clear answer, no crash, no leak, and nothing reaches the origin.

use crate::support::{Castier, Conn, LyingOrigin, MIB, Random, Reply, Request, assert_ledger, eventually, get, light, metrics, within};
use std::time::{Duration, Instant};

async fn world(config: &str) -> (LyingOrigin, Castier) {
    let origin = LyingOrigin::start().await;
    let castier = Castier::start(&origin.url(), config).await;
    (origin, castier)
}

/// The answer to these bytes.
async fn raw(castier: &Castier, bytes: &[u8]) -> Reply {
    let mut conn = Conn::open(castier.public).await;
    conn.send(bytes).await;
    conn.reply("GET").await
}

/// castier still works, and has closed everything that the test made it open.
async fn assert_unharmed(origin: &LyingOrigin, castier: &Castier, descriptors: usize) {
    let blob = origin.blob(1000);
    get(castier.public, &blob).await.assert_is(&blob);
    // One connection to the origin may be kept for later.
    eventually("no connection is left behind", async || (castier.descriptors() <= descriptors + 2).then_some(())).await;
    assert_ledger(castier).await;
    assert!(!castier.output().contains("panicked"), "{}", castier.output());
}

#[tokio::test]
async fn requests_that_are_not_http() {
    let _turn = light().await;
    let (origin, castier) = world("").await;
    let descriptors = castier.descriptors();
    let requests: &[&[u8]] = &[
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"\0\0\0\0\r\n\r\n",
        b"hello\r\n\r\n",
        b"GET /x\r\n\r\n",
        b"GET  /x HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /a b HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /x HTTP/9.9\r\nHost: a\r\n\r\n",
        b"GET /x HTTP/1.1 \r\nHost: a\r\n\r\n",
        b"G\x01T /x HTTP/1.1\r\nHost: a\r\n\r\n",
        b"G(T /x HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /x HTTP/1.1\r\n\r\n",
        b"GET /x HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET /x HTTP/1.1\r\nHost: a\r\nNo colon here\r\n\r\n",
        b"GET /x HTTP/1.1\r\nHost: a\r\nName : value\r\n\r\n",
        b"GET /x HTTP/1.1\r\nHost: a\r\n: value\r\n\r\n",
        b"GET /x HTTP/1.1\r\nHost: a\r\nName: va\0lue\r\n\r\n",
        b"GET /x HTTP/1.1\r\nHost: a\r\nName: va\rlue\r\n\r\n",
        b"GET /x HTTP/1.1\r\nHost: a\r\nName: one\r\n two\r\n\r\n",
        b"PRI * HTTP/3.0\r\n\r\nSM\r\n\r\n",
        b"GET /x<y HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /x`y HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /x HTTP/1.1\r\nHost: u@a\r\n\r\n",
        b"GET /x HTTP/1.1\r\nHost: a b/c@d\r\n\r\n",
        b"GET /x HTTP/1.1\r\nHost: a/b\r\n\r\n",
    ];
    for request in requests {
        let text = String::from_utf8_lossy(request);
        let reply = raw(&castier, request).await;
        assert!(matches!(reply.status, 400 | 505), "{text:?}: {:?}", reply.head);
        reply.assert_problem(reply.status);
    }
    let refused = async || metrics(&castier).await.sum("castier_http_requests_total", &[("route", "refused")]);
    eventually("each is counted", async || (refused().await == requests.len() as u64).then_some(())).await;
    assert!(origin.seen().iter().all(|seen| !seen.target.starts_with("/x") && !seen.target.starts_with("/a")), "{:?}", origin.seen());
    assert_unharmed(&origin, &castier, descriptors).await;
}

#[tokio::test]
async fn castier_is_no_forward_proxy() {
    let _turn = light().await;
    let (_origin, castier) = world("").await;
    let reply = raw(&castier, b"CONNECT a:443 HTTP/1.1\r\nHost: a:443\r\n\r\n").await;
    reply.assert_problem(405);
    assert_eq!(reply.header("allow"), Some("GET, HEAD, PUT"), "{:?}", reply.head);
}

#[tokio::test]
async fn bodies_whose_length_is_not_clear() {
    let _turn = light().await;
    let (origin, castier) = world("").await;
    let descriptors = castier.descriptors();
    let digest = "0".repeat(64);
    let framings = [
        "Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef",
        "Content-Length: 5, 6\r\n\r\nabcdef",
        "Content-Length: -1\r\n\r\n",
        "Content-Length: +5\r\n\r\nabcde",
        "Content-Length: 5x\r\n\r\nabcde",
        "Content-Length: 99999999999999999999999\r\n\r\n",
        "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
        "Transfer-Encoding: gzip\r\n\r\n",
        "Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
        "Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
        "Transfer-Encoding: chunked\r\n\r\nxyz\r\nabc\r\n0\r\n\r\n",
        "Transfer-Encoding: chunked\r\n\r\n-1\r\nabc\r\n0\r\n\r\n",
        "Transfer-Encoding: chunked\r\n\r\nfffffffffffffffff\r\nabc\r\n0\r\n\r\n",
        "Transfer-Encoding: chunked\r\n\r\n3\r\nabcdef\r\n0\r\n\r\n",
        "Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n\r\n3\r\ndef\r\n0\r\n\r\n",
        "Transfer-Encoding: chunked\r\n\r\n;x\r\nabc\r\n0\r\n\r\n",
        "Transfer-Encoding: chunked\r\n\r\n \r\n\r\n",
    ];
    for target in [format!("/cas/{digest}"), "/x".to_owned()] {
        for framing in framings {
            let request = format!("PUT {target} HTTP/1.1\r\nHost: a\r\n{framing}");
            // Were the rest taken for another request, there would be two answers.
            let smuggled = format!("{request}GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n");
            let mut conn = Conn::open(castier.public).await;
            conn.send(smuggled.as_bytes()).await;
            let reply = conn.reply("PUT").await;
            // On a relay the answer may be under way already: then it is cut.
            let cut = target == "/x" && reply.status == 200 && !reply.complete;
            assert!(cut || matches!(reply.status, 400 | 413 | 501 | 502), "{request:?}: {:?}", reply.head);
            assert!(conn.closed().await, "{request:?}: nobody knows where the next request begins");
        }
    }
    assert!(origin.seen().iter().all(|seen| seen.target != "/smuggled"), "{:?}", origin.seen());
    assert_unharmed(&origin, &castier, descriptors).await;
}

#[tokio::test]
async fn heads_that_are_too_large() {
    let _turn = light().await;
    let (origin, castier) = world("").await;
    let descriptors = castier.descriptors();
    let blob = origin.blob(1000);
    let long = "x".repeat(MIB as usize);
    for _ in 0..3 {
        let many = (0..10_000).fold(Request::get(blob.path()), |request, n| request.header(&format!("X-{n}"), "1"));
        for request in [
            Request::get(blob.path()).header("X-Long", long.clone()),
            many,
            Request::get(format!("/{long}")),
            Request::get("/x").header(&long, "1"),
        ] {
            let reply = Conn::open(castier.public).await.ask(&request).await;
            assert!(matches!(reply.status, 431 | 414), "{:?}", reply.head);
            let detail = reply.assert_problem(reply.status);
            assert!(detail.chars().any(|c| c.is_ascii_digit()), "says how much is allowed: {detail}");
        }
    }
    // What stays within the limits is fine.
    let request = (0..90).fold(Request::get(blob.path()), |request, n| request.header(&format!("X-{n}"), "x".repeat(200)));
    request.send(castier.public).await.assert_is(&blob);
    let request = (0..110).fold(Request::get(blob.path()), |request, n| request.header(&format!("X-{n}"), "1"));
    request.send(castier.public).await.assert_problem(431);
    assert_unharmed(&origin, &castier, descriptors).await;
    let rss = castier.memory("VmHWM") / MIB;
    assert!(rss < 128, "{rss} MiB");
}

#[tokio::test]
async fn a_slow_head() {
    let _turn = light().await;
    let (origin, castier) = world("limits.header_timeout = \"700ms\"\nlimits.idle_timeout = \"1500ms\"").await;
    let descriptors = castier.descriptors();
    let mut conn = Conn::open(castier.public).await;
    let start = Instant::now();
    // A byte now and then keeps nothing alive: the time is for the whole head.
    let (mut read, mut write) = conn.wire.stream.split();
    let sending = async {
        use tokio::io::AsyncWriteExt;
        for byte in b"GET / HTTP/1.1\r\nHost: a\r\nX-Slow: ".iter().chain(std::iter::repeat(&b'x')) {
            if write.write_all(&[*byte]).await.is_err() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let receiving = async {
        use tokio::io::AsyncReadExt;
        let mut text = Vec::new();
        let _ = read.read_to_end(&mut text).await;
        String::from_utf8_lossy(&text).into_owned()
    };
    let text = within(Duration::from_secs(20), "an answer to a slow head", async {
        tokio::select! {
            () = sending => String::new(),
            text = receiving => text,
        }
    })
    .await;
    assert!(text.starts_with("HTTP/1.1 408 ") && text.contains("application/problem+json"), "{text:?}");
    assert!(start.elapsed() >= Duration::from_millis(700));
    drop(conn);
    // Nothing at all, and nothing after an answer: closed without a word or with a 408, but closed.
    let blob = origin.blob(100);
    for first in [false, true] {
        let mut conn = Conn::open(castier.public).await;
        if first {
            conn.ask(&Request::get(blob.path())).await.assert_is(&blob);
        }
        let last = conn.reply("GET").await;
        assert!(matches!(last.status, 0 | 408), "{:?}", last.head);
        assert!(conn.closed().await);
    }
    assert_unharmed(&origin, &castier, descriptors).await;
}

#[tokio::test]
async fn any_bytes_at_all() {
    let _turn = light().await;
    let (origin, castier) = world("limits.header_timeout = \"300ms\"").await;
    let descriptors = castier.descriptors();
    let mut random = Random::seeded();
    let blob = origin.blob(100);
    let sound = [Request::get(blob.path()).bytes(), Request::new("PUT", blob.path()).chunks(&blob.whole(), 7).bytes()];
    for _ in 0..200 {
        // A sound request with a few bytes wrong, missing or too many.
        let mut bytes = sound[random.below(2) as usize].clone();
        for _ in 0..=random.below(4) {
            let at = random.below(bytes.len() as u64) as usize;
            match random.below(3) {
                0 => bytes[at] = random.next() as u8,
                1 => drop(bytes.remove(at)),
                _ => bytes.insert(at, random.next() as u8),
            }
        }
        let mut conn = Conn::open(castier.public).await;
        conn.send(&bytes).await;
        // Whatever is said to that, it is said in time, or the connection is closed.
        let _ = tokio::time::timeout(Duration::from_secs(1), conn.wire.head()).await;
    }
    assert_unharmed(&origin, &castier, descriptors).await;
}
