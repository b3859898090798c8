//! Uploads to a source.

use super::{MAX_ANSWER, Upstream, insert, read_final};
use crate::fault::{Fault, Limit};
use bytes::Bytes;
use castier_blob::{Digest, Verified, Verifier, wire};
use futures::{StreamExt, stream::BoxStream};
use http::{Method, StatusCode, header};
use pingora::{
    protocols::http::v1::client::HttpSession,
    upstreams::peer::{HttpPeer, Peer as _},
};
use std::time::Duration;

/// Uploads up to this size are read before they are sent on: they can then use a kept-alive connection, since they can be repeated.
const SMALL: usize = 64 << 10;

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

impl<'a> Parcel<'a> {
    /// Reads the first bytes of an upload, and all of a small one.
    ///
    /// # Errors
    /// The client's; [`Fault::Mismatch`] if a small one is not the blob named `digest`.
    pub async fn pack(digest: Option<Digest>, size: Option<u64>, mut rest: Upload<'a>) -> Result<Self, Fault> {
        let mut verifier = digest.map_or_else(Verifier::any, Verifier::of);
        let mut held = Vec::new();
        let mut ended = false;
        while !ended && held.len() <= SMALL {
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
        let by_name = parcel.digest.is_some();
        let (method, path) = parcel.digest.map_or((Method::POST, wire::CAS.to_owned()), |digest| (Method::PUT, wire::blob_path(&digest)));
        let mut request = self.request(method, &path)?;
        if let Some(verified) = &parcel.whole {
            insert(&mut request, header::CONTENT_LENGTH, &parcel.held.len().to_string())?;
            let (session, peer, _place) = self.ask(&request, &parcel.held).await?;
            return Ok((self.stored(session, &peer, by_name, verified).await?, verified.clone()));
        }
        match parcel.size {
            Some(size) => insert(&mut request, header::CONTENT_LENGTH, &size.to_string())?,
            None => insert(&mut request, header::TRANSFER_ENCODING, "chunked")?,
        }
        let (mut session, peer) = self.connect_fresh().await?;
        session.write_request_header(Box::new(request)).await.map_err(|error| self.fault(&error))?;
        let answered_early = self.stream(&mut session, parcel).await?;
        let verified = parcel.verifier.clone().finish(()).map_err(Fault::Mismatch)?;
        parcel.whole = Some(verified.clone());
        // Only now is it the source's turn: before, the silence was the client's.
        session.read_timeout = Some(self.read_timeout);
        if !answered_early {
            let sent = async {
                session.write_body(&parcel.held).await?;
                session.finish_body().await
            };
            let sent = sent.await;
            if let Err(error) = read_final(&mut session).await {
                return Err(self.fault(sent.as_ref().err().unwrap_or(&error)));
            }
        }
        Ok((self.stored(session, &peer, by_name, &verified).await?, verified))
    }

    /// Sends what comes, all but the last of it, and reads the upload to its end. True if the source answered before that.
    async fn stream(&self, session: &mut HttpSession, parcel: &mut Parcel<'_>) -> Result<bool, Fault> {
        parcel.begun = true;
        let answered_early = loop {
            let chunk = tokio::select! {
                biased;
                answer = read_final(session) => { answer.map_err(|error| self.fault(&error))?; break true }
                chunk = parcel.rest.next() => chunk.transpose()?,
            };
            let Some(chunk) = chunk else { break false };
            if chunk.is_empty() {
                continue;
            }
            parcel.verifier.update(&chunk);
            let ready = std::mem::replace(&mut parcel.held, chunk);
            if session.write_body(&ready).await.is_err() {
                // It stopped reading, most likely because it has answered already.
                session.read_timeout = Some(self.read_timeout);
                read_final(session).await.map_err(|error| self.fault(&error))?;
                break true;
            }
        };
        if answered_early {
            // What it says counts only for bytes that verified, so the rest of them is read all the same.
            while let Some(chunk) = parcel.rest.next().await.transpose()? {
                parcel.verifier.update(&chunk);
            }
        }
        Ok(answered_early)
    }

    /// Reads the answer to an upload.
    async fn stored(&self, mut session: HttpSession, peer: &HttpPeer, by_name: bool, verified: &Verified<()>) -> Result<Put, Fault> {
        let status = session.get_status().ok_or_else(|| self.unusable("no status"))?;
        let mut answer = Vec::new();
        while let Some(part) = session.read_body_bytes().await.map_err(|error| self.fault(&error))? {
            if answer.len() + part.len() > MAX_ANSWER {
                return Err(self.unusable("an endless answer to an upload"));
            }
            answer.extend_from_slice(&part);
        }
        self.finish(session, peer).await;
        let put = match status {
            StatusCode::CREATED | StatusCode::NO_CONTENT => Put::Created,
            StatusCode::OK => Put::Existed,
            StatusCode::PAYLOAD_TOO_LARGE => return Err(Fault::OriginRefusesSize),
            StatusCode::INSUFFICIENT_STORAGE => return Err(Fault::OriginFull),
            StatusCode::METHOD_NOT_ALLOWED | StatusCode::NOT_IMPLEMENTED => return Err(Fault::NotAllowed),
            StatusCode::SERVICE_UNAVAILABLE | StatusCode::TOO_MANY_REQUESTS => return Err(Fault::Busy(Limit::Origin)),
            status => return Err(self.unusable(format!("status {} to an upload", status.as_u16()))),
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
        let Some(known) = self.stat(digest).await? else { return Ok(None) };
        let mut request = self.request(Method::PUT, &wire::blob_path(digest))?;
        insert(&mut request, header::CONTENT_LENGTH, &size.unwrap_or(known).to_string())?;
        insert(&mut request, header::EXPECT, "100-continue")?;
        let (mut session, _) = self.connect_fresh().await?;
        session.read_timeout = Some(self.read_timeout.min(EXPECT_PATIENCE));
        let answered = async {
            session.write_request_header(Box::new(request)).await?;
            session.read_response().await
        };
        let refused =
            answered.await.is_ok() && session.get_status().is_some_and(|status| status.is_client_error() || status.is_server_error());
        Ok((!refused).then_some(known))
    }

    /// A new connection: a large upload cannot be repeated, so it does not gamble on a kept-alive one.
    async fn connect_fresh(&self) -> Result<(HttpSession, HttpPeer), Fault> {
        let (mut last, mut tried) = (None, Vec::new());
        for again in [false, true] {
            let peers = if again { self.moved(&tried).await } else { self.peers().await? };
            for mut peer in peers {
                // Pools go by the peer's hash: this one is never found in the pool, so connections are made anew.
                peer.group_key = 1;
                match self.connector.get_http_session(&peer).await {
                    Ok((mut session, _)) => {
                        session.write_timeout = Some(self.read_timeout);
                        return Ok((session, peer));
                    }
                    Err(error) => {
                        tried.extend(peer.address().as_inet().copied());
                        last = Some(error);
                    }
                }
            }
        }
        Err(self.not_connected(last.as_deref()))
    }
}
