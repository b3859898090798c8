//! `castier-origin copy` from and to buckets.

use super::{MIB, Weed, castier_origin};
use crate::support::{Ran, Request, Response, Running, castier_program, command, eventually, noise, run, sha256, turn};
use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Command,
};

fn program() -> PathBuf {
    castier_program().with_file_name("castier-origin")
}

/// A castier-origin over a directory.
fn origin(dir: &Path, root: &str) -> (Running, SocketAddr) {
    let (origin, address, _) = castier_origin(dir, "", |command| {
        command.args(["--root", root]);
    });
    (origin, address)
}

impl Weed {
    /// A file for `--from-config` or `--to-config`.
    fn store_config(&self, name: &str, key: &str, template: &str) -> PathBuf {
        let file = self.dir.path().join(name);
        let secret = self.dir.path().join("secret");
        let text = format!(
            "store.key = \"{template}\"\n[store.s3]\nendpoint = \"{}\"\naccess_key_id = \"{key}\"\nsecret_access_key_file = \"{}\"\n",
            self.proxy.url(),
            secret.display()
        );
        fs::write(&file, text).unwrap();
        file
    }

    fn copy(&self, from: &str, to: &str, from_config: Option<&Path>, to_config: Option<&Path>, more: &[&str]) -> Command {
        let mut copy = command(program(), self.dir.path());
        copy.args(["copy", from, to]).args(more);
        for (option, file) in [("--from-config", from_config), ("--to-config", to_config)] {
            copy.args(file.iter().flat_map(|file| [option.as_ref(), file.as_os_str()]));
        }
        copy
    }
}

const DEFAULT: &str = "cas/{sha256:2}/{sha256}";
const NAMES: [&str; 4] = ["/kv/plain", "/kv/a%20b/%C3%A4/c~%25%23", "/kv/deep/er/and/deeper", "/kv/deep/er/and"];

#[track_caller]
fn ends(ran: &Ran, code: i32, says: &[&str]) {
    assert!(ran.status.code() == Some(code) && says.iter().all(|text| ran.said().contains(text)), "{says:?}: {ran}");
}

/// Directory to bucket, bucket to bucket with another layout, bucket to directory: in the end all is there.
#[test]
fn stores_are_moved_from_and_to_buckets() {
    let _turn = turn();
    let Some(weed) = Weed::start() else { return };
    let dir = weed.dir.path().to_owned();
    let bodies: Vec<_> = [0, 1, 70_000, 17 * MIB, 40 * MIB].into_iter().map(|size| noise(400 + size as u64, size)).collect();
    let action = format!("/team/ac/{}", sha256(b"action"));
    let (running, address) = origin(&dir, "first");
    for body in &bodies {
        assert_eq!(Request::new("PUT", &format!("/cas/{}", sha256(body))).body(body.clone()).send(address).status, 201);
    }
    for name in NAMES.into_iter().chain([action.as_str()]) {
        assert_eq!(Request::new("PUT", name).body(name).send(address).status, 201);
    }
    let (one, two) =
        (weed.store_config("one.toml", super::KEY, DEFAULT), weed.store_config("two.toml", super::KEY, "{sha256:2}/{sha256:2:64}"));
    // A dry run only asks.
    weed.take();
    let dry = run(&mut weed.copy("first", "s3://blobs/one", None, Some(&one), &["--dry-run"]));
    ends(&dry, 0, &["would copy 4 blobs", "and 5 entries; there already: 1 blobs (0 B)"]);
    assert!(weed.proxy.take().iter().all(|seen| ["GET", "HEAD"].contains(&seen.method.as_str())), "{}", weed.proxy.history());
    ends(&run(&mut weed.copy("first", "s3://blobs/one", None, Some(&one), &[])), 0, &["copied 4 blobs", "and 5 entries;"]);
    drop(running);
    // Others use the bucket, too.
    assert_eq!(weed.curl("PUT", "/blobs/one/report.txt", b"x").0, 200);
    ends(
        &run(&mut weed.copy("s3://blobs/one", "s3://blobs/two", Some(&one), Some(&two), &["--jobs", "3"])),
        0,
        &["copied 4 blobs", "and 5 entries;", "left alone: 1 (\"one/report.txt\")"],
    );
    let digest = sha256(&bodies[2]);
    assert_eq!(weed.curl("GET", &format!("/blobs/two/{}/{}", &digest[..2], &digest[2..]), b""), (200, bodies[2].clone()));
    ends(&run(&mut weed.copy("s3://blobs/two", "second", Some(&two), None, &[])), 0, &["copied 4 blobs", "and 5 entries;"]);
    let (_running, address) = origin(&dir, "second");
    for body in &bodies {
        assert!(Request::get(&format!("/cas/{}", sha256(body))).send(address).body == *body, "{}", body.len());
    }
    for name in NAMES.into_iter().chain([action.as_str()]) {
        assert_eq!(Request::get(name).send(address).text(), name);
    }
    // Once more, there is nothing to do: a blob costs one HEAD.
    weed.take();
    ends(&run(&mut weed.copy("second", "s3://blobs/two", None, Some(&two), &[])), 0, &["copied 0 blobs (0 B) and 0 entries"]);
    let asked = weed.take();
    assert_eq!(asked.iter().filter(|line| line.starts_with("HEAD")).count(), 4, "{asked:?}");
    assert!(!asked.iter().any(|line| line.starts_with("PUT") || line.starts_with("POST")), "{asked:?}");
    // An entry at the destination that differs is replaced, and an object of another size too.
    assert_eq!(weed.curl("PUT", "/blobs/two/kv/plain", b"newer").0, 200);
    assert_eq!(weed.curl("PUT", &format!("/blobs/two/{}/{}", &digest[..2], &digest[2..]), b"short").0, 200);
    ends(&run(&mut weed.copy("second", "s3://blobs/two", None, Some(&two), &[])), 0, &["copied 1 blobs", "and 1 entries;"]);
    assert_eq!(weed.curl("GET", "/blobs/two/kv/plain", b""), (200, b"/kv/plain".to_vec()));
    assert_eq!(weed.curl("GET", &format!("/blobs/two/{}/{}", &digest[..2], &digest[2..]), b""), (200, bodies[2].clone()));
}

#[test]
fn corrupt_objects_are_named_and_not_copied() {
    let _turn = turn();
    let Some(weed) = Weed::start() else { return };
    let config = weed.store_config("store.toml", super::KEY, DEFAULT);
    let bodies: Vec<_> = (0..6).map(|n| noise(500 + n, if n % 2 == 0 { 1000 } else { 300_000 })).collect();
    for (n, body) in bodies.iter().enumerate() {
        let digest = sha256(body);
        let mut stored = body.clone();
        if n < 2 {
            stored[500] ^= 1;
        }
        assert_eq!(weed.curl("PUT", &format!("/blobs/a/cas/{}/{digest}", &digest[..2]), &stored).0, 200);
    }
    for to in ["s3://blobs/b", "directory"] {
        let to_config = Some(&*config).filter(|_| to.starts_with("s3"));
        let ran = run(&mut weed.copy("s3://blobs/a", to, Some(&config), to_config, &[]));
        ends(&ran, 1, &["copied 4 blobs", "not copied: 2 corrupt", &sha256(&bodies[0]), &sha256(&bodies[1])]);
        // Nothing is tried again that is there.
        let ran = run(&mut weed.copy("s3://blobs/a", to, Some(&config), to_config, &[]));
        ends(&ran, 1, &["copied 0 blobs", "there already: 4 blobs", "not copied: 2 corrupt"]);
    }
    for body in &bodies[..2] {
        let digest = sha256(body);
        assert_eq!(weed.curl("GET", &format!("/blobs/b/cas/{}/{digest}", &digest[..2]), b"").0, 404);
    }
}

#[test]
fn a_killed_copy_to_a_bucket_goes_on() {
    let _turn = turn();
    let Some(weed) = Weed::start() else { return };
    let config = weed.store_config("store.toml", super::KEY, DEFAULT);
    let root = weed.dir.path().join("root");
    let bodies: Vec<_> = (0..60).map(|n| noise(600 + n, if n % 20 == 0 { 20 * MIB } else { 200_000 })).collect();
    for body in &bodies {
        let digest = sha256(body);
        let dir = root.join(&digest[..2]).join(&digest[2..4]);
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join(&digest), body).unwrap();
    }
    let is_put = |seen: &crate::support::Seen| seen.method == "PUT";
    for _ in 0..2 {
        weed.take();
        let mut copying = Running::start(&mut weed.copy("root", "s3://blobs", None, Some(&config), &["--jobs", "2"]));
        eventually("some blobs are on their way", || (weed.proxy.count(is_put) >= 8).then_some(()));
        copying.kill();
    }
    // All that is there is whole.
    let is_whole = |body: &Vec<u8>| {
        let digest = sha256(body);
        let (status, got) = weed.curl("GET", &format!("/blobs/cas/{}/{digest}", &digest[..2]), b"");
        assert!(status == 404 || got == *body, "{status}");
        status == 200
    };
    let before = bodies.iter().filter(|body| is_whole(body)).count();
    assert!((1..60).contains(&before), "{before}");
    let ran = run(&mut weed.copy("root", "s3://blobs", None, Some(&config), &[]));
    ends(&ran, 0, &[&format!("there already: {before} blobs"), &format!("copied {} blobs", 60 - before)]);
    assert!(bodies.iter().all(is_whole));
}

#[test]
fn faults_that_pass_do_not_end_a_copy_and_refusals_do() {
    let _turn = turn();
    let Some(weed) = Weed::start() else { return };
    let config = weed.store_config("store.toml", super::KEY, DEFAULT);
    let body = noise(700, 3 * MIB);
    let digest = sha256(&body);
    assert_eq!(weed.curl("PUT", &format!("/blobs/a/cas/{}/{digest}", &digest[..2]), &body).0, 200);
    assert_eq!(weed.curl("PUT", "/blobs/a/kv/x", b"x").0, 200);
    // The list, the transfer of the blob and the upload break once each.
    let broken = std::sync::Mutex::new(std::collections::HashSet::new());
    let (whole, name) = (body.clone(), digest.clone());
    weed.proxy.intercept(move |request| {
        let kind = match (request.method.as_str(), request.target.contains(&name)) {
            ("GET", false) if request.target.contains("list-type") => "list",
            ("GET", true) => "get",
            ("PUT", _) => "put",
            _ => return None,
        };
        let answer = || match kind {
            "get" => super::object(&whole[..MIB]).with("Content-Length", &whole.len().to_string()).with("Connection", "close"),
            _ => Response::new(500).body("<Error><Code>InternalError</Code></Error>"),
        };
        broken.lock().unwrap().insert(kind).then(answer)
    });
    ends(&run(&mut weed.copy("s3://blobs/a", "s3://blobs/b", Some(&config), Some(&config), &[])), 0, &["copied 1 blobs", "and 1 entries"]);
    weed.proxy.intercept(|_| None);
    assert_eq!(weed.curl("GET", &format!("/blobs/b/cas/{}/{digest}", &digest[..2]), b""), (200, body));

    let nobody = weed.store_config("nobody.toml", "nobody", DEFAULT);
    let reader = weed.store_config("reader.toml", "reader", DEFAULT);
    for (from, to, says) in [
        (&nobody, &config, ["FROM", "InvalidAccessKeyId"]),
        (&config, &nobody, ["TO", "InvalidAccessKeyId"]),
        (&config, &reader, ["TO", "AccessDenied"]),
    ] {
        ends(&run(&mut weed.copy("s3://blobs/a", "s3://blobs/c", Some(from), Some(to), &[])), 1, &says);
    }
    ends(&run(&mut weed.copy("s3://none", "x", Some(&config), None, &[])), 1, &["FROM", "NoSuchBucket"]);
}
