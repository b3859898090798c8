//! TLS at a listener: certificates by the name that a client asks for, client certificates, and files that are read again when they change.
//!
//! cert-manager and certbot change the files while a program runs: they swap a symlink, or write one file after the other. So [`Tls::watch`] compares
//! what the paths lead to, waits until nothing changes any more, and then reads everything again. A pair that cannot be used changes nothing.

use crate::pem::{certificates, private_key, unusable};
use arc_swap::ArcSwap;
use castier_config::TlsFiles;
use parking_lot::Mutex;
use prometheus::{IntCounter, IntGauge};
use rustls::{
    RootCertStore, ServerConfig,
    crypto::{CryptoProvider, ring},
    pki_types::CertificateDer,
    server::{
        ClientHello, NoServerSessionStorage, ProducesTickets, ResolvesServerCert, ServerSessionMemoryCache, StoresServerSessions,
        WebPkiClientVerifier, danger::ClientCertVerifier,
    },
    sign::CertifiedKey,
};
use std::{io, os::unix::fs::MetadataExt as _, path::Path, sync::Arc, time::Duration};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use x509_parser::{
    extensions::GeneralName,
    prelude::{FromDer as _, X509Certificate},
    time::ASN1Time,
};

/// How often [`Tls::watch`] looks at the files.
pub const LOOK: Duration = Duration::from_secs(2);
/// How many sessions of TLS 1.2 can be resumed. Those of TLS 1.3, and of clients with tickets, need no memory here.
const SESSIONS: usize = 4096;

/// The metrics of a listener's certificates.
#[derive(Clone)]
pub struct Metrics {
    /// When the first certificate expires, in seconds since 1970.
    pub expiry: IntGauge,
    /// How often changed files could not be used.
    pub reload_failures: IntCounter,
}

/// The certificates of one listener.
pub struct Tls {
    files: TlsFiles,
    alpn: Vec<Vec<u8>>,
    provider: Arc<CryptoProvider>,
    /// Outlive a reload, so that sessions can be resumed after it.
    resumption: Resumption,
    metrics: Metrics,
    acceptor: ArcSwap<Accept>,
    /// What the files were when they were last read, and one reading at a time.
    seen: Mutex<Stamps>,
}

struct Accept {
    public: Acceptor,
    admin: Acceptor,
    /// When the first certificate of the server expires, in seconds since 1970.
    expiry: i64,
}

/// The server's side of a new connection.
#[derive(Clone)]
pub struct Acceptor {
    tls: TlsAcceptor,
    /// Those that sign clients' certificates. A reload that finds the same ones keeps the pointer.
    authorities: Arc<[CertificateDer<'static>]>,
}

/// A client's certificate, which the handshake has verified.
pub struct Certificate {
    /// Its common name, or its first DNS name, mail name or URI, or all of its subject. Never empty.
    pub name: String,
    /// When it expires, in seconds since 1970.
    expiry: i64,
    authorities: Arc<[CertificateDer<'static>]>,
}

impl Acceptor {
    /// Makes the handshake on `stream`, and returns what the client has shown.
    ///
    /// # Errors
    /// The handshake failed.
    pub async fn accept<S: AsyncRead + AsyncWrite + Unpin>(&self, stream: S) -> io::Result<(TlsStream<S>, Option<Certificate>)> {
        let secured = self.tls.accept(stream).await?;
        let leaf = secured.get_ref().1.peer_certificates().and_then(<[_]>::first);
        let parsed = leaf.and_then(|der| X509Certificate::from_der(der).ok());
        let certificate = parsed.map(|(_, certificate)| Certificate {
            name: name_of(&certificate),
            expiry: certificate.validity().not_after.timestamp(),
            authorities: self.authorities.clone(),
        });
        Ok((secured, certificate))
    }
}

/// What resumes sessions.
struct Resumption {
    tickets: Arc<dyn ProducesTickets>,
    sessions: Arc<dyn StoresServerSessions>,
}

impl Resumption {
    fn none() -> Self {
        Self { tickets: Arc::new(NoTickets), sessions: Arc::new(NoServerSessionStorage {}) }
    }
}

/// What a path leads to: device, inode, size, and time of the last change in nanoseconds. `None`: nothing.
type Stamps = Vec<Option<(u64, u64, u64, i128)>>;

impl Tls {
    /// Reads the files. `alpn`: the protocols that the listener speaks, best first.
    ///
    /// # Errors
    /// A text that names the key and the file that cannot be used.
    pub fn open(files: TlsFiles, alpn: &[&[u8]], metrics: Metrics) -> Result<Arc<Self>, String> {
        let provider = Arc::new(ring::default_provider());
        let alpn: Vec<_> = alpn.iter().map(|protocol| protocol.to_vec()).collect();
        // In a resumed session the client's certificate is that of the first handshake, and nobody verifies it again. Tickets are renewed without end, so
        // it would hold after its expiry, and after its authority is gone.
        let resumption = if files.clients.is_some() {
            Resumption::none()
        } else {
            let tickets = ring::Ticketer::new().map_err(|error| format!("{}: no key for tickets: {error}", files.section))?;
            Resumption { tickets, sessions: ServerSessionMemoryCache::new(SESSIONS) }
        };
        let seen = stamps(&files);
        let accept = configure(&files, &alpn, &provider, &resumption, &[].into())?;
        metrics.expiry.set(accept.expiry);
        Ok(Arc::new(Self { files, alpn, provider, resumption, metrics, acceptor: ArcSwap::from_pointee(accept), seen: Mutex::new(seen) }))
    }

    /// Makes the server's side of a connection, with the certificates in force now.
    pub fn acceptor(&self) -> Acceptor {
        self.acceptor.load().public.clone()
    }

    /// As [`Self::acceptor`], for an admin listener: without HTTP/2, and without `client_required`, since health checks have no certificate.
    pub fn admin_acceptor(&self) -> Acceptor {
        self.acceptor.load().admin.clone()
    }

    /// Whether a certificate that a client has shown still counts: it has not expired, and none of the authorities that could have signed it is gone.
    pub fn trusts(&self, certificate: &Certificate) -> bool {
        let (then, now) = (&certificate.authorities, &self.acceptor.load().public.authorities);
        let is_valid = ASN1Time::now().timestamp() <= certificate.expiry;
        is_valid && (Arc::ptr_eq(then, now) || then.iter().all(|authority| now.contains(authority)))
    }

    /// Reads the files again. If they cannot be used, the certificates in force stay, and the log and a metric tell it. Blocks.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn reload(&self) -> Result<(), String> {
        let mut seen = self.seen.lock();
        // Before they are read: what changes meanwhile is seen the next time.
        *seen = stamps(&self.files);
        let before = self.acceptor.load().public.authorities.clone();
        let configured = configure(&self.files, &self.alpn, &self.provider, &self.resumption, &before).and_then(|accept| {
            // Clients would refuse it at once.
            let now = ASN1Time::now().timestamp();
            let is_worse = accept.expiry < now && now <= self.acceptor.load().expiry;
            if is_worse { Err(format!("{}: a certificate there has expired", self.files.section)) } else { Ok(accept) }
        });
        match configured {
            Ok(accept) => {
                self.metrics.expiry.set(accept.expiry);
                self.acceptor.store(Arc::new(accept));
                Ok(())
            }
            Err(why) => {
                self.metrics.reload_failures.inc();
                Err(why)
            }
        }
    }

    /// Reads the files again whenever they have changed, and then calls `then`, which may block. Runs without end.
    pub async fn watch(self: Arc<Self>, then: impl Fn() + Clone + Send + 'static) {
        let mut before: Option<Stamps> = None;
        loop {
            tokio::time::sleep(LOOK).await;
            let this = self.clone();
            // The disk may not answer.
            let now = tokio::task::spawn_blocking(move || (stamps(&this.files), this.seen.lock().clone())).await;
            let Ok((now, seen)) = now else { continue };
            if now == seen {
                before = None;
            } else if before.as_ref() == Some(&now) {
                // Nothing has changed since the last look: both files are written.
                let (this, then) = (self.clone(), then.clone());
                match tokio::task::spawn_blocking(move || this.reload().map(|()| then())).await {
                    Ok(Ok(())) => tracing::info!(section = self.files.section, "the changed certificates are in use"),
                    Ok(Err(why)) => tracing::error!(why, "the changed certificates cannot be used; those before stay"),
                    Err(_) => {}
                }
                before = None;
            } else {
                before = Some(now);
            }
        }
    }
}

/// Checks the files as [`Tls::open`] does. Returns notes about certificates that clients will not like, each with the key that names the file.
///
/// # Errors
/// A text that names the key and the file that cannot be used.
pub fn check(files: &TlsFiles) -> Result<Vec<(String, String)>, String> {
    let provider = Arc::new(ring::default_provider());
    configure(files, &[], &provider, &Resumption::none(), &[].into())?;
    let mut notes = Vec::new();
    for pair in &files.pairs {
        let chain = certificates(&pair.cert_key, &pair.cert_file)?;
        let Some((_, leaf)) = chain.first().and_then(|der| X509Certificate::from_der(der).ok()) else { continue };
        let mut note = |what: String| notes.push((pair.cert_key.clone(), format!("{}: {what}", pair.cert_file.display())));
        if !leaf.validity().is_valid() {
            note(format!("the certificate is valid from {} to {}, and not now", leaf.validity().not_before, leaf.validity().not_after));
        }
        let uses = leaf.extended_key_usage().ok().flatten();
        if uses.is_some_and(|uses| !uses.value.any && !uses.value.server_auth) {
            note("the certificate is not for servers (extendedKeyUsage lacks serverAuth)".to_owned());
        }
    }
    Ok(notes)
}

fn stamps(files: &TlsFiles) -> Stamps {
    let stamp = |path: &Path| {
        // Of the file behind the links.
        let found = std::fs::metadata(path).ok()?;
        Some((found.dev(), found.ino(), found.size(), i128::from(found.mtime()) * 1_000_000_000 + i128::from(found.mtime_nsec())))
    };
    files.paths().map(stamp).collect()
}

/// Reads the files. `before`: the authorities until now.
fn configure(
    files: &TlsFiles,
    alpn: &[Vec<u8>],
    provider: &Arc<CryptoProvider>,
    resumption: &Resumption,
    before: &Arc<[CertificateDer<'static>]>,
) -> Result<Accept, String> {
    let pairs = files.pairs.iter().map(|pair| Pair::read(pair, provider)).collect::<Result<Vec<_>, _>>()?;
    let expiry = pairs.iter().map(|pair| pair.expiry).min().unwrap_or(i64::MAX);
    let resolver = Arc::new(ByName(pairs));
    let mut authorities = Vec::new();
    let mut verifier = None;
    if let Some(clients) = &files.clients {
        let bad = |error: &dyn std::fmt::Display| unusable(&clients.key, &clients.ca_file, error);
        let mut roots = RootCertStore::empty();
        authorities = certificates(&clients.key, &clients.ca_file)?;
        for root in &authorities {
            roots.add(root.clone()).map_err(|error| bad(&error))?;
        }
        let builder = WebPkiClientVerifier::builder_with_provider(roots.into(), provider.clone());
        let optional = builder.clone().allow_unauthenticated().build().map_err(|error| bad(&error))?;
        verifier = Some((if clients.required { builder.build().map_err(|error| bad(&error))? } else { optional.clone() }, optional));
    }
    let config = |verifier: Option<&Arc<dyn ClientCertVerifier>>, alpn: Vec<Vec<u8>>| {
        let builder = ServerConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .map_err(|error| format!("{}: {error}", files.section))?;
        let builder = match verifier {
            Some(verifier) => builder.with_client_cert_verifier(verifier.clone()),
            None => builder.with_no_client_auth(),
        };
        let mut config = builder.with_cert_resolver(resolver.clone());
        config.ticketer = resumption.tickets.clone();
        config.session_storage = resumption.sessions.clone();
        config.alpn_protocols = alpn;
        Ok::<_, String>(config)
    };
    let public = config(verifier.as_ref().map(|(public, _)| public), alpn.to_vec())?;
    let without_http2 = alpn.iter().filter(|protocol| *protocol != b"h2").cloned().collect();
    let admin = config(verifier.as_ref().map(|(_, admin)| admin), without_http2)?;
    let authorities = if before[..] == authorities[..] { before.clone() } else { authorities.into() };
    let [public, admin] = [public, admin].map(|config| Acceptor { tls: Arc::new(config).into(), authorities: authorities.clone() });
    Ok(Accept { public, admin, expiry })
}

/// A certificate with its key, and the names that it is for.
#[derive(Debug)]
struct Pair {
    names: Vec<String>,
    key: Arc<CertifiedKey>,
    expiry: i64,
}

impl Pair {
    fn read(files: &castier_config::TlsPair, provider: &CryptoProvider) -> Result<Self, String> {
        let chain = certificates(&files.cert_key, &files.cert_file)?;
        let key = private_key(&files.key_key, &files.key_file)?;
        let bad = |error: &dyn std::fmt::Display| unusable(&files.cert_key, &files.cert_file, error);
        // Clients refuse the leaf as well if one above it has expired.
        let parsed = chain.iter().filter_map(|der| X509Certificate::from_der(der).ok());
        let expiry = parsed.map(|(_, certificate)| certificate.validity().not_after.timestamp()).min().unwrap_or(i64::MAX);
        let names = {
            let (_, leaf) = X509Certificate::from_der(&chain[0]).map_err(|error| bad(&error))?;
            let names = leaf.subject_alternative_name().ok().flatten();
            let names = names.map(|names| {
                names.value.general_names.iter().filter_map(|name| match name {
                    GeneralName::DNSName(name) => Some(name.to_ascii_lowercase()),
                    _ => None,
                })
            });
            names.into_iter().flatten().collect()
        };
        // Fails if the key is not that of the certificate.
        let key = CertifiedKey::from_der(chain, key, provider).map_err(|error| match error {
            rustls::Error::InconsistentKeys(_) => {
                unusable(&files.key_key, &files.key_file, &format!("is not the key of the certificate in {}", files.cert_file.display()))
            }
            rustls::Error::InvalidCertificate(_) => bad(&format!("{error}; make it with a subjectAltName (X.509 version 3)")),
            error => unusable(&files.key_key, &files.key_file, &error),
        })?;
        Ok(Self { names, key: Arc::new(key), expiry })
    }

    /// How well it fits a name: 2 if it has the name itself, 1 if a wildcard of it covers the name (RFC 6125, 6.4.3), else 0.
    fn fits(&self, name: &str) -> u8 {
        let above = name.split_once('.').map(|(_, above)| above);
        let fit = |own: &String| match own.strip_prefix("*.") {
            None if own == name => 2,
            Some(covered) if Some(covered) == above => 1,
            _ => 0,
        };
        self.names.iter().map(fit).max().unwrap_or(0)
    }
}

/// Chooses the certificate by the name that the client asks for; without a name, or for an unknown one, the first.
#[derive(Debug)]
struct ByName(Vec<Pair>);

impl ResolvesServerCert for ByName {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let name = hello.server_name().unwrap_or_default().to_ascii_lowercase();
        // The first of those that fit best.
        let best = self.0.iter().rev().max_by_key(|pair| pair.fits(&name))?;
        Some(best.key.clone())
    }
}

fn name_of(certificate: &X509Certificate<'_>) -> String {
    let common = certificate.subject().iter_common_name().find_map(|name| name.as_str().ok()).filter(|name| !name.is_empty());
    let alternative = || {
        let names = certificate.subject_alternative_name().ok().flatten()?;
        names.value.general_names.iter().find_map(|name| match name {
            GeneralName::DNSName(name) | GeneralName::RFC822Name(name) | GeneralName::URI(name) if !name.is_empty() => {
                Some((*name).to_owned())
            }
            _ => None,
        })
    };
    let subject = || Some(certificate.subject().to_string()).filter(|subject| !subject.is_empty());
    common.map(str::to_owned).or_else(alternative).or_else(subject).unwrap_or_else(|| "a certificate without a name".to_owned())
}

/// Makes no tickets.
#[derive(Debug)]
struct NoTickets;

impl ProducesTickets for NoTickets {
    fn enabled(&self) -> bool {
        false
    }

    fn lifetime(&self) -> u32 {
        0
    }

    fn encrypt(&self, _plain: &[u8]) -> Option<Vec<u8>> {
        None
    }

    fn decrypt(&self, _cipher: &[u8]) -> Option<Vec<u8>> {
        None
    }
}
