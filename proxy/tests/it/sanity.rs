//! Tests of the scripted origin and the raw client.

use crate::support::{Blob, Download, Gate, KIB, Lie, LyingOrigin, MIB, Request, eventually, get, lie::RangeManner, light};
use castier_blob::Digest;

#[test]
fn blobs_are_what_they_say() {
    let blob = Blob::new(MIB + 12_345);
    assert_eq!(blob.digest, Digest::of(&blob.whole()));
    assert_eq!(blob.bytes(300_000, 300_100), blob.whole()[300_000..300_100]);
    assert!(blob.is_at(262_000, &blob.bytes(262_000, 600_000)));
    let mut wrong = blob.bytes(262_000, 600_000);
    wrong[300_000] ^= 1;
    assert!(!blob.is_at(262_000, &wrong));
    assert!(!blob.is_at(blob.size - 1, &[blob.whole()[blob.size as usize - 1], 0]));
    assert_ne!(blob.digest, Blob::new(MIB + 12_345).digest);
    assert_eq!(Blob::of(b"").digest, Digest::of(b""));
    assert_eq!(Blob::of(b"abc").whole(), b"abc");
}

#[tokio::test]
async fn honest_answers() {
    let _turn = light().await;
    let origin = LyingOrigin::start().await;
    let blob = origin.blob(700 * KIB);
    get(origin.addr, &blob).await.assert_is(&blob);
    Download::default().of(&blob, origin.addr).await.assert_is(&blob);
    assert_eq!(get(origin.addr, &Blob::new(5)).await.status, 404);
    let part = Request::get(blob.path()).header("Range", "bytes=10-19").send(origin.addr).await;
    assert_eq!((part.status, part.header("content-range")), (206, Some("bytes 10-19/716800")));
    assert_eq!(part.body, blob.bytes(10, 20));
    let head = Request::new("HEAD", blob.path()).send(origin.addr).await;
    assert_eq!((head.status, head.header("content-length"), head.body.len()), (200, Some("716800"), 0));
    assert_eq!((origin.gets(&blob), origin.requests("HEAD", &blob).len()), (3, 1));
    assert_eq!(origin.requests("GET", &blob)[2].range(), Some("bytes=10-19"));
    assert_eq!(origin.sent(&blob), 2 * blob.size + 10);
}

#[tokio::test]
async fn every_lie_is_told() {
    let _turn = light().await;
    let origin = LyingOrigin::start().await;
    let size = 300 * KIB;
    let ask = async |lie: Lie| {
        let blob = origin.blob_with(size, [lie]);
        let reply = get(origin.addr, &blob).await;
        (reply.status, reply.body.len() as u64, reply.complete, blob.is_at(0, &reply.body))
    };
    assert_eq!(ask(Lie::honest()).await, (200, size, true, true));
    assert_eq!(ask(Lie::honest().flip_bit(299 * KIB)).await, (200, size, true, false));
    assert_eq!(ask(Lie::honest().truncate(1000)).await, (200, 1000, false, true));
    assert_eq!(ask(Lie::honest().wrong_length(size - 5)).await, (200, size - 5, true, true));
    assert_eq!(ask(Lie::honest().wrong_length(size + 5)).await, (200, size, false, true));
    assert_eq!(ask(Lie::honest().too_much(7)).await, (200, size, true, true));
    assert_eq!(ask(Lie::honest().chunked().too_much(7)).await, (200, size + 7, true, false));
    assert_eq!(ask(Lie::honest().chunked().truncate(size)).await, (200, size, false, true));
    assert_eq!(ask(Lie::honest().dribble()).await, (200, size, true, true));
    assert_eq!(ask(Lie::honest().throttle(MIB)).await, (200, size, true, true));
    assert_eq!(ask(Lie::honest().close_each_time()).await, (200, size, true, true));
    assert_eq!(ask(Lie::honest().status(500)).await.0, 500);
    let (status, received, complete, _) = ask(Lie::honest().reset_after(100 * KIB)).await;
    assert!(status <= 200 && received <= 100 * KIB && !complete);
}

#[tokio::test]
async fn ranges_are_mistreated_as_told() {
    let _turn = light().await;
    let origin = LyingOrigin::start().await;
    let ask = async |manner| {
        let blob = origin.blob_with(1000, [Lie::honest().ranges(manner)]);
        let reply = Request::get(blob.path()).header("Range", "bytes=900-").send(origin.addr).await;
        let at = (0..1000).find(|&at| blob.is_at(at, &reply.body));
        (reply.status, reply.body.len(), at)
    };
    assert_eq!(ask(RangeManner::Honour).await, (206, 100, Some(900)));
    assert_eq!(ask(RangeManner::Ignore).await, (200, 1000, Some(0)));
    assert_eq!(ask(RangeManner::PartAs200).await, (200, 100, Some(900)));
    assert_eq!(ask(RangeManner::Shift(10)).await, (206, 90, Some(910)));
}

#[tokio::test]
async fn gates_hold_and_let_go() {
    let _turn = light().await;
    let mut origin = LyingOrigin::start().await;
    let (hold, stall) = (Gate::new(), Gate::new());
    let blob = origin.blob_with(MIB, [Lie::honest().hold(&hold).stall(512 * KIB, &stall)]);
    let download = Download::default();
    let (addr, seen) = (origin.addr, blob.clone());
    let client = tokio::spawn({
        let download = download.clone();
        async move { download.of(&seen, addr).await }
    });
    eventually("the request is held", async || (hold.arrived() == 1).then_some(())).await;
    assert_eq!((origin.gets(&blob), origin.sent(&blob)), (1, 0));
    hold.open();
    eventually("the body stalls", async || (stall.arrived() == 1).then_some(())).await;
    let received = || download.received.load(std::sync::atomic::Ordering::Relaxed);
    eventually("half of it is here", async || (received() == 512 * KIB).then_some(())).await;
    stall.open();
    client.await.unwrap().assert_is(&blob);
    origin.down().await;
    assert!(tokio::net::TcpStream::connect(addr).await.is_err());
    origin.up().await;
    get(addr, &blob).await.assert_is(&blob);
}
