//! The targets in `Link` headers (RFC 8288). Every other byte stays.

use crate::edit::{Edit, range_in};

/// What becomes of a link.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Rewrite {
    /// It stays as it is.
    Keep,
    /// It leads to this target.
    Replace(String),
    /// It is left out.
    Drop,
}

/// One line of `Link` with the links as `change` wants them. `change` gets the target of each link as it stands, and its relation: several are separated by
/// spaces; it is empty if the link has none. `None`: nothing changes. An empty text: no link is left, so leave the line out. What follows a syntax error
/// stays.
pub fn rewrite(line: &str, mut change: impl FnMut(&str, &str) -> Rewrite) -> Option<String> {
    let links: Vec<_> = Links(line).collect();
    let rewrites: Vec<_> = links.iter().map(|link| change(link.target, &link.relation)).collect();
    let end = links.last().map_or(0, |link| range_in(line, link.whole).end);
    let is_complete = line[end..].bytes().all(is_separator);
    if is_complete && !links.is_empty() && rewrites.iter().all(|rewrite| *rewrite == Rewrite::Drop) {
        return Some(String::new());
    }
    let mut edit = Edit::of(line);
    // The end of the last link that stays.
    let mut stays: Option<usize> = None;
    for (at, (link, rewrite)) in links.iter().zip(rewrites).enumerate() {
        let whole = range_in(line, link.whole);
        match rewrite {
            Rewrite::Keep => stays = Some(whole.end),
            Rewrite::Replace(new) => {
                edit.replace(range_in(line, link.target), &as_target(&new));
                stays = Some(whole.end);
            }
            // With the comma before it, or with that after it if no link before it stays.
            Rewrite::Drop => match (stays, links.get(at + 1)) {
                (Some(from), _) => {
                    edit.replace(from..whole.end, "");
                    stays = Some(whole.end);
                }
                (None, Some(next)) => edit.replace(whole.start..range_in(line, next.whole).start, ""),
                (None, None) => edit.replace(whole, ""),
            },
        }
    }
    edit.finish()
}

/// A target that cannot end before it should, or bring another line with it.
fn as_target(new: &str) -> String {
    let escaped = new.chars().map(|c| match c {
        '<' | '>' | '"' | ' ' | '\u{0}'..='\u{1f}' | '\u{7f}' => format!("%{:02X}", u32::from(c)),
        c => c.to_string(),
    });
    escaped.collect()
}

/// A link in a line.
struct Link<'l> {
    /// From the `<` to the end of the parameters.
    whole: &'l str,
    target: &'l str,
    relation: String,
}

/// The links of the rest of a line.
struct Links<'l>(&'l str);

const fn is_space(byte: u8) -> bool {
    matches!(byte, b' ' | b'\t')
}

const fn is_separator(byte: u8) -> bool {
    is_space(byte) || byte == b','
}

impl<'l> Iterator for Links<'l> {
    type Item = Link<'l>;

    fn next(&mut self) -> Option<Link<'l>> {
        let start = self.0.trim_start_matches([' ', '\t', ',']);
        let (target, mut rest) = start.strip_prefix('<')?.split_once('>')?;
        let mut relation = None;
        let mut end = rest;
        loop {
            rest = rest.trim_start_matches([' ', '\t']);
            let Some(after) = rest.strip_prefix(';') else { break };
            let (name, value, after) = parameter(after)?;
            // The first `rel` counts.
            if name.eq_ignore_ascii_case("rel") && relation.is_none() {
                relation = Some(value);
            }
            (rest, end) = (after, after);
        }
        if !(rest.is_empty() || rest.starts_with(',')) {
            return None;
        }
        self.0 = rest;
        let whole = &start[..start.len() - end.len()];
        Some(Link { whole, target, relation: relation.unwrap_or_default() })
    }
}

/// The first parameter of a text, and what follows it.
fn parameter(text: &str) -> Option<(&str, String, &str)> {
    let text = text.trim_start_matches([' ', '\t']);
    let name_end = text.find(['=', ';', ',', ' ', '\t']).unwrap_or(text.len());
    let (name, rest) = text.split_at(name_end);
    let Some(value) = rest.trim_start_matches([' ', '\t']).strip_prefix('=') else { return Some((name, String::new(), rest)) };
    let value = value.trim_start_matches([' ', '\t']);
    let Some(quoted) = value.strip_prefix('"') else {
        let end = value.find([';', ',', ' ', '\t']).unwrap_or(value.len());
        return Some((name, value[..end].to_owned(), &value[end..]));
    };
    let mut unescaped = String::new();
    let mut characters = quoted.char_indices();
    loop {
        match characters.next()? {
            (at, '"') => return Some((name, unescaped, &quoted[at + 1..])),
            (_, '\\') => unescaped.push(characters.next()?.1),
            (_, c) => unescaped.push(c),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn rewritten(line: &str) -> Option<String> {
        rewrite(line, |target, relation| match (target, relation) {
            (_, relation) if relation.starts_with("xet-") => Rewrite::Drop,
            (target, "next") => Rewrite::Replace(format!("/prefix{target}")),
            _ => Rewrite::Keep,
        })
    }

    #[test]
    fn links_of_registries_and_of_hugging_face() {
        for (line, expected) in [
            (r#"</v2/x/tags/list?n=2&last=b>; rel="next""#, Some(r#"</prefix/v2/x/tags/list?n=2&last=b>; rel="next""#)),
            ("</a>;rel=next", Some("</prefix/a>;rel=next")),
            ("</a> ; REL = next ; title=\"x\"", Some("</prefix/a> ; REL = next ; title=\"x\"")),
            (r#"</a>; title="a,<b>; rel=\"next\""; rel=next, <b>"#, Some(r#"</prefix/a>; title="a,<b>; rel=\"next\""; rel=next, <b>"#)),
            (r#"<https://h/x>; rel="xet-auth", <https://h/y>; rel="xet-reconstruction-info""#, Some("")),
            (r#"<a>; rel="xet-auth", <b>; rel="canonical""#, Some(r#"<b>; rel="canonical""#)),
            (r#"<b>; rel=canonical , <a>;rel=xet-auth ,<c>;rel=xet-b, <d>"#, Some("<b>; rel=canonical, <d>")),
            ("<a>;rel=xet-a,<b>;rel=xet-b,<c>,<d>;rel=xet-c", Some("<c>")),
            (" , <a>; rel=xet-a ,", Some("")),
            ("<a,b;c>; rel=next", Some("</prefixa,b;c>; rel=next")),
            ("<a>; rel; rel=next", None),
            ("<a>; rel=prev; rel=next", None),
            ("<a>; rel=\"prev next\"", None),
            ("<a>", None),
            ("", None),
            ("a; rel=next", None),
            ("<a; rel=next", None),
            ("<a> x; rel=next", None),
            ("<a>; rel=\"next", None),
            // What cannot be read stays.
            ("<a>; rel=xet-a, b; rel=xet-b", Some(", b; rel=xet-b")),
            ("<a>; rel=next, <b", Some("</prefixa>; rel=next, <b")),
        ] {
            assert_eq!(rewritten(line).as_deref(), expected, "{line}");
        }
    }

    #[test]
    fn no_target_brings_another_link_or_line() {
        let evil = rewrite("<a>; rel=next", |_, _| Rewrite::Replace("b>; rel=x, <\r\nc \"é".into()));
        assert_eq!(evil.unwrap(), "<b%3E;%20rel=x,%20%3C%0D%0Ac%20%22é>; rel=next");
    }

    proptest! {
        #[test]
        fn what_is_kept_stays(line in "[<>a;,=\"\\\\ rel\té]{0,40}") {
            prop_assert_eq!(rewrite(&line, |_, _| Rewrite::Keep), None);
            let same = rewrite(&line, |target, _| Rewrite::Replace(target.to_owned()));
            let all = |line: &str| Links(line).map(|link| (link.target.to_owned(), link.relation)).collect::<Vec<_>>();
            if let Some(same) = same {
                prop_assert_eq!(all(&same).len(), all(&line).len());
            }
            let mut left = 0;
            let dropped = rewrite(&line, |_, _| { left += 1; if left % 2 == 0 { Rewrite::Keep } else { Rewrite::Drop } });
            if let Some(dropped) = dropped {
                let kept: Vec<_> = all(&line).into_iter().skip(1).step_by(2).collect();
                prop_assert_eq!(all(&dropped), kept, "{}", dropped);
            }
        }
    }
}
