//! Paths of blobs, with and without an instance in front, and the answer to a POST.

use castier_blob::Digest;
use serde::{Deserialize, Serialize};

/// The path of the blobs: `GET /cas/<digest>`. `POST /cas` stores a blob and returns its digest.
pub const CAS: &str = "/cas";

/// The path of one blob.
pub fn blob_path(digest: &Digest) -> String {
    format!("{CAS}/{digest}")
}

/// First segments of a path that are not instances, since they have another meaning. `v2` belongs to the registry protocol.
const NO_INSTANCE: [&str; 4] = ["ac", "cas", "kv", "v2"];
/// The longest name of an instance.
const MAX_INSTANCE: usize = 128;

/// Splits a path into its instance and the rest: `/team/cas/x` gives `team` and `/cas/x`. Returns `None` if there is no instance. An
/// instance is one segment of unreserved characters (RFC 3986), so that it has only one spelling.
pub fn split_instance(path: &str) -> Option<(&str, &str)> {
    let path = path.strip_prefix('/')?;
    let (instance, rest) = path.split_at(path.find('/')?);
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_' | b'~');
    let sound = (1..=MAX_INSTANCE).contains(&instance.len()) && instance.bytes().all(plain) && !matches!(instance, "." | "..");
    (sound && !NO_INSTANCE.contains(&instance)).then_some((instance, rest))
}

/// The resource that a request path names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target<'a> {
    /// `/cas/<digest>`, or `/<instance>/cas/<digest>`: all instances share the blobs.
    Blob(Digest),
    /// `/cas`: the collection that POST adds to.
    Collection,
    /// Below `/cas/`, but not a digest.
    Malformed(&'a str),
    /// Any other path.
    Other,
}

impl<'a> Target<'a> {
    /// Parses a path without its query.
    pub fn of(path: &'a str) -> Self {
        match path.strip_prefix(CAS) {
            Some("") => Self::Collection,
            Some(rest) => match rest.strip_prefix('/') {
                Some(name) => Digest::parse(name.as_bytes()).map_or(Self::Malformed(name), Self::Blob),
                None => Self::Other,
            },
            None => Self::of_instance(path).map_or(Self::Other, Self::Blob),
        }
    }

    /// A blob below an instance. A similar path without a valid digest is not malformed: it may belong to the origin.
    fn of_instance(path: &str) -> Option<Digest> {
        // The cheap check first: few other paths have this length.
        let at = path.len().checked_sub(CAS.len() + 1 + Digest::TEXT_LEN)?;
        let name = path.get(at..)?.strip_prefix(CAS)?.strip_prefix('/')?;
        let (instance, _) = split_instance(path)?;
        (instance.len() + 1 == at).then(|| Digest::parse(name.as_bytes()).ok())?
    }
}

/// The body of the answer to a POST.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stored {
    /// The blob's digest, as text.
    pub digest: String,
    /// Its length in bytes.
    pub size: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets() {
        let digest = Digest::of(b"x");
        let path = blob_path(&digest);
        assert_eq!(Target::of(&path), Target::Blob(digest));
        assert_eq!(Target::of("/cas"), Target::Collection);
        assert_eq!(Target::of("/cas/"), Target::Malformed(""));
        assert_eq!(Target::of("/cas/abc"), Target::Malformed("abc"));
        assert_eq!(Target::of(&path.to_uppercase()), Target::Other);
        assert_eq!(Target::of(&format!("{path}/x")), Target::Malformed(&format!("{digest}/x")));
        assert_eq!(Target::of("/casual"), Target::Other);
        assert_eq!(Target::of("/"), Target::Other);
        assert_eq!(Target::of("*"), Target::Other);
    }

    #[test]
    fn instances_share_the_blobs() {
        let digest = Digest::of(b"x");
        for instance in ["team", "a", "v2.1", "A-b_c~d", &"i".repeat(128)] {
            assert_eq!(Target::of(&format!("/{instance}/cas/{digest}")), Target::Blob(digest), "{instance}");
        }
        for path in [
            format!("/v2/cas/{digest}"),
            format!("/kv/cas/{digest}"),
            format!("/ac/cas/{digest}"),
            format!("//cas/{digest}"),
            format!("/./cas/{digest}"),
            format!("/../cas/{digest}"),
            format!("/a/b/cas/{digest}"),
            format!("/a%20b/cas/{digest}"),
            format!("/team/cas/{digest}/"),
            format!("/team/cas/{digest}x"),
            format!("/team/cas/x{digest}"),
            format!("/team/casx/{digest}"),
            format!("/{}/cas/{digest}", "i".repeat(129)),
            "/team/cas/abc".to_owned(),
            "/team/cas".to_owned(),
        ] {
            assert_eq!(Target::of(&path), Target::Other, "{path}");
        }
        assert_eq!(Target::of(&format!("/cas/cas/{digest}")), Target::Malformed(&format!("cas/{digest}")));
    }
}
