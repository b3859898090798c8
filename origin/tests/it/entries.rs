//! Entries: what is stored under a key that the client chose. `/ac`, `/kv`, and instances.

use crate::support::*;
use castier_blob::Digest;
use castier_wire::blob_path;
use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    thread,
};

fn key(seed: u64) -> String {
    Digest::of(&seed.to_le_bytes()).to_string()
}

/// Every regular file below a directory.
fn files(dir: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(dir) else { return Vec::new() };
    let paths = entries.map(|entry| entry.unwrap().path());
    paths.flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] }).collect()
}

/// The file of the only entry whose bytes are these.
fn file_of(node: &Node, bytes: &[u8]) -> PathBuf {
    let mut found = files(&node.root.join("entries")).into_iter().filter(|path| fs::read(path).unwrap().starts_with(bytes));
    let file = found.next().expect("the entry has a file");
    assert_eq!(found.next(), None);
    file
}

#[test]
fn the_last_put_wins() {
    let node = Node::start();
    for path in [format!("/ac/{}", key(1)), format!("/team/ac/{}", key(1)), "/kv/a/b".to_owned(), "/kv/%C3%A4%20b".to_owned()] {
        node.ask("GET", &path, &[], b"").problem(404);
        assert_eq!(node.ask("HEAD", &path, &[], b"").status, 404, "{path}");
        node.ask("DELETE", &path, &[], b"").problem(404);
        for (bytes, status) in [(&b"one"[..], 201), (b"two, longer", 200), (b"", 200), (b"two, longer", 200)] {
            let etag = Digest::of(bytes).etag();
            let put = node.ask("PUT", &path, &[], bytes);
            assert_eq!((put.status, put.header("etag")), (status, etag.as_str()), "{path}");
            for method in ["GET", "HEAD"] {
                let answer = node.ask(method, &path, &[], b"");
                assert_eq!((answer.status, answer.complete), (200, true), "{method} {path}");
                assert_eq!(answer.body, if method == "GET" { bytes } else { b"" }, "{method} {path}");
                for (name, value) in [
                    ("content-type", "application/octet-stream"),
                    ("content-length", &bytes.len().to_string()),
                    ("etag", &etag),
                    ("cache-control", "no-cache"),
                    ("accept-ranges", "bytes"),
                    ("x-content-type-options", "nosniff"),
                ] {
                    assert_eq!(answer.header(name), value, "{method} {path} {name}");
                }
            }
        }
        let etag = Digest::of(b"two, longer").etag();
        let weak = format!("If-None-Match: W/{etag}");
        for (headers, status, body) in [
            (vec![format!("If-None-Match: {etag}")], 304, &b""[..]),
            (vec![weak], 304, b""),
            (vec!["If-None-Match: *".to_owned()], 304, b""),
            (vec![format!("If-None-Match: {}", Digest::of(b"one").etag())], 200, b"two, longer"),
            (vec!["Range: bytes=5-".to_owned()], 206, b"longer"),
            (vec!["Range: bytes=-6".to_owned(), format!("If-Range: {etag}")], 206, b"longer"),
            (vec!["Range: bytes=-6".to_owned(), "If-Range: \"other\"".to_owned()], 200, b"two, longer"),
        ] {
            let headers: Vec<_> = headers.iter().map(String::as_str).collect();
            let answer = node.ask("GET", &path, &headers, b"");
            assert_eq!((answer.status, &answer.body[..]), (status, body), "{path} {headers:?}");
            assert_eq!((answer.header("etag"), answer.header("cache-control")), (etag.as_str(), "no-cache"), "{path} {headers:?}");
        }
        node.ask("GET", &path, &["Range: bytes=11-"], b"").problem(416);
        assert_eq!(node.ask("DELETE", &path, &[], b"").status, 204);
        node.ask("GET", &path, &[&format!("If-None-Match: {etag}")], b"").problem(404);
        assert_eq!(node.ask("PUT", &path, &[], b"again").status, 201);
    }
    assert_eq!((node.temp_files(), node.metric("castier_origin_blobs")), (0, 0.0));
}

#[test]
fn conditions_on_a_put_hold_or_nothing_changes() {
    let node = Node::start();
    let path = format!("/ac/{}", key(2));
    let (one, two) = (Digest::of(b"one").etag(), Digest::of(b"two").etag());
    let put = |header: String, bytes: &[u8]| node.ask("PUT", &path, &[&header], bytes);
    put("If-Match: *".into(), b"one").problem(412);
    assert_eq!(put("If-None-Match: *".into(), b"one").status, 201);
    put("If-None-Match: *".into(), b"two").problem(412);
    put(format!("If-Match: {two}"), b"two").problem(412);
    // Comparison is strong for If-Match.
    put(format!("If-Match: W/{one}"), b"two").problem(412);
    assert_eq!(node.ask("GET", &path, &[], b"").body, b"one");
    assert_eq!(put(format!("If-Match: \"x\", {one}"), b"two").status, 200);
    node.ask("DELETE", &path, &[&format!("If-Match: {one}")], b"").problem(412);
    assert_eq!(node.ask("DELETE", &path, &[&format!("If-Match: {two}")], b"").status, 204);
}

#[test]
fn instances_have_entries_of_their_own_and_share_the_blobs() {
    let node = Node::start();
    let (bytes, key) = (blob(1000, 3), key(3));
    let digest = Digest::of(&bytes);
    let put = node.ask("PUT", &format!("/team{}", blob_path(&digest)), &[], &bytes);
    assert_eq!((put.status, put.header("location")), (201, blob_path(&digest).as_str()));
    for instance in ["", "/team", "/other"] {
        assert_eq!(node.ask("GET", &format!("{instance}{}", blob_path(&digest)), &[], b"").body, bytes, "{instance}");
        node.ask("GET", &format!("{instance}/ac/{key}"), &[], b"").problem(404);
        assert_eq!(node.ask("PUT", &format!("{instance}/ac/{key}"), &[], instance.as_bytes()).status, 201);
    }
    for instance in ["", "/team", "/other"] {
        assert_eq!(node.ask("GET", &format!("{instance}/ac/{key}"), &[], b"").body, instance.as_bytes());
    }
}

#[test]
fn what_names_nothing_is_refused() {
    let node = Node::with(&[("CASTIER_LIMITS__MAX_ENTRY", "1000")]);
    let long = "a".repeat(513);
    let key = key(4);
    for method in ["GET", "PUT", "DELETE"] {
        for (path, status) in [
            ("/ac", 400),
            ("/ac/", 400),
            ("/ac/nokey", 400),
            (&format!("/ac/{}", key.to_uppercase()), 400),
            (&format!("/ac/{key}/x"), 400),
            ("/team/ac/nokey", 400),
            ("/team/cas/nodigest", 400),
            (&format!("/a/b/ac/{key}"), 404),
            (&format!("/v2/ac/{key}"), 404),
            ("/kv/a//b", 400),
            ("/kv/../lock", 400),
            ("/kv/a/%2e%2e/b", 400),
            ("/kv/a%2Fb", 400),
            ("/kv/a%00b", 400),
            ("/kv/a%", 400),
            ("/kv/%ff", 400),
            (&format!("/kv/{long}"), 400),
        ] {
            node.ask(method, path, &[], b"").problem(status);
        }
    }
    for (method, path, allow) in [
        ("POST", format!("/ac/{key}"), "GET, HEAD, PUT, DELETE"),
        ("PROPFIND", format!("/ac/{key}"), "GET, HEAD, PUT, DELETE"),
        ("POST", "/kv/a".into(), "GET, HEAD, PUT, DELETE, PROPFIND, MKCOL"),
        ("GET", "/kv/a/".into(), "PROPFIND, MKCOL"),
        ("PUT", "/kv/a/".into(), "PROPFIND, MKCOL"),
        ("GET", "/kv".into(), "PROPFIND, MKCOL"),
    ] {
        let answer = node.ask(method, &path, &[], b"");
        answer.problem(405);
        assert_eq!(answer.header("allow"), allow, "{method} {path}");
    }
    let path = format!("/ac/{key}");
    assert_eq!(node.ask("PUT", &path, &[], &blob(1000, 4)).status, 201);
    node.ask("PUT", &path, &[], &blob(1001, 4)).problem(413);
    let chunks = [&b"3e9\r\n"[..], &blob(1001, 4), b"\r\n0\r\n\r\n"].concat();
    node.ask("PUT", &path, &["Transfer-Encoding: chunked"], &chunks).problem(413);
    assert!(node.ask("GET", &path, &[], b"").body == blob(1000, 4), "a refused PUT changes nothing");
    assert_eq!(node.temp_files(), 0);
    assert_eq!(node.metric("castier_origin_requests_total{code=\"405\",method=\"PROPFIND\"}"), 1.0);
}

/// Names that file systems would confuse, cut off or refuse.
#[test]
fn every_name_is_an_entry_of_its_own() {
    let node = Node::start();
    let long = ["a".repeat(512), format!("{}b", "a".repeat(511)), "%C3%A4".repeat(512), "x/".repeat(255) + "yz"];
    let names =
        ["a", "A", "a/b", "a/b/c", "A/b", "a.", "a%20", "%20a", "...", "a%5Cb", "%C3%A4", "a%CC%88", "COM1", "-", "a%25", "%25a", "a?q"];
    // A query is no part of a name.
    let names: Vec<_> = names.iter().map(ToString::to_string).filter(|name| !name.contains('?')).chain(long).collect();
    for name in &names {
        assert_eq!(node.ask("PUT", &format!("/kv/{name}"), &[], name.as_bytes()).status, 201, "{name}");
    }
    for name in &names {
        assert_eq!(node.ask("GET", &format!("/kv/{name}"), &[], b"").body, name.as_bytes());
        assert_eq!(node.ask("GET", &format!("/kv/{name}?query"), &[], b"").body, name.as_bytes());
    }
    // Two spellings of one name.
    assert_eq!(node.ask("GET", "/kv/%61/%62", &[], b"").body, b"a/b");
}

/// Many writers, readers and deleters of one key: a reader has one whole version or none.
#[test]
fn a_reader_has_one_whole_version() {
    let node = Node::start();
    for path in [format!("/ac/{}", key(5)), "/kv/x/y".to_owned()] {
        // Over a chunk, so that what is read is on its way while others write.
        let versions: Vec<_> = (0..4).map(|i| blob(400_000 + 50_000 * i, 50 + i as u64)).collect();
        let (done, whole) = (AtomicBool::new(false), AtomicU64::new(0));
        thread::scope(|scope| {
            let writers: Vec<_> = versions
                .iter()
                .map(|bytes| {
                    let (node, path) = (&node, &path);
                    scope.spawn(move || {
                        for round in 0..10 {
                            assert!(matches!(node.ask("PUT", path, &[], bytes).status, 200 | 201));
                            if round % 3 == 2 {
                                assert!(matches!(node.ask("DELETE", path, &[], b"").status, 204 | 404));
                            }
                        }
                    })
                })
                .collect();
            for _ in 0..3 {
                scope.spawn(|| {
                    while !done.load(Relaxed) {
                        let answer = node.ask("GET", &path, &[], b"");
                        if answer.status == 404 {
                            continue;
                        }
                        assert!(answer.status == 200 && answer.complete && versions.contains(&answer.body), "{}", answer.status);
                        assert_eq!(answer.header("etag"), Digest::of(&answer.body).etag());
                        whole.fetch_add(1, Relaxed);
                    }
                });
            }
            writers.into_iter().for_each(|writer| writer.join().unwrap());
            wait_for("a reader has read", || {
                node.ask("PUT", &path, &[], &versions[0]);
                (whole.load(Relaxed) > 0).then_some(())
            });
            done.store(true, Relaxed);
        });
        assert_eq!(node.temp_files(), 0);
    }
}

#[test]
fn entries_outlive_the_process() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("root");
    let mut node = Node::at(&root, &[]);
    let paths = [format!("/ac/{}", key(6)), format!("/team/ac/{}", key(6)), "/kv/a/b/c".to_owned()];
    for path in &paths {
        assert_eq!(node.ask("PUT", path, &[], path.as_bytes()).status, 201);
    }
    node.signal("KILL");
    node.exit();
    let node = Node::at(&root, &[]);
    for path in &paths {
        assert_eq!(node.ask("GET", path, &[], b"").body, path.as_bytes());
        assert_eq!(node.ask("PUT", path, &[], b"new").status, 200);
    }
    // Directories that somebody removed under the running store come back.
    fs::remove_dir_all(node.root.join("entries/kv")).unwrap();
    fs::remove_dir_all(node.root.join("entries/ac")).unwrap();
    for path in &paths {
        node.ask("GET", path, &[], b"").problem(404);
        assert_eq!(node.ask("PUT", path, &[], path.as_bytes()).status, 201);
        assert_eq!(node.ask("GET", path, &[], b"").body, path.as_bytes());
    }
    assert_eq!(names_in(&node, "/kv/a/"), ["/kv/a/", "/kv/a/b/"]);
}

#[test]
fn rot_is_found_set_aside_and_healed() {
    let node = Node::start();
    let (small, large) = (blob(1000, 7), blob(600_000, 8));
    for (path, bytes) in [("/kv/small".to_owned(), &small), (format!("/ac/{}", key(7)), &large)] {
        type Spoil = fn(&Path, usize);
        let spoil: [Spoil; 6] = [
            // A byte of the entry, and of what stands behind it.
            |file, _| flip(file, 500),
            |file, size| flip(file, size + 1),
            |file, _| flip(file, fs::metadata(file).unwrap().len() as usize - 1),
            |file, size| fs::File::options().write(true).open(file).unwrap().set_len(size as u64 / 2).unwrap(),
            |file, _| {
                fs::remove_file(file).unwrap();
                symlink("/etc/passwd", file).unwrap();
            },
            |file, _| {
                fs::remove_file(file).unwrap();
                fs::create_dir(file).unwrap();
                fs::write(file.join("x"), "x").unwrap();
            },
        ];
        for (i, spoil) in spoil.into_iter().enumerate() {
            assert_eq!(node.ask("PUT", &path, &[], bytes).status, 201, "{i}");
            spoil(&file_of(&node, bytes), bytes.len());
            let answer = node.ask("GET", &path, &[], b"");
            if answer.status == 200 {
                assert!(!answer.complete && i == 0 && bytes.len() > 300_000, "{i}: wrong bytes came to their end");
            } else {
                answer.problem(500);
            }
            wait_for("it is set aside", || (node.ask("GET", &path, &[], b"").status == 404).then_some(()));
            assert_eq!(node.ask("PUT", &path, &[], bytes).status, 201, "{i}");
            assert!(node.ask("GET", &path, &[], b"").body == *bytes, "{i}");
            assert_eq!(node.ask("DELETE", &path, &[], b"").status, 204);
        }
    }
    assert_eq!(node.metric("castier_origin_corrupt_blobs_total"), 12.0);
    // A PUT heals what nobody has read, too.
    assert_eq!(node.ask("PUT", "/kv/small", &[], &small).status, 201);
    let file = file_of(&node, &small);
    fs::remove_file(&file).unwrap();
    fs::create_dir(&file).unwrap();
    assert_eq!(node.ask("PUT", "/kv/small", &[], &small).status, 201);
    assert_eq!(node.ask("GET", "/kv/small", &[], b"").body, small);
}

fn flip(file: &Path, at: usize) {
    let mut bytes = fs::read(file).unwrap();
    bytes[at] ^= 1;
    fs::write(file, bytes).unwrap();
}

fn propfind(node: &Node, path: &str, depth: &str) -> Answer {
    let body = br#"<?xml version="1.0" encoding="utf-8" ?><D:propfind xmlns:D="DAV:"><D:allprop/></D:propfind>"#;
    let answer = ask(node.clients, "PROPFIND", path, &[&format!("Depth: {depth}"), &format!("Content-Length: {}", body.len())], body);
    if answer.status == 207 {
        assert_eq!(answer.header("content-type"), "application/xml; charset=utf-8");
    }
    answer
}

/// The paths in a list, the first as it came and the others in order.
fn names_in(node: &Node, path: &str) -> Vec<String> {
    let answer = propfind(node, path, "1");
    assert_eq!(answer.status, 207, "{path}");
    let text = String::from_utf8(answer.body).unwrap();
    let mut names: Vec<_> = text.split("<D:href>").skip(1).map(|rest| rest.split('<').next().unwrap().to_owned()).collect();
    names[1..].sort();
    names
}

#[test]
fn webdav_clients_find_what_they_need() {
    let node = Node::start();
    // As sccache does: what is not there is made, level by level.
    propfind(&node, "/kv/team/a/", "0").problem(404);
    for (path, status) in [("/kv/team/", 201), ("/kv/team/a/", 201), ("/kv/team", 405), ("/kv/team/", 405), ("/kv/", 405), ("/kv", 405)] {
        assert_eq!(node.ask("MKCOL", path, &[], b"").status, status, "{path}");
    }
    ask(node.clients, "MKCOL", "/kv/body/", &["Content-Length: 1"], b"x").problem(415);
    let text = String::from_utf8(propfind(&node, "/kv/team/a/", "0").body).unwrap();
    assert!(text.starts_with("<?xml version=\"1.0\" encoding=\"utf-8\"?><D:multistatus xmlns:D=\"DAV:\"><D:response>"), "{text}");
    for part in ["<D:href>/kv/team/a/</D:href>", "<D:collection/>", "<D:status>HTTP/1.1 200 OK</D:status>", " GMT</D:getlastmodified>"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert!(text.ends_with("</D:response></D:multistatus>"), "{text}");

    // A PUT makes the collections that it needs.
    for name in ["team/a/one", "team/a/t%20wo&amp", "team/b/c/three", "team/a", "x"] {
        assert_eq!(node.ask("PUT", &format!("/kv/{name}"), &[], name.as_bytes()).status, 201);
    }
    assert_eq!(names_in(&node, "/kv"), ["/kv/", "/kv/team/", "/kv/x"]);
    assert_eq!(names_in(&node, "/kv/team/"), ["/kv/team/", "/kv/team/a", "/kv/team/a/", "/kv/team/b/"]);
    assert_eq!(names_in(&node, "/kv/team/a/"), ["/kv/team/a/", "/kv/team/a/one", "/kv/team/a/t%20wo%26amp"]);
    assert_eq!(names_in(&node, "/kv/team/b"), ["/kv/team/b/", "/kv/team/b/c/"]);
    // Where both have the name, the entry is meant.
    let text = String::from_utf8(propfind(&node, "/kv/team/a", "1").body).unwrap();
    let etag = Digest::of(b"team/a").etag().replace('"', "&quot;");
    for part in ["<D:href>/kv/team/a</D:href>", "<D:resourcetype/>", "<D:getcontentlength>6</D:getcontentlength>", etag.trim_matches('"')] {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert_eq!(text.matches("<D:response>").count(), 1);
    assert_eq!(node.ask("MKCOL", "/kv/x", &[], b"").status, 405);

    // What is gone is listed no more, and its collection stays.
    assert_eq!(node.ask("DELETE", "/kv/team/b/c/three", &[], b"").status, 204);
    assert_eq!(names_in(&node, "/kv/team/b/c/"), ["/kv/team/b/c/"]);
    propfind(&node, "/kv/none", "0").problem(404);
    propfind(&node, "/kv/", "infinity").problem(403);
    node.ask("PROPFIND", "/kv/", &[], b"").problem(403);
    propfind(&node, "/kv/a//", "0").problem(400);
}

/// A list of any length takes no more memory than a chunk: it is sent as it is read.
#[test]
fn a_long_list_is_sent_as_it_is_read() {
    let node = Node::start();
    let name = |i: u64| format!("{i:04}{}", "%C3%A4".repeat(200));
    for i in 0..300 {
        assert_eq!(node.ask("PUT", &format!("/kv/long/{}", name(i)), &[], b"x").status, 201);
    }
    // In HTTP/1.0 the connection's end is the list's.
    let mut stream = connect(node.clients);
    std::io::Write::write_all(&mut stream, b"PROPFIND /kv/long/ HTTP/1.0\r\nDepth: 1\r\n\r\n").unwrap();
    let mut text = String::new();
    std::io::Read::read_to_string(&mut stream, &mut text).unwrap();
    assert!(text.starts_with("HTTP/1.0 207 ") && text.ends_with("</D:multistatus>"), "{}", &text[..200]);
    assert!(text.len() > 300_000, "longer than a chunk: {}", text.len());
    for i in 0..300 {
        assert!(text.contains(&format!("<D:href>/kv/long/{}</D:href>", name(i))), "{i}");
    }
}

/// An `ActionResult` with one output file.
fn action_result(digest: &str, size: u64) -> Vec<u8> {
    let field = |tag: u8, bytes: &[u8]| [&[tag << 3 | 2, u8::try_from(bytes.len()).unwrap()], bytes].concat();
    let named = [field(1, digest.as_bytes()), vec![2 << 3, u8::try_from(size).unwrap()]].concat();
    field(2, &[field(1, b"out.txt"), field(2, &named)].concat())
}

#[test]
fn an_action_is_absent_with_its_blobs() {
    let bytes = blob(100, 9);
    let digest = Digest::of(&bytes);
    let path = format!("/ac/{}", key(9));
    for validates in ["false", "true"] {
        let node = Node::with(&[("CASTIER_AC_VALIDATION", validates), ("CASTIER_ALLOW_DELETE", "true")]);
        let entry = action_result(&digest.to_string(), 100);
        let missing = if validates == "true" { 404 } else { 200 };
        assert_eq!(node.ask("PUT", &path, &[], &entry).status, 201);
        assert_eq!(node.ask("PUT", "/kv/entry", &[], &entry).status, 201);
        assert_eq!(node.ask("GET", &path, &[], b"").status, missing);
        let etag = format!("If-None-Match: {}", Digest::of(&entry).etag());
        assert_eq!(node.ask("GET", &path, &[&etag], b"").status, if missing == 404 { 404 } else { 304 });
        assert_eq!(node.ask("GET", "/kv/entry", &[], b"").body, entry, "only the action cache is looked into");
        assert_eq!(node.put(&bytes), 201);
        assert_eq!(node.ask("GET", &path, &[], b"").body, entry);
        assert_eq!(node.ask("HEAD", &path, &[], b"").status, 200);
        assert_eq!(node.ask("DELETE", &blob_path(&digest), &[], b"").status, 204);
        assert_eq!(node.ask("HEAD", &path, &[], b"").status, missing);
        // What ccache keeps there is no ActionResult.
        for other in [&b"\xcc\xac\x01\x00\x01\x01\x01"[..], b"", &action_result("sha1", 4)] {
            assert_eq!(node.ask("PUT", &path, &[], other).status, 200);
            assert_eq!(node.ask("GET", &path, &[], b"").body, other);
        }
    }
}
