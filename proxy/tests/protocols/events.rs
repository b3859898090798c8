//! Events, from the upload to the receiver: a webhook of the test, which can be away. Real brokers are in the tests of `castier-events`.

use crate::{
    object_store::Weed,
    support::{Castier, Request, Response, Upstream, castier, eventually, noise, sha256, turn},
};
use std::{
    fs,
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};
use tempfile::TempDir;

/// A receiver that notes what it got.
struct Receiver {
    server: Upstream,
    events: Arc<Mutex<Vec<serde_json::Value>>>,
    is_away: Arc<AtomicBool>,
    dir: TempDir,
}

impl Receiver {
    fn start() -> Self {
        let dir = TempDir::new().unwrap();
        fs::write(dir.path().join("secret"), "whsec_MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTIzNDU2Nzg5MDE=").unwrap();
        let (events, is_away) = (Arc::<Mutex<Vec<serde_json::Value>>>::default(), Arc::<AtomicBool>::default());
        let (noted, away) = (events.clone(), is_away.clone());
        let server = Upstream::answering(move |request| {
            if away.load(Ordering::Acquire) {
                return Response::new(503);
            }
            assert!(request.header("webhook-signature").is_some_and(|signature| signature.starts_with("v1,")));
            noted.lock().unwrap().push(serde_json::from_slice(&request.body).unwrap());
            Response::new(204)
        });
        Self { server, events, is_away, dir }
    }

    /// The section for this receiver.
    fn section(&self, name: &str) -> String {
        let secret = self.dir.path().join("secret");
        format!("[[events]]\nname = \"{name}\"\nurl = \"{}/hook\"\nsecret_file = \"{}\"\n", self.server.url(), secret.display())
    }

    /// What came, without repetitions: the end of the type, and the digest.
    fn got(&self) -> Vec<(String, String)> {
        let mut ids = Vec::new();
        let mut got = Vec::new();
        for event in &*self.events.lock().unwrap() {
            let text = |name: &str| event[name].as_str().unwrap().to_owned();
            if !ids.contains(&text("id")) {
                ids.push(text("id"));
                got.push((text("type").rsplit('.').next().unwrap().to_owned(), text("subject")));
            }
        }
        got
    }

    fn gets(&self, expected: &[(String, String)]) {
        eventually("all events have come", || (self.got().len() >= expected.len()).then_some(()));
        assert_eq!(self.got(), expected);
    }
}

fn put(public: SocketAddr, body: &[u8]) -> u16 {
    Request::new("PUT", &format!("/cas/{}", sha256(body))).body(body).send(public).status
}

fn stored(body: &[u8]) -> (String, String) {
    ("stored".into(), sha256(body))
}

/// What clients do, and the events that must come of it.
fn deeds(castier: &Castier) -> Vec<(String, String)> {
    let bodies = [noise(601, 100), noise(602, 200_000), noise(603, 3_000_000)];
    let mut expected = Vec::new();
    for body in &bodies {
        assert_eq!(put(castier.public, body), 201);
        assert_eq!(put(castier.public, body), 200);
        expected.push(stored(body));
    }
    let posted = noise(604, 50_000);
    assert_eq!(Request::new("POST", "/cas").body(posted.clone()).send(castier.public).status, 201);
    expected.push(stored(&posted));
    assert_eq!(Request::new("PUT", &format!("/cas/{}", sha256(b"a"))).body("b").send(castier.public).status, 422);
    expected.push(("corrupt".into(), sha256(b"a")));
    let target = format!("/cas/{}", sha256(&bodies[0]));
    assert_eq!(Request::new("DELETE", &target).send(castier.public).status, 204);
    expected.push(("deleted".into(), sha256(&bodies[0])));
    assert_eq!(Request::new("DELETE", &target).send(castier.public).status, 404);
    assert_eq!(put(castier.public, &bodies[0]), 201);
    expected.push(stored(&bodies[0]));
    // An entry is no blob.
    assert_eq!(Request::new("PUT", "/kv/a").body("b").send(castier.public).status / 100, 2);
    expected
}

#[test]
fn every_receiver_is_told_in_order() {
    let _turn = turn();
    let (first, second) = (Receiver::start(), Receiver::start());
    second.is_away.store(true, Ordering::Release);
    let config = format!("allow_delete = true\n[disk]\npath = \"disk\"\n{}{}", first.section("first"), second.section("second"));
    let castier = castier(&config);
    let expected = deeds(&castier);
    first.gets(&expected);
    let event = first.events.lock().unwrap()[0].clone();
    assert_eq!(
        (&event["specversion"], &event["data"]["size"], &event["data"]["client"]),
        (&"1.0".into(), &100.into(), &"127.0.0.1".into())
    );
    assert_eq!(second.got(), []);
    assert!(castier.metric("castier_events_pending", &["second"]) >= 7.0);
    // What one receiver has not got survives a restart, and the other does not get it again.
    let castier = castier.restart(&config);
    second.is_away.store(false, Ordering::Release);
    second.gets(&expected);
    assert_eq!(first.events.lock().unwrap().len(), expected.len());
    eventually("nothing waits", || (castier.metric("castier_events_pending", &[]) == 0.0).then_some(()));
    // A receiver that is new gets what comes from now on.
    let third = Receiver::start();
    let castier = castier.restart(&format!("{config}{}", third.section("third")));
    let new = noise(605, 10);
    assert_eq!(put(castier.public, &new), 201);
    third.gets(&[stored(&new)]);
}

#[test]
fn uploads_behind_are_told_of_when_they_are_acknowledged() {
    let _turn = turn();
    let Some(weed) = Weed::start() else { return };
    let receiver = Receiver::start();
    let sections = weed.config("").replace("[origin.s3]", &format!("{}[origin.s3]", receiver.section("hook")));
    let castier = castier(&format!("origin.write = \"behind\"\ndisk.path = \"disk\"\n{sections}"));
    let expected = deeds(&castier);
    receiver.gets(&expected);
    // The bucket is not asked for that.
    weed.proxy.kill();
    let body = noise(606, 1000);
    assert_eq!(put(castier.public, &body), 201);
    receiver.gets(&[&expected[..], &[stored(&body)]].concat());
    weed.proxy.up();
}

/// castier is killed while clients store. Every acknowledged upload is an event, without the repetitions exactly once, and in the order of each
/// client's acknowledgements.
#[test]
fn no_event_is_lost_with_the_process() {
    let _turn = turn();
    let receiver = Receiver::start();
    let config = format!("[disk]\npath = \"disk\"\n{}", receiver.section("hook"));
    let mut castier = castier(&config);
    let mut acknowledged: Vec<Vec<String>> = Vec::new();
    for round in 0..8_u64 {
        let stop = Arc::new(AtomicBool::new(false));
        let clients: Vec<_> = (0..3_u64)
            .map(|client| {
                let (stop, public) = (stop.clone(), castier.public);
                thread::spawn(move || {
                    let mut acknowledged = Vec::new();
                    for at in 0.. {
                        if stop.load(Ordering::Acquire) {
                            break;
                        }
                        let body = noise((7 << 40) + (round << 32) + (client << 24) + at, 2000);
                        let digest = sha256(&body);
                        let sent = Request::new("PUT", &format!("/cas/{digest}")).body(body).try_send(public);
                        if sent.is_ok_and(|answer| answer.status == 201) {
                            acknowledged.push(digest);
                        }
                    }
                    acknowledged
                })
            })
            .collect();
        receiver.is_away.store(round % 2 == 0, Ordering::Release);
        thread::sleep(Duration::from_millis(30 + round * 37));
        castier.kill();
        stop.store(true, Ordering::Release);
        acknowledged.extend(clients.into_iter().map(|client| client.join().unwrap()));
        castier = castier.restart(&config);
    }
    receiver.is_away.store(false, Ordering::Release);
    let count: usize = acknowledged.iter().map(Vec::len).sum();
    println!("{count} acknowledged");
    let all = || receiver.got().into_iter().map(|(_, digest)| digest).collect::<Vec<_>>();
    eventually("all events have come", || {
        let got = all();
        acknowledged.iter().flatten().all(|digest| got.contains(digest)).then_some(())
    });
    let got = all();
    for client in &acknowledged {
        let at: Vec<_> = client.iter().map(|digest| got.iter().position(|got| got == digest).unwrap()).collect();
        assert!(at.is_sorted(), "in the order of the acknowledgements");
    }
}
