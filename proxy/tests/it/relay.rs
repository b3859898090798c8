//! Everything that is not CAS goes to the origin and back, unchanged and uncached, as it comes.

use crate::support::{Castier, Conn, LyingOrigin, MIB, Request, eventually, light, metrics};

async fn world() -> (LyingOrigin, Castier) {
    let origin = LyingOrigin::start().await;
    let castier = Castier::start(&origin.url(), "").await;
    (origin, castier)
}

#[tokio::test]
async fn requests_arrive_as_they_were() {
    let _turn = light().await;
    let (origin, castier) = world().await;
    for target in ["/", "/ac/abc", "/a/../b//c?x=%20&y=/", "/casual", "/%2e%2e/%41"] {
        for _ in 0..2 {
            let reply = Request::get(target).header("X-Own", "kept").send(castier.public).await;
            assert_eq!((reply.status, reply.header("x-from")), (200, Some("origin")), "{target}");
            let text = String::from_utf8(reply.body).unwrap();
            assert!(text.starts_with(&format!("GET {target} HTTP/1.1\n")), "{text}");
            assert!(text.contains("x-own: kept\n"), "{text}");
        }
        assert_eq!(origin.seen().iter().filter(|seen| seen.target == target).count(), 2, "never from a cache");
    }
    for method in ["POST", "PUT", "PATCH", "DELETE", "PROPFIND"] {
        let reply = Request::new(method, "/elsewhere").body("some body").send(castier.public).await;
        assert_eq!((reply.status, reply.body.as_slice()), (200, b"some body".as_slice()), "{method}");
    }
    let head = Request::new("HEAD", "/elsewhere").send(castier.public).await;
    assert_eq!((head.status, head.body.len()), (200, 0));
    let now = metrics(&castier).await;
    assert_eq!(now.sum("castier_http_requests_total", &[("route", "relay"), ("listener", "public")]), 16);
    assert_eq!(now.total("castier_gets_total"), 0);
}

#[tokio::test]
async fn the_origin_learns_who_asks_and_nothing_about_the_connection() {
    let _turn = light().await;
    let (_origin, castier) = world().await;
    let request = Request::get("/who")
        .header("Connection", "X-Private")
        .header("X-Private", "for castier alone")
        .header("Keep-Alive", "timeout=99")
        .header("Proxy-Connection", "keep-alive")
        .header("TE", "trailers")
        .header("Upgrade", "h2c");
    let reply = Conn::open(castier.public).await.ask(&request).await;
    let text = String::from_utf8(reply.body.clone()).unwrap();
    for hop in ["x-private:", "keep-alive:", "proxy-connection:", "upgrade:", "timeout=99", "te: "] {
        assert!(!text.contains(hop), "{hop} went further than one hop: {text}");
    }
    assert!(text.contains("x-forwarded-for: 127.0.0.1\n") && text.contains("x-forwarded-proto: http\n"), "{text}");
    assert!(text.lines().any(|line| line.starts_with("via: ") && line.contains("castier")), "{text}");
    assert!(reply.header("x-hop").is_none() && reply.header("keep-alive").is_none(), "{:?}", reply.head);
    assert_eq!(reply.header("x-from"), Some("origin"));

    let request = Request::get("/who").header("X-Forwarded-For", "10.1.1.1").header("Via", "1.1 edge");
    let text = String::from_utf8(request.send(castier.public).await.body).unwrap();
    assert!(text.contains("x-forwarded-for: 10.1.1.1, 127.0.0.1\n"), "the chain goes on: {text}");
    assert!(text.contains("1.1 edge") && text.contains("castier"), "{text}");
}

#[tokio::test]
async fn both_ways_stream() {
    let _turn = light().await;
    let (_origin, castier) = world().await;
    let mut conn = Conn::open(castier.public).await;
    conn.send(&Request::new("POST", "/echo").header("Transfer-Encoding", "chunked").bytes()).await;
    // The answer has begun while the request has not ended: neither side is held back until it is whole.
    let mut framing = None;
    for word in ["one", "two", "three"] {
        conn.send(format!("{:x}\r\n{word}\r\n", word.len()).as_bytes()).await;
        if framing.is_none() {
            let head = conn.head().await.unwrap();
            assert!(head.first.contains(" 200 "), "{head:?}");
            framing = Some(head.framing(crate::support::wire::Framing::Close));
        }
        let framing = framing.as_mut().unwrap();
        let echo = crate::support::within(crate::support::DEADLINE, "the echo", conn.wire.piece(framing, usize::MAX)).await;
        assert_eq!(echo.unwrap(), Some(word.as_bytes()));
    }
    conn.send(b"0\r\n\r\n").await;
    assert_eq!(conn.wire.piece(framing.as_mut().unwrap(), usize::MAX).await.unwrap(), None);
}

#[tokio::test]
async fn large_bodies_pass_in_bounded_memory() {
    let _turn = light().await;
    let (_origin, castier) = world().await;
    let body = crate::support::Blob::new(48 * MIB).whole();
    let before = castier.memory("VmRSS");
    let mut conn = Conn::open(castier.public).await;
    conn.send(&Request::new("POST", "/echo").header("Content-Length", body.len().to_string()).bytes()).await;
    let mut framing = conn.head().await.unwrap().framing(crate::support::wire::Framing::Close);
    // Piece by piece, since pingora reads no answer while it waits to write: both directions full at once would stall.
    for sent in body.chunks(256 * 1024) {
        conn.send(sent).await;
        let mut back = 0;
        while back < sent.len() {
            let piece = conn.wire.piece(&mut framing, usize::MAX).await.unwrap().unwrap();
            assert!(sent[back..].starts_with(piece));
            back += piece.len();
        }
    }
    assert_eq!(conn.wire.piece(&mut framing, usize::MAX).await.unwrap(), None);
    let grown = castier.memory("VmHWM").saturating_sub(before) / MIB;
    assert!(grown < 24, "{grown} MiB to pass {} MiB on", body.len() as u64 / MIB);
}

#[tokio::test]
async fn an_origin_that_dies_in_the_middle_of_a_relay() {
    let _turn = light().await;
    let (mut origin, castier) = world().await;
    let mut conn = Conn::open(castier.public).await;
    conn.send(&Request::new("POST", "/echo").header("Transfer-Encoding", "chunked").bytes()).await;
    conn.send(b"3\r\none\r\n").await;
    let head = conn.head().await.unwrap();
    let mut framing = head.framing(crate::support::wire::Framing::Close);
    assert_eq!(conn.wire.piece(&mut framing, usize::MAX).await.unwrap(), Some(b"one".as_slice()));
    origin.down().await;
    let end = crate::support::within(crate::support::DEADLINE, "the end", conn.wire.piece(&mut framing, usize::MAX)).await;
    assert!(end.is_err(), "a broken answer must not look whole: {end:?}");
    origin.up().await;
    eventually("the relay works again", async || (Request::get("/x").send(castier.public).await.status == 200).then_some(())).await;
}
