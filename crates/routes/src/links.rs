//! Links in metadata: finds them by parsing, and replaces them where they stand. Every other byte stays as it was.

use crate::{
    edit::{Edit, range_in},
    json::{self, Step},
};
use html5gum::{StartTag, Token, Tokenizer, emitters::default::DefaultEmitter};
use std::ops::Range;

/// Where the links of a document are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Links {
    /// `href` of each `a` of an HTML page.
    Anchors,
    /// The strings at this path in a JSON document.
    Json(&'static [Step]),
}

impl Links {
    /// Of a project page of the Python index, as HTML.
    pub const PYPI_HTML: Self = Self::Anchors;
    /// Of a project page of the Python index, as JSON (PEP 691).
    pub const PYPI_JSON: Self = Self::Json(&[Step::Member("files"), Step::Each, Step::Member("url")]);
    /// Of the document of an npm package.
    pub const NPM: Self = Self::Json(&[Step::Member("versions"), Step::Each, Step::Member("dist"), Step::Member("tarball")]);
    /// Of `config.json` of a cargo registry. The link is no URL yet: it may have markers such as `{crate}`, which a parser of URLs would escape.
    pub const CARGO: Self = Self::Json(&[Step::Member("dl")]);
    /// The document with the links for which `change` returns another text. `None`: nothing changes. `change` gets each link as it is meant, with its
    /// fragment, and relative if it is so: [`html_base`] and the page's own URL say to what.
    ///
    /// # Errors
    /// [`Unparsed`]: the document is not what it should be. Pass it on as it is.
    pub fn rewrite(&self, document: &str, mut change: impl FnMut(&str) -> Option<String>) -> Result<Option<String>, Unparsed> {
        let mut edit = Edit::of(document);
        match self {
            Self::Anchors => anchors(document, &mut |place, link| {
                if let Some(new) = change(link) {
                    edit.replace(place.range.clone(), &place.quote(&new));
                }
            }),
            Self::Json(steps) => json::each(document, steps, &mut |value| {
                // What is no string is no link.
                let link: Option<String> = serde_json::from_str(value.get()).ok();
                if let Some(new) = link.and_then(|link| change(&link)) {
                    edit.replace(range_in(document, value.get()), &serde_json::Value::String(new).to_string());
                }
            })?,
        }
        Ok(edit.finish())
    }
}

/// The JSON document without the members of these names, at any depth; every other byte stays. `None`: it has none of them. Hugging Face's answers have
/// `xetHash`, which leads clients past castier.
///
/// # Errors
/// [`Unparsed`]: the document is not JSON, is nested more than 127 levels deep, or has a number that is too large for a float.
pub fn drop_members(document: &str, names: &[&str]) -> Result<Option<String>, Unparsed> {
    Ok(json::without(document, names)?)
}

/// `config.json` of a cargo registry, in which `auth-required` is true; every other byte stays. cargo then sends its token with each request; else with none
/// but that for this document.
///
/// # Errors
/// [`Unparsed`]: the document is not JSON.
pub fn require_log_in(document: &str) -> Result<Option<String>, Unparsed> {
    let (mut edit, mut is_there) = (Edit::of(document), false);
    json::each(document, &[Step::Member("auth-required")], &mut |value| {
        is_there = true;
        if value.get() != "true" {
            edit.replace(range_in(document, value.get()), "true");
        }
    })?;
    let start = document.len() - document.trim_start().len();
    if let (false, Some(rest)) = (is_there, document[start..].strip_prefix('{')) {
        let comma = if rest.trim_start().starts_with('}') { "" } else { "," };
        edit.replace(start + 1..start + 1, &format!("\"auth-required\":true{comma}"));
    }
    Ok(edit.finish())
}

/// What the relative links of an HTML page are relative to, if the page says so: the `href` of a `base` before the first link.
pub fn html_base(page: &str) -> Option<String> {
    let mut before_links = tags(page).take_while(|tag| !matches!(tag.name.as_slice(), b"a" | b"body"));
    before_links.find(|tag| tag.name.as_slice() == b"base").and_then(|tag| attribute(&tag, "href"))
}

/// A document that cannot be parsed, and why.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the metadata cannot be parsed: {0}")]
pub struct Unparsed(String);

impl From<serde_json::Error> for Unparsed {
    fn from(error: serde_json::Error) -> Self {
        Self(error.to_string())
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
        // A page's own carriage returns are read as line feeds.
        let escaped = value.replace('&', "&amp;").replace('\r', "&#13;").replace(quote, if quote == '"' { "&quot;" } else { "&#39;" });
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

/// The start tags of a page. HTML has no errors: any text is a page.
pub(crate) fn tags(page: &str) -> impl Iterator<Item = StartTag<usize>> {
    let mut emitter = DefaultEmitter::<usize>::new_with_span();
    // What stands in a script or a text area is no tag.
    emitter.naively_switch_states(true);
    Tokenizer::new_with_emitter(page, emitter).flatten().filter_map(|token| if let Token::StartTag(tag) = token { Some(tag) } else { None })
}

/// The value of an attribute.
pub(crate) fn attribute(tag: &StartTag<usize>, wanted: &str) -> Option<String> {
    let (_, value) = tag.attributes.iter().find(|(name, _)| name.as_slice() == wanted.as_bytes())?;
    str::from_utf8(&value.value).ok().map(str::to_owned)
}

/// Calls `found` for the `href` of each `a`, with its place.
fn anchors(page: &str, found: &mut impl FnMut(Place, &str)) {
    for tag in tags(page).filter(|tag| tag.name.as_slice() == b"a") {
        if let Some((_, href)) = tag.attributes.iter().find(|(name, _)| name.as_slice() == b"href")
            && let Ok(link) = str::from_utf8(&href.value)
            && let Some(place) = Place::of(page, href.span.start..href.span.end)
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
    fn log_ins_of_cargo() {
        for (document, with) in [
            (r#" {"dl":"x"}"#, Some(r#" {"auth-required":true,"dl":"x"}"#)),
            ("{ }\n", Some("{\"auth-required\":true }\n")),
            (r#"{"dl":"é", "auth-required" : false}"#, Some(r#"{"dl":"é", "auth-required" : true}"#)),
            (r#"{"x":{"auth-required":false},"auth-required":null}"#, Some(r#"{"x":{"auth-required":false},"auth-required":true}"#)),
            (r#"{"auth-required":true}"#, None),
            ("[]", None),
        ] {
            assert_eq!(require_log_in(document).unwrap().as_deref(), with, "{document}");
        }
        assert!(require_log_in("{").is_err());
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
        for nothing in ["{}", "[]", "null", "7", "\"x\"", "{\"files\":7}", "{\"files\":[]}"] {
            assert_eq!(rewritten(Links::PYPI_JSON, nothing), Ok(None), "{nothing}");
        }
        for broken in ["", "{", "{\"files\":[{\"url\":\"https://files.example/a\"}", "<html>"] {
            assert!(rewritten(Links::PYPI_JSON, broken).is_err(), "{broken}");
        }
    }

    /// What each link is changed into is up to the caller. It gets them all, as they are meant.
    #[test]
    fn relative_links_and_markers() {
        let all = |links: Links, document: &str| {
            let mut all = Vec::new();
            assert_eq!(
                links.rewrite(document, |link| {
                    all.push(link.to_owned());
                    None
                }),
                Ok(None)
            );
            all
        };
        let page = "<a href=\"../../packages/x-1.tar.gz#sha256=ab\" data-core-metadata=\"sha256=cd\">x</a><A HREF=/y?a=1&amp;b=2#sha256=ef>y</A>\
            <a data-core-metadata='x' href='//files.example/z'>z</a><a href='#top'>t</a>";
        assert_eq!(
            all(Links::PYPI_HTML, page),
            ["../../packages/x-1.tar.gz#sha256=ab", "/y?a=1&b=2#sha256=ef", "//files.example/z", "#top"]
        );
        let moved = Links::PYPI_HTML.rewrite(page, |link| link.strip_prefix("../..").map(|rest| format!("/pypi{rest}"))).unwrap().unwrap();
        assert_eq!(moved, page.replace("../../", "/pypi/"), "fragments and other attributes stay");
        let json = r#"{"files":[{"url":"../../packages/x-1.tar.gz","core-metadata":{"sha256":"ab"}}],"files":[{"url":"y"}]}"#;
        assert_eq!(all(Links::PYPI_JSON, json), ["../../packages/x-1.tar.gz", "y"]);
        for dl in [
            "https://static.example/crates",
            "https://static.example/{crate}/{version}",
            "https://static.example/{prefix}/{lowerprefix}/{crate}-{version}.crate?sum={sha256-checksum}",
        ] {
            let config = format!(r#"{{"dl":"{dl}","api":"https://static.example","auth-required":true}}"#);
            assert_eq!(all(Links::CARGO, &config), [dl]);
            let moved = Links::CARGO.rewrite(&config, |dl| Some(dl.replace("https://static.example", "http://castier"))).unwrap().unwrap();
            assert_eq!(moved, config.replacen("https://static.example", "http://castier", 1));
        }
    }

    #[test]
    fn what_relative_links_are_relative_to() {
        for (page, base) in [
            (
                "<html><head><BASE target=_top HREF='https://files.example/?a=1&amp;b'></head><body><base href=no>",
                Some("https://files.example/?a=1&b"),
            ),
            ("<head><base href=''>", Some("")),
            ("<a href=x>x</a><base href='https://files.example/'>", None),
            ("<body><base href=x>", None),
            ("<!-- <base href=x> --><script><base href=x></script>", None),
            ("", None),
        ] {
            assert_eq!(html_base(page).as_deref(), base, "{page}");
        }
    }

    #[test]
    fn what_leads_past_castier_is_dropped() {
        let tree =
            r#"[{"type":"file","oid":"a","size":1.0,"xetHash":"ab","lfs":{"oid":"c","xetHash":null},"path":"xetHash"}, {"xetHash":"d" }]"#;
        let expected = r#"[{"type":"file","oid":"a","size":1.0,"lfs":{"oid":"c"},"path":"xetHash"}, { }]"#;
        assert_eq!(drop_members(tree, &["xetHash"]).unwrap().unwrap(), expected);
        assert_eq!(drop_members(expected, &["xetHash"]), Ok(None));
        assert!(drop_members("<html>", &["xetHash"]).is_err());
    }

    #[test]
    fn new_links_are_escaped() {
        let evil = |links: Links, document: &str| links.rewrite(document, |_| Some("a\"b'<&>\r\n".into())).unwrap().unwrap();
        assert_eq!(evil(Links::Anchors, "<a href=\"x\">"), "<a href=\"a&quot;b'<&amp;>&#13;\n\">");
        assert_eq!(evil(Links::Anchors, "<a href='x'>"), "<a href='a\"b&#39;<&amp;>&#13;\n'>");
        assert_eq!(evil(Links::CARGO, "{\"dl\":\"x\"}"), "{\"dl\":\"a\\\"b'<&>\\r\\n\"}");
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
