//! Requests of a route that are passed on to its upstream as they are: uploads, deletions, searches, log-ins.

use super::{Match, Route, Routes, links::Rewriter, metrics::Outcome, serve::Subject};
use crate::handlers::Request;
use castier_cache::{Asker, Fault};
use castier_upstream::Upstream;
use castier_wire::Target;
use http::{HeaderMap, Method, Version, header};
use pingora::http::{RequestHeader, ResponseHeader};
use std::{sync::Arc, time::Instant};

/// Where a relayed request goes.
pub struct RelayTo {
    pub(crate) server: Arc<Upstream>,
    subject: Subject,
    /// castier's path, as the client knows it.
    path: String,
}

impl Routes {
    /// Where a request of a route goes.
    ///
    /// # Errors
    /// The path cannot be part of a URL.
    pub(crate) fn relay(&self, found: &Match) -> Result<RelayTo, Fault> {
        if found.far.is_some() {
            return Err(Fault::BadRequest("links that castier has written are for GET and HEAD".into()));
        }
        let (method, headers) = (Method::GET, HeaderMap::new());
        let path = found.path().as_str().to_owned();
        let request = Request { method: &method, version: Version::HTTP_11, target: Target::Other, path: &path, headers: &headers };
        let subject = Subject::of(self.shared.clone(), &request, found.clone(), Asker::Client)?;
        let external = self.shared.external_url.as_str();
        let path = external[super::authority_part(external).len()..].to_owned();
        Ok(RelayTo { server: self.shared.client.upstream(&found.route)?, subject, path })
    }
}

impl RelayTo {
    fn route(&self) -> &Route {
        self.subject.route()
    }

    /// Changes the head of the request for the upstream.
    pub(crate) fn prepare(&self, request: &mut RequestHeader) -> pingora::Result<()> {
        request.set_raw_path(self.subject.target.as_bytes())?;
        // The upstream of a route is another party: who castier's clients are does not concern it. And some make links out of these.
        for name in ["x-forwarded-for", "x-forwarded-host", "x-forwarded-proto", "forwarded"] {
            request.remove_header(name);
        }
        if !self.route().is_private {
            request.remove_header(&header::AUTHORIZATION);
            if let Some(own) = &self.route().own {
                request.insert_header(header::AUTHORIZATION, own.authorization.clone())?;
            }
        }
        Ok(())
    }

    /// No answer came.
    pub(crate) fn failed(&self, asked: Instant) {
        self.route().answered(None, asked);
        self.route().metrics.request(Outcome::Error);
    }

    /// Changes the head of the answer for the client. A 2xx ends what is remembered of the path.
    pub(crate) fn answered(&self, response: &mut ResponseHeader, asked: Instant) {
        self.route().answered(Some(response.status), asked);
        self.route().metrics.request(if response.status.as_u16() >= 400 { Outcome::Error } else { Outcome::Relayed });
        if response.status.is_success() {
            self.subject.changed();
        }
        let location = response.headers.get(header::LOCATION).and_then(|location| location.to_str().ok());
        let rewriter = Rewriter { castier: self.path.clone(), ..self.subject.rewriter() };
        // Without scheme and host: the client adds those by which it knows castier.
        if let Some(location) = location
            && self.subject.at.join(location).is_ok_and(|url| self.route().is_upstream(&url))
            && let Some(link) = rewriter.link(location)
        {
            let _ = response.insert_header(header::LOCATION, link);
        }
    }
}
