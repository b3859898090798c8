//! Manifests of container images: what they list, and what they are.
//!
//! A manifest of a repository that lists a digest proves that the repository has it, because a registry refuses a manifest that lists what it does not have.
//! That holds only if castier reads a manifest as the registry did. Registries are written in Go, whose parser does not look at the case of names and takes
//! the last of several. So this one refuses a manifest in which a name that counts comes twice in any case. And it passes over what registries do not check:
//! layers that are elsewhere (`urls`), and the `subject`.

use castier_blob::Digest;
use serde::{
    Deserialize, Deserializer,
    de::{DeserializeSeed, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor},
};
use std::fmt;

/// The longest manifest that is read, in bytes. Registries refuse shorter ones: 4 MiB.
const MAX: usize = 8 << 20;
/// How many digests a manifest may list.
const MOST: usize = 10_000;

/// The SHA-256 digests that a manifest lists: config, layers, blobs, and the manifests of an index. It may be one of an OCI image, an artifact or an index, or
/// one of Docker's schema 2. Digests by other algorithms are passed over. `None`: it is no such manifest, or is too large.
pub fn listed(document: &[u8]) -> Option<Vec<Digest>> {
    if document.len() > MAX {
        return None;
    }
    let mut digests = Vec::new();
    let mut parser = serde_json::Deserializer::from_slice(document);
    parser.deserialize_map(Manifest(&mut digests)).ok()?;
    parser.end().ok()?;
    Some(digests)
}

/// The media type of a manifest: what its `mediaType` says, else what its members mean. `None`: it says neither. An index and an image at once is neither
/// (CVE-2021-41190).
pub fn media_type(document: &[u8]) -> Option<String> {
    #[derive(Deserialize)]
    struct Kind {
        #[serde(rename = "mediaType")]
        media_type: Option<String>,
        manifests: Option<IgnoredAny>,
        layers: Option<IgnoredAny>,
        config: Option<IgnoredAny>,
    }
    if document.len() > MAX {
        return None;
    }
    let kind: Kind = serde_json::from_slice(document).ok()?;
    let is_type = |text: &String| text.contains('/') && text.bytes().all(|byte| byte.is_ascii_graphic());
    kind.media_type.filter(is_type).or_else(|| match (kind.manifests.is_some(), kind.layers.is_some() || kind.config.is_some()) {
        (true, false) => Some("application/vnd.oci.image.index.v1+json".into()),
        (false, true) => Some("application/vnd.oci.image.manifest.v1+json".into()),
        _ => None,
    })
}

/// A name as Go compares it. `ſ` is an `s` to it, and the symbol for Kelvin a `k`.
fn fold(name: &str) -> String {
    name.to_uppercase().to_lowercase()
}

/// Reads an object, of which each name in `names` may occur once. `read` gets the index of a name, and its value.
fn object<'d, A: MapAccess<'d>, const N: usize>(
    mut members: A,
    names: [&str; N],
    mut read: impl FnMut(usize, &mut A) -> Result<(), A::Error>,
) -> Result<(), A::Error> {
    let mut seen = [false; N];
    while let Some(name) = members.next_key::<String>()? {
        match names.iter().position(|known| *known == fold(&name)) {
            None => drop(members.next_value::<IgnoredAny>()?),
            Some(at) if std::mem::replace(&mut seen[at], true) => return Err(A::Error::custom("a name comes twice")),
            Some(at) => read(at, &mut members)?,
        }
    }
    Ok(())
}

/// Collects the digests of a manifest.
struct Manifest<'f>(&'f mut Vec<Digest>);

impl<'d> Visitor<'d> for Manifest<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a manifest")
    }

    fn visit_map<A: MapAccess<'d>>(self, members: A) -> Result<(), A::Error> {
        // Schema 1 has its layers under another name.
        object(members, ["config", "layers", "blobs", "manifests", "fslayers"], |at, members| match at {
            0 => members.next_value_seed(Descriptor(self.0)),
            4 => Err(A::Error::custom("a manifest of schema 1")),
            _ => members.next_value_seed(Descriptors(self.0)),
        })
    }
}

/// A list of descriptors, or nothing.
struct Descriptors<'f>(&'f mut Vec<Digest>);

impl<'d> DeserializeSeed<'d> for Descriptors<'_> {
    type Value = ();
    fn deserialize<D: Deserializer<'d>>(self, value: D) -> Result<(), D::Error> {
        value.deserialize_any(self)
    }
}

impl<'d> Visitor<'d> for Descriptors<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of descriptors")
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'d>>(self, mut elements: A) -> Result<(), A::Error> {
        while elements.next_element_seed(Descriptor(self.0))?.is_some() {}
        Ok(())
    }
}

/// A descriptor, or nothing.
struct Descriptor<'f>(&'f mut Vec<Digest>);

impl<'d> DeserializeSeed<'d> for Descriptor<'_> {
    type Value = ();
    fn deserialize<D: Deserializer<'d>>(self, value: D) -> Result<(), D::Error> {
        value.deserialize_any(self)
    }
}

impl<'d> Visitor<'d> for Descriptor<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a descriptor")
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_map<A: MapAccess<'d>>(self, members: A) -> Result<(), A::Error> {
        let (mut digest, mut media_type, mut urls) = (None::<String>, None::<String>, None::<Vec<IgnoredAny>>);
        object(members, ["digest", "mediatype", "urls"], |at, members| {
            match at {
                0 => digest = members.next_value()?,
                1 => media_type = members.next_value()?,
                _ => urls = members.next_value()?,
            }
            Ok(())
        })?;
        let media_type = media_type.unwrap_or_default();
        // Registries take such a layer unseen, so it proves nothing.
        let is_elsewhere =
            urls.is_some_and(|urls| !urls.is_empty()) || media_type.contains(".foreign.") || media_type.contains(".nondistributable.");
        let sha256 = digest.as_deref().and_then(|digest| Digest::parse(digest.strip_prefix("sha256:")?.as_bytes()).ok());
        if let Some(sha256) = sha256.filter(|_| !is_elsewhere) {
            if self.0.len() == MOST {
                return Err(A::Error::custom("too many digests"));
            }
            self.0.push(sha256);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn hex(letter: char) -> String {
        letter.to_string().repeat(64)
    }

    fn letters(document: &str) -> Option<String> {
        listed(document.as_bytes()).map(|digests| digests.iter().filter_map(|digest| digest.to_string().chars().next()).collect())
    }

    fn with_digests(document: &str) -> String {
        "abcdef0123"
            .chars()
            .fold(document.to_owned(), |document, letter| document.replace(&format!("<{letter}>"), &format!("sha256:{}", hex(letter))))
    }

    #[test]
    fn what_manifests_list() {
        for (document, expected) in [
            (
                r#"{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{"mediaType":"application/vnd.oci.image.config.v1+json",
                "digest":"<a>","size":7},"layers":[{"digest":"<b>","size":1},{"digest":"<c>","annotations":{"digest":"<0>"}}],"subject":{"digest":"<1>"},
                "annotations":{"config":"<2>"}}"#,
                Some("abc"),
            ),
            (
                r#"{"manifests":[{"digest":"<a>","platform":{"os":"linux"}},{"digest":"sha512:00"},{"digest":"<b>"}],"subject":{"digest":"<1>"}}"#,
                Some("ab"),
            ),
            (r#"{"artifactType":"x/y","blobs":[{"digest":"<d>"}],"config":null,"layers":null}"#, Some("d")),
            // What a registry does not check.
            (r#"{"layers":[{"digest":"<a>","urls":["https://x"]},{"digest":"<b>","urls":[]},{"digest":"<c>","urls":null}]}"#, Some("bc")),
            (r#"{"layers":[{"mediaType":"application/vnd.docker.image.rootfs.foreign.diff.tar.gzip","digest":"<a>"}]}"#, Some("")),
            (r#"{"layers":[{"mediaType":"application/vnd.oci.image.layer.nondistributable.v1.tar","digest":"<a>"}]}"#, Some("")),
            (r#"{"layers":[{"size":1},null,{"digest":null},{"digest":"<a"},{"digest":"sha256:ABC"}]}"#, Some("")),
            // One registry would read one of them, castier the other.
            (r#"{"layers":[{"digest":"<a>"}],"layers":[]}"#, None),
            (r#"{"layers":[{"digest":"<a>"}],"Layers":[]}"#, None),
            (r#"{"layers":[{"digest":"<a>"}],"layerſ":[]}"#, None),
            (r#"{"blobs":[{"digest":"<a>"}],"\u0042LOBS":[]}"#, None),
            (r#"{"layers":[{"digest":"<a>","DIGEST":"<b>"}]}"#, None),
            (r#"{"layers":[{"digest":"<a>","urls":[],"urlſ":["x"]}]}"#, None),
            (r#"{"Layers":[{"Digest":"<a>"}]}"#, Some("a")),
            // What is no manifest.
            (r#"{"schemaVersion":1,"fsLayers":[{"blobSum":"<a>"}]}"#, None),
            (r#"{"layers":{"digest":"<a>"}}"#, None),
            (r#"{"layers":["<a>"]}"#, None),
            (r#"{"config":[]}"#, None),
            (r#"{"layers":[{"digest":7}]}"#, None),
            ("{}", Some("")),
            ("[]", None),
            ("null", None),
            ("", None),
            ("{} {}", None),
            (r#"{"layers":[{"digest":"<a>"}"#, None),
        ] {
            assert_eq!(letters(&with_digests(document)).as_deref(), expected, "{document}");
        }
    }

    #[test]
    fn manifests_are_bounded() {
        let many = |count: usize| {
            let layers: Vec<_> = (0..count).map(|_| format!(r#"{{"digest":"sha256:{}"}}"#, hex('a'))).collect();
            listed(format!(r#"{{"layers":[{}]}}"#, layers.join(",")).as_bytes())
        };
        assert_eq!(many(MOST).map(|digests| digests.len()), Some(MOST));
        assert_eq!(many(MOST + 1), None);
        let long = format!("{{}}{}", " ".repeat(MAX));
        assert_eq!((listed(&long.as_bytes()[1..]), listed(long.as_bytes()), media_type(long.as_bytes())), (None, None, None));
        assert_eq!(listed(&long.as_bytes()[..MAX]), Some(Vec::new()));
        assert_eq!(letters(&format!("{{\"x\":{}{}}}", "[".repeat(100_000), "]".repeat(100_000))).as_deref(), Some(""));
    }

    #[test]
    fn media_types() {
        let (index, image) = ("application/vnd.oci.image.index.v1+json", "application/vnd.oci.image.manifest.v1+json");
        for (document, expected) in [
            (
                r#"{"mediaType":"application/vnd.docker.distribution.manifest.v2+json","layers":[]}"#,
                Some("application/vnd.docker.distribution.manifest.v2+json"),
            ),
            (r#"{"manifests":[]}"#, Some(index)),
            (r#"{"layers":[],"config":{}}"#, Some(image)),
            (r#"{"config":{}}"#, Some(image)),
            (r#"{"mediaType":"a/b\r\nx: y","layers":[]}"#, Some(image)),
            (r#"{"mediaType":"","manifests":[]}"#, Some(index)),
            (r#"{"manifests":[],"layers":[]}"#, None),
            (r#"{"manifests":null}"#, None),
            ("{}", None),
            ("", None),
        ] {
            assert_eq!(media_type(document.as_bytes()).as_deref(), expected, "{document}");
        }
    }

    proptest! {
        #[test]
        fn no_document_panics(document in r#"(\{|\}|\[|\]|:|,|"layers"|"Layers"|"digest"|"config"|"urls"|"sha256:0"|null|7){0,20}"#) {
            listed(document.as_bytes());
            media_type(document.as_bytes());
        }

        #[test]
        fn what_is_listed_stands_in_it(letters in "[a-f]{0,20}", pretty: bool) {
            let layers: Vec<_> = letters.chars().map(|letter| serde_json::json!({ "digest": format!("sha256:{}", hex(letter)), "size": 1 })).collect();
            let document = serde_json::json!({ "layers": layers });
            let document = if pretty { serde_json::to_string_pretty(&document).unwrap() } else { document.to_string() };
            prop_assert_eq!(super::tests::letters(&document), Some(letters));
        }
    }
}
