//! The bytes of an upload as a stream: straight from the session, or out of a multipart form. Cut off at `limits.max_blob`.

use crate::{fault::Fault, upstream::Upload};
use bytes::Bytes;
use futures::{StreamExt, stream};
use http::{HeaderMap, header};
use multer::{Constraints, Multipart, SizeLimit};
use pingora::protocols::http::ServerSession;

/// How much longer than its file a form may be: its other fields and the lines between.
const FORM_OVERHEAD: u64 = 1 << 20;

/// The request body, as it comes. A form may be a little longer than its file, which is measured again when it is taken out.
pub fn of_session(session: &mut ServerSession, max: u64, form: bool) -> Upload<'_> {
    let most = if form { max.saturating_add(FORM_OVERHEAD) } else { max };
    stream::try_unfold((session, 0u64), move |(session, before)| async move {
        let part = session.read_request_body().await.map_err(|error| Fault::ClientGone(error.to_string()))?;
        let Some(part) = part else { return Ok(None) };
        let after = before + part.len() as u64;
        if after > most {
            return Err(Fault::TooLarge { limit: max });
        }
        Ok(Some((part, (session, after))))
    })
    .boxed()
}

/// The boundary of a `multipart/form-data` body; none if the body is the blob itself.
pub fn boundary(headers: &HeaderMap) -> Option<String> {
    multer::parse_boundary(headers.get(header::CONTENT_TYPE)?.to_str().ok()?).ok()
}

/// The first file in a form. If there is none, or the form is malformed, [`Fault::BadRequest`] arrives in the stream.
pub fn first_file(body: Upload<'_>, boundary: String, max: u64) -> Upload<'_> {
    let limits = SizeLimit::new().per_field(max);
    let form = Multipart::with_constraints(body, boundary, Constraints::new().size_limit(limits));
    stream::try_unfold(State::Form(form), move |state| async move {
        let mut field = match state {
            State::File(field) => field,
            State::Form(mut form) => loop {
                match form.next_field().await.map_err(|error| fault(error, max))? {
                    Some(field) if field.file_name().is_some() => break Box::new(field),
                    Some(_) => {}
                    None => {
                        return Err(Fault::BadRequest(
                            "the form holds no file: a part with a filename, as `curl -F file=@x` sends it".into(),
                        ));
                    }
                }
            },
        };
        let part: Option<Bytes> = field.chunk().await.map_err(|error| fault(error, max))?;
        Ok(part.map(|part| (part, State::File(field))))
    })
    .boxed()
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
