//! Who is admitted at the peer listener.

use crate::{
    request_head::Head,
    secured::{self, Failed},
};
use castier_cluster::{Asked, HEALTH, Secrets};
use castier_serverkit::tls::Tls;
use http::Method;
use pingora::protocols::Stream;
use std::{sync::Arc, time::Duration};

/// Admits only the nodes of the cluster to the peer listener.
pub struct PeerAccess {
    secrets: Arc<Secrets>,
    /// `None`: plain TCP.
    tls: Option<Arc<Tls>>,
}

impl PeerAccess {
    /// Admits nodes that prove that they know the secret and, with TLS, have a certificate from the cluster's CA.
    pub const fn new(tls: Option<Arc<Tls>>, secrets: Arc<Secrets>) -> Self {
        Self { secrets, tls }
    }

    /// Whether connections here speak TLS.
    pub(crate) const fn is_secured(&self) -> bool {
        self.tls.is_some()
    }

    /// The connection after its TLS handshake, if TLS is on. `None` if the handshake failed.
    pub(crate) async fn secure(&self, stream: Stream, timeout: Duration) -> Option<Stream> {
        let Some(tls) = &self.tls else { return Some(stream) };
        match secured::accept(tls.acceptor(), stream, timeout).await {
            Ok((stream, _)) => Some(stream),
            Err(Failed::Plain(_)) => None,
            Err(Failed::Handshake(why)) => {
                tracing::info!(why, "no peer: the TLS handshake failed");
                None
            }
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
