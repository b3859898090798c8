//! Answers of an origin that are too slow, too early, or framed ambiguously.

use crate::support::{Blob, Castier, Conn, KIB, LyingOrigin, RawOrigin, Request, get, light, within};
use std::time::{Duration, Instant};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
};

const QUICK: &str = "origin.read_timeout = \"1500ms\"\norigin.retries = 0";

/// Reads a number of bytes of a body.
async fn read(stream: &mut TcpStream, most: usize) {
    let (mut part, mut read) = (vec![0; 64 << 10], 0);
    while read < most {
        match stream.read(&mut part).await {
            Ok(more) if more > 0 => read += more,
            _ => return,
        }
    }
}

/// An origin that sends `first`, and then `again` every 100 ms for ever.
async fn endless(first: &'static str, again: &'static str) -> RawOrigin {
    RawOrigin::serve(TcpListener::bind("127.0.0.1:0").await.unwrap(), move |mut stream, _| async move {
        stream.write_all(first.as_bytes()).await.ok()?;
        loop {
            stream.write_all(again.as_bytes()).await.ok()?;
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    })
}

#[tokio::test]
async fn a_final_answer_has_a_limit() {
    let _turn = light().await;
    for (first, again) in
        [("", "HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n"), ("HTTP/1.1 200 OK\r\nX: ", "y"), ("HTTP/1.1 200 OK\r\n", "X: y\r\n")]
    {
        let origin = endless(first, again).await;
        let castier = Castier::start(&origin.url(), &format!("{QUICK}\nallow_delete = true")).await;
        let large = Blob::new(200 * KIB);
        let small = Blob::new(10);
        for request in [
            Request::get(Blob::new(7).path()),
            Request::new("HEAD", Blob::new(7).path()),
            Request::new("DELETE", Blob::new(7).path()),
            Request::new("PUT", small.path()).body(small.whole()),
            Request::new("PUT", large.path()).body(large.whole()),
            Request::get("/relayed"),
            Request::new("POST", "/relayed").body("some body"),
        ] {
            let start = Instant::now();
            let reply = within(Duration::from_secs(30), "an answer", request.send(castier.public)).await;
            assert_eq!(reply.status, 504, "{first:?} {again:?} {request:?}");
            assert!(start.elapsed() < Duration::from_secs(10), "{:?} for {request:?}", start.elapsed());
        }
    }
}

#[tokio::test]
async fn an_early_answer_passes_on() {
    let _turn = light().await;
    // Reads a little, answers, and closes with the rest unread.
    let origin = RawOrigin::serve(TcpListener::bind("127.0.0.1:0").await.unwrap(), |mut stream, head| async move {
        let status =
            ["413 Too Large", "507 Full", "409 Conflict"].into_iter().find(|status| head.contains(&format!("/up/{}", &status[..3])))?;
        read(&mut stream, 1000).await;
        stream.write_all(format!("HTTP/1.1 {status}\r\nContent-Length: 4\r\n\r\nsays").as_bytes()).await.ok()?;
        None
    });
    let castier = Castier::start(&origin.url(), QUICK).await;
    let body = Blob::new(8 * KIB * KIB).whole();
    for _ in 0..5 {
        for status in ["413", "507", "409"] {
            let target = format!("/up/{status}");
            for request in [Request::new("PUT", &*target).body(body.clone()), Request::new("POST", &*target).chunks(&body, 10_000)] {
                let reply = request.send(castier.public).await;
                assert_eq!((reply.status.to_string().as_str(), reply.body.as_slice()), (status, &b"says"[..]), "{:?}", reply.head);
            }
        }
    }
}

#[tokio::test]
async fn an_early_refusal_ends_an_upload_of_a_blob() {
    let _turn = light().await;
    let origin = RawOrigin::serve(TcpListener::bind("127.0.0.1:0").await.unwrap(), |mut stream, _| async move {
        read(&mut stream, 1000).await;
        stream.write_all(b"HTTP/1.1 507 Full\r\nContent-Length: 0\r\n\r\n").await.ok()?;
        None
    });
    let castier = Castier::start(&origin.url(), QUICK).await;
    let blob = Blob::new(8 * KIB * KIB);
    let mut conn = Conn::open(castier.public).await;
    conn.send(&Request::new("PUT", blob.path()).header("Content-Length", blob.size.to_string()).bytes()).await;
    // Not all of it, so only an early answer can come.
    conn.send(&blob.whole()[..4 << 20]).await;
    conn.reply("PUT").await.assert_problem(507);
}

/// Relays this answer. Returns the client's result, and that of the next request on the same connection.
async fn relayed(answer: &'static str) -> (crate::support::Reply, RawOrigin, Castier) {
    let origin = RawOrigin::start(move |_| answer.as_bytes().to_vec()).await;
    let castier = Castier::start(&origin.url(), QUICK).await;
    (Request::get("/x").send(castier.public).await, origin, castier)
}

#[tokio::test]
async fn an_answer_has_one_length() {
    let _turn = light().await;
    for answer in
        ["HTTP/1.1 200 OK\r\nContent-Length: 4\r\nContent-Length: 4\r\n\r\nbody", "HTTP/1.1 200 OK\r\nContent-Length: 4, 4\r\n\r\nbody"]
    {
        let (reply, ..) = relayed(answer).await;
        let lengths: Vec<_> =
            reply.head.headers.iter().filter(|(name, _)| name == "content-length").map(|(_, value)| value.as_str()).collect();
        assert_eq!((reply.status, lengths, reply.body.as_slice()), (200, vec!["4"], &b"body"[..]), "{answer:?}");
    }
    for answer in [
        "HTTP/1.1 200 OK\r\nContent-Length: 4\r\nContent-Length: 5\r\n\r\nbody!",
        "HTTP/1.1 200 OK\r\nContent-Length: 4, 5\r\n\r\nbody!",
        "HTTP/1.1 200 OK\r\nContent-Length: -4\r\n\r\nbody",
        "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: foo\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
        "HTTP/1.1 101 Switching Protocols\r\n\r\n",
    ] {
        let (reply, ..) = relayed(answer).await;
        assert_eq!(reply.status, 502, "{answer:?}: {:?}", reply.head);
    }
}

#[tokio::test]
async fn what_has_no_body_has_no_framing() {
    let _turn = light().await;
    for answer in [
        "HTTP/1.1 204 No Content\r\nTransfer-Encoding: chunked\r\n\r\n",
        "HTTP/1.1 204 No Content\r\nContent-Length: 4\r\n\r\n",
        "HTTP/1.1 304 Not Modified\r\nTransfer-Encoding: chunked\r\n\r\n",
        "HTTP/1.1 103 Early Hints\r\nContent-Length: 3\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n",
    ] {
        let origin = RawOrigin::start(move |_| answer.as_bytes().to_vec()).await;
        let castier = Castier::start(&origin.url(), QUICK).await;
        let mut conn = Conn::open(castier.public).await;
        for _ in 0..2 {
            conn.send(&Request::get("/x").bytes()).await;
            let mut head = conn.head().await.unwrap();
            loop {
                let framing = head.headers.iter().find(|(name, _)| name == "transfer-encoding" || name == "content-length");
                assert_eq!(framing, None, "{answer:?}: {head:?}");
                if !head.first.contains(" 103 ") {
                    break;
                }
                head = conn.head().await.unwrap();
            }
            assert!(head.first.contains(" 204 ") || head.first.contains(" 304 "), "{head:?}");
        }
    }
}

#[tokio::test]
async fn a_relayed_body_with_a_size_line_that_is_none_is_not_whole() {
    let _turn = light().await;
    for answer in [
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n\r\n\r\n",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n;x\r\n\r\n",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3;x\nabc\r\n0\r\n\r\n",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n \r\n\r\n",
    ] {
        let (reply, ..) = relayed(answer).await;
        assert!(reply.status == 502 || !reply.complete, "{answer:?}: {:?} {:?}", reply.head, reply.body);
    }
    let (reply, ..) = relayed("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3;x=\"y\"\r\nabc\r\n0\r\nX: y\r\n\r\n").await;
    assert_eq!((reply.status, reply.body.as_slice(), reply.complete), (200, &b"abc"[..], true));
}

#[tokio::test]
async fn what_an_origin_says_behind_an_answer_is_nobodys() {
    let _turn = light().await;
    let twice = "HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\naHTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nb";
    let (first, origin, castier) = relayed(twice).await;
    let second = Request::get("/y").send(castier.public).await;
    assert_eq!((first.body.as_slice(), second.body.as_slice()), (&b"a"[..], &b"a"[..]));
    let asked = origin.heads().iter().filter(|head| head.starts_with("GET")).count();
    assert_eq!(asked, 2, "each has its own answer");
}

#[tokio::test]
async fn relays_and_blobs_share_connections() {
    let _turn = light().await;
    let origin = RawOrigin::start(|head| {
        let chunked = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n";
        let answer = if head.starts_with("GET /cas") { "HTTP/1.1 404 No\r\nContent-Length: 0\r\n\r\n" } else { chunked };
        if head.starts_with("HEAD") { b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n".to_vec() } else { answer.into() }
    })
    .await;
    let castier = Castier::start(&origin.url(), QUICK).await;
    // castier's request at the start.
    crate::support::eventually("the first question", async || (!origin.heads().is_empty()).then_some(())).await;
    let before = origin.connections();
    for n in 1..=10 {
        assert_eq!(Request::get("/x").send(castier.public).await.body, b"abc");
        assert_eq!(Request::new("HEAD", "/x").send(castier.public).await.status, 200);
        assert_eq!(get(castier.public, &Blob::new(n)).await.status, 404);
    }
    let made = origin.connections() - before;
    assert!(made <= 15, "{made} connections for 30 requests, one after the other");
}

#[tokio::test]
async fn large_uploads_use_connections_again() {
    let _turn = light().await;
    let origin = RawOrigin::serve(TcpListener::bind("127.0.0.1:0").await.unwrap(), |mut stream, head| async move {
        let length = head.lines().find_map(|line| line.to_ascii_lowercase().strip_prefix("content-length: ")?.parse().ok());
        read(&mut stream, length.unwrap_or(0)).await;
        stream.write_all(b"HTTP/1.1 201 Created\r\nContent-Length: 0\r\n\r\n").await.ok()?;
        Some(stream)
    });
    let castier = Castier::start(&origin.url(), QUICK).await;
    for _ in 0..10 {
        let blob = Blob::new(300 * KIB);
        assert_eq!(Request::new("PUT", blob.path()).body(blob.whole()).send(castier.public).await.status, 201);
    }
    // pingora's pool sometimes loses one.
    assert!(origin.connections() <= 8, "{} connections for 10 uploads, one after the other", origin.connections());
}

#[tokio::test]
async fn an_upload_survives_a_connection_that_was_closed_meanwhile() {
    let _turn = light().await;
    // Keeps a connection until the second request on it, which it resets.
    let origin = RawOrigin::serve(TcpListener::bind("127.0.0.1:0").await.unwrap(), |mut stream, head| async move {
        let upload = head.starts_with("PUT");
        let length = head.lines().find_map(|line| line.to_ascii_lowercase().strip_prefix("content-length: ")?.parse().ok());
        read(&mut stream, length.unwrap_or(0)).await;
        stream
            .write_all(if upload {
                b"HTTP/1.1 201 Created\r\nContent-Length: 0\r\n\r\n"
            } else {
                b"HTTP/1.1 404 Absent\r\nContent-Length: 0\r\n\r\n"
            })
            .await
            .ok()?;
        // The next byte is read, and the connection goes.
        let _ = stream.read_u8().await;
        None
    });
    let castier = Castier::start(&origin.url(), QUICK).await;
    for _ in 0..10 {
        let blob = Blob::new(200 * KIB);
        let reply = Request::new("PUT", blob.path()).body(blob.whole()).send(castier.public).await;
        assert_eq!(reply.status, 201, "{:?}", reply.head);
    }
}

#[tokio::test]
async fn a_request_has_one_length() {
    let _turn = light().await;
    let origin = LyingOrigin::start().await;
    let castier = Castier::start(&origin.url(), "").await;
    for target in ["/elsewhere", "/ac/x"] {
        let request = Request::new("PUT", target).header("Content-Length", "3").header("Content-Length", "3");
        let mut conn = Conn::open(castier.public).await;
        conn.send(&[request.bytes(), b"abc".to_vec()].concat()).await;
        assert_eq!(conn.reply("PUT").await.body, b"abc");
        let seen = origin.seen().into_iter().rfind(|seen| seen.target == target).unwrap();
        let lengths: Vec<_> =
            seen.head.headers.iter().filter(|(name, _)| name == "content-length").map(|(_, value)| value.as_str()).collect();
        assert_eq!(lengths, ["3"], "{target}");
    }
}

#[tokio::test]
async fn a_line_feed_alone_in_a_chunk_extension_is_refused() {
    let _turn = light().await;
    let origin = LyingOrigin::start().await;
    let castier = Castier::start(&origin.url(), "limits.idle_timeout = \"5s\"").await;
    let blob = Blob::of(b"hello");
    for target in [blob.path(), "/elsewhere".into()] {
        let mut conn = Conn::open(castier.public).await;
        let head = format!("PUT {target} HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n");
        conn.send(&[head.as_bytes(), b"5;x\nhello\r\n0\r\n\r\n"].concat()).await;
        let start = Instant::now();
        let reply = conn.reply("PUT").await;
        assert!(start.elapsed() < Duration::from_secs(3), "{target}: after {:?}", start.elapsed());
        // An origin that streams may have begun its answer: then that is cut.
        assert!(reply.status == 400 || !reply.complete, "{target}: {:?} {:?}", reply.head, reply.body);
    }
    assert!(!origin.holds(&blob));
}

#[tokio::test]
async fn bytes_behind_an_upgrade_that_is_declined_are_the_next_request() {
    let _turn = light().await;
    let origin = LyingOrigin::start().await;
    let castier = Castier::start(&origin.url(), "").await;
    let mut conn = Conn::open(castier.public).await;
    let upgrade = Request::get("/one").header("Connection", "upgrade").header("Upgrade", "foo");
    conn.send(&[upgrade.bytes(), Request::get("/two").bytes()].concat()).await;
    for target in ["/one", "/two"] {
        let reply = conn.reply("GET").await;
        let text = String::from_utf8_lossy(&reply.body).into_owned();
        assert!(reply.status == 200 && text.starts_with(&format!("GET {target} ")), "{target}: {:?} {text}", reply.head);
    }
}

#[tokio::test]
async fn an_upgrade_that_is_agreed_on_is_a_tunnel() {
    let _turn = light().await;
    let origin = RawOrigin::serve(TcpListener::bind("127.0.0.1:0").await.unwrap(), |mut stream, head| async move {
        assert!(head.to_ascii_lowercase().contains("upgrade: websocket") || head.starts_with("HEAD"), "{head}");
        stream.write_all(b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n").await.ok()?;
        let (mut from, mut to) = stream.split();
        tokio::io::copy(&mut from, &mut to).await.ok()?;
        None
    });
    let castier = Castier::start(&origin.url(), "").await;
    let mut conn = Conn::open(castier.public).await;
    // The first bytes come with the request.
    let upgrade = Request::get("/one").header("Connection", "upgrade").header("Upgrade", "websocket");
    let upgrade = upgrade.header("Sec-WebSocket-Version", "13").header("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ==");
    conn.send(&[upgrade.bytes(), b"early ".to_vec()].concat()).await;
    assert!(conn.head().await.unwrap().first.contains(" 101 "));
    conn.send(b"late").await;
    let mut framing = crate::support::wire::Framing::Close;
    let mut back = Vec::new();
    while back.len() < 10 {
        let piece = within(Duration::from_secs(30), "the echo", conn.wire.piece(&mut framing, usize::MAX)).await.unwrap();
        back.extend_from_slice(piece.expect("more"));
    }
    assert_eq!(back, b"early late");
}

#[tokio::test]
async fn trace_is_not_relayed() {
    let _turn = light().await;
    let origin = LyingOrigin::start().await;
    let castier = Castier::start(&origin.url().replace("http://", "http://user:pass@"), "").await;
    for target in ["/x", "/cas"] {
        let reply = Request::new("TRACE", target).send(castier.public).await;
        assert_eq!(reply.status, 405);
        assert!(reply.header("allow").is_some());
    }
    assert!(origin.seen().iter().all(|seen| seen.method != "TRACE"));
}

#[tokio::test]
async fn a_blob_may_have_no_size() {
    let _turn = light().await;
    for answer in ["", "Content-Length: 0\r\n", "Transfer-Encoding: chunked\r\n", "Content-Length: 9\r\nContent-Encoding: gzip\r\n"] {
        let answer = format!("HTTP/1.1 200 OK\r\n{answer}\r\n");
        let origin = RawOrigin::start(move |_| answer.clone().into_bytes()).await;
        let castier = Castier::start(&origin.url(), QUICK).await;
        let mut conn = Conn::open(castier.public).await;
        for _ in 0..2 {
            let reply = conn.ask(&Request::new("HEAD", Blob::new(9).path())).await;
            assert_eq!((reply.status, reply.header("content-length")), (200, None), "{:?}", reply.head);
        }
        let output = castier.output();
        assert!(!output.contains("could not be asked yet") && !output.contains("the origin is down"), "{output}");
    }
}
