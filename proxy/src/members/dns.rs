//! Members from the domain name system.

use async_trait::async_trait;
use castier_config::{Cluster, Peer};
use hickory_resolver::{
    TokioResolver,
    net::runtime::TokioRuntimeProvider,
    proto::rr::{RData, RecordType},
};
use std::net::IpAddr;

/// Says who the members are.
#[async_trait]
pub(super) trait Resolve: Send + Sync + 'static {
    /// All members as of now, in any order; none, or an error, if that cannot be told.
    async fn resolve(&self) -> Result<Vec<Peer>, String>;
}

/// `cluster.dns`: the addresses of a name, or SRV records, whose targets, ports and weights it takes and whose priorities it ignores,
/// as every member works.
///
/// Of addresses it takes one family, that of `cluster.advertise`: nodes with an address of each would count twice.
pub(super) struct Dns {
    resolver: TokioResolver,
    name: String,
    kind: Kind,
}

enum Kind {
    Srv,
    Addresses { port: u16, record: RecordType },
}

impl Dns {
    /// Asks the system's name servers, with its search domains and its file of hosts. Nothing is cached: what was true
    /// `cluster.refresh` ago is what is to be found out.
    ///
    /// # Errors
    /// A text that names the key, or the system's file, that cannot be used.
    pub(super) fn new(config: &Cluster) -> Result<Self, String> {
        let unusable = |error| format!("cluster.dns: the system's name servers are not known ({error}); see /etc/resolv.conf");
        let mut builder = TokioResolver::builder(TokioRuntimeProvider::default()).map_err(unusable)?;
        builder.options_mut().cache_size = 0;
        Self::with(builder.build().map_err(unusable)?, config)
    }

    fn with(resolver: TokioResolver, config: &Cluster) -> Result<Self, String> {
        if config.dns.starts_with('_') {
            return Ok(Self { resolver, name: config.dns.clone(), kind: Kind::Srv });
        }
        let service: Peer = config.dns.parse().map_err(|error| format!("cluster.dns: {error}"))?;
        let advertise: Peer = config.advertise.parse().map_err(|error| format!("cluster.advertise: {error}"))?;
        let record = if matches!(advertise.ip(), Some(IpAddr::V6(_))) { RecordType::AAAA } else { RecordType::A };
        // The search list applies to names that do not end with a dot, which a parsed host has lost.
        let rooted = config.dns.rsplit_once(':').is_some_and(|(host, _)| host.ends_with('.'));
        let name = if rooted { service.host + "." } else { service.host };
        Ok(Self { resolver, name, kind: Kind::Addresses { port: service.port, record } })
    }
}

#[async_trait]
impl Resolve for Dns {
    async fn resolve(&self) -> Result<Vec<Peer>, String> {
        let record = match self.kind {
            Kind::Srv => RecordType::SRV,
            Kind::Addresses { record, .. } => record,
        };
        let found = self.resolver.lookup(self.name.as_str(), record).await.map_err(|error| error.to_string())?;
        let peer = |data: &RData| match (data, &self.kind) {
            (RData::SRV(srv), Kind::Srv) => format!("{}:{} weight={}", srv.target, srv.port, srv.weight.max(1)).parse().ok(),
            (RData::A(ip), Kind::Addresses { port, .. }) => Some(Peer { host: ip.to_string(), port: *port, weight: 1 }),
            (RData::AAAA(ip), Kind::Addresses { port, .. }) => Some(Peer { host: ip.to_string(), port: *port, weight: 1 }),
            // An alias on the way to the records.
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

    /// A name server on the loopback that knows these records, and of other names that they do not exist.
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
