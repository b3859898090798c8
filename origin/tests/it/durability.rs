//! What is on the disk: rot, full disks, crashes.

use crate::support::*;
use castier_blob::Digest;
use castier_wire::blob_path;
use std::{
    collections::HashSet,
    fs,
    io::{BufReader, Write as _},
    net::TcpStream,
    path::{Path, PathBuf},
    process::Command,
    sync::Mutex,
    thread,
};

const CORRUPT: &str = "castier_origin_corrupt_blobs_total";

fn flip_byte(file: &Path, at: usize) {
    let mut bytes = fs::read(file).unwrap();
    bytes[at] ^= 1;
    fs::write(file, bytes).unwrap();
}

#[test]
fn rot_is_cut_counted_set_aside_and_healed() {
    let node = Node::start();
    let big = blob(3_000_000, 20);
    let digest = Digest::of(&big);
    for (round, at) in [0, 1_500_000, 2_999_999].into_iter().enumerate() {
        assert_eq!(node.put(&big), 201);
        flip_byte(&node.file(&digest), at);
        let cut = node.get(&digest);
        assert!(cut.status == 200 && !cut.complete, "a damaged blob arrived whole, at {at}");
        wait_for("the count", || (node.metric(CORRUPT) == (round + 1) as f64).then_some(()));
        node.get(&digest).problem(404);
        assert!(node.root.join("quarantine").join(digest.to_string()).exists());
    }
    // Somebody who has the blob may heal it before anybody notices.
    assert_eq!(node.put(&big), 201);
    flip_byte(&node.file(&digest), 5);
    assert_eq!(node.put(&big), 200);
    assert!(node.get(&digest).body == big);
    // A small one is found out before the head leaves. A range is not checked, but all of it by range is.
    let small = blob(1000, 21);
    for headers in [&[][..], &["Range: bytes=0-"]] {
        assert_eq!(node.put(&small), 201);
        flip_byte(&node.file(&Digest::of(&small)), 500);
        assert_eq!(node.ask("GET", &blob_path(&Digest::of(&small)), &["Range: bytes=0-9"], b"").status, 206);
        node.ask("GET", &blob_path(&Digest::of(&small)), headers, b"").problem(500);
    }
    assert_eq!(node.put(&small), 201);
    assert!(node.log().contains("damaged"), "{}", node.log());
}

#[test]
fn left_overs_of_a_crash_are_removed_at_the_start() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir_all(dir.path().join("tmp")).unwrap();
    fs::write(dir.path().join("tmp/upload-x"), "half a blob").unwrap();
    let node = Node::at(dir.path(), &[]);
    assert_eq!(node.temp_files(), 0);
}

struct SmallDisk(PathBuf);

impl Drop for SmallDisk {
    fn drop(&mut self) {
        Command::new("umount").arg(&self.0).status().ok();
    }
}

#[test]
fn a_full_disk_is_told_and_survived() {
    let dir = tempfile::tempdir().unwrap();
    if !Command::new("mount").args(["-t", "tmpfs", "-o", "size=2m", "none"]).arg(dir.path()).status().is_ok_and(|s| s.success()) {
        eprintln!("skipped: making a small disk needs the right to mount");
        return;
    }
    let disk = SmallDisk(dir.path().to_owned());
    let node = Node::at(&disk.0.join("root"), &[("CASTIER_ALLOW_DELETE", "true")]);
    let (fits, too_much) = (blob(1_200_000, 22), blob(1_500_000, 23));
    assert_eq!(node.put(&fits), 201);
    for _ in 0..3 {
        node.ask("PUT", &blob_path(&Digest::of(&too_much)), &[], &too_much).problem(507);
    }
    node.ask("POST", "/cas", &[], &too_much).problem(507);
    node.get(&Digest::of(&too_much)).problem(404);
    wait_for("nothing left behind", || (node.temp_files() == 0).then_some(()));
    assert!(node.get(&Digest::of(&fits)).body == fits);
    assert_eq!(node.ask("DELETE", &blob_path(&Digest::of(&fits)), &[], b"").status, 204);
    assert_eq!(node.put(&too_much), 201);
    assert!(node.get(&Digest::of(&too_much)).body == too_much);
    drop(node);
}

#[test]
fn one_process_per_root() {
    let node = Node::start();
    let second =
        binary().args(["--listen", "127.0.0.1:0", "--root"]).arg(&node.root).env("CASTIER_LISTEN__ADMIN", "127.0.0.1:0").output().unwrap();
    let text = String::from_utf8(second.stderr).unwrap();
    assert_eq!(second.status.code(), Some(1), "{text}");
    let told: Vec<_> = text.lines().filter(|line| line.contains(" level=error ")).collect();
    assert!(told.len() == 1 && told[0].contains("another process") && told[0].contains(node.root.to_str().unwrap()), "{text}");
    assert_eq!(node.put(b"still works"), 201);
}

/// Sends a PUT; its status, or none if the server went away.
fn try_put(node: &Node, bytes: &[u8]) -> Option<u16> {
    let mut stream = TcpStream::connect(node.clients).ok()?;
    stream.set_read_timeout(Some(DEADLINE)).ok()?;
    stream.write_all(&head("PUT", &blob_path(&Digest::of(bytes)), &[], Some(bytes.len()))).ok()?;
    stream.write_all(bytes).ok()?;
    Some(read_answer(&mut BufReader::new(stream), "PUT")?.status)
}

#[test]
fn a_crash_among_fifty_uploads_loses_nothing_acknowledged_and_shows_nothing_partial() {
    let dir = tempfile::tempdir().unwrap();
    let mut node = Node::at(dir.path(), &[]);
    let acknowledged = Mutex::new(HashSet::new());
    let pid = node.child.id().to_string();
    thread::scope(|scope| {
        for client in 0..50u64 {
            let (node, acknowledged) = (&node, &acknowledged);
            scope.spawn(move || {
                for round in 0.. {
                    let bytes = blob(1000 + 40_000 * client as usize, 1000 * (client + 1) + round);
                    match try_put(node, &bytes) {
                        Some(status) => {
                            assert_eq!(status, 201);
                            acknowledged.lock().unwrap().insert(Digest::of(&bytes));
                        }
                        None => return,
                    }
                }
            });
        }
        wait_for("some to be acknowledged and some to be under way", || {
            (acknowledged.lock().unwrap().len() >= 40 && node.temp_files() >= 5).then_some(())
        });
        assert!(Command::new("kill").args(["-s", "KILL", &pid]).status().unwrap().success());
    });
    node.exit();
    let left_over = node.temp_files();
    drop(node);
    let node = Node::at(dir.path(), &[]);
    assert_eq!(node.temp_files(), 0, "there were {left_over}");
    let acknowledged = acknowledged.into_inner().unwrap();
    assert!(acknowledged.len() >= 40);
    for digest in &acknowledged {
        let answer = node.get(digest);
        assert!(
            answer.status == 200 && answer.complete && Digest::of(&answer.body) == *digest,
            "{digest} was acknowledged and is not here"
        );
    }
    let mut visible = 0;
    let below = |dir: PathBuf| fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    for top in below(node.root.clone()).filter(|path| path.file_name().unwrap().len() == 2) {
        for file in below(top).flat_map(below) {
            let digest: Digest = file.file_name().unwrap().to_str().unwrap().parse().unwrap();
            assert_eq!(Digest::of(&fs::read(&file).unwrap()), digest, "a partial blob is visible");
            visible += 1;
        }
    }
    assert!(visible >= acknowledged.len());
    wait_for("the totals", || (node.metric("castier_origin_blobs") == visible as f64).then_some(()));
}
