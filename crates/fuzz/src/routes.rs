//! Requests to routes: which resource they name, and at which server.

use crate::{first_line, text};
use castier::routes::{crate_path as path_of_crate, parse_far, url_at};
use castier_blob::Digest;
use castier_routes::{
    Glob, Hosts, Kind, Listed, Path, Route, Table, Template,
    metadata::{Expected, spelled, spelled_path},
    name, preset, protocols,
};
use std::sync::LazyLock;
use url::Url;

/// Whether a path can lead a server out of the directory that it should stay in.
fn has_dots(path: &str) -> bool {
    let decoded = percent_encoding::percent_decode_str(path).decode_utf8_lossy();
    decoded.split('/').any(|segment| segment == "..")
}

/// The path of a request. It has one spelling.
pub(crate) fn route_path(bytes: &[u8]) {
    let Some(Ok(path)) = text(bytes).map(Path::of) else { return };
    let spelling = path.as_str();
    assert!(spelling.starts_with('/') && spelling.bytes().all(|byte| byte.is_ascii_graphic()));
    assert!(!has_dots(spelling) && !spelling.split('/').any(|segment| segment == "."));
    assert!(spelling.len() <= bytes.len());
    assert_eq!(Path::of(spelling).as_ref(), Ok(&path));
    let decoded = |bytes: &[u8]| percent_encoding::percent_decode(bytes).collect::<Vec<_>>();
    assert!(decoded(bytes) == decoded(spelling.as_bytes()) || spelling.len() < bytes.len());
    for (at, _) in spelling.match_indices('/') {
        let (prefix, rest) = spelling.split_at(at);
        // Slashes at the end of a prefix do not count.
        if prefix.ends_with('/') {
            continue;
        }
        let below = path.below(prefix).expect("it is below each of its beginnings");
        assert_eq!(below.as_str(), if rest.is_empty() { "/" } else { rest });
        assert_eq!(Path::of(below.as_str()), Ok(below));
    }
}

static TABLE: LazyLock<Table> = LazyLock::new(|| {
    let route = |protocol: &str, prefix: &str, host: Option<&str>, namespace: Option<&str>| Route {
        protocol: protocol.into(),
        host: host.map(str::to_owned),
        prefix: prefix.into(),
        namespace: namespace.map(str::to_owned),
        rules: preset(protocol).unwrap().to_vec(),
    };
    let mut routes: Vec<_> = protocols().into_iter().map(|protocol| route(protocol, &format!("/{protocol}"), None, None)).collect();
    routes.push(route("oci", "", None, Some("docker.io")));
    routes.push(route("oci", "", None, Some("ghcr.io")));
    routes.push(route("npm", "/a%2Fb/", Some("npm.example"), None));
    routes.push(route("bazel", "", None, None));
    Table::new(routes)
});

/// A request's `Host` on the first line, and its target after it. The upstream is asked for the path that the key is made of.
pub(crate) fn route_table(bytes: &[u8]) {
    let (host, target) = first_line(bytes);
    let Some((host, target)) = text(host).zip(text(target)) else { return };
    // `request_head` refuses it.
    if target.contains('#') {
        return;
    }
    let Ok(Some(found)) = TABLE.find(Some(host), target) else { return };
    assert!(!has_dots(found.path.as_str()) && found.target.starts_with('/'));
    let path = found.target.split('?').next().unwrap_or_default();
    assert_eq!(Path::of(path).as_ref(), Ok(&found.path), "{}", found.target);
    assert!(found.target.len() <= target.len() + 1);
    let base = Url::parse("https://up.example/base").unwrap();
    let url = url_at(&base, &found.target).expect("a target is part of a URL");
    assert_eq!((url.host_str(), url.fragment()), (Some("up.example"), None));
    assert_eq!(spelled_path(url.path()), spelled_path(path), "the URL names what the upstream is asked for");
    if found.rule.kind != Kind::Relay {
        assert_eq!(found.rule.path.matches(&found.path).as_ref(), Some(&found.captures));
    }
    if let Some(digest) = found.captures.digest() {
        let text = found.captures.get("sha256").map(str::to_owned);
        assert!(text.is_none_or(|text| text == digest.to_string() && found.path.as_str().contains(&text)));
    }
    let query = found.target.split_once('?').map(|(_, query)| query);
    assert_ne!(name("a", &found.path, query, &[]), name("b", &found.path, query, &[]));
}

/// The pattern of a purge on the first line, and a path after it. A pattern without wildcards is for its own path only. The same text as a template of paths.
pub(crate) fn glob(bytes: &[u8]) {
    let (pattern, path) = first_line(bytes);
    let Some((pattern, path)) = text(pattern).zip(text(path)) else { return };
    let Ok(path) = Path::of(path) else { return };
    if let Ok(glob) = Glob::parse(pattern) {
        let own = Path::of(pattern).expect("a pattern is a path");
        if !pattern.contains(['*', '?']) {
            assert_eq!(glob.matches(path.as_str()), path == own);
        }
        assert!(glob.matches(own.as_str()) || pattern.contains(['*', '?']));
        assert_eq!(glob.as_str(), pattern);
    }
    if let Ok(template) = Template::parse(pattern)
        && let Some(captures) = template.matches(&path)
        && let Some(digest) = captures.digest()
    {
        assert!(captures.get("sha256").is_none_or(|text| text == digest.to_string()));
    }
}

/// A list of hosts on the first line, and where an upstream leads to after it.
pub(crate) fn hosts(bytes: &[u8]) {
    let (patterns, link) = first_line(bytes);
    let Some((patterns, link)) = text(patterns).zip(text(link)) else { return };
    let patterns: Vec<_> = patterns.split(' ').filter(|pattern| !pattern.is_empty()).collect();
    let (Ok(hosts), Ok(url)) = (Hosts::parse(&patterns), Url::parse(link)) else { return };
    let Some((host, port)) = url.host_str().zip(url.port_or_known_default()) else { return };
    match hosts.allows(url.scheme(), host, port) {
        Some(listed) => {
            assert!(!patterns.is_empty());
            let stem = host.trim_end_matches('.');
            // Names of hosts have several spellings, in which labels stay labels.
            assert!(listed == Listed::Exactly || (stem.contains('.') && patterns.iter().any(|pattern| pattern.starts_with("*."))));
            assert!(hosts.allows(url.scheme(), host, port.wrapping_add(1).max(1)).is_none() || patterns.len() > 1);
            // URLs have hosts with characters that no pattern may have.
            if let Ok(own) = Hosts::parse(&[format!("{host}:{port}")])
                && !host.starts_with("*.")
            {
                assert_eq!(own.allows(url.scheme(), host, port), Some(Listed::Exactly));
            }
        }
        None => {
            let other = Hosts::parse(&[format!("*.{host}")]);
            assert!(
                other.is_err() || other.is_ok_and(|other| other.allows(url.scheme(), host, port).is_none()),
                "a wildcard is not for the host itself"
            );
        }
    }
}

/// A path that leads to another server of a route. The server has no user, and the path stays one.
pub(crate) fn far_link(bytes: &[u8]) {
    let Some(Some((url, path))) = text(bytes).map(parse_far) else { return };
    assert!(matches!(url.scheme(), "http" | "https") && url.has_host());
    assert!(url.username().is_empty() && url.password().is_none() && url.path() == "/");
    assert!(url.query().is_none() && url.fragment().is_none(), "{url}");
    let text = text(bytes).unwrap_or_default();
    let said = text.split('/').nth(3).map(|said| percent_encoding::percent_decode_str(said).decode_utf8_lossy().into_owned());
    assert!(said.is_some_and(|said| said.bytes().all(|byte| byte.is_ascii_alphanumeric() || b".-_:[]".contains(&byte))), "{url}");
    assert!(path.starts_with('/') && bytes.ends_with(path.as_bytes()));
}

/// Where crates are: the `dl` of a registry on the first line, and the path of a crate after it.
pub(crate) fn crate_path(bytes: &[u8]) {
    let (dl, known) = first_line(bytes);
    let Some((dl, known)) = text(dl).zip(text(known)) else { return };
    if let Some(path) = path_of_crate(dl, known, &Expected::Sha256(Digest::EMPTY)) {
        assert_eq!(spelled_path(&path), path);
    }
    let once = spelled_path(known);
    assert_eq!(spelled_path(&once), once);
    if let Ok(url) = Url::parse(dl) {
        let once = spelled(&url);
        assert!(!once.contains('#') && url.as_str().starts_with(&once[..once.find("://").map_or(0, |at| at + 3)]));
    }
}
