//! Checks that the store has all blobs that an entry of the action cache names.
//!
//! If a client uses an entry whose blobs are missing, its build fails. If it gets a 404 instead, it runs the action again. Only the needed parts
//! of the Remote Execution API's messages are declared. The field numbers are those of its protobuf files.

use crate::store::{Fault, Store};
use castier_blob::Digest;
use prost::Message as _;
use std::sync::Arc;

#[derive(Clone, PartialEq, Eq, prost::Message)]
struct ActionResult {
    #[prost(message, repeated, tag = "2")]
    output_files: Vec<File>,
    #[prost(message, repeated, tag = "3")]
    output_directories: Vec<OutputDirectory>,
    #[prost(message, optional, tag = "6")]
    stdout_digest: Option<Named>,
    #[prost(message, optional, tag = "8")]
    stderr_digest: Option<Named>,
}

/// An `OutputFile` or a `FileNode`. These fields have the same numbers in both.
#[derive(Clone, PartialEq, Eq, prost::Message)]
struct File {
    #[prost(message, optional, tag = "2")]
    digest: Option<Named>,
}

#[derive(Clone, PartialEq, Eq, prost::Message)]
struct OutputDirectory {
    #[prost(message, optional, tag = "3")]
    tree_digest: Option<Named>,
    #[prost(message, optional, tag = "5")]
    root_directory_digest: Option<Named>,
}

/// A blob that a tree digest names.
#[derive(Clone, PartialEq, Eq, prost::Message)]
struct Tree {
    #[prost(message, optional, tag = "1")]
    root: Option<Directory>,
    #[prost(message, repeated, tag = "2")]
    children: Vec<Directory>,
}

#[derive(Clone, PartialEq, Eq, prost::Message)]
struct Directory {
    #[prost(message, repeated, tag = "1")]
    files: Vec<File>,
}

/// A `Digest`.
#[derive(Clone, PartialEq, Eq, prost::Message)]
struct Named {
    #[prost(string, tag = "1")]
    hash: String,
    #[prost(int64, tag = "2")]
    size_bytes: i64,
}

/// Whether the store has all blobs that an entry names. An entry that is no `ActionResult`, such as one of ccache, names none. Does not look into
/// trees of more than `most` bytes. Blocks.
pub(crate) fn is_complete(entry: &[u8], store: &Arc<Store>, most: u64) -> Result<bool, Fault> {
    let Ok(result) = ActionResult::decode(entry) else { return Ok(true) };
    let files = result.output_files.into_iter().filter_map(|file| file.digest);
    let roots = result.output_directories.iter().filter_map(|directory| directory.root_directory_digest.clone());
    let named: Vec<_> = files.chain(roots).chain(result.stdout_digest).chain(result.stderr_digest).collect();
    let trees: Vec<_> = result.output_directories.into_iter().filter_map(|directory| directory.tree_digest).collect();
    // Other formats may happen to decode as protobuf. Then the digests are invalid.
    let Some((named, trees)) = read(&named).zip(read(&trees)) else { return Ok(true) };
    if !has_all(&named, store)? {
        return Ok(false);
    }
    for (digest, size) in trees {
        let Some(blob) = store.open_blob(&digest)?.filter(|blob| blob.size() == size) else { return Ok(false) };
        if size > most {
            continue;
        }
        let bytes = blob.read(0..size).next(usize::try_from(size).unwrap_or(usize::MAX))?;
        let Ok(tree) = Tree::decode(bytes) else { continue };
        let files = tree.root.into_iter().chain(tree.children).flat_map(|directory| directory.files);
        let named: Vec<_> = files.filter_map(|file| file.digest).collect();
        if let Some(named) = read(&named)
            && !has_all(&named, store)?
        {
            return Ok(false);
        }
    }
    Ok(true)
}

/// The digests with their sizes; `None` if one of them is no SHA-256.
fn read(named: &[Named]) -> Option<Vec<(Digest, u64)>> {
    named.iter().map(|named| Some((named.hash.parse().ok()?, u64::try_from(named.size_bytes).ok()?))).collect()
}

/// Whether the store has all these blobs, with these sizes.
fn has_all(blobs: &[(Digest, u64)], store: &Arc<Store>) -> Result<bool, Fault> {
    for (digest, size) in blobs {
        if *digest != Digest::EMPTY && store.open_blob(digest)?.is_none_or(|blob| blob.size() != *size) {
            return Ok(false);
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(bytes: &[u8]) -> Option<Named> {
        Some(Named { hash: Digest::of(bytes).to_string(), size_bytes: i64::try_from(bytes.len()).unwrap() })
    }

    fn file(bytes: &[u8]) -> File {
        File { digest: named(bytes) }
    }

    #[test]
    fn every_blob_that_is_named_must_be_here() {
        let dir = tempfile::tempdir().unwrap();
        let store = Arc::new(Store::open(dir.path(), "store.root").unwrap());
        let put = |bytes: &[u8]| {
            let mut upload = store.begin(None).unwrap();
            upload.write(&bytes::Bytes::copy_from_slice(bytes)).unwrap();
            upload.finish().unwrap();
        };
        let complete = |entry: &[u8]| is_complete(entry, &store, 1000).unwrap();
        let tree = |of: &[&[u8]]| Tree {
            root: Some(Directory { files: vec![file(of[0])] }),
            children: vec![Directory { files: of[1..].iter().map(|bytes| file(bytes)).collect() }],
        };
        let (sound, broken) = (tree(&[b"here", b""]).encode_to_vec(), tree(&[b"here", b"gone"]).encode_to_vec());
        put(b"here");
        put(&sound);
        put(&broken);
        let directory = |tree: &[u8]| OutputDirectory { tree_digest: named(tree), root_directory_digest: None };
        let with = |change: fn(&mut ActionResult, &[u8]), bytes: &[u8]| {
            let mut result = ActionResult { output_files: vec![file(b"here"), file(b"")], ..ActionResult::default() };
            change(&mut result, bytes);
            complete(&result.encode_to_vec())
        };
        let changes: [fn(&mut ActionResult, &[u8]); 4] = [
            |result, bytes| result.output_files.push(file(bytes)),
            |result, bytes| result.stdout_digest = named(bytes),
            |result, bytes| result.stderr_digest = named(bytes),
            |result, bytes| result.output_directories.push(OutputDirectory { tree_digest: None, root_directory_digest: named(bytes) }),
        ];
        for (i, change) in changes.into_iter().enumerate() {
            assert_eq!((with(change, b"here"), with(change, b"gone")), (true, false), "{i}");
        }
        for (tree, expected) in [(&sound[..], true), (&broken, false), (b"gone", false)] {
            let result = ActionResult { output_directories: vec![directory(tree)], ..ActionResult::default() };
            assert_eq!(complete(&result.encode_to_vec()), expected);
            // A tree too large to be read is taken on trust, but must be there.
            assert_eq!(is_complete(&result.encode_to_vec(), &store, 1).unwrap(), tree != b"gone");
        }
        // Another size is another blob.
        let other = Named { size_bytes: 5, ..named(b"here").unwrap() };
        assert!(!complete(&ActionResult { stdout_digest: Some(other), ..ActionResult::default() }.encode_to_vec()));
        // What is no ActionResult is let through.
        let odd = Named { hash: "sha1".into(), size_bytes: 5 };
        assert!(complete(&ActionResult { stdout_digest: Some(odd), ..ActionResult::default() }.encode_to_vec()));
        for bytes in [&b""[..], b"\xcc\xac\x01\x00\x01", b"any text at all"] {
            assert!(complete(bytes), "{bytes:?}");
        }
    }
}
