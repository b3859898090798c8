//! Uploads to a source.

use crate::http::{MAX_ANSWER, Signature, Upstream, insert, read_final};
use bytes::Bytes;
use castier_blob::Digest;
use castier_cache::{Fault, Limit, Next, Put, Stat, Upload};
use castier_wire as wire;
use http::{Method, StatusCode, header};
use pingora::{ErrorType, http::RequestHeader, protocols::http::v1::client::HttpSession};
use std::time::Duration;
use tokio::{
    sync::SemaphorePermit,
    time::{Instant, sleep_until, timeout},
};

/// So much of a larger upload is held until it has been sent and more follows: if a kept-alive connection turns out to be closed, the
/// upload begins again on a new one. A source that had closed it says so within a round trip.
const REPEATABLE: usize = 256 << 10;

/// So many uploads to a source may hold [`REPEATABLE`] at once, which is 16 MiB in all. Others go over new connections.
pub(crate) const REPEATERS: usize = 64;

/// After this long, what was sent is no longer held: the source has had the time to say that the connection was closed.
const HELD_FOR: Duration = Duration::from_secs(1);

/// How long a source may think about an expectation before the upload is simply sent, as curl does.
const EXPECT_PATIENCE: Duration = Duration::from_secs(1);

impl Upstream {
    /// Uploads a blob as its bytes arrive: with a digest by PUT, else by POST, which lets the source name it.
    pub async fn put(&self, upload: &mut Upload<'_>) -> Result<Put, Fault> {
        // A small one is counted by `repeat`, as all requests are that can be repeated.
        let streams = upload.whole().is_none();
        let asked = std::time::Instant::now();
        let put = self.send(upload).await;
        if streams {
            match &put {
                Ok(_) => self.found(asked, Ok(StatusCode::OK)),
                Err(fault @ (Fault::Unreachable { .. } | Fault::Silent { .. })) => self.found(asked, Err(fault)),
                Err(Fault::OriginFull | Fault::Unusable { .. } | Fault::Busy(Limit::Origin)) => {
                    self.found(asked, Ok(StatusCode::INTERNAL_SERVER_ERROR));
                }
                // The client's fault.
                Err(_) => {}
            }
        }
        put
    }

    async fn send(&self, upload: &mut Upload<'_>) -> Result<Put, Fault> {
        let digest = upload.digest();
        let (method, path) = digest.map_or((Method::POST, wire::CAS.to_owned()), |digest| (Method::PUT, wire::blob_path(digest)));
        let mut request = self.request(method, &path)?;
        if let Some(bytes) = upload.whole() {
            insert(&mut request, header::CONTENT_LENGTH, &bytes.len().to_string())?;
            let (mut session, peer, _permit) = self.ask(&request, bytes).await?;
            let put = self.stored(&mut session, unnamed(upload)).await?;
            self.finish(session, &peer).await;
            return Ok(put);
        }
        match upload.size() {
            Some(size) => insert(&mut request, header::CONTENT_LENGTH, &size.to_string())?,
            None => insert(&mut request, header::TRANSFER_ENCODING, "chunked")?,
        }
        let mut repeater = self.repeaters.try_acquire().ok();
        let kept_alive = if repeater.is_some() { self.kept_alive().await } else { None };
        let mut connection = match kept_alive {
            Some(connection) => connection,
            None => Box::pin(self.connect()).await?,
        };
        let (mut session, mut peer, mut asked, rest) = loop {
            let reused = connection.reused;
            let (session, peer) = connection.session(self.read_timeout);
            // Held for as long as what was sent is.
            let repeater = repeater.take().filter(|_| reused);
            match self.stream(session, &request, upload, repeater).await? {
                Sent::Streamed { session, asked, rest } => break (session, peer, asked, rest),
                Sent::Stale => connection = Box::pin(self.connect()).await?,
            }
        };
        let mut all_sent = false;
        match rest {
            Rest::AnsweredEarly => {
                // Before the rest is read: it can still go elsewhere.
                self.must_be_proved(&asked, &session)?;
                if session.get_status().is_some_and(|status| status.is_client_error() || status.is_server_error()) {
                    // The source does not want it, whatever the rest is. The body is cut off here, and the connection with it.
                    return Err(session.get_status().map_or_else(|| self.unusable("no status"), |status| self.refused(status)));
                }
                upload.drain().await?;
            }
            Rest::Last { last, sent } => {
                let ended = self.end(&mut session, &last).await;
                match (ended, sent) {
                    (Ok(whole), _) => all_sent = whole,
                    (Err(error), Some((mut all, _repeater))) if error.etype != ErrorType::ReadTimedout => {
                        // All of it is at hand, and right.
                        all.extend_from_slice(&last);
                        let (fresh, address) = Box::pin(self.connect()).await?.session(self.read_timeout);
                        (*session, peer) = (fresh, address);
                        let mut request = request.clone();
                        asked = self.sign(&mut request)?;
                        let again = async {
                            session.write_request_header(Box::new(request)).await?;
                            self.end(&mut session, &all).await
                        };
                        all_sent = again.await.map_err(|error| self.fault(&error))?;
                    }
                    (Err(error), _) => return Err(self.fault(&error)),
                }
                self.must_be_proved(&asked, &session)?;
            }
        }
        let put = self.stored(&mut session, unnamed(upload)).await?;
        // Else the next request would be taken for the rest of this one.
        if all_sent {
            self.finish(*session, &peer).await;
        }
        Ok(put)
    }

    /// Sends the last bytes of an upload, and reads the head of the answer. False: it came although not all could be sent.
    async fn end(&self, session: &mut HttpSession, last: &[u8]) -> pingora::Result<bool> {
        let sent = async {
            // An empty chunk would be the end of a chunked body.
            if !last.is_empty() {
                session.write_body(last).await?;
            }
            session.finish_body().await
        };
        let sent = sent.await;
        // Only now is it the source's turn: before, the silence was the client's.
        session.read_timeout = Some(self.read_timeout);
        match (self.final_head(session).await, sent) {
            (Ok(()), sent) => Ok(sent.is_ok()),
            // It stopped reading and said nothing.
            (Err(_), Err(error)) | (Err(error), Ok(_)) => Err(error),
        }
    }

    /// Sends what comes, all but the last bytes. Ends with the upload, or when the source answers before that.
    async fn stream<'a>(
        &self,
        session: HttpSession,
        request: &RequestHeader,
        upload: &mut Upload<'_>,
        repeater: Option<SemaphorePermit<'a>>,
    ) -> Result<Sent<'a>, Fault> {
        let mut session = Box::new(session);
        // What has been sent, while it is little enough to be sent again.
        let mut sent = repeater.map(|repeater| (Vec::new(), repeater));
        let until = Instant::now() + HELD_FOR;
        // While the client sends, silence is the client's.
        session.read_timeout = None;
        let mut request = request.clone();
        let asked = self.sign(&mut request)?;
        if let Err(error) = session.write_request_header(Box::new(request)).await {
            return if sent.is_some() { Ok(Sent::Stale) } else { Err(self.fault(&error)) };
        }
        let error = loop {
            let next = tokio::select! {
                biased;
                answer = read_final(&mut session) => match answer {
                    Ok(()) => return Ok(Sent::Streamed { session, asked, rest: Rest::AnsweredEarly }),
                    Err(error) => break error,
                },
                next = upload.next() => next?,
                () = sleep_until(until), if sent.is_some() => {
                    sent = None;
                    continue;
                }
            };
            let ready = match next {
                Next::Part(ready) => ready,
                Next::Last(last) => return Ok(Sent::Streamed { session, asked, rest: Rest::Last { last, sent } }),
            };
            sent = sent.filter(|(sent, _): &(Vec<u8>, _)| sent.len() + ready.len() <= REPEATABLE);
            if let Some((sent, _)) = &mut sent {
                sent.extend_from_slice(&ready);
            }
            if session.write_body(&ready).await.is_err() {
                // It stopped reading, most likely because it has answered already.
                session.read_timeout = Some(self.read_timeout);
                match self.final_head(&mut session).await {
                    Ok(()) => return Ok(Sent::Streamed { session, asked, rest: Rest::AnsweredEarly }),
                    Err(error) => break error,
                }
            }
        };
        let Some((all, _)) = sent.filter(|_| error.etype != ErrorType::ReadTimedout) else { return Err(self.fault(&error)) };
        upload.put_back(all);
        Ok(Sent::Stale)
    }

    /// What an answer means that refuses an upload.
    fn refused(&self, status: StatusCode) -> Fault {
        match status {
            StatusCode::PAYLOAD_TOO_LARGE => Fault::OriginRefusesSize,
            StatusCode::INSUFFICIENT_STORAGE => Fault::OriginFull,
            StatusCode::METHOD_NOT_ALLOWED | StatusCode::NOT_IMPLEMENTED => Fault::NotAllowed,
            StatusCode::SERVICE_UNAVAILABLE | StatusCode::TOO_MANY_REQUESTS => Fault::Busy(Limit::Origin),
            status => self.unusable(format!("status {} to an upload", status.as_u16())),
        }
    }

    /// Reads the answer to an upload. `unnamed`: the digest of an upload that the source had to name.
    async fn stored(&self, session: &mut HttpSession, unnamed: Option<Digest>) -> Result<Put, Fault> {
        let status = session.get_status().ok_or_else(|| self.unusable("no status"))?;
        let mut answer = Vec::new();
        let read = async {
            while let Some(part) = session.read_body_bytes().await.map_err(|error| self.fault(&error))? {
                if answer.len() + part.len() > MAX_ANSWER {
                    return Err(self.unusable("an endless answer to an upload"));
                }
                answer.extend_from_slice(&part);
            }
            Ok(())
        };
        let silent = || Fault::Silent { source_name: self.name, why: "the answer to an upload does not end".into() };
        timeout(self.read_timeout, read).await.unwrap_or_else(|_| Err(silent()))?;
        let put = match status {
            StatusCode::CREATED | StatusCode::NO_CONTENT => Put::Created,
            StatusCode::OK => Put::Existed,
            status => return Err(self.refused(status)),
        };
        if let Some(digest) = unnamed {
            let stored: wire::Stored =
                serde_json::from_slice(&answer).map_err(|_| self.unusable("a POST answer that is no JSON of digest and size"))?;
            if stored.digest.parse().ok() != Some(digest) {
                return Err(self.unusable(format!("stored {digest} as {}", stored.digest)));
            }
        }
        Ok(put)
    }

    /// Whether the source has the blob for good, so that an upload of it need not be sent. That it can be seen may not be enough: it may
    /// have been renamed into place and not synced yet. So the source is asked as a client would ask, by an upload that waits to be
    /// called for; castier's own origin answers that only when the blob is durable. One that knows nothing of expectations has said
    /// all that it can say.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub(crate) async fn holds_durably(&self, digest: &Digest, size: Option<u64>) -> Result<Option<u64>, Fault> {
        let Stat::Present(known) = self.stat_one(digest).await? else { return Ok(None) };
        // Without a size there is nothing to answer with.
        let Some(known) = known.or(size) else { return Ok(None) };
        let mut request = self.request(Method::PUT, &wire::blob_path(digest))?;
        insert(&mut request, header::CONTENT_LENGTH, &size.unwrap_or(known).to_string())?;
        insert(&mut request, header::EXPECT, "100-continue")?;
        // A new connection: the body that was announced is never sent, so it cannot be used again.
        let (mut session, _) = Box::pin(self.connect()).await?.session(self.read_timeout);
        let answered = async {
            session.write_request_header(Box::new(request)).await?;
            session.read_response().await
        };
        let answered = timeout(self.read_timeout.min(EXPECT_PATIENCE), answered).await;
        let refused = matches!(answered, Ok(Ok(_)))
            && session.get_status().is_some_and(|status| status.is_client_error() || status.is_server_error());
        Ok((!refused).then_some(known))
    }
}

/// The digest of an upload that has no name. All of it has come.
fn unnamed(upload: &Upload<'_>) -> Option<Digest> {
    upload.digest().is_none().then(|| upload.verified())?.map(|(digest, _)| digest)
}

/// How far an upload came.
enum Sent<'a> {
    /// All but the last bytes have been sent, or the source has answered early.
    Streamed {
        session: Box<HttpSession>,
        /// What the answer must prove.
        asked: Signature,
        rest: Rest<'a>,
    },
    /// The connection had been kept alive and was closed. All bytes are at hand, for a new one.
    Stale,
}

/// What is left to do.
enum Rest<'a> {
    /// The source has answered before the end.
    AnsweredEarly,
    /// The last bytes are to be sent.
    Last {
        last: Bytes,
        /// What has been sent, if it can be sent again.
        sent: Option<(Vec<u8>, SemaphorePermit<'a>)>,
    },
}
