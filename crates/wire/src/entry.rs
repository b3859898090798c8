//! Names of entries. An entry is stored under a key and not under its digest, so it can change: the last PUT wins.
//!
//! ```text
//! /ac/<key>                a key of 64 lowercase hexadecimal characters, as Bazel and ccache write them
//! /<instance>/ac/<key>     the same; each instance has its own entries
//! /kv/<path>               any path
//! /kv/<path>/              a collection, as WebDAV clients see it: a path with entries below it
//! ```

use crate::split_instance;
use castier_blob::Digest;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};
use std::fmt;

/// The most characters of a decoded path below `/kv/`.
pub const MAX_PATH: usize = 512;

/// Characters that a link does not escape: the unreserved characters of RFC 3986 and the slash.
const KEPT: AsciiSet = NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~').remove(b'/');

/// The decoded and checked path of an entry or a collection. Two paths lead to the same entry if and only if their names are equal.
///
/// Invariant: it has no control characters, and no segment that is empty, `.` or `..`, except for the empty last segment of a collection.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Name(String);

/// The kind of a name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Entry {
    /// An entry of the action cache.
    Action(Name),
    /// An entry below `/kv/`.
    Value(Name),
    /// A collection below `/kv/`.
    Collection(Name),
}

/// Why a path below `/ac/` or `/kv/` is not a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// The key below `/ac/` is malformed.
    #[error("a key below /ac/ is 64 lowercase hexadecimal characters")]
    Key,
    /// The path is longer than [`MAX_PATH`].
    #[error("a path below /kv/ has at most 512 characters")]
    TooLong,
    /// A segment is empty, `.` or `..`.
    #[error("no part of a path below /kv/ may be empty, \".\" or \"..\"")]
    Segment,
    /// There is an encoded slash, `%2F`.
    #[error("a path below /kv/ may not hold an encoded slash")]
    Slash,
    /// There is a control character.
    #[error("a path below /kv/ may not hold control characters")]
    Control,
    /// There is a `%` without two hexadecimal digits, or the bytes are not UTF-8.
    #[error("a path below /kv/ is percent-encoded UTF-8")]
    Encoding,
}

impl Entry {
    /// Parses a path without its query. Returns `None` if the path is not below `/ac/` or `/kv/`.
    ///
    /// # Errors
    /// [`Malformed`] if the path is below `/ac/` or `/kv/`, and is not a name.
    pub fn of(path: &str) -> Option<Result<Self, Malformed>> {
        let below = |prefix: &str| path.strip_prefix(prefix).filter(|rest| rest.is_empty() || rest.starts_with('/'));
        if let Some(path) = below("/kv") {
            return Some(Self::value(path.strip_prefix('/').unwrap_or_default()));
        }
        let key = match below("/ac") {
            Some(key) => key.strip_prefix('/').unwrap_or_default(),
            None => split_instance(path)?.1.strip_prefix("/ac/")?,
        };
        // The key is valid, so the instance in front of it is short and plain too.
        Some(Digest::parse(key.as_bytes()).map(|_| Self::Action(Name(path.to_owned()))).map_err(|_| Malformed::Key))
    }

    fn value(path: &str) -> Result<Self, Malformed> {
        if path.is_empty() {
            return Ok(Self::Collection(Name::root()));
        }
        let (inner, is_collection) = path.strip_suffix('/').map_or((path, false), |inner| (inner, true));
        let mut name = "/kv".to_owned();
        for segment in inner.split('/') {
            name.push('/');
            name.push_str(&decode(segment)?);
        }
        // The limit does not include the prefix `/kv/`.
        if name.chars().count() > MAX_PATH + "/kv/".len() {
            return Err(Malformed::TooLong);
        }
        if is_collection {
            name.push('/');
        }
        Ok(if is_collection { Self::Collection(Name(name)) } else { Self::Value(Name(name)) })
    }
}

fn decode(segment: &str) -> Result<String, Malformed> {
    let mut rest = segment.split('%');
    rest.next();
    for escape in rest {
        match escape.as_bytes() {
            [b'2', b'F' | b'f', ..] => return Err(Malformed::Slash),
            [a, b, ..] if a.is_ascii_hexdigit() && b.is_ascii_hexdigit() => {}
            _ => return Err(Malformed::Encoding),
        }
    }
    let text = percent_decode_str(segment).decode_utf8().map_err(|_| Malformed::Encoding)?;
    if text.chars().any(char::is_control) {
        return Err(Malformed::Control);
    }
    match text.as_ref() {
        "" | "." | ".." => Err(Malformed::Segment),
        text => Ok(text.to_owned()),
    }
}

impl Name {
    /// The top collection, `/kv/`.
    pub fn root() -> Self {
        Self("/kv/".to_owned())
    }

    /// Parses the text of [`Self::as_str`].
    pub fn from_stored(text: &str) -> Option<Self> {
        match Entry::of(&Self(text.to_owned()).href())?.ok()? {
            Entry::Action(name) | Entry::Value(name) | Entry::Collection(name) => Some(name).filter(|name| name.0 == text),
        }
    }

    /// The path, decoded.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The path, encoded for a request or a link.
    pub fn href(&self) -> String {
        utf8_percent_encode(&self.0, &KEPT).to_string()
    }

    /// Whether it names a collection.
    pub fn is_collection(&self) -> bool {
        self.0.ends_with('/')
    }

    /// The same path as a collection.
    pub fn to_collection(&self) -> Self {
        if self.is_collection() { self.clone() } else { Self(format!("{}/", self.0)) }
    }

    /// The collection that this belongs to; `None` for the root, and for an action, since actions are never listed.
    pub fn parent(&self) -> Option<Self> {
        if !self.0.starts_with("/kv/") || self.0 == "/kv/" {
            return None;
        }
        let inner = self.0.strip_suffix('/').unwrap_or(&self.0);
        inner.rfind('/').and_then(|at| self.0.get(..=at)).map(|parent| Self(parent.to_owned()))
    }

    /// The last segment of the path.
    pub fn last(&self) -> &str {
        self.0.trim_end_matches('/').rsplit('/').next().unwrap_or_default()
    }

    /// The SHA-256 of the name, for file names of fixed length.
    pub fn hash(&self) -> Digest {
        Digest::of(self.0.as_bytes())
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn value(path: &str) -> Result<String, Malformed> {
        Entry::of(path).expect("stands where entries are").map(|entry| match entry {
            Entry::Action(name) => format!("action {name}"),
            Entry::Value(name) => format!("value {name}"),
            Entry::Collection(name) => format!("collection {name}"),
        })
    }

    #[test]
    fn names() {
        let key = Digest::of(b"x").to_string();
        for (path, expected) in [
            (format!("/ac/{key}"), Ok(format!("action /ac/{key}"))),
            (format!("/team-1/ac/{key}"), Ok(format!("action /team-1/ac/{key}"))),
            ("/ac".into(), Err(Malformed::Key)),
            ("/ac/".into(), Err(Malformed::Key)),
            ("/ac/nokey".into(), Err(Malformed::Key)),
            (format!("/ac/{}", key.to_uppercase()), Err(Malformed::Key)),
            (format!("/ac/{key}/"), Err(Malformed::Key)),
            (format!("/ac/ac/{key}"), Err(Malformed::Key)),
            ("/team/ac/x".into(), Err(Malformed::Key)),
            ("/kv".into(), Ok("collection /kv/".into())),
            ("/kv/".into(), Ok("collection /kv/".into())),
            ("/kv/a/b".into(), Ok("value /kv/a/b".into())),
            ("/kv/a/b/".into(), Ok("collection /kv/a/b/".into())),
            (format!("/kv/ac/{key}"), Ok(format!("value /kv/ac/{key}"))),
            (format!("/kv/cas/{key}"), Ok(format!("value /kv/cas/{key}"))),
            ("/kv/a%20b+c%25".into(), Ok("value /kv/a b+c%".into())),
            ("/kv/%C3%A4".into(), Ok("value /kv/ä".into())),
            ("/kv/a//b".into(), Err(Malformed::Segment)),
            ("/kv//".into(), Err(Malformed::Segment)),
            ("/kv//a".into(), Err(Malformed::Segment)),
            ("/kv/a//".into(), Err(Malformed::Segment)),
            ("/kv/../cas".into(), Err(Malformed::Segment)),
            ("/kv/%2e%2E".into(), Err(Malformed::Segment)),
            ("/kv/./a".into(), Err(Malformed::Segment)),
            ("/kv/a%2Fb".into(), Err(Malformed::Slash)),
            ("/kv/a%2f..".into(), Err(Malformed::Slash)),
            ("/kv/a%00".into(), Err(Malformed::Control)),
            ("/kv/a%0a".into(), Err(Malformed::Control)),
            ("/kv/a%C2%85".into(), Err(Malformed::Control)),
            ("/kv/a%".into(), Err(Malformed::Encoding)),
            ("/kv/a%2".into(), Err(Malformed::Encoding)),
            ("/kv/a%zz".into(), Err(Malformed::Encoding)),
            ("/kv/%ff".into(), Err(Malformed::Encoding)),
            (format!("/kv/{}", "a".repeat(MAX_PATH)), Ok(format!("value /kv/{}", "a".repeat(MAX_PATH)))),
            (format!("/kv/{}/", "a".repeat(MAX_PATH)), Ok(format!("collection /kv/{}/", "a".repeat(MAX_PATH)))),
            (format!("/kv/{}", "a".repeat(MAX_PATH + 1)), Err(Malformed::TooLong)),
            (format!("/kv/{}", "%C3%A4".repeat(MAX_PATH)), Ok(format!("value /kv/{}", "ä".repeat(MAX_PATH)))),
        ] {
            assert_eq!(value(&path), expected, "{path}");
        }
        for path in ["/", "/cas", "/kvx", "/acx", &format!("/a/b/ac/{key}"), &format!("/v2/ac/{key}"), "*"] {
            assert_eq!(Entry::of(path), None, "{path}");
        }
    }

    #[test]
    fn parents() {
        let name = |text: &str| Name(text.to_owned());
        for (child, parent) in [("/kv/a/b", "/kv/a/"), ("/kv/a/b/", "/kv/a/"), ("/kv/a", "/kv/"), ("/kv/a/", "/kv/")] {
            assert_eq!(name(child).parent(), Some(name(parent)));
        }
        assert_eq!((name("/kv/").parent(), name("/ac/00").parent()), (None, None));
        assert_eq!((name("/kv/a/b/").last(), name("/kv/a").last()), ("b", "a"));
    }

    proptest! {
        /// Parsing a link, and parsing the stored text, give the name back.
        #[test]
        fn links_lead_back(segments in prop::collection::vec("[^/\\p{Cc}]{1,40}", 1..6), collection: bool) {
            prop_assume!(segments.iter().all(|segment| segment != "." && segment != ".."));
            let name = Name(format!("/kv/{}{}", segments.join("/"), if collection { "/" } else { "" }));
            let read = match Entry::of(&name.href()) {
                Some(Ok(Entry::Value(read) | Entry::Collection(read))) => read,
                other => return Err(TestCaseError::fail(format!("{other:?}"))),
            };
            prop_assert_eq!(&read, &name);
            prop_assert_eq!(read.is_collection(), collection);
            prop_assert_eq!(Name::from_stored(name.as_str()), Some(name));
        }

        #[test]
        fn no_path_gets_out_or_panics(path in "(/kv|/ac|/x/ac)?[/.%2feE0aA-]{0,30}") {
            if let Some(Ok(Entry::Value(name) | Entry::Collection(name) | Entry::Action(name))) = Entry::of(&path) {
                prop_assert!(name.as_str().trim_end_matches('/').split('/').skip(1).all(|part| !matches!(part, "" | "." | "..")));
                let mut parent = name.parent();
                while let Some(next) = parent {
                    prop_assert!(next.is_collection() && name.as_str().starts_with(next.as_str()));
                    parent = next.parent();
                }
            }
        }
    }
}
