//! Links in metadata: finds them by parsing, and replaces them where they stand. Every other byte stays as it was.

use html5gum::{Token, Tokenizer, emitters::default::DefaultEmitter};
use serde_json::value::RawValue;
use std::{collections::BTreeMap, ops::Range};

/// Where the links of a document are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Links {
    /// `href` of each `a` of an HTML page.
    Anchors,
    /// The strings at this path in a JSON document.
    Json(&'static [Step]),
}

/// A step into a JSON document.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// To the member of this name.
    Member(&'static str),
    /// To each member of an object, or each element of an array.
    Each,
}

impl Links {
    /// Of a project page of the Python index, as HTML.
    pub const PYPI_HTML: Self = Self::Anchors;
    /// Of a project page of the Python index, as JSON (PEP 691).
    pub const PYPI_JSON: Self = Self::Json(&[Step::Member("files"), Step::Each, Step::Member("url")]);
    /// Of the document of an npm package.
    pub const NPM: Self = Self::Json(&[Step::Member("versions"), Step::Each, Step::Member("dist"), Step::Member("tarball")]);
    /// Of `config.json` of a cargo registry.
    pub const CARGO: Self = Self::Json(&[Step::Member("dl")]);
    /// Of the answer to a batch request of Git LFS.
    pub const LFS: Self =
        Self::Json(&[Step::Member("objects"), Step::Each, Step::Member("actions"), Step::Member("download"), Step::Member("href")]);

    /// The document with the links for which `change` returns another text. `None`: nothing changes.
    ///
    /// # Errors
    /// [`Unparsed`]: the document is not what it should be. Pass it on as it is.
    pub fn rewrite(&self, document: &str, mut change: impl FnMut(&str) -> Option<String>) -> Result<Option<String>, Unparsed> {
        let mut changes = Vec::new();
        match self {
            Self::Anchors => {
                anchors(document, &mut |place, link| changes.extend(change(link).map(|new| (place.range.clone(), place.quote(&new)))))
            }
            Self::Json(steps) => {
                let root: &RawValue = serde_json::from_str(document).map_err(|error| Unparsed(error.to_string()))?;
                strings(root, steps, &mut |value, link| {
                    changes.extend(change(link).map(|new| (range_in(document, value.get()), serde_json::Value::String(new).to_string())));
                })
                .map_err(|error| Unparsed(error.to_string()))?;
            }
        }
        if changes.is_empty() {
            return Ok(None);
        }
        changes.sort_by_key(|(range, _)| range.start);
        let (mut rewritten, mut at) = (String::with_capacity(document.len()), 0);
        for (range, new) in changes {
            // Ranges come from the parser, in order and apart; a range that is not is left out rather than cut at.
            if let Some(before) = document.get(at..range.start) {
                rewritten += before;
                rewritten += &new;
                at = range.end;
            }
        }
        rewritten += document.get(at..).unwrap_or_default();
        Ok(Some(rewritten))
    }
}

/// A document that cannot be parsed, and why.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the metadata cannot be parsed: {0}")]
pub struct Unparsed(String);

/// Where `part`, which is a slice of `whole`, stands in it.
fn range_in(whole: &str, part: &str) -> Range<usize> {
    let start = (part.as_ptr() as usize).saturating_sub(whole.as_ptr() as usize);
    start..start + part.len()
}

// ---- JSON ----

/// Calls `found` for each string at the path, with its place in the document. What is not there, or is no string, is passed over.
fn strings<'a>(value: &'a RawValue, steps: &[Step], found: &mut impl FnMut(&'a RawValue, &str)) -> serde_json::Result<()> {
    let Some((step, rest)) = steps.split_first() else {
        if let Ok(text) = serde_json::from_str::<String>(value.get()) {
            found(value, &text);
        }
        return Ok(());
    };
    for (name, child) in children(value)? {
        if matches!(step, Step::Each) || matches!(step, Step::Member(wanted) if name.as_deref() == Some(*wanted)) {
            strings(child, rest, found)?;
        }
    }
    Ok(())
}

/// The members of an object, or the elements of an array; nothing of another value. Of members with one name the last one counts.
fn children(value: &RawValue) -> serde_json::Result<Vec<(Option<String>, &RawValue)>> {
    let text = value.get();
    match text.as_bytes().first() {
        Some(b'{') => {
            let members: BTreeMap<String, &RawValue> = serde_json::from_str(text)?;
            Ok(members.into_iter().map(|(name, child)| (Some(name), child)).collect())
        }
        Some(b'[') => {
            let elements: Vec<&RawValue> = serde_json::from_str(text)?;
            Ok(elements.into_iter().map(|child| (None, child)).collect())
        }
        _ => Ok(Vec::new()),
    }
}

// ---- HTML ----

/// Where the value of an attribute stands.
struct Place {
    /// The value, with its quotes if it has some.
    range: Range<usize>,
    /// The quote.
    quote: Option<char>,
}

impl Place {
    /// A value as it stands in a tag.
    fn quote(&self, value: &str) -> String {
        let quote = self.quote.unwrap_or('"');
        let escaped = value.replace('&', "&amp;").replace(quote, if quote == '"' { "&quot;" } else { "&#39;" });
        format!("{quote}{escaped}{quote}")
    }

    /// The place of the value within an attribute, which stands at `attribute` in the document.
    fn of(document: &str, attribute: Range<usize>) -> Option<Self> {
        let text = document.get(attribute.clone())?;
        let (name, after) = text.split_once('=')?;
        let value = after.trim_start_matches(|c: char| c.is_ascii_whitespace());
        let start = attribute.start + name.len() + 1 + (after.len() - value.len());
        let quote = value.chars().next().filter(|c| matches!(c, '"' | '\''));
        let length = match quote {
            Some(quote) => value.get(1..)?.find(quote)? + 2,
            None => value.find(|c: char| c.is_ascii_whitespace() || c == '>').unwrap_or(value.len()),
        };
        Some(Self { range: start..start + length, quote })
    }
}

/// Calls `found` for the `href` of each `a`, with its place. HTML has no errors: any text is a document.
fn anchors(document: &str, found: &mut impl FnMut(Place, &str)) {
    let mut emitter = DefaultEmitter::<usize>::new_with_span();
    // What stands in a script or a text area is no tag.
    emitter.naively_switch_states(true);
    for token in Tokenizer::new_with_emitter(document, emitter).flatten() {
        if let Token::StartTag(tag) = token
            && tag.name.as_slice() == b"a"
            && let Some((_, href)) = tag.attributes.iter().find(|(name, _)| name.as_slice() == b"href")
            && let Ok(link) = str::from_utf8(&href.value)
            && let Some(place) = Place::of(document, href.span.start..href.span.end)
        {
            found(place, link);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn rewritten(links: Links, document: &str) -> Result<Option<String>, Unparsed> {
        links.rewrite(document, |link| {
            let (host, path) = link.strip_prefix("https://")?.split_once('/')?;
            (host == "files.example").then(|| format!("http://castier/f/{path}"))
        })
    }

    #[test]
    fn the_links_of_a_python_page() {
        let page = "<!DOCTYPE html>\n<html><!-- <a href=\"https://files.example/no\"> --><body>\n\
            <script>'<a href=\"https://files.example/no\">'</script>\n\
            <a  class=x\n HREF = \"https://files.example/a-1.tar.gz?x=1&amp;y=2#sha256=ab\"  data-requires-python=\"&gt;=3\">a é</a><br/>\n\
            <a href='https://files.example/it&#39;s'>b</a>\n<a href=https://files.example/c>c</a>\n\
            <a href=\"https://other.example/d\">d</a><a href=\"../e\">e</a><a href>f</a><a href=\"\">g</a><a name=h>\n\
            <link href=\"https://files.example/no\">\n";
        let expected = page
            .replace("https://files.example/a-1.tar.gz", "http://castier/f/a-1.tar.gz")
            .replace("https://files.example/it", "http://castier/f/it")
            .replace("=https://files.example/c>", "=\"http://castier/f/c\">");
        assert_eq!(rewritten(Links::PYPI_HTML, page).unwrap().unwrap(), expected);
        assert_eq!(rewritten(Links::PYPI_HTML, "no tags, é"), Ok(None));
    }

    #[test]
    fn the_links_of_json_documents() {
        let npm = "{ \"name\":\"x\", \"versions\" : {\"1.0.0\":{\"dist\":{\"shasum\":\"1\",\"tarball\" :  \"https:\\/\\/files.example/x-1.tgz\"}},\n\
            \"2.0.0\":{\"dist\":{\"tarball\":\"https://other.example/x-2.tgz\"}},\"3.0.0\":{\"dist\":null},\"4\":7},\"é\":1e400,\
            \"tarball\":\"https://files.example/no\" }\n";
        let expected = npm.replace("\"https:\\/\\/files.example/x-1.tgz\"", "\"http://castier/f/x-1.tgz\"");
        assert_eq!(rewritten(Links::NPM, npm).unwrap().unwrap(), expected);
        let project =
            r#"{"meta":{"api-version":"1.0"},"files":[{"url":"https://files.example/a\u0026b","hashes":{}},{"url":4},{"nourl":1},[]]}"#;
        let expected = project.replace(r"https://files.example/a\u0026b", "http://castier/f/a&b");
        assert_eq!(rewritten(Links::PYPI_JSON, project).unwrap().unwrap(), expected);
        let cargo = r#"{"dl":"https://files.example/{crate}/{version}/download","api":"https://files.example/api"}"#;
        let expected = cargo.replacen("https://files.example", "http://castier/f", 1);
        assert_eq!(rewritten(Links::CARGO, cargo).unwrap().unwrap(), expected);
        let lfs = r#"{"objects":[{"oid":"a","actions":{"download":{"href":"https://files.example/a"},"upload":{"href":"https://files.example/b"}}}]}"#;
        assert_eq!(rewritten(Links::LFS, lfs).unwrap().unwrap(), lfs.replace("https://files.example/a", "http://castier/f/a"));
        for nothing in ["{}", "[]", "null", "7", "\"x\"", "{\"files\":7}", "{\"files\":[]}"] {
            assert_eq!(rewritten(Links::PYPI_JSON, nothing), Ok(None), "{nothing}");
        }
        for broken in ["", "{", "{\"files\":[{\"url\":\"https://files.example/a\"}", "<html>"] {
            assert!(rewritten(Links::PYPI_JSON, broken).is_err(), "{broken}");
        }
    }

    #[test]
    fn new_links_are_escaped() {
        let evil = |links: Links, document: &str| links.rewrite(document, |_| Some("a\"b'<&>\n".into())).unwrap().unwrap();
        assert_eq!(evil(Links::Anchors, "<a href=\"x\">"), "<a href=\"a&quot;b'<&amp;>\n\">");
        assert_eq!(evil(Links::Anchors, "<a href='x'>"), "<a href='a\"b&#39;<&amp;>\n'>");
        assert_eq!(evil(Links::CARGO, "{\"dl\":\"x\"}"), "{\"dl\":\"a\\\"b'<&>\\n\"}");
    }

    proptest! {
        #[test]
        fn what_is_not_changed_stays(page in "[<>a href='\"=x/!-]{0,60}") {
            prop_assert_eq!(Links::Anchors.rewrite(&page, |_| None), Ok(None));
            // A link that is replaced by itself is still the same link.
            if let Some(same) = Links::Anchors.rewrite(&page, |link| Some(link.to_owned())).unwrap() {
                let links = |page: &str| {
                    let mut links = Vec::new();
                    anchors(page, &mut |_, link| links.push(link.to_owned()));
                    links
                };
                prop_assert_eq!(links(&same), links(&page));
            }
        }

        #[test]
        fn no_json_panics(document in "[\\[\\]{}:,\"a-f0-9\\\\ ]{0,40}") {
            let _ = Links::NPM.rewrite(&document, |link| Some(link.to_owned()));
        }
    }
}
