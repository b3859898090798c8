//! Uploads to a source.

use crate::http::{MAX_ANSWER, Signature, Upstream, insert, read_final};
use bytes::Bytes;
use castier_blob::Digest;
use castier_cache::{Fault, Limit, Next, Put, SourceKind, Stat, Upload};
use castier_wire as wire;
use http::{Method, StatusCode, header};
use pingora::{ErrorType, http::RequestHeader, protocols::http::v1::client::HttpSession, upstreams::peer::HttpPeer};
use std::time::Duration;
use tokio::{
    sync::SemaphorePermit,
    time::{Instant, sleep_until, timeout},
};

/// How many bytes of an upload castier keeps after it has sent them over a kept-alive connection. The source may have closed that connection;
/// then the upload begins again on a new one. castier learns of it within a round trip.
const MAX_REPLAY: usize = 256 << 10;

/// How many uploads to a source may keep [`MAX_REPLAY`] bytes at once: 16 MiB in all. Other uploads use new connections.
pub(crate) const REPLAYS: usize = 64;

/// How long the bytes are kept. After this long, castier would know of a closed connection.
const REPLAY_WINDOW: Duration = Duration::from_secs(1);

/// How long to wait for the answer to `Expect: 100-continue`. Without an answer, the upload is sent; curl does the same.
const EXPECT_TIMEOUT: Duration = Duration::from_secs(1);

impl Upstream {
    /// Uploads a blob as its bytes arrive: by PUT if its digest is known, else by POST.
    pub async fn put(&self, upload: &mut Upload<'_>) -> Result<Put, Fault> {
        // `repeat` reports the outcome of small uploads, which are in memory. Streamed uploads do not go through it.
        let streams = upload.whole().is_none();
        let _admission = if streams { Some(self.admit().await?) } else { None };
        let asked = std::time::Instant::now();
        let put = self.send(upload).await;
        if streams {
            match &put {
                Ok(_) => self.report_outcome(asked, Ok(StatusCode::OK)),
                Err(fault @ (Fault::Unreachable { .. } | Fault::Silent { .. })) => self.report_outcome(asked, Err(fault)),
                Err(Fault::OriginFull | Fault::Unusable { .. } | Fault::Busy(Limit::Origin)) => {
                    self.report_outcome(asked, Ok(StatusCode::INTERNAL_SERVER_ERROR));
                }
                // An error of the client says nothing about the origin.
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
        let (mut exchange, rest) = self.begin(upload, &request).await?;
        let all_sent = match rest {
            Rest::AnsweredEarly => self.early_answer(&exchange, upload).await.map(|()| false)?,
            Rest::Last { last, replay } => self.send_last(&mut exchange, &request, &last, replay).await?,
        };
        let put = self.stored(&mut exchange.session, unnamed(upload)).await?;
        // Unless all bytes were sent, the source would read the next request as the rest of this body.
        if all_sent {
            self.finish(*exchange.session, &exchange.peer).await;
        }
        Ok(put)
    }

    /// Sends an upload up to its last bytes, over a kept-alive connection if there is one. If the source turns out to have closed that
    /// connection, begins again on a new one.
    async fn begin<'a>(&'a self, upload: &mut Upload<'_>, request: &RequestHeader) -> Result<(Exchange, Rest<'a>), Fault> {
        let mut permit = self.replays.try_acquire().ok();
        let kept_alive = if permit.is_some() { self.kept_alive().await } else { None };
        let mut connection = match kept_alive {
            Some(connection) => connection,
            None => Box::pin(self.connect()).await?,
        };
        loop {
            let reused = connection.reused;
            let (session, peer) = connection.session(self.read_timeout);
            let replay = permit.take().filter(|_| reused).map(|permit| Replay { bytes: Vec::new(), _permit: permit });
            match self.stream(session, request, upload, replay).await? {
                Streamed::Sent { session, signature, rest } => return Ok((Exchange { session, peer, signature }, rest)),
                Streamed::Stale => connection = Box::pin(self.connect()).await?,
            }
        }
    }

    /// The source has answered before the end of the upload. If it refuses the upload, returns that error. Else reads the client's other bytes,
    /// since they must match the digest too.
    async fn early_answer(&self, exchange: &Exchange, upload: &mut Upload<'_>) -> Result<(), Fault> {
        // Checked before the client's other bytes are read: until then the upload can still go to another store.
        self.must_be_proved(&exchange.signature, &exchange.session)?;
        match exchange.session.get_status() {
            None => return Err(self.unusable("no status")),
            Some(status) if status.is_client_error() || status.is_server_error() => return Err(self.refused(status)),
            Some(_) => {}
        }
        upload.drain().await
    }

    /// Sends the last bytes of an upload, and reads the head of the answer. If a kept-alive connection fails and `replay` has all earlier bytes,
    /// sends everything again over a new connection. Returns whether all bytes were sent.
    async fn send_last(
        &self,
        exchange: &mut Exchange,
        request: &RequestHeader,
        last: &[u8],
        replay: Option<Replay<'_>>,
    ) -> Result<bool, Fault> {
        let all_sent = match (self.end(&mut exchange.session, last).await, replay) {
            (Ok(all_sent), _) => all_sent,
            (Err(error), Some(mut replay)) if error.etype != ErrorType::ReadTimedout => {
                replay.bytes.extend_from_slice(last);
                let (session, peer) = Box::pin(self.connect()).await?.session(self.read_timeout);
                (*exchange.session, exchange.peer) = (session, peer);
                let mut request = request.clone();
                exchange.signature = self.sign(&mut request)?;
                let again = async {
                    exchange.session.write_request_header(Box::new(request)).await?;
                    self.end(&mut exchange.session, &replay.bytes).await
                };
                again.await.map_err(|error| self.fault(&error))?
            }
            (Err(error), _) => return Err(self.fault(&error)),
        };
        self.must_be_proved(&exchange.signature, &exchange.session)?;
        Ok(all_sent)
    }

    /// Sends bytes up to the end of the body, and reads the head of the answer. Returns false if the answer came although not all could be sent.
    async fn end(&self, session: &mut HttpSession, last: &[u8]) -> pingora::Result<bool> {
        let sent = async {
            // An empty chunk would end a chunked body.
            if !last.is_empty() {
                session.write_body(last).await?;
            }
            session.finish_body().await
        };
        let sent = sent.await;
        // The read timeout counts from here. Before, the source had to wait for the client.
        session.read_timeout = Some(self.read_timeout);
        match (self.final_head(session).await, sent) {
            (Ok(()), sent) => Ok(sent.is_ok()),
            // No answer. If the source stopped reading, the write error says why.
            (Err(_), Err(error)) | (Err(error), Ok(_)) => Err(error),
        }
    }

    /// Sends the bytes of an upload as they arrive, except the last ones. Ends early if the source answers.
    async fn stream<'a>(
        &self,
        session: HttpSession,
        request: &RequestHeader,
        upload: &mut Upload<'_>,
        mut replay: Option<Replay<'a>>,
    ) -> Result<Streamed<'a>, Fault> {
        let mut session = Box::new(session);
        let until = Instant::now() + REPLAY_WINDOW;
        // No read timeout: while the client sends, the source has nothing to say.
        session.read_timeout = None;
        let mut request = request.clone();
        let signature = self.sign(&mut request)?;
        if let Err(error) = session.write_request_header(Box::new(request)).await {
            return if replay.is_some() { Ok(Streamed::Stale) } else { Err(self.fault(&error)) };
        }
        let error = loop {
            let next = tokio::select! {
                biased;
                answer = read_final(&mut session) => match answer {
                    Ok(()) => return Ok(Streamed::Sent { session, signature, rest: Rest::AnsweredEarly }),
                    Err(error) => break error,
                },
                next = upload.next() => next?,
                () = sleep_until(until), if replay.is_some() => {
                    replay = None;
                    continue;
                }
            };
            let part = match next {
                Next::Part(part) => part,
                Next::Last(last) => return Ok(Streamed::Sent { session, signature, rest: Rest::Last { last, replay } }),
            };
            replay = replay.filter(|replay| replay.bytes.len() + part.len() <= MAX_REPLAY);
            if let Some(replay) = &mut replay {
                replay.bytes.extend_from_slice(&part);
            }
            if session.write_body(&part).await.is_err() {
                // The source has stopped reading, most likely because it has answered.
                session.read_timeout = Some(self.read_timeout);
                match self.final_head(&mut session).await {
                    Ok(()) => return Ok(Streamed::Sent { session, signature, rest: Rest::AnsweredEarly }),
                    Err(error) => break error,
                }
            }
        };
        let Some(replay) = replay.filter(|_| error.etype != ErrorType::ReadTimedout) else { return Err(self.fault(&error)) };
        upload.put_back(replay.bytes);
        Ok(Streamed::Stale)
    }

    /// The fault for a status that refuses an upload.
    fn refused(&self, status: StatusCode) -> Fault {
        match status {
            StatusCode::PAYLOAD_TOO_LARGE => Fault::OriginRefusesSize,
            StatusCode::INSUFFICIENT_STORAGE => Fault::OriginFull,
            StatusCode::METHOD_NOT_ALLOWED | StatusCode::NOT_IMPLEMENTED => Fault::NotAllowed,
            StatusCode::SERVICE_UNAVAILABLE | StatusCode::TOO_MANY_REQUESTS => Fault::Busy(Limit::Origin),
            // The peer has proved itself, so it works: it passes on what the origin did to it.
            StatusCode::BAD_GATEWAY | StatusCode::GATEWAY_TIMEOUT if self.is_peer() => Fault::Unusable {
                source_name: SourceKind::Origin.as_str(),
                why: format!("a peer answered {} to an upload", status.as_u16()),
            },
            status => self.unusable(format!("status {} to an upload", status.as_u16())),
        }
    }

    /// Reads the answer to an upload. `unnamed` is the digest of an upload by POST, which the answer must repeat.
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

    /// The blob's size if the source has it durably. Then an upload of it need not be sent.
    ///
    /// A HEAD is not enough: the source may have renamed the file and not synced it yet. So castier also sends the head of an upload with
    /// `Expect: 100-continue`. castier's own origin answers that only when the blob is durable. A 100 comes from a server that asks for every body
    /// without looking; then the HEAD counts. Without an answer nothing is known: the file may be in the middle of a sync that takes long. So the
    /// upload is sent, and its acknowledgement counts.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub(crate) async fn holds_durably(&self, digest: &Digest, size: Option<u64>) -> Result<Option<u64>, Fault> {
        let Stat::Present(known) = self.stat_one(digest).await? else { return Ok(None) };
        // Without a size, the client cannot be answered.
        let Some(known) = known.or(size) else { return Ok(None) };
        let mut request = self.request(Method::PUT, &wire::blob_path(digest))?;
        insert(&mut request, header::CONTENT_LENGTH, &size.unwrap_or(known).to_string())?;
        insert(&mut request, header::EXPECT, "100-continue")?;
        // A new connection. It cannot be used again, since the announced body is never sent.
        let (mut session, _) = Box::pin(self.connect()).await?.session(self.read_timeout);
        let answered = async {
            session.write_request_header(Box::new(request)).await?;
            session.read_response().await
        };
        let answered = timeout(self.read_timeout.min(EXPECT_TIMEOUT), answered).await;
        let status = if matches!(answered, Ok(Ok(_))) { session.get_status() } else { None };
        Ok(status.filter(|status| status.is_informational() || status.is_success()).map(|_| known))
    }
}

/// The digest of an upload by POST, whose bytes have all arrived; `None` for a PUT.
fn unnamed(upload: &Upload<'_>) -> Option<Digest> {
    upload.digest().is_none().then(|| upload.verified())?.map(|(digest, _)| digest)
}

/// A request and its answer.
struct Exchange {
    session: Box<HttpSession>,
    peer: HttpPeer,
    /// What the answer must prove.
    signature: Signature,
}

/// The bytes of an upload that were sent over a kept-alive connection, to send them again if the source had closed it.
struct Replay<'a> {
    bytes: Vec<u8>,
    _permit: SemaphorePermit<'a>,
}

/// The result of [`Upstream::stream`].
enum Streamed<'a> {
    /// All bytes except the last have been sent, or the source has answered early.
    Sent {
        session: Box<HttpSession>,
        /// What the answer must prove.
        signature: Signature,
        rest: Rest<'a>,
    },
    /// The source had closed the kept-alive connection. The upload has got its bytes back, to be sent over a new connection.
    Stale,
}

/// What is left to do.
enum Rest<'a> {
    /// The source has answered before the end.
    AnsweredEarly,
    /// Send the last bytes. `replay` has all bytes before them, if they can be sent again.
    Last { last: Bytes, replay: Option<Replay<'a>> },
}
