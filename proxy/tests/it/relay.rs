//! Everything outside `/cas` is relayed to the origin and back, unchanged, uncached and streaming.

use crate::support::{Castier, Conn, LyingOrigin, MIB, Request, eventually, get, light, metrics};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpListener,
};

async fn world() -> (LyingOrigin, Castier) {
    let origin = LyingOrigin::start().await;
    let castier = Castier::start(&origin.url(), "").await;
    (origin, castier)
}

/// An origin that answers every request with these bytes.
async fn saying(answer: &'static [u8]) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") && stream.read_buf(&mut head).await.is_ok_and(|read| read > 0) {}
            // Whether castier wants to hear it is castier's business.
            let _ = stream.write_all(answer).await;
        }
    });
    url
}

#[tokio::test]
async fn each_hop_speaks_its_own_version() {
    let _turn = light().await;
    let old = Castier::start(&saying(b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok").await, "").await;
    let reply = Request::get("/who").send(old.public).await;
    assert!(reply.head.first.starts_with("HTTP/1.1 200 "), "{:?}", reply.head);
    assert_eq!((reply.body.as_slice(), reply.header("via").is_some_and(|via| via.starts_with("1.0 castier-"))), (b"ok".as_slice(), true));
    let hint = b"HTTP/1.1 103 Early Hints\r\nLink: </style>\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";
    let hinting = Castier::start(&saying(hint).await, "").await;
    for (request, interim) in [(Request::get("/who"), true), (Request::get("/who").http10(), false)] {
        let mut conn = Conn::open(hinting.public).await;
        conn.send(&request.bytes()).await;
        let first = conn.head().await.unwrap();
        assert_eq!(first.first.contains(" 103 "), interim, "an old client knows no interim answers: {first:?}");
    }
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
    // A request is counted when it has ended, which its client may see earlier.
    let relayed = async || metrics(&castier).await.sum("castier_http_requests_total", &[("route", "relay"), ("listener", "public")]);
    eventually("each is counted", async || (relayed().await == 16).then_some(())).await;
    assert_eq!(metrics(&castier).await.total("castier_gets_total"), 0);
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

    let chain = |request: Request| request.header("X-Forwarded-For", "10.1.1.1").header("X-Forwarded-For", "10.2.2.2");
    let request = chain(Request::get("/who")).header("Via", "1.1 edge");
    let text = String::from_utf8(request.send(castier.public).await.body).unwrap();
    assert!(text.contains("x-forwarded-for: 10.1.1.1, 10.2.2.2, 127.0.0.1\n"), "the chain goes on: {text}");
    assert!(text.contains("1.1 edge") && text.contains("castier"), "{text}");
}

/// With the PROXY protocol the other end of the connection is a balancer, which says for whom it is.
#[tokio::test]
async fn the_origin_learns_of_the_client_behind_the_proxy_protocol() {
    let _turn = light().await;
    let origin = LyingOrigin::start().await;
    let castier = Castier::start(&origin.url(), "listen.proxy_protocol = true\nlisten.trusted_proxies = [\"127.0.0.1\"]").await;
    let ask = async |lines: &str| {
        let mut conn = Conn::open(castier.public).await;
        conn.send(format!("PROXY TCP4 192.0.2.7 192.0.2.1 4711 80\r\nGET /who HTTP/1.1\r\nHost: a\r\n{lines}\r\n").as_bytes()).await;
        String::from_utf8(conn.reply("GET").await.body).unwrap()
    };
    let told = ask("").await;
    assert!(told.contains("x-forwarded-for: 192.0.2.7\n"), "{told}");
    let told = ask("X-Forwarded-For: 6.6.6.6\r\n").await;
    assert!(told.contains("x-forwarded-for: 6.6.6.6, 192.0.2.7\n"), "{told}");
}

#[tokio::test]
async fn an_old_client_gets_what_it_can_read() {
    let _turn = light().await;
    let (_origin, castier) = world().await;
    let mut conn = Conn::open(castier.public).await;
    let reply = conn.ask(&Request::get("/who").http10().header("Connection", "keep-alive")).await;
    assert_eq!(
        (reply.status, reply.header("transfer-encoding"), reply.header("connection")),
        (200, None, Some("close")),
        "{:?}",
        reply.head
    );
    let text = String::from_utf8(reply.body).unwrap();
    assert!(text.starts_with("GET /who HTTP/1.") && text.contains("via: 1.0 castier-") && !text.contains("\r\n0"), "{text}");
    assert!(conn.closed().await, "the end of the connection is the end of the body");
}

#[tokio::test]
async fn what_asks_for_no_other_protocol_is_a_request_like_any_other() {
    let _turn = light().await;
    let (_origin, castier) = world().await;
    // A header that Connection does not name is not for this hop, and behind a body nobody knows where another protocol would begin.
    for connection in ["keep-alive", "upgrade"] {
        let mut conn = Conn::open(castier.public).await;
        let first = Request::new("POST", "/up").header("Connection", connection).header("Upgrade", "foo").body("abc");
        conn.send(&[first.bytes(), Request::get("/who").bytes()].concat()).await;
        let reply = conn.reply("POST").await;
        assert_eq!((reply.status, reply.body.as_slice()), (200, b"abc".as_slice()), "{connection}");
        let reply = conn.reply("GET").await;
        assert!(reply.status == 200 && reply.body.starts_with(b"GET /who"), "{connection}: {:?}", reply.head);
    }
}

#[tokio::test]
async fn behind_its_last_chunk_the_next_request_begins() {
    let _turn = light().await;
    let (_origin, castier) = world().await;
    let mut conn = Conn::open(castier.public).await;
    for target in ["/one", "/two"] {
        let chunked = b"POST /echo HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nX-Trailer: 1\r\n\r\n".to_vec();
        conn.send(&[chunked, Request::get(target).bytes()].concat()).await;
        assert_eq!(conn.reply("POST").await.body, b"abc");
        let next = conn.reply("GET").await;
        assert!(next.status == 200 && next.body.starts_with(format!("GET {target} ").as_bytes()), "{:?}", next.head);
    }
}

#[tokio::test]
async fn an_error_says_that_it_ends_the_connection() {
    let _turn = light().await;
    let (mut origin, castier) = world().await;
    origin.down().await;
    let mut conn = Conn::open(castier.public).await;
    let reply = conn.ask(&Request::get("/who")).await;
    reply.assert_problem(502);
    assert_eq!(reply.header("connection"), Some("close"));
    assert!(conn.closed().await);
}

#[tokio::test]
async fn an_origin_that_knows_its_users() {
    let _turn = light().await;
    let origin = LyingOrigin::start().await;
    let castier = Castier::start(&origin.url().replace("http://", "http://Aladdin:open%20sesame@"), "").await;
    let blob = origin.blob(1000);
    get(castier.public, &blob).await.assert_is(&blob);
    let basic = "Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ==";
    assert_eq!(origin.requests("GET", &blob)[0].head.header("authorization"), Some(basic));
    let text = |reply: crate::support::Reply| String::from_utf8(reply.body).unwrap();
    assert!(text(Request::get("/who").send(castier.public).await).contains(&format!("authorization: {basic}\n")));
    let own = Request::get("/who").header("Authorization", "Bearer own").send(castier.public).await;
    assert!(text(own).contains("authorization: Bearer own\n"), "who has credentials of its own keeps them");
    assert!(!castier.output().contains("sesame"), "{}", castier.output());
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
