//! Names of entries: what is stored under a key and not under its own digest, so that the last PUT wins.
//!
//! ```text
//! /ac/<key>                a key of 64 lowercase hexadecimal characters, as Bazel and ccache write them
//! /<instance>/ac/<key>     the same: each instance has entries of its own
//! /kv/<path>               any path
//! /kv/<path>/              a collection, as WebDAV clients see it: what has entries below it
//! ```

use crate::split_instance;
use castier_blob::Digest;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};
use std::fmt;

/// The most characters of a path below `/kv/`, decoded.
pub const MAX_PATH: usize = 512;

/// What stands in a link as it is: RFC 3986's unreserved characters and the separator.
const KEPT: AsciiSet = NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~').remove(b'/');

/// The decoded and checked path of an entry or a collection. Two paths name the same thing if and only if their names are equal.
///
/// Invariant: it holds no control characters, and, but for the last one of a collection, no segment that is empty, `.` or `..`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Name(String);

/// What a path names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Entry {
    /// An entry of the action cache.
    Action(Name),
    /// Any other entry.
    Value(Name),
    /// A collection of values.
    Collection(Name),
}

/// A path that is meant to name an entry and cannot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// Below `/ac/`.
    #[error("a key below /ac/ is 64 lowercase hexadecimal characters")]
    Key,
    /// Longer than [`MAX_PATH`].
    #[error("a path below /kv/ has at most 512 characters")]
    TooLong,
    /// `//`, `.` or `..`.
    #[error("no part of a path below /kv/ may be empty, \".\" or \"..\"")]
    Segment,
    /// `%2F`.
    #[error("a path below /kv/ may not hold an encoded slash")]
    Slash,
    /// NUL and its like.
    #[error("a path below /kv/ may not hold control characters")]
    Control,
    /// `%` and no two hexadecimal digits behind it, or bytes that are no UTF-8.
    #[error("a path below /kv/ is percent-encoded UTF-8")]
    Encoding,
}

impl Entry {
    /// Reads a path, without its query. None: it has nothing to do with entries.
    ///
    /// # Errors
    /// [`Malformed`] when it stands where entries are, and names none.
    pub fn of(path: &str) -> Option<Result<Self, Malformed>> {
        let below = |prefix: &str| path.strip_prefix(prefix).filter(|rest| rest.is_empty() || rest.starts_with('/'));
        if let Some(path) = below("/kv") {
            return Some(Self::value(path.strip_prefix('/').unwrap_or_default()));
        }
        let key = match below("/ac") {
            Some(key) => key.strip_prefix('/').unwrap_or_default(),
            None => split_instance(path)?.1.strip_prefix("/ac/")?,
        };
        // Only now is the path known to be short and made of plain characters.
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
        // The prefix and its slash are no part of the path that is limited.
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
    /// The collection that all others are in.
    pub fn root() -> Self {
        Self("/kv/".to_owned())
    }

    /// A name that was written down by [`Self::as_str`].
    pub fn from_stored(text: &str) -> Option<Self> {
        match Entry::of(&Self(text.to_owned()).href())?.ok()? {
            Entry::Action(name) | Entry::Value(name) | Entry::Collection(name) => Some(name).filter(|name| name.0 == text),
        }
    }

    /// The path, decoded.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The path as it stands in a request or a link.
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

    /// The collection that this is in. None of the root, and none of an action, whose neighbours nobody lists.
    pub fn parent(&self) -> Option<Self> {
        if !self.0.starts_with("/kv/") || self.0 == "/kv/" {
            return None;
        }
        let inner = self.0.strip_suffix('/').unwrap_or(&self.0);
        inner.rfind('/').and_then(|at| self.0.get(..=at)).map(|parent| Self(parent.to_owned()))
    }

    /// The last part of the path.
    pub fn last(&self) -> &str {
        self.0.trim_end_matches('/').rsplit('/').next().unwrap_or_default()
    }

    /// What stands for the name where names must be short and alike.
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
        /// A link leads back to what it was made of, and what is written down can be read again.
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
