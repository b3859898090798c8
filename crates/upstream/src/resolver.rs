//! Host names to addresses, and addresses to a connection.
//!
//! - One look-up at a time per name, whatever number of requests waits for it. It runs in a task of its own, on no blocking thread.
//! - The last good answer is given at once, also while a new look-up runs, and also when that fails.
//! - A failure is remembered for [`FAILED_FOR`], so that a name server that does not answer is not asked with every request.
//! - Addresses are tried as RFC 8305 says: the families take turns, the next address starts 250 ms after the one before it or when that
//!   has failed, and the first connection wins. The address that won last time is tried first.

use hickory_resolver::{
    TokioResolver,
    config::{LookupIpStrategy, NameServerConfig, ResolveHosts, ResolverConfig},
    net::runtime::TokioRuntimeProvider,
};
use parking_lot::Mutex;
use std::{
    collections::HashMap,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::{Arc, LazyLock, Weak},
    time::{Duration, Instant},
};
use tokio::{
    net::TcpStream,
    sync::watch,
    task::JoinSet,
    time::{sleep_until, timeout, timeout_at},
};

/// How long an answer counts as fresh. Short, since an origin moves by its name. After that a new look-up starts.
const FRESH_FOR: Duration = Duration::from_secs(5);
/// How long an answer counts as fresh once none of its addresses takes a connection. A source that is down is not looked up for every
/// request.
const DOUBTED_FOR: Duration = Duration::from_millis(100);
/// How long a request waits for that. A name server that does not answer must not make a source that is down slow as well.
const DOUBT: Duration = Duration::from_millis(500);
/// How long a failure is remembered.
const FAILED_FOR: Duration = Duration::from_secs(1);
/// The end of a look-up whose name servers say nothing. More than the two attempts of 5 s that resolvers make by default.
const LOOK_UP_LIMIT: Duration = Duration::from_secs(15);
/// How long an address is tried alone before the next one is tried beside it (RFC 8305, section 5).
const STAGGER: Duration = Duration::from_millis(250);

/// Every name in use. Shared by all that use the same name, so that it is looked up once for all.
static NAMES: LazyLock<Mutex<HashMap<String, Weak<Name>>>> = LazyLock::new(Mutex::default);

/// A host name, or an address that stands for itself.
pub(crate) struct Name {
    host: String,
    state: Mutex<State>,
    /// Changes when a look-up has ended.
    ended: watch::Sender<()>,
}

#[derive(Default)]
struct State {
    /// The last good answer, in the order in which addresses are tried.
    known: Vec<IpAddr>,
    /// When it came. None: it stands for ever.
    at: Option<Instant>,
    /// Since when a look-up runs.
    looking: Option<Instant>,
    /// The last look-up failed: when, and why.
    failed: Option<(Instant, String)>,
}

impl Name {
    fn of(host: &str) -> Arc<Self> {
        let mut names = NAMES.lock();
        if let Some(name) = names.get(host).and_then(Weak::upgrade) {
            return name;
        }
        names.retain(|_, name| name.strong_count() > 0);
        let known: Vec<_> = host.parse().into_iter().collect();
        let name =
            Arc::new(Self { host: host.to_owned(), state: Mutex::new(State { known, ..State::default() }), ended: watch::Sender::new(()) });
        names.insert(host.to_owned(), Arc::downgrade(&name));
        name
    }

    /// The last good answer, at once; empty if there is none. Starts a look-up if the answer is no longer fresh.
    fn known(self: &Arc<Self>) -> Vec<IpAddr> {
        let mut state = self.state.lock();
        if state.at.is_some_and(|at| at.elapsed() >= FRESH_FOR) && !state.failed_lately() {
            self.look_up(&mut state);
        }
        state.known.clone()
    }

    /// The last good answer, or else the first one, which is waited for until `deadline`.
    async fn addresses(self: &Arc<Self>, deadline: Instant) -> Result<Vec<IpAddr>, String> {
        // Before the state is read: a look-up that ends between the two is not missed.
        let mut ended = self.ended.subscribe();
        {
            let known = self.known();
            if !known.is_empty() {
                return Ok(known);
            }
            let mut state = self.state.lock();
            if let Some((_, why)) = state.failed.as_ref().filter(|_| state.failed_lately()) {
                return Err(why.clone());
            }
            let patience = deadline.saturating_duration_since(Instant::now());
            match state.looking {
                None => self.look_up(&mut state),
                // Others have waited for so long already. A request that comes now learns nothing by waiting as long again.
                Some(since) if since.elapsed() >= patience => return Err(self.silent()),
                Some(_) => {}
            }
        }
        if timeout_at(deadline.into(), ended.changed()).await.is_err() {
            return Err(self.silent());
        }
        let state = self.state.lock();
        match &state.failed {
            Some((_, why)) if state.known.is_empty() => Err(why.clone()),
            _ => Ok(state.known.clone()),
        }
    }

    /// The last good answer, after the end of a look-up that is no older than [`DOUBTED_FOR`]. Waits for [`DOUBT`], until `deadline` at the
    /// latest, and then gives what is known.
    async fn renewed(self: &Arc<Self>, deadline: Instant) -> Vec<IpAddr> {
        let mut ended = self.ended.subscribe();
        let looking = {
            let mut state = self.state.lock();
            if state.at.is_some_and(|at| at.elapsed() >= DOUBTED_FOR) && !state.failed_lately() {
                self.look_up(&mut state);
            }
            state.looking.is_some()
        };
        if looking {
            let _ = timeout_at(deadline.min(Instant::now() + DOUBT).into(), ended.changed()).await;
        }
        self.state.lock().known.clone()
    }

    fn silent(&self) -> String {
        format!("the name servers do not say what {} is", self.host)
    }

    /// Starts a look-up, unless one runs.
    fn look_up(self: &Arc<Self>, state: &mut State) {
        if state.looking.is_some() {
            return;
        }
        state.looking = Some(Instant::now());
        let name = self.clone();
        tokio::spawn(async move {
            let found = timeout(LOOK_UP_LIMIT, look_up(&name.host)).await.unwrap_or_else(|_| Err(name.silent()));
            name.settle(found);
            name.ended.send_replace(());
        });
    }

    fn settle(&self, found: Result<Vec<IpAddr>, String>) {
        let mut state = self.state.lock();
        state.looking = None;
        match found {
            Ok(addresses) => {
                if state.failed.take().is_some() {
                    tracing::info!(name = self.host, "the name resolves again");
                }
                (state.known, state.at) = (addresses, Some(Instant::now()));
            }
            Err(why) => {
                if state.failed.is_none() {
                    let use_of = if state.known.is_empty() { "requests that need it fail" } else { "its last known addresses stay in use" };
                    tracing::warn!(name = self.host, error = why, "the name does not resolve; {use_of}; check the name servers");
                }
                state.failed = Some((Instant::now(), why));
            }
        }
    }
}

impl State {
    fn failed_lately(&self) -> bool {
        self.failed.as_ref().is_some_and(|(at, _)| at.elapsed() < FAILED_FOR)
    }
}

/// The addresses of one server: a name and a port.
pub struct Addresses {
    name: Arc<Name>,
    port: u16,
    /// The one that the last new connection was made to.
    good: Mutex<Option<IpAddr>>,
}

impl Addresses {
    /// Of a host name, or an address, at this port.
    pub fn of(host: &str, port: u16) -> Self {
        Self { name: Name::of(host), port, good: Mutex::new(None) }
    }

    /// Those that are known without waiting, the last good one first.
    pub fn known(&self) -> Vec<SocketAddr> {
        self.in_order(self.name.known())
    }

    /// All of them, the last good one first. The first look-up of a name is waited for until `deadline`.
    ///
    /// # Errors
    /// Why the name does not resolve.
    pub async fn all(&self, deadline: Instant) -> Result<Vec<SocketAddr>, String> {
        Ok(self.in_order(self.name.addresses(deadline).await?))
    }

    /// The addresses that the name has by now beside these, of which none takes a connection. A pod that was restarted has its old name and
    /// a new address, and its peers must not take it for dead because they remember the old one.
    pub async fn moved(&self, tried: &[SocketAddr], deadline: Instant) -> Vec<SocketAddr> {
        let mut addresses = self.in_order(self.name.renewed(deadline).await);
        addresses.retain(|address| !tried.contains(address));
        addresses
    }

    fn in_order(&self, mut addresses: Vec<IpAddr>) -> Vec<SocketAddr> {
        if let Some(good) = *self.good.lock()
            && let Some(at) = addresses.iter().position(|address| *address == good)
        {
            addresses[..=at].rotate_right(1);
        }
        addresses.into_iter().map(|ip| SocketAddr::new(ip, self.port)).collect()
    }

    /// A new connection to the first of these addresses that takes one before `deadline`.
    ///
    /// # Errors
    /// Why the last of them did not.
    pub async fn connect(&self, addresses: &[SocketAddr], deadline: Instant) -> io::Result<(TcpStream, SocketAddr)> {
        let (stream, address) = first_of(addresses, deadline).await?;
        *self.good.lock() = Some(address.ip());
        Ok((stream, address))
    }
}

/// Connects to one address after the other, without waiting for long for any of them.
async fn first_of(addresses: &[SocketAddr], deadline: Instant) -> io::Result<(TcpStream, SocketAddr)> {
    let mut waiting = addresses.iter().copied();
    let mut failed = io::Error::new(io::ErrorKind::NotFound, "no address");
    // Dropped with all attempts that have not won.
    let mut attempts = JoinSet::new();
    loop {
        let next = waiting.next();
        if let Some(address) = next {
            attempts.spawn(async move { TcpStream::connect(address).await.map(|stream| (stream, address)) });
        }
        let until = if waiting.len() > 0 { deadline.min(Instant::now() + STAGGER) } else { deadline };
        tokio::select! {
            biased;
            done = attempts.join_next() => match done {
                Some(Ok(Ok(connected))) => return Ok(connected),
                Some(Ok(Err(error))) => failed = error,
                Some(Err(error)) => failed = io::Error::other(error),
                None => return Err(failed),
            },
            () = sleep_until(until.into()) => if Instant::now() >= deadline {
                return Err(io::Error::new(io::ErrorKind::TimedOut, "no address took the connection in time"));
            },
        }
    }
}

/// `/etc/hosts`, then the name servers in `/etc/resolv.conf`, with its search domains. Both files are read anew each time, as they may
/// have changed.
async fn look_up(host: &str) -> Result<Vec<IpAddr>, String> {
    let listed = std::fs::read_to_string("/etc/hosts").map(|text| listed(&text, host)).unwrap_or_default();
    if !listed.is_empty() {
        return Ok(in_turn(listed));
    }
    // RFC 6761, section 6.3: no name server is asked about these.
    let bare = host.trim_end_matches('.').to_ascii_lowercase();
    if bare == "localhost" || bare.ends_with(".localhost") {
        return Ok(vec![Ipv6Addr::LOCALHOST.into(), Ipv4Addr::LOCALHOST.into()]);
    }
    let provider = TokioRuntimeProvider::default();
    let mut builder = TokioResolver::builder(provider.clone()).unwrap_or_else(|_| {
        // Without a usable /etc/resolv.conf the C library asks this machine.
        let servers = vec![NameServerConfig::udp_and_tcp(Ipv4Addr::LOCALHOST.into())];
        TokioResolver::builder_with_config(ResolverConfig::from_parts(None, vec![], servers), provider)
    });
    let options = builder.options_mut();
    (options.cache_size, options.use_hosts_file, options.ip_strategy) = (0, ResolveHosts::Never, LookupIpStrategy::Ipv6AndIpv4);
    let resolver = builder.build().map_err(|error| error.to_string())?;
    let found = resolver.lookup_ip(host).await.map_err(|error| format!("{host} does not resolve: {error}"))?;
    let addresses: Vec<_> = found.iter().collect();
    if addresses.is_empty() { Err(format!("{host} does not resolve: no address")) } else { Ok(in_turn(addresses)) }
}

/// The addresses that a hosts file lists for this name.
fn listed(hosts: &str, host: &str) -> Vec<IpAddr> {
    let host = host.trim_end_matches('.');
    let address = |line: &str| {
        let mut words = line.split('#').next()?.split_ascii_whitespace();
        let address = words.next()?.parse().ok()?;
        words.any(|name| name.trim_end_matches('.').eq_ignore_ascii_case(host)).then_some(address)
    };
    hosts.lines().filter_map(address).collect()
}

/// Each address once, the families in turn, IPv6 first (RFC 8305, section 4).
fn in_turn(addresses: Vec<IpAddr>) -> Vec<IpAddr> {
    let (six, four): (Vec<_>, Vec<_>) = addresses.into_iter().partition(IpAddr::is_ipv6);
    let (mut six, mut four) = (six.into_iter(), four.into_iter());
    let mut ordered = Vec::new();
    while six.len() + four.len() > 0 {
        for address in [six.next(), four.next()].into_iter().flatten() {
            if !ordered.contains(&address) {
                ordered.push(address);
            }
        }
    }
    ordered
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::{TcpListener, TcpSocket};

    fn ips(text: &str) -> Vec<IpAddr> {
        text.split_ascii_whitespace().map(|ip| ip.parse().unwrap()).collect()
    }

    #[test]
    fn families_take_turns() {
        assert_eq!(in_turn(ips("10.0.0.1 10.0.0.2 10.0.0.1 ::1 10.0.0.3")), ips("::1 10.0.0.1 10.0.0.2 10.0.0.3"));
        assert_eq!(in_turn(ips("::1 ::2 10.0.0.1")), ips("::1 10.0.0.1 ::2"));
        assert_eq!(in_turn(vec![]), vec![] as Vec<IpAddr>);
    }

    #[test]
    fn a_hosts_file_lists_names() {
        let hosts = "# 10.0.0.9 origin\n10.0.0.1\tother Origin # the origin\n::1 localhost\nnonsense origin\n\n10.0.0.2 origin.\n10.0.0.3 originals";
        assert_eq!(listed(hosts, "origin"), ips("10.0.0.1 10.0.0.2"));
        assert_eq!(listed(hosts, "localhost."), ips("::1"));
        assert_eq!(listed(hosts, "absent"), vec![] as Vec<IpAddr>);
    }

    #[tokio::test]
    async fn the_address_that_won_is_tried_first() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let good = listener.local_addr().unwrap();
        let addresses = Addresses::of("127.0.0.1", good.port());
        // Nothing listens on this one.
        let refusing = SocketAddr::from(([127, 0, 0, 2], good.port()));
        let deadline = Instant::now() + Duration::from_secs(60);
        let (_, winner) = addresses.connect(&[refusing, good], deadline).await.unwrap();
        assert_eq!(winner, good);
        assert_eq!(addresses.in_order(vec![refusing.ip(), good.ip()]), [good, refusing]);
        let refused = addresses.connect(&[refusing], deadline).await.unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
    }

    #[tokio::test]
    async fn a_silent_address_holds_up_nobody_for_long() {
        // A queue of connections that is full takes no more, and says nothing.
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.3:0".parse().unwrap()).unwrap();
        let silent = socket.listen(0).unwrap();
        let silent_address = silent.local_addr().unwrap();
        let _queued = [TcpStream::connect(silent_address).await.unwrap()];
        let good = TcpListener::bind(("127.0.0.1", silent_address.port())).await.unwrap();
        let addresses = Addresses::of("127.0.0.1", silent_address.port());
        let deadline = Instant::now() + Duration::from_secs(60);
        let (_, winner) = addresses.connect(&[silent_address, good.local_addr().unwrap()], deadline).await.unwrap();
        assert_eq!(winner, good.local_addr().unwrap());
    }

    #[tokio::test]
    async fn localhost_needs_no_name_server() {
        let name = Name::of("some.localhost");
        let deadline = Instant::now() + Duration::from_secs(60);
        assert_eq!(name.addresses(deadline).await, Ok(ips("::1 127.0.0.1")));
        assert!(Arc::ptr_eq(&name, &Name::of("some.localhost")), "one name, one look-up");
    }
}
