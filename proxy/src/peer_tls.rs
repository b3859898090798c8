//! Mutual TLS at the peer listener. The handshake begins after the connection is counted, and must end within `limits.header_timeout`. So
//! connections without a handshake cannot occupy the listener without limit.

use castier_config::ClusterTls;
use castier_serverkit::pem::{certificates, private_key, unusable};
use pingora::{
    listeners::tls::Acceptor,
    protocols::{Stream, l4::stream::Stream as Socket},
    tls::{RootCertStore, ServerConfig, WebPkiClientVerifier, install_default_crypto_provider},
};
use rustls_pki_types::CertificateDer;
use std::{sync::Arc, time::Duration};
use x509_parser::prelude::{FromDer as _, X509Certificate};

/// Accepts peers whose certificate is signed by `cluster.tls.ca_file`, and presents this node's certificate. Also returns when the first
/// certificate of this node's chain expires. `None` if TLS is off.
pub(super) fn acceptor(tls: &ClusterTls) -> Result<Option<(Acceptor, Option<i64>)>, String> {
    if !tls.is_on() {
        return Ok(None);
    }
    install_default_crypto_provider();
    let mut roots = RootCertStore::empty();
    for root in certificates("cluster.tls.ca_file", &tls.ca_file)? {
        roots.add(root).map_err(|error| unusable("cluster.tls.ca_file", &tls.ca_file, &error))?;
    }
    let peers =
        WebPkiClientVerifier::builder(roots.into()).build().map_err(|error| unusable("cluster.tls.ca_file", &tls.ca_file, &error))?;
    let own = certificates("cluster.tls.cert_file", &tls.cert_file)?;
    let key = private_key("cluster.tls.key_file", &tls.key_file)?;
    let expiry = expiry(&own);
    let config = ServerConfig::builder().with_client_cert_verifier(peers).with_single_cert(own, key);
    let config = config.map_err(|error| unusable("cluster.tls.key_file", &tls.key_file, &error))?;
    Ok(Some((Acceptor::from_server_config(Arc::new(config)), expiry)))
}

/// When the first of these certificates expires, in seconds since 1970. `None` if none can be parsed; rustls reports that error.
fn expiry(certificates: &[CertificateDer<'_>]) -> Option<i64> {
    let parsed = certificates.iter().filter_map(|der| X509Certificate::from_der(der).ok());
    parsed.map(|(_, certificate)| certificate.validity().not_after.timestamp()).min()
}

/// The connection after its TLS handshake. `None` if the handshake failed, or took longer than `limit`.
pub(super) async fn accept(acceptor: &Acceptor, stream: Stream, limit: Duration) -> Option<Stream> {
    let socket = *stream.into_any().downcast::<Socket>().ok()?;
    match tokio::time::timeout(limit, acceptor.tls_handshake(socket)).await {
        Ok(Ok(secured)) => Some(Box::new(secured)),
        Ok(Err(error)) => {
            tracing::info!(%error, "no peer: the TLS handshake failed");
            None
        }
        Err(_) => None,
    }
}
