//! A full tier keeps blobs of any size that are requested again, and not blobs that are requested once.

use crate::support::{Blob, Cache, Castier, KIB, LyingOrigin, MIB, assert_ledger, get, light};

/// A tier of 32 MiB is full of small blobs with two gets each. Then a large blob is requested 30 times in a row.
async fn a_large_blob_in_a_row(config: &str, hit: &str) {
    let _turn = light().await;
    let origin = LyingOrigin::start().await;
    let castier = Castier::start(&origin.url(), config).await;
    let small: Vec<_> = (0..450).map(|_| origin.blob(100 * KIB)).collect();
    for blob in &small {
        for _ in 0..2 {
            get(castier.public, blob).await.assert_is(blob);
        }
    }
    for size in [200 * KIB, 2 * MIB, 7 * MIB] {
        let large: Blob = origin.blob(size);
        let mut hits = 0;
        for _ in 0..30 {
            let reply = get(castier.public, &large).await;
            reply.assert_is(&large);
            // A flight sends its last byte a moment before it leaves the map. A request in that moment joins it.
            hits += usize::from(reply.cache_status() == hit || reply.cache_status().contains("collapsed"));
        }
        let loads = origin.gets(&large);
        assert!(loads <= 3 && hits == 30 - loads, "{loads} loads and {hits} hits of 30 gets of {size} bytes");
    }
    let books = assert_ledger(&castier).await;
    assert!(books.total("castier_tier_evictions_total") > 50, "the tier was full");
}

#[tokio::test]
async fn a_large_blob_in_a_row_in_memory() {
    a_large_blob_in_a_row("memory.capacity = \"32MiB\"", "castier; hit; detail=memory").await;
}

#[tokio::test]
async fn a_large_blob_in_a_row_on_disk() {
    let cache = Cache::new();
    a_large_blob_in_a_row(&cache.config("32MiB", ""), "castier; hit; detail=disk").await;
    assert_eq!(cache.count("tmp"), 0);
}

#[tokio::test]
async fn a_pass_over_cold_blobs_leaves_what_is_hot() {
    let _turn = light().await;
    let origin = LyingOrigin::start().await;
    let castier = Castier::start(&origin.url(), "memory.capacity = \"16MiB\"\nmemory.max_blob = \"1MiB\"").await;
    let hot: Vec<_> = (0..80).map(|_| origin.blob(100 * KIB)).collect();
    for blob in hot.iter().chain(&hot).chain(&hot) {
        get(castier.public, blob).await.assert_is(blob);
    }
    for _ in 0..500 {
        let cold = origin.blob(100 * KIB);
        get(castier.public, &cold).await.assert_is(&cold);
        origin.forget(&cold);
    }
    for blob in &hot {
        get(castier.public, blob).await.assert_is(blob);
    }
    let again = hot.iter().filter(|blob| origin.gets(blob) > 1).count();
    assert!(again <= 8, "{again} of {} hot blobs were loaded again", hot.len());
}
