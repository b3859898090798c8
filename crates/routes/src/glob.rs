//! Patterns for the paths that a purge is for.

use crate::path::{BadPath, Path};
use regex::Regex;

/// A pattern for canonical paths, such as `/v2/library/**`.
///
/// | in the pattern | matches |
/// | --- | --- |
/// | `*` | any text within one segment, none too |
/// | `**` | any text over segments, none too |
/// | `/**/` | a slash, or a slash, segments and a slash |
/// | `?` | one character of a segment, or one escape such as `%20` |
///
/// The rest stands for itself, in any spelling: `%7E` is `~`. An asterisk of a path is written `%2A` in the pattern only if it is so in the path.
#[derive(Clone, Debug)]
pub struct Glob {
    text: String,
    regex: Regex,
}

/// Why a text is no pattern.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadGlob {
    /// It is no path.
    #[error(transparent)]
    Path(#[from] BadPath),
    /// It has too many wildcards.
    #[error("the pattern has too many wildcards")]
    TooLarge,
}

impl Glob {
    /// Parses a pattern.
    ///
    /// # Errors
    /// [`BadGlob`], which says why it is none.
    pub fn parse(text: &str) -> Result<Self, BadGlob> {
        let canonical = Path::of(text)?;
        let (mut pattern, mut rest) = (String::from("^"), canonical.as_str());
        while let Some(first) = rest.chars().next() {
            // Canonical paths are visible ASCII.
            let (taken, meaning) = match first {
                _ if rest.starts_with("/**/") => (3, "(?:/[!-~]*)?"),
                '*' if rest.starts_with("**") => (rest.len() - rest.trim_start_matches('*').len(), "[!-~]*"),
                '*' => (1, "[!-.0-~]*"),
                '?' => (1, "(?:%[0-9A-F]{2}|[!-$&-.0-~])"),
                _ => (0, ""),
            };
            if taken == 0 {
                pattern += &regex::escape(&rest[..first.len_utf8()]);
                rest = &rest[first.len_utf8()..];
            } else {
                pattern += meaning;
                rest = &rest[taken..];
            }
        }
        pattern.push('$');
        let regex = regex::RegexBuilder::new(&pattern).unicode(false).build().map_err(|_| BadGlob::TooLarge)?;
        Ok(Self { text: text.into(), regex })
    }

    /// The pattern as it was written.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// Whether the whole path matches. `path`: in its canonical spelling, see [`Path`]. The time is linear in its length.
    pub fn matches(&self, path: &str) -> bool {
        self.regex.is_match(path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn matches(glob: &str, path: &str) -> bool {
        Glob::parse(glob).unwrap().matches(Path::of(path).unwrap().as_str())
    }

    #[test]
    fn wildcards() {
        for (glob, path, expected) in [
            ("/a/*", "/a/b", true),
            ("/a/*", "/a/", true),
            ("/a/*", "/a/b/c", false),
            ("/a/*.deb", "/a/x%2Fy.deb", true),
            ("/a/**", "/a/b/c", true),
            ("/a/**", "/a/", true),
            ("/a/**", "/a", false),
            ("/a/**", "/ab", false),
            ("/a/**/c", "/a/c", true),
            ("/a/**/c", "/a/b/b/c", true),
            ("/a/**/c", "/a/bc", false),
            ("/a/**/**/c", "/a/c", true),
            ("/**", "/", true),
            ("/**", "/x/y", true),
            ("/**.deb", "/x/y.deb", true),
            ("/***", "/x/y", true),
            ("/a?c", "/abc", true),
            ("/a?c", "/a%20c", true),
            ("/a?c", "/a%7Ec", true),
            ("/a?c", "/a/c", false),
            ("/a?c", "/ac", false),
            ("/%7e*", "/~me", true),
            ("/a.c", "/abc", false),
            ("/a(b)[c]{d}+^$|", "/a(b)[c]{d}+^$|", true),
            ("/a", "/A", false),
            ("/a", "/a/b", false),
            ("/v2/library/**", "/v2/library/nginx/manifests/latest", true),
        ] {
            assert_eq!(matches(glob, path), expected, "{glob} {path}");
        }
    }

    #[test]
    fn what_is_no_pattern() {
        for (glob, why) in [("", BadPath::Relative), ("**", BadPath::Relative), ("/a b", BadPath::Character), ("/../*", BadPath::Dots)] {
            assert_eq!(Glob::parse(glob).unwrap_err(), BadGlob::Path(why), "{glob}");
        }
        assert!(matches!(Glob::parse(&format!("/{}", "a".repeat(9000))), Err(BadGlob::Path(BadPath::TooLong))));
    }

    /// A pattern that would cost an engine with backtracking for ever.
    #[test]
    fn no_path_takes_long() {
        let glob = Glob::parse(&format!("/{}y", "*x".repeat(200))).unwrap();
        assert!(!glob.matches(&format!("/{}", "x".repeat(8000))));
        let _ = Glob::parse(&format!("/{}", "?*".repeat(4000)));
    }

    proptest! {
        #[test]
        fn a_pattern_without_wildcards_is_a_path(path in "/[ -)+->@-~]{0,30}", other in "/[a-c/]{0,5}") {
            if let Ok(canonical) = Path::of(&path) {
                prop_assert!(matches(&path, canonical.as_str()));
                prop_assert!(matches("/**", canonical.as_str()));
                prop_assert_eq!(matches(&path, &other), other == canonical.as_str());
            }
        }

        #[test]
        fn no_text_panics(glob in "[/a*?%.{\\[(]{0,30}", path in "/[a-z/%0-9]{0,20}") {
            if let Ok(glob) = Glob::parse(&glob) {
                glob.matches(&path);
            }
        }
    }
}
