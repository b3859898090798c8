//! Request bodies. The body of an upload becomes a stream of bytes, either as it is or taken out of a multipart form, of at most
//! `limits.max_blob`. Bodies without a meaning are read and discarded.

use castier_cache::{Body, Fault};
use castier_config::Limits;
use castier_serverkit::multipart::{self, FormError};
use futures::{StreamExt, TryStreamExt, stream};
use http::HeaderMap;
use pingora::{ErrorType, protocols::http::ServerSession};
use std::time::Duration;
use tokio::time::timeout;

/// The longest body of a GET or DELETE. It has no meaning, so it is read and discarded.
const IDLE_BODY: u64 = 64 << 10;

/// The body of a request, as a handler sees it.
pub struct RequestBody<'a> {
    session: &'a mut ServerSession,
    /// `limits.idle_timeout`.
    idle: Duration,
}

impl<'a> RequestBody<'a> {
    /// The body of the session's request.
    pub(crate) fn of(session: &'a mut ServerSession, limits: &Limits) -> Self {
        Self { session, idle: limits.idle_timeout.get() }
    }

    /// Whether the client waits for a 100 before it sends its body.
    pub fn expects_continue(&self) -> bool {
        expects_continue(self.session)
    }

    /// Sends a 100, so that the client sends its body.
    ///
    /// # Errors
    /// The client has closed the connection.
    pub async fn send_continue(&mut self) -> Result<(), Fault> {
        send_continue(self.session).await
    }

    /// The bytes as they arrive, at most `max`. A form may be a little longer: the size of its file is checked when it is taken out.
    pub fn into_bytes(self, max: u64, form: bool) -> Body<'a> {
        of_session(self.session, self.idle, max, form)
    }
}

/// See [`RequestBody::into_bytes`].
fn of_session(session: &mut ServerSession, idle: Duration, max: u64, form: bool) -> Body<'_> {
    let most = if form { max.saturating_add(multipart::OVERHEAD) } else { max };
    stream::try_unfold((session, 0u64), move |(session, before)| async move {
        // pingora has no read timeout for HTTP/2. Over HTTP/1.1 its own is the same, so this one does not come first.
        let read = session.read_request_body();
        let read = timeout(idle + Duration::from_secs(1), read).await.map_err(|_| Fault::ClientSilent)?;
        let part = read.map_err(|error| match error.etype {
            ErrorType::ReadTimedout => Fault::ClientSilent,
            ErrorType::ConnectionClosed | ErrorType::ReadError => Fault::ClientGone(error.to_string()),
            _ => Fault::BadRequest("malformed chunked request body".into()),
        })?;
        let Some(part) = part else { return Ok(None) };
        let after = before + part.len() as u64;
        if after > most {
            return Err(Fault::TooLarge { limit: max });
        }
        Ok(Some((part, (session, after))))
    })
    .boxed()
}

/// Reads and discards the body of a request that should have none.
///
/// # Errors
/// As the body's own.
pub async fn discard(session: &mut ServerSession, limits: &Limits) -> Result<(), Fault> {
    if session.is_body_done() {
        return Ok(());
    }
    if expects_continue(session) {
        send_continue(session).await?;
    }
    let mut body = of_session(session, limits.idle_timeout.get(), IDLE_BODY, false);
    while body.next().await.transpose()?.is_some() {}
    Ok(())
}

/// Whether the client waits for a 100 before it sends its body.
pub fn expects_continue(session: &ServerSession) -> bool {
    let request = session.req_header();
    castier_wire::expects_continue(request.version, &request.headers)
}

/// Sends a 100. pingora would close a connection on which an answer is written before the end of the request body. A 100 is no answer yet, so
/// that is switched off meanwhile.
///
/// # Errors
/// The client has closed the connection.
async fn send_continue(session: &mut ServerSession) -> Result<(), Fault> {
    session.set_close_on_response_before_downstream_finish(false);
    session.write_continue_response().await.map_err(|error| Fault::ClientGone(error.to_string()))?;
    session.set_close_on_response_before_downstream_finish(true);
    Ok(())
}

/// The boundary of a `multipart/form-data` body; `None` if the body is the blob itself.
///
/// # Errors
/// [`Fault::BadRequest`] for a form that names no boundary. The client meant a file in it, so storing the whole body would be wrong.
pub fn boundary(headers: &HeaderMap) -> Result<Option<String>, Fault> {
    multipart::boundary(headers).map_err(|_| Fault::BadRequest("multipart/form-data without a boundary in its Content-Type".into()))
}

/// The first file in a form. If there is none, or the form is malformed, [`Fault::BadRequest`] arrives in the stream.
pub fn first_file(body: Body<'_>, boundary: String, max: u64) -> Body<'_> {
    let fault = move |error| match error {
        FormError::Body(fault) => fault,
        FormError::FieldTooLong => Fault::TooLarge { limit: max },
        FormError::NoFile => Fault::BadRequest("the form holds no file: a part with a filename, as `curl -F file=@x` sends it".into()),
        FormError::FileTooLate => Fault::BadRequest("what stands before the file in the form is too long".into()),
        FormError::Malformed(error) => Fault::BadRequest(format!("malformed multipart/form-data: {error}")),
    };
    multipart::first_file(body, boundary, max).map_err(fault).boxed()
}
