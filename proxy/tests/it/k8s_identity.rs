//! A node of a StatefulSet gets a new address with every restart, and keeps its name, its digests and its disk.

use crate::{
    cluster_dns::{Zone, everybody_has, world},
    support::{
        cluster::{DISK, Node, own_address},
        eventually, heavy, stats,
    },
};
use hickory_resolver::proto::rr::{Name, RData, rdata::SRV};
use serde_json::Value;

/// The headless Service's port `peer`, as CoreDNS names it.
const SERVICE: &str = "_peer._tcp.castier-peers.cas.svc.cluster.local.";
/// The pods of the StatefulSet, as the same Service names them.
const PODS: [&str; 3] = [
    "castier-0.castier-peers.cas.svc.cluster.local.",
    "castier-1.castier-peers.cas.svc.cluster.local.",
    "castier-2.castier-peers.cas.svc.cluster.local.",
];

/// CoreDNS's records of these pods: one SRV record each, all with the weight 100 / n, and an address for each name.
fn pods<'a>(nodes: impl IntoIterator<Item = (&'static str, &'a Node)>) -> Zone {
    let nodes: Vec<_> = nodes.into_iter().collect();
    let weight = u16::try_from(100 / nodes.len()).unwrap();
    let srv = |pod: &str| RData::SRV(SRV::new(0, weight, 8081, Name::from_ascii(pod).unwrap()));
    let records = nodes.iter().flat_map(|(pod, node)| [(SERVICE, srv(pod)), (*pod, RData::A(node.address.into()))]);
    Zone::Has(records.collect())
}

/// Every member's share of all digests, from the node's `/stats`.
async fn shares(node: &Node) -> Vec<(String, String)> {
    let told = stats(node.castier()).await;
    let text = |member: &Value, key: &str| member[key].to_string();
    told["cluster"]["members"].as_array().unwrap().iter().map(|member| (text(member, "name"), text(member, "share"))).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_under_a_new_address_moves_no_digest() {
    let _turn = heavy().await;
    let Some((server, origin, blobs, mut cluster)) = world(3).await else { return };
    for (node, pod) in cluster.nodes.iter_mut().zip(PODS) {
        node.name = format!("{}:8081", pod.trim_end_matches('.'));
        node.add_config(DISK);
        // Were a digest to move, the origin should see it: the new owner must not get the blob from the former one.
        node.add_config("cluster.peek_for = \"0s\"");
        node.configure_by_dns(SERVICE, server.resolv_conf());
    }
    server.says(pods(PODS.into_iter().zip(&cluster.nodes)));
    cluster.start_all().await;
    cluster.wait_until_whole().await;
    everybody_has(&cluster.nodes, &origin, &blobs, 40..=40).await;
    let before = shares(&cluster.nodes[0]).await;

    for (at, leaving) in PODS.into_iter().enumerate() {
        let old = cluster.nodes[at].address;
        cluster.nodes[at].terminate().await;
        // The pod is gone, and so are its records, until the next pod of that name has its address.
        server.says(pods(PODS.into_iter().zip(&cluster.nodes).filter(|(pod, _)| *pod != leaving)));
        cluster.wait_for_peers(1, 0).await;
        let node = &mut cluster.nodes[at];
        node.address = own_address();
        assert_ne!(node.address, old);
        node.configure_by_dns(SERVICE, server.resolv_conf());
        server.says(pods(PODS.into_iter().zip(&cluster.nodes)));
        cluster.start_all().await;
        cluster.wait_until_whole().await;
    }

    // No node has anything in memory that it had before. Every blob is read from the disk of the node that owned it at the start.
    for node in &cluster.nodes {
        assert_eq!(shares(node).await, before, "{}", node.name);
    }
    everybody_has(&cluster.nodes, &origin, &blobs, 40..=40).await;
    let from_disk = cluster.sum("castier_hits_total", &[("tier", "disk")]).await;
    assert!(from_disk >= 40, "only {from_disk} blobs came from a disk");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_pod_comes_back_before_its_record_goes() {
    let _turn = heavy().await;
    let Some((server, origin, blobs, mut cluster)) = world(3).await else { return };
    for (node, pod) in cluster.nodes.iter_mut().zip(PODS) {
        node.name = format!("{}:8081", pod.trim_end_matches('.'));
        node.add_config(DISK);
        node.add_config("cluster.peek_for = \"0s\"");
        node.configure_by_dns(SERVICE, server.resolv_conf());
    }
    server.says(pods(PODS.into_iter().zip(&cluster.nodes)));
    cluster.start_all().await;
    cluster.wait_until_whole().await;
    everybody_has(&cluster.nodes, &origin, &blobs, 40..=40).await;
    // What waits to be written is lost with kill -9.
    eventually("everything is on a disk", async || (cluster.sum("castier_tier_blobs", &[("tier", "disk")]).await == 40).then_some(()))
        .await;

    cluster.nodes[1].kill().await;
    // Until the others know, each of its blobs may cost a load of the origin.
    cluster.wait_for_peers(1, 1).await;
    let node = &mut cluster.nodes[1];
    node.address = own_address();
    node.configure_by_dns(SERVICE, server.resolv_conf());
    // The name leads to the new address from one moment to the next; the members' names have not changed at all.
    server.says(pods(PODS.into_iter().zip(&cluster.nodes)));
    cluster.start_all().await;
    cluster.wait_until_whole().await;
    everybody_has(&cluster.nodes, &origin, &blobs, 40..=40).await;
}
