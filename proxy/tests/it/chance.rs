//! Random combinations of the origin's faults: no client ever gets a complete wrong blob, and the ledger balances.

use crate::support::{Blob, Castier, Download, KIB, Lie, LyingOrigin, MIB, Random, Request, assert_ledger, get, lie::RangeManner, light};

const ROUNDS: usize = 60;

fn any_size(random: &mut Random) -> u64 {
    let edges = [0, 1, 1000, 64 * KIB - 1, 64 * KIB, 64 * KIB + 1, MIB, MIB + 1, MIB + 64 * KIB];
    match random.below(3) {
        0 => random.below(3 * MIB),
        _ => edges[random.below(edges.len() as u64) as usize],
    }
}

fn any_lie(random: &mut Random, size: u64) -> Lie {
    let mut lie = Lie::honest();
    for _ in 0..=random.below(2) {
        let at = random.below(size + 1);
        lie = match random.below(13) {
            0 | 1 => lie.flip_bit(at),
            2 | 3 => lie.truncate(at),
            4 => lie.reset_after(at),
            5 => lie.too_much(1 + random.below(100_000)),
            6 => lie.wrong_length(at),
            7 => lie.wrong_length(size + 1 + at),
            8 => lie.chunked(),
            9 => lie.ranges(RangeManner::Ignore),
            10 => lie.ranges(if random.below(2) == 0 { RangeManner::PartAs200 } else { RangeManner::Shift(1 + random.below(size + 1)) }),
            11 => lie.status([500, 404, 301, 204, 206, 304][random.below(6) as usize]),
            _ => {
                if random.below(2) == 0 {
                    lie.close_each_time()
                } else {
                    lie.close_unannounced()
                }
            }
        };
    }
    lie
}

/// The part of `blob` that a random range selects, with its header.
fn any_range(random: &mut Random, blob: &Blob) -> (String, Vec<u8>) {
    let first = random.below(blob.size);
    let last = first + random.below(blob.size - first);
    (format!("bytes={first}-{last}"), blob.bytes(first, last + 1))
}

async fn range_is_right(castier: &Castier, blob: &Blob, range: String, part: Vec<u8>) {
    let reply = Request::get(blob.path()).header("Range", range.clone()).send(castier.public).await;
    let whole = reply.complete && reply.status == 206;
    assert!(!whole || reply.body == part, "{range} of {} bytes: the wrong part", blob.size);
}

#[tokio::test]
async fn no_mixture_of_lies_passes_for_a_blob() {
    let _turn = light().await;
    let origin = LyingOrigin::start().await;
    let castier = Castier::start(&origin.url(), "origin.read_timeout = \"500ms\"\nlimits.negative_ttl = \"50ms\"").await;
    let mut random = Random::seeded();
    for round in 0..ROUNDS {
        let size = any_size(&mut random);
        let blob = origin.blob(size);
        let lies: Vec<Lie> = (0..=random.below(4)).map(|_| any_lie(&mut random, size)).collect();
        println!("round {round}: {size} bytes, {lies:?}");
        for lie in lies {
            origin.next(&blob, [lie]);
        }
        let whole = Download::default();
        let old = Request::get(blob.path()).http10();
        let (first, second, old) = tokio::join!(whole.of(&blob, castier.public), whole.of(&blob, castier.public), old.send(castier.public));
        first.assert_no_whole_lie(&blob);
        second.assert_no_whole_lie(&blob);
        let old_is_right = old.body.len() as u64 == size && blob.is_at(0, &old.body);
        assert!(old.status != 200 || !old.complete || old_is_right, "HTTP/1.0 got {} of {size} bytes and a clean end", old.body.len());
        if size > 0 {
            let (range, part) = any_range(&mut random, &blob);
            range_is_right(&castier, &blob, range, part).await;
        }
        assert_ledger(&castier).await;
    }
    let honest = origin.blob(MIB);
    get(castier.public, &honest).await.assert_is(&honest);
}

#[tokio::test]
async fn random_ranges_of_cold_and_warm_blobs() {
    let _turn = light().await;
    let origin = LyingOrigin::start().await;
    let castier = Castier::start(&origin.url(), "").await;
    let mut random = Random::seeded();
    for size in [1, 100, MIB + 5, 3 * MIB] {
        let warm = origin.blob(size);
        for _ in 0..10 {
            let cold = origin.blob(size);
            for blob in [&cold, &warm] {
                let (range, part) = any_range(&mut random, blob);
                let reply = Request::get(blob.path()).header("Range", range.clone()).send(castier.public).await;
                assert_eq!((reply.status, reply.complete), (206, true), "{range}");
                assert_eq!(reply.header("content-range"), Some(format!("{}/{size}", range.replace('=', " ")).as_str()));
                assert!(reply.body == part, "{range} of {size}: the wrong part");
            }
        }
        assert_eq!(origin.gets(&warm), 1, "a range fills the cache with the whole blob");
        assert!(origin.requests("GET", &warm)[0].range().is_none());
    }
    assert_ledger(&castier).await;
}
