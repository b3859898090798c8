//! Writing: all the ways in, and all the ways not in.

use crate::support::*;
use castier_blob::Digest;
use castier_wire::{Stored, blob_path};
use std::{
    io::{BufReader, Write as _},
    thread,
};

fn chunked(bytes: &[u8], size: usize) -> Vec<u8> {
    let mut body = Vec::new();
    for chunk in bytes.chunks(size) {
        body.extend(format!("{:x}\r\n", chunk.len()).bytes());
        body.extend(chunk);
        body.extend(b"\r\n");
    }
    body.extend(b"0\r\n\r\n");
    body
}

fn form(parts: &[(&str, &[u8])]) -> Vec<u8> {
    let mut body = Vec::new();
    for (disposition, bytes) in parts {
        body.extend(format!("--XX\r\nContent-Disposition: form-data; {disposition}\r\n\r\n").bytes());
        body.extend(*bytes);
        body.extend(b"\r\n");
    }
    body.extend(b"--XX--\r\n");
    body
}

const FORM: &str = "Content-Type: multipart/form-data; boundary=XX";

#[test]
fn bodies_of_every_size_and_framing_come_back() {
    let node = Node::start();
    for (seed, size) in [0, 1, 65_536, 262_143, 262_144, 262_145, 524_288, 5_000_000].into_iter().enumerate() {
        let (sent, in_chunks) = (blob(size, seed as u64), blob(size.max(1), 100 + seed as u64));
        assert_eq!(node.put(&sent), 201, "{size}");
        let answer = node.ask("PUT", &blob_path(&Digest::of(&in_chunks)), &["Transfer-Encoding: chunked"], &chunked(&in_chunks, 70_000));
        assert_eq!(answer.status, 201, "{size}");
        for bytes in [sent, in_chunks] {
            let answer = node.get(&Digest::of(&bytes));
            assert!((answer.status, answer.complete) == (200, true) && answer.body == bytes, "{size}");
        }
    }
    assert_eq!(node.temp_files(), 0);
}

#[test]
fn post_names_what_it_stores() {
    let node = Node::start();
    let big = blob(3_000_000, 6);
    for (headers, body, stored) in [
        (vec![], big.clone(), big.as_slice()),
        (vec![], big.clone(), &big),
        (vec!["Content-Type: application/x-www-form-urlencoded"], b"a=b".to_vec(), b"a=b"),
        (vec![FORM], form(&[("name=\"file\"; filename=\"a\"", b"hello\r\n--X")]), b"hello\r\n--X"),
        (
            vec![FORM],
            form(&[("name=\"note\"", b"no file"), ("name=\"f\"; filename=\"a\"", &big), ("name=\"g\"; filename=\"b\"", b"two")]),
            &big,
        ),
        (vec![FORM], form(&[("name=\"f\"; filename=\"empty\"", b"")]), b""),
        (vec![FORM, "Transfer-Encoding: chunked"], chunked(&form(&[("name=\"f\"; filename=\"a\"", &big)]), 10_000), &big),
    ] {
        let answer = node.ask("POST", "/cas", &headers, &body);
        assert_eq!(answer.status, 201, "{headers:?} {answer:?}");
        let named: Stored = serde_json::from_slice(&answer.body).unwrap();
        let digest = Digest::of(stored);
        assert_eq!(named, Stored { digest: digest.to_string(), size: stored.len() as u64 }, "{headers:?}");
        assert_eq!(answer.header("location"), blob_path(&digest));
        assert!(node.get(&digest).body == stored);
    }
    for (headers, body) in [
        (vec![FORM], form(&[("name=\"note\"", b"no file")])),
        (vec![FORM], form(&[])),
        (vec![FORM], b"--XX\r\nContent-Disposition: form-data; filename=\"a\"\r\n\r\nno end".to_vec()),
        (vec![FORM], vec![b'x'; 3 << 20]),
        (vec![FORM], [&b"--XX\r\nContent-Disposition: form-data; name=\""[..], &vec![b'x'; 3 << 20]].concat()),
        (vec!["Content-Type: multipart/form-data"], b"--XX--".to_vec()),
    ] {
        node.ask("POST", "/cas", &headers, &body).problem(400);
    }
    assert_eq!(node.temp_files(), 0);
}

#[test]
fn what_does_not_match_is_not_stored() {
    let node = Node::start();
    for size in [5, 3_000_000] {
        let digest = Digest::of(b"never stored");
        node.ask("PUT", &blob_path(&digest), &[], &blob(size, 7)).problem(422);
        node.get(&digest).problem(404);
    }
    assert_eq!(node.temp_files(), 0);
}

#[test]
fn what_is_too_large_is_refused_and_the_refusal_can_be_read() {
    let node = Node::with(&[("CASTIER_LIMITS__MAX_BLOB", "1MiB")]);
    let (fits, large) = (blob(1 << 20, 8), blob(8 << 20, 9));
    assert_eq!(node.put(&fits), 201);
    // `ask` sends everything before it listens, as simple clients do.
    let path = blob_path(&Digest::of(&large));
    node.ask("PUT", &path, &[], &large).problem(413);
    node.ask("PUT", &path, &["Transfer-Encoding: chunked"], &chunked(&large, 100_000)).problem(413);
    node.ask("POST", "/cas", &[], &large).problem(413);
    node.ask("POST", "/cas", &[FORM], &form(&[("name=\"f\"; filename=\"a\"", &large)])).problem(413);
    node.ask("POST", "/cas", &[FORM], &form(&[("name=\"f\"; filename=\"a\"", &blob((1 << 20) + 1, 10))])).problem(413);
    assert_eq!(node.ask("POST", "/cas", &[FORM], &form(&[("name=\"f\"; filename=\"a\"", &fits)])).status, 201);
    // Nor does a body in the wrong place hide the answer.
    node.ask("PUT", "/cas/abc", &[], &large).problem(400);
    node.ask("POST", "/elsewhere", &[], &large).problem(404);
    node.get(&Digest::of(&large)).problem(404);
    assert_eq!(node.temp_files(), 0);
}

#[test]
fn expect_continue() {
    let node = Node::with(&[("CASTIER_LIMITS__MAX_BLOB", "1MiB")]);
    let bytes = blob(1000, 11);
    let put = |length| head("PUT", &blob_path(&Digest::of(&bytes)), &["Expect: 100-continue"], Some(length));
    let mut stream = connect(node.clients);
    let mut answers = BufReader::new(stream.try_clone().unwrap());
    stream.write_all(&put(1000)).unwrap();
    assert_eq!(read_answer(&mut answers, "PUT").unwrap().status, 100);
    stream.write_all(&bytes).unwrap();
    assert_eq!(read_answer(&mut answers, "PUT").unwrap().status, 201);
    // Now it is there, and neither its body nor that of one too large is asked for.
    for (length, status) in [(1000, 200), (9 << 20, 413)] {
        let mut stream = connect(node.clients);
        stream.write_all(&put(length)).unwrap();
        assert_eq!(read_answer(&mut BufReader::new(stream), "PUT").unwrap().status, status);
    }
}

#[test]
fn fifty_at_once_store_one_blob() {
    let node = Node::start();
    let bytes = blob(2_000_000, 12);
    let statuses: Vec<u16> = thread::scope(|scope| {
        let clients: Vec<_> = (0..50).map(|_| scope.spawn(|| node.put(&bytes))).collect();
        clients.into_iter().map(|client| client.join().unwrap()).collect()
    });
    assert_eq!(statuses.iter().filter(|status| **status == 201).count(), 1, "{statuses:?}");
    assert_eq!(statuses.iter().filter(|status| **status == 200).count(), 49, "{statuses:?}");
    assert!(node.get(&Digest::of(&bytes)).body == bytes);
    wait_for("the totals", || (node.metric("castier_origin_blobs") == 1.0 && node.metric("castier_origin_bytes") == 2e6).then_some(()));
    assert_eq!(node.temp_files(), 0);
}

#[test]
fn who_goes_away_or_falls_silent_leaves_nothing() {
    let node = Node::with(&[("CASTIER_LIMITS__IDLE_TIMEOUT", "300ms")]);
    let bytes = blob(1_000_000, 13);
    let path = blob_path(&Digest::of(&bytes));
    let mut stream = connect(node.clients);
    stream.write_all(&head("PUT", &path, &[], Some(bytes.len()))).unwrap();
    stream.write_all(&bytes[..900_000]).unwrap();
    wait_for("the upload to begin", || (node.temp_files() == 1).then_some(()));
    drop(stream);
    wait_for("the upload to vanish", || (node.temp_files() == 0).then_some(()));

    let mut stream = connect(node.clients);
    stream.write_all(&head("PUT", &path, &[], Some(bytes.len()))).unwrap();
    stream.write_all(&bytes[..900_000]).unwrap();
    read_answer(&mut BufReader::new(stream), "PUT").unwrap().problem(408);
    wait_for("the upload to vanish", || (node.temp_files() == 0).then_some(()));
    node.ask("GET", &path, &[], b"").problem(404);
}
