//! What every [`Source`] and every [`Store`] must do. Each implementation runs [`source`] and [`store`] on itself in a test of its own.
//!
//! Every function panics with a text that names the rule that was broken.

#![expect(clippy::panic, clippy::expect_used, reason = "this is called by tests alone")]

use crate::{Answer, Ask, Fault, Key, Put, Source, Stat, Store, Upload};
use bytes::Bytes;
use castier_blob::Digest;
use futures::{FutureExt as _, StreamExt as _, channel::oneshot, future, future::Either, stream};

/// How many clients upload one blob at once.
const WRITERS: usize = 4;

/// A blob that has no two equal blocks, so that a block at a wrong offset shows.
fn blob(size: usize) -> Bytes {
    (0..size).map(|at| ((at * 31) >> 3 ^ (at >> 12) ^ size) as u8).collect()
}

/// Blobs of every size that means something: empty, one byte, around the block of 64 KiB, a megabyte, and more than a store takes in one request.
pub fn blobs() -> Vec<Bytes> {
    [0, 1, 65_535, 65_536, 65_537, 1 << 20, 17 << 20].map(blob).to_vec()
}

/// What a store did not do, and need not. No bytes are at risk by it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lacks {
    /// Of several uploads of one small blob at once, it told more than one that the blob was not there before. It cannot put on a condition.
    pub one_creator: bool,
    /// The same of a blob that needs more than one request.
    pub one_creator_of_many_parts: bool,
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

/// The rules for a store that is empty, and that deletes. Afterwards it is empty again.
pub async fn store(store: &dyn Store) -> Lacks {
    let blobs = blobs();
    for blob in &blobs {
        let digest = Digest::of(blob);
        assert_eq!(put(store, Some(digest), blob).await.expect("a blob can be stored by name"), Put::Created, "{}", blob.len());
        assert_eq!(put(store, Some(digest), blob).await.expect("a blob can be stored twice"), Put::Existed, "{}", blob.len());
        let held = store.holds(&digest, Some(blob.len() as u64)).await.expect("a store can be asked whether it holds a blob");
        assert_eq!(held, Some(blob.len() as u64), "an acknowledged blob is held");
    }
    source(store, &blobs).await;
    for size in [10, 1 << 20, 17 << 20] {
        refused(store, size).await;
        broken_off(store, size).await;
        dropped(store, size).await;
    }
    let unnamed = [Bytes::from_static(b"an upload that the store names"), blob((17 << 20) + 1)];
    for blob in &unnamed {
        put(store, None, blob).await.expect("a blob can be stored without a name");
        assert!(read(store, Digest::of(blob), 0).await.is_some_and(|(_, bytes)| bytes == *blob));
    }
    let lacks =
        Lacks { one_creator: !one_creator(store, 100_000).await, one_creator_of_many_parts: !one_creator(store, (17 << 20) + 2).await };
    for blob in blobs.iter().chain(&unnamed) {
        let digest = Digest::of(blob);
        assert!(store.delete(&digest).await.expect("a blob can be deleted"), "a blob that was there was deleted: {}", blob.len());
        assert!(!store.delete(&digest).await.expect("a blob can be deleted twice"), "a blob that was not there was not deleted");
        // The empty blob can be had without a store.
        if !blob.is_empty() {
            assert_eq!(store.holds(&digest, Some(1)).await.expect("a store can be asked whether it holds a blob"), None);
            assert!(matches!(open(store, digest, 0).await, Answer::Absent), "a deleted blob is absent");
        }
    }
    lacks
}

/// Bytes that are not what the upload names are refused, and leave nothing.
async fn refused(store: &dyn Store, size: usize) {
    let (claimed, sent) = (Digest::of(format!("claimed {size}").as_bytes()), blob(size + 30));
    let put = put(store, Some(claimed), &sent).await;
    assert!(matches!(put, Err(Fault::Mismatch(_))), "an upload of {size} other bytes is refused: {put:?}");
    nothing_of(store, &claimed, "an upload of other bytes").await;
    nothing_of(store, &Digest::of(&sent), "an upload of other bytes").await;
}

/// A client that leaves before its last byte leaves nothing.
async fn broken_off(store: &dyn Store, size: usize) {
    let blob = blob(size + 10);
    let digest = Digest::of(&blob);
    let body = pieces(&blob.slice(..size)).chain(stream::iter([Err(Fault::ClientGone("it left".into()))]));
    let put = async {
        let mut upload = Upload::new(Some(digest), Some(blob.len() as u64), body.boxed()).await?;
        store.put(&mut upload).await
    };
    let put = put.await;
    assert!(matches!(put, Err(Fault::ClientGone(_))), "an upload that breaks off fails with the client's fault: {put:?}");
    nothing_of(store, &digest, "an upload that breaks off").await;
}

/// An upload that is dropped in the middle leaves nothing.
async fn dropped(store: &dyn Store, size: usize) {
    let blob = blob(size + 20);
    let digest = Digest::of(&blob);
    let (tell, told) = oneshot::channel();
    let silence = stream::once(async move {
        let _ = tell.send(());
        future::pending().await
    });
    let body = pieces(&blob.slice(..size)).chain(silence);
    let put = async {
        let mut upload = Upload::new(Some(digest), None, body.boxed()).await?;
        store.put(&mut upload).await
    };
    // Until all that there is was taken. The end of the select drops the upload.
    if let Either::Left((put, _)) = future::select(put.boxed(), told).await {
        panic!("an upload ends after its last byte: {put:?}");
    }
    nothing_of(store, &digest, "an upload that is dropped").await;
}

async fn nothing_of(store: &dyn Store, digest: &Digest, what: &str) {
    assert!(matches!(open(store, *digest, 0).await, Answer::Absent), "{what} leaves nothing");
    assert_eq!(store.holds(digest, Some(1)).await.expect("a store can be asked whether it holds a blob"), None, "{what} leaves nothing");
}

/// Uploads of one blob at once all succeed, and the blob is whole. True: one of them was told that it was the first.
async fn one_creator(store: &dyn Store, size: usize) -> bool {
    let blob = blob(size);
    let digest = Digest::of(&blob);
    let puts = future::join_all((0..WRITERS).map(|_| put(store, Some(digest), &blob))).await;
    let created = puts.iter().map(|put| put.as_ref().unwrap_or_else(|fault| panic!("uploads of one blob at once succeed: {fault}")));
    let created = created.filter(|put| **put == Put::Created).count();
    assert!(created >= 1, "one of several uploads has stored the blob");
    assert!(read(store, digest, 0).await.is_some_and(|(_, bytes)| bytes == blob), "a blob that several uploaded is whole");
    assert!(store.delete(&digest).await.expect("a blob can be deleted"));
    assert!(matches!(open(store, digest, 0).await, Answer::Absent), "one deletion is enough");
    created == 1
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
    let mut upload = Upload::new(digest, Some(sent.len() as u64), pieces(sent).boxed()).await?;
    let put = store.put(&mut upload).await?;
    assert_eq!(upload.verified(), Some((Digest::of(sent), sent.len() as u64)), "an acknowledged upload has verified");
    Ok(put)
}

fn pieces(bytes: &Bytes) -> impl futures::Stream<Item = Result<Bytes, Fault>> + Send + 'static {
    let bytes = bytes.clone();
    stream::iter((0..bytes.len()).step_by(50_000)).map(move |at| Ok(bytes.slice(at..bytes.len().min(at + 50_000))))
}
