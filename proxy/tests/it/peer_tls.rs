//! Mutual TLS between nodes: clients without a certificate of the cluster are refused.

use crate::support::{Blob, Castier, Cluster, LyingOrigin, Request, assert_ledger, cluster::Node, eventually, get, light};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair, date_time_ymd};
use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};
use tempfile::TempDir;
use tokio::{io::AsyncReadExt, net::TcpStream};

/// When the certificates that it signs expire: with the year 2099, in seconds since 1970.
const EXPIRY: u64 = 4_102_444_800;

/// A certificate authority with its certificate in a file.
pub(crate) struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    dir: TempDir,
}

impl Authority {
    pub(crate) fn new() -> Self {
        let mut params = CertificateParams::new(vec![]).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        // Named apart from what it signs, or those would pass for self-signed.
        params.distinguished_name.push(DnType::CommonName, "authority");
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let dir = TempDir::new().unwrap();
        fs::write(dir.path().join("ca.pem"), issuer.pem()).unwrap();
        Self { issuer, dir }
    }

    pub(crate) fn file(&self) -> PathBuf {
        self.dir.path().join("ca.pem")
    }

    /// A certificate for this host and its key, in files.
    pub(crate) fn certify(&self, host: &str, into: &Path) -> (PathBuf, PathBuf) {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec![host.to_owned()]).unwrap();
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.not_after = date_time_ymd(2100, 1, 1);
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        let (certificate_file, key_file) = (into.join("cert.pem"), into.join("key.pem"));
        fs::write(&certificate_file, certificate.pem()).unwrap();
        fs::write(&key_file, key.serialize_pem()).unwrap();
        (certificate_file, key_file)
    }
}

pub(crate) async fn cluster(authority: &Authority, origin: &LyingOrigin, config: &str) -> Cluster {
    let mut cluster =
        Cluster { nodes: (0..2).map(|_| Node::new(&origin.url(), &format!("limits.header_timeout = \"2s\"\n{config}"))).collect() };
    for node in &mut cluster.nodes {
        let (certificate, key) = authority.certify(&node.address.to_string(), &node.path(""));
        let tls = format!(
            "cluster.tls.cert_file = {certificate:?}\ncluster.tls.key_file = {key:?}\ncluster.tls.ca_file = {:?}",
            authority.file()
        );
        node.add_config(&tls);
    }
    cluster.configure();
    cluster.start_all().await;
    cluster.wait_until_whole().await;
    cluster
}

/// Gets a path at the peer listener with curl. Returns the status, or 0 without an answer.
fn curl(node: &Node, path: &str, authority: &Authority, certified: Option<(PathBuf, PathBuf)>) -> String {
    let mut command = Command::new("curl");
    command.args(["-s", "-m", "20", "-o", "/dev/null", "-w", "%{http_code}", "--cacert"]).arg(authority.file());
    if let Some((certificate, key)) = certified {
        command.arg("--cert").arg(certificate).arg("--key").arg(key);
    }
    let output = command.arg(format!("https://{}{path}", node.peer())).output().unwrap();
    String::from_utf8(output.stdout).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_with_certificates_are_a_cluster_and_nobody_else_is_let_in() {
    let _turn = light().await;
    let (authority, stranger) = (Authority::new(), Authority::new());
    let origin = LyingOrigin::start().await;
    let cluster = cluster(&authority, &origin, "").await;
    for size in [0, 1000, 50_000, 700_000, 6 << 20] {
        for _ in 0..3 {
            let blob = origin.blob(size);
            for node in &cluster.nodes {
                get(node.public(), &blob).await.assert_is(&blob);
            }
            assert_eq!(origin.gets(&blob), 1);
            let new = Blob::new(size + 7);
            assert_eq!(Request::new("PUT", new.path()).body(new.whole()).send(cluster.nodes[0].public()).await.status, 201);
            get(cluster.nodes[1].public(), &new).await.assert_is(&new);
        }
    }
    assert!(cluster.sum("castier_source_loads_total", &[("source", "peer"), ("result", "ok")]).await > 0);
    assert_eq!(cluster.sum("castier_peer_errors_total", &[]).await, 0);
    for node in &cluster.nodes {
        let expiry = node.metrics().await.sum("castier_tls_certificate_expiry_seconds", &[("listener", "peer")]);
        assert_eq!(expiry, EXPIRY, "the node's own certificate, not the authority's");
    }

    let node = &cluster.nodes[0];
    let (dir, other) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    assert_eq!(curl(node, "/healthz", &authority, Some(authority.certify("127.0.0.1", dir.path()))), "200");
    assert_eq!(curl(node, "/healthz", &authority, None), "000", "no certificate");
    assert_eq!(curl(node, "/healthz", &authority, Some(stranger.certify("127.0.0.1", other.path()))), "000", "somebody else's");
    assert_eq!(curl(node, "/healthz", &stranger, Some(authority.certify("127.0.0.1", dir.path()))), "000", "the node is known by its own");
    // Connections without bytes, and with plain HTTP, are closed soon.
    let mut silent = TcpStream::connect(node.peer()).await.unwrap();
    assert_eq!(silent.read(&mut [0; 100]).await.unwrap_or(0), 0, "limits.header_timeout ends it");
    assert_eq!(Request::get("/healthz").send(node.peer()).await.status, 0);
    for node in &cluster.nodes {
        assert_ledger(node.castier()).await;
    }
}

/// Another authority, with other certificates for all nodes, while they run.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn certificates_are_replaced_without_a_restart() {
    let _turn = light().await;
    let (authority, next, dir) = (Authority::new(), Authority::new(), TempDir::new().unwrap());
    let origin = LyingOrigin::start().await;
    let cluster = cluster(&authority, &origin, "").await;
    let certified = next.certify("127.0.0.1", dir.path());
    fs::copy(next.file(), authority.file()).unwrap();
    for node in &cluster.nodes {
        assert_eq!(curl(node, "/healthz", &next, Some(certified.clone())), "000");
        next.certify(&node.address.to_string(), &node.path(""));
    }
    for node in &cluster.nodes {
        eventually("the new certificates", async || (curl(node, "/healthz", &next, Some(certified.clone())) == "200").then_some(())).await;
    }
    eventually("one load for both nodes", async || {
        let blob = origin.blob(50_000);
        for node in &cluster.nodes {
            get(node.public(), &blob).await.assert_is(&blob);
        }
        (origin.gets(&blob) == 1).then_some(())
    })
    .await;
}

#[test]
fn files_that_are_no_certificates_are_named() {
    let authority = Authority::new();
    let output = Castier::once(|command, dir| {
        let (certificate, _) = authority.certify("127.0.0.1", dir);
        let text = format!(
            "listen.public = \"127.0.0.1:0\"\nlisten.admin = \"127.0.0.1:0\"\nlisten.peer = \"127.0.0.1:0\"\norigin.url = \"http://127.0.0.1:9\"\n\
             cluster.advertise = \"127.0.0.1:7\"\ncluster.peers = [\"127.0.0.1:7\"]\n\
             cluster.tls.cert_file = {certificate:?}\ncluster.tls.key_file = {certificate:?}\ncluster.tls.ca_file = {:?}\n",
            authority.file()
        );
        fs::write(dir.join("castier.toml"), text).unwrap();
        command.arg("--config").arg(dir.join("castier.toml"));
    });
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.lines().any(|line| line.contains("cluster.tls.key_file")), "{said}");
}
