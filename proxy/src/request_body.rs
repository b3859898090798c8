//! Request bodies: the bytes of an upload as a stream, straight from the session or out of a multipart form, cut off at `limits.max_blob`;
//! and those that mean nothing and are read away.

use castier_cache::{Body, Fault};
use castier_serverkit::multipart::{self, FormError};
use futures::{StreamExt, TryStreamExt, stream};
use http::HeaderMap;
use pingora::{ErrorType, protocols::http::ServerSession};

/// A GET or DELETE may carry a body, which means nothing and is read away up to this size.
const IDLE_BODY: u64 = 64 << 10;

/// The body of a request, as a handler sees it.
pub struct RequestBody<'a>(&'a mut ServerSession);

impl<'a> RequestBody<'a> {
    /// The body of the session's request.
    pub(crate) const fn of(session: &'a mut ServerSession) -> Self {
        Self(session)
    }

    /// Whether the client waits to be called for its body.
    pub fn is_awaited(&self) -> bool {
        expects_continue(self.0)
    }

    /// Calls for the body.
    ///
    /// # Errors
    /// The client has left.
    pub async fn call_for(&mut self) -> Result<(), Fault> {
        go_on(self.0).await
    }

    /// The bytes as they come: at most `max`, or, of a form, a little more, since its file is measured again when it is taken out.
    pub fn into_bytes(self, max: u64, form: bool) -> Body<'a> {
        of_session(self.0, max, form)
    }
}

/// The request body, as it comes. A form may be a little longer than its file, which is measured again when it is taken out.
fn of_session(session: &mut ServerSession, max: u64, form: bool) -> Body<'_> {
    let most = if form { max.saturating_add(multipart::OVERHEAD) } else { max };
    stream::try_unfold((session, 0u64), move |(session, before)| async move {
        let part = session.read_request_body().await.map_err(|error| match error.etype {
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

/// Reads away the body of a request that should have none.
///
/// # Errors
/// As the body's own.
pub async fn discard(session: &mut ServerSession) -> Result<(), Fault> {
    if session.is_body_done() {
        return Ok(());
    }
    if expects_continue(session) {
        go_on(session).await?;
    }
    let mut body = of_session(session, IDLE_BODY, false);
    while body.next().await.transpose()?.is_some() {}
    Ok(())
}

/// Whether the client waits to be asked for its body.
pub fn expects_continue(session: &ServerSession) -> bool {
    let request = session.req_header();
    castier_wire::expects_continue(request.version, &request.headers)
}

/// Calls for the body. That is no answer yet, so it does not cost the connection, as an answer would that comes before the body's end.
///
/// # Errors
/// The client is gone.
async fn go_on(session: &mut ServerSession) -> Result<(), Fault> {
    session.set_close_on_response_before_downstream_finish(false);
    session.write_continue_response().await.map_err(|error| Fault::ClientGone(error.to_string()))?;
    session.set_close_on_response_before_downstream_finish(true);
    Ok(())
}

/// The boundary of a `multipart/form-data` body; none if the body is the blob itself.
///
/// # Errors
/// [`Fault::BadRequest`] for a form that names no boundary: stored as it is, it would be a blob that nobody meant.
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
