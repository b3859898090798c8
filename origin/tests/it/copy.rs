//! `castier-origin copy` between directories. Buckets are in the tests of the protocols.

use crate::support::*;
use castier_blob::Digest;
use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

fn copy(from: &Path, to: &Path, more: &[&str]) -> Command {
    let mut command = binary();
    command.arg("copy").args([from, to]).args(more);
    command
}

fn run(mut command: Command) -> (Option<i32>, String, String) {
    let Output { status, stdout, stderr } = command.output().unwrap();
    (status.code(), String::from_utf8(stdout).unwrap(), String::from_utf8(stderr).unwrap())
}

fn file_of(root: &Path, digest: &Digest) -> PathBuf {
    let name = digest.to_string();
    root.join(&name[..2]).join(&name[2..4]).join(&name)
}

/// The blobs of a store. Each must match its name.
fn blobs(root: &Path) -> Vec<Digest> {
    let mut found = Vec::new();
    let is_fan = |path: &Path| path.file_name().is_some_and(|name| name.len() == 2);
    for a in fs::read_dir(root).into_iter().flatten().map(|entry| entry.unwrap().path()).filter(|path| is_fan(path)) {
        for b in fs::read_dir(a).unwrap().map(|entry| entry.unwrap().path()).filter(|path| is_fan(path)) {
            for file in fs::read_dir(b).unwrap().map(|entry| entry.unwrap().path()) {
                let digest: Digest = file.file_name().unwrap().to_str().unwrap().parse().unwrap();
                assert_eq!(Digest::of(&fs::read(file).unwrap()), digest);
                found.push(digest);
            }
        }
    }
    found
}

const ENTRIES: [&str; 4] = ["/kv/plain", "/kv/a%20b/%C3%A4/c~%25%23", "/kv/deep/er/and/deeper", "/kv/deep/er/and"];

#[test]
fn a_directory_is_copied_and_the_copy_is_a_store() {
    let source = Node::start();
    let bodies: Vec<_> = [0, 1, 70_000, 3 << 20].into_iter().map(|size| blob(size, 7 + size as u64)).collect();
    bodies.iter().for_each(|body| assert_eq!(source.put(body), 201));
    let action = format!("/team/ac/{}", Digest::of(b"action"));
    for name in ENTRIES.into_iter().chain([action.as_str()]) {
        assert_eq!(source.ask("PUT", name, &[], name.as_bytes()).status, 201, "{name}");
    }
    fs::write(source.root.join("README"), "x").unwrap();
    let dir = tempfile::tempdir().unwrap();
    let to = dir.path().join("made/on/the/way");

    let (code, out, err) = run(copy(&source.root, &to, &["--dry-run"]));
    assert_eq!((code, to.exists()), (Some(0), false), "{out}{err}");
    assert!(out.contains("would copy 4 blobs") && out.contains("and 5 entries; there already: 0 blobs"), "{out}");
    // The source is in use meanwhile.
    let (code, out, err) = run(copy(&source.root, &to, &[]));
    assert_eq!(code, Some(0), "{out}{err}");
    assert!(
        out.contains("copied 4 blobs") && out.contains("5 entries;") && out.contains("left alone: 1 (") && out.contains("README"),
        "{out}"
    );

    let copied = Node::at(&to, &[]);
    for body in &bodies {
        assert_eq!(copied.get(&Digest::of(body)).body, *body);
    }
    for name in ENTRIES.into_iter().chain([action.as_str()]) {
        assert_eq!(copied.ask("GET", name, &[], b"").body, name.as_bytes(), "{name}");
    }
    assert!(copied.ask("PROPFIND", "/kv/deep/er/", &["Depth: 1"], b"").status == 207);

    // It is in use now.
    let (code, _, err) = run(copy(&source.root, &to, &[]));
    assert!(code == Some(1) && err.contains("another process is using it") && err.contains("TO"), "{err}");
    // An entry that differs is replaced, whichever is newer. What is equal stays.
    assert_eq!(copied.ask("PUT", "/kv/plain", &[], b"newer").status, 200);
    drop(copied);
    let (code, out, err) = run(copy(&source.root, &to, &["--dry-run"]));
    assert!(code == Some(0) && out.contains("would copy 0 blobs (0 B) and 1 entries; there already: 4 blobs"), "{out}{err}");
    let (code, out, _) = run(copy(&source.root, &to, &[]));
    assert!(code == Some(0) && out.contains("copied 0 blobs (0 B) and 1 entries; there already: 4 blobs"), "{out}");
    assert_eq!(Node::at(&to, &[]).ask("GET", "/kv/plain", &[], b"").body, b"/kv/plain");
}

#[test]
fn a_corrupt_source_is_named_and_the_rest_is_copied() {
    let dir = tempfile::tempdir().unwrap();
    let (from, to) = (dir.path().join("from"), dir.path().join("to"));
    let source = Node::at(&from, &[]);
    let bodies: Vec<_> = (0..20).map(|n| blob(50_000 + 20_000 * (n % 2), 100 + n as u64)).collect();
    bodies.iter().for_each(|body| assert_eq!(source.put(body), 201));
    assert_eq!(source.ask("PUT", "/kv/good", &[], b"good").status, 201);
    assert_eq!(source.ask("PUT", "/kv/bad", &[], b"damaged").status, 201);
    drop(source);
    // A small one, one that is read in several pieces, one that is short.
    let damaged: Vec<_> = (0..3).map(|n| Digest::of(&bodies[n])).collect();
    for (n, digest) in damaged.iter().enumerate() {
        let mut bytes = fs::read(file_of(&from, digest)).unwrap();
        if n == 2 {
            bytes.truncate(100)
        } else {
            bytes[10] ^= 1
        }
        fs::write(file_of(&from, digest), bytes).unwrap();
    }
    let entries = Command::new("grep").args(["-rl", "damaged"]).arg(from.join("entries")).output().unwrap();
    let entry = String::from_utf8(entries.stdout).unwrap();
    let entry = Path::new(entry.trim());
    fs::write(entry, String::from_utf8_lossy(&fs::read(entry).unwrap()).replacen("damaged", "DAMAGED", 1)).unwrap();

    let (code, out, err) = run(copy(&from, &to, &[]));
    assert_eq!(code, Some(1), "{out}{err}");
    assert!(out.contains("copied 17 blobs") && out.contains("and 1 entries") && out.contains("not copied: 4 corrupt"), "{out}");
    for digest in &damaged {
        assert!(err.contains(&format!("blob {digest}: corrupt")), "{err}");
    }
    assert!(err.contains("entry /kv/bad: corrupt"), "{err}");
    let found = blobs(&to);
    assert!(found.len() == 17 && damaged.iter().all(|digest| !found.contains(digest)));
    // What is damaged stays where it is: the source is only read.
    assert!(damaged.iter().all(|digest| file_of(&from, digest).exists()) && entry.exists());
    assert_eq!(fs::read_dir(to.join("tmp")).unwrap().count(), 0);
}

#[test]
fn a_killed_copy_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let (from, to) = (dir.path().join("from"), dir.path().join("to"));
    let bodies: Vec<_> = (0..400).map(|n| blob(100_000, 1000 + n)).collect();
    for body in &bodies {
        let file = file_of(&from, &Digest::of(body));
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(file, body).unwrap();
    }
    let mut before = 0;
    for round in 0..3 {
        let mut child = copy(&from, &to, &["--jobs", "2"]).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let more = wait_for("some blobs are copied", || Some(blobs(&to).len()).filter(|count| *count >= before + 20));
        child.kill().unwrap();
        assert_eq!(child.wait().unwrap().code(), None, "round {round}: it was killed with {more} blobs");
        before = blobs(&to).len();
        assert!(before < bodies.len());
    }
    let (code, out, err) = run(copy(&from, &to, &[]));
    assert_eq!(code, Some(0), "{out}{err}");
    assert!(out.contains(&format!("copied {} blobs", 400 - before)) && out.contains(&format!("there already: {before} blobs")), "{out}");
    assert_eq!(blobs(&to).len(), 400);
    assert_eq!(fs::read_dir(to.join("tmp")).unwrap().count(), 0);
}

#[test]
fn wrong_usage_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let (from, to) = (dir.path().join("from"), dir.path().join("to"));
    fs::create_dir(&from).unwrap();
    let bad = dir.path().join("bad.toml");
    fs::write(&bad, "[store]\nkye = \"x\"\n").unwrap();
    let inside = from.join("inside");
    let unwritable = Path::new("/proc/no/such");
    for (from, to, more, code, named) in [
        (&*from, &*from, &[][..], 2, "one store"),
        (&*from, &*inside, &[], 2, "one store"),
        (&*from, &*to, &["--jobs", "0"], 2, "--jobs"),
        (&*from, &*to, &["--to-config", bad.to_str().unwrap()], 2, "store.kye"),
        (&*from, Path::new("http://127.0.0.1:1"), &[], 2, "is no bucket"),
        (Path::new("s3://b/x"), Path::new("s3://b/x/y"), &[], 2, "one store"),
        (&*to, &*from, &[], 1, "is no directory"),
        (&*from, unwritable, &[], 1, "/proc/no/such"),
    ] {
        let (got, out, err) = run(copy(from, to, more));
        assert!(got == Some(code) && err.contains(named), "{from:?} {to:?} {more:?}: {got:?} {out}{err}");
    }
    // No store at all.
    fs::create_dir_all(from.join("origin")).unwrap();
    let (code, _, err) = run(copy(&from, &to, &[]));
    assert!(code == Some(1) && err.contains("no blob and no entry"), "{err}");
}
