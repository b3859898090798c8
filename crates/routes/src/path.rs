//! The path of a request in one spelling.

use std::fmt;

/// The longest path that a route can match, in bytes. Registries and file systems refuse shorter ones.
const MAX: usize = 8 << 10;

/// A path in the spelling that templates see: unreserved characters (RFC 3986, section 2.3) are decoded, other escapes are in upper case. `%2F` stays
/// distinct from `/`. The request goes upstream as it came; this is for matching and for keys only.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Path(String);

/// Why a path can name no resource of a route.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadPath {
    /// It does not begin with a slash.
    #[error("the path does not begin with /")]
    Relative,
    /// A `%` without two hexadecimal digits.
    #[error("the path has a % without two hexadecimal digits")]
    Escape,
    /// A segment `..`, plain or escaped. Servers do not agree on what it means, so a key made of it could be that of another resource.
    #[error("the path has a segment ..")]
    Dots,
    /// A control character, a space, `#`, a backslash, or a character beyond ASCII, not escaped.
    #[error("the path has a character that must be escaped")]
    Character,
    /// Longer than 8 KiB.
    #[error("the path is longer than 8192 bytes")]
    TooLong,
}

impl Path {
    /// The canonical spelling of a path, without its query.
    ///
    /// # Errors
    /// [`BadPath`]: no route may match it.
    pub fn of(path: &str) -> Result<Self, BadPath> {
        if path.len() > MAX {
            return Err(BadPath::TooLong);
        }
        if !path.starts_with('/') {
            return Err(BadPath::Relative);
        }
        let mut canonical = String::with_capacity(path.len());
        let mut rest = path.as_bytes();
        while let [byte, after @ ..] = rest {
            rest = after;
            match byte {
                b'%' => {
                    let [high, low, after @ ..] = rest else { return Err(BadPath::Escape) };
                    rest = after;
                    let digit = |digit: &u8| char::from(*digit).to_digit(16).ok_or(BadPath::Escape);
                    let decoded = (digit(high)? * 16 + digit(low)?) as u8;
                    if is_unreserved(decoded) {
                        canonical.push(decoded.into());
                    } else {
                        canonical.extend(['%', char::from(high.to_ascii_uppercase()), char::from(low.to_ascii_uppercase())]);
                    }
                }
                // A fragment is no part of a target, and URLs read a backslash as a slash.
                b'#' | b'\\' => return Err(BadPath::Character),
                b'!'..=b'~' => canonical.push((*byte).into()),
                _ => return Err(BadPath::Character),
            }
        }
        // An escaped slash counts too: a server that decodes it would see the segment.
        if canonical.replace("%2F", "/").split('/').any(|segment| segment == "..") {
            return Err(BadPath::Dots);
        }
        // A segment `.` means nothing (RFC 3986, section 5.2.4). apt sends it for flat repositories.
        if canonical.contains("/.") {
            let ends_open = canonical.ends_with("/.");
            let segments: Vec<_> = canonical.split('/').filter(|segment| *segment != ".").collect();
            canonical = segments.join("/") + if ends_open { "/" } else { "" };
        }
        Ok(Self(canonical))
    }

    /// The spelling.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// What follows `prefix`, which is a whole number of segments: `/npm` of `/npm/left-pad`, not of `/npmx`. `None` if the path is not below it.
    pub fn below(&self, prefix: &str) -> Option<Self> {
        let rest = self.0.strip_prefix(prefix.trim_end_matches('/'))?;
        match rest.as_bytes().first() {
            None => Some(Self("/".into())),
            Some(b'/') => Some(Self(rest.into())),
            Some(_) => None,
        }
    }
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

const fn is_unreserved(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~')
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn one_spelling() {
        for (path, canonical) in [
            ("/", "/"),
            ("/a/b", "/a/b"),
            ("/%61/%7E%2d%5F%2E", "/a/~-_."),
            ("/@scope%2fname", "/@scope%2Fname"),
            ("/a%20b%c3%a4", "/a%20b%C3%A4"),
            ("//a//", "//a//"),
            ("/a.b/..c/d..", "/a.b/..c/d.."),
            ("/flat/./InRelease", "/flat/InRelease"),
            ("/%2e/./a/././b/.", "/a/b/"),
            ("/.", "/"),
            ("/sha256:ab+c=d&e,f;g'(h)*!", "/sha256:ab+c=d&e,f;g'(h)*!"),
        ] {
            assert_eq!(Path::of(path).unwrap().as_str(), canonical, "{path}");
        }
    }

    #[test]
    fn paths_that_name_nothing() {
        let long = format!("/{}", "a".repeat(MAX));
        for (path, why) in [
            ("", BadPath::Relative),
            ("a", BadPath::Relative),
            ("*", BadPath::Relative),
            ("/%", BadPath::Escape),
            ("/%4", BadPath::Escape),
            ("/%zz", BadPath::Escape),
            ("/%+1", BadPath::Escape),
            ("/a/../b", BadPath::Dots),
            ("/a/%2e%2E", BadPath::Dots),
            ("/a%2F..%2fb", BadPath::Dots),
            ("/a b", BadPath::Character),
            ("/ä", BadPath::Character),
            ("/a#b", BadPath::Character),
            ("/a\\..\\b", BadPath::Character),
            ("/a\u{7f}", BadPath::Character),
            (&long, BadPath::TooLong),
        ] {
            assert_eq!(Path::of(path), Err(why), "{path}");
        }
        assert!(Path::of(&long[1..].replacen('a', "/", 1)).is_ok());
    }

    #[test]
    fn below_a_prefix() {
        let below = |path, prefix| Path::of(path).unwrap().below(prefix).map(|path| path.0);
        for (path, prefix, rest) in [
            ("/npm/left-pad", "/npm", Some("/left-pad")),
            ("/npm/left-pad", "/npm/", Some("/left-pad")),
            ("/npm", "/npm", Some("/")),
            ("/npm/", "/npm", Some("/")),
            ("/npmx", "/npm", None),
            ("/a", "", Some("/a")),
            ("/a", "/", Some("/a")),
        ] {
            assert_eq!(below(path, prefix).as_deref(), rest, "{path} {prefix}");
        }
    }

    proptest! {
        #[test]
        fn canonical_paths_stay_as_they_are(path in "/[ -~ä]{0,40}") {
            if let Ok(canonical) = Path::of(&path) {
                prop_assert_eq!(Path::of(canonical.as_str()), Ok(canonical.clone()));
                prop_assert!(canonical.as_str().bytes().all(|byte| (b'!'..=b'~').contains(&byte)));
            }
        }

        #[test]
        fn every_spelling_of_a_path_is_the_same(path in "/[a-z/~_-]{0,20}", escaped in proptest::collection::vec(any::<bool>(), 21)) {
            let spelled: String = path.bytes().zip(escaped).map(|(byte, escape)| {
                if escape && byte != b'/' { format!("%{byte:02x}") } else { char::from(byte).to_string() }
            }).collect();
            prop_assert_eq!(Path::of(&spelled), Path::of(&path));
        }
    }
}
