//! An address to listen on, as far as its text tells.

use url::{Host, Url};

/// `HOST:PORT`.
pub(crate) struct Address {
    host: Host,
    port: u16,
}

impl Address {
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let (host, port) = text.rsplit_once(':')?;
        // `u16::from_str` would take "+80".
        let port = port.bytes().all(|b| b.is_ascii_digit()).then(|| port.parse().ok())??;
        Some(Self { host: Host::parse(host).ok()?, port })
    }

    /// Whether the two cannot both be opened. Port 0 is another free port each time.
    pub(crate) fn collides_with(&self, other: &Self) -> bool {
        let same_host = self.host == other.host || is_wildcard(&self.host) || is_wildcard(&other.host);
        self.port == other.port && self.port != 0 && same_host
    }

    /// Whether only this machine can connect to it.
    pub(crate) fn is_on_loopback(&self) -> bool {
        match &self.host {
            Host::Ipv4(ip) => ip.is_loopback(),
            Host::Ipv6(ip) => ip.is_loopback(),
            Host::Domain(name) => name == "localhost",
        }
    }

    /// Whether a connection to `url` may come to this address.
    pub(crate) fn is_reached_by(&self, url: &Url) -> bool {
        let Some(host) = url.host() else { return false };
        let same = match (&self.host, &host) {
            (Host::Domain(own), Host::Domain(other)) => own.eq_ignore_ascii_case(other),
            (Host::Ipv4(own), Host::Ipv4(other)) => own == other,
            (Host::Ipv6(own), Host::Ipv6(other)) => own == other,
            _ => false,
        };
        // A wildcard accepts what comes to the loopback. Names of the loopback and wildcards as a target reach it too.
        let alias = matches!(self.host, Host::Domain(_)) || matches!(host, Host::Domain(_)) || is_wildcard(&host);
        let by_loopback = stays_here(&host) && (is_wildcard(&self.host) || (stays_here(&self.host) && alias));
        self.port != 0 && url.port_or_known_default() == Some(self.port) && (same || by_loopback)
    }
}

/// Whether the host is every address of this machine.
const fn is_wildcard<S>(host: &Host<S>) -> bool {
    match host {
        Host::Ipv4(ip) => ip.is_unspecified(),
        Host::Ipv6(ip) => ip.is_unspecified(),
        Host::Domain(_) => false,
    }
}

/// Whether a connection to this host stays on this machine.
fn stays_here<S: AsRef<str>>(host: &Host<S>) -> bool {
    match host {
        Host::Domain(name) => {
            let name = name.as_ref().trim_end_matches('.').to_ascii_lowercase();
            name == "localhost" || name.ends_with(".localhost")
        }
        Host::Ipv4(ip) => ip.is_loopback() || ip.is_unspecified(),
        Host::Ipv6(ip) => ip.is_loopback() || ip.is_unspecified() || ip.to_ipv4_mapped().is_some_and(|ip| ip.is_loopback()),
    }
}
