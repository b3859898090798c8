//! HTTP/2: the same replies as over HTTP/1.1, and the limits that only it needs.

use crate::support::{
    Blob, Castier, Conn, Gate, KIB, Lie, LyingOrigin, MIB, MuteOrigin, Random, Request, assert_ledger, eventually, get, heavy,
    http2::{Http2, PREFACE, Reply2, block, frame, get_frame, goaway, read, read_frame, send_all, shout},
    lie::RangeManner,
    light, metrics, within,
};
use bytes::Bytes;
use castier::memory_plan;
use h2::{Reason, client::Builder};
use http::HeaderMap;
use rustix::process::Signal;
use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};
use tokio::{
    io::AsyncWriteExt as _,
    net::{TcpSocket, TcpStream},
    task::JoinSet,
};

async fn world(config: &str) -> (LyingOrigin, Castier) {
    let origin = LyingOrigin::start().await;
    let castier = Castier::start(&origin.url(), config).await;
    (origin, castier)
}

/// The headers that must be the same over both versions.
fn shown<'a>(headers: impl Iterator<Item = (&'a str, &'a str)>) -> BTreeMap<String, String> {
    // Those of the connection, of this moment, and of this request.
    let apart = ["date", "connection", "transfer-encoding", "x-request-id", "via", "age"];
    headers.filter(|(name, _)| !apart.contains(name)).map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
}

fn of_map(headers: &HeaderMap) -> BTreeMap<String, String> {
    shown(headers.iter().map(|(name, value)| (name.as_str(), value.to_str().unwrap())))
}

impl Reply2 {
    fn assert_is(&self, blob: &Blob) {
        assert_eq!((self.status.as_u16(), self.error.as_ref().map(ToString::to_string)), (200, None));
        assert!(self.body.len() as u64 == blob.size && blob.is_at(0, &self.body));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_replies_are_those_of_http1() {
    let _turn = light().await;
    let (origin, castier) = world("allow_delete = true\norigin.read_timeout = \"500ms\"").await;
    let client = Http2::open(castier.public).await;
    let (kept, large) = (origin.blob(70 * KIB), origin.blob(3 * MIB));
    let wrong = origin.blob(KIB);
    origin.always(&wrong, Lie::honest().flip_bit(9));
    let absent = Blob::new(KIB);
    for blob in [&kept, &large] {
        get(castier.public, blob).await.assert_is(blob);
    }
    let (new, form) = (Blob::new(20 * KIB), Blob::new(5 * KIB));
    let mut multipart = b"--b\r\nContent-Disposition: form-data; name=\"file\"; filename=\"x\"\r\n\r\n".to_vec();
    multipart.extend_from_slice(&form.whole());
    multipart.extend_from_slice(b"\r\n--b--\r\n");
    let requests = [
        Request::get(kept.path()),
        Request::get(large.path()),
        Request::new("HEAD", kept.path()),
        Request::get(kept.path()).header("range", "bytes=100-199"),
        Request::get(large.path()).header("range", "bytes=-5"),
        Request::get(kept.path()).header("range", "bytes=9999999-"),
        Request::get(kept.path()).header("range", "bytes=0-1,5-6"),
        Request::get(kept.path()).header("range", "bytes=9-1"),
        Request::get(kept.path()).header("range", "bytes=0-9").header("if-range", format!("\"{}\"", kept.digest)),
        Request::get(kept.path()).header("range", "bytes=0-9").header("if-range", "\"other\""),
        Request::new("HEAD", kept.path()).header("range", "bytes=0-9"),
        Request::get(kept.path()).header("if-none-match", format!("\"{}\"", kept.digest)),
        Request::get(kept.path()).header("cache-control", "only-if-cached"),
        Request::get(absent.path()).header("cache-control", "only-if-cached"),
        Request::get(absent.path()),
        Request::new("HEAD", absent.path()),
        Request::get(wrong.path()),
        Request::get("/cas/123"),
        Request::new("PUT", new.path()).body(new.whole()),
        Request::new("PUT", new.path()).body(new.whole()),
        Request::new("PUT", new.path()).body(form.whole()),
        Request::new("POST", "/cas").body(new.whole()),
        Request::new("POST", "/cas").header("content-type", "multipart/form-data; boundary=b").body(multipart.clone()),
        Request::new("POST", "/cas").header("content-type", "multipart/form-data").body(multipart),
        Request::new("PATCH", kept.path()).body("x"),
        Request::new("TRACE", "/"),
        Request::get("/elsewhere?a=b"),
        Request::new("POST", "/elsewhere").body("some body"),
        Request::new("HEAD", "/elsewhere"),
        Request::new("PROPFIND", "/elsewhere"),
        Request::new("DELETE", "/cas/123"),
        Request::new("DELETE", absent.path()),
        Request::new("DELETE", new.path()),
        Request::new("DELETE", new.path()),
    ];
    for request in requests {
        let (method, target, headers, _) = request.parts();
        let what = format!("{method} {target} {headers:?}");
        let first = request.send(castier.public).await;
        let second = client.ask(&request).await.unwrap_or_else(|error| panic!("{what}: {error}"));
        assert_eq!(second.error.map(|error| error.to_string()), None, "{what}");
        // The first of two PUTs stores the blob, and the first of two DELETEs removes it.
        let both = (first.status, second.status.as_u16());
        assert!(both.0 == both.1 || both == (201, 200) || both == (204, 404), "{what}: {}", second.status);
        let mut over1 = shown(first.head.headers.iter().map(|(name, value)| (name.as_str(), value.as_str())));
        let mut over2 = of_map(&second.headers);
        // Only HTTP/1.1 has chunks. Only there an empty body has a length.
        for length in [&mut over1, &mut over2] {
            length.retain(|name, value| name != "content-length" || value != "0");
        }
        if second.status.as_u16() == first.status {
            assert_eq!(over2, over1, "{what}");
        }
        if target.starts_with("/elsewhere") && first.status == 200 && method != "HEAD" && method != "POST" {
            // What the origin says of the request: the client's port differs.
            assert!(String::from_utf8_lossy(&second.body).starts_with(&format!("{method} {target} HTTP/1.1\n")), "{what}");
        } else if second.status.as_u16() == first.status && !target.starts_with("/elsewhere") {
            assert!(second.body == first.body, "{what}");
        }
    }
    assert!(!origin.holds(&new) && origin.holds(&form));
    assert_ledger(&castier).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_origin_sees_castier_and_not_the_authority() {
    let _turn = light().await;
    let (origin, castier) = world("").await;
    let client = Http2::open(castier.public).await;
    let request =
        Request::new("PUT", "/kv/a").header("x-own", "kept").header("te", "trailers").header("cookie", "a=1").header("cookie", "b=2");
    let reply = client.ask(&request.body("hello")).await.unwrap();
    assert_eq!(reply.status, 200);
    let seen = origin.seen().into_iter().find(|seen| seen.target == "/kv/a").unwrap();
    let header = |name: &str| seen.head.header(name).map(str::to_owned);
    assert_eq!(header("host").unwrap(), origin.url().trim_start_matches("http://"));
    assert_eq!(header("x-forwarded-host").unwrap(), castier.public.to_string());
    assert_eq!((header("x-forwarded-for").as_deref(), header("x-forwarded-proto").as_deref()), (Some("127.0.0.1"), Some("http")));
    assert_eq!((header("x-own").as_deref(), header("te"), header("content-length").as_deref()), (Some("kept"), None, Some("5")));
    assert!(header("via").is_some_and(|via| via.contains("castier-")));
    assert_eq!((header("cookie").as_deref(), seen.head.headers.iter().filter(|(name, _)| name == "cookie").count()), (Some("a=1; b=2"), 1));
    // A target that two readers take differently goes nowhere.
    let before = origin.seen().len();
    for path in ["?u=:x://h/kv/b", "?x", "http://other/kv/b"] {
        let mut stream = TcpStream::connect(castier.public).await.unwrap();
        let fields = [(":method", "GET"), (":scheme", "http"), (":authority", "a"), (":path", path)];
        stream.write_all(&[PREFACE, &frame(4, 0, 0, &[]), &frame(1, 5, 1, &block(&fields))].concat()).await.unwrap();
        // The answer of the request, a reset, or the end.
        while read_frame(&mut stream).await.is_some_and(|(_, stream, _)| stream != 1) {}
    }
    assert_eq!(origin.seen().len(), before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn uploads_follow_the_windows_and_trailers_are_ignored() {
    let _turn = heavy().await;
    let (origin, castier) = world("limits.http2_window = \"64KiB\"").await;
    let client = Http2::open(castier.public).await;
    let large = Blob::new(20 * MIB);
    let (reply, mut body) = client.begin(&Request::new("PUT", large.path()), true).await.unwrap();
    let mut left = Bytes::from(large.whole());
    while !left.is_empty() {
        body.reserve_capacity(left.len());
        let capacity = std::future::poll_fn(|cx| body.poll_capacity(cx)).await.unwrap().unwrap();
        body.send_data(left.split_to(capacity.min(left.len())), false).unwrap();
    }
    let mut trailers = HeaderMap::new();
    trailers.insert("x-checksum", "nonsense".parse().unwrap());
    trailers.insert("content-length", "7".parse().unwrap());
    body.send_trailers(trailers).unwrap();
    assert_eq!(read(reply).await.unwrap().status, 201);
    assert!(origin.holds(&large));
    // An upload whose origin does not take it does not keep the others of its connection from going on.
    let (gate, kept) = (Gate::new(), origin.blob(300 * KIB));
    client.get(&kept.path()).await.unwrap().assert_is(&kept);
    origin.freeze(&gate);
    let stuck = Blob::new(32 * MIB);
    let request = Request::new("PUT", stuck.path()).header("content-length", stuck.size.to_string());
    let (waiting, mut body) = client.begin(&request, true).await.unwrap();
    let sending = tokio::spawn(async move { send_all(&mut body, Bytes::from(stuck.whole())).await });
    for _ in 0..200 {
        client.get(&kept.path()).await.unwrap().assert_is(&kept);
    }
    assert!(!sending.is_finished());
    gate.open();
    sending.await.unwrap().unwrap();
    assert_eq!(read(waiting).await.unwrap().status, 201);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_lie_ends_as_a_whole_answer() {
    let _turn = light().await;
    let (origin, castier) = world("origin.read_timeout = \"500ms\"\norigin.breaker_failures = 0").await;
    let client = Http2::open(castier.public).await;
    let mut random = Random::seeded();
    for lie in [
        Lie::honest().flip_bit(2 * MIB),
        Lie::honest().truncate(MIB),
        Lie::honest().reset_after(2 * MIB),
        Lie::honest().chunked().flip_bit(3 * MIB),
        Lie::honest().chunked().truncate(3 * MIB).ranges(RangeManner::Ignore),
    ] {
        let blob = origin.blob(4 * MIB);
        origin.always(&blob, lie);
        let is_cut = |error: &h2::Error| error.reason() == Some(Reason::INTERNAL_ERROR);
        match client.get(&blob.path()).await {
            Ok(reply) => {
                let cut = reply.status != 200 || reply.error.as_ref().is_some_and(is_cut);
                assert!(cut, "{} {} {:?}", reply.status, reply.body.len(), reply.error);
            }
            // If all has come before the head is sent, the reset takes its place.
            Err(error) => assert!(is_cut(&error), "{error}"),
        }
        // The other requests of the connection go on.
        let other = origin.blob(random.below(100 * KIB));
        client.get(&other.path()).await.unwrap().assert_is(&other);
    }
    // A relayed answer that breaks off.
    let raw = crate::support::RawOrigin::start(|_| b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nhalf".to_vec()).await;
    let other = Castier::start(&raw.url(), "origin.read_timeout = \"300ms\"").await;
    let reply = Http2::open(other.public).await.get("/elsewhere").await.unwrap();
    assert!(reply.error.is_some(), "{} {:?}", reply.status, reply.body);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn heads_and_streams_have_limits() {
    let _turn = light().await;
    let (origin, castier) = world("limits.http2_streams = 4\nlimits.max_header_bytes = \"4KiB\"\nlimits.max_headers = 20").await;
    let blob = origin.blob(KIB);
    let client = Http2::open(castier.public).await;
    client.get(&blob.path()).await.unwrap().assert_is(&blob);
    let long = client.ask(&Request::get(blob.path()).header("x-long", "x".repeat(5000))).await;
    assert!(long.as_ref().is_ok_and(|reply| reply.status == 431) || long.is_err_and(|error| error.is_reset()));
    let many = (0..30).fold(Request::get(blob.path()), |request, n| request.header(&format!("x-{n}"), "y"));
    assert_eq!(client.ask(&many).await.unwrap().status, 431);
    // Streams beyond the limit are refused. `h2` would wait, so the frames are made by hand.
    let (gate, slow) = (Gate::new(), origin.blob(KIB));
    origin.always(&slow, Lie::honest().hold(&gate));
    let mut stream = TcpStream::connect(castier.public).await.unwrap();
    let gets: Vec<u8> = (0..6).flat_map(|n| get_frame(2 * n + 1, &slow.path())).collect();
    stream.write_all(&[PREFACE, &frame(4, 0, 0, &[]), &gets].concat()).await.unwrap();
    let mut refused = 0;
    while refused < 2 {
        let (kind, _, payload) = read_frame(&mut stream).await.unwrap();
        if kind == 3 {
            assert_eq!(payload, [0, 0, 0, 7], "REFUSED_STREAM");
            refused += 1;
        }
    }
    eventually("four are open", async || (metrics(&castier).await.total("castier_http2_streams") == 4).then_some(())).await;
    gate.open();
    eventually("all have ended", async || (metrics(&castier).await.total("castier_http2_streams") == 0).then_some(())).await;
    client.get(&slow.path()).await.unwrap().assert_is(&slow);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn floods_close_their_connection_and_are_counted() {
    let _turn = light().await;
    let (origin, castier) = world("limits.http2_resets = 10\nlimits.http2_idle_frames = 100").await;
    let (gate, slow, blob) = (Gate::new(), origin.blob(KIB), origin.blob(KIB));
    origin.always(&slow, Lie::honest().hold(&gate));
    let client = Http2::open(castier.public).await;
    client.get(&blob.path()).await.unwrap().assert_is(&blob);
    let many = |count: u32, frames: &dyn Fn(u32) -> Vec<u8>| (0..count).flat_map(frames).collect::<Vec<u8>>();
    let cancel = |n: u32| [get_frame(2 * n + 1, &slow.path()), frame(3, 0, 2 * n + 1, &[0, 0, 0, 8])].concat();
    let open = |n: u32| frame(1, 4, n, &block(&[(":method", "PUT"), (":scheme", "http"), (":authority", "a"), (":path", &blob.path())]));
    let head = frame(1, 1, 1, &block(&[(":method", "GET"), (":scheme", "http"), (":authority", "a"), (":path", "/")]));
    let floods = [
        ("resets", many(5000, &cancel)),
        ("pings", many(5000, &|_| frame(6, 0, 0, &[7; 8]))),
        ("settings", many(5000, &|_| frame(4, 0, 0, &[]))),
        ("priorities", many(5000, &|n| frame(2, 0, 2 * n + 1, &[0, 0, 0, 0, 9]))),
        ("window-updates", many(5000, &|_| frame(8, 0, 0, &[0, 0, 0, 1]))),
        ("unknown", many(5000, &|_| frame(99, 0, 0, b"grease"))),
        ("data", [open(1), many(5000, &|_| frame(0, 0, 1, &[]))].concat()),
        ("continuations", [head.clone(), many(5000, &|_| frame(9, 0, 1, &[]))].concat()),
    ];
    for (kind, bytes) in floods {
        let count = async || {
            let told = metrics(&castier).await;
            (told.sum("castier_http2_floods_total", &[("kind", kind)]), told.total("castier_http2_floods_total"))
        };
        let before = count().await.1;
        assert_eq!(shout(castier.public, bytes).await, Some(11), "{kind}: ENHANCE_YOUR_CALM");
        eventually(&format!("{kind} are counted"), async || (count().await == (1, before + 1)).then_some(())).await;
        client.get(&blob.path()).await.unwrap().assert_is(&blob);
    }
    // Those with fields: as many frames as they like are one head, which is too large.
    let fields = [head, many(5000, &|n| frame(9, 0, 1, &block(&[("x", &n.to_string())])))].concat();
    assert_eq!(shout(castier.public, fields).await, Some(11));
    eventually("it is counted", async || (metrics(&castier).await.total("castier_http2_floods_total") == 9).then_some(())).await;
    // Malformed requests: for no host.
    let malformed = |n: u32| frame(1, 5, 2 * n + 1, &block(&[(":method", "GET"), (":scheme", "http"), (":path", "/")]));
    assert_eq!(shout(castier.public, many(100, &malformed)).await, Some(11));
    assert_eq!(metrics(&castier).await.sum("castier_http2_floods_total", &[("kind", "malformed")]), 1);
    client.get(&blob.path()).await.unwrap().assert_is(&blob);
    gate.open();
    let all = metrics(&castier).await;
    assert_eq!(all.total("castier_http2_streams"), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_large_blobs_on_one_connection_share_it() {
    let _turn = heavy().await;
    let config = "memory.capacity = \"64MiB\"\nmemory.max_blob = \"16MiB\"\nfill.memory = \"64MiB\"\nlimits.client_memory = \"16MiB\"";
    let (origin, castier) = world(config).await;
    let blobs: Vec<_> = (0..4).map(|_| origin.blob(8 * MIB)).collect();
    let mut builder = Builder::new();
    builder.initial_window_size(1 << 20).initial_connection_window_size(4 << 20);
    let client = Arc::new(Http2::with(castier.public, &builder).await);
    let came: Arc<Vec<AtomicU64>> = Arc::new((0..100).map(|_| AtomicU64::new(0)).collect());
    let mut all = JoinSet::new();
    for n in 0..100 {
        let (client, blob, came) = (client.clone(), blobs[n % 4].clone(), came.clone());
        all.spawn(async move {
            let (reply, _) = client.begin(&Request::get(blob.path()), false).await.unwrap();
            let mut incoming = reply.await.unwrap().into_body();
            let mut at = 0;
            while let Some(piece) = incoming.data().await {
                let piece = piece.unwrap();
                incoming.flow_control().release_capacity(piece.len()).unwrap();
                assert!(blob.is_at(at, &piece));
                at += piece.len() as u64;
                came[n].store(at, Relaxed);
            }
            assert_eq!(at, blob.size);
            came.iter().map(|bytes| bytes.load(Relaxed)).min().unwrap()
        });
    }
    // When the first has all its bytes, the last has a good part of them.
    let last = all.join_next().await.unwrap().unwrap();
    assert!(last > blobs[0].size / 4, "the slowest had {last} bytes when the fastest was done");
    while let Some(done) = all.join_next().await {
        done.unwrap();
    }
    // The blobs, what is loaded, what clients may make it hold, and the program itself.
    let peak = castier.memory("VmHWM");
    assert!(peak < (64 + 64 + 16 + 40) * MIB, "{} MiB", peak / MIB);
    assert_ledger(&castier).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_takes_nothing_or_sends_nothing_is_cut_alone() {
    let _turn = light().await;
    let (origin, castier) = world("limits.write_timeout = \"300ms\"\nlimits.idle_timeout = \"300ms\"").await;
    let blob = origin.blob(2 * MIB);
    let client = Http2::open(castier.public).await;
    // No window beyond the first 64 KiB, and no byte of a body after the first.
    let (stalled, _) = client.begin(&Request::get(blob.path()), false).await.unwrap();
    let (upload, mut sent) = client.begin(&Request::new("PUT", blob.path()).header("content-length", "100"), true).await.unwrap();
    sent.send_data(Bytes::from_static(b"x"), false).unwrap();
    let (relayed, mut relay_sent) = client.begin(&Request::new("PUT", "/kv/stalled").header("content-length", "100"), true).await.unwrap();
    relay_sent.send_data(Bytes::from_static(b"x"), false).unwrap();
    let mut incoming = stalled.await.unwrap().into_body();
    let cut = within(Duration::from_secs(60), "the stalled reader is cut", async {
        loop {
            match incoming.data().await {
                Some(Ok(_)) => {}
                other => return other,
            }
        }
    });
    assert!(cut.await.unwrap().unwrap_err().is_reset());
    // Gives back the window of the connection.
    drop(incoming);
    let silent = within(Duration::from_secs(60), "the stalled upload ends", read(upload)).await;
    assert!(silent.as_ref().is_ok_and(|reply| reply.status == 408), "{:?}", silent.map(|reply| reply.status));
    // Its answer had begun.
    let relay = within(Duration::from_secs(20), "the stalled relay ends", read(relayed)).await;
    assert!(relay.is_err() || relay.is_ok_and(|reply| reply.error.is_some()));
    client.get(&blob.path()).await.unwrap().assert_is(&blob);
    eventually("nothing is left open", async || (metrics(&castier).await.total("castier_http2_streams") == 0).then_some(())).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory_that_is_used_up_costs_requests_and_not_the_connection() {
    let _turn = light().await;
    let (origin, castier) = world("limits.client_memory = \"1MiB\"\nlimits.http2_streams = 300").await;
    let (gate, slow, kept) = (Gate::new(), origin.blob(KIB), origin.blob(KIB));
    origin.always(&slow, Lie::honest().hold(&gate));
    get(castier.public, &kept).await.assert_is(&kept);
    let client = Arc::new(Http2::open(castier.public).await);
    let mut waiting = JoinSet::new();
    for _ in 0..200 {
        let (client, path) = (client.clone(), slow.path());
        waiting.spawn(async move { client.get(&path).await.unwrap().status.as_u16() });
    }
    let shed = async || metrics(&castier).await.sum("castier_shed_requests_total", &[("reason", "client_memory")]);
    eventually("some are refused", async || (shed().await > 0).then_some(())).await;
    gate.open();
    let mut codes = BTreeMap::new();
    while let Some(code) = waiting.join_next().await {
        *codes.entry(code.unwrap()).or_insert(0) += 1;
    }
    assert!(codes.len() == 2 && codes[&200] > 30 && codes[&503] > 0, "{codes:?}");
    client.get(&kept.path()).await.unwrap().assert_is(&kept);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_drains_finishes_what_is_open() {
    let _turn = light().await;
    let (origin, mut castier) = world("").await;
    let (gate, slow) = (Gate::new(), origin.blob(3 * MIB));
    origin.always(&slow, Lie::honest().hold(&gate));
    let client = Http2::open(castier.public).await;
    let (reply, _) = client.begin(&Request::get(slow.path()), false).await.unwrap();
    let waiting = tokio::spawn(async move { read(reply).await.unwrap() });
    eventually("it waits at the origin", async || (gate.arrived() == 1).then_some(())).await;
    castier.signal(Signal::TERM);
    // A new connection is not taken.
    eventually("it drains", async || TcpStream::connect(castier.public).await.is_err().then_some(())).await;
    gate.open();
    waiting.await.unwrap().assert_is(&slow);
    let ended = client.end.await.unwrap();
    assert!(ended.is_ok() || ended.is_err_and(|error| error.reason() == Some(Reason::NO_ERROR)));
    assert!(castier.exit().await.success());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn idle_and_silent_connections_are_closed() {
    let _turn = light().await;
    let (origin, castier) = world("limits.idle_timeout = \"300ms\"\nlimits.header_timeout = \"300ms\"").await;
    let blob = origin.blob(KIB);
    let client = Http2::open(castier.public).await;
    client.get(&blob.path()).await.unwrap().assert_is(&blob);
    let ended = within(Duration::from_secs(60), "the idle connection ends", client.end).await.unwrap();
    assert!(ended.is_ok() || ended.is_err_and(|error| error.reason() == Some(Reason::NO_ERROR)));
    // Half a preface, a preface alone, and half a request.
    let half = [PREFACE, &frame(4, 0, 0, &[]), &get_frame(1, &blob.path())[..20]].concat();
    for (said, answered) in [(&PREFACE[..18], false), (PREFACE, false), (&half, true)] {
        let mut stream = TcpStream::connect(castier.public).await.unwrap();
        stream.write_all(said).await.unwrap();
        let code = within(Duration::from_secs(60), "the silent connection ends", goaway(&mut stream)).await;
        assert!(!answered || code == Some(0), "{code:?}");
    }
    // The preface in the middle of a connection, or something like it, is no HTTP/2.
    let mut conn = Conn::open(castier.public).await;
    conn.ask(&Request::get(blob.path())).await.assert_is(&blob);
    conn.send(PREFACE).await;
    assert_eq!(conn.reply("GET").await.status, 505);
    let mut conn = Conn::open(castier.public).await;
    conn.send(b"PRI * HTTP/3.0\r\n\r\n").await;
    assert_eq!(conn.reply("GET").await.status, 505);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_costs_what_the_plan_says() {
    const MANY: u64 = 400;
    let _turn = heavy().await;
    let (origin, castier) = world("").await;
    let blob = origin.blob(KIB);
    let mut open = Vec::new();
    let mut connect = async || {
        let client = Http2::open(castier.public).await;
        client.get(&blob.path()).await.unwrap().assert_is(&blob);
        open.push(client);
    };
    for _ in 0..50 {
        connect().await;
    }
    let before = castier.memory("VmRSS");
    for _ in 0..MANY {
        connect().await;
    }
    let each = (castier.memory("VmRSS") - before) / MANY;
    let planned = memory_plan::HTTP2 + memory_plan::CONNECTION;
    assert!(each < planned, "{each} of {planned}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relayed_upload_pays_for_its_window() {
    let _turn = light().await;
    let origin = MuteOrigin::start().await;
    let castier = Castier::start(&origin.url, "limits.client_memory = \"1MiB\"").await;
    let client = Http2::open(castier.public).await;
    // 56 KiB for the relay, 256 KiB for what it holds, and 256 KiB for what may come before that: one fits.
    let (_waiting, mut body) = client.begin(&Request::new("POST", "/elsewhere"), true).await.unwrap();
    body.send_data(Bytes::from_static(b"x"), false).unwrap();
    eventually("it waits at the origin", async || (origin.waiting() == 1).then_some(())).await;
    let (refused, _body) = client.begin(&Request::new("POST", "/elsewhere"), true).await.unwrap();
    assert_eq!(read(refused).await.unwrap().status, 503);
}

/// A request that has ended may have left its answer in the queue. That is paid for, too.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_that_nobody_takes_are_paid_for_one_after_the_other() {
    let _turn = light().await;
    nobody_takes(get_frame).await;
}

/// The same for what a handler answers, in a task of its own.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ranges_that_nobody_takes_are_paid_for_one_after_the_other() {
    let _turn = light().await;
    nobody_takes(|stream, path| {
        let fields = [(":method", "GET"), (":scheme", "http"), (":authority", "a"), (":path", path), ("range", "bytes=0-")];
        frame(1, 5, stream, &block(&fields))
    })
    .await;
}

async fn nobody_takes(request: impl Fn(u32, &str) -> Vec<u8>) {
    let (origin, castier) = world("limits.http2_streams = 1000\nlimits.client_memory = \"2MiB\"").await;
    let blob = origin.blob(16 * KIB);
    get(castier.public, &blob).await.assert_is(&blob);
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(16 << 10).unwrap();
    let mut stream = socket.connect(castier.public).await.unwrap();
    let window = frame(4, 0, 0, &[0, 4, 0, 16, 0, 0]);
    stream.write_all(&[PREFACE, &window, &frame(8, 0, 0, &[0x3f, 0, 0, 0])].concat()).await.unwrap();
    let answered = async || {
        let all = metrics(&castier).await;
        [
            ["200", "206"].iter().map(|code| all.sum("castier_http_requests_total", &[("route", "blob"), ("code", code)])).sum(),
            all.sum("castier_shed_requests_total", &[("reason", "client_memory")]),
        ]
    };
    let before = answered().await[0];
    for n in 0..1000 {
        stream.write_all(&request(2 * n + 1, &blob.path())).await.unwrap();
        let [good, refused] = eventually("it is answered", async || {
            let answered = answered().await;
            (answered[0] + answered[1] > before + u64::from(n)).then_some(answered)
        })
        .await;
        if refused > 0 {
            // What the kernel holds, and 16 KiB each of the rest.
            assert!(good > 100, "{good}");
            // A client that takes its answers has its memory back for the next.
            drop(stream);
            let client = eventually("the memory of the other one is given back", async || {
                let client = Http2::open(castier.public).await;
                let reply = client.get(&blob.path()).await.ok()?;
                (reply.status == 200).then_some(client)
            })
            .await;
            for _ in 0..200 {
                client.get(&blob.path()).await.unwrap().assert_is(&blob);
            }
            return;
        }
    }
    panic!("nothing was refused");
}

/// Answers that wait for their share of `limits.bandwidth_per_client` end with their connection.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_leaves_waits_for_no_bandwidth() {
    let _turn = light().await;
    let (origin, castier) = world("limits.bandwidth_per_client = \"64KiB\"\nlimits.http2_streams = 100").await;
    let (kept, large) = (origin.blob(64 * KIB), origin.blob(2 * MIB));
    get(castier.public, &kept).await.assert_is(&kept);
    let streams = async || metrics(&castier).await.total("castier_http2_streams");
    let client = Http2::open(castier.public).await;
    let mut begun = Vec::new();
    for blob in [&kept, &large].repeat(40) {
        begun.push(client.begin(&Request::get(blob.path()), false).await.unwrap());
    }
    eventually("they wait", async || (streams().await >= 70).then_some(())).await;
    // More than 40 MiB, which would take ten minutes.
    drop(begun);
    client.end.abort();
    eventually("nobody waits", async || (streams().await == 0).then_some(())).await;
    // Over HTTP/1.1.
    let open: Vec<_> = futures::future::join_all((0..20).map(|n| {
        let (public, path) = (castier.public, if n % 2 == 0 { kept.path() } else { large.path() });
        async move {
            let mut stream = TcpStream::connect(public).await.unwrap();
            stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: a\r\n\r\n").as_bytes()).await.unwrap();
            stream
        }
    }))
    .await;
    let waiting = async || metrics(&castier).await.total("castier_http_requests_in_flight");
    eventually("they wait", async || (waiting().await >= 18).then_some(())).await;
    drop(open);
    eventually("nobody waits", async || (waiting().await == 0).then_some(())).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_queued_goes_out_before_a_node_ends() {
    const MANY: u32 = 400;
    let _turn = heavy().await;
    let (origin, castier) = world("limits.http2_streams = 500").await;
    let blob = origin.blob(16 * KIB);
    get(castier.public, &blob).await.assert_is(&blob);
    // A client that lets everything come, and reads nothing yet: more than the kernel holds for it.
    let mut stream = TcpStream::connect(castier.public).await.unwrap();
    let window = frame(4, 0, 0, &[0, 4, 0, 16, 0, 0]);
    let gets: Vec<u8> = (0..MANY).flat_map(|n| get_frame(2 * n + 1, &blob.path())).collect();
    stream.write_all(&[PREFACE, &window, &frame(8, 0, 0, &[0x3f, 0, 0, 0]), &gets].concat()).await.unwrap();
    let answered = async || metrics(&castier).await.sum("castier_http_requests_total", &[("route", "blob"), ("code", "200")]);
    eventually("all are answered", async || (answered().await == u64::from(MANY) + 1).then_some(())).await;
    castier.signal(Signal::TERM);
    // Longer than castier waits for clients that have nothing left to get.
    tokio::time::sleep(Duration::from_secs(4)).await;
    let mut bytes = 0;
    while let Some((kind, _, payload)) = read_frame(&mut stream).await {
        bytes += if kind == 0 { payload.len() as u64 } else { 0 };
    }
    assert_eq!(bytes, u64::from(MANY) * blob.size);
}
