//! Links that lead back to castier.

use super::{Match, Route, authority_part};
use castier_routes::{
    Links, Unparsed, drop_members, html_base,
    link_header::{self, Rewrite},
    metadata::nix_priority,
    require_log_in,
};
use http::{HeaderMap, HeaderName, HeaderValue, header};
use percent_encoding::percent_decode_str;
use url::{Position, Url};

/// What the path of a link to another server than the upstream begins with, below the route's prefix. No protocol has such a path.
pub(super) const FAR: &str = "/~/";

/// The server and the path of such a link: `/~/https/files.example/packages/x`.
pub fn parse_far(path: &str) -> Option<(Url, String)> {
    let (scheme, rest) = path.strip_prefix(FAR)?.split_once('/')?;
    let (authority, path) = rest.split_once('/')?;
    // Some clients escape the colon before a port.
    let authority = percent_decode_str(authority).decode_utf8().ok()?;
    // What a URL parser would read otherwise is no host.
    let is_plain = authority.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._:[]".contains(&byte));
    if !is_plain || !matches!(scheme, "http" | "https") {
        return None;
    }
    let url = Url::parse(&format!("{scheme}://{authority}")).ok()?;
    Some((url, format!("/{path}")))
}

/// Rewrites the links of one answer.
pub(super) struct Rewriter<'a> {
    pub(super) route: &'a Route,
    /// The metadata's own URL.
    pub(super) at: Url,
    /// castier's URL, as the client knows it. It may have a path.
    pub(super) castier: String,
    /// The namespace, if the client has it in the path.
    pub(super) namespace: Option<&'a str>,
}

impl Rewriter<'_> {
    /// The link at castier, if castier may follow the link. A fragment stays.
    pub(super) fn link(&self, link: &str) -> Option<String> {
        if link.starts_with('#') {
            return None;
        }
        let url = self.at.join(link).ok().filter(|url| matches!(url.scheme(), "http" | "https"))?;
        self.route.lists(&url)?;
        self.place(&url).map(|place| format!("{place}{}", &url[Position::AfterPath..]))
    }

    /// A link in which variables of the protocol, such as `{crate}`, must stay as they are.
    fn template(&self, link: &str) -> Option<String> {
        let start = link.find("://")? + 3;
        let end = link[start..].find('/').map_or(link.len(), |at| start + at);
        let url = Url::parse(&link[..end]).ok()?;
        self.route.lists(&url)?;
        let rest = &link[end..];
        let prefix = format!("{}{}", self.castier, self.route.prefix);
        let base = self.route.base.path().trim_end_matches('/');
        match rest.strip_prefix(base).filter(|_| self.route.is_upstream(&url)) {
            Some(rest) => Some(format!("{prefix}{rest}")),
            None => Some(format!("{prefix}{FAR}{}/{}{rest}", url.scheme(), &url[Position::BeforeHost..Position::AfterPort])),
        }
    }

    /// Scheme to path of a URL, at castier.
    fn place(&self, url: &Url) -> Option<String> {
        let prefix = format!("{}{}", self.castier, self.route.prefix);
        let base = self.route.base.path().trim_end_matches('/');
        let below = url.path().strip_prefix(base).filter(|rest| rest.is_empty() || rest.starts_with('/'));
        match below.filter(|_| self.route.is_upstream(url)) {
            Some(rest) => Some(match (self.namespace, rest.strip_prefix("/v2/")) {
                (Some(namespace), Some(name)) => format!("{prefix}/v2/{namespace}/{name}"),
                _ => format!("{prefix}{rest}"),
            }),
            None => {
                let authority = &url[Position::BeforeHost..Position::AfterPort];
                Some(format!("{prefix}{FAR}{}/{authority}{}", url.scheme(), url.path()))
            }
        }
    }

    /// The document with its links rewritten. `None`: it has none.
    pub(super) fn document(&self, wanted: &Match, content_type: &str, document: &str) -> Result<Option<String>, Unparsed> {
        let is_json = content_type.contains("json");
        match self.route.protocol.as_str() {
            "pypi" if is_json => Links::PYPI_JSON.rewrite(document, |link| self.link(link)),
            "pypi" => {
                let base = html_base(document).and_then(|base| self.at.join(&base).ok());
                let rewriter =
                    Self { route: self.route, at: base.unwrap_or_else(|| self.at.clone()), castier: self.castier.clone(), namespace: None };
                Links::PYPI_HTML.rewrite(document, |link| rewriter.link(link))
            }
            "npm" => Links::NPM.rewrite(document, |link| self.link(link)),
            "cargo" => {
                let rewritten = Links::CARGO.rewrite(document, |link| self.template(link))?;
                if !self.route.asks_for_users || !wanted.rule.links {
                    return Ok(rewritten);
                }
                Ok(require_log_in(rewritten.as_deref().unwrap_or(document))?.or(rewritten))
            }
            "huggingface" if is_json && wanted.path.as_str().starts_with("/api/") => drop_members(document, &["xetHash"]),
            "nix" if wanted.path.as_str() == "/nix-cache-info" => {
                Ok(self.route.priority.map(|priority| nix_priority(document, priority)).filter(|new| new != document))
            }
            _ => Ok(None),
        }
    }

    /// Whether documents of such a path have something to rewrite.
    pub(super) fn has_documents(&self, wanted: &Match) -> bool {
        let path = wanted.path.as_str();
        match self.route.protocol.as_str() {
            "nix" => self.route.priority.is_some() && path == "/nix-cache-info",
            "huggingface" => wanted.rule.links && path.starts_with("/api/"),
            // Only their headers have links.
            "oci" => false,
            _ => wanted.rule.links,
        }
    }

    /// Rewrites `Link` and `Location`, and drops what leads clients past the cache.
    pub(super) fn headers(&self, headers: &mut HeaderMap) {
        if self.route.protocol == "huggingface" {
            let xet: Vec<HeaderName> = headers.keys().filter(|name| name.as_str().starts_with("x-xet-")).cloned().collect();
            for name in xet {
                headers.remove(name);
            }
        }
        if matches!(self.route.protocol.as_str(), "oci" | "huggingface") {
            let lines: Vec<_> = headers.get_all(header::LINK).iter().filter_map(|line| line.to_str().ok().map(str::to_owned)).collect();
            headers.remove(header::LINK);
            for line in lines {
                let is_xet = |rel: &str| rel.split_whitespace().any(|rel| rel.starts_with("xet-"));
                let rewritten = link_header::rewrite(&line, |target, rel| match () {
                    () if is_xet(rel) => Rewrite::Drop,
                    () => self.link(target).map_or(Rewrite::Keep, |link| Rewrite::Replace(self.relative(target, link))),
                });
                let line = rewritten.unwrap_or(line);
                if let Some(value) = Some(line).filter(|line| !line.is_empty()).and_then(|line| HeaderValue::try_from(line).ok()) {
                    headers.append(header::LINK, value);
                }
            }
        }
        if let Some(location) = headers.get(header::LOCATION).and_then(|location| location.to_str().ok()).map(str::to_owned)
            && let Some(link) = self.link(&location)
            && let Ok(value) = HeaderValue::try_from(self.relative(&location, link))
        {
            headers.insert(header::LOCATION, value);
        }
    }

    /// A link without a host stays one.
    fn relative(&self, original: &str, link: String) -> String {
        if original.starts_with('/') && !original.starts_with("//") {
            link.strip_prefix(&authority_part(&self.castier)).map(str::to_owned).unwrap_or(link)
        } else {
            link
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_to_other_servers() {
        let parsed = |path: &str| parse_far(path).map(|(url, path)| (url.to_string(), path));
        for (path, url, rest) in [
            ("/~/https/files.example/packages/x", "https://files.example/", "/packages/x"),
            ("/~/http/files.example%3A8080/a//b", "http://files.example:8080/", "/a//b"),
            ("/~/https/%5B::1%5D:80/", "https://[::1]:80/", "/"),
        ] {
            assert_eq!(parsed(path), Some((url.into(), rest.into())), "{path}");
        }
        for path in [
            "/~/ftp/a/b",
            "/~/https/a",
            "/~/https//b",
            "/~/https/user%40a.example/b",
            "/~/https/a.example%2Fb/c",
            "/~/https/a.example%5Cb/c",
            "/~/https/a.example%3Fx/y",
            "/~/https/a.example%23x/y",
            "/~/https/a.exam%0Aple/y",
        ] {
            assert_eq!(parsed(path), None, "{path}");
        }
    }
}
