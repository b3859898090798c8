//! `GET /healthz` of a peer. Only a castier that knows the cluster's secret counts as up. Without a secret, any castier does.

use crate::{
    members::{Member, NODE, Probe},
    peers::{HEALTH, POOL, prove},
    secret::Secrets,
};
use arc_swap::ArcSwap;
use async_trait::async_trait;
use castier_config::ClusterTls;
use castier_serverkit::pem;
use castier_upstream::{Addresses, UNPROVED, certificates_file};
use http::{Method, StatusCode, header};
use pingora::{
    connectors::{ConnectorOptions, http::v1::Connector},
    http::RequestHeader,
    upstreams::peer::HttpPeer,
};
use std::{
    net::SocketAddr,
    panic::AssertUnwindSafe,
    sync::Arc,
    time::{Duration, Instant},
};

/// How long the first look-up of a peer's name may take.
const LOOK_UP: Duration = Duration::from_secs(5);

/// Probes peers, each time over a new connection: a peer that answers only over old connections cannot serve new requests.
pub struct HttpProbe {
    connector: ArcSwap<Connector>,
    files: ClusterTls,
    tls: bool,
    secrets: Arc<Secrets>,
}

impl HttpProbe {
    /// Probes over plain TCP or mutual TLS, as configured.
    ///
    /// # Errors
    /// A text that names the configuration key whose file is unusable.
    pub fn new(tls: &ClusterTls, secrets: Arc<Secrets>) -> Result<Self, String> {
        let connector = ArcSwap::from_pointee(connect_with(tls, |options| Connector::new(Some(options)))?);
        Ok(Self { connector, files: tls.clone(), tls: tls.is_on(), secrets })
    }

    /// Uses the certificates that are in the files now, for the connections from here on. Blocks.
    ///
    /// # Errors
    /// As [`Self::new`]; nothing changes then.
    pub fn renew_certificates(&self) -> Result<(), String> {
        self.connector.store(Arc::new(connect_with(&self.files, |options| Connector::new(Some(options)))?));
        Ok(())
    }

    async fn ask(&self, member: &Member, address: SocketAddr) -> Result<Option<String>, String> {
        let unreadable = |error: Box<pingora::Error>| error.to_string();
        let peer = HttpPeer::new(address, self.tls, if self.tls { member.host.clone() } else { String::new() });
        let (mut session, _) = self.connector.load_full().get_http_session(&peer).await.map_err(unreadable)?;
        let mut request = RequestHeader::build(Method::GET, HEALTH.as_bytes(), Some(4)).map_err(unreadable)?;
        request.insert_header(header::HOST, &*member.name).map_err(unreadable)?;
        request.insert_header(header::CONNECTION, "close").map_err(unreadable)?;
        let asked = prove(&self.secrets, &mut request).map_err(unreadable)?;
        session.write_request_header(Box::new(request)).await.map_err(unreadable)?;
        session.read_response().await.map_err(unreadable)?;
        let head = session.resp_header().ok_or("no head")?;
        let (status, node) = (head.status, head.headers.get(NODE).and_then(|node| node.to_str().ok()));
        if !asked.is_answered(status, &head.headers) {
            return Err(format!("status {} to GET {HEALTH}, {UNPROVED}", status.as_u16()));
        }
        match (status, node) {
            (StatusCode::OK, Some(node)) => Ok(Some(node.to_owned())),
            (StatusCode::OK, None) => Err(format!("status 200 to GET {HEALTH}, but not from a castier: the answer names no node")),
            _ => Err(format!("status {} to GET {HEALTH}", status.as_u16())),
        }
    }
}

#[async_trait]
impl Probe for HttpProbe {
    async fn probe(&self, member: &Member) -> Result<Option<String>, String> {
        // The caller limits the time of the whole probe.
        let addresses = Addresses::of(&member.host, member.port).all(Instant::now() + LOOK_UP).await?;
        let mut answer = Err(format!("{} does not resolve", member.host));
        for address in addresses {
            answer = self.ask(member, address).await;
            if answer.is_ok() {
                break;
            }
        }
        answer
    }
}

/// What connects to peers, made from its options.
///
/// # Errors
/// As [`peer_options`].
pub(crate) fn connect_with<C>(tls: &ClusterTls, make: impl FnOnce(ConnectorOptions) -> C) -> Result<C, String> {
    let options = peer_options(tls)?;
    // pingora panics if the key does not match the certificate.
    std::panic::catch_unwind(AssertUnwindSafe(|| make(options)))
        .map_err(|_| "cluster.tls.key_file: is not the key of the certificate in cluster.tls.cert_file".to_owned())
}

/// The options of connections to peers. Checks the TLS files, since pingora panics on bad ones.
///
/// # Errors
/// A text that names the configuration key whose file is unusable.
fn peer_options(tls: &ClusterTls) -> Result<ConnectorOptions, String> {
    let mut options = ConnectorOptions::new(POOL);
    if !tls.is_on() {
        return Ok(options);
    }
    options.ca_file = certificates_file("cluster.tls.ca_file", &tls.ca_file)?;
    let certificate = certificates_file("cluster.tls.cert_file", &tls.cert_file)?;
    pem::private_key("cluster.tls.key_file", &tls.key_file)?;
    let key = pem::path_text("cluster.tls.key_file", &tls.key_file)?;
    options.cert_key_file = certificate.map(|certificate| (certificate, key));
    Ok(options)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::TcpListener,
    };

    fn no_secret() -> Arc<Secrets> {
        Arc::new(Secrets::open(&castier_config::Cluster::default()).unwrap())
    }

    /// The result of probing a peer with this answer.
    async fn probe(answer: &'static str) -> Result<Option<String>, String> {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let served = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                head.push(stream.read_u8().await.unwrap());
            }
            stream.write_all(answer.as_bytes()).await.unwrap();
            String::from_utf8(head).unwrap()
        });
        let name = format!("127.0.0.1:{port}");
        let member = Member { name: name.as_str().into(), host: "127.0.0.1".into(), port, itself: false, up: true };
        let answer = HttpProbe::new(&ClusterTls::default(), no_secret()).unwrap().probe(&member).await;
        let head = served.await.unwrap();
        assert!(head.starts_with("GET /healthz HTTP/1.1\r\n") && head.contains(&format!("Host: {name}\r\n")), "{head}");
        answer
    }

    #[tokio::test]
    async fn a_peer_lives_if_it_says_so() {
        assert!(probe("HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nok\n").await.unwrap_err().contains("not from a castier"));
        assert_eq!(probe("HTTP/1.1 200 OK\r\nCastier-Node: abc\r\nContent-Length: 0\r\n\r\n").await, Ok(Some("abc".into())));
        assert_eq!(probe("HTTP/1.1 503 x\r\nContent-Length: 0\r\n\r\n").await, Err("status 503 to GET /healthz".into()));
        for broken in ["", "SSH-2.0-OpenSSH_9.2\r\n\r\n", "HTTP/1.1 200"] {
            assert!(probe(broken).await.is_err(), "{broken}");
        }
        let closed = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port();
        let nobody = Member { name: "x".into(), host: "127.0.0.1".into(), port: closed, itself: false, up: true };
        assert!(HttpProbe::new(&ClusterTls::default(), no_secret()).unwrap().probe(&nobody).await.is_err());
    }

    /// A self-signed certificate, its key, and another key. They open nothing.
    const CERTIFICATE: &str = "\
-----BEGIN CERTIFICATE-----
MIIBcDCCARWgAwIBAgIUTiMNVhFbQLkhXrZdayGpVo7x85owCgYIKoZIzj0EAwIw
DDEKMAgGA1UEAwwBYTAgFw0yNjExMjEwNTQwNDBaGA8yMTI2MTAyODA1NDA0MFow
DDEKMAgGA1UEAwwBYTBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABAU4jGWWRdJN
oqGKgyebiWP5ZRhq0v1hGS0tlKIBG1riLqu7ui38fqeGY74gT7sjIDLYdhRaGdsx
VIQJjOO9XWqjUzBRMB0GA1UdDgQWBBQf7FCDTSKsakvbY2GmpGBwcHaNljAfBgNV
HSMEGDAWgBQf7FCDTSKsakvbY2GmpGBwcHaNljAPBgNVHRMBAf8EBTADAQH/MAoG
CCqGSM49BAMCA0kAMEYCIQCHQcpLSCIXdsr8V2xnhMwBl4Fu+FP1OhbxU3IoDNYo
fQIhAKXEsKQq47iJrVkt+y8wPBW+or7oYYQTrLiJkz4GjN9T
-----END CERTIFICATE-----
";
    const KEY: &str = "\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgbXyJkpmlWO7fZAsj
pFwrxFmGTl5jpl4VsEq5vzKzDK6hRANCAAQFOIxllkXSTaKhioMnm4lj+WUYatL9
YRktLZSiARta4i6ru7ot/H6nhmO+IE+7IyAy2HYUWhnbMVSECYzjvV1q
-----END PRIVATE KEY-----
";
    const OTHER_KEY: &str = "\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgqFLeI8CqrM/a+Ldz
2r9pPyrQ0VYOjddorpj6WJMOfgKhRANCAARrPXffXD2m9Cpm3cGQJqTcWpPmm3G2
q1FGpqc5Ie2XpTwFYEMVYPzeYXwnLCQLkl58fRrWyaupCXsyEzeYbfzt
-----END PRIVATE KEY-----
";

    #[test]
    fn bad_tls_files_are_named() {
        let directory = tempfile::tempdir().unwrap();
        let with = |cert_file: &str, key_file: &str, ca_file: &str| {
            let write = |name: &str, text: &str| {
                let file = directory.path().join(name);
                std::fs::write(&file, text).unwrap();
                file
            };
            let tls = ClusterTls { cert_file: write("cert", cert_file), key_file: write("key", key_file), ca_file: write("ca", ca_file) };
            HttpProbe::new(&tls, no_secret()).map(|probe| probe.tls)
        };
        assert_eq!(with(CERTIFICATE, KEY, CERTIFICATE), Ok(true));
        for (found, key) in [
            (with("no PEM", KEY, CERTIFICATE), "cluster.tls.cert_file"),
            (with(CERTIFICATE, CERTIFICATE, CERTIFICATE), "cluster.tls.key_file"),
            (with(CERTIFICATE, OTHER_KEY, CERTIFICATE), "cluster.tls.key_file"),
            (with(CERTIFICATE, KEY, ""), "cluster.tls.ca_file"),
        ] {
            let why = found.unwrap_err();
            assert!(why.starts_with(key), "{key}: {why}");
        }
    }
}
