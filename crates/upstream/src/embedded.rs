//! The embedded origin as a store: its files or its bucket, without its HTTP server. What is not about a blob (`/ac`, `/kv`) is relayed to its HTTP server on a loopback port, so
//! the state and the figures of the origin are those of both.

use crate::http::Upstream;
use bytes::Bytes;
use castier_blob::Digest;
use castier_cache::{Answer, Ask, Fault, Incoming, Put, Source, Stat, Store, Upload};
use futures::{FutureExt as _, StreamExt as _, future::BoxFuture};
use http::StatusCode;
use std::{sync::Arc, time::Instant};

/// Counts what the files of the embedded origin are asked for as if its server had been asked.
pub struct EmbeddedStore {
    files: Arc<dyn Store>,
    server: Arc<Upstream>,
}

impl EmbeddedStore {
    /// `server` serves the same files over HTTP.
    pub fn new(files: Arc<dyn Store>, server: Arc<Upstream>) -> Self {
        Self { files, server }
    }

    /// Notes how a request ended that began at `asked`.
    fn found<T>(&self, asked: Instant, answer: Result<T, Fault>) -> Result<T, Fault> {
        // Refusals are answers: the origin is up. What was the client's fault is not counted.
        let status = match &answer {
            Ok(_) => Ok(StatusCode::OK),
            Err(Fault::OriginFull) => Ok(StatusCode::INSUFFICIENT_STORAGE),
            Err(Fault::OriginRefusesSize) => Ok(StatusCode::PAYLOAD_TOO_LARGE),
            Err(Fault::NotAllowed) => Ok(StatusCode::METHOD_NOT_ALLOWED),
            Err(fault) => Err(fault),
        };
        self.server.report_outcome(asked, status);
        answer
    }
}

impl Source for EmbeddedStore {
    fn open(&self, ask: Ask) -> BoxFuture<'_, Result<Answer, Fault>> {
        let asked = Instant::now();
        async move {
            Ok(match self.found(asked, self.files.open(ask).await)? {
                Answer::Bytes(Incoming { size, bytes }) => {
                    let server = self.server.clone();
                    let count = move |bytes: &Result<Bytes, Fault>| match bytes {
                        Ok(bytes) => server.received(bytes.len() as u64),
                        Err(_) => server.report_broken_body(),
                    };
                    Answer::Bytes(Incoming::new(size, bytes.inspect(count)))
                }
                other => other,
            })
        }
        .boxed()
    }

    fn stat<'a>(&'a self, digests: &'a [Digest]) -> BoxFuture<'a, Result<Vec<Stat>, Fault>> {
        let asked = Instant::now();
        self.files.stat(digests).map(move |known| self.found(asked, known)).boxed()
    }

    fn url(&self) -> Option<String> {
        self.files.url().or_else(|| Some(self.server.url()))
    }
}

impl Store for EmbeddedStore {
    fn put<'a>(&'a self, upload: &'a mut Upload<'_>) -> BoxFuture<'a, Result<Put, Fault>> {
        let asked = Instant::now();
        self.files.put(upload).map(move |put| self.found(asked, put)).boxed()
    }

    fn delete<'a>(&'a self, digest: &'a Digest) -> BoxFuture<'a, Result<bool, Fault>> {
        let asked = Instant::now();
        self.files.delete(digest).map(move |deleted| self.found(asked, deleted)).boxed()
    }

    fn forget(&self, digest: &Digest) {
        self.files.forget(digest);
    }

    fn holds<'a>(&'a self, digest: &'a Digest, size: Option<u64>) -> BoxFuture<'a, Result<Option<u64>, Fault>> {
        let asked = Instant::now();
        self.files.holds(digest, size).map(move |held| self.found(asked, held)).boxed()
    }
}
