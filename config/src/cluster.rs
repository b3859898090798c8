//! The section `[cluster]`, and the secret of its nodes.

use crate::{
    Listen, Malformed, Problems, Share, Span, TlsClients, TlsFiles, TlsPair,
    address::Address,
    check::check_span,
    file::{first_byte, read_secret},
    value::{as_text, path_text},
};
use serde::{Deserialize, Serialize};
use std::{
    fmt,
    net::IpAddr,
    path::{Path, PathBuf},
    str::FromStr,
};
use url::Host;
use zeroize::Zeroizing;

/// The nodes that together behave as one cache. Without this section a node is alone: only you know the others.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Cluster {
    /// This node's address as its peers know it, letter for letter as `cluster.peers` or `cluster.dns` has it on every node.
    ///
    /// It has no default: only you know how the others reach this node.
    ///
    /// - Type: HOST:PORT
    pub advertise: String,
    /// All nodes, this one among them: the same list on every node, in any order. Either this or `cluster.dns`.
    ///
    /// `"10.0.0.8:8081 weight=2"` owns twice as many blobs. It has no default. A node that is not on its own list owns nothing and asks the
    /// others. SIGHUP changes the list, unless `cluster.dns` has it.
    ///
    /// - Type: list of HOST:PORT
    /// - Live: yes
    pub peers: Vec<Peer>,
    /// A name to look up instead of the list: `NAME:PORT` for its addresses, or `_SERVICE._PROTOCOL.NAME` for its SRV records.
    ///
    /// Each address is a node. SRV records have ports and weights of their own. A look-up that fails or finds nothing changes nothing.
    ///
    /// - Type: name
    pub dns: String,
    /// How often castier looks up `cluster.dns`.
    ///
    /// The records of a headless service commonly live as long as the default.
    ///
    /// - Type: duration over 0
    pub refresh: Span,
    /// A file with the secret that proves to the peers that this node is one of them. Empty only if `listen.peer` is on the loopback.
    ///
    /// The secret is the first line: 16 to 1024 visible ASCII characters. castier accepts a second line too,
    /// [while a new secret is rolled out](#changing-the-secret). SIGHUP reads the file again.
    ///
    /// - Live: content
    #[serde(serialize_with = "path_text")]
    pub secret_file: PathBuf,
    /// The part of `memory.capacity` that is for hot blobs which other nodes own. 0: none.
    ///
    /// The blobs that everybody asks for are few. With the default most of the memory of all nodes stays one cache.
    pub mirror_share: Share,
    /// How long a peer may be silent before the fill goes on elsewhere, unless the peer says that it waits for the origin itself.
    ///
    /// After one peer was slow to fail, the further peers that the same fill asks have a quarter of this. The default is above any pause of a
    /// healthy node, and below what a user would notice twice.
    ///
    /// - Type: duration over 0
    pub stall_timeout: Span,
    /// How long after a change of the cluster an owner that misses asks the next node in order before the origin. 0: never.
    ///
    /// That node may have owned the blob before. When the default is over, what is hot has moved.
    pub peek_for: Span,
    /// How often castier probes each peer, to see whether it is up.
    ///
    /// A peer that fails a probe gets another one at once, and is down if it fails that too. So castier notices a dead peer within this time
    /// and two `cluster.probe_timeout`. With the default fifty nodes send each other fifty tiny requests a second.
    ///
    /// - Type: duration over 0
    pub probe_interval: Span,
    /// How long a peer may take to answer a probe.
    ///
    /// A node that needs longer than the default serves nobody well.
    ///
    /// - Type: duration over 0
    pub probe_timeout: Span,
    /// `[cluster.tls]`.
    pub tls: ClusterTls,
}

/// Mutual TLS between the nodes. Set all three files, or none for plain HTTP.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ClusterTls {
    /// A PEM file with this node's certificate and those between it and its root.
    ///
    /// It must be valid for a server and for a client, and for the host in `cluster.advertise`.
    ///
    /// - Live: content
    #[serde(serialize_with = "path_text")]
    pub cert_file: PathBuf,
    /// A PEM file with the private key of that certificate.
    ///
    /// - Live: content
    #[serde(serialize_with = "path_text")]
    pub key_file: PathBuf,
    /// A PEM file with the authorities that must have signed the peers' certificates.
    ///
    /// Those of the system do not count: anybody can get a certificate from them.
    ///
    /// - Live: content
    #[serde(serialize_with = "path_text")]
    pub ca_file: PathBuf,
}

impl ClusterTls {
    /// Whether the nodes speak TLS with each other.
    pub fn is_on(&self) -> bool {
        self.named_files().iter().any(|(_, file)| !file.as_os_str().is_empty())
    }

    /// The files, for the one who reads them.
    pub fn files(&self) -> TlsFiles {
        let pair = TlsPair {
            cert_key: "cluster.tls.cert_file".into(),
            cert_file: self.cert_file.clone(),
            key_key: "cluster.tls.key_file".into(),
            key_file: self.key_file.clone(),
        };
        let clients = TlsClients { key: "cluster.tls.ca_file".into(), ca_file: self.ca_file.clone(), required: true };
        TlsFiles { section: "cluster.tls", pairs: vec![pair], clients: Some(clients) }
    }

    fn named_files(&self) -> [(&'static str, &Path); 3] {
        [("cluster.tls.cert_file", &self.cert_file), ("cluster.tls.key_file", &self.key_file), ("cluster.tls.ca_file", &self.ca_file)]
    }
}

impl Default for Cluster {
    fn default() -> Self {
        Self {
            advertise: String::new(),
            peers: Vec::new(),
            dns: String::new(),
            refresh: Span::secs(5),
            secret_file: PathBuf::new(),
            mirror_share: Share::DEFAULT_MIRROR,
            stall_timeout: Span::secs(2),
            peek_for: Span::secs(600),
            probe_interval: Span::secs(1),
            probe_timeout: Span::secs(1),
            tls: ClusterTls::default(),
        }
    }
}

impl Cluster {
    /// The default, with examples for the keys that have none.
    pub(crate) fn example() -> Self {
        let peer = |last| Peer { host: format!("10.0.0.{last}"), port: 8081, weight: 1 };
        Self { advertise: peer(7).name(), peers: vec![peer(7), peer(8)], ..Self::default() }
    }
}

/// A node as the others reach it, and its share of the blobs.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Peer {
    /// A host name in lower case, or an address in its shortest form, without brackets.
    pub host: String,
    /// The port of its peer listener.
    pub port: u16,
    /// Its share of the blobs, relative to that of a node with weight 1. 1 or more.
    pub weight: u16,
}

impl Peer {
    /// `HOST:PORT`, with brackets around an IPv6 address: the name that all nodes must agree on.
    pub fn name(&self) -> String {
        if self.host.contains(':') { format!("[{}]:{}", self.host, self.port) } else { format!("{}:{}", self.host, self.port) }
    }

    /// The host, if it is an address.
    pub fn ip(&self) -> Option<IpAddr> {
        self.host.parse().ok()
    }
}

impl FromStr for Peer {
    type Err = Malformed;
    fn from_str(text: &str) -> Result<Self, Malformed> {
        let bad = |why: &str| {
            Malformed::new(format!(
                "{text:?} {why}; write HOST:PORT, such as \"10.0.0.7:8081\", or \"10.0.0.7:8081 weight=2\" for twice the share"
            ))
        };
        let number = |text: &str| text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse().ok())?.filter(|n: &u16| *n > 0);
        let (address, weight) = match text.trim().split_once(char::is_whitespace) {
            None => (text.trim(), 1),
            Some((address, weight)) => {
                let weight = weight.trim().strip_prefix("weight=").ok_or_else(|| bad("has something behind the port"))?;
                (address, number(weight).ok_or_else(|| bad("has a weight that is not a number from 1 to 65535"))?)
            }
        };
        let (host, port) = address.rsplit_once(':').ok_or_else(|| bad("has no port"))?;
        let port = number(port).ok_or_else(|| bad("has a port that is not a number from 1 to 65535"))?;
        let host = match Host::parse(host.strip_suffix('.').unwrap_or(host)).map_err(|_| bad("has no valid host"))? {
            // The name of a host has no empty label. Without its last dot, `10.0.0.7..` would be another node.
            Host::Domain(name) if name.split('.').any(str::is_empty) => return Err(bad("has no valid host")),
            Host::Domain(name) => name,
            Host::Ipv4(ip) => ip.to_string(),
            Host::Ipv6(ip) => ip.to_string(),
        };
        if host.parse::<IpAddr>().is_ok_and(|ip| ip.is_unspecified()) {
            return Err(bad("means every interface, which nobody can connect to"));
        }
        Ok(Self { host, port, weight })
    }
}

impl fmt::Display for Peer {
    /// The text that reads back to the same peer.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.weight {
            1 => f.write_str(&self.name()),
            weight => write!(f, "{} weight={weight}", self.name()),
        }
    }
}

as_text!(Peer);

/// The shortest peer secret: an attacker might guess a shorter one.
const MIN_SECRET: usize = 16;
/// The longest peer secret: it fits into a request header anywhere.
const MAX_SECRET: usize = 1024;

/// The secrets in a `cluster.secret_file`, one or two. A node proves itself with the first, and accepts either.
///
/// # Errors
/// A text that says what is wrong with the file, and never what is in it.
pub fn peer_secrets(file: &Path) -> Result<Vec<Zeroizing<String>>, String> {
    let name = file.display();
    let text = read_secret(file).map_err(|error| {
        format!("{name} cannot be read as text ({error}); name a file with a secret, for example the output of `openssl rand -hex 32`")
    })?;
    let secrets: Vec<_> = text.lines().map(str::trim).filter(|line| !line.is_empty()).map(|line| Zeroizing::new(line.to_owned())).collect();
    if !(1..=2).contains(&secrets.len()) {
        return Err(format!("{name} has {} lines; write one secret, or two while one replaces the other", secrets.len()));
    }
    for (i, secret) in secrets.iter().enumerate() {
        let line = i + 1;
        if !(MIN_SECRET..=MAX_SECRET).contains(&secret.len()) {
            let length = secret.len();
            return Err(format!(
                "{name}: secret {line} has {length} characters; write {MIN_SECRET} to {MAX_SECRET}, as `openssl rand -hex 32` does"
            ));
        }
        if !secret.bytes().all(|b| b.is_ascii_graphic()) {
            return Err(format!("{name}: secret {line} has characters that no header can hold; write visible ASCII without spaces"));
        }
    }
    Ok(secrets)
}

/// Checks the section `[cluster]`.
pub(crate) fn check_cluster(cluster: &Cluster, listen: &Listen, problems: &mut Problems) {
    let Cluster {
        advertise,
        peers,
        dns,
        refresh,
        secret_file,
        mirror_share: _,
        stall_timeout,
        peek_for: _,
        probe_interval,
        probe_timeout,
        tls,
    } = cluster;
    let node = check_advertise(advertise, problems);
    check_source(node.as_ref(), peers, dns, problems);
    check_secret(secret_file, listen, problems);
    check_span("cluster.refresh", *refresh, problems);
    check_span("cluster.stall_timeout", *stall_timeout, problems);
    check_span("cluster.probe_interval", *probe_interval, problems);
    check_span("cluster.probe_timeout", *probe_timeout, problems);
    for (key, file) in tls.named_files().into_iter().filter(|_| tls.is_on()) {
        if file.as_os_str().is_empty() {
            problems.add(key, "is missing; mutual TLS needs cert_file, key_file and ca_file, and plain HTTP none of them");
        } else if problems.ask_machine()
            && let Err(error) = first_byte(file)
        {
            problems.add(key, format!("{} cannot be read ({error}); name a PEM file that this user may read", file.display()));
        }
    }
}

fn check_advertise(advertise: &str, problems: &mut Problems) -> Option<Peer> {
    const KEY: &str = "cluster.advertise";
    if advertise.is_empty() {
        problems.add(KEY, "is missing; write this node's HOST:PORT as its peers reach it, such as \"10.0.0.7:8081\"");
        return None;
    }
    match advertise.parse::<Peer>() {
        Ok(node) if node.weight == 1 => Some(node),
        Ok(_) => {
            problems.add(KEY, "has a weight; write weights into cluster.peers, which is the same on all nodes");
            None
        }
        Err(error) => {
            problems.add(KEY, error);
            None
        }
    }
}

/// The nodes come from a list or from a name, not from both, and this node must find itself among them.
fn check_source(node: Option<&Peer>, peers: &[Peer], dns: &str, problems: &mut Problems) {
    match (peers.is_empty(), dns.is_empty()) {
        (true, true) if problems.are_sound(&["cluster.peers", "cluster.dns"]) => {
            problems.add("cluster.peers", "is missing; list all nodes, or let cluster.dns name them");
        }
        (false, false) => problems.add("cluster.dns", "is set beside cluster.peers; the nodes come from one of them, leave the other out"),
        _ => {}
    }
    for (i, peer) in peers.iter().enumerate() {
        if let Some(first) = peers[..i].iter().find(|first| first.name() == peer.name() && first.weight != peer.weight) {
            let (name, one, other) = (peer.name(), first.weight, peer.weight);
            problems.add("cluster.peers", format!("{name} is listed with the weights {one} and {other}; list each node once"));
        }
    }
    if !dns.is_empty() {
        check_dns(node, dns, problems);
    }
}

fn check_dns(node: Option<&Peer>, dns: &str, problems: &mut Problems) {
    const KEY: &str = "cluster.dns";
    if dns.starts_with('_') {
        if dns.contains(':') {
            problems.add(KEY, format!("{dns:?} has a port, and SRV records bring their own; leave it out"));
        }
        return;
    }
    if !dns.parse::<Peer>().is_ok_and(|name| name.ip().is_none() && name.weight == 1) {
        problems.add(
            KEY,
            format!(
                "{dns:?} is not a name to look up; write NAME:PORT, such as \"castier-peers.cas.svc:8081\", or \"_SERVICE._PROTOCOL.NAME\" \
                 for SRV records"
            ),
        );
    } else if node.is_some_and(|node| node.ip().is_none()) {
        problems.add(
            "cluster.advertise",
            "is a name, and the nodes that cluster.dns gives are addresses, so this one would not know itself; write its address, or let \
             cluster.dns name SRV records",
        );
    }
}

/// Without a secret castier takes every client of the peer listener for a peer. So the listener must then be on the loopback.
fn check_secret(secret_file: &Path, listen: &Listen, problems: &mut Problems) {
    if !secret_file.as_os_str().is_empty() {
        if problems.ask_machine()
            && let Err(why) = peer_secrets(secret_file)
        {
            problems.add("cluster.secret_file", why);
        }
    } else if !Address::parse(&listen.peer).is_some_and(|address| address.is_on_loopback()) && problems.are_sound(&["listen.peer"]) {
        problems.add(
            "cluster.secret_file",
            format!(
                "is missing, and listen.peer = {:?} can be reached from outside; name a file with a secret, or listen on the loopback",
                listen.peer
            ),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peers_have_one_spelling() {
        for (text, name, weight) in [
            ("10.0.0.7:8081", "10.0.0.7:8081", 1),
            (" Castier-0.Castier.svc.:8081 ", "castier-0.castier.svc:8081", 1),
            ("[0:0::1]:80 weight=3", "[::1]:80", 3),
            ("a:1 \t weight=65535", "a:1", 65535),
        ] {
            let peer: Peer = text.parse().unwrap();
            assert_eq!((peer.name().as_str(), peer.weight), (name, weight));
            assert_eq!(peer.to_string().parse(), Ok(peer));
        }
        for text in [
            "",
            "a",
            "a:",
            "a:0",
            "a:+1",
            "a:65536",
            ":1",
            "a b:1",
            "a:1 weight=0",
            "a:1 weight=x",
            "a:1 heavy",
            "0.0.0.0:1",
            "[::]:1",
            "a..b:1",
            "10.0.0.7...:1",
        ] {
            let error = text.parse::<Peer>().unwrap_err().to_string();
            assert!(error.contains("write HOST:PORT"), "{text}: {error}");
        }
    }

    #[test]
    fn secrets_are_one_or_two_good_lines() {
        let directory = tempfile::tempdir().unwrap();
        let read = |text: &str| {
            let file = directory.path().join("secret");
            std::fs::write(&file, text).unwrap();
            peer_secrets(&file)
        };
        let (old, new) = ("old-old-old-old-old", "new-new-new-new-new");
        assert_eq!(read(&format!("{old}\n")), Ok(vec![old.to_owned().into()]));
        assert_eq!(read(&format!("\n{new}\r\n  {old}")), Ok(vec![new.to_owned().into(), old.to_owned().into()]));
        for text in [
            "",
            "\n",
            "short",
            &format!("{old}\nshort"),
            &format!("{old}\n{new}\n{old}"),
            "with space in between",
            "ümlaut-in-the-secret",
            &"x".repeat(1025),
        ] {
            let why = read(text).unwrap_err();
            assert!(why.contains("write ") && !why.contains("old-old") && !why.contains("short"), "{why}");
        }
        assert!(peer_secrets(directory.path()).is_err() && peer_secrets(&directory.path().join("none")).is_err());
    }
}
