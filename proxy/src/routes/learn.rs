//! What metadata says of other resources: which blobs a repository has, and which hash a name must have.

use super::{Route, serve::Subject};
use castier_blob::Digest;
use castier_routes::{
    Path, manifest,
    metadata::{self, Expected},
};
use moka::sync::Cache;
use url::Url;

/// How many hashes that metadata names are remembered, some 250 bytes each.
const MOST_EXPECTED: u64 = 200_000;
/// How many documents are remembered as read.
const MOST_READ: u64 = 10_000;

/// What was learned.
pub(super) struct Learned {
    /// By route, and the URL at the upstream; for cargo the path.
    expected: Cache<(usize, String), Expected>,
    /// Documents that have been read, by repository and digest.
    read: Cache<Digest, ()>,
    /// Repositories of registries of which a manifest has been read.
    repositories: Cache<String, ()>,
    /// Where crates are, as `config.json` says, by route.
    crates: Cache<usize, String>,
}

impl Default for Learned {
    fn default() -> Self {
        Self {
            expected: Cache::new(MOST_EXPECTED),
            read: Cache::new(MOST_READ),
            repositories: Cache::new(MOST_READ),
            crates: Cache::new(1000),
        }
    }
}

impl Learned {
    /// The hash that metadata has named for a path.
    pub(super) fn expected(&self, route: &Route, at: &Url) -> Option<Expected> {
        self.expected.get(&(route.index, name(route, at)))
    }

    /// Whether any manifest of a repository has been read.
    pub(super) fn has_any(&self, repository: &str) -> bool {
        self.repositories.contains_key(repository)
    }

    /// Whether a document has been read.
    pub(super) fn has_read(&self, repository: &str, digest: &Digest) -> bool {
        self.read.contains_key(&document(repository, digest))
    }
}

fn document(repository: &str, digest: &Digest) -> Digest {
    Digest::of(&[digest.as_bytes(), repository.as_bytes()].concat())
}

/// How a resource is named among what is expected. The index of cargo does not know on which host the crates are.
fn name(route: &Route, at: &Url) -> String {
    if route.protocol == "cargo" { metadata::spelled_path(at.path()) } else { metadata::spelled(at) }
}

/// The path of a crate, from the `dl` of `config.json` (<https://doc.rust-lang.org/cargo/reference/registry-index.html#index-configuration>). `known`: its
/// path as [`metadata::expectations`] gives it.
pub fn crate_path(dl: &str, known: &str, checksum: &Expected) -> Option<String> {
    let mut parts = known.strip_prefix("/crates/")?.split('/');
    let (name, version) = (parts.next()?, parts.next()?);
    let lower = name.to_ascii_lowercase();
    let prefix = |name: &str| match name.len() {
        1 => Some("1".to_owned()),
        2 => Some("2".to_owned()),
        3 => Some(format!("3/{}", name.get(..1)?)),
        _ => Some(format!("{}/{}", name.get(..2)?, name.get(2..4)?)),
    };
    let checksum = if let Expected::Sha256(digest) = checksum { digest.to_string() } else { String::new() };
    let markers = [
        ("{crate}", name.to_owned()),
        ("{version}", version.to_owned()),
        ("{prefix}", prefix(name)?),
        ("{lowerprefix}", prefix(&lower)?),
        ("{sha256-checksum}", checksum),
    ];
    let url = if markers.iter().any(|(marker, _)| dl.contains(marker)) {
        markers.iter().fold(dl.to_owned(), |url, (marker, value)| url.replace(marker, value))
    } else {
        format!("{dl}/{name}/{version}/download")
    };
    Url::parse(&url).ok().map(|url| metadata::spelled_path(url.path()))
}

/// Whether documents of such a path say something about other resources.
pub(super) fn is_telling(route: &Route, path: &Path) -> bool {
    let path = path.as_str();
    match route.protocol.as_str() {
        "oci" => path.contains("/manifests/"),
        "pypi" => path.contains("/simple/"),
        "npm" => !path.contains("/-/"),
        "cargo" => !path.ends_with("/download") && !path.ends_with(".crate"),
        "nix" => path.ends_with(".narinfo"),
        "debian" => {
            let file = path.rsplit('/').next().unwrap_or_default();
            // apt asks for indices by their hash.
            let is_index = path.contains("/by-hash/") && (path.contains("/binary-") || path.contains("/source/"));
            is_index || matches!(file, "InRelease" | "Release") || file.starts_with("Packages") || file.starts_with("Sources")
        }
        _ => false,
    }
}

impl Subject {
    /// Reads the document that was asked for.
    pub(super) fn learn(&self, digest: &Digest, document: &[u8], content_type: &str) {
        let (route, repository, path, at, shared) = (&*self.found.route, &self.repository, self.found.path(), &self.at, &self.shared);
        if shared.learned.has_read(repository, digest) || !is_telling(route, path) {
            return;
        }
        if route.protocol == "oci" {
            shared.learned.repositories.insert(repository.clone(), ());
            match manifest::listed(document) {
                Some(listed) => listed.iter().for_each(|digest| shared.proofs.add_member(repository, digest)),
                None => route.metrics.unparsed(),
            }
        } else {
            let content_type = (!content_type.is_empty()).then_some(content_type);
            let expected = metadata::expectations(&route.protocol, at, document, content_type);
            if route.protocol == "cargo" && path.as_str().ends_with("/config.json") {
                let dl = serde_json::from_slice::<serde_json::Value>(document).ok();
                if let Some(dl) = dl.as_ref().and_then(|config| config.get("dl")?.as_str()) {
                    shared.learned.crates.insert(route.index, dl.to_owned());
                }
            }
            let dl = shared.learned.crates.get(&route.index);
            for (link, expected) in expected {
                if let Some(path) = dl.as_ref().and_then(|dl| crate_path(dl, &link, &expected)) {
                    shared.learned.expected.insert((route.index, path), expected);
                }
                shared.learned.expected.insert((route.index, link), expected);
            }
        }
        shared.learned.read.insert(self::document(repository, digest), ());
    }
}
