//! The servers that requests go to.

use std::net::SocketAddr;
use url::Url;

/// A server. Its name is resolved once, so that look-ups are not measured.
#[derive(Debug)]
pub(crate) struct Target {
    /// The URL as the user wrote it, for messages.
    pub(crate) url: String,
    /// The addresses of the name, in the resolver's order.
    pub(crate) addresses: Vec<SocketAddr>,
    /// The part of every path before `/cas`; usually empty.
    pub(crate) prefix: String,
    /// The end of every request line, and the headers of every request.
    pub(crate) head: String,
}

impl Target {
    /// Parses and resolves a URL. Refuses addresses that are not loopback unless `remote`.
    pub(crate) async fn resolve(text: &str, remote: bool) -> Result<Self, String> {
        let url = Url::parse(text).map_err(|error| format!("{text}: {error}; write it as http://127.0.0.1:8080"))?;
        let (Some(host), "http") = (url.host_str(), url.scheme()) else {
            return Err(format!("{text}: only http:// URLs can be loaded; write it as http://127.0.0.1:8080"));
        };
        if url.query().is_some() || url.fragment().is_some() || !url.username().is_empty() || url.password().is_some() {
            return Err(format!("{text}: give the server's address alone, without user, query or fragment"));
        }
        let port = url.port_or_known_default().unwrap_or(80);
        let name = host.trim_start_matches('[').trim_end_matches(']');
        let found = tokio::net::lookup_host((name, port)).await;
        let addresses: Vec<_> = found.map_err(|error| format!("{text}: cannot resolve {host}: {error}"))?.collect();
        if !remote && !addresses.iter().all(|address| address.ip().is_loopback()) {
            return Err(format!("{text} is not on this machine: if it is yours to load, say so with --yes-remote"));
        }
        let prefix = url.path().trim_end_matches('/').to_owned();
        let head = format!(" HTTP/1.1\r\nHost: {host}:{port}\r\nUser-Agent: castier-load/{}\r\n", env!("CARGO_PKG_VERSION"));
        Ok(Self { url: text.to_owned(), addresses, prefix, head })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn urls() {
        let target = Target::resolve("http://127.0.0.1:8080/", false).await.unwrap();
        assert_eq!((target.prefix.as_str(), target.addresses[0].port()), ("", 8080));
        assert!(target.head.contains("\r\nHost: 127.0.0.1:8080\r\n"));
        assert_eq!(Target::resolve("http://[::1]:81/store/", false).await.unwrap().prefix, "/store");
        assert!(Target::resolve("http://192.0.2.1:80", true).await.is_ok());
        for (text, names) in [
            ("127.0.0.1:8080", "http://127.0.0.1:8080"),
            ("https://127.0.0.1:8080", "only http://"),
            ("http://127.0.0.1:8080/?q", "alone"),
            ("http://192.0.2.1:80", "--yes-remote"),
        ] {
            let error = Target::resolve(text, false).await.unwrap_err();
            assert!(error.contains(names) && error.contains(text), "{error}");
        }
    }
}
