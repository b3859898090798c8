//! What every [`Source`] and every [`Store`] must do. Each implementation runs [`source`] and [`store`] on itself in a test of its own.
//!
//! Every function panics with a text that names the rule that was broken.

#![expect(clippy::panic, clippy::expect_used, reason = "this is called by tests alone")]

use crate::{Answer, Ask, Fault, Key, Put, Source, Stat, Store, Upload};
use bytes::Bytes;
use castier_blob::Digest;
use futures::{StreamExt as _, stream};

/// Blobs of every size that means something: empty, one byte, around the block of 64 KiB, and more than any buffer.
pub fn blobs() -> Vec<Bytes> {
    let blob = |size: usize| (0..size).map(|at| ((at * 31) >> 3 ^ size) as u8).collect::<Bytes>();
    [0, 1, 65_535, 65_536, 65_537, 3_000_000].map(blob).to_vec()
}

/// The rules for a source that has these blobs and no others.
pub async fn source(source: &dyn Source, blobs: &[Bytes]) {
    let missing = Digest::of(b"castier: a blob that no source has");
    for blob in blobs {
        let digest = Digest::of(blob);
        let size = blob.len() as u64;
        let middle = size / 2;
        for from in [0, 1, middle, size.saturating_sub(1)].into_iter().filter(|from| *from == 0 || *from < size) {
            let (announced, bytes) = read(source, digest, from).await.unwrap_or_else(|| panic!("a blob of {size} bytes is not there"));
            assert!(
                announced.is_none_or(|announced| announced == size),
                "the size is that of the whole blob: {announced:?} of {size} from {from}"
            );
            assert!(bytes == blob.slice(from as usize..), "the bytes begin at the offset: {} of {size} from {from}", bytes.len());
        }
        // A transfer can be dropped at any point, and the next one is not affected.
        if let Answer::Bytes(mut incoming) = open(source, digest, 0).await {
            incoming.next().await.expect("the first bytes of a blob come");
        }
        assert!(
            read(source, digest, 0).await.is_some_and(|(_, bytes)| bytes == *blob),
            "a blob is there after a transfer of it was dropped"
        );
    }
    for from in [0, 10] {
        assert!(matches!(open(source, missing, from).await, Answer::Absent), "a blob that is not there is absent, from any offset");
    }
    let digests: Vec<_> = blobs.iter().map(|blob| Digest::of(blob)).chain([missing]).collect();
    let stats = source.stat(&digests).await.expect("a batch of blobs can be asked about");
    assert_eq!(stats.len(), digests.len(), "each blob of a batch has an answer");
    for (stat, blob) in stats.iter().zip(blobs) {
        let known = matches!(stat, Stat::Present(size) if size.is_none_or(|size| size == blob.len() as u64));
        assert!(known, "{stat:?} of a blob of {} bytes", blob.len());
    }
    assert_eq!(stats.last(), Some(&Stat::Absent), "a blob that is not there is absent in a batch");
    assert!(source.stat(&[]).await.expect("a batch may be empty").is_empty());
}

/// The rules for a store that is empty, and that deletes.
pub async fn store(store: &dyn Store) {
    let blobs = blobs();
    for blob in &blobs {
        let digest = Digest::of(blob);
        assert_eq!(put(store, Some(digest), blob).await.expect("a blob can be stored by name"), Put::Created);
        assert_eq!(put(store, Some(digest), blob).await.expect("a blob can be stored twice"), Put::Existed, "{}", blob.len());
        let held = store.holds(&digest, Some(blob.len() as u64)).await.expect("a store can be asked whether it holds a blob");
        assert_eq!(held, Some(blob.len() as u64), "an acknowledged blob is held");
    }
    source(store, &blobs).await;
    let large = &blobs[blobs.len() - 1];
    for (size, rule) in [(10, "a small"), (large.len(), "a large")] {
        let (claimed, sent) = (Digest::of(format!("claimed {size}").as_bytes()), large.slice(..size));
        let put = put(store, Some(claimed), &sent).await;
        assert!(matches!(put, Err(Fault::Mismatch(_))), "{rule} upload of other bytes is refused: {put:?}");
        assert!(matches!(open(store, claimed, 0).await, Answer::Absent), "{rule} upload of other bytes leaves nothing");
    }
    let broken = large.slice(..large.len() - 1);
    let digest = Digest::of(b"an upload that breaks off");
    let body = stream::iter([Ok(broken), Err(Fault::ClientGone("it left".into()))]).boxed();
    let mut upload = Upload::new(Some(digest), None, body).await.expect("the upload begins");
    assert!(matches!(store.put(&mut upload).await, Err(Fault::ClientGone(_))), "an upload that breaks off fails with the client's fault");
    assert!(matches!(open(store, digest, 0).await, Answer::Absent), "an upload that breaks off leaves nothing");
    let unnamed = Bytes::from_static(b"an upload that the store names");
    put(store, None, &unnamed).await.expect("a blob can be stored without a name");
    assert!(read(store, Digest::of(&unnamed), 0).await.is_some_and(|(_, bytes)| bytes == unnamed));
    for blob in &blobs[1..] {
        let digest = Digest::of(blob);
        assert!(store.delete(&digest).await.expect("a blob can be deleted"), "a blob that was there was deleted");
        assert!(!store.delete(&digest).await.expect("a blob can be deleted twice"), "a blob that was not there was not deleted");
        assert!(matches!(open(store, digest, 0).await, Answer::Absent), "a deleted blob is absent");
        assert_eq!(store.holds(&digest, Some(1)).await.expect("a store can be asked whether it holds a blob"), None);
    }
}

async fn open(source: &dyn Source, digest: Digest, from: u64) -> Answer {
    source
        .open(Ask { key: Key::Blob(digest), from })
        .await
        .unwrap_or_else(|fault| panic!("a blob could not be opened from {from}: {fault}"))
}

/// All bytes from an offset, and the size that was announced; none if the blob is absent.
async fn read(source: &dyn Source, digest: Digest, from: u64) -> Option<(Option<u64>, Bytes)> {
    let Answer::Bytes(mut incoming) = open(source, digest, from).await else { return None };
    let (size, mut bytes) = (incoming.size, Vec::new());
    while let Some(part) = incoming.next().await.unwrap_or_else(|fault| panic!("a transfer broke: {fault}")) {
        assert!(!part.is_empty(), "no piece is empty");
        bytes.extend_from_slice(&part);
    }
    Some((size, bytes.into()))
}

/// Stores bytes that come in pieces.
async fn put(store: &dyn Store, digest: Option<Digest>, sent: &Bytes) -> Result<Put, Fault> {
    let pieces: Vec<_> = (0..sent.len()).step_by(50_000).map(|at| Ok(sent.slice(at..sent.len().min(at + 50_000)))).collect();
    let mut upload = Upload::new(digest, Some(sent.len() as u64), stream::iter(pieces).boxed()).await?;
    let put = store.put(&mut upload).await?;
    assert_eq!(upload.verified(), Some((Digest::of(sent), sent.len() as u64)), "an acknowledged upload has verified");
    Ok(put)
}
