//! Who is admitted at the peer listener.

use crate::{peer_tls, request_head::Head};
use castier_cluster::{Asked, HEALTH, Secrets};
use castier_config::ClusterTls;
use http::Method;
use pingora::{listeners::tls::Acceptor, protocols::Stream};
use std::{sync::Arc, time::Duration};

/// Admits only the nodes of the cluster to the peer listener.
pub struct PeerAccess {
    secrets: Arc<Secrets>,
    /// `None`: plain TCP.
    tls: Option<Acceptor>,
    /// When this node's certificate expires, in seconds since 1970; `None` without TLS.
    certificate_expiry: Option<i64>,
}

impl PeerAccess {
    /// Admits nodes that prove that they know the secret and, with TLS, have a certificate from the cluster's CA.
    ///
    /// # Errors
    /// A text that names the key of `cluster.tls` whose file cannot be used.
    pub fn new(tls: &ClusterTls, secrets: Arc<Secrets>) -> Result<Self, String> {
        let (acceptor, certificate_expiry) = peer_tls::acceptor(tls)?.unzip();
        Ok(Self { secrets, tls: acceptor, certificate_expiry: certificate_expiry.flatten() })
    }

    /// When the first certificate of this node's chain expires, in seconds since 1970.
    pub const fn certificate_expiry(&self) -> Option<i64> {
        self.certificate_expiry
    }

    /// Whether connections here speak TLS.
    pub(crate) const fn is_secured(&self) -> bool {
        self.tls.is_some()
    }

    /// The connection after its TLS handshake, if TLS is on. `None` if the handshake failed.
    pub(crate) async fn secure(&self, stream: Stream, timeout: Duration) -> Option<Stream> {
        match &self.tls {
            None => Some(stream),
            Some(acceptor) => peer_tls::accept(acceptor, stream, timeout).await,
        }
    }

    /// What the answer must prove, if the request is admitted: a peer's request, or a health check, which needs no proof. The head of the request
    /// is at the front of `bytes`.
    pub(crate) fn admits(&self, head: &Head, bytes: &[u8]) -> Option<Asked> {
        let (method, path) = (head.method.as_str(), head.path(bytes));
        let admitted = head.asked(bytes).and_then(|fields| self.secrets.admit(head.proof(bytes), method, path, fields));
        // A health check with a wrong proof is refused. So a node with another secret shows in the metrics of both nodes.
        let anybody = head.method == Method::GET && path == HEALTH && head.proof(bytes).is_none();
        admitted.or_else(|| anybody.then_some(Asked::OPEN))
    }
}
