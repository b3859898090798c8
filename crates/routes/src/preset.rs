//! The rules of the protocols, as data.

use crate::{
    path::Path,
    template::{Captures, Template},
};
use serde::Deserialize;
use std::{collections::HashMap, sync::LazyLock};

/// How long what a path names stays the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// The path names the SHA-256 of the body.
    Blob,
    /// Immutable by name: the first body is the only one.
    Frozen,
    /// Mutable: the answer is fresh for a time, and is revalidated after it.
    Fresh,
    /// No resource: passed on as it comes. For paths that a later rule would match.
    Relay,
}

/// What is true of the paths that one template matches.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// The paths.
    #[serde(deserialize_with = "template")]
    pub path: Template,
    /// What they name.
    pub kind: Kind,
    /// How long an answer is fresh, in place of the upstream's own word. As text, like the key `ttl` of a route.
    #[serde(default)]
    pub ttl: Option<String>,
    /// Request headers that choose between answers, in lower case.
    #[serde(default)]
    pub vary: Vec<String>,
    /// A response header that names the SHA-256 of the body, in lower case.
    #[serde(default)]
    pub digest_header: Option<String>,
    /// The body has links that lead past castier, and must be rewritten.
    #[serde(default)]
    pub links: bool,
    /// Paths that this rule, and none before it, matches. For the tests.
    #[serde(default)]
    pub examples: Vec<String>,
}

fn template<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Template, D::Error> {
    let text = String::deserialize(deserializer)?;
    Template::parse(&text).map_err(|error| serde::de::Error::custom(format!("{text}: {error}")))
}

static PRESETS: LazyLock<Result<HashMap<String, Vec<Rule>>, toml::de::Error>> =
    LazyLock::new(|| toml::from_str(include_str!("presets.toml")));

/// The rules of a protocol, in their order: the first one that matches a path holds. `None` for an unknown protocol.
pub fn preset(protocol: &str) -> Option<&'static [Rule]> {
    PRESETS.as_ref().ok()?.get(protocol).map(Vec::as_slice)
}

/// The names of all protocols, sorted.
pub fn protocols() -> Vec<&'static str> {
    let mut names: Vec<_> = PRESETS.iter().flat_map(HashMap::keys).map(String::as_str).collect();
    names.sort_unstable();
    names
}

/// The first rule that matches the path, and the values of its variables.
pub fn first<'r>(rules: &'r [Rule], path: &Path) -> Option<(&'r Rule, Captures)> {
    rules.iter().find_map(|rule| Some((rule, rule.path.matches(path)?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_presets_are_sound() {
        PRESETS.as_ref().unwrap();
        assert_eq!(protocols(), ["bazel", "cargo", "debian", "go", "huggingface", "nix", "npm", "oci", "pypi"]);
        for protocol in protocols() {
            for (at, rule) in preset(protocol).unwrap().iter().enumerate() {
                let name = rule.path.as_str();
                let has_digest = rule.path.has("sha256") || rule.path.has("nix32");
                assert!(rule.kind != Kind::Blob || has_digest, "{protocol} {name}: the path of a blob names its SHA-256");
                assert!(rule.kind == Kind::Fresh || rule.ttl.is_none(), "{protocol} {name}: what is immutable is always fresh");
                assert!(!rule.examples.is_empty(), "{protocol} {name}: has no example");
                for example in &rule.examples {
                    let path = Path::of(example).unwrap();
                    let found = preset(protocol).unwrap().iter().position(|rule| rule.path.matches(&path).is_some());
                    assert_eq!(found, Some(at), "{protocol} {example}: is for {name}");
                    if rule.kind == Kind::Blob {
                        assert!(rule.path.matches(&path).unwrap().digest().is_some(), "{protocol} {example}");
                    }
                }
            }
        }
        assert!(preset("gopher").is_none());
    }

    #[test]
    fn what_is_no_resource_is_relayed() {
        for (protocol, path) in [
            ("oci", "/v2/library/nginx/blobs/uploads/"),
            ("oci", "/v2/library/nginx/blobs/uploads/8d5e1b0a"),
            ("oci", "/v2/_catalog"),
            ("oci", "/v1/search"),
            ("npm", "/-/npm/v1/security/audits"),
            ("npm", "/-/v1/search"),
            ("npm", "/-/user/org.couchdb.user:me"),
            ("cargo", "/api/v1/crates"),
            ("nix", "/log/x.drv"),
            ("pypi", "/pypi/upload"),
            ("bazel", "/status"),
        ] {
            let found = first(preset(protocol).unwrap(), &Path::of(path).unwrap());
            assert!(
                found.as_ref().is_none_or(|(rule, _)| rule.kind == Kind::Relay),
                "{protocol} {path}: {:?}",
                found.map(|(rule, _)| rule.path.as_str())
            );
        }
    }
}
