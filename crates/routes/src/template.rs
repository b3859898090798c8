//! Path templates, and upstream URLs with their variables.

use crate::{
    nix32,
    path::{BadPath, Path},
};
use castier_blob::Digest;
use regex::Regex;
use regex_automata::{
    Anchored, Input,
    dfa::{Automaton, StartKind, dense},
    util::{primitives::StateID, syntax},
};
use std::{
    collections::{HashMap, HashSet, VecDeque},
    fmt::Write as _,
};

/// A pattern for paths, such as `/v2/{name*}/blobs/sha256:{sha256}`.
///
/// | variable | matches |
/// | --- | --- |
/// | `{name}` | one segment or a part of it, at least one character |
/// | `{name*}` | one or more segments or parts of them |
/// | `{sha256}` | 64 lowercase hexadecimal characters: the SHA-256 of the body |
/// | `{nix32}` | a SHA-256 in Nix's base 32 |
/// | `{sha1}` | 40 lowercase hexadecimal characters: a git commit |
///
/// A name consists of lowercase letters, digits and `_`. If a path can be split in several ways, the first variable takes as much as it can.
#[derive(Clone, Debug)]
pub struct Template {
    text: String,
    /// Anchored at both ends.
    pattern: String,
    regex: Regex,
    names: Vec<String>,
}

/// Why a text is no template.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadTemplate {
    /// A brace without its partner, or one within another.
    #[error("a brace is not closed; write a variable as {{name}} or {{name*}}")]
    Brace,
    /// A name that is none.
    #[error("{{{0}}} is no variable; a name consists of a-z, 0-9 and _")]
    Name(String),
    /// A name that occurs twice.
    #[error("{{{0}}} occurs twice")]
    Twice(String),
    /// Two variables with nothing between them.
    #[error("nothing separates {{{0}}} from the variable before it")]
    Adjacent(String),
    /// A name that the path template does not have.
    #[error("{{{0}}} is no variable of the path")]
    Unknown(String),
    /// The text between the variables is no path.
    #[error(transparent)]
    Path(#[from] BadPath),
    /// It makes a pattern that is too large.
    #[error("the template is too long")]
    TooLarge,
}

/// The values of a template's variables in one path.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Captures(HashMap<String, String>);

impl Captures {
    /// The value of a variable, spelled as in the canonical path.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
    }

    /// The SHA-256 that the path names, by `{sha256}` or `{nix32}`.
    pub fn digest(&self) -> Option<Digest> {
        let hex = self.get("sha256").and_then(|text| Digest::parse(text.as_bytes()).ok());
        hex.or_else(|| nix32::decode(self.get("nix32")?))
    }
}

/// A piece of a template.
#[derive(Debug, PartialEq, Eq)]
enum Piece<'a> {
    Text(&'a str),
    /// Its name, and whether it matches slashes.
    Variable(&'a str, Reach),
}

/// How far a variable reaches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reach {
    Segment,
    Segments,
}

/// Cuts a template into its pieces.
fn pieces(text: &str) -> Result<Vec<Piece<'_>>, BadTemplate> {
    let (mut pieces, mut rest) = (Vec::new(), text);
    while let Some((before, after)) = rest.split_once('{') {
        let (name, after) = after.split_once('}').ok_or(BadTemplate::Brace)?;
        if before.contains('}') || name.contains('{') {
            return Err(BadTemplate::Brace);
        }
        let (name, reach) = name.strip_suffix('*').map_or((name, Reach::Segment), |name| (name, Reach::Segments));
        let is_name = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_';
        if name.is_empty() || !name.bytes().all(is_name) || (is_typed(name) && reach == Reach::Segments) {
            return Err(BadTemplate::Name(name.into()));
        }
        if !before.is_empty() {
            pieces.push(Piece::Text(before));
        }
        pieces.push(Piece::Variable(name, reach));
        rest = after;
    }
    if rest.contains('}') {
        return Err(BadTemplate::Brace);
    }
    if !rest.is_empty() {
        pieces.push(Piece::Text(rest));
    }
    Ok(pieces)
}

/// Whether the variable has a fixed form.
fn is_typed(name: &str) -> bool {
    matches!(name, "sha256" | "sha1" | "nix32")
}

impl Template {
    /// Parses a template.
    ///
    /// # Errors
    /// [`BadTemplate`], which says what would be right.
    pub fn parse(text: &str) -> Result<Self, BadTemplate> {
        let (mut pattern, mut names): (String, Vec<String>) = ("^".into(), Vec::new());
        let pieces = pieces(text)?;
        let without: String = pieces.iter().map(|piece| if let Piece::Text(text) = piece { *text } else { "x" }).collect();
        Path::of(&without)?;
        let mut after_variable = false;
        for piece in pieces {
            match piece {
                Piece::Text(text) => {
                    // Between two letters, so that a text that ends within a segment is no segment of dots.
                    let spelled = Path::of(&format!("/x{text}x"))?;
                    pattern +=
                        &regex::escape(spelled.as_str().strip_prefix("/x").unwrap_or_default().strip_suffix('x').unwrap_or_default());
                    after_variable = false;
                }
                Piece::Variable(name, _) if names.iter().any(|known| known == name) => return Err(BadTemplate::Twice(name.into())),
                Piece::Variable(name, _) if after_variable => return Err(BadTemplate::Adjacent(name.into())),
                Piece::Variable(name, reach) => {
                    let form = match (name, reach) {
                        ("sha256", _) => "[0-9a-f]{64}".to_owned(),
                        ("sha1", _) => "[0-9a-f]{40}".to_owned(),
                        ("nix32", _) => format!("[{}]{{{}}}", nix32::ALPHABET, nix32::LENGTH),
                        // Canonical paths are visible ASCII: this is all of it without the slash.
                        (_, Reach::Segment) => "[!-.0-~]+".to_owned(),
                        (_, Reach::Segments) => "[!-~]+".to_owned(),
                    };
                    // Writing to a string cannot fail.
                    let _ = write!(pattern, "(?P<{}>{form})", group(name));
                    names.push(name.into());
                    after_variable = true;
                }
            }
        }
        pattern.push('$');
        let regex = regex::RegexBuilder::new(&pattern).unicode(false).build().map_err(|_| BadTemplate::TooLarge)?;
        Ok(Self { text: text.into(), pattern, regex, names })
    }

    /// The template as it was written.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// The template below a prefix.
    ///
    /// # Errors
    /// [`BadTemplate`]: the prefix is no path.
    pub fn under(&self, prefix: &str) -> Result<Self, BadTemplate> {
        Self::parse(&format!("{prefix}{}", self.text))
    }

    /// Whether it has this variable.
    pub fn has(&self, name: &str) -> bool {
        self.names.iter().any(|known| known == name)
    }

    /// The values of the variables, if the whole path matches.
    pub fn matches(&self, path: &Path) -> Option<Captures> {
        let found = self.regex.captures(path.as_str())?;
        let value = |name: &String| Some((name.clone(), found.name(&group(name))?.as_str().to_owned()));
        Some(Captures(self.names.iter().filter_map(value).collect()))
    }

    /// The template as an automaton, to compare it with others. `None` if that would be too large.
    pub(crate) fn automaton(&self) -> Option<PathAutomaton> {
        let config = dense::Config::new().start_kind(StartKind::Anchored);
        let syntax = syntax::Config::new().unicode(false).utf8(false);
        dense::Builder::new().configure(config).syntax(syntax).build(&self.pattern).ok().map(PathAutomaton)
    }
}

/// The paths that a template matches, as a finite automaton.
pub(crate) struct PathAutomaton(dense::DFA<Vec<u32>>);

impl PathAutomaton {
    /// A path that both match; `None` if there is none.
    ///
    /// Breadth-first search over the product of both automata, so the path is one of the shortest.
    pub(crate) fn overlap(&self, other: &Self) -> Option<String> {
        let (left, right) = (&self.0, &other.0);
        let start = |automaton: &dense::DFA<Vec<u32>>| automaton.start_state_forward(&Input::new("").anchored(Anchored::Yes)).ok();
        let first = (start(left)?, start(right)?);
        // How each pair was reached: from which pair, by which byte.
        let mut reached: HashMap<Pair, Option<(Pair, u8)>> = HashMap::from([(first, None)]);
        let mut queue = VecDeque::from([first]);
        while let Some(pair) = queue.pop_front() {
            if left.is_match_state(left.next_eoi_state(pair.0)) && right.is_match_state(right.next_eoi_state(pair.1)) {
                let (mut path, mut at) = (Vec::new(), pair);
                while let Some(Some((before, byte))) = reached.get(&at) {
                    path.push(*byte);
                    at = *before;
                }
                path.reverse();
                return String::from_utf8(path).ok();
            }
            // Bytes that neither automaton tells apart lead to the same pair.
            let mut seen = HashSet::new();
            for byte in example_bytes() {
                if seen.insert((left.byte_classes().get(byte), right.byte_classes().get(byte))) {
                    let next = (left.next_state(pair.0, byte), right.next_state(pair.1, byte));
                    if !left.is_dead_state(next.0) && !right.is_dead_state(next.1) && !reached.contains_key(&next) {
                        reached.insert(next, Some((pair, byte)));
                        queue.push_back(next);
                    }
                }
            }
        }
        None
    }
}

/// A state of each of two automata.
type Pair = (StateID, StateID);

/// The bytes that canonical paths consist of, those first that a person can read best.
fn example_bytes() -> impl Iterator<Item = u8> {
    let first = b"/abcdefghijklmnopqrstuvwxyz0123456789";
    first.iter().copied().chain((b'!'..=b'~').filter(|byte| !first.contains(byte)))
}

/// The name of a variable's group. A group may not begin with a digit.
fn group(name: &str) -> String {
    format!("v_{name}")
}

/// An upstream URL with variables of a path template: `https://static.example/crates/{crate}/{version}/download`.
#[derive(Clone, Debug)]
pub struct Expansion {
    text: String,
}

impl Expansion {
    /// Parses an expansion. Its variables must be those of `path`.
    ///
    /// # Errors
    /// [`BadTemplate`], which says what would be right.
    pub fn parse(text: &str, path: &Template) -> Result<Self, BadTemplate> {
        for piece in pieces(text)? {
            if let Piece::Variable(name, _) = piece
                && !path.has(name)
            {
                return Err(BadTemplate::Unknown(name.into()));
            }
        }
        Ok(Self { text: text.into() })
    }

    /// The text with the values in place of the variables. A variable that `captures` does not have is left out.
    pub fn expand(&self, captures: &Captures) -> String {
        let pieces = pieces(&self.text).unwrap_or_default();
        let values = pieces.into_iter().map(|piece| match piece {
            Piece::Text(text) => text,
            Piece::Variable(name, _) => captures.get(name).unwrap_or_default(),
        });
        values.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn captured(template: &str, path: &str) -> Option<Vec<(String, String)>> {
        let captures = Template::parse(template).unwrap().matches(&Path::of(path).unwrap())?;
        let mut values: Vec<_> = captures.0.into_iter().collect();
        values.sort();
        Some(values)
    }

    #[test]
    fn variables() {
        let sha256 = "a".repeat(64);
        let blob = "/v2/{name*}/blobs/sha256:{sha256}";
        let path = format!("/v2/library/nginx/blobs/sha256:{sha256}");
        assert_eq!(captured(blob, &path), Some(vec![("name".into(), "library/nginx".into()), ("sha256".into(), sha256.clone())]));
        // The first takes as much as it can.
        let twice = captured("/{a*}/x/{b*}", "/1/x/2/x/3");
        assert_eq!(twice, Some(vec![("a".into(), "1/x/2".into()), ("b".into(), "3".into())]));
        for (template, path) in [
            (blob, "/v2/nginx/blobs/sha256:abc".to_owned()),
            (blob, path.to_uppercase()),
            (blob, format!("{path}/")),
            (blob, format!("/v2/blobs/sha256:{sha256}")),
            ("/{a}", "/".to_owned()),
            ("/{a}", "/x/y".to_owned()),
            ("/{a*}", "/".to_owned()),
            ("/a.b", "/axb".to_owned()),
            ("/a", "/A".to_owned()),
        ] {
            assert_eq!(captured(template, &path), None, "{template} {path}");
        }
        assert_eq!(captured("/{a}", "/@s%2Fn"), Some(vec![("a".into(), "@s%2Fn".into())]), "an escaped slash is no slash");
        assert_eq!(captured("/%7Ex/{a*}", "/~x/b%2fc/d"), Some(vec![("a".into(), "b%2Fc/d".into())]));
        assert_eq!(captured("/plain", "/plain"), Some(Vec::new()));
    }

    #[test]
    fn the_digest_of_a_path() {
        let digest = |template, path: &str| Template::parse(template).unwrap().matches(&Path::of(path).unwrap()).unwrap().digest();
        assert_eq!(digest("/x/{sha256}", &format!("/x/{}", Digest::EMPTY)), Some(Digest::EMPTY));
        let nix = "/nar/0mdqa9w1p6cmli6976v4wi0sw9r4p5prkj7lzfd1877wk11c9c73.nar.xz";
        assert_eq!(digest("/nar/{nix32}.nar.{coding}", nix), Some(Digest::EMPTY));
        assert_eq!(digest("/x/{name}", &format!("/x/{}", Digest::EMPTY)), None);
    }

    #[test]
    fn what_is_no_template() {
        for (text, why) in [
            ("/{", BadTemplate::Brace),
            ("/{a", BadTemplate::Brace),
            ("/a}", BadTemplate::Brace),
            ("/{a{b}}", BadTemplate::Brace),
            ("/}{a}", BadTemplate::Brace),
            ("/{}", BadTemplate::Name(String::new())),
            ("/{*}", BadTemplate::Name(String::new())),
            ("/{A}", BadTemplate::Name("A".into())),
            ("/{a-b}", BadTemplate::Name("a-b".into())),
            ("/{sha256*}", BadTemplate::Name("sha256".into())),
            ("/{a}/{a*}", BadTemplate::Twice("a".into())),
            ("/{a}{b}", BadTemplate::Adjacent("b".into())),
            ("", BadTemplate::Path(BadPath::Relative)),
            ("v2", BadTemplate::Path(BadPath::Relative)),
            ("{a}", BadTemplate::Path(BadPath::Relative)),
            ("/../{a}", BadTemplate::Path(BadPath::Dots)),
            ("/a b", BadTemplate::Path(BadPath::Character)),
        ] {
            assert_eq!(Template::parse(text).unwrap_err(), why, "{text}");
        }
        let path = Template::parse("/{a}").unwrap();
        assert_eq!(Expansion::parse("https://h/{b}", &path).unwrap_err(), BadTemplate::Unknown("b".into()));
    }

    #[test]
    fn templates_that_can_match_the_same_path() {
        let overlap = |a: &str, b: &str| {
            let (a, b) = (Template::parse(a).unwrap(), Template::parse(b).unwrap());
            let (left, right) = (a.automaton().unwrap(), b.automaton().unwrap());
            let found = left.overlap(&right);
            assert_eq!(found.is_some(), right.overlap(&left).is_some());
            if let Some(path) = &found {
                let path = Path::of(path).unwrap();
                assert!(a.matches(&path).is_some() && b.matches(&path).is_some(), "{path}");
            }
            found
        };
        assert_eq!(overlap("/{a}", "/x").as_deref(), Some("/x"));
        assert_eq!(overlap("/{a}/c", "/b/{d}").as_deref(), Some("/b/c"));
        assert!(overlap("/v2/{name*}/blobs/sha256:{sha256}", "/v2/{name*}/blobs/{digest}").is_some());
        assert!(overlap("/{a*}", "/v2/{name*}/blobs/sha256:{sha256}").is_some());
        assert_eq!(overlap("/v2/{name*}/blobs/sha256:{sha256}", "/v2/{name*}/manifests/{tag}"), None);
        assert_eq!(overlap("/{a}", "/{b}/c"), None);
        assert_eq!(overlap("/x", "/y"), None);
        assert_eq!(overlap("/{sha256}", "/{sha1}"), None);
    }

    #[test]
    fn expansions() {
        let path = Template::parse("/crates/{crate}/{version}/download").unwrap();
        let captures = path.matches(&Path::of("/crates/serde/1.0.0/download").unwrap()).unwrap();
        let expansion = Expansion::parse("https://static.example/{crate}/{crate}-{version}.crate", &path).unwrap();
        assert_eq!(expansion.expand(&captures), "https://static.example/serde/serde-1.0.0.crate");
    }

    /// The longest path against a template that would cost an engine with backtracking for ever.
    #[test]
    fn no_path_takes_long() {
        let template = Template::parse("/{a*}x{b*}x{c*}x{d*}x{e*}y").unwrap();
        assert!(template.matches(&Path::of(&format!("/{}", "x".repeat(8000))).unwrap()).is_none());
    }

    proptest! {
        #[test]
        fn no_text_panics(text in "[/a{}*_%.]{0,20}", path in "/[a-z/%0-9]{0,20}") {
            if let (Ok(template), Ok(path)) = (Template::parse(&text), Path::of(&path)) {
                template.matches(&path);
            }
        }
    }
}
