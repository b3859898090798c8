//! The rules of the protocols, as data.

use crate::{
    path::Path,
    template::{Captures, Template},
};
use castier_blob::Digest;
use http::HeaderMap;
use serde::Deserialize;
use std::{collections::HashMap, sync::LazyLock, time::Duration};

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
    /// How long an answer is fresh, in place of the upstream's own word.
    #[serde(default, deserialize_with = "duration")]
    pub ttl: Option<Duration>,
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

fn duration<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<Duration>, D::Error> {
    let text = String::deserialize(deserializer)?;
    humantime::parse_duration(&text).map(Some).map_err(|error| serde::de::Error::custom(format!("{text}: {error}")))
}

impl Rule {
    /// The SHA-256 of the body that an answer's headers name, in the header that this rule has for it: `sha256:<hex>` as registries write it, or
    /// `"<hex>"` as Hugging Face does. `None`: they name none, as for a file whose `X-Linked-Etag` is a git hash.
    pub fn named_digest(&self, answer: &HeaderMap) -> Option<Digest> {
        let value = answer.get(self.digest_header.as_deref()?)?.to_str().ok()?.trim();
        let quoted = value.strip_prefix('"').and_then(|value| value.strip_suffix('"'));
        let hex = quoted.or_else(|| value.strip_prefix("sha256:")).unwrap_or(value);
        Digest::parse(hex.as_bytes()).ok()
    }
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
        assert_eq!(protocols(), ["bazel", "cargo", "debian", "go", "huggingface", "lfs", "nix", "npm", "oci", "pypi"]);
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
            ("oci", "/v1/search"),
            ("cargo", "/api/v1/crates"),
            ("pypi", "/pypi/upload"),
            ("pypi", "/legacy/"),
            ("bazel", "/status"),
            ("npm", "/left-pad/1.0.0"),
            ("lfs", "/team/project.git/info/refs"),
            ("go", "/golang.org/x/text"),
            ("huggingface", "/gpt2/blob/main/config.json"),
            ("debian", "/"),
        ] {
            let found = first(preset(protocol).unwrap(), &Path::of(path).unwrap());
            assert!(
                found.as_ref().is_none_or(|(rule, _)| rule.kind == Kind::Relay),
                "{protocol} {path}: {:?}",
                found.map(|(rule, _)| rule.path.as_str())
            );
        }
    }

    /// The sentences of the contract that name paths.
    #[test]
    fn the_presets_are_as_promised() {
        let commit = "607a30d783dfa663caf39e06633721c8d4cfcd7e";
        let (sha256, sha512) = (Digest::EMPTY.to_string(), "cf83e1357eefb8bd".repeat(8));
        let (fresh, frozen, blob, relay) = (Kind::Fresh, Kind::Frozen, Kind::Blob, Kind::Relay);
        for (protocol, path, kind) in [
            ("bazel", format!("/cas/{sha256}"), blob),
            ("bazel", format!("/ac/{sha256}"), fresh),
            ("oci", format!("/v2/a/b/manifests/sha256:{sha256}"), blob),
            ("oci", format!("/v2/a/b/blobs/sha256:{sha256}"), blob),
            ("oci", format!("/v2/a/b/blobs/sha512:{sha512}"), frozen),
            ("oci", format!("/v2/a/b/manifests/sha512:{sha512}"), frozen),
            ("oci", "/v2/a/b/manifests/v1".into(), fresh),
            ("oci", "/v2/".into(), fresh),
            ("oci", "/v2/a/b/tags/list".into(), fresh),
            ("oci", format!("/v2/a/b/referrers/sha256:{sha256}"), fresh),
            ("oci", "/v2/a/b/blobs/uploads/".into(), relay),
            ("oci", "/v2/_catalog".into(), relay),
            ("lfs", "/a/b.git/info/lfs/objects/batch".into(), relay),
            ("lfs", "/a/b.git/info/lfs/locks/verify".into(), relay),
            ("lfs", format!("/a/b.git/info/lfs/objects/{sha256}"), blob),
            ("nix", "/0c0zqgxcxhqfk1a8c5j0hxq7l5nfvp0g.narinfo".into(), fresh),
            ("nix", "/nix-cache-info".into(), fresh),
            ("nix", "/nar/0mdqa9w1p6cmli6976v4wi0sw9r4p5prkj7lzfd1877wk11c9c73.nar.xz".into(), frozen),
            ("debian", "/debian/dists/sid/InRelease".into(), fresh),
            ("debian", "/debian/dists/sid/Release.gpg".into(), fresh),
            ("debian", "/debian/dists/sid/main/binary-amd64/Packages.gz".into(), fresh),
            ("debian", format!("/debian/dists/sid/main/binary-amd64/by-hash/SHA256/{sha256}"), blob),
            ("debian", "/debian/pool/main/h/hello/hello_1_amd64.deb".into(), frozen),
            ("debian", "/x/hello_1_amd64.deb".into(), frozen),
            ("debian", "/x/hello_1.dsc".into(), frozen),
            ("debian", "/x/hello_1.orig.tar.xz".into(), frozen),
            ("pypi", "/packages/ab/x-1.whl.metadata".into(), frozen),
            ("npm", "/left-pad".into(), fresh),
            ("npm", "/left-pad/-/left-pad-1.3.0.tgz".into(), frozen),
            ("npm", "/-/npm/v1/security/audits/quick".into(), relay),
            ("npm", "/-/v1/search".into(), relay),
            ("cargo", "/config.json".into(), fresh),
            ("cargo", "/se/rd/serde".into(), fresh),
            ("go", "/x/@v/v1.0.0.info".into(), frozen),
            ("go", "/x/@v/main.info".into(), frozen),
            ("go", "/x/@v/v1.0.0.mod".into(), frozen),
            ("go", "/x/@v/v1.0.0.zip".into(), frozen),
            ("go", "/x/@v/list".into(), fresh),
            ("go", "/x/@latest".into(), fresh),
            ("huggingface", format!("/a/b/resolve/{commit}/x/y.bin"), frozen),
            ("huggingface", "/a/b/resolve/main/x".into(), fresh),
            ("huggingface", "/api/models/a/b/revision/main".into(), fresh),
        ] {
            let path = Path::of(&path).unwrap();
            let (rule, _) = first(preset(protocol).unwrap(), &path).unwrap();
            assert_eq!(rule.kind, kind, "{protocol} {path}");
            let always_asked = (protocol == "debian" && kind == fresh) || path.as_str().starts_with("/ac/");
            assert_eq!(rule.ttl, always_asked.then_some(Duration::ZERO), "{protocol} {path}");
            let by_accept =
                matches!((protocol, kind), ("npm" | "pypi", Kind::Fresh)) || (protocol == "oci" && path.as_str().contains("/manifests/"));
            assert_eq!(rule.vary, if by_accept { vec!["accept"] } else { vec![] }, "{protocol} {path}");
        }
    }

    #[test]
    fn digests_in_headers() {
        let hex = Digest::EMPTY.to_string();
        let rule = |protocol, path: &str| first(preset(protocol).unwrap(), &Path::of(path).unwrap()).unwrap().0;
        let named = |rule: &Rule, name: &'static str, value: &str| {
            let mut answer = HeaderMap::new();
            answer.insert(name, value.parse().unwrap());
            rule.named_digest(&answer)
        };
        let (oci, hub) = (rule("oci", "/v2/a/manifests/b"), rule("huggingface", "/a/resolve/main/b"));
        for (rule, name, value, expected) in [
            (oci, "docker-content-digest", format!("sha256:{hex}"), true),
            (oci, "docker-content-digest", format!("sha512:{hex}"), false),
            (oci, "docker-content-digest", "sha256:".into(), false),
            (oci, "x-linked-etag", format!("\"{hex}\""), false),
            (hub, "x-linked-etag", format!("\"{hex}\""), true),
            (hub, "x-linked-etag", hex.clone(), true),
            (hub, "x-linked-etag", format!("W/\"{hex}\""), false),
            (hub, "x-linked-etag", format!("\"{}\"", &hex[..40]), false),
            (hub, "x-linked-etag", format!("\"{}\"", hex.to_uppercase()), false),
            (rule("go", "/x/@v/list"), "etag", hex.clone(), false),
        ] {
            assert_eq!(named(rule, name, &value), expected.then_some(Digest::EMPTY), "{name}: {value}");
        }
    }

    #[test]
    fn times_are_parsed() {
        let rule = |ttl: &str| toml::from_str::<Rule>(&format!("path = \"/a\"\nkind = \"fresh\"\nttl = \"{ttl}\""));
        assert_eq!(rule("1h 30s").unwrap().ttl, Some(Duration::from_secs(3630)));
        assert!(rule("soon").is_err() && rule("").is_err());
    }
}
