//! The embedded origin as a store: its files or its bucket, without its HTTP server. What is not about a blob (`/ac`, `/kv`) is relayed to its HTTP server on a loopback port, so
//! the state and the figures of the origin are those of both.

use crate::http::Upstream;
use bytes::Bytes;
use castier_blob::Digest;
use castier_cache::{Answer, Ask, Fault, Incoming, NoRange, Put, Ranges, Source, Stat, Store, Upload};
use futures::{FutureExt as _, StreamExt as _, future::BoxFuture, stream::BoxStream};
use http::StatusCode;
use std::{ops::Range, sync::Arc, time::Instant};

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

    /// Asks, if the circuit breaker lets it pass.
    fn ask<'a, T: Send + 'a>(&'a self, answer: BoxFuture<'a, Result<T, Fault>>) -> BoxFuture<'a, Result<T, Fault>> {
        async move {
            let _admission = self.server.admit().await?;
            let asked = Instant::now();
            let answer = answer.await;
            self.found(asked, answer)
        }
        .boxed()
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

fn counted(bytes: BoxStream<'static, Result<Bytes, Fault>>, server: Arc<Upstream>) -> BoxStream<'static, Result<Bytes, Fault>> {
    let count = move |bytes: &Result<Bytes, Fault>| match bytes {
        Ok(bytes) => server.received(bytes.len() as u64),
        Err(_) => server.report_broken_body(),
    };
    bytes.inspect(count).boxed()
}

/// Counts ranges in the same way.
struct Counted {
    ranges: Arc<dyn Ranges>,
    server: Arc<Upstream>,
}

impl Ranges for Counted {
    fn read(&self, range: Range<u64>) -> BoxFuture<'static, Result<BoxStream<'static, Result<Bytes, Fault>>, NoRange>> {
        let (server, read) = (self.server.clone(), self.ranges.read(range));
        async move {
            let _admission = server.admit().await.map_err(NoRange::Fault)?;
            let asked = Instant::now();
            let answer = read.await;
            server.report_outcome(asked, if let Err(NoRange::Fault(fault)) = &answer { Err(fault) } else { Ok(StatusCode::OK) });
            answer.map(|bytes| counted(bytes, server))
        }
        .boxed()
    }

    fn give_up(&self) {
        self.ranges.give_up();
    }
}

impl Source for EmbeddedStore {
    fn open(&self, ask: Ask) -> BoxFuture<'_, Result<Answer, Fault>> {
        async move {
            Ok(match self.ask(self.files.open(ask)).await? {
                Answer::Bytes(Incoming { size, bytes, ranges }) => {
                    let ranges = ranges.map(|ranges| Arc::new(Counted { ranges, server: self.server.clone() }) as Arc<dyn Ranges>);
                    Answer::Bytes(Incoming::new(size, counted(bytes, self.server.clone())).with_ranges(ranges))
                }
                other => other,
            })
        }
        .boxed()
    }

    fn stat<'a>(&'a self, digests: &'a [Digest]) -> BoxFuture<'a, Result<Vec<Stat>, Fault>> {
        self.ask(self.files.stat(digests))
    }

    fn url(&self) -> Option<String> {
        self.files.url().or_else(|| Some(self.server.url()))
    }
}

impl Store for EmbeddedStore {
    fn put<'a>(&'a self, upload: &'a mut Upload<'_>) -> BoxFuture<'a, Result<Put, Fault>> {
        self.ask(self.files.put(upload))
    }

    fn delete<'a>(&'a self, digest: &'a Digest) -> BoxFuture<'a, Result<bool, Fault>> {
        self.ask(self.files.delete(digest))
    }

    fn forget(&self, digest: &Digest) {
        self.files.forget(digest);
    }

    fn holds<'a>(&'a self, digest: &'a Digest, size: Option<u64>) -> BoxFuture<'a, Result<Option<u64>, Fault>> {
        self.ask(self.files.holds(digest, size))
    }
}
