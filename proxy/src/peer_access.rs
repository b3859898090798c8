//! Who is admitted at the peer listener.

use crate::{handlers::peer::HEALTH, peer_tls, request_head::Head};
use castier_cluster::{Asked, Secrets};
use castier_config::ClusterTls;
use http::Method;
use pingora::{listeners::tls::Acceptor, protocols::Stream};
use std::{sync::Arc, time::Duration};

/// Admits the nodes of the cluster to the peer listener, and nobody else.
pub struct PeerAccess {
    secrets: Arc<Secrets>,
    /// None: plain TCP.
    tls: Option<Acceptor>,
    /// When the certificate that is shown expires, in seconds since 1970; none without TLS.
    certificate_expiry: Option<i64>,
}

impl PeerAccess {
    /// For those that prove that they know the secret and, with TLS, have a certificate of the cluster's.
    ///
    /// # Errors
    /// A text that names the key of `cluster.tls` whose file cannot be used.
    pub fn new(tls: &ClusterTls, secrets: Arc<Secrets>) -> Result<Self, String> {
        let (acceptor, certificate_expiry) = peer_tls::acceptor(tls)?.unzip();
        Ok(Self { secrets, tls: acceptor, certificate_expiry: certificate_expiry.flatten() })
    }

    /// When the certificate that is shown to peers expires, or one of those that vouch for it, in seconds since 1970.
    pub const fn certificate_expiry(&self) -> Option<i64> {
        self.certificate_expiry
    }

    /// Whether connections here speak TLS.
    pub(crate) const fn is_secured(&self) -> bool {
        self.tls.is_some()
    }

    /// The connection with its TLS handshake done, if there is one to do; none if it failed.
    pub(crate) async fn secure(&self, stream: Stream, timeout: Duration) -> Option<Stream> {
        match &self.tls {
            None => Some(stream),
            Some(acceptor) => peer_tls::accept(acceptor, stream, timeout).await,
        }
    }

    /// What the answer is to be proved with, if the request whose head stands at the front of `bytes` is a peer's, or may be anybody's.
    pub(crate) fn admits(&self, head: &Head, bytes: &[u8]) -> Option<Asked> {
        let (method, path) = (head.method.as_str(), head.path(bytes));
        let admitted = head.asked(bytes).and_then(|fields| self.secrets.admit(head.proof(bytes), method, path, fields));
        // A proof that does not fit is refused here too, so that a node with another secret shows in the figures of both.
        let anybody = head.method == Method::GET && path == HEALTH && head.proof(bytes).is_none();
        admitted.or_else(|| anybody.then_some(Asked::OPEN))
    }
}
