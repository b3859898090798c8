//! Large cold blobs, of which an origin gives several ranges at once.

use crate::support::{
    Blob, Castier, Download, Gate, Lie, LyingOrigin, MIB, RealOrigin, Request, assert_ledger, client::Outcome, eventually, get,
    lie::RangeManner, light, metrics, origin::Seen, stats::Metrics, within,
};
use std::{sync::atomic::Ordering, time::Duration};
use tokio::task::{JoinHandle, JoinSet};

/// The length of a range.
const RANGE: u64 = 8 * MIB;
/// Five ranges, of which the first is that of the answer that is open first.
const LARGE: u64 = 5 * RANGE - 7;
const A: &str = "\"a\"";
const B: &str = "\"b\"";

async fn world(config: &str) -> (LyingOrigin, Castier) {
    let origin = LyingOrigin::start().await;
    let castier = Castier::start(&origin.url(), config).await;
    (origin, castier)
}

/// A blob whose origin always gives ranges of version A.
fn large(origin: &LyingOrigin) -> Blob {
    let blob = origin.blob(LARGE);
    origin.always(&blob, Lie::honest().etag(A));
    blob
}

fn spawn(download: &Download, blob: &Blob, castier: &Castier) -> JoinHandle<Outcome> {
    let (download, blob, from) = (download.clone(), blob.clone(), castier.public);
    tokio::spawn(async move { download.of(&blob, from).await })
}

/// First and last byte of each range that was asked for, sorted; the first request asks for none.
fn ranges(origin: &LyingOrigin, blob: &Blob) -> Vec<(u64, u64)> {
    let parse = |seen: &Seen| {
        let (first, last) = seen.range()?.strip_prefix("bytes=")?.split_once('-')?;
        Some((first.parse().unwrap(), last.parse().unwrap_or(blob.size - 1)))
    };
    let mut ranges: Vec<_> = origin.requests("GET", blob).iter().filter_map(parse).collect();
    ranges.sort_unstable();
    ranges
}

/// Checks that every byte behind the first range was asked for, and returns the further ranges. On a machine that is so busy that a range was taken for slow,
/// these are more.
fn beyond_once(origin: &LyingOrigin, blob: &Blob) -> Vec<(u64, u64)> {
    let mut ranges = ranges(origin, blob);
    for range in (1..5).map(|at| (at * RANGE, (LARGE - 1).min((at + 1) * RANGE - 1))) {
        let at = ranges.iter().position(|asked| *asked == range).unwrap_or_else(|| panic!("{range:?} is not in {ranges:?}"));
        ranges.remove(at);
    }
    ranges
}

fn assert_each_once(origin: &LyingOrigin, blob: &Blob, figures: &Metrics) {
    let more = beyond_once(origin, blob);
    assert_eq!(more.len() as u64, count(figures, "hedged"), "{more:?}");
}

fn count(figures: &Metrics, result: &str) -> u64 {
    figures.sum("castier_fill_ranges_total", &[("result", result)])
}

#[tokio::test]
async fn ranges_are_read_at_the_same_time() {
    let _turn = light().await;
    let (origin, castier) = world("").await;
    let (gate, blob) = (Gate::new(), origin.blob(LARGE));
    origin.next(&blob, [Lie::honest().etag(A).stall(MIB, &gate)]);
    origin.always(&blob, Lie::honest().etag(A).hold(&gate));
    let client = spawn(&Download::default(), &blob, &castier);
    // The answer that is open, and three ranges beside it.
    eventually("four requests are open", async || (gate.arrived() == 4).then_some(())).await;
    assert_eq!(metrics(&castier).await.total("castier_flights_in_progress"), 1);
    gate.open();
    client.await.unwrap().assert_is(&blob);
    let seen = origin.requests("GET", &blob);
    assert!(seen[1..].iter().all(|seen| seen.head.header("if-match") == Some(A)), "{seen:?}");
    let books = assert_ledger(&castier).await;
    assert_each_once(&origin, &blob, &books);
    assert_eq!((books.source_loads(), books.resumes(), count(&books, "ok")), ([1, 0, 0], 0, 5));
    let received = books.total("castier_source_bytes_total");
    assert!((LARGE..LARGE + MIB).contains(&received), "{received}: every byte once, but for what the first answer sent too much");
}

#[tokio::test]
async fn many_clients_are_one_load() {
    let _turn = light().await;
    let (origin, castier) = world("").await;
    let (gate, blob) = (Gate::new(), origin.blob(LARGE));
    origin.always(&blob, Lie::honest().etag(A).hold(&gate));
    let mut clients = JoinSet::new();
    for _ in 0..20 {
        let (blob, from) = (blob.clone(), castier.public);
        clients.spawn(async move { Download::default().of(&blob, from).await });
    }
    eventually("all wait", async || (metrics(&castier).await.total("castier_http_requests_in_flight") == 20).then_some(())).await;
    gate.open();
    for outcome in clients.join_all().await {
        outcome.assert_is(&blob);
    }
    let books = assert_ledger(&castier).await;
    assert_eq!(books.source_loads(), [1, 0, 0]);
    assert_each_once(&origin, &blob, &books);
}

#[tokio::test]
async fn an_origin_that_ignores_ranges() {
    let _turn = light().await;
    let (origin, castier) = world("").await;
    // One question tells; on a busy machine the next ones are asked before. Afterwards it is known.
    for (least, most) in [(2, 4), (1, 1)] {
        let (gate, blob) = (Gate::new(), origin.blob(LARGE));
        // The first answer lasts until the range was asked for.
        origin.next(&blob, [Lie::honest().etag(A).stall(2 * MIB, &gate)]);
        origin.always(&blob, Lie::honest().etag(A).ranges(RangeManner::Ignore));
        let client = spawn(&Download::default(), &blob, &castier);
        eventually("it is asked", async || (origin.gets(&blob) >= least).then_some(())).await;
        gate.open();
        client.await.unwrap().assert_is(&blob);
        assert!((least..=most).contains(&origin.gets(&blob)), "{}", origin.gets(&blob));
    }
    let books = assert_ledger(&castier).await;
    assert_eq!((books.source_loads(), books.resumes(), count(&books, "ok")), ([2, 0, 0], 0, 0));
    assert!(count(&books, "ignored") > 0);
}

#[tokio::test]
async fn an_origin_that_does_not_announce_them() {
    let _turn = light().await;
    let (origin, castier) = world("").await;
    for lie in [Lie::honest(), Lie::honest().etag("W/\"a\""), Lie::honest().etag("a"), Lie::honest().etag(A).chunked()] {
        let blob = origin.blob(LARGE);
        origin.always(&blob, lie);
        get(castier.public, &blob).await.assert_is(&blob);
        assert_eq!(origin.gets(&blob), 1);
    }
}

#[tokio::test]
async fn the_keys_turn_it_off() {
    let _turn = light().await;
    for config in ["fill.parallel = 1", "fill.parallel_over = 0", "fill.parallel_over = \"40MiB\"", "fill.memory = \"15MiB\""] {
        let (origin, castier) = world(config).await;
        let blob = large(&origin);
        get(castier.public, &blob).await.assert_is(&blob);
        assert_eq!(origin.gets(&blob), 1, "{config}");
    }
}

#[tokio::test]
async fn memory_for_one_range() {
    let _turn = light().await;
    let (origin, castier) = world("fill.memory = \"18MiB\"").await;
    let (gate, blob) = (Gate::new(), origin.blob(LARGE));
    origin.next(&blob, [Lie::honest().etag(A).stall(MIB, &gate)]);
    origin.always(&blob, Lie::honest().etag(A));
    let client = spawn(&Download::default(), &blob, &castier);
    eventually("it wants more", async || (count(&metrics(&castier).await, "no_memory") > 0).then_some(())).await;
    assert_eq!(ranges(&origin, &blob), [(RANGE, 2 * RANGE - 1)]);
    gate.open();
    client.await.unwrap().assert_is(&blob);
    assert_ledger(&castier).await;
}

#[tokio::test]
async fn a_range_that_breaks_is_asked_for_again() {
    let _turn = light().await;
    let (origin, castier) = world("").await;
    let broken = 2 * RANGE + MIB;
    let lies = [
        (Lie::honest().etag(A).truncate(broken), broken..=broken),
        // A reset drops bytes that were not read.
        (Lie::honest().etag(A).reset_after(broken), 2 * RANGE..=broken),
        (Lie::honest().status(500), 2 * RANGE..=2 * RANGE),
        (Lie::honest().status(503), 2 * RANGE..=2 * RANGE),
        (Lie::honest().etag(A).ranges(RangeManner::Shift(1)), 2 * RANGE..=2 * RANGE),
    ];
    for (lie, again) in lies {
        let blob = large(&origin);
        origin.at(&blob, 2 * RANGE, lie);
        get(castier.public, &blob).await.assert_is(&blob);
        let more = beyond_once(&origin, &blob);
        assert!(more.iter().any(|(first, last)| again.contains(first) && *last == 3 * RANGE - 1), "{again:?}: {more:?}");
    }
    let books = assert_ledger(&castier).await;
    assert_eq!((books.source_loads(), books.resumes(), count(&books, "retried"), count(&books, "failed")), ([5, 0, 0], 0, 5, 0));
}

/// Then the fill goes on where it is, as after any transfer that broke.
#[tokio::test]
async fn a_range_that_always_breaks() {
    let _turn = light().await;
    let (origin, castier) = world("origin.retries = 1").await;
    let (gate, blob) = (Gate::new(), large(&origin));
    for _ in 0..2 {
        origin.at(&blob, 2 * RANGE, Lie::honest().status(500).hold(&gate));
    }
    let client = spawn(&Download::default(), &blob, &castier);
    eventually("the first answer has been read", async || (count(&metrics(&castier).await, "ok") >= 2).then_some(())).await;
    gate.open();
    client.await.unwrap().assert_is(&blob);
    let books = assert_ledger(&castier).await;
    assert_eq!((books.source_loads(), books.resumes(), count(&books, "failed")), ([1, 0, 0], 1, 1));
}

#[tokio::test]
async fn a_range_that_stalls_is_asked_for_once_more() {
    let _turn = light().await;
    let (origin, castier) = world("").await;
    let (gate, blob) = (Gate::new(), large(&origin));
    origin.at(&blob, 2 * RANGE, Lie::honest().etag(A).stall(2 * RANGE + MIB, &gate));
    // The gate stays shut.
    get(castier.public, &blob).await.assert_is(&blob);
    assert!(ranges(&origin, &blob).contains(&(2 * RANGE + MIB, 3 * RANGE - 1)), "only what is missing: {:?}", ranges(&origin, &blob));
    let books = assert_ledger(&castier).await;
    assert_eq!((books.source_loads(), count(&books, "hedged"), count(&books, "ok")), ([1, 0, 0], 1, 5));
    eventually("the stalled answer is dropped", async || (origin.abandoned(&blob) >= 1).then_some(())).await;
}

/// A store that takes one connection at a time: what is asked for beside it is refused.
#[tokio::test]
async fn an_origin_with_too_much_to_do() {
    let _turn = light().await;
    let (origin, castier) = world("origin.retries = 1").await;
    let blob = large(&origin);
    for at in 2..5 {
        for _ in 0..2 {
            origin.at(&blob, at * RANGE, Lie::honest().status(503));
        }
    }
    get(castier.public, &blob).await.assert_is(&blob);
    assert_eq!(assert_ledger(&castier).await.source_loads(), [1, 0, 0]);
}

/// The object is replaced after three ranges of it.
async fn replaced(then: Lie) -> (LyingOrigin, Castier, Blob) {
    let (origin, castier) = world("").await;
    let (gate, blob) = (Gate::new(), origin.blob(LARGE));
    origin.next(&blob, [Lie::honest().etag(A).stall(MIB, &gate)]);
    origin.always(&blob, Lie::honest().etag(A).hold(&gate));
    let client = spawn(&Download::default(), &blob, &castier);
    eventually("four requests are open", async || (gate.arrived() == 4).then_some(())).await;
    origin.always(&blob, then);
    gate.open();
    let outcome = client.await.unwrap();
    assert!(outcome.wrong_at.is_none_or(|at| at >= 4 * RANGE), "{outcome:?}");
    outcome.assert_no_whole_lie(&blob);
    assert_eq!(count(&metrics(&castier).await, "replaced"), 1);
    (origin, castier, blob)
}

#[tokio::test]
async fn an_object_replaced_midway_by_other_bytes() {
    let _turn = light().await;
    for overlooked in [false, true] {
        let other = Lie::honest().etag(B).flip_bit(LARGE - 1);
        let (origin, castier, blob) = replaced(if overlooked { other.overlook_if_match() } else { other }).await;
        let books = assert_ledger(&castier).await;
        assert_eq!((books.source_loads(), books.corrupt("origin"), books.kept()), ([0, 0, 1], 1, 0));
        origin.always(&blob, Lie::honest().etag(B));
        get(castier.public, &blob).await.assert_is(&blob);
    }
}

/// A store may give the same bytes another version when they are stored again.
#[tokio::test]
async fn an_object_replaced_midway_by_the_same_bytes() {
    let _turn = light().await;
    let (_origin, castier, blob) = replaced(Lie::honest().etag(B)).await;
    let books = assert_ledger(&castier).await;
    assert_eq!((books.source_loads(), books.corrupt("origin"), books.resumes()), ([1, 0, 0], 0, 1), "{}", blob.digest);
}

/// Two servers behind one name, with versions of their own: the first answer is enough.
#[tokio::test]
async fn another_version_at_the_first_range() {
    let _turn = light().await;
    let (origin, castier) = world("").await;
    let (gate, blob) = (Gate::new(), origin.blob(LARGE));
    origin.next(&blob, [Lie::honest().etag(A).stall(MIB, &gate)]);
    origin.always(&blob, Lie::honest().etag(B));
    let client = spawn(&Download::default(), &blob, &castier);
    eventually("it was asked", async || (count(&metrics(&castier).await, "replaced") > 0).then_some(())).await;
    gate.open();
    client.await.unwrap().assert_is(&blob);
    assert!(origin.gets(&blob) <= 4, "{}", origin.gets(&blob));
    assert_eq!(assert_ledger(&castier).await.source_loads(), [1, 0, 0]);
}

#[tokio::test]
async fn wrong_bytes_in_a_range() {
    let _turn = light().await;
    let (origin, castier) = world("").await;
    let blob = large(&origin);
    origin.at(&blob, 2 * RANGE, Lie::honest().etag(A).flip_bit(2 * RANGE + 5));
    Download::default().of(&blob, castier.public).await.assert_no_whole_lie(&blob);
    let books = assert_ledger(&castier).await;
    assert_eq!((books.source_loads(), books.corrupt("origin"), books.kept()), ([0, 0, 1], 1, 0));
    get(castier.public, &blob).await.assert_is(&blob);
}

/// A load that broke off goes on with ranges.
#[tokio::test]
async fn a_resumed_load() {
    let _turn = light().await;
    let (origin, castier) = world("fill.parallel_over = \"16MiB\"").await;
    let blob = large(&origin);
    origin.next(&blob, [Lie::honest().truncate(MIB)]);
    get(castier.public, &blob).await.assert_is(&blob);
    let ranges = ranges(&origin, &blob);
    assert_eq!(ranges[0], (MIB, LARGE - 1));
    assert!(ranges.len() > 3 && ranges[1..].iter().all(|(first, last)| last - first < RANGE), "{ranges:?}");
    assert_eq!(assert_ledger(&castier).await.resumes(), 1);
}

#[tokio::test]
async fn readers_that_leave_end_all_of_it() {
    let _turn = light().await;
    let (origin, castier) = world("").await;
    let (gate, blob) = (Gate::new(), origin.blob(LARGE));
    origin.next(&blob, [Lie::honest().etag(A).stall(MIB, &gate)]);
    origin.always(&blob, Lie::honest().etag(A).stall(0, &gate));
    let download = Download::default();
    let client = spawn(&download, &blob, &castier);
    eventually("four requests are open", async || (gate.arrived() == 4).then_some(())).await;
    eventually("it has bytes", async || (download.received.load(Ordering::Relaxed) > 0).then_some(())).await;
    client.abort();
    // The gate stays shut: castier drops all of them.
    eventually("every request is dropped", async || (origin.abandoned(&blob) == 4).then_some(())).await;
    let books = assert_ledger(&castier).await;
    assert_eq!(books.sum("castier_source_loads_given_up_total", &[("reason", "abandoned")]), 1);
    gate.open();
    origin.always(&blob, Lie::honest().etag(A));
    get(castier.public, &blob).await.assert_is(&blob);
}

/// Many large loads at once, and memory for few ranges: none waits for another.
#[tokio::test]
async fn many_loads_share_little_memory() {
    let _turn = light().await;
    let (origin, castier) = world("fill.memory = \"48MiB\"").await;
    let blobs: Vec<_> = (0..12).map(|_| large(&origin)).collect();
    let mut clients = JoinSet::new();
    for blob in &blobs {
        let (blob, from) = (blob.clone(), castier.public);
        clients.spawn(async move { Download::default().of(&blob, from).await.assert_is(&blob) });
    }
    within(Duration::from_secs(100), "all loads", clients.join_all()).await;
    let books = assert_ledger(&castier).await;
    assert_eq!(books.source_loads(), [12, 0, 0]);
    assert!(count(&books, "ok") > 0);
}

#[tokio::test]
async fn castier_origin_gives_ranges() {
    let _turn = light().await;
    let origin = RealOrigin::start().await;
    let castier = Castier::start(&origin.url(), "").await;
    let blob = Blob::new(LARGE);
    let stored = Request::new("PUT", blob.path()).body(blob.whole()).send(origin.addr).await;
    assert_eq!(stored.status, 201);
    Download::default().of(&blob, castier.public).await.assert_is(&blob);
    let books = assert_ledger(&castier).await;
    assert_eq!((books.source_loads(), count(&books, "ok")), ([1, 0, 0], 5));
}
