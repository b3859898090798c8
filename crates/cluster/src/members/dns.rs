//! Looks up the members in DNS.

use async_trait::async_trait;
use castier_config::{Cluster, Peer};
use hickory_resolver::{
    TokioResolver,
    net::runtime::TokioRuntimeProvider,
    proto::rr::{RData, RecordType},
};
use std::net::IpAddr;

/// A source of the list of members.
#[async_trait]
pub(super) trait Resolve: Send + Sync + 'static {
    /// All members now, in any order.
    ///
    /// # Errors
    /// A text that says why the look-up failed. An empty list counts as a failure too.
    async fn resolve(&self) -> Result<Vec<Peer>, String>;
}

/// `cluster.dns`: the addresses of a name, or SRV records. Of SRV records it uses targets, ports and weights, and ignores priorities, since
/// all members are in use.
///
/// Of addresses it uses one family, that of `cluster.advertise`. Otherwise a node with an address of each family would count twice.
pub(super) struct Dns {
    resolver: TokioResolver,
    name: String,
    records: Records,
}

enum Records {
    Srv,
    Addresses { port: u16, record: RecordType },
}

impl Dns {
    /// Uses the system's name servers, search domains and hosts file. Caches nothing: every `cluster.refresh` must see the current records.
    ///
    /// # Errors
    /// A text that names the invalid key, or the invalid file of the system.
    pub(super) fn new(config: &Cluster) -> Result<Self, String> {
        let unusable = |error| format!("cluster.dns: the system's name servers are not known ({error}); see /etc/resolv.conf");
        let mut builder = TokioResolver::builder(TokioRuntimeProvider::default()).map_err(unusable)?;
        builder.options_mut().cache_size = 0;
        Self::with(builder.build().map_err(unusable)?, config)
    }

    fn with(resolver: TokioResolver, config: &Cluster) -> Result<Self, String> {
        if config.dns.starts_with('_') {
            return Ok(Self { resolver, name: config.dns.clone(), records: Records::Srv });
        }
        let service: Peer = config.dns.parse().map_err(|error| format!("cluster.dns: {error}"))?;
        let advertise: Peer = config.advertise.parse().map_err(|error| format!("cluster.advertise: {error}"))?;
        let record = if matches!(advertise.ip(), Some(IpAddr::V6(_))) { RecordType::AAAA } else { RecordType::A };
        // The search list applies to names without a final dot. Parsing a host removes the dot, so restore it.
        let rooted = config.dns.rsplit_once(':').is_some_and(|(host, _)| host.ends_with('.'));
        let name = if rooted { service.host + "." } else { service.host };
        Ok(Self { resolver, name, records: Records::Addresses { port: service.port, record } })
    }
}

#[async_trait]
impl Resolve for Dns {
    async fn resolve(&self) -> Result<Vec<Peer>, String> {
        let record = match self.records {
            Records::Srv => RecordType::SRV,
            Records::Addresses { record, .. } => record,
        };
        let found = self.resolver.lookup(self.name.as_str(), record).await.map_err(|error| error.to_string())?;
        let peer = |data: &RData| match (data, &self.records) {
            (RData::SRV(srv), Records::Srv) => format!("{}:{} weight={}", srv.target, srv.port, srv.weight.max(1)).parse().ok(),
            (RData::A(ip), Records::Addresses { port, .. }) => Some(Peer { host: ip.to_string(), port: *port, weight: 1 }),
            (RData::AAAA(ip), Records::Addresses { port, .. }) => Some(Peer { host: ip.to_string(), port: *port, weight: 1 }),
            // A CNAME record.
            _ => None,
        };
        Ok(found.answers().iter().filter_map(|record| peer(&record.data)).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hickory_resolver::{
        config::{ConnectionConfig, NameServerConfig, ResolverConfig},
        proto::{
            op::{Message, ResponseCode},
            rr::{Name, Record, rdata::SRV},
        },
    };
    use std::net::Ipv4Addr;
    use tokio::net::UdpSocket;

    fn records(name: &str, kind: RecordType) -> Option<Vec<RData>> {
        let srv = |weight, target: &str| RData::SRV(SRV::new(0, weight, 8081, Name::from_ascii(target).unwrap()));
        match (name, kind) {
            ("peers.test.", RecordType::A) => Some([7, 8].map(|last| RData::A(Ipv4Addr::new(10, 0, 0, last).into())).into()),
            ("peers.test.", RecordType::AAAA) => Some(vec![RData::AAAA("fd00::7".parse().unwrap())]),
            ("_peer._tcp.test.", RecordType::SRV) => Some(vec![srv(0, "Castier-0.test."), srv(5, "castier-1.test.")]),
            ("empty.test.", _) => Some(vec![]),
            _ => None,
        }
    }

    /// A name server on the loopback with these records. It answers NXDOMAIN for other names.
    async fn serve(socket: UdpSocket) {
        let mut packet = [0; 512];
        loop {
            let (length, client) = socket.recv_from(&mut packet).await.unwrap();
            let query = Message::from_vec(&packet[..length]).unwrap();
            let (name, kind) = (query.queries[0].name().clone(), query.queries[0].query_type());
            let mut response = query.into_response();
            match records(&name.to_ascii(), kind) {
                Some(records) => drop(response.add_answers(records.into_iter().map(|data| Record::from_rdata(name.clone(), 5, data)))),
                None => response.metadata.response_code = ResponseCode::NXDomain,
            }
            socket.send_to(&response.to_vec().unwrap(), client).await.unwrap();
        }
    }

    #[tokio::test]
    async fn members_come_from_records() {
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let mut server = NameServerConfig::udp(socket.local_addr().unwrap().ip());
        server.connections = vec![ConnectionConfig::udp()];
        server.connections[0].port = socket.local_addr().unwrap().port();
        tokio::spawn(serve(socket));
        let servers = ResolverConfig::from_parts(None, vec![Name::from_ascii("test.").unwrap()], vec![server]);
        let resolver = TokioResolver::builder_with_config(servers, TokioRuntimeProvider::default()).build().unwrap();
        let ask = async |dns: &str, advertise: &str| {
            let config = Cluster { dns: dns.into(), advertise: advertise.into(), ..Cluster::default() };
            let found = Dns::with(resolver.clone(), &config).unwrap().resolve().await;
            let mut peers = found.map(|peers| peers.iter().map(Peer::to_string).collect::<Vec<_>>());
            peers.iter_mut().for_each(|peers| peers.sort());
            peers
        };
        let names = |names: &[&str]| Ok(names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>());
        assert_eq!(ask("peers.test:9", "10.0.0.7:9").await, names(&["10.0.0.7:9", "10.0.0.8:9"]));
        assert_eq!(ask("peers.test.:9", "10.0.0.7:9").await, names(&["10.0.0.7:9", "10.0.0.8:9"]));
        assert_eq!(ask("peers:9", "10.0.0.7:9").await, names(&["10.0.0.7:9", "10.0.0.8:9"]), "by the search list");
        assert_eq!(ask("peers.test:9", "[fd00::7]:9").await, names(&["[fd00::7]:9"]));
        assert_eq!(ask("_peer._tcp.test", "x:1").await, names(&["castier-0.test:8081", "castier-1.test:8081 weight=5"]));
        for nothing in ["empty.test:9", "stranger.test:9", "_stranger._tcp.test"] {
            assert!(ask(nothing, "10.0.0.7:9").await.is_ok_and(|peers| peers.is_empty()) || ask(nothing, "10.0.0.7:9").await.is_err());
        }
    }
}
