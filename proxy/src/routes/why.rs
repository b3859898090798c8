//! What castier knows about a URL: which route matches, what is kept, and what would be asked.

use super::{Routes, serve::Subject};
use crate::handlers::{Request, peer::PURGE_NAMES};
use castier_cache::Asker;
use castier_routes::Glob;
use castier_wire::Target;
use futures::future::join_all;
use http::{HeaderMap, HeaderValue, Method, Version, header};
use percent_encoding::{NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};
use serde::Serialize;
use serde_json::{Map, Value, json};
use std::sync::Arc;

impl Routes {
    /// Explains what a GET of this URL (or path) would do. `headers`: `Accept` and others that choose between answers; a client's credentials count if
    /// they are among them.
    pub async fn why(&self, url: &str, mut headers: HeaderMap) -> Value {
        let (host, target) = split(url);
        if let Some(host) = host.and_then(|host| HeaderValue::try_from(host).ok()) {
            headers.insert(header::HOST, host);
        }
        let found = match self.find(host, false, target) {
            Ok(Some(found)) => found,
            Ok(None) => {
                let (what, next) = match Target::of(target.split('?').next().unwrap_or_default()) {
                    Target::Blob(_) => ("a blob of the origin", "GET it from /cas; see GET /stats for where blobs are kept"),
                    _ => ("no route matches: relayed to the origin, uncached", "the origin"),
                };
                return json!({ "url": url, "answer": what, "next": next, "routes": self.labels() });
            }
            Err(why) => return json!({ "url": url, "answer": format!("refused: {why}") }),
        };
        let method = Method::GET;
        let path = found.path().as_str().to_owned();
        let request = Request { method: &method, version: Version::HTTP_11, target: Target::Other, path: &path, headers: &headers };
        let subject = match Subject::of(self.shared.clone(), &request, found, Asker::Client) {
            Ok(subject) => Arc::new(subject),
            Err(fault) => return json!({ "url": url, "answer": fault.to_string() }),
        };
        let kept = subject.kept().await;
        let (facts, next) = subject.explained(kept.as_ref());
        let mut out = Map::new();
        out.insert("url".into(), url.into());
        out.extend(facts.into_iter().map(|(name, value)| (name.replace(' ', "_"), Value::from(value))));
        out.insert("next".into(), next.into());
        Value::Object(out)
    }

    /// Forgets what is kept under a URL. Returns how many names that were. `None`: no route matches.
    pub fn purge_url(&self, url: &str) -> Option<usize> {
        let (host, target) = split(url);
        let found = self.find(host, false, target).ok().flatten()?;
        let (method, headers, mut kept) = (Method::GET, HeaderMap::new(), 0);
        let path = found.path().as_str().to_owned();
        let id = found.route.id.clone();
        let request = Request { method: &method, version: Version::HTTP_11, target: Target::Other, path: &path, headers: &headers };
        if let Ok(subject) = Subject::of(self.shared.clone(), &request, found, Asker::Client) {
            kept = subject.changed();
        }
        // With any query, and what single clients were told.
        Some(kept + self.shared.names.remove_where(|entry| entry.route == id && entry.path == path))
    }
}

/// What is purged, as a part of a path for other nodes: a URL, or a route and a pattern.
fn encoded(parts: &[&str]) -> String {
    let parts: Vec<_> = parts.iter().map(|part| utf8_percent_encode(part, NON_ALPHANUMERIC).to_string()).collect();
    parts.join("/")
}

/// What was purged on which nodes.
#[derive(Debug, Serialize)]
pub struct PurgedNames {
    /// How many names this node has forgotten.
    names: usize,
    /// The other nodes that have forgotten theirs.
    purged: Vec<String>,
    /// The nodes that did not answer. They may still have some.
    failed: Vec<String>,
}

impl Routes {
    /// [`Self::purge_url`] on this node and its peers.
    pub async fn purge_url_everywhere(&self, url: &str) -> Option<PurgedNames> {
        let names = self.purge_url(url)?;
        Some(self.tell_peers(names, &encoded(&[url])).await)
    }

    /// [`Self::purge`] on this node and its peers.
    pub async fn purge_everywhere(&self, route: &str, path: &Glob) -> Option<PurgedNames> {
        let names = self.purge(route, path)?;
        Some(self.tell_peers(names, &encoded(&[route, path.as_str()])).await)
    }

    /// Purges what another node names. `None`: this node has no such route.
    pub fn purge_at_peers_request(&self, what: &str) -> Option<usize> {
        let decoded = |part: &str| Some(percent_decode_str(part).decode_utf8().ok()?.into_owned());
        match what.split_once('/') {
            None => self.purge_url(&decoded(what)?),
            Some((route, path)) => self.purge(&decoded(route)?, &Glob::parse(&decoded(path)?).ok()?),
        }
    }

    async fn tell_peers(&self, names: usize, what: &str) -> PurgedNames {
        let (mut purged, mut failed) = (Vec::new(), Vec::new());
        if let Some(peers) = &self.shared.peers {
            let view = peers.members().view();
            let path = format!("{PURGE_NAMES}{what}");
            let told = view.members().iter().filter(|member| !member.itself).map(async |member| {
                let told = peers.purge_names(member, &path).await;
                (member.name.to_string(), told.is_ok())
            });
            for (name, is_told) in join_all(told).await {
                if is_told { purged.push(name) } else { failed.push(name) }
            }
        }
        if failed.is_empty() {
            tracing::info!(names, ?purged, "purged names");
        } else {
            tracing::warn!(
                names,
                ?failed,
                "purged names, except on the failed nodes: they did not answer, or have no such route; purge again"
            );
        }
        PurgedNames { names, purged, failed }
    }
}

/// The authority and the target of a URL; of a path only the latter.
fn split(url: &str) -> (Option<&str>, &str) {
    let Some((_, rest)) = url.split_once("://") else { return (None, url) };
    match rest.find('/') {
        Some(at) => (Some(&rest[..at]), &rest[at..]),
        None => (Some(rest), "/"),
    }
}
