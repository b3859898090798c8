//! Names: of blobs, of entries, of objects in a bucket, of nodes.

use crate::{first_line, text};
use castier_blob::Digest;
use castier_config::{KeyTemplate, Peer};
use castier_wire::{
    Target, blob_path,
    entry::{Entry, MAX_PATH, Name},
    split_instance,
};

/// A digest has one spelling.
pub(crate) fn digest(bytes: &[u8]) {
    if let Ok(digest) = Digest::parse(bytes) {
        assert_eq!(digest.to_string().as_bytes(), bytes);
        assert_eq!(digest.etag().as_bytes(), [b"\"", bytes, b"\""].concat());
        assert_eq!(Digest::from_bytes(*digest.as_bytes()), digest);
    }
}

/// The path of a request: a blob, with or without an instance.
pub(crate) fn path(bytes: &[u8]) {
    let Some(path) = text(bytes) else { return };
    match Target::of(path) {
        Target::Blob(digest) => assert!(path.ends_with(&blob_path(&digest))),
        Target::Malformed(name) => assert!(path.ends_with(name) && Digest::parse(name.as_bytes()).is_err()),
        Target::Collection => assert_eq!(path, "/cas"),
        Target::Other => {}
    }
    if let Some((instance, rest)) = split_instance(path) {
        assert_eq!(format!("/{instance}{rest}"), path);
        assert!(rest.starts_with('/') && instance != ".." && instance != "." && !instance.contains('%'));
    }
}

/// The path of an entry. Its name leads back to it, and to nothing outside.
pub(crate) fn entry(bytes: &[u8]) {
    let Some(Some(Ok(entry))) = text(bytes).map(Entry::of) else { return };
    let (Entry::Action(name) | Entry::Value(name) | Entry::Collection(name)) = &entry;
    let stored = name.as_str();
    assert!(!stored.chars().any(char::is_control));
    assert!(stored.chars().count() <= MAX_PATH + "/kv//".len() || matches!(entry, Entry::Action(_)));
    let inner = stored.strip_suffix('/').unwrap_or(stored);
    assert!(inner[1..].split('/').all(|segment| !matches!(segment, "" | "." | "..")));
    assert_eq!(matches!(entry, Entry::Collection(_)), name.is_collection());
    assert_eq!(Entry::of(&name.href()), Some(Ok(entry.clone())), "its own link leads to it");
    assert_eq!(Name::from_stored(stored).as_ref(), Some(name));
    if let Some(parent) = name.parent() {
        assert!(parent.is_collection() && stored.starts_with(parent.as_str()) && stored.len() > parent.as_str().len());
        assert_eq!(Name::from_stored(parent.as_str()), Some(parent));
    }
}

/// The key of an object in a bucket, in the list that the store gives; before it, on a line, the template of keys. A blob has one key.
pub(crate) fn object_key(bytes: &[u8]) {
    let (template, key) = first_line(bytes);
    let Some((template, key)) = text(template).zip(text(key)) else { return };
    let template: KeyTemplate = template.parse().unwrap_or_default();
    if let Some(digest) = template.digest(key) {
        assert!(Digest::parse(digest.as_bytes()).is_ok());
        assert_eq!(template.key(&digest), key);
        assert!(key.starts_with(template.literal_prefix()));
    }
}

/// The target of an SRV record, as the name of a node.
pub(crate) fn peer_name(bytes: &[u8]) {
    let Some(Ok(peer)) = text(bytes).map(str::parse::<Peer>) else { return };
    assert!(peer.port > 0 && peer.weight > 0 && !peer.host.is_empty());
    let again: Peer = peer.name().parse().expect("it understands its own names");
    assert_eq!((again.name(), again.port), (peer.name(), peer.port));
}
