//! Uploads to a source.

use super::{MAX_ANSWER, Upstream, insert, read_final};
use crate::{
    fault::{Fault, Limit},
    secret::Asked,
};
use bytes::Bytes;
use castier_blob::{Digest, Verified, Verifier};
use castier_wire as wire;
use futures::{StreamExt, stream::BoxStream};
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
pub(super) const REPEATERS: usize = 64;

/// After this long, what was sent is no longer held: the source has had the time to say that the connection was closed.
const HELD_FOR: Duration = Duration::from_secs(1);

/// How long a source may think about an expectation before the upload is simply sent, as curl does.
const EXPECT_PATIENCE: Duration = Duration::from_secs(1);

/// The bytes of an upload as they arrive from the client.
pub type Upload<'a> = BoxStream<'a, Result<Bytes, Fault>>;

/// How an upload ended well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Put {
    /// It was not there before.
    Created,
    /// It was there already.
    Existed,
}

/// An upload on its way: what has come of it, and the rest. It can be offered to one source after the other until bytes have gone
/// to one that are not at hand any more.
pub struct Parcel<'a> {
    /// The name that the bytes must have; none: any.
    digest: Option<Digest>,
    /// The size that was announced.
    size: Option<u64>,
    /// Has seen all bytes that came.
    verifier: Verifier,
    /// The bytes that came and have not been sent: all of them, while nothing has been.
    held: Bytes,
    /// All bytes have come, and they are right.
    whole: Option<Verified<()>>,
    rest: Upload<'a>,
    /// Bytes have left that are not in `held`.
    begun: bool,
}

impl Parcel<'_> {
    /// Uploads up to this size are read before they are sent on: they can then use a kept-alive connection, since they can be repeated.
    pub const SMALL: usize = 64 << 10;
}

impl<'a> Parcel<'a> {
    /// Reads the first bytes of an upload, and all of a small one.
    ///
    /// # Errors
    /// The client's; [`Fault::Mismatch`] if a small one is not the blob named `digest`.
    pub async fn pack(digest: Option<Digest>, size: Option<u64>, mut rest: Upload<'a>) -> Result<Self, Fault> {
        let mut verifier = digest.map_or_else(Verifier::any, Verifier::of);
        let mut held = Vec::new();
        let mut ended = false;
        while !ended && held.len() <= Self::SMALL {
            match rest.next().await.transpose()? {
                Some(chunk) => {
                    verifier.update(&chunk);
                    held.extend_from_slice(&chunk);
                }
                None => ended = true,
            }
        }
        let whole = if ended { Some(verifier.clone().finish(()).map_err(Fault::Mismatch)?) } else { None };
        Ok(Self { digest, size, verifier, held: held.into(), whole, rest, begun: false })
    }

    /// It can be offered again: this is all that came.
    pub fn begin_anew(&mut self, all: Bytes) {
        (self.held, self.begun) = (all, false);
    }

    /// Whether all of it has come, so that it can be offered as often as need be.
    pub const fn is_whole(&self) -> bool {
        self.whole.is_some()
    }

    /// Whether it can still be offered to another source.
    pub const fn is_at_hand(&self) -> bool {
        !self.begun
    }
}

impl Upstream {
    /// Uploads a blob as its bytes arrive. With a digest by PUT, else by POST, which lets the source name it.
    /// The last bytes wait until all of them have verified, so that the source never
    /// sees a complete upload of something else.
    ///
    /// # Errors
    /// [`Fault::Mismatch`] when the bytes are not the blob of that name; else as [`Self::open`].
    pub async fn put(&self, parcel: &mut Parcel<'_>) -> Result<(Put, Verified<()>), Fault> {
        // A small one is counted by `repeat`, as all requests are that can be repeated.
        let streams = parcel.whole.is_none();
        let asked = std::time::Instant::now();
        let put = self.send(parcel).await;
        if streams {
            match &put {
                Ok(_) => self.found(asked, Ok(StatusCode::OK)),
                Err(fault @ (Fault::Unreachable { .. } | Fault::Silent { .. })) => self.found(asked, Err(fault)),
                Err(Fault::OriginFull | Fault::Unusable { .. } | Fault::Busy(Limit::Origin)) => {
                    self.found(asked, Ok(StatusCode::INTERNAL_SERVER_ERROR));
                }
                // By the client's doing.
                Err(_) => {}
            }
        }
        put
    }

    async fn send(&self, parcel: &mut Parcel<'_>) -> Result<(Put, Verified<()>), Fault> {
        let by_name = parcel.digest.is_some();
        let (method, path) = parcel.digest.map_or((Method::POST, wire::CAS.to_owned()), |digest| (Method::PUT, wire::blob_path(&digest)));
        let mut request = self.request(method, &path)?;
        if let Some(verified) = &parcel.whole {
            insert(&mut request, header::CONTENT_LENGTH, &parcel.held.len().to_string())?;
            let (mut session, peer, _place) = self.ask(&request, &parcel.held).await?;
            let put = self.stored(&mut session, by_name, verified).await?;
            self.finish(session, &peer).await;
            return Ok((put, verified.clone()));
        }
        match parcel.size {
            Some(size) => insert(&mut request, header::CONTENT_LENGTH, &size.to_string())?,
            None => insert(&mut request, header::TRANSFER_ENCODING, "chunked")?,
        }
        let mut repeater = self.repeaters.try_acquire().ok();
        let kept_alive = if repeater.is_some() { self.kept_alive().await } else { None };
        let mut connection = match kept_alive {
            Some(connection) => connection,
            None => Box::pin(self.connect()).await?,
        };
        let (mut session, mut peer, mut asked, answered_early, sent) = loop {
            let reused = connection.reused;
            let (session, peer) = connection.session(self.read_timeout);
            // Held for as long as what was sent is.
            let repeater = repeater.take().filter(|_| reused);
            match self.stream(session, &request, parcel, repeater).await? {
                Sent::Answered { session, asked, early, sent } => break (session, peer, asked, early, sent),
                Sent::Stale => connection = Box::pin(self.connect()).await?,
            }
        };
        if answered_early {
            // Before the rest is read: it can still go elsewhere.
            self.must_be_proved(&asked, &session)?;
        }
        if answered_early && session.get_status().is_some_and(|status| status.is_client_error() || status.is_server_error()) {
            // The source does not want it, whatever the rest is. The body is cut off here, and the connection with it.
            return Err(session.get_status().map_or_else(|| self.unusable("no status"), |status| self.refused(status)));
        }
        if answered_early {
            // What it says counts only for bytes that verified, so the rest of them is read all the same.
            while let Some(chunk) = parcel.rest.next().await.transpose()? {
                parcel.verifier.update(&chunk);
            }
        }
        let verified = parcel.verifier.clone().finish(()).map_err(Fault::Mismatch)?;
        parcel.whole = Some(verified.clone());
        let mut all_sent = false;
        if !answered_early {
            let ended = self.end(&mut session, &parcel.held).await;
            match (ended, sent) {
                (Ok(whole), _) => all_sent = whole,
                (Err(error), Some((mut all, _repeater))) if error.etype != ErrorType::ReadTimedout => {
                    // All of it is at hand, and right.
                    all.extend_from_slice(&parcel.held);
                    let (fresh, address) = Box::pin(self.connect()).await?.session(self.read_timeout);
                    (*session, peer) = (fresh, address);
                    let mut request = request.clone();
                    asked = self.prove(&mut request)?;
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
        let put = self.stored(&mut session, by_name, &verified).await?;
        // Else the next request would be taken for the rest of this one.
        if all_sent {
            self.finish(*session, &peer).await;
        }
        Ok((put, verified))
    }

    /// Sends the last bytes of an upload, and reads the head of the answer. False: it came although not all could be sent.
    async fn end(&self, session: &mut HttpSession, last: &[u8]) -> pingora::Result<bool> {
        let sent = async {
            session.write_body(last).await?;
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

    /// Sends what comes, all but the last of it. Ends with the upload, or when the source answers before that.
    async fn stream<'a>(
        &self,
        session: HttpSession,
        request: &RequestHeader,
        parcel: &mut Parcel<'_>,
        repeater: Option<SemaphorePermit<'a>>,
    ) -> Result<Sent<'a>, Fault> {
        parcel.begun = true;
        let mut session = Box::new(session);
        // What has been sent, while it is little enough to be sent again.
        let mut sent = repeater.map(|repeater| (Vec::new(), repeater));
        let until = Instant::now() + HELD_FOR;
        // While the client sends, silence is the client's.
        session.read_timeout = None;
        let mut request = request.clone();
        let asked = self.prove(&mut request)?;
        if let Err(error) = session.write_request_header(Box::new(request)).await {
            return if sent.is_some() { Ok(Sent::Stale) } else { Err(self.fault(&error)) };
        }
        let error = loop {
            let chunk = tokio::select! {
                biased;
                answer = read_final(&mut session) => match answer {
                    Ok(()) => return Ok(Sent::Answered { session, asked, early: true, sent: None }),
                    Err(error) => break error,
                },
                chunk = parcel.rest.next() => chunk.transpose()?,
                () = sleep_until(until), if sent.is_some() => {
                    sent = None;
                    continue;
                }
            };
            let Some(chunk) = chunk else { return Ok(Sent::Answered { session, asked, early: false, sent }) };
            if chunk.is_empty() {
                continue;
            }
            parcel.verifier.update(&chunk);
            let ready = std::mem::replace(&mut parcel.held, chunk);
            sent = sent.filter(|(sent, _): &(Vec<u8>, _)| sent.len() + ready.len() <= REPEATABLE);
            if let Some((sent, _)) = &mut sent {
                sent.extend_from_slice(&ready);
            }
            if session.write_body(&ready).await.is_err() {
                // It stopped reading, most likely because it has answered already.
                session.read_timeout = Some(self.read_timeout);
                match self.final_head(&mut session).await {
                    Ok(()) => return Ok(Sent::Answered { session, asked, early: true, sent: None }),
                    Err(error) => break error,
                }
            }
        };
        let Some((mut all, _)) = sent.filter(|_| error.etype != ErrorType::ReadTimedout) else { return Err(self.fault(&error)) };
        all.extend_from_slice(&parcel.held);
        parcel.held = all.into();
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

    /// Reads the answer to an upload.
    async fn stored(&self, session: &mut HttpSession, by_name: bool, verified: &Verified<()>) -> Result<Put, Fault> {
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
        if !by_name {
            let stored: wire::Stored =
                serde_json::from_slice(&answer).map_err(|_| self.unusable("a POST answer that is no JSON of digest and size"))?;
            if stored.digest.parse().ok() != Some(verified.digest()) {
                return Err(self.unusable(format!("stored {} as {}", verified.digest(), stored.digest)));
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
    pub async fn holds(&self, digest: &Digest, size: Option<u64>) -> Result<Option<u64>, Fault> {
        // Without a size there is nothing to answer with.
        let Some(known) = self.stat(digest).await?.map(|known| known.or(size)) else { return Ok(None) };
        let Some(known) = known else { return Ok(None) };
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

/// How far an upload came.
enum Sent<'a> {
    /// All but the last bytes have been sent, or the source has answered `early`.
    Answered {
        session: Box<HttpSession>,
        /// What the answer must prove.
        asked: Asked,
        early: bool,
        /// What has been sent, if it can be sent again.
        sent: Option<(Vec<u8>, SemaphorePermit<'a>)>,
    },
    /// The connection had been kept alive and was closed. All bytes are at hand, for a new one.
    Stale,
}
