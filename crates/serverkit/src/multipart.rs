//! Uploads as `multipart/form-data`: the first file of a form, as a stream.

use bytes::Bytes;
use castier_wire::is_file;
use futures::{
    Stream, StreamExt as _,
    stream::{self, BoxStream},
};
use http::{HeaderMap, header};
use multer::{Constraints, Field, Multipart, SizeLimit};
use std::{
    error::Error,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    task::{Poll, ready},
};

/// The most bytes of a form in addition to its file: other fields, headers and boundaries.
pub const OVERHEAD: u64 = 1 << 20;

/// Why the file could not be read from a form.
#[derive(Debug, thiserror::Error)]
pub enum FormError<E> {
    /// The body that carries the form broke off.
    #[error(transparent)]
    Body(E),
    /// A field is longer than allowed.
    #[error("a field of the form is too long")]
    FieldTooLong,
    /// The fields before the file are longer than [`OVERHEAD`].
    #[error("the fields before the file are too long")]
    FileTooLate,
    /// No part has a file name.
    #[error("none of its parts is a file")]
    NoFile,
    /// It does not follow RFC 7578.
    #[error(transparent)]
    Malformed(multer::Error),
}

/// Why [`rationed`] ended. multer passes it on as the cause of its error.
#[derive(Debug, thiserror::Error)]
enum Ended<E> {
    #[error(transparent)]
    Body(E),
    #[error("over the ration")]
    OverRation,
}

/// Whether a body with these headers is a form, and not the blob itself.
pub fn is_form(headers: &HeaderMap) -> bool {
    form_type(headers).is_some()
}

fn form_type(headers: &HeaderMap) -> Option<&str> {
    const FORM: &str = "multipart/form-data";
    let kind = headers.get(header::CONTENT_TYPE)?.to_str().ok()?.trim_start();
    kind.get(..FORM.len()).is_some_and(|start| start.eq_ignore_ascii_case(FORM)).then_some(kind)
}

/// The boundary of a form; `None` if the body is the blob itself.
///
/// # Errors
/// The form names no boundary. The client meant a file in it, so storing the whole body would be wrong.
pub fn boundary(headers: &HeaderMap) -> Result<Option<String>, multer::Error> {
    form_type(headers).map(multer::parse_boundary).transpose()
}

/// The bytes of the first file in a form. Skips fields before it, and does not read fields after it. `most` limits each field.
pub fn first_file<'a, E: Error + Send + Sync + 'static>(
    body: impl Stream<Item = Result<Bytes, E>> + Send + Unpin + 'a,
    boundary: String,
    most: u64,
) -> BoxStream<'a, Result<Bytes, FormError<E>>> {
    let ration = Arc::new(AtomicU64::new(OVERHEAD));
    let limits = Constraints::new().size_limit(SizeLimit::new().per_field(most));
    let form = Multipart::with_constraints(rationed(body, Arc::clone(&ration)), boundary, limits);
    stream::try_unfold(At::Form(form), move |at| {
        let ration = Arc::clone(&ration);
        async move {
            let mut file = match at {
                At::File(file) => file,
                At::Form(mut form) => loop {
                    let Some(field) = form.next_field().await.map_err(explain)? else { return Err(FormError::NoFile) };
                    if field.headers().get(header::CONTENT_DISPOSITION).is_some_and(is_file) {
                        break Box::new(field);
                    }
                },
            };
            // No ration from here on: the caller takes the file's bytes as they arrive.
            ration.store(u64::MAX, Relaxed);
            let part = file.chunk().await.map_err(explain)?;
            Ok(part.map(|part| (part, At::File(file))))
        }
    })
    .boxed()
}

/// The position in a form.
enum At<'a> {
    Form(Multipart<'a>),
    File(Box<Field<'a>>),
}

/// Adapts `body` for multer. multer buffers all bytes that are ready until it finds the next boundary. So it gets one chunk per poll, and no more than
/// `ration` bytes in all. It never gets a chunk and the end in one poll, since it would report an incomplete form then.
fn rationed<E>(
    mut body: impl Stream<Item = Result<Bytes, E>> + Unpin,
    ration: Arc<AtomicU64>,
) -> impl Stream<Item = Result<Bytes, Ended<E>>> {
    let mut full = false;
    stream::poll_fn(move |cx| {
        if std::mem::take(&mut full) {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let Some(chunk) = ready!(body.poll_next_unpin(cx)) else { return Poll::Ready(None) };
        full = true;
        let chunk = chunk.map_err(Ended::Body)?;
        let left = ration.load(Relaxed);
        if left != u64::MAX {
            let Some(left) = left.checked_sub(chunk.len() as u64) else { return Poll::Ready(Some(Err(Ended::OverRation))) };
            ration.store(left, Relaxed);
        }
        Poll::Ready(Some(Ok(chunk)))
    })
}

fn explain<E: Error + Send + Sync + 'static>(error: multer::Error) -> FormError<E> {
    match error {
        multer::Error::StreamSizeExceeded { .. } | multer::Error::FieldSizeExceeded { .. } => FormError::FieldTooLong,
        multer::Error::StreamReadFailed(cause) => match cause.downcast::<Ended<E>>().map(|ended| *ended) {
            Ok(Ended::Body(error)) => FormError::Body(error),
            Ok(Ended::OverRation) => FormError::FileTooLate,
            Err(cause) => FormError::Malformed(multer::Error::StreamReadFailed(cause)),
        },
        error => FormError::Malformed(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;

    #[derive(Debug, PartialEq, thiserror::Error)]
    #[error("gone")]
    struct Gone;

    /// The file in a form that arrives in chunks of this many bytes.
    async fn file(form: &str, chunk: usize, most: u64) -> Result<String, FormError<Gone>> {
        let chunks: Vec<_> = form.as_bytes().chunks(chunk).map(|chunk| Ok(Bytes::copy_from_slice(chunk))).collect();
        read(stream::iter(chunks), most).await
    }

    async fn read(body: impl Stream<Item = Result<Bytes, Gone>> + Send + Unpin, most: u64) -> Result<String, FormError<Gone>> {
        let mut parts = first_file(body, "b".to_owned(), most);
        let mut found = Vec::new();
        while let Some(part) = parts.next().await {
            found.extend_from_slice(&part?);
        }
        Ok(String::from_utf8(found).unwrap())
    }

    fn part(disposition: &str, content: &str) -> String {
        format!("--b\r\nContent-Disposition: form-data; {disposition}\r\n\r\n{content}\r\n")
    }

    #[tokio::test]
    async fn the_first_file_is_found() {
        let form =
            part("name=x", "a field") + &part("name=f; filename=a", "the file") + &part("name=g; filename=b", "another") + "--b--\r\n";
        for chunk in [1, 7, 1000] {
            assert_eq!(file(&form, chunk, 1000).await.unwrap(), "the file");
            assert!(matches!(file(&form, chunk, 3).await, Err(FormError::FieldTooLong)));
        }
        assert!(matches!(file(&(part("name=x", "a field") + "--b--\r\n"), 9, 1000).await, Err(FormError::NoFile)));
        assert!(matches!(file("no form", 9, 1000).await, Err(FormError::Malformed(_))));
        assert!(matches!(file(&form[..form.len() / 3], 9, 1000).await, Err(FormError::Malformed(_))));
    }

    #[tokio::test]
    async fn what_comes_before_the_file_is_limited_and_the_file_is_not() {
        let long = "x".repeat(2 << 20);
        let file_part = part("name=f; filename=a", &long);
        assert_eq!(file(&(file_part.clone() + "--b--\r\n"), 64 << 10, u64::MAX).await.unwrap().len(), long.len());
        let form = part("name=x", &long) + &file_part + "--b--\r\n";
        assert!(matches!(file(&form, 64 << 10, u64::MAX).await, Err(FormError::FileTooLate)));
    }

    #[tokio::test]
    async fn an_error_of_the_body_is_told_as_it_is() {
        let begin = part("name=f; filename=a", "x");
        let body = stream::iter([Ok(Bytes::from(begin)), Err(Gone)]);
        assert!(matches!(read(body, 1000).await, Err(FormError::Body(Gone))));
    }

    #[test]
    fn forms_are_told_from_blobs() {
        let of = |kind: &'static str| HeaderMap::from_iter([(header::CONTENT_TYPE, HeaderValue::from_static(kind))]);
        assert_eq!(boundary(&HeaderMap::new()).unwrap(), None);
        assert_eq!(boundary(&of("application/octet-stream")).unwrap(), None);
        assert_eq!(boundary(&of(" Multipart/Form-Data; boundary=x")).unwrap().as_deref(), Some("x"));
        assert!(is_form(&of("multipart/form-data")) && boundary(&of("multipart/form-data")).is_err());
    }
}
