//! Request bodies: the bytes of an upload as a stream, straight from the session or out of a multipart form, cut off at `limits.max_blob`;
//! and those that mean nothing and are read away.

use bytes::Bytes;
use castier_cache::{Body, Fault};
use castier_wire as wire;
use futures::{Stream, StreamExt, stream};
use http::{HeaderMap, Version, header};
use multer::{Constraints, Multipart, SizeLimit};
use pingora::{ErrorType, protocols::http::ServerSession};
use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Poll, ready},
};

/// How much longer than its file a form may be: its other fields and the lines between.
const FORM_OVERHEAD: u64 = 1 << 20;

/// A GET or DELETE may carry a body, which means nothing and is read away up to this size.
const IDLE_BODY: u64 = 64 << 10;

/// The request body, as it comes. A form may be a little longer than its file, which is measured again when it is taken out.
pub fn of_session(session: &mut ServerSession, max: u64, form: bool) -> Body<'_> {
    let most = if form { max.saturating_add(FORM_OVERHEAD) } else { max };
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
pub async fn no_body(session: &mut ServerSession) -> Result<(), Fault> {
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

/// Whether the client waits to be called for its body. Over HTTP/1.0 an expectation means nothing (RFC 9110, section 10.1.1).
pub fn expects_continue(session: &ServerSession) -> bool {
    let request = session.req_header();
    request.version == Version::HTTP_11
        && request.headers.get(header::EXPECT).is_some_and(|expect| expect.as_bytes().eq_ignore_ascii_case(b"100-continue"))
}

/// Calls for the body. That is no answer yet, so it does not cost the connection, as an answer would that comes before the body's end.
///
/// # Errors
/// The client is gone.
pub async fn go_on(session: &mut ServerSession) -> Result<(), Fault> {
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
    match headers.get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok()) {
        Some(kind) if kind.trim_start().to_ascii_lowercase().starts_with("multipart/form-data") => {
            let boundary = multer::parse_boundary(kind);
            boundary.map(Some).map_err(|_| Fault::BadRequest("multipart/form-data without a boundary in its Content-Type".into()))
        }
        _ => Ok(None),
    }
}

/// The first file in a form. If there is none, or the form is malformed, [`Fault::BadRequest`] arrives in the stream.
pub fn first_file(body: Body<'_>, boundary: String, max: u64) -> Body<'_> {
    let limits = SizeLimit::new().per_field(max);
    let ration = Arc::new(AtomicU64::new(FORM_OVERHEAD));
    let form = Multipart::with_constraints(rationed(body, ration.clone()), boundary, Constraints::new().size_limit(limits));
    stream::try_unfold(State::Form(form), move |state| {
        let ration = ration.clone();
        async move {
            let mut field = match state {
                State::File(field) => field,
                State::Form(mut form) => loop {
                    match form.next_field().await.map_err(|error| fault(error, max))? {
                        Some(field) if field.headers().get(header::CONTENT_DISPOSITION).is_some_and(wire::is_file) => {
                            break Box::new(field);
                        }
                        Some(_) => {}
                        None => {
                            return Err(Fault::BadRequest(
                                "the form holds no file: a part with a filename, as `curl -F file=@x` sends it".into(),
                            ));
                        }
                    }
                },
            };
            // From here on bytes leave as fast as they come.
            ration.store(u64::MAX, Ordering::Relaxed);
            let part: Option<Bytes> = field.chunk().await.map_err(|error| fault(error, max))?;
            Ok(part.map(|part| (part, State::File(field))))
        }
    })
    .boxed()
}

/// `body` as multer can be given it: multer buffers all that is ready until it finds what it looks for, so it gets one part at a time
/// (and never a part and the end at once, which it takes for a broken form), and no more than `ration` bytes.
fn rationed(mut body: Body<'_>, ration: Arc<AtomicU64>) -> impl Stream<Item = Result<Bytes, Fault>> {
    let mut full = false;
    stream::poll_fn(move |cx| {
        if std::mem::take(&mut full) {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let Some(part) = ready!(body.poll_next_unpin(cx)) else { return Poll::Ready(None) };
        full = true;
        let part = part?;
        let left = ration.load(Ordering::Relaxed);
        if left < part.len() as u64 {
            return Poll::Ready(Some(Err(Fault::BadRequest("what stands before the file in the form is too long".into()))));
        }
        if left != u64::MAX {
            ration.store(left - part.len() as u64, Ordering::Relaxed);
        }
        Poll::Ready(Some(Ok(part)))
    })
}

enum State<'a> {
    Form(Multipart<'a>),
    File(Box<multer::Field<'a>>),
}

fn fault(error: multer::Error, max: u64) -> Fault {
    match error {
        multer::Error::StreamSizeExceeded { .. } | multer::Error::FieldSizeExceeded { .. } => Fault::TooLarge { limit: max },
        multer::Error::StreamReadFailed(cause) => match cause.downcast::<Fault>() {
            Ok(fault) => *fault,
            Err(cause) => Fault::ClientGone(cause.to_string()),
        },
        error => Fault::BadRequest(format!("malformed multipart/form-data: {error}")),
    }
}
