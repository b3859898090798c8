//! `origin.write = "behind"`: what is acknowledged is in the outbox or in the store, also if the store, castier or the disk fails.

use crate::{
    checks::gets,
    lossy::LossyFs,
    object_store::Weed,
    support::{Castier, Port, Request, Response, castier, castier_program, command, eventually, noise, run, sha256, turn},
};
use std::{
    collections::HashMap,
    fs,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

/// The tiers keep next to nothing, so that what is read comes from the outbox or the store.
const BEHIND: &str = "origin.write = \"behind\"\norigin.read_timeout = \"2s\"\nmemory.capacity = \"64KiB\"\nmemory.max_blob = \"1KiB\"\ndisk.path = \"disk\"\ndisk.capacity = \"4KiB\"\nlimits.negative_ttl = \"0s\"\n";
const MIB: usize = 1 << 20;

fn put(castier: &Castier, body: &[u8]) -> u16 {
    Request::new("PUT", &format!("/cas/{}", sha256(body))).body(body).send(castier.public).status
}

fn is_there(castier: &Castier, body: &[u8]) {
    gets(castier.public, &Request::get(&format!("/cas/{}", sha256(body))), body);
}

fn pending(castier: &Castier) -> f64 {
    castier.metric("castier_outbox_blobs", &[]) + castier.metric("castier_outbox_entries", &[])
}

fn is_empty(castier: &Castier) {
    eventually("the outbox is empty", || (pending(castier) == 0.0).then_some(()));
}

#[test]
fn uploads_go_on_while_the_store_is_down() {
    let _turn = turn();
    let Some(weed) = Weed::start() else { return };
    let castier = weed.castier(BEHIND);
    weed.proxy.kill();
    let bodies: Vec<_> = (0..).zip([0, 1, 1000, 64 << 10, 300_000, 17 * MIB]).map(|(seed, size)| noise(500 + seed, size)).collect();
    for body in &bodies {
        assert_eq!(put(&castier, body), 201, "{}", body.len());
        assert_eq!(put(&castier, body), 200, "{}", body.len());
        let target = format!("/cas/{}", sha256(body));
        assert_eq!(Request::new("POST", &format!("/purge/{}", sha256(body))).send(castier.admin).status, 200);
        is_there(&castier, body);
        let head = Request::head(&target).send(castier.public);
        assert_eq!((head.status, head.header("content-length")), (200, Some(body.len().to_string())));
        let waits = Request::new("PUT", &target).with("Expect", "100-continue").body(body.clone()).send(castier.public);
        assert_eq!(waits.status, 200);
    }
    let range = Request::get(&format!("/cas/{}", sha256(&bodies[5]))).with("Range", "bytes=10000000-10000999").send(castier.public);
    assert!(range.status == 206 && range.body == bodies[5][10_000_000..10_001_000]);
    let posted = noise(510, 200_000);
    assert_eq!(Request::new("POST", "/cas").body(posted.clone()).send(castier.public).status, 201);
    is_there(&castier, &posted);
    let wrong = Request::new("PUT", &format!("/cas/{}", sha256(b"x"))).body(noise(511, 100_000)).send(castier.public);
    assert_eq!(wrong.status, 422);
    let (action, value) = (format!("/ac/{}", sha256(b"key")), "/kv/a/b%20c");
    for (target, first, last) in [(&*action, noise(512, 100), noise(513, 100_000)), (value, noise(514, 10), noise(515, 20))] {
        for version in [&first, &last] {
            assert_eq!(Request::new("PUT", target).body(version.clone()).send(castier.public).status / 100, 2);
            gets(castier.public, &Request::get(target), version);
        }
    }
    assert_eq!(Request::new("PUT", "/kv/gone").body("x").send(castier.public).status, 201);
    assert_eq!(Request::new("DELETE", "/kv/gone").send(castier.public).status, 204);
    assert_eq!(Request::get("/kv/gone").send(castier.public).status, 404);
    assert_eq!(Request::get("/readyz").send(castier.admin).status, 200);
    // What only the store would know is no absence.
    assert!(Request::get(&format!("/cas/{}", sha256(b"unknown"))).send(castier.public).status >= 502);
    assert_eq!(castier.metric("castier_outbox_blobs", &[]), 7.0);
    assert_eq!(castier.metric("castier_outbox_entries", &[]), 6.0);
    assert!(castier.metric("castier_outbox_bytes", &[]) > 17.0 * MIB as f64);
    assert_eq!(castier.metric("castier_outbox_capacity_bytes", &[]), 4096.0 * MIB as f64);
    assert!(castier.metric("castier_outbox_uploads_total", &["result=\"error\""]) > 0.0);
    eventually("it has waited", || (castier.metric("castier_outbox_oldest_seconds", &[]) >= 1.0).then_some(()));

    weed.take();
    weed.proxy.up();
    is_empty(&castier);
    let asked = weed.take();
    let last_blob = asked.iter().rposition(|line| line.starts_with("PUT") || line.starts_with("POST")).unwrap();
    for body in bodies.iter().chain([&posted]) {
        let digest = sha256(body);
        assert_eq!(weed.curl("GET", &format!("/blobs/cas/{}/{digest}", &digest[..2]), b""), (200, body.clone()));
        let stored = asked.iter().rposition(|line| line.contains(&digest[..8])).unwrap();
        assert!(stored < last_blob, "entries are last: {asked:?}");
    }
    assert_eq!(weed.curl("GET", &format!("/blobs{action}"), b"").1, noise(513, 100_000));
    assert_eq!(weed.curl("GET", "/blobs/kv/gone", b"").0, 404);
    gets(castier.public, &Request::get(value), &noise(515, 20));
    assert_eq!(castier.metric("castier_outbox_bytes", &[]), 0.0);
    // The one version of an entry that was replaced is not uploaded, and counts all the same.
    assert_eq!(castier.metric("castier_outbox_uploads_total", &["result=\"ok\""]), 13.0);
    assert_eq!(castier.metric("castier_outbox_lost_total", &[]), 0.0);
}

/// How often castier is killed. `CASTIER_TEST_KILLS` has more for the long form.
fn kills(usual: u64) -> u64 {
    std::env::var("CASTIER_TEST_KILLS").ok().and_then(|kills| kills.parse().ok()).unwrap_or(usual)
}

/// Clients store while castier is killed again and again; after each kill, `then` is called. All that was acknowledged is there after the next start,
/// and in the end all of it is in the store.
fn what_is_acknowledged_survives(weed: &Weed, config: &str, kills: u64, then: impl Fn(u64)) -> Castier {
    let mut castier = weed.castier(config);
    let mut acknowledged = 0;
    let mut all: Vec<(u64, usize)> = Vec::new();
    for round in 0..kills {
        if round % 3 == 0 {
            weed.proxy.up()
        } else {
            weed.proxy.kill()
        }
        let stop = Arc::new(AtomicBool::new(false));
        let entries = Arc::new(Mutex::new(HashMap::<String, Vec<u8>>::new()));
        let clients: Vec<_> = (0..4_u64)
            .map(|client| {
                let (stop, entries, public) = (stop.clone(), entries.clone(), castier.public);
                thread::spawn(move || {
                    let mut acknowledged = Vec::new();
                    for at in 0.. {
                        if stop.load(Ordering::Acquire) {
                            break;
                        }
                        let seed = (round << 32) + (client << 24) + at;
                        let size = [20, 3000, 66_000, 400_000][usize::try_from((at + client) % 4).unwrap()];
                        let body = noise(seed, size);
                        if at % 5 == 4 {
                            let name = format!("/kv/{round}/{client}/{at}");
                            if Request::new("PUT", &name).body(body.clone()).try_send(public).is_ok_and(|answer| answer.status == 201) {
                                entries.lock().unwrap().insert(name, body);
                            }
                            continue;
                        }
                        let sent = Request::new("PUT", &format!("/cas/{}", sha256(&body))).body(body).try_send(public);
                        if sent.is_ok_and(|answer| matches!(answer.status, 200 | 201)) {
                            acknowledged.push((seed, size));
                        }
                    }
                    acknowledged
                })
            })
            .collect();
        thread::sleep(Duration::from_millis(20 + round * 7919 % 280));
        castier.kill();
        stop.store(true, Ordering::Release);
        let new: Vec<_> = clients.into_iter().flat_map(|client| client.join().unwrap()).collect();
        acknowledged += new.len() + entries.lock().unwrap().len();
        then(round);
        castier = castier.restart(&weed.config(config));
        let earlier = all.len().saturating_sub(10);
        for (seed, size) in new.iter().chain(if round % 3 == 0 { &all[earlier..] } else { &[] }) {
            is_there(&castier, &noise(*seed, *size));
        }
        for (name, body) in entries.lock().unwrap().iter() {
            gets(castier.public, &Request::get(name), body);
        }
        all.extend(new);
    }
    weed.proxy.up();
    is_empty(&castier);
    for (seed, size) in &all {
        let digest = sha256(&noise(*seed, *size));
        assert_eq!(weed.curl("HEAD", &format!("/blobs/cas/{}/{digest}", &digest[..2]), b"").0, 200);
    }
    println!("{kills} kills, {acknowledged} acknowledged, all of them there");
    assert!(acknowledged > 0);
    assert_eq!(castier.metric("castier_outbox_lost_total", &[]), 0.0);
    castier
}

#[test]
fn what_is_acknowledged_survives_kill_9() {
    let _turn = turn();
    let Some(weed) = Weed::start() else { return };
    let castier = what_is_acknowledged_survives(&weed, BEHIND, kills(15), |_| {});
    assert_eq!(fs::read_dir(castier.dir.path().join("disk/outbox/bodies")).unwrap().count(), 0);
}

#[test]
fn what_is_acknowledged_survives_power_cuts() {
    let _turn = turn();
    let Some(weed) = Weed::start() else { return };
    let Some(disk) = LossyFs::mount() else { return };
    let behind = BEHIND.replace("\"disk\"", &format!("\"{}\"", disk.path().display()));
    let castier = what_is_acknowledged_survives(&weed, &behind, kills(5), |round| disk.cut(round));
    assert_eq!(fs::read_dir(disk.path().join("outbox/bodies")).unwrap().count(), 0);
    drop(castier);
}

#[test]
fn a_full_outbox_and_a_broken_disk_are_507() {
    let _turn = turn();
    let Some(weed) = Weed::start() else { return };
    let castier = weed.castier(&format!("{BEHIND}disk.outbox = \"1MiB\"\n"));
    weed.proxy.kill();
    let refused = |body: Vec<u8>, target: &str| {
        let answer = Request::new("PUT", target).body(body).send(castier.public);
        assert_eq!((answer.status, answer.header("retry-after").is_some()), (507, true), "{}", answer.text());
        assert!(answer.text().contains("outbox"), "{}", answer.text());
    };
    let target = |body: &[u8]| format!("/cas/{}", sha256(body));
    assert_eq!(put(&castier, &noise(520, 700_000)), 201);
    let large = noise(521, 700_000);
    refused(large.clone(), &target(&large));
    assert_eq!(Request::new("PUT", "/kv/large").body(large.clone()).send(castier.public).status, 507);
    assert_eq!(put(&castier, &noise(522, 100_000)), 201, "a smaller one fits");
    is_there(&castier, &noise(520, 700_000));
    weed.proxy.up();
    is_empty(&castier);
    assert_eq!(put(&castier, &large), 201);
    is_empty(&castier);

    // No file may be written any more.
    castier.limit_file_sizes(Some(0));
    for size in [100, 100_000] {
        let body = noise(523, size);
        refused(body.clone(), &target(&body));
    }
    castier.limit_file_sizes(None);
    for size in [100, 100_000] {
        eventually("the outbox works again", || (put(&castier, &noise(523, size)) / 100 == 2).then_some(()));
        is_there(&castier, &noise(523, size));
    }
    assert!(castier.metric("castier_outbox_refused_total", &[]) >= 4.0);
    is_empty(&castier);
}

#[test]
fn a_node_that_is_removed_drains_its_outbox() {
    let _turn = turn();
    let Some(weed) = Weed::start() else { return };
    let castier = weed.castier(BEHIND);
    weed.proxy.kill();
    for seed in 530..533 {
        assert_eq!(put(&castier, &noise(seed, 100_000)), 201);
    }
    let drain = |args: &[&str]| run(command(castier_program(), castier.dir.path()).arg("drain").args(args));
    let admin = castier.admin.to_string();
    let failed = drain(&["--admin", &admin, "--timeout", "300ms"]).fails();
    assert!(failed.contains("3 uploads"), "{failed}");
    weed.proxy.up();
    let done = drain(&["--admin", &admin, "--timeout", "60s"]).ok();
    assert!(done.contains("the outbox is empty"), "{done}");
    for seed in 530..533 {
        let digest = sha256(&noise(seed, 100_000));
        assert_eq!(weed.curl("HEAD", &format!("/blobs/cas/{}/{digest}", &digest[..2]), b"").0, 200);
    }
    // From now on the store has it before the client is told.
    weed.proxy.kill();
    assert_eq!(put(&castier, &noise(534, 1000)), 502);
    weed.proxy.up();
    assert_eq!(put(&castier, &noise(534, 1000)), 201);
    assert_eq!(pending(&castier), 0.0);
}

#[test]
fn the_outbox_of_a_dead_node_is_uploaded_without_it() {
    let _turn = turn();
    let Some(weed) = Weed::start() else { return };
    let mut castier = weed.castier(BEHIND);
    weed.proxy.kill();
    assert_eq!(put(&castier, &noise(535, 100_000)), 201);
    assert_eq!(Request::new("PUT", "/kv/a").body("b").send(castier.public).status, 201);
    castier.kill();
    weed.proxy.up();
    let config = castier.dir.path().join("castier.toml");
    let text =
        fs::read_to_string(&config).unwrap().replace("listen.admin = \"127.0.0.1:0\"", &format!("listen.admin = \"{}\"", castier.admin));
    fs::write(&config, text).unwrap();
    let done = run(command(castier_program(), castier.dir.path()).args(["--config", "castier.toml", "drain"])).ok();
    assert!(done.contains("the outbox is empty"), "{done}");
    let digest = sha256(&noise(535, 100_000));
    assert_eq!(weed.curl("HEAD", &format!("/blobs/cas/{}/{digest}", &digest[..2]), b"").0, 200);
    assert_eq!(weed.curl("GET", "/blobs/kv/a", b""), (200, b"b".to_vec()));
}

/// The configurations of the nodes of a cluster.
struct Nodes {
    configs: Vec<String>,
}

impl Nodes {
    fn of(weed: &Weed, count: usize) -> Self {
        let ports: Vec<_> = (0..count).map(|_| Port::free()).collect();
        let secret = weed.dir.path().join("peer-secret");
        fs::write(&secret, "a-secret-of-the-cluster").unwrap();
        let peers = ports.iter().map(|port| format!("\"{}\"", port.addr())).collect::<Vec<_>>().join(", ");
        let config = |port: &Port| {
            weed.config(&format!(
                "{BEHIND}listen.peer = \"{0}\"\ncluster.advertise = \"{0}\"\ncluster.peers = [{peers}]\ncluster.secret_file = \"{1}\"\n",
                port.addr(),
                secret.display()
            ))
        };
        Self { configs: ports.iter().map(config).collect() }
    }

    /// The nodes, once they have found each other.
    fn start(&self) -> Vec<Castier> {
        let nodes: Vec<_> = self.configs.iter().map(|config| castier(config)).collect();
        let others = (nodes.len() - 1) as f64;
        for node in &nodes {
            eventually("the nodes have found each other", || {
                (node.metric("castier_cluster_peers", &["state=\"up\""]) >= others).then_some(())
            });
        }
        nodes
    }
}

#[test]
fn the_nodes_of_a_cluster_see_each_others_outboxes() {
    let _turn = turn();
    let Some(weed) = Weed::start() else { return };
    let cluster = Nodes::of(&weed, 3);
    let mut nodes = cluster.start();
    weed.proxy.kill();
    let bodies: Vec<_> = (0..9).map(|seed| noise(540 + seed, [100, 70_000, 2_000_000][seed as usize % 3])).collect();
    for (at, body) in bodies.iter().enumerate() {
        assert_eq!(put(&nodes[at % 3], body), 201);
    }
    let posted = noise(550, 100_000);
    assert_eq!(Request::new("POST", "/cas").body(posted.clone()).send(nodes[1].public).status, 201);
    for (at, node) in nodes.iter().enumerate() {
        assert_eq!(Request::new("PUT", &format!("/kv/{at}")).body(format!("of {at}")).send(node.public).status, 201);
        assert_eq!(Request::new("PUT", "/kv/same").body(format!("of {at}")).send(node.public).status, 201);
    }
    for node in &nodes {
        for body in bodies.iter().chain([&posted]) {
            is_there(node, body);
            assert_eq!(Request::head(&format!("/cas/{}", sha256(body))).send(node.public).status, 200);
        }
        for at in 0..3 {
            gets(node.public, &Request::get(&format!("/kv/{at}")), format!("of {at}").as_bytes());
        }
        gets(node.public, &Request::get("/kv/same"), b"of 2");
    }
    // The store works, and has not got it yet from a node that is dead. When that node is there again, it hands it over.
    let mut dead = nodes.remove(1);
    dead.kill();
    weed.proxy.up();
    nodes.iter().for_each(is_empty);
    let dead = dead.restart(&cluster.configs[1]);
    is_empty(&dead);
    for body in bodies.iter().chain([&posted]) {
        let digest = sha256(body);
        assert_eq!(weed.curl("HEAD", &format!("/blobs/cas/{}/{digest}", &digest[..2]), b"").0, 200);
    }
}

/// What waits in the outbox of one node is deleted through another.
#[test]
fn a_deletion_reaches_the_outbox_of_another_node() {
    let _turn = turn();
    let Some(weed) = Weed::start() else { return };
    let nodes = Nodes::of(&weed, 2).start();
    // The store takes no uploads, and does the rest.
    weed.proxy.intercept(|request| matches!(request.method.as_str(), "PUT" | "POST").then(|| Response::new(500)));
    let bodies: Vec<_> = (0..4).map(|seed| noise(560 + seed, 1000)).collect();
    for body in &bodies {
        assert_eq!(put(&nodes[0], body), 201);
    }
    for (at, body) in bodies.iter().enumerate() {
        let target = format!("/cas/{}", sha256(body));
        assert_eq!(Request::new("DELETE", &target).send(nodes[at % 2].public).status, 204);
        for node in &nodes {
            assert_eq!(Request::get(&target).send(node.public).status, 404);
        }
        assert_eq!(Request::new("DELETE", &target).send(nodes[at % 2].public).status, 404);
    }
    assert_eq!(nodes.iter().map(pending).sum::<f64>(), 0.0);
    weed.proxy.intercept(|_| None);
}

/// What was acknowledged goes to the store also after the key was changed.
#[test]
fn an_outbox_that_is_no_longer_wanted_is_emptied() {
    let _turn = turn();
    let Some(weed) = Weed::start() else { return };
    let castier = weed.castier(BEHIND);
    weed.proxy.kill();
    let body = noise(570, 100_000);
    assert_eq!(put(&castier, &body), 201);
    let castier = castier.restart(&weed.config(&BEHIND.replace("behind", "through")));
    is_there(&castier, &body);
    assert_eq!(put(&castier, &noise(571, 100)), 502, "new uploads wait for the store");
    // Another origin cannot take it.
    let dir = castier.dir.path().to_owned();
    let text = fs::read_to_string(dir.join("castier.toml")).unwrap();
    let other = text.replace("origin.url = \"s3://blobs\"", "origin.url = \"http://127.0.0.1:9\"");
    fs::write(dir.join("other.toml"), other).unwrap();
    let mut castier = castier;
    castier.kill();
    let failed = run(command(castier_program(), &dir).args(["--config", "other.toml"])).fails();
    assert!(failed.contains("1 acknowledged uploads") && failed.contains("castier drain"), "{failed}");
    let castier = castier.restart(&weed.config(&BEHIND.replace("behind", "through")));
    weed.proxy.up();
    is_empty(&castier);
    let digest = sha256(&body);
    assert_eq!(weed.curl("HEAD", &format!("/blobs/cas/{}/{digest}", &digest[..2]), b"").0, 200);
    assert_eq!(put(&castier, &noise(571, 100)), 201);
}

/// What the store refuses stays, and does not hold up the rest.
#[test]
fn what_the_store_refuses_holds_up_nothing_else() {
    let _turn = turn();
    let Some(weed) = Weed::start() else { return };
    let castier = weed.castier(BEHIND);
    let put_entry = |name: &str| Request::new("PUT", &format!("/kv/{name}")).body("x").send(castier.public).status;
    for n in 0..20 {
        assert_eq!(put_entry(&format!("{}{n}", "n".repeat(300))), 201);
    }
    assert_eq!(put_entry(&(("%C3%A4".repeat(30) + "/").repeat(10) + "n")), 400);
    eventually("each was refused", || (castier.metric("castier_outbox_uploads_total", &["result=\"error\""]) >= 20.0).then_some(()));
    for seed in 0..20 {
        assert_eq!(put(&castier, &noise(590 + seed, 1000)), 201);
        assert_eq!(put_entry(&format!("short/{seed}")), 201);
    }
    // Each alone would wait for a second and more if the others counted as failures of the store.
    eventually("the rest is uploaded", || (pending(&castier) == 20.0).then_some(()));
    assert_eq!(castier.metric("castier_outbox_lost_total", &[]), 0.0);
    gets(castier.public, &Request::get(&format!("/kv/{}7", "n".repeat(300))), b"x");
}
