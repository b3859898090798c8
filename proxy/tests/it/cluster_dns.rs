//! Clusters with `cluster.dns`: a real name server over UDP, and real resolvers.

use crate::support::{
    Blob, Cluster, KIB, LyingOrigin,
    cluster::{Node, in_place_of, own_address},
    eventually, get, heavy, stats,
};
use hickory_resolver::proto::{
    op::{Message, ResponseCode},
    rr::{Name, RData, Record, rdata::SRV},
};
use std::{
    fs,
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};
use tempfile::TempDir;
use tokio::{net::UdpSocket, task::JoinHandle};

/// The name server's answers.
#[derive(Clone, Default)]
pub(super) enum Zone {
    /// No answer.
    #[default]
    Silent,
    /// SERVFAIL.
    Fails,
    /// The records that match the name and kind; an empty answer if there are none.
    Has(Vec<(&'static str, RData)>),
}

/// A name server on an address of its own.
pub(super) struct NameServer {
    zone: Arc<Mutex<Zone>>,
    asked: Arc<AtomicUsize>,
    task: JoinHandle<()>,
    dir: TempDir,
}

impl Drop for NameServer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl NameServer {
    /// `None` if this process may not listen on port 53, or may not mount the resolvers' file.
    async fn start() -> Option<Self> {
        let (address, dir) = (own_address(), TempDir::new().unwrap());
        let resolv_conf = dir.path().join("resolv.conf");
        fs::write(&resolv_conf, format!("nameserver {address}\noptions timeout:1 attempts:1\n")).unwrap();
        let leads = in_place_of(&resolv_conf, "/etc/resolv.conf").arg("true").status().is_ok_and(|status| status.success());
        let socket = UdpSocket::bind((address, 53)).await.ok().filter(|_| leads)?;
        let (zone, asked) = <(Arc<Mutex<Zone>>, Arc<AtomicUsize>)>::default();
        let task = tokio::spawn(serve(socket, zone.clone(), asked.clone()));
        Some(Self { zone, asked, task, dir })
    }

    pub(super) fn resolv_conf(&self) -> PathBuf {
        self.dir.path().join("resolv.conf")
    }

    pub(super) fn says(&self, zone: Zone) {
        *self.zone.lock().unwrap() = zone;
    }

    /// Waits until all nodes have looked up the current records.
    async fn is_asked(&self) {
        let until = self.asked.load(Ordering::SeqCst) + 12;
        eventually("the name server is asked", async || (self.asked.load(Ordering::SeqCst) >= until).then_some(())).await;
    }
}

async fn serve(socket: UdpSocket, zone: Arc<Mutex<Zone>>, asked: Arc<AtomicUsize>) {
    let mut packet = [0; 512];
    while let Ok((length, client)) = socket.recv_from(&mut packet).await {
        let query = Message::from_vec(&packet[..length]).unwrap();
        let (name, kind) = (query.queries[0].name().clone(), query.queries[0].query_type());
        let mut response = query.into_response();
        let zone = zone.lock().unwrap().clone();
        asked.fetch_add(1, Ordering::SeqCst);
        match zone {
            Zone::Silent => continue,
            Zone::Fails => response.metadata.response_code = ResponseCode::ServFail,
            Zone::Has(records) => {
                let fits = |(of, data): &(&str, RData)| *of == name.to_ascii() && data.record_type() == kind;
                let found = records.into_iter().filter(fits).map(|(_, data)| Record::from_rdata(name.clone(), 1, data));
                response.add_answers(found);
            }
        }
        socket.send_to(&response.to_vec().unwrap(), client).await.unwrap();
    }
}

/// A name server, an origin, its blobs, and nodes without mirrors that are not started yet.
pub(super) async fn world(size: usize) -> Option<(NameServer, LyingOrigin, Vec<Blob>, Cluster)> {
    let Some(server) = NameServer::start().await else {
        println!("skipped: only root may serve names to a process of its own");
        return None;
    };
    let origin = LyingOrigin::start().await;
    let blobs = (0..40).map(|_| origin.blob(20 * KIB)).collect();
    let nodes = (0..size).map(|_| Node::new(&origin.url(), "cluster.mirror_share = 0")).collect();
    Some((server, origin, blobs, Cluster { nodes }))
}

fn addresses(nodes: &[Node]) -> Zone {
    Zone::Has(nodes.iter().map(|node| ("peers.castier.test.", RData::A(node.address.into()))).collect())
}

/// Gets every blob from every node. Checks the bytes, and the number of loads in total.
pub(super) async fn everybody_has(nodes: &[Node], origin: &LyingOrigin, blobs: &[Blob], loads: std::ops::RangeInclusive<usize>) {
    for node in nodes {
        for blob in blobs {
            get(node.public(), blob).await.assert_is(blob);
        }
    }
    let seen: usize = blobs.iter().map(|blob| origin.gets(blob)).sum();
    assert!(loads.contains(&seen), "{seen} loads");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn members_come_and_go_with_the_addresses_of_a_name() {
    let _turn = heavy().await;
    let Some((server, origin, blobs, mut cluster)) = world(4).await else { return };
    for node in &mut cluster.nodes {
        node.configure_by_dns("peers.castier.test:8081", server.resolv_conf());
    }
    let mut fourth = cluster.nodes.split_off(3);
    server.says(addresses(&cluster.nodes));
    cluster.start_all().await;
    cluster.wait_until_whole().await;
    everybody_has(&cluster.nodes, &origin, &blobs, 40..=40).await;

    // If the name server fails in any way, the members stay, and the node logs it once.
    let changes = cluster.sum("castier_cluster_changes_total", &[]).await;
    for trouble in [Zone::Fails, Zone::Has(vec![]), Zone::Silent] {
        server.says(trouble);
        server.is_asked().await;
    }
    cluster.wait_for_peers(2, 0).await;
    assert_eq!(cluster.sum("castier_cluster_changes_total", &[]).await, changes);
    let warning = "cluster.dns names no members; the last known ones stay";
    for node in &cluster.nodes {
        assert_eq!(node.castier().output().matches(warning).count(), 1, "{}", node.castier().output());
    }

    cluster.nodes.append(&mut fourth);
    server.says(addresses(&cluster.nodes));
    cluster.start_all().await;
    cluster.wait_until_whole().await;
    assert!(cluster.nodes[0].castier().output().contains("cluster.dns answers again"));
    // The fourth node gets the blobs that it owns now from their former owners.
    everybody_has(&cluster.nodes, &origin, &blobs, 40..=40).await;

    let mut first = cluster.nodes.remove(0);
    server.says(addresses(&cluster.nodes));
    cluster.wait_for_peers(2, 0).await;
    first.terminate().await;
    everybody_has(&cluster.nodes, &origin, &blobs, 40..=80).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn srv_records_have_names_and_weights() {
    let _turn = heavy().await;
    let Some((server, origin, blobs, mut cluster)) = world(2).await else { return };
    let service = "_peer._tcp.castier.test.";
    let names = ["node-0.castier.test.", "node-1.castier.test."];
    let mut zone = Vec::new();
    for ((node, name), weight) in cluster.nodes.iter_mut().zip(names).zip([1, 3]) {
        node.name = format!("{}:8081", name.trim_end_matches('.'));
        node.configure_by_dns(service, server.resolv_conf());
        zone.push((service, RData::SRV(SRV::new(0, weight, 8081, Name::from_ascii(name).unwrap()))));
        zone.push((name, RData::A(node.address.into())));
    }
    server.says(Zone::Has(zone));
    cluster.start_all().await;
    cluster.wait_until_whole().await;
    for node in &cluster.nodes {
        let told = stats(node.castier()).await;
        let members = told["cluster"]["members"].as_array().unwrap();
        let share = |name: &str| members.iter().find(|member| member["name"] == name).unwrap()["share"].as_f64().unwrap();
        let shares = cluster.nodes.iter().map(|node| share(&node.name)).collect::<Vec<_>>();
        assert!((shares[0] - 0.25).abs() < 0.01 && (shares[1] - 0.75).abs() < 0.01, "{shares:?}");
    }
    everybody_has(&cluster.nodes, &origin, &blobs, 40..=40).await;
    let peers = cluster.sum("castier_source_loads_total", &[("source", "peer"), ("result", "ok")]).await;
    assert_eq!(peers, 40, "each was had from its owner once");
}
