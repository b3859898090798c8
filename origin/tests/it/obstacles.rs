//! What stands at a blob's path and is no blob, limits on files, and a root that is deleted under a running store.

use crate::support::{Node, binary, wait_for};
use castier_blob::Digest;
use castier_wire::blob_path;
use std::{fs, os::unix::fs::symlink, path::Path, process::Command, thread};

fn status(node: &Node, method: &str, digest: &Digest) -> u16 {
    node.ask(method, &blob_path(digest), &[], b"").status
}

#[test]
fn what_is_no_file_is_absent_and_an_upload_repairs_it() {
    let node = Node::start();
    type Obstacle = fn(&Path);
    let obstacles: [(&str, Obstacle); 5] = [
        ("an empty directory", |path| fs::create_dir(path).unwrap()),
        ("a directory", |path| {
            fs::create_dir(path).unwrap();
            fs::write(path.join("somebody's"), "data").unwrap();
        }),
        ("a pipe", |path| assert!(Command::new("mkfifo").arg(path).status().unwrap().success())),
        ("a link", |path| symlink("/etc/hostname", path).unwrap()),
        ("a link to nowhere", |path| symlink("/does/not/exist", path).unwrap()),
    ];
    for (name, make) in obstacles {
        let bytes = name.as_bytes();
        let digest = Digest::of(bytes);
        let path = node.file(&digest);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        make(&path);
        // Many at once: none of them waits for anybody to write into a pipe.
        thread::scope(|scope| {
            let asked: Vec<_> = (0..40)
                .map(|n| {
                    scope.spawn({
                        let node = &node;
                        move || status(node, if n % 2 == 0 { "GET" } else { "HEAD" }, &digest)
                    })
                })
                .collect();
            asked.into_iter().for_each(|asked| assert_eq!(asked.join().unwrap(), 404, "{name}"));
        });
        assert_eq!(node.put(bytes), 201, "{name}: {}", node.log());
        assert_eq!((status(&node, "HEAD", &digest), node.get(&digest).body), (200, bytes.to_vec()), "{name}");
        assert!(fs::symlink_metadata(&path).unwrap().is_file(), "{name}");
    }
    let aside = node.root.join("quarantine").join(format!("{}.directory-0", Digest::of(b"a directory")));
    assert_eq!(fs::read_to_string(aside.join("somebody's")).unwrap(), "data");
    assert_eq!(node.temp_files(), 0);
}

#[test]
fn a_limit_on_the_size_of_files_is_a_full_store() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("root");
    let mut command = Command::new("prlimit");
    command.arg("--fsize=100000:100000").arg(binary().get_program()).args(["--listen", "127.0.0.1:0", "--root"]).arg(&root);
    command.env("CASTIER_LISTEN__ADMIN", "127.0.0.1:0");
    let node = Node::run(command, &root);
    assert_eq!(node.put(&[7; 200_000]), 507);
    assert_eq!(node.put(&[7; 90_000]), 201);
    assert_eq!(node.temp_files(), 0);
}

#[test]
fn a_root_that_is_deleted_has_one_owner() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("root");
    let first = Node::at(&root, &[]);
    assert_eq!(first.put(b"before"), 201);
    fs::remove_dir_all(&root).unwrap();
    assert_eq!(first.get(&Digest::of(b"before")).status, 404);
    assert_eq!(first.put(b"after"), 201);
    assert_eq!(first.get(&Digest::of(b"after")).status, 200);
    // It is the first one's again.
    let mut second = binary();
    second.args(["--listen", "127.0.0.1:0", "--root"]).arg(&root).env("CASTIER_LISTEN__ADMIN", "127.0.0.1:0");
    let refused = second.output().unwrap();
    assert_eq!(refused.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("another process is using it"));
    // Deleted again, and taken by another before the first one notices.
    fs::remove_dir_all(&root).unwrap();
    let second = Node::at(&root, &[("CASTIER_ALLOW_DELETE", "true")]);
    assert_eq!(second.put(b"theirs"), 201);
    assert_eq!(first.put(b"not here"), 500);
    assert!(!second.file(&Digest::of(b"not here")).exists());
    wait_for("the first one to say so", || first.log().contains("another process has taken its place").then_some(()));
    assert_eq!(second.get(&Digest::of(b"theirs")).status, 200);
}

/// Directories that lead to a new root reach the disk before anything is acknowledged.
#[test]
fn a_fresh_roots_parents_are_synced() {
    let dir = tempfile::tempdir().unwrap();
    let (root, trace) = (dir.path().join("new/deep/root"), dir.path().join("trace"));
    let mut command = Command::new("strace");
    command.args(["-f", "-y", "-e", "trace=fsync", "-o"]).arg(&trace).arg(binary().get_program());
    command.args(["--listen", "127.0.0.1:0", "--root"]).arg(&root).env("CASTIER_LISTEN__ADMIN", "127.0.0.1:0");
    if Command::new("strace").arg("true").output().is_err() {
        println!("SKIPPED: strace is not installed");
        return;
    }
    let node = Node::run(command, &root);
    assert_eq!(node.put(b"x"), 201);
    // Each line begins with the process. That is no child of this one, and would outlive its tracer.
    let calls = wait_for("the trace", || {
        let calls = fs::read_to_string(&trace).unwrap();
        calls.contains(&format!("<{}>", dir.path().display())).then_some(calls)
    });
    let synced = calls.lines().rfind(|line| line.contains("fsync(")).unwrap();
    let traced = synced.split_whitespace().next().unwrap();
    assert!(Command::new("kill").args(["-s", "KILL", traced]).status().unwrap().success());
    for synced in ["new/deep/root", "new/deep", "new", ""] {
        let path = dir.path().join(synced);
        let path = path.to_str().unwrap().trim_end_matches('/');
        assert!(calls.lines().any(|line| line.contains("fsync(") && line.contains(&format!("<{path}>"))), "{path} in:\n{calls}");
    }
}
