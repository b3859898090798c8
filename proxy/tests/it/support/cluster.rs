//! Clusters of real processes, each on its own loopback address. Nodes can be killed, stopped, and started again at the same address.

use super::{
    Blob, Castier, eventually,
    stats::{Metrics, metrics},
};
use castier_cluster::Ring;
use rustix::process::Signal;
use std::{
    fs,
    net::{Ipv4Addr, SocketAddr},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
};
use tempfile::TempDir;

/// The secret of nodes with a secret.
pub(crate) const SECRET: &str = "the-secret-of-this-cluster";

const PUBLIC: u16 = 8080;
const PEER: u16 = 8081;
const ADMIN: u16 = 8082;

/// An unused address in 127.0.0.0/8, so that the ports of a stopped node or origin stay free until it starts again.
pub(crate) fn own_address() -> Ipv4Addr {
    static SERIAL: AtomicU32 = AtomicU32::new(0);
    let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
    // 12 bits from the process, 11 from the serial: more than are used in one run, since a long test keeps its addresses. Never 127.0.0.x, and
    // never the broadcast address.
    let host = ((std::process::id() & 0xfff) << 11 | (serial & 0x7ff)) + (1 << 16);
    Ipv4Addr::from((127 << 24) | host)
}

/// One node, running or not.
pub(crate) struct Node {
    pub(crate) address: Ipv4Addr,
    /// Its name on the ring.
    pub(crate) name: String,
    origin: String,
    /// Further lines of TOML.
    config: String,
    /// A file that replaces `/etc/resolv.conf` for this node only.
    resolv_conf: Option<PathBuf>,
    /// The directory of its config file and its disk tier.
    dir: TempDir,
    castier: Option<Castier>,
}

impl Node {
    /// Not started yet.
    pub(crate) fn new(origin: &str, config: &str) -> Self {
        let address = own_address();
        Self {
            address,
            name: format!("{address}:{PEER}"),
            origin: origin.to_owned(),
            config: config.to_owned(),
            resolv_conf: None,
            dir: TempDir::new().unwrap(),
            castier: None,
        }
    }

    /// Adds lines of TOML for this node.
    pub(crate) fn add_config(&mut self, more: &str) {
        self.config += "\n";
        self.config += more;
    }

    /// Adds the shared secret.
    pub(crate) fn add_secret(&mut self, secret: &str) {
        let file = self.path("secret");
        fs::write(&file, secret).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
        self.add_config(&format!("cluster.secret_file = {file:?}"));
    }

    /// The directory of its files.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Writes its config file with these members.
    pub(crate) fn configure(&self, members: &[String]) {
        self.write_config(&format!("cluster.peers = {members:?}"));
    }

    /// Writes its config file with `cluster.dns`, for the name server in this `/etc/resolv.conf`. Takes effect at the next start.
    pub(crate) fn configure_by_dns(&mut self, name: &str, resolv_conf: PathBuf) {
        self.resolv_conf = Some(resolv_conf);
        self.write_config(&format!("cluster.dns = \"{name}\"\ncluster.refresh = \"100ms\""));
    }

    fn write_config(&self, members: &str) {
        let Self { address, name, origin, config, .. } = self;
        let disk = self.path("disk");
        let text = format!(
            "listen.public = \"{address}:{PUBLIC}\"\nlisten.peer = \"{address}:{PEER}\"\nlisten.admin = \"{address}:{ADMIN}\"\n\
             origin.url = \"{origin}\"\ncluster.advertise = \"{name}\"\n{members}\n{}\n",
            config.replace("$DISK", disk.to_str().unwrap())
        );
        fs::write(self.path("castier.toml"), text).unwrap();
    }

    /// Starts it, and waits until it is ready.
    pub(crate) async fn start(&mut self) {
        let mut command = match &self.resolv_conf {
            None => Command::new(Castier::program()),
            Some(file) => {
                let mut command = in_place_of(file, "/etc/resolv.conf");
                command.arg(Castier::program());
                command
            }
        };
        command.arg("--config").arg(self.path("castier.toml"));
        self.castier = Some(Castier::run(command, TempDir::new().unwrap()).await);
    }

    pub(crate) fn castier(&self) -> &Castier {
        self.castier.as_ref().expect("the node runs")
    }

    /// Its process. Panics if it does not run.
    pub(crate) fn running(&self) -> Option<&Castier> {
        self.castier.as_ref()
    }

    pub(crate) fn public(&self) -> SocketAddr {
        (self.address, PUBLIC).into()
    }

    pub(crate) fn peer(&self) -> SocketAddr {
        (self.address, PEER).into()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        self.castier().signal(signal);
    }

    /// kill -9.
    pub(crate) async fn kill(&mut self) {
        let mut castier = self.castier.take().expect("the node runs");
        castier.signal(Signal::KILL);
        castier.exit().await;
    }

    /// Sends SIGTERM and waits until it has ended with 0.
    pub(crate) async fn terminate(&mut self) {
        self.signal(Signal::TERM);
        self.ended().await;
    }

    /// Waits until it has ended with 0.
    pub(crate) async fn ended(&mut self) {
        let mut castier = self.castier.take().expect("the node runs");
        assert_eq!(castier.exit().await.code(), Some(0), "{}", castier.output());
    }

    pub(crate) async fn metrics(&self) -> Metrics {
        metrics(self.castier()).await
    }
}

/// A command, without its program, that runs with `file` mounted over `path`. Needs root.
pub(crate) fn in_place_of(file: &Path, path: &str) -> Command {
    let mut command = Command::new("unshare");
    command.args(["--mount", "--propagation", "private", "sh", "-c", "mount --bind \"$0\" \"$1\" && shift && exec \"$@\""]);
    command.arg(file).arg(path);
    command
}

/// A cluster. By default all nodes have the same list of members.
pub(crate) struct Cluster {
    pub(crate) nodes: Vec<Node>,
}

/// TOML for a disk tier.
pub(crate) const DISK: &str = "disk.path = \"$DISK\"\ndisk.capacity = \"1GiB\"\ndisk.scrub_rate = 0";

impl Cluster {
    /// Starts `count` nodes in front of `origin`, and waits until they see each other.
    pub(crate) async fn start(size: usize, origin: &str, config: &str) -> Self {
        let mut cluster = Self { nodes: (0..size).map(|_| Node::new(origin, config)).collect() };
        cluster.configure();
        cluster.start_all().await;
        cluster.wait_until_whole().await;
        cluster
    }

    /// As [`Self::start`], with a shared secret.
    pub(crate) async fn with_secret(size: usize, origin: &str, config: &str) -> Self {
        let mut cluster = Self { nodes: (0..size).map(|_| Node::new(origin, config)).collect() };
        cluster.nodes.iter_mut().for_each(|node| node.add_secret(SECRET));
        cluster.configure();
        cluster.start_all().await;
        cluster.wait_until_whole().await;
        cluster
    }

    /// Starts all nodes that do not run, in parallel.
    pub(crate) async fn start_all(&mut self) {
        futures::future::join_all(self.nodes.iter_mut().filter(|node| node.castier.is_none()).map(Node::start)).await;
    }

    pub(crate) fn names(&self) -> Vec<String> {
        self.nodes.iter().map(|node| node.name.clone()).collect()
    }

    /// Writes all nodes into every node's list.
    pub(crate) fn configure(&self) {
        for node in &self.nodes {
            node.configure(&self.names());
        }
    }

    /// Waits until each running node sees all others as up.
    pub(crate) async fn wait_until_whole(&self) {
        self.wait_for_peers(self.nodes.len() as u64 - 1, 0).await;
    }

    /// Waits until each running node sees this many peers up and down.
    pub(crate) async fn wait_for_peers(&self, up: u64, down: u64) {
        for node in self.nodes.iter().filter(|node| node.castier.is_some()) {
            wait_for_peers(node, up, down).await;
        }
    }

    /// The owner of the blob when all nodes are up.
    pub(crate) fn owner(&self, blob: &Blob) -> usize {
        self.order(blob)[0]
    }

    /// The nodes in the blob's fail-over order.
    pub(crate) fn order(&self, blob: &Blob) -> Vec<usize> {
        let ring = Ring::new(self.names().into_iter().map(|name| (name, 1)));
        let index = |name: &String| self.nodes.iter().position(|node| node.name == *name).unwrap();
        ring.order(&blob.digest).map(|at| index(&ring.names()[at])).collect()
    }

    /// The sum of a metric over all running nodes.
    pub(crate) async fn sum(&self, name: &str, labels: &[(&str, &str)]) -> u64 {
        let mut sum = 0;
        for node in self.nodes.iter().filter(|node| node.castier.is_some()) {
            sum += node.metrics().await.sum(name, labels);
        }
        sum
    }
}

/// Waits until the node sees this many peers up and down.
pub(crate) async fn wait_for_peers(node: &Node, up: u64, down: u64) {
    let what = format!("{} counts {up} peers up and {down} down", node.name);
    eventually(&what, async || {
        let metrics = node.metrics().await;
        let count = |state| metrics.sum("castier_cluster_peers", &[("state", state)]);
        ((count("up"), count("down")) == (up, down)).then_some(())
    })
    .await;
}
