//! Documents of upstreams and stores: what is replaced in them, and what they say of other resources.

use crate::{first_line, text};
use castier_blob::Digest;
use castier_bucket::{Page, element};
use castier_routes::{
    Links, drop_members, html_base,
    lfs::{self, Batch, Replacement, parse_request},
    manifest as manifests,
    metadata::{self, expectations, spelled_path},
};
use serde_json::Value;
use std::collections::BTreeSet;
use url::Url;

// ---- links ----

/// What each link becomes: a text that must be escaped everywhere.
fn moved(link: &str) -> String {
    format!("/x\"'<&>{link}")
}

fn links_of(links: Links, document: &str) -> Option<Vec<String>> {
    let mut all = Vec::new();
    let same = links.rewrite(document, |link| {
        all.push(link.to_owned());
        None
    });
    assert_ne!(same.as_ref().ok().map(Option::is_some), Some(true), "nothing was to change");
    same.is_ok().then_some(all)
}

/// A page of links. The new page has the new links, and no other tags.
pub(crate) fn html_links(bytes: &[u8]) {
    let Some(page) = text(bytes) else { return };
    html_base(page);
    let before = links_of(Links::PYPI_HTML, page).expect("any text is a page");
    let new = Links::PYPI_HTML.rewrite(page, |link| Some(moved(link))).expect("any text is a page");
    assert_eq!(new.is_some(), !before.is_empty());
    let Some(new) = new else { return };
    assert_eq!(links_of(Links::PYPI_HTML, &new).unwrap(), before.iter().map(|link| moved(link)).collect::<Vec<_>>());
    assert!(new.len() <= page.len() + 64 * before.len() + 6 * before.iter().map(String::len).sum::<usize>());
}

/// A document with links at a path. The new document is JSON, and differs in these links only.
pub(crate) fn json_links(bytes: &[u8]) {
    let Some(document) = text(bytes) else { return };
    for (links, path) in
        [(Links::PYPI_JSON, &["files", "", "url"][..]), (Links::NPM, &["versions", "", "dist", "tarball"]), (Links::CARGO, &["dl"])]
    {
        let new = links.rewrite(document, |link| Some(moved(link)));
        let Ok(mut value) = serde_json::from_str::<Value>(document) else { continue };
        let new = new.expect("what is JSON is read");
        replace(&mut value, path);
        let new = new.unwrap_or_else(|| document.to_owned());
        assert_eq!(serde_json::from_str::<Value>(&new).expect("it is still JSON"), value);
    }
}

/// The oracle: replaces the links in a value.
fn replace(value: &mut Value, path: &[&str]) {
    let Some((step, rest)) = path.split_first() else {
        if let Value::String(link) = value {
            *link = moved(link);
        }
        return;
    };
    match value {
        Value::Object(members) if step.is_empty() => members.values_mut().for_each(|member| replace(member, rest)),
        Value::Array(elements) if step.is_empty() => elements.iter_mut().for_each(|element| replace(element, rest)),
        Value::Object(members) => members.get_mut(*step).into_iter().for_each(|member| replace(member, rest)),
        _ => {}
    }
}

/// A document without some members.
pub(crate) fn json_members(bytes: &[u8]) {
    const NAMES: [&str; 2] = ["xetHash", "a"];
    let Some(document) = text(bytes) else { return };
    let new = drop_members(document, &NAMES);
    let Ok(mut value) = serde_json::from_str::<Value>(document) else { return };
    let new = new.expect("what is JSON is read").unwrap_or_else(|| document.to_owned());
    assert!(new.len() <= document.len());
    remove(&mut value, &NAMES);
    assert_eq!(serde_json::from_str::<Value>(&new).expect("it is still JSON"), value);
    assert_eq!(drop_members(&new, &NAMES), Ok(None));
}

fn remove(value: &mut Value, names: &[&str]) {
    match value {
        Value::Object(members) => {
            members.retain(|name, _| !names.contains(&name.as_str()));
            members.values_mut().for_each(|member| remove(member, names));
        }
        Value::Array(elements) => elements.iter_mut().for_each(|element| remove(element, names)),
        _ => {}
    }
}

/// `nix-cache-info`. It has the priority once it is set, and setting it again changes nothing.
pub(crate) fn nix_priority(bytes: &[u8]) {
    let Some(body) = text(bytes) else { return };
    let new = metadata::nix_priority(body, 30);
    let mut set = new.lines().filter(|line| line.starts_with("Priority:")).peekable();
    assert!(set.peek().is_some() && set.all(|line| line.trim_end_matches('\r') == "Priority: 30"));
    assert_eq!(metadata::nix_priority(&new, 30), new);
    let others = |text: &str| {
        let lines = text.split('\n').filter(|line| !line.starts_with("Priority:") && !line.is_empty());
        lines.map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(others(&new), others(body));
}

// ---- Git LFS ----

/// A client's batch request.
pub(crate) fn lfs_request(bytes: &[u8]) {
    let Some(request) = parse_request(bytes) else { return };
    assert_eq!(request.hash_algo, "sha256");
    assert!(request.objects.len() * 64 <= bytes.len());
}

/// An upstream's answer to a batch. No action of an object that castier serves leads past it.
pub(crate) fn lfs_answer(bytes: &[u8]) {
    let Some(answer) = text(bytes) else { return };
    let Some(batch) = Batch::parse(bytes) else { return };
    assert!(batch.objects.len() * 64 <= bytes.len());
    let own = |oid: &Digest| Replacement {
        href: format!("http://castier.example/{oid}\"<"),
        header: vec![("Authorization".into(), "x\"y".into())],
        expires_in: Some(5),
    };
    let mut seen = Vec::new();
    let rewritten = lfs::rewrite(answer, |object| {
        seen.push(object.oid);
        Some(own(&object.oid))
    });
    let rewritten = rewritten.expect("it has been parsed").unwrap_or_else(|| answer.to_owned());
    let new = Batch::parse(rewritten.as_bytes()).expect("it is still an answer");
    assert_eq!(new.objects.len(), batch.objects.len());
    let actions: Vec<_> = new.objects.iter().filter_map(|object| Some((object.oid, object.download.as_ref()?))).collect();
    assert_eq!(actions.iter().map(|(oid, _)| *oid).collect::<Vec<_>>(), seen);
    for (oid, action) in actions {
        let own = own(&oid);
        assert_eq!((&action.href, &action.header, action.expires_in, action.expires_at), (&own.href, &own.header, 5, None));
    }
    for (before, after) in batch.objects.iter().zip(&new.objects) {
        assert_eq!((before.oid, before.size, &before.error), (after.oid, after.size, &after.error));
    }
}

// ---- what documents say of other resources ----

/// A manifest of a container image. What it lists stands in it.
pub(crate) fn manifest(bytes: &[u8]) {
    if let Some(media_type) = manifests::media_type(bytes) {
        assert!(media_type.bytes().all(|byte| byte.is_ascii_graphic()) && media_type.contains('/'));
    }
    let Some(listed) = manifests::listed(bytes) else { return };
    assert!(listed.len() * 64 <= bytes.len());
    let Ok(value) = serde_json::from_slice::<Value>(bytes) else { return };
    let mut texts = BTreeSet::new();
    collect(&value, &mut texts);
    for digest in listed {
        assert!(texts.contains(&format!("sha256:{digest}")), "{digest} is not in it");
    }
}

fn collect(value: &Value, texts: &mut BTreeSet<String>) {
    match value {
        Value::Object(members) => members.values().for_each(|member| collect(member, texts)),
        Value::Array(elements) => elements.iter().for_each(|element| collect(element, texts)),
        Value::String(text) => drop(texts.insert(text.clone())),
        _ => {}
    }
}

fn check(protocol: &str, url: &str, body: &[u8], content_type: Option<&str>) {
    let found = expectations(protocol, &Url::parse(url).unwrap(), body, content_type);
    for (name, _) in &found {
        let path = name.split_once("://").and_then(|(_, rest)| rest.find('/').map(|at| &rest[at..])).unwrap_or(name);
        let path = path.split('?').next().unwrap_or_default();
        assert_eq!(spelled_path(path), path, "it is found by its one spelling");
        assert!(!name.contains('#'));
    }
    // A hash is 20 bytes at least, and a link names two resources at most, one of cargo five.
    assert!(found.len() <= 5 * body.len().max(1) || is_packed(body));
}

fn is_packed(body: &[u8]) -> bool {
    body.starts_with(&[0x1f, 0x8b]) || body.starts_with(&[0xfd, b'7'])
}

/// A project page of the Python index.
pub(crate) fn metadata_pypi(bytes: &[u8]) {
    check("pypi", "https://up.example/simple/x/", bytes, None);
    check("pypi", "https://up.example/simple/x/", bytes, Some("text/html"));
}

/// The document of an npm package.
pub(crate) fn metadata_npm(bytes: &[u8]) {
    check("npm", "https://up.example/x", bytes, None);
}

/// An index file of a cargo registry.
pub(crate) fn metadata_cargo(bytes: &[u8]) {
    check("cargo", "https://up.example/ab/cd/abcd", bytes, None);
}

/// A narinfo.
pub(crate) fn metadata_nix(bytes: &[u8]) {
    check("nix", "https://up.example/abc.narinfo", bytes, None);
}

/// `Release`, `Packages` and `Sources` of Debian, plain or packed: the path on the first line, the file after it.
pub(crate) fn metadata_debian(bytes: &[u8]) {
    let (path, body) = first_line(bytes);
    let path = String::from_utf8_lossy(path);
    let url = Url::parse("https://up.example/").and_then(|base| base.join(path.trim_start_matches('/')));
    if let Ok(url) = url {
        check("debian", url.as_str(), body, None);
    }
}

// ---- object stores ----

/// The error of a store.
pub(crate) fn xml_error(bytes: &[u8]) {
    let xml = String::from_utf8_lossy(bytes);
    for name in ["Code", "Message"] {
        if let Some(found) = element(&xml, name) {
            assert!(!found.is_empty() && found == found.trim() && xml.contains(&found));
        }
    }
}

/// A list of unfinished uploads.
pub(crate) fn xml_uploads(bytes: &[u8]) {
    let xml = String::from_utf8_lossy(bytes);
    let Some(page) = Page::parse(&xml) else { return };
    assert!(page.uploads.len() * "<Upload>".len() <= xml.len());
    assert!(page.next.is_none_or(|(key, _)| !key.is_empty()), "a list without an end is asked for for ever");
    for upload in page.uploads {
        assert!(upload.key.len() + upload.id.len() <= 3 * xml.len());
    }
}
