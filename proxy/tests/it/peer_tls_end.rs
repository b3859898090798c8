//! The end of a TLS connection between nodes.

use crate::{
    peer_tls::{Authority, cluster},
    support::{LyingOrigin, MIB, eventually, light},
};
use std::process::{Command, Stdio};
use tempfile::TempDir;

/// The other end reads no more bytes, so it does not read the message that closes the TLS connection either.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_takes_nothing_is_let_go() {
    let _turn = light().await;
    let (authority, dir) = (Authority::new(), TempDir::new().unwrap());
    let origin = LyingOrigin::start().await;
    let cluster = cluster(&authority, &origin, "limits.write_timeout = \"1s\"\ncluster.probe_interval = \"20s\"").await;
    let node = &cluster.nodes[0];
    let blob = origin.blob(64 * MIB);
    let (certificate, key) = authority.certify("127.0.0.1", dir.path());
    let open = async || node.metrics().await.total("castier_peer_connections");
    eventually("the nodes have met", async || (open().await == 0).then_some(())).await;
    let mut command = Command::new("curl");
    // A range goes by way of a session, and curl stops when nobody reads its output.
    command.args(["-s", "-r", "1-", "--cacert"]).arg(authority.file()).arg("--cert").arg(certificate).arg("--key").arg(key);
    let mut stuck = command.arg(format!("https://{}{}", node.peer(), blob.path())).stdout(Stdio::piped()).spawn().unwrap();
    let cut = |line: &str| line.contains("castier::access") && line.contains(&blob.path());
    eventually("it is given up", async || node.castier().output().lines().any(cut).then_some(())).await;
    eventually("its connection is gone", async || (open().await == 0).then_some(())).await;
    stuck.kill().unwrap();
    stuck.wait().unwrap();
}
