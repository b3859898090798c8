//! Uploads: PUT names the digest, POST does not.

use super::{Handlers, Request};
use crate::{
    descriptors::Outgoing,
    reply::Reply,
    request_body::{self, RequestBody},
};
use castier_blob::Digest;
use castier_cache::{Fault, Put, SMALL};
use castier_config::Limits;
use castier_wire::Target;
use http::header;

impl Handlers {
    /// The reply to an upload. A streamed upload occupies a connection to the origin until it ends. `outgoing` gives the descriptors for it.
    ///
    /// # Errors
    /// The client's, the origin's, or a limit.
    pub async fn upload(
        &self,
        request: &Request<'_>,
        mut body: RequestBody<'_>,
        limits: &Limits,
        outgoing: impl FnOnce() -> Result<Outgoing, Fault>,
    ) -> Result<Reply, Fault> {
        let _uploading = self.node.metrics.uploading();
        let digest = if let Target::Blob(digest) = request.target { Some(digest) } else { None };
        let max = limits.max_blob.get();
        let announced = request.headers.get(header::CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.trim().parse::<u64>().ok());
        let boundary = if digest.is_none() { request_body::boundary(request.headers)? } else { None };
        // A form is longer than its file.
        let size = if boundary.is_some() { None } else { announced };
        if size.is_some_and(|size| size > max) {
            return Err(Fault::TooLarge { limit: max });
        }
        let _connection = match size {
            Some(size) if size <= SMALL as u64 => None,
            _ => Some(outgoing()?),
        };
        if body.expects_continue() {
            if let Some(digest) = digest
                && let Ok(Some(size)) = self.node.stored_at_origin(&digest, size, self.asker()).await
            {
                return Ok(Reply::stored(&digest, size, false, true));
            }
            body.send_continue().await?;
        }
        let mut bytes = body.into_bytes(max, boundary.is_some());
        if let Some(boundary) = boundary {
            bytes = request_body::first_file(bytes, boundary, max);
        }
        let (put, stored, size) =
            self.node.put(digest, size, bytes, self.asker()).await.inspect_err(|fault| not_stored(digest.as_ref(), fault))?;
        Ok(Reply::stored(&stored, size, put == Put::Created, digest.is_some()))
    }
}

/// Logs a failed upload: a failure of the origin or a peer as a warning, since an operator must act on it. The access record has the client's own
/// mistakes.
fn not_stored(digest: Option<&Digest>, fault: &Fault) {
    let digest = digest.map(tracing::field::display);
    match fault {
        Fault::Unreachable { .. }
        | Fault::Silent { .. }
        | Fault::NotAsked { .. }
        | Fault::Unusable { .. }
        | Fault::Denied { .. }
        | Fault::Corrupt { .. }
        | Fault::OriginFull
        | Fault::Internal(_) => {
            tracing::warn!(digest, %fault, "an upload was not stored; its client got an error");
        }
        _ => tracing::debug!(digest, %fault, "an upload was refused"),
    }
}
