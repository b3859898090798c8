//! Every fault of the origin: the client's result, the content of the tiers, and the counters.

use crate::support::{
    Blob, Castier, Conn, DEADLINE, Download, Gate, HELD_BACK, KIB, Lie, LyingOrigin, MIB, Request, assert_ledger, eventually, get,
    lie::RangeManner, light, wire::Framing, within,
};
use std::sync::atomic::Ordering;

/// Small: verified before the first byte. Large: streamed.
const SMALL: u64 = 300 * KIB;
const LARGE: u64 = 4 * MIB;

async fn world() -> (LyingOrigin, Castier) {
    let origin = LyingOrigin::start().await;
    let castier = Castier::start(&origin.url(), "origin.read_timeout = \"500ms\"").await;
    (origin, castier)
}

/// After the fault castier gives the right bytes, and has kept nothing wrong.
async fn assert_recovers(origin: &LyingOrigin, castier: &Castier, blob: &Blob) {
    let before = origin.gets(blob);
    origin.always(blob, Lie::honest());
    get(castier.public, blob).await.assert_is(blob);
    assert_eq!(origin.gets(blob), before + 1, "the lie was kept");
}

#[tokio::test]
async fn a_flipped_bit_in_a_small_blob() {
    let _turn = light().await;
    let (origin, castier) = world().await;
    for at in [0, SMALL / 2, SMALL - 1] {
        let blob = origin.blob(SMALL);
        origin.always(&blob, Lie::honest().flip_bit(at));
        get(castier.public, &blob).await.assert_problem(502);
        assert_eq!(origin.gets(&blob), 2, "once more from the start, then no more");
    }
    let books = assert_ledger(&castier).await;
    assert_eq!((books.source_loads(), books.corrupt("origin"), books.kept()), ([0, 0, 3], 6, 0));
    let blob = origin.blob_with(SMALL, [Lie::honest().flip_bit(7)]);
    get(castier.public, &blob).await.assert_is(&blob);
    let books = assert_ledger(&castier).await;
    assert_eq!((books.source_loads(), books.corrupt("origin"), books.kept()), ([1, 0, 3], 7, 1));
    assert_eq!(origin.gets(&blob), 2);
}

#[tokio::test]
async fn a_flipped_bit_in_a_large_blob() {
    let _turn = light().await;
    let (origin, castier) = world().await;
    let offsets = [0, 1000, LARGE / 2, LARGE - HELD_BACK, LARGE - 1];
    for (round, at) in (1..).zip(offsets) {
        let (gate, download) = (Gate::new(), Download::default());
        let blob = origin.blob_with(LARGE, [Lie::honest().flip_bit(at).stall(LARGE / 2, &gate)]);
        let client = tokio::spawn({
            let (download, blob, from) = (download.clone(), blob.clone(), castier.public);
            async move { download.of(&blob, from).await }
        });
        eventually("the client has bytes", async || (download.started.load(Ordering::SeqCst) == 1).then_some(())).await;
        gate.open();
        let outcome = client.await.unwrap();
        assert!(outcome.status == 200 && !outcome.complete, "cut, since the head had gone: {outcome:?}");
        assert!(outcome.received <= LARGE - HELD_BACK, "the end stays back: {outcome:?}");
        let books = assert_ledger(&castier).await;
        assert_eq!((books.source_loads(), books.corrupt("origin"), books.kept()), ([round - 1, 0, round], round, round - 1));
        assert_eq!(origin.gets(&blob), 1);
        assert_recovers(&origin, &castier, &blob).await;
    }
}

#[tokio::test]
async fn a_range_of_a_corrupt_blob_is_never_whole() {
    let _turn = light().await;
    let (origin, castier) = world().await;
    for range in ["bytes=0-99", "bytes=1000000-1999999", "bytes=-100", "bytes=0-"] {
        let blob = origin.blob(LARGE);
        origin.always(&blob, Lie::honest().flip_bit(LARGE - 1));
        let reply = Request::get(blob.path()).header("Range", range).send(castier.public).await;
        assert!(reply.status == 502 || (reply.status == 206 && !reply.complete), "{range}: {:?}", reply.head);
    }
    let books = assert_ledger(&castier).await;
    assert_eq!((books.source_loads(), books.kept()), ([0, 0, 4], 0));
}

#[tokio::test]
async fn a_truncated_answer_is_resumed() {
    let _turn = light().await;
    let (origin, castier) = world().await;
    let mut resumed = 0;
    for (size, at) in [(SMALL, 0), (SMALL, 1), (SMALL, SMALL - 1), (LARGE, 0), (LARGE, LARGE / 2), (LARGE, LARGE - 1)] {
        let blob = origin.blob_with(size, [Lie::honest().truncate(at)]);
        get(castier.public, &blob).await.assert_is(&blob);
        let seen = origin.requests("GET", &blob);
        assert_eq!(seen.len(), 2, "{seen:?}");
        if at > 0 {
            resumed += 1;
            assert_eq!(seen[1].range(), Some(format!("bytes={at}-").as_str()), "no byte is asked for twice");
            assert_eq!(origin.sent(&blob), size);
        }
    }
    let books = assert_ledger(&castier).await;
    assert_eq!((books.source_loads(), books.corrupt("origin"), books.kept()), ([6, 0, 0], 0, 6));
    assert!(books.resumes() >= resumed, "{} resumes", books.resumes());
}

#[tokio::test]
async fn an_answer_that_is_always_truncated() {
    let _turn = light().await;
    let (origin, castier) = world().await;
    for at in [0, 1, SMALL - 1] {
        let blob = origin.blob(SMALL);
        origin.always(&blob, Lie::honest().truncate(at));
        get(castier.public, &blob).await.assert_problem(502);
        assert_eq!(origin.gets(&blob), 3, "the first and two more");
        assert_recovers(&origin, &castier, &blob).await;
    }
    let blob = origin.blob(LARGE);
    origin.always(&blob, Lie::honest().truncate(LARGE / 2));
    let outcome = Download::default().of(&blob, castier.public).await;
    assert!(outcome.status == 200 && !outcome.complete && outcome.received <= LARGE / 2 && outcome.wrong_at.is_none(), "{outcome:?}");
    assert!((3..=4).contains(&origin.gets(&blob)), "{}", origin.gets(&blob));
    assert_recovers(&origin, &castier, &blob).await;
    let books = assert_ledger(&castier).await;
    assert_eq!((books.source_loads(), books.kept()), ([4, 0, 4], 4));
}

#[tokio::test]
async fn more_than_the_blob() {
    let _turn = light().await;
    let (origin, castier) = world().await;
    // Beyond Content-Length: not part of the answer, and no beginning of the next one either.
    for size in [SMALL, LARGE] {
        let blob = origin.blob_with(size, [Lie::honest().too_much(1000)]);
        get(castier.public, &blob).await.assert_is(&blob);
        let next = origin.blob(size);
        get(castier.public, &next).await.assert_is(&next);
    }
    assert_eq!(assert_ledger(&castier).await.kept(), 4);
    // Within what the answer claims: it is some other blob.
    for size in [SMALL, LARGE] {
        for lie in [Lie::honest().wrong_length(size + 1000).too_much(1000), Lie::honest().chunked().too_much(1)] {
            let blob = origin.blob(size);
            origin.always(&blob, lie);
            let outcome = Download::default().of(&blob, castier.public).await;
            assert!(outcome.status == 502 || (outcome.status == 200 && !outcome.complete), "{outcome:?}");
            assert_recovers(&origin, &castier, &blob).await;
        }
    }
    let books = assert_ledger(&castier).await;
    assert_eq!((books.source_loads(), books.kept()), ([8, 0, 4], 8));
    assert!(books.corrupt("origin") >= 4);
}

#[tokio::test]
async fn a_wrong_length() {
    let _turn = light().await;
    let (origin, castier) = world().await;
    for size in [SMALL, LARGE] {
        for claimed in [0, 1, size - 1, size + 1] {
            let blob = origin.blob(size);
            origin.always(&blob, Lie::honest().wrong_length(claimed));
            let outcome = Download::default().of(&blob, castier.public).await;
            assert!(outcome.status == 502 || (outcome.status == 200 && !outcome.complete), "{size} as {claimed}: {outcome:?}");
            assert_recovers(&origin, &castier, &blob).await;
        }
    }
    let books = assert_ledger(&castier).await;
    assert_eq!((books.source_loads(), books.kept()), ([8, 0, 8], 8));
}

#[tokio::test]
async fn silence() {
    let _turn = light().await;
    let (origin, castier) = world().await;
    let never = Gate::new();
    for size in [SMALL, LARGE] {
        let blob = origin.blob_with(size, [Lie::honest().stall(size / 2, &never)]);
        get(castier.public, &blob).await.assert_is(&blob);
        assert_eq!(origin.requests("GET", &blob)[1].range(), Some(format!("bytes={}-", size / 2).as_str()));
    }
    let mute = origin.blob(SMALL);
    for lie in [Lie::honest().stall(SMALL / 2, &never), Lie::honest().hold(&never)] {
        origin.always(&mute, lie);
        get(castier.public, &mute).await.assert_problem(504);
    }
    assert_eq!(origin.gets(&mute), 3 + 1, "one that has said nothing at all has had its time");
    let blob = origin.blob(LARGE);
    origin.always(&blob, Lie::honest().stall(LARGE / 2, &never));
    let outcome = Download::default().of(&blob, castier.public).await;
    assert!(outcome.status == 200 && !outcome.complete && outcome.received <= LARGE / 2, "{outcome:?}");
    let books = assert_ledger(&castier).await;
    assert_eq!((books.source_loads(), books.kept()), ([2, 0, 3], 2));
    assert_recovers(&origin, &castier, &blob).await;
    assert_recovers(&origin, &castier, &mute).await;
}

#[tokio::test]
async fn a_reset_is_resumed() {
    let _turn = light().await;
    let (origin, castier) = world().await;
    for (size, at) in [(SMALL, 0), (SMALL, SMALL / 2), (LARGE, LARGE / 3), (LARGE, LARGE - 1)] {
        let blob = origin.blob_with(size, [Lie::honest().reset_after(at)]);
        get(castier.public, &blob).await.assert_is(&blob);
        assert_eq!(origin.gets(&blob), 2);
    }
    let blob = origin.blob(SMALL);
    origin.always(&blob, Lie::honest().reset_after(10));
    get(castier.public, &blob).await.assert_problem(502);
    let books = assert_ledger(&castier).await;
    assert_eq!((books.source_loads(), books.kept()), ([4, 0, 1], 4));
}

#[tokio::test]
async fn many_breaks_with_progress_between_them() {
    let _turn = light().await;
    let (origin, castier) = world().await;
    let every = LARGE / 8;
    let breaks: [Lie; 7] = std::array::from_fn(|n| {
        let at = every * (n as u64 + 1);
        if n % 2 == 0 { Lie::honest().truncate(at) } else { Lie::honest().reset_after(at) }
    });
    let blob = origin.blob_with(LARGE, breaks);
    get(castier.public, &blob).await.assert_is(&blob);
    let books = assert_ledger(&castier).await;
    assert_eq!((books.source_loads(), books.resumes()), ([1, 0, 0], origin.gets(&blob) as u64 - 1));
}

#[tokio::test]
async fn other_answers() {
    let _turn = light().await;
    let (origin, castier) = world().await;
    let mut errors = 0;
    for lie in [Lie::honest().status(500), Lie::honest().status(301), Lie::honest().status(418), Lie::honest().garbage()] {
        let blob = origin.blob(SMALL);
        origin.always(&blob, lie);
        get(castier.public, &blob).await.assert_problem(502);
        errors += 1;
        assert!((1..=3).contains(&origin.gets(&blob)), "at most origin.retries more: {}", origin.gets(&blob));
        assert_recovers(&origin, &castier, &blob).await;
    }
    assert!(origin.seen().iter().all(|seen| seen.target != "/elsewhere"), "redirects are not followed");
    // An origin that sheds load wants the client to come back later, and not to be asked again at once.
    let busy = origin.blob(SMALL);
    origin.always(&busy, Lie::honest().status(503));
    let reply = get(castier.public, &busy).await;
    reply.assert_problem(503);
    assert!(reply.header("retry-after").is_some() && origin.gets(&busy) == 1, "{:?}", reply.head);
    errors += 1;
    assert_recovers(&origin, &castier, &busy).await;
    // One bad answer is no reason to fail.
    let blob = origin.blob_with(SMALL, [Lie::honest().status(500)]);
    get(castier.public, &blob).await.assert_is(&blob);
    // The origin's own 404 is final.
    let gone = origin.blob(SMALL);
    origin.always(&gone, Lie::honest().status(404));
    get(castier.public, &gone).await.assert_problem(404);
    assert_eq!(origin.gets(&gone), 1);
    let books = assert_ledger(&castier).await;
    assert_eq!((books.source_loads(), books.kept()), ([errors + 1, 1, errors], errors + 1));
}

#[tokio::test]
async fn a_range_that_is_ignored_or_mistreated() {
    let _turn = light().await;
    let (origin, castier) = world().await;
    for size in [SMALL, LARGE] {
        let broken = || Lie::honest().truncate(size / 2);
        // 200 with everything: what is known already is skipped.
        let blob = origin.blob_with(size, [broken(), Lie::honest().ranges(RangeManner::Ignore)]);
        get(castier.public, &blob).await.assert_is(&blob);
        assert_eq!(origin.gets(&blob), 2);
        // A part under the name of the whole, or another part than the one asked for.
        for manner in [RangeManner::PartAs200, RangeManner::Shift(10)] {
            let blob = origin.blob_with(size, [broken()]);
            origin.always(&blob, Lie::honest().ranges(manner).truncate(size / 2));
            origin.next(&blob, [Lie::honest().ranges(manner)]);
            let outcome = Download::default().of(&blob, castier.public).await;
            outcome.assert_no_whole_lie(&blob);
            assert!(!outcome.complete || outcome.status == 502, "{manner:?}: {outcome:?}");
            assert_recovers(&origin, &castier, &blob).await;
        }
    }
    let books = assert_ledger(&castier).await;
    assert_eq!((books.source_loads(), books.kept()), ([6, 0, 4], 6));
}

#[tokio::test]
async fn one_byte_at_a_time() {
    let _turn = light().await;
    let (origin, castier) = world().await;
    let blob = origin.blob_with(20 * KIB, [Lie::honest().dribble()]);
    get(castier.public, &blob).await.assert_is(&blob);
    let chunked = origin.blob_with(20 * KIB, [Lie::honest().chunked().dribble()]);
    get(castier.public, &chunked).await.assert_is(&chunked);
    assert_eq!((origin.gets(&blob), origin.gets(&chunked)), (1, 1));
    let books = assert_ledger(&castier).await;
    assert_eq!((books.source_loads(), books.resumes(), books.kept()), ([2, 0, 0], 0, 2));
}

#[tokio::test]
async fn connections_that_do_not_last() {
    let _turn = light().await;
    let (origin, castier) = world().await;
    for close in [Lie::honest().close_each_time(), Lie::honest().close_unannounced()] {
        for _ in 0..20 {
            let blob = origin.blob(10 * KIB);
            origin.always(&blob, close.clone());
            get(castier.public, &blob).await.assert_is(&blob);
        }
    }
    let books = assert_ledger(&castier).await;
    assert_eq!((books.source_loads(), books.kept()), ([40, 0, 0], 40));
}

#[tokio::test]
async fn an_unknown_length() {
    let _turn = light().await;
    let (origin, castier) = world().await;
    for size in [0, SMALL, MIB] {
        let blob = origin.blob_with(size, [Lie::honest().chunked()]);
        let reply = get(castier.public, &blob).await;
        reply.assert_is(&blob);
        assert_eq!(reply.header("content-length"), Some(size.to_string().as_str()), "verified before the first byte, so known");
    }
    let gate = Gate::new();
    let blob = origin.blob_with(LARGE, [Lie::honest().chunked().stall(LARGE / 2, &gate)]);
    let mut conn = Conn::open(castier.public).await;
    conn.send(&Request::get(blob.path()).bytes()).await;
    let head = conn.head().await.unwrap();
    assert_eq!(head.header("transfer-encoding"), Some("chunked"), "or else a cut would look like the end: {head:?}");
    gate.open();
    let (mut framing, mut received) = (head.framing(Framing::Close), 0);
    while let Some(piece) = within(DEADLINE, "the rest", conn.wire.piece(&mut framing, usize::MAX)).await.unwrap() {
        assert!(blob.is_at(received, piece));
        received += piece.len() as u64;
    }
    assert_eq!(received, LARGE);
    let hit = get(castier.public, &blob).await;
    hit.assert_is(&blob);
    assert_eq!(hit.header("content-length"), Some(LARGE.to_string().as_str()));
    let broken = origin.blob_with(LARGE, [Lie::honest().chunked().truncate(LARGE / 2), Lie::honest().chunked()]);
    get(castier.public, &broken).await.assert_is(&broken);
    let books = assert_ledger(&castier).await;
    assert_eq!((books.source_loads(), books.kept()), ([5, 0, 0], 5));
    for at in [0, LARGE - 1] {
        let blob = origin.blob(LARGE);
        origin.always(&blob, Lie::honest().chunked().flip_bit(at));
        let outcome = Download::default().of(&blob, castier.public).await;
        assert!(!outcome.complete || outcome.status == 502, "the last chunk must not come: {outcome:?}");
        // An old client takes a clean end of the connection for the end of the blob.
        let old = Request::get(blob.path()).http10().send(castier.public).await;
        assert!(!old.complete || old.status == 502, "{:?}: {} bytes and a clean end", old.head, old.body.len());
    }
    let books = assert_ledger(&castier).await;
    assert_eq!((books.source_loads(), books.kept()), ([5, 0, 4], 5));
}
