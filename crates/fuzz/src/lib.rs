//! One target for each parser of bytes from the network: it gets any bytes, and panics if an invariant of the parser does not hold.
//!
//! `tests/replay.rs` gives each target its corpus, and what becomes of it by chance; `fuzz/` is for libFuzzer. README.md lists the parsers.
#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a target panics on what should not be")]

mod documents;
mod fields;
mod framing;
mod names;
mod routes;

/// Gets any bytes.
pub type Target = fn(&[u8]);

/// The targets, by their names. A directory in `corpus` has the same name.
pub const TARGETS: &[(&str, Target)] = &[
    ("answer", framing::answer),
    ("authorization", fields::authorization),
    ("challenge", fields::challenge),
    ("chunks", framing::chunks),
    ("conditions", fields::conditions),
    ("content_range", fields::content_range),
    ("crate_path", routes::crate_path),
    ("digest", names::digest),
    ("entry", names::entry),
    ("far_link", routes::far_link),
    ("fields", fields::fields),
    ("form", framing::form),
    ("forwarded", fields::forwarded),
    ("freshness", fields::freshness),
    ("glob", routes::glob),
    ("hosts", routes::hosts),
    ("html_links", documents::html_links),
    ("http2_frames", framing::http2_frames),
    ("http2_head", framing::http2_head),
    ("json_links", documents::json_links),
    ("json_members", documents::json_members),
    ("lfs_answer", documents::lfs_answer),
    ("lfs_request", documents::lfs_request),
    ("link_header", fields::link_header),
    ("manifest", documents::manifest),
    ("metadata_cargo", documents::metadata_cargo),
    ("metadata_debian", documents::metadata_debian),
    ("metadata_nix", documents::metadata_nix),
    ("metadata_npm", documents::metadata_npm),
    ("metadata_pypi", documents::metadata_pypi),
    ("nix_priority", documents::nix_priority),
    ("object_key", names::object_key),
    ("path", names::path),
    ("peer_name", names::peer_name),
    ("proof", fields::proof),
    ("proxy_header", framing::proxy_header),
    ("range", fields::range),
    ("request_head", framing::request_head),
    ("route_path", routes::route_path),
    ("route_table", routes::route_table),
    ("ticket", fields::ticket),
    ("trace", fields::trace),
    ("xml_error", documents::xml_error),
    ("xml_uploads", documents::xml_uploads),
];

/// Gives bytes to the target of this name.
///
/// # Panics
/// If an invariant does not hold, or there is no such target.
pub fn run(name: &str, bytes: &[u8]) {
    let (_, target) = TARGETS.iter().find(|(known, _)| *known == name).expect("a target has this name");
    target(bytes);
}

/// The first line without its end, and what follows it.
fn first_line(bytes: &[u8]) -> (&[u8], &[u8]) {
    match bytes.iter().position(|byte| *byte == b'\n') {
        Some(end) => (&bytes[..end], &bytes[end + 1..]),
        None => (bytes, &[]),
    }
}

/// The fields of a head, one on each line. What is no field is left out.
fn header_map(bytes: &[u8]) -> http::HeaderMap {
    let mut headers = http::HeaderMap::new();
    for line in bytes.split(|byte| *byte == b'\n') {
        if let Some(colon) = line.iter().position(|byte| *byte == b':')
            && let (Ok(name), Ok(value)) =
                (http::HeaderName::from_bytes(&line[..colon]), http::HeaderValue::from_bytes(line[colon + 1..].trim_ascii()))
        {
            headers.append(name, value);
        }
    }
    headers
}

/// Some ways to cut bytes into pieces: of short bytes in two at each position, of long ones at a few; and into single bytes.
fn cuts(bytes: &[u8]) -> Vec<Vec<&[u8]>> {
    const SHORT: usize = 40;
    let mut all: Vec<Vec<&[u8]>> = Vec::new();
    // Each input has its own positions.
    let mut at = bytes.iter().fold(bytes.len(), |sum, byte| sum.wrapping_mul(31).wrapping_add(usize::from(*byte)));
    if bytes.len() <= SHORT {
        all.extend((1..bytes.len()).map(|cut| vec![&bytes[..cut], &bytes[cut..]]));
    } else {
        for _ in 0..4 {
            at = at.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let cut = (at >> 33) % bytes.len();
            all.push(vec![&bytes[..cut], &bytes[cut..]]);
        }
    }
    all.push(bytes.chunks(1 + at % 7).collect());
    all
}

/// The text, if the bytes are one.
fn text(bytes: &[u8]) -> Option<&str> {
    str::from_utf8(bytes).ok()
}
