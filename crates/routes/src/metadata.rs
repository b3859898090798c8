//! What metadata says of the bytes of other resources, so that castier can check these when they come.

use crate::{
    json::{self, Step},
    links::{attribute, html_base, tags},
    nix32,
    path::Path,
};
use castier_blob::Digest;
use data_encoding::{BASE64, HEXLOWER_PERMISSIVE};
use percent_encoding::{AsciiSet, CONTROLS, utf8_percent_encode};
use serde::Deserialize;
use sha1::Sha1;
use sha2::{Digest as _, Sha256, Sha512};
use std::io::{BufRead, BufReader, Read as _};
use url::Url;

/// The longest metadata that is read, in bytes.
const MAX_BODY: usize = 64 << 20;
/// The most that compressed metadata may have, in bytes.
const MAX_UNPACKED: u64 = 256 << 20;
/// How much memory the decompressor may use, in KiB: enough for `xz -9`.
const XZ_MEMORY: u32 = 72 << 10;
/// The longest line that is read, in bytes.
const MAX_LINE: u64 = 1 << 20;
/// How many resources metadata may speak of.
const MOST: usize = 200_000;

/// What the bytes of a resource must hash to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expected {
    /// The SHA-256: the blob of this name.
    Sha256(Digest),
    /// The SHA-512.
    Sha512([u8; 64]),
    /// The SHA-1. It shows damage, but no forgery.
    Sha1([u8; 20]),
}

impl Expected {
    /// By the name of the algorithm, and the hash in hexadecimal.
    fn hex(algorithm: &str, hex: &str) -> Option<Self> {
        Self::bytes(algorithm, &HEXLOWER_PERMISSIVE.decode(hex.trim().as_bytes()).ok()?)
    }

    fn bytes(algorithm: &str, bytes: &[u8]) -> Option<Self> {
        match algorithm {
            "sha256" => Some(Self::Sha256(Digest::from_bytes(bytes.try_into().ok()?))),
            "sha512" => Some(Self::Sha512(bytes.try_into().ok()?)),
            "sha1" => Some(Self::Sha1(bytes.try_into().ok()?)),
            _ => None,
        }
    }

    /// By the attribute `integrity` of the web (Subresource Integrity): the strongest hash. `None` if that is not one hash.
    fn integrity(text: &str) -> Option<Self> {
        let hash = |hash: &str| {
            let (algorithm, encoded) = hash.split('?').next()?.split_once('-')?;
            Self::bytes(algorithm, &BASE64.decode(encoded.as_bytes()).ok()?)
        };
        let mut strongest: Vec<Self> = Vec::new();
        for hash in text.split_ascii_whitespace().filter_map(hash) {
            match strongest.first().map_or(0, Self::strength) {
                best if hash.strength() > best => strongest = vec![hash],
                best if hash.strength() == best && !strongest.contains(&hash) => strongest.push(hash),
                _ => {}
            }
        }
        // Several of one kind: any of them may be the right one.
        match strongest[..] {
            [one] => Some(one),
            _ => None,
        }
    }

    const fn strength(&self) -> u8 {
        match self {
            Self::Sha1(_) => 1,
            Self::Sha256(_) => 2,
            Self::Sha512(_) => 3,
        }
    }
}

/// Hashes the bytes of a resource as they come.
pub struct Checker {
    expected: Expected,
    hasher: Hasher,
}

enum Hasher {
    Sha256(Sha256),
    Sha512(Box<Sha512>),
    Sha1(Sha1),
}

impl Checker {
    /// For a resource of which this is expected.
    pub fn new(expected: Expected) -> Self {
        let hasher = match expected {
            Expected::Sha256(_) => Hasher::Sha256(Sha256::new()),
            Expected::Sha512(_) => Hasher::Sha512(Box::default()),
            Expected::Sha1(_) => Hasher::Sha1(Sha1::new()),
        };
        Self { expected, hasher }
    }

    /// The next bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        match &mut self.hasher {
            Hasher::Sha256(hasher) => hasher.update(bytes),
            Hasher::Sha512(hasher) => hasher.update(bytes),
            Hasher::Sha1(hasher) => hasher.update(bytes),
        }
    }

    /// Whether these were all bytes of the resource, and the right ones.
    pub fn matches(self) -> bool {
        let found = match self.hasher {
            Hasher::Sha256(hasher) => Expected::Sha256(Digest::from_bytes(hasher.finalize().into())),
            Hasher::Sha512(hasher) => Expected::Sha512(hasher.finalize().into()),
            Hasher::Sha1(hasher) => Expected::Sha1(hasher.finalize().into()),
        };
        found == self.expected
    }
}

/// What the answer with this body says of other resources. `url`: where it came from, after redirects.
///
/// Each resource is named by its URL as [`spelled`] spells it; for `cargo`, whose index does not know where the files are, by its path as [`spelled_path`] spells
/// it. So look a resource up by the same function. Metadata can speak of any host: ask only about resources of the route that it came by.
///
/// | protocol | metadata |
/// | --- | --- |
/// | `pypi` | project pages as HTML and JSON: the files, and the `.metadata` beside them |
/// | `npm` | packuments: the tarballs |
/// | `cargo` | index files: the crates |
/// | `debian` | `Release` and `InRelease`: the indices. `Packages` and `Sources`, plain or packed with gzip or xz: the packages |
/// | `nix` | narinfos: the archive |
///
/// Of other metadata, and of what cannot be read, it says nothing. Reads at most 64 MiB, which may unpack to 256 MiB, and 200,000 resources. It takes CPU time
/// for large metadata, up to seconds: call it where that may block.
pub fn expectations(protocol: &str, url: &Url, body: &[u8], content_type: Option<&str>) -> Vec<(String, Expected)> {
    let mut found = Found { url: url.clone(), all: Vec::new() };
    if body.len() <= MAX_BODY {
        match protocol {
            "pypi" => pypi(&mut found, body, content_type),
            "npm" => npm(&mut found, body),
            "cargo" => cargo(&mut found, body),
            "debian" => debian(&mut found, body),
            "nix" => nix(&mut found, body),
            _ => {}
        }
    }
    found.all
}

/// A URL in the one spelling that [`expectations`] uses: without its fragment, and its path as in [`spelled_path`].
pub fn spelled(url: &Url) -> String {
    let mut url = url.clone();
    url.set_fragment(None);
    let text = url.as_str();
    let authority = text.split_once("://").map_or(0, |(scheme, _)| scheme.len() + 3);
    let path = text[authority..].find('/').map_or(text.len(), |at| authority + at);
    let query = text[path..].find('?').map_or(text.len(), |at| path + at);
    format!("{}{}{}", &text[..path], spelled_path(&text[path..query]), &text[query..])
}

/// A path in the one spelling that [`expectations`] uses: visible characters are decoded, except `/`, `%`, `?` and `#`; other escapes are in upper case.
/// Clients do not agree on whether `+` is escaped, so this is looser than [`Path`].
pub fn spelled_path(path: &str) -> String {
    let mut pieces = path.split('%');
    let mut spelled = pieces.next().unwrap_or_default().to_owned();
    for piece in pieces {
        let hex = piece.get(..2).unwrap_or_default();
        match HEXLOWER_PERMISSIVE.decode(hex.as_bytes()).unwrap_or_default()[..] {
            [byte] if byte.is_ascii_graphic() && !b"/%?#".contains(&byte) => spelled.push(byte.into()),
            [_] => spelled.extend(["%", &hex.to_ascii_uppercase()]),
            // What is no escape could become one.
            _ => return path.to_owned(),
        }
        spelled += &piece[2..];
    }
    spelled
}

/// The resources of which something is known so far.
struct Found {
    url: Url,
    all: Vec<(String, Expected)>,
}

impl Found {
    fn is_full(&self) -> bool {
        self.all.len() >= MOST
    }

    /// A link as it stands in the metadata.
    fn link(&mut self, link: &str, expected: Option<Expected>) {
        if let Some(expected) = expected.filter(|_| !self.is_full())
            && let Ok(url) = self.url.join(link)
            && url.has_host()
        {
            self.all.push((spelled(&url), expected));
        }
    }

    fn path(&mut self, path: &str, expected: Expected) {
        if let Some(path) = Path::of(path).ok().filter(|_| !self.is_full()) {
            self.all.push((spelled_path(path.as_str()), expected));
        }
    }
}

// ---- pypi ----

fn pypi(found: &mut Found, body: &[u8], content_type: Option<&str>) {
    let Ok(body) = str::from_utf8(body) else { return };
    let is_json = content_type.map_or_else(|| body.trim_start().starts_with('{'), |media_type| media_type.contains("json"));
    if is_json { pypi_json(found, body) } else { pypi_html(found, body) }
}

fn pypi_json(found: &mut Found, body: &str) {
    #[derive(Deserialize)]
    struct File {
        url: String,
        #[serde(default)]
        hashes: Hashes,
        #[serde(rename = "core-metadata")]
        core_metadata: Option<Metadata>,
        #[serde(rename = "data-dist-info-metadata")]
        data_dist_info_metadata: Option<Metadata>,
        #[serde(rename = "dist-info-metadata")]
        dist_info_metadata: Option<Metadata>,
    }
    #[derive(Default, Deserialize)]
    struct Hashes {
        sha256: Option<String>,
        sha512: Option<String>,
        sha1: Option<String>,
    }
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Metadata {
        Hashes(Hashes),
        Other(serde::de::IgnoredAny),
    }
    impl Hashes {
        fn expected(&self) -> Option<Expected> {
            let hash = |algorithm, hex: &Option<String>| Expected::hex(algorithm, hex.as_deref()?);
            hash("sha256", &self.sha256).or_else(|| hash("sha512", &self.sha512)).or_else(|| hash("sha1", &self.sha1))
        }
    }
    const FILES: &[Step] = &[Step::Member("files"), Step::Each];
    // What came before an error counts.
    let _ = json::each(body, FILES, &mut |file| {
        let Ok(file) = serde_json::from_str::<File>(file.get()) else { return };
        found.link(&file.url, file.hashes.expected());
        let metadata = [file.core_metadata, file.data_dist_info_metadata, file.dist_info_metadata];
        let hashes = metadata
            .into_iter()
            .flatten()
            .find_map(|metadata| if let Metadata::Hashes(hashes) = metadata { hashes.expected() } else { None });
        found.link(&beside(&file.url), hashes);
    });
}

fn pypi_html(found: &mut Found, body: &str) {
    // `/simple/` lists all projects, and no hash. Do not parse it for nothing.
    if !body.contains("sha") {
        return;
    }
    if let Some(base) = html_base(body).and_then(|base| found.url.join(&base).ok()) {
        found.url = base;
    }
    let by_equals = |text: &str| text.split_once('=').and_then(|(algorithm, hex)| Expected::hex(algorithm, hex));
    for tag in tags(body).filter(|tag| tag.name.as_slice() == b"a") {
        let Some(href) = attribute(&tag, "href") else { continue };
        if found.is_full() {
            return;
        }
        let fragment = href.split_once('#').map_or("", |(_, fragment)| fragment);
        found.link(&href, fragment.split('&').find_map(by_equals));
        let metadata = ["data-core-metadata", "data-dist-info-metadata"];
        found.link(&beside(&href), metadata.iter().find_map(|name| by_equals(&attribute(&tag, name)?)));
    }
}

/// The link to the metadata of a file: it is beside the file.
fn beside(link: &str) -> String {
    format!("{}.metadata", link.split('#').next().unwrap_or_default())
}

// ---- npm ----

fn npm(found: &mut Found, body: &[u8]) {
    #[derive(Deserialize)]
    struct Dist {
        tarball: String,
        integrity: Option<String>,
        shasum: Option<String>,
    }
    const DISTS: &[Step] = &[Step::Member("versions"), Step::Each, Step::Member("dist")];
    let Ok(body) = str::from_utf8(body) else { return };
    let _ = json::each(body, DISTS, &mut |dist| {
        if let Ok(dist) = serde_json::from_str::<Dist>(dist.get()) {
            let expected = match dist.integrity.as_deref().filter(|text| !text.trim().is_empty()) {
                Some(integrity) => Expected::integrity(integrity),
                None => dist.shasum.and_then(|hex| Expected::hex("sha1", &hex)),
            };
            found.link(&dist.tarball, expected);
        }
    });
}

// ---- cargo ----

fn cargo(found: &mut Found, body: &[u8]) {
    #[derive(Deserialize)]
    struct Version {
        name: String,
        vers: String,
        cksum: String,
    }
    for line in body.split(|byte| *byte == b'\n') {
        let Ok(Version { name, vers, cksum }) = serde_json::from_slice(line) else { continue };
        let Some(expected) = Expected::hex("sha256", &cksum) else { continue };
        let is_plain = |text: &str| text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.+".contains(&byte));
        if !is_plain(&name) || !is_plain(&vers) {
            continue;
        }
        for path in [
            format!("/crates/{name}/{vers}/download"),
            format!("/v1/crates/{name}/{vers}/download"),
            format!("/api/v1/crates/{name}/{vers}/download"),
            format!("/crates/{name}/{name}-{vers}.crate"),
            format!("/{name}-{vers}.crate"),
        ] {
            found.path(&path, expected);
        }
    }
}

// ---- debian ----

/// What must be escaped of the name of a file, so that it is a path. Names have escapes of their own, such as `%3a`.
const FILE_NAME: &AsciiSet =
    &CONTROLS.add(b' ').add(b'"').add(b'#').add(b'<').add(b'>').add(b'?').add(b'`').add(b'{').add(b'}').add(b'%').add(b'\\');

fn debian(found: &mut Found, body: &[u8]) {
    let path = found.url.path().to_owned();
    let (directory, file) = path.rsplit_once('/').unwrap_or_default();
    if matches!(file, "Release" | "InRelease") {
        release(found, body);
    } else {
        // An index that is named by its hash stands for one beside the directory `by-hash`.
        let directory = directory.find("/by-hash/").map_or(directory, |end| &directory[..end]);
        index(found, directory, body);
    }
}

/// The files of which `Release` has the SHA-256, below its directory.
fn release(found: &mut Found, body: &[u8]) {
    let mut is_sha256 = false;
    lines(body, &mut |line| {
        if !line.starts_with([' ', '\t']) {
            is_sha256 = line.trim_end().eq_ignore_ascii_case("sha256:");
        } else if is_sha256 && let [hex, _, name] = line.split_ascii_whitespace().collect::<Vec<_>>()[..] {
            let expected = Expected::hex("sha256", hex);
            found.link(&format!("./{}", utf8_percent_encode(name.trim_start_matches('/'), FILE_NAME)), expected);
        }
        // What follows the signed text is not signed.
        !found.is_full() && !line.starts_with("-----BEGIN PGP SIGNATURE")
    });
}

/// The packages of `Packages`, and the files of `Sources`.
fn index(found: &mut Found, directory: &str, body: &[u8]) {
    #[derive(Default)]
    struct Stanza {
        filename: String,
        sha256: String,
        directory: String,
        /// The hash and the name of each file of a source package.
        files: Vec<(String, String)>,
    }
    impl Stanza {
        fn end(&mut self, found: &mut Found, directory: &str) {
            let Self { filename, sha256, directory: sources, files } = std::mem::take(self);
            let mut add = |name: &str, hex: &str| {
                let name = name.trim_start_matches("./").trim_start_matches('/');
                let path = utf8_percent_encode(name, FILE_NAME);
                found.link(&format!("{}/{path}", archive_root(directory, name)), Expected::hex("sha256", hex));
            };
            if !filename.is_empty() && !sha256.is_empty() {
                add(&filename, &sha256);
            }
            for (hex, name) in files.iter().filter(|(_, name)| !name.contains('/')) {
                add(&format!("{}/{name}", sources.trim_end_matches('/')), hex);
            }
        }
    }
    let (mut stanza, mut is_checksums) = (Stanza::default(), false);
    let is_complete = lines(body, &mut |line| {
        if line.trim_end().is_empty() {
            stanza.end(found, directory);
        } else if line.starts_with([' ', '\t']) {
            if is_checksums && let [hex, _, name] = line.split_ascii_whitespace().collect::<Vec<_>>()[..] {
                stanza.files.push((hex.into(), name.into()));
            }
        } else if let Some((name, value)) = line.split_once(':') {
            is_checksums = name.eq_ignore_ascii_case("checksums-sha256");
            let field = match () {
                () if name.eq_ignore_ascii_case("filename") => Some(&mut stanza.filename),
                () if name.eq_ignore_ascii_case("sha256") => Some(&mut stanza.sha256),
                () if name.eq_ignore_ascii_case("directory") => Some(&mut stanza.directory),
                () => None,
            };
            if let Some(field) = field {
                *field = value.trim().to_owned();
            }
        }
        !found.is_full()
    });
    if is_complete {
        stanza.end(found, directory);
    }
}

/// What the names of files in an index are relative to: the archive, which has the index below `dists`. An archive without `dists` has the index anywhere. There
/// it is the outermost directory for which the file is below that of the index: that of the index itself unless the name begins with a part of it.
fn archive_root<'d>(directory: &'d str, name: &str) -> &'d str {
    if let Some(end) = directory.rfind("/dists/") {
        return &directory[..end];
    }
    let ends = directory.match_indices('/').map(|(end, _)| end);
    let is_root = |end: &usize| {
        let rest = &directory[end + 1..];
        name.strip_prefix(rest).is_some_and(|below| below.starts_with('/'))
    };
    ends.into_iter().find(is_root).map_or(directory, |end| &directory[..end])
}

/// Calls `each` for each line of a text, which may be packed with gzip or xz, until it says false. Returns whether it came to the end of the text.
fn lines(body: &[u8], each: &mut dyn FnMut(&str) -> bool) -> bool {
    let (mut text, mut line) = (unpacked(body, MAX_UNPACKED), Vec::new());
    loop {
        line.clear();
        match (&mut text).take(MAX_LINE).read_until(b'\n', &mut line) {
            Ok(0) => return true,
            Ok(_) if (line.len() as u64) < MAX_LINE => {}
            // What came before a damage counts.
            _ => return false,
        }
        let line = line.strip_suffix(b"\n").unwrap_or(&line);
        if let Ok(line) = str::from_utf8(line)
            && !each(line)
        {
            return false;
        }
    }
}

/// The text, unpacked as it is read, and not further than `most` bytes.
fn unpacked(body: &[u8], most: u64) -> Box<dyn BufRead + '_> {
    match body {
        [0x1f, 0x8b, ..] => Box::new(BufReader::new(flate2::bufread::MultiGzDecoder::new(body)).take(most)),
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => {
            Box::new(BufReader::new(lzma_rust2::XzReader::new_mem_limit(body, true, XZ_MEMORY)).take(most))
        }
        _ => Box::new(body),
    }
}

// ---- nix ----

fn nix(found: &mut Found, body: &[u8]) {
    let Some(body) = str::from_utf8(body).ok().filter(|_| found.url.path().ends_with(".narinfo")) else { return };
    let field = |wanted: &str| {
        body.lines().find_map(|line| line.split_once(':').filter(|(name, _)| *name == wanted)).map(|(_, value)| value.trim())
    };
    // An archive that is not packed is hashed itself.
    let is_plain = field("Compression") == Some("none");
    let hash = field("FileHash").or_else(|| field("NarHash").filter(|_| is_plain));
    if let Some((link, hash)) = field("URL").zip(hash) {
        found.link(link, nix_sha256(hash));
    }
}

/// A SHA-256 as Nix writes it: `sha256:` and hexadecimal, Nix's base 32 or base 64, or `sha256-` and base 64.
fn nix_sha256(text: &str) -> Option<Expected> {
    let Some(hash) = text.strip_prefix("sha256:") else {
        return Expected::integrity(text).filter(|expected| matches!(expected, Expected::Sha256(_)));
    };
    match hash.len() {
        nix32::LENGTH => nix32::decode(hash).map(Expected::Sha256),
        Digest::TEXT_LEN => Expected::hex("sha256", hash),
        _ => Expected::bytes("sha256", &BASE64.decode(hash.as_bytes()).ok()?),
    }
}

/// `nix-cache-info` with this priority: lower comes first. Every other byte stays.
pub fn nix_priority(body: &str, priority: u32) -> String {
    let mut lines: Vec<String> = body.split_inclusive('\n').map(str::to_owned).collect();
    let mut is_there = false;
    for line in &mut lines {
        if line.starts_with("Priority:") {
            let end = line.trim_end_matches(['\r', '\n']).len();
            *line = format!("Priority: {priority}{}", &line[end..]);
            is_there = true;
        }
    }
    let mut text = lines.concat();
    if !is_there {
        if !text.is_empty() && !text.ends_with('\n') {
            text.push('\n');
        }
        text += &format!("Priority: {priority}\n");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::{collections::BTreeMap, io::Write as _};

    /// The hash of a text.
    fn sha256(text: &str) -> Expected {
        Expected::Sha256(Digest::of(text.as_bytes()))
    }

    fn hex(text: &str) -> String {
        Digest::of(text.as_bytes()).to_string()
    }

    /// `<a>` in a document is the hash of `a`.
    fn with_hashes(document: &str) -> String {
        "abcdefgh".chars().fold(document.to_owned(), |document, letter| document.replace(&format!("<{letter}>"), &hex(&letter.to_string())))
    }

    fn said(protocol: &str, url: &str, body: &[u8], content_type: Option<&str>) -> Vec<(String, Expected)> {
        expectations(protocol, &Url::parse(url).unwrap(), body, content_type)
    }

    /// Pairs of a URL and a letter whose hash is expected.
    fn pairs(pairs: &[(&str, &str)]) -> Vec<(String, Expected)> {
        pairs.iter().map(|(url, letter)| ((*url).to_owned(), sha256(letter))).collect()
    }

    #[test]
    fn python_pages() {
        let page = with_hashes(
            r##"<!DOCTYPE html><html><head><meta name="pypi:repository-version" content="1.1"></head><body>
            <a href="../../packages/ab/x-1.tar.gz#sha256=<a>" data-requires-python="&gt;=3">x-1.tar.gz</a>
            <a href="https://files.example/x-2-py3.whl#sha256=<b>" data-core-metadata="sha256=<c>" data-dist-info-metadata="sha256=<d>">x</a>
            <a href="/x%2b3%2Fy.whl?a=b&amp;c=%2b#egg=x&amp;sha256=<D>" data-dist-info-metadata=sha256=<e>>x</a>
            <a href="x-4.whl" data-core-metadata="true">x</a><a href="x-5.whl#md5=00">x</a><a href="x-6.whl#sha256=00">x</a>
            <a href="http://[#sha256=<a>">x</a><a href="mailto:a@b#sha256=<a>">x</a><link href="x-7.whl#sha256=<a>"><a>x</a>
            <!-- <a href="x-8.whl#sha256=<a>"> --></body></html>"##,
        )
        .replace("<D>", &hex("d").to_uppercase());
        let expected = pairs(&[
            ("https://index.example/packages/ab/x-1.tar.gz", "a"),
            ("https://files.example/x-2-py3.whl", "b"),
            ("https://files.example/x-2-py3.whl.metadata", "c"),
            ("https://index.example/x+3%2Fy.whl?a=b&c=%2b", "d"),
        ]);
        let mut found = said("pypi", "https://index.example/simple/x/", page.as_bytes(), Some("text/html; charset=utf-8"));
        // `.metadata` goes after the query, as pip does it.
        let odd = found.pop().unwrap();
        assert_eq!((found, odd.1), (expected, sha256("e")));
        assert_eq!(said("pypi", "https://index.example/simple/x/", page.as_bytes(), None).len(), 5);
        let based = with_hashes("<head><base href='https://files.example/f/'></head><a href='x.whl#sha256=<a>'>x</a><base href='/no/'>");
        assert_eq!(
            said("pypi", "https://index.example/simple/x/", based.as_bytes(), None),
            pairs(&[("https://files.example/f/x.whl", "a")])
        );
        let other = format!("<a href='a#sha512={}'></a><a href='b#sha1={}'></a>", "ab".repeat(64), "cd".repeat(20));
        let expected = [("https://h/a".to_owned(), Expected::Sha512([0xab; 64])), ("https://h/b".to_owned(), Expected::Sha1([0xcd; 20]))];
        assert_eq!(said("pypi", "https://h/", other.as_bytes(), None), expected);
        assert!(said("pypi", "https://h/", b"\xff<a href='a#sha256='>", None).is_empty());
    }

    #[test]
    fn python_pages_as_json() {
        let page = with_hashes(
            r#"{"meta":{"api-version":"1.1"},"name":"x","files":[
            {"filename":"x-1.tar.gz","url":"../../packages/x-1.tar.gz","hashes":{"sha256":"<a>","md5":"0"},"core-metadata":false},
            {"filename":"x-2.whl","url":"https://files.example/x-2.whl","hashes":{"sha256":"<b>"},"core-metadata":{"sha256":"<c>"},"data-dist-info-metadata":{"sha256":"<d>"}},
            {"filename":"x-3.whl","url":"https://files.example/x-3.whl","hashes":{},"core-metadata":true,"dist-info-metadata":{"sha256":"<e>"}},
            {"filename":"x-4.whl","hashes":{"sha256":"<a>"}},{"url":7},[],{"url":"https://files.example/x-5.whl","hashes":{"sha256":"<a"}}
            ],"versions":["1"]}"#,
        );
        let expected = pairs(&[
            ("https://index.example/packages/x-1.tar.gz", "a"),
            ("https://files.example/x-2.whl", "b"),
            ("https://files.example/x-2.whl.metadata", "c"),
            ("https://files.example/x-3.whl.metadata", "e"),
        ]);
        let media_type = Some("application/json");
        assert_eq!(said("pypi", "https://index.example/simple/x/", page.as_bytes(), media_type), expected);
        assert_eq!(said("pypi", "https://index.example/simple/x/", page.as_bytes(), None), expected);
        assert!(said("pypi", "https://index.example/simple/x/", b"<html>", media_type).is_empty());
    }

    #[test]
    fn npm_packuments() {
        let sha512 = |byte: u8| BASE64.encode(&[byte; 64]);
        let packument = format!(
            r#"{{"name":"x","dist-tags":{{}},"versions":{{
            "1.0.0":{{"dist":{{"shasum":"{sha1}","tarball":"https://registry.example/x/-/x-1.0.0.tgz","integrity":"sha512-{a}"}}}},
            "2.0.0":{{"dist":{{"shasum":"{sha1}","tarball":"https://registry.example/@s%2fx/-/x-2.0.0.tgz"}}}},
            "3.0.0":{{"dist":{{"shasum":"{sha1}","tarball":"https://registry.example/x-3.tgz","integrity":"sha1-AAAA sha512-{b}?opt sha256-00"}}}},
            "4.0.0":{{"dist":{{"shasum":"{sha1}","tarball":"https://registry.example/x-4.tgz","integrity":"sha512-{a} sha512-{b}"}}}},
            "5.0.0":{{"dist":{{"shasum":"{sha1}"}}}},"6.0.0":null,"7.0.0":{{"dist":7}}}},"dist":{{"tarball":"https://registry.example/no","shasum":"{sha1}"}}}}"#,
            sha1 = "ab".repeat(20),
            a = sha512(1),
            b = sha512(2),
        );
        let expected = [
            ("https://registry.example/x/-/x-1.0.0.tgz".to_owned(), Expected::Sha512([1; 64])),
            ("https://registry.example/@s%2Fx/-/x-2.0.0.tgz".to_owned(), Expected::Sha1([0xab; 20])),
            ("https://registry.example/x-3.tgz".to_owned(), Expected::Sha512([2; 64])),
        ];
        assert_eq!(said("npm", "https://registry.example/x", packument.as_bytes(), None), expected);
    }

    #[test]
    fn integrity_of_the_web() {
        let one = |text: &str| Expected::integrity(text);
        let sha256 = |byte: u8| format!("sha256-{}", BASE64.encode(&[byte; 32]));
        assert_eq!(one(&sha256(1)), Some(Expected::Sha256(Digest::from_bytes([1; 32]))));
        assert_eq!(one(&format!("{0} {0}", sha256(1))), one(&sha256(1)));
        assert_eq!(one(&format!("{} sha384-AAAA x - {}", BASE64.encode(&[1; 20]), sha256(2))), one(&sha256(2)));
        for none in ["", "sha256-", "sha256-AA==", "sha384-AAAA", &format!("{} {}", sha256(1), sha256(2))] {
            assert_eq!(one(none), None, "{none}");
        }
    }

    #[test]
    fn cargo_index_files() {
        let index = with_hashes(
            r#"{"name":"serde","vers":"1.0.0","deps":[],"cksum":"<a>","features":{},"yanked":false}

{"name":"serde","vers":"1.0.1+x","cksum":"<b>","yanked":true,"v":2}
not json
{"name":"../serde","vers":"1.0.2","cksum":"<c>"}
{"name":"serde","vers":"1/0","cksum":"<c>"}
{"name":"serde","vers":"1.0.3","cksum":"00"}"#,
        );
        let found: BTreeMap<_, _> = said("cargo", "https://index.example/se/rd/serde", index.as_bytes(), None).into_iter().collect();
        let expected = pairs(&[
            ("/api/v1/crates/serde/1.0.0/download", "a"),
            ("/api/v1/crates/serde/1.0.1+x/download", "b"),
            ("/crates/serde/1.0.0/download", "a"),
            ("/crates/serde/1.0.1+x/download", "b"),
            ("/crates/serde/serde-1.0.0.crate", "a"),
            ("/crates/serde/serde-1.0.1+x.crate", "b"),
            ("/serde-1.0.0.crate", "a"),
            ("/serde-1.0.1+x.crate", "b"),
            ("/v1/crates/serde/1.0.0/download", "a"),
            ("/v1/crates/serde/1.0.1+x/download", "b"),
        ]);
        assert_eq!(found, expected.into_iter().collect());
        let path = Path::of("/crates/serde/1.0.1%2bx/download").unwrap();
        assert!(found.contains_key(&spelled_path(path.as_str())), "however a client escapes it");
    }

    #[test]
    fn debian_releases() {
        let release = with_hashes(
            "Origin: Debian\nSuite: stable\nMD5Sum:\n 00 1 main/no\nSHA256:\n <a> 123 main/binary-amd64/Packages.xz\n\
            \t<b>   9   main/i18n/c++#1\n <c> 9\n 00 9 main/no\nSHA512:\n <d> 1 main/no\n",
        );
        let expected = pairs(&[
            ("http://deb.example/debian/dists/sid/main/binary-amd64/Packages.xz", "a"),
            ("http://deb.example/debian/dists/sid/main/i18n/c++%231", "b"),
        ]);
        assert_eq!(said("debian", "http://deb.example/debian/dists/sid/Release", release.as_bytes(), None), expected);
        let signed = format!(
            "-----BEGIN PGP SIGNED MESSAGE-----\nHash: SHA256\n\n{release}-----BEGIN PGP SIGNATURE-----\n\nSHA256:\n {} 1 main/no\n-----END PGP SIGNATURE-----\n",
            hex("e")
        );
        assert_eq!(said("debian", "http://deb.example/debian/dists/sid/InRelease", signed.as_bytes(), None), expected);
        assert_eq!(
            said("debian", "http://deb.example/debian/dists/sid/InRelease", signed.replace('\n', "\r\n").as_bytes(), None),
            expected
        );
        assert!(said("debian", "http://deb.example/debian/dists/sid/Release.gpg", release.as_bytes(), None).is_empty());
        let evil = with_hashes("SHA256:\n <a> 1 https://evil.example/x\n <b> 1 //evil.example/x\n <c> 1 ../../../../x\n");
        let expected = pairs(&[
            ("http://deb.example/d/dists/sid/https://evil.example/x", "a"),
            ("http://deb.example/d/dists/sid/evil.example/x", "b"),
            ("http://deb.example/x", "c"),
        ]);
        assert_eq!(said("debian", "http://deb.example/d/dists/sid/Release", evil.as_bytes(), None), expected);
    }

    fn packages() -> String {
        with_hashes(
            "Package: hello\nDescription: a\n SHA256: no\n Filename: no\nFilename: pool/main/h/hello_2%3a1_amd64.deb\nSize: 1\nMD5sum: 0\nSHA256: <a>\n\n\n\
            Package: c++\nSHA256: <b>\nfilename: ./pool/g/libstdc++6_1.deb\n\nPackage: no\nFilename: pool/no\n\nPackage: last\nFilename: pool/last.deb\nSHA256: <c>",
        )
    }

    fn packed(text: &str) -> Vec<u8> {
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(text.as_bytes()).unwrap();
        gzip.finish().unwrap()
    }

    #[test]
    fn debian_packages() {
        let expected = pairs(&[
            ("http://deb.example/debian/pool/main/h/hello_2%253a1_amd64.deb", "a"),
            ("http://deb.example/debian/pool/g/libstdc++6_1.deb", "b"),
            ("http://deb.example/debian/pool/last.deb", "c"),
        ]);
        let index = "http://deb.example/debian/dists/sid/main/binary-amd64/Packages";
        let by_hash = format!("http://deb.example/debian/dists/sid/main/binary-amd64/by-hash/SHA256/{}", Digest::EMPTY);
        for url in [index, &format!("{index}.gz"), &by_hash] {
            assert_eq!(said("debian", url, packages().as_bytes(), None), expected, "{url}");
            assert_eq!(said("debian", url, &packed(&packages()), None), expected, "{url}");
        }
        let crlf = packages().replace('\n', "\r\n");
        assert_eq!(said("debian", index, crlf.as_bytes(), None), expected);
        // apt asks for this.
        let asked = Url::parse("http://deb.example/debian/pool/g/libstdc%2b%2b6_1.deb").unwrap();
        assert!(expected.iter().any(|(url, _)| *url == spelled(&asked)));
        // What came before a damage counts, and what is packed otherwise is passed over.
        let cut = packed(&format!("{}\n\n", packages()).repeat(1000));
        let found = said("debian", index, &cut[..cut.len() / 2], None);
        assert!(found.len() > 3 && found.chunks(3).all(|chunk| chunk == &expected[..chunk.len()]), "{}", found.len());
        assert!(said("debian", index, b"BZh91AY&SY\0\0\xff", None).is_empty());
        assert!(said("debian", index, b"\xfd7zXZ\0\0\x04 and no more", None).is_empty());
    }

    /// What `xz` made of two texts with a package each; and the first of them with a header that asks for this much memory.
    #[test]
    fn packages_in_xz() {
        const TWO: &str = "/Td6WFoAAATm1rRGAgAhARYAAAB0L+WjAQBgRmlsZW5hbWU6IHBvb2wveF8xLmRlYgpTSEEyNTY6IGNhOTc4MTEyY2ExYmJkY2FmYWMyMzFiMzlhMjNkYzRkYTc4NmVmZjgxNDdjNGU3MmI5ODA3Nzg1YWZlZTQ4YmIKCgAAAACMCC9Lxy1lcwABeWFaJs7kH7bzfQEAAAAABFla/Td6WFoAAArh+wyhAgAhAQwAAACPmEGcAQBgRmlsZW5hbWU6IHBvb2wveV8xLmRlYgpTSEEyNTY6IGNhOTc4MTEyY2ExYmJkY2FmYWMyMzFiMzlhMjNkYzRkYTc4NmVmZjgxNDdjNGU3MmI5ODA3Nzg1YWZlZTQ4YmIKCgAAAABztBn0+gvAFskUtdsV/gXXuf+k7G+2iJDcQ1CgK62GCgABkQFhAAAA7aiVq7bp3xwCAAAAAApZWg==";
        const OF_XZ_9: &str = "/Td6WFoAAATm1rRGAgAhARwAAAAQz1jM";
        const OF_4_GIB: &str = "/Td6WFoAAATm1rRGAgAhASgAAADmoBGz";
        let found =
            |text: &str| said("debian", "http://h/dists/sid/main/binary-amd64/Packages.xz", &BASE64.decode(text.as_bytes()).unwrap(), None);
        let both = pairs(&[("http://h/pool/x_1.deb", "a"), ("http://h/pool/y_1.deb", "a")]);
        assert_eq!(found(TWO), both);
        let (first, rest) = TWO.split_at(OF_XZ_9.len());
        assert_eq!(found(&format!("{OF_XZ_9}{rest}")), both);
        assert_eq!(found(&format!("{OF_4_GIB}{rest}")), []);
        assert_eq!(found(first), []);
    }

    #[test]
    fn debian_sources() {
        let sources = with_hashes(
            "Package: hello\nFiles:\n 00 1 hello_1.dsc\nChecksums-Sha256:\n <a> 1 hello_1.dsc\n <b> 2 hello_1.orig.tar.gz\n <c> 2 ../no\nDirectory: pool/main/h/hello\nPackage-List:\n <d> x y\n\n",
        );
        let expected = pairs(&[
            ("http://deb.example/pool/main/h/hello/hello_1.dsc", "a"),
            ("http://deb.example/pool/main/h/hello/hello_1.orig.tar.gz", "b"),
        ]);
        assert_eq!(said("debian", "http://deb.example/dists/sid/main/source/Sources", sources.as_bytes(), None), expected);
    }

    #[test]
    fn flat_archives() {
        for (directory, name, root) in [
            ("/debian/dists/sid/main/binary-amd64", "pool/x.deb", "/debian"),
            ("/dists/sid/main/binary-amd64", "pool/x.deb", ""),
            ("/a/dists/b/dists/sid", "pool/x.deb", "/a/dists/b"),
            ("/repo/dir", "x.deb", "/repo/dir"),
            ("/repo/dir", "dir/x.deb", "/repo"),
            ("/repo/dir", "repo/dir/x.deb", ""),
            ("/repo/dir", "amd64/x.deb", "/repo/dir"),
            ("/repo/dir", "directory/x.deb", "/repo/dir"),
            ("", "x.deb", ""),
        ] {
            assert_eq!(archive_root(directory, name), root, "{directory} {name}");
        }
        let flat = with_hashes("Filename: ./x.deb\nSHA256: <a>\n");
        let expected = pairs(&[("http://deb.example/repo/x.deb", "a")]);
        assert_eq!(said("debian", "http://deb.example/repo/Packages.gz", &packed(&flat), None), expected);
        assert_eq!(said("debian", &format!("http://deb.example/repo/by-hash/SHA256/{}", Digest::EMPTY), flat.as_bytes(), None), expected);
    }

    #[test]
    fn what_is_packed_is_bounded() {
        // A line that has no end, and what follows it.
        let long = format!("{}\n\n{}\n\n{}", packages(), "a".repeat(3 << 20), packages());
        for body in [long.clone().into_bytes(), packed(&long)] {
            assert_eq!(said("debian", "http://h/dists/Packages", &body, None).len(), 3);
        }
        for (body, length) in [(packed(&"a".repeat(5000)), 1000), ([packed("a"), packed("b")].concat(), 2), (vec![b'a'; 3], 3)] {
            let mut text = Vec::new();
            unpacked(&body, 1000).read_to_end(&mut text).unwrap();
            assert_eq!(text.len(), length);
        }

        let many: String = (0..MOST + 5).map(|number| format!("Filename: {number}\nSHA256: {}\n\n", Digest::EMPTY)).collect();
        assert_eq!(said("debian", "http://h/dists/Packages", many.as_bytes(), None).len(), MOST);
        let long = vec![b'\n'; MAX_BODY + 1];
        assert!(said("debian", "http://h/dists/Packages", &long, None).is_empty());
    }

    #[test]
    fn narinfos() {
        let (nix32, digest) = ("0mdqa9w1p6cmli6976v4wi0sw9r4p5prkj7lzfd1877wk11c9c73", Digest::EMPTY);
        let base64 = BASE64.encode(digest.as_bytes());
        let of = |lines: &str| said("nix", "https://cache.example/n/abc.narinfo", lines.as_bytes(), None);
        for hash in [format!("sha256:{nix32}"), format!("sha256:{digest}"), format!("sha256:{base64}"), format!("sha256-{base64}")] {
            let narinfo = format!(
                "StorePath: /nix/store/abc-x\nURL: nar/x.nar.xz\nCompression: xz\nFileHash: {hash}\nFileSize: 9\nNarHash: sha256:00\nSig: k:URL: x\n"
            );
            let expected = [("https://cache.example/n/nar/x.nar.xz".to_owned(), Expected::Sha256(digest))];
            assert_eq!(of(&narinfo), expected, "{hash}");
            assert_eq!(of(&narinfo.replace('\n', "\r\n")), expected, "{hash}");
        }
        let plain = format!("URL: nar/x.nar?hash=a\nCompression: none\nNarHash: sha256:{nix32}\n");
        assert_eq!(of(&plain), [("https://cache.example/n/nar/x.nar?hash=a".to_owned(), Expected::Sha256(digest))]);
        for none in [
            String::new(),
            format!("FileHash: sha256:{nix32}\n"),
            "URL: nar/x\n".into(),
            plain.replace("none", "xz"),
            "URL: x\nFileHash: sha512:00\n".into(),
            "URL: x\nFileHash: sha256:\n".into(),
            format!("URL: x\nFileHash: sha1-{base64}\n"),
        ] {
            assert_eq!(of(&none), [], "{none}");
        }
        assert!(said("nix", "https://cache.example/nix-cache-info", plain.as_bytes(), None).is_empty());
        assert!(said("gopher", "https://cache.example/x.narinfo", plain.as_bytes(), None).is_empty());
    }

    #[test]
    fn priorities() {
        for (body, expected) in [
            ("StoreDir: /nix/store\nWantMassQuery: 1\nPriority: 40\n", "StoreDir: /nix/store\nWantMassQuery: 1\nPriority: 30\n"),
            ("Priority:40\r\nStoreDir: é\r\n", "Priority: 30\r\nStoreDir: é\r\n"),
            ("StoreDir: /nix/store", "StoreDir: /nix/store\nPriority: 30\n"),
            ("StoreDir: /nix/store\n", "StoreDir: /nix/store\nPriority: 30\n"),
            ("X: Priority: 1\nPriority: 1\nPriority: 2", "X: Priority: 1\nPriority: 30\nPriority: 30"),
            ("", "Priority: 30\n"),
        ] {
            assert_eq!(nix_priority(body, 30), expected);
        }
    }

    #[test]
    fn bytes_are_checked() {
        let hash = |expected: Expected, bytes: &[u8]| {
            let mut checker = Checker::new(expected);
            bytes.chunks(2).for_each(|chunk| checker.update(chunk));
            checker.matches()
        };
        let sha1 = Expected::hex("sha1", "a9993e364706816aba3e25717850c26c9cd0d89d").unwrap();
        let sha512 = "ddaf35a193617abacc417349ae20413112e6fa4e89a97ea20a9eeee64b55d39a2192992a274fc1a836ba3c23a3feebbd454d4423643ce80e2a9ac94fa54ca49f";
        for expected in [sha1, sha256("abc"), Expected::hex("sha512", sha512).unwrap()] {
            assert!(hash(expected, b"abc") && !hash(expected, b"abd") && !hash(expected, b"") && !hash(expected, b"abcd"), "{expected:?}");
        }
    }

    #[test]
    fn one_spelling() {
        for (url, expected) in [
            ("https://h/a%2bb+c%7e%2Fd%2f%3f%25%c3%A4#f", "https://h/a+b+c~%2Fd%2F%3F%25%C3%A4"),
            ("https://H:443/a%?q=%2b#f", "https://h/a%?q=%2b"),
            ("https://h?a=/%2b", "https://h/?a=/%2b"),
            ("https://h/%", "https://h/%"),
            ("https://h/a/%2e/./b/%2E", "https://h/a/b/"),
            ("https://h/%zz%2%61", "https://h/%zz%2%61"),
        ] {
            let once = spelled(&Url::parse(url).unwrap());
            assert_eq!(once, expected, "{url}");
            assert_eq!(spelled(&Url::parse(&once).unwrap()), once);
        }
    }

    proptest! {
        #[test]
        fn no_body_panics(
            text in r##"(<a href='|<base href='|#sha256=|'>|\{|\}|\[|:|,|"files"|"url"|"x"|"hashes"|\n|SHA256:|Filename: | x|Directory: |Checksums-Sha256:|URL: |é|%){0,30}"##,
            bytes in prop::collection::vec(any::<u8>(), 0..60),
            protocol in "pypi|npm|cargo|debian|nix",
            magic in 0_usize..3,
        ) {
            let magic = [&b""[..], b"\x1f\x8b\x08\0\0\0\0\0\0\x03", b"\xfd7zXZ\0"][magic];
            for url in ["https://h/dists/Release", "https://h/Packages", "https://h/x.narinfo", "data:x"] {
                said(&protocol, url, text.as_bytes(), None);
                said(&protocol, url, &[magic, &bytes].concat(), None);
            }
            nix_priority(&text, 1);
        }

        #[test]
        fn spellings_are_stable(path in "(/|%[0-9a-fA-F]{2}|%|[a-z+?é]){0,20}") {
            let once = spelled_path(&path);
            prop_assert_eq!(spelled_path(&once), once.clone());
            // A segment `.` is in no path that is spelled: `Url` and `Path` drop it, also if it is escaped.
            prop_assume!(!once.split('/').any(|segment| segment == "."));
            if let Ok(canonical) = Path::of(&path) {
                prop_assert_eq!(spelled_path(canonical.as_str()), once, "looser than the canonical spelling");
            }
        }
    }
}
