//! From errors of `object_store` to faults.

use crate::transport::Failure;
use castier_cache::{Fault, Limit};
use http::StatusCode;
use object_store::Error;
use std::error::Error as _;

/// The name of the source in labels and faults.
pub(crate) const NAME: &str = "origin";

pub(crate) fn unusable(why: impl Into<String>) -> Fault {
    Fault::Unusable { source_name: NAME, why: why.into() }
}

/// The fault for an error while doing `what`, such as "GET".
pub(crate) fn fault(what: &str, error: &Error) -> Fault {
    match Failure::of(error) {
        Some(Failure::Silent) => Fault::Silent { source_name: NAME, why: format!("{what} got no byte in time") },
        Some(Failure::Crowded) => Fault::Busy(Limit::Requests),
        Some(failure @ (Failure::Connect(_) | Failure::Broke(_))) => Fault::Unreachable { source_name: NAME, why: failure.to_string() },
        Some(Failure::Whole) => unusable(format!("{what}: {}", Failure::Whole)),
        Some(Failure::Status { status, code, message }) => answered(what, *status, code.as_deref(), message.as_deref()),
        None => {
            let cause = std::iter::successors(error.source(), |&error| error.source()).last();
            let cause = cause.map_or_else(|| error.to_string(), ToString::to_string);
            match error {
                // Credentials could not be had, for instance.
                Error::Unauthenticated { .. } | Error::PermissionDenied { .. } => {
                    Fault::Denied { source_name: NAME, why: format!("{what}: {cause}") }
                }
                _ => unusable(format!("{what}: {cause}")),
            }
        }
    }
}

fn answered(what: &str, status: StatusCode, code: Option<&str>, message: Option<&str>) -> Fault {
    let said = [Some(status.as_str()), code].into_iter().flatten().collect::<Vec<_>>().join(" ");
    let said = message.map_or_else(|| said.clone(), |message| format!("{said} ({message})"));
    match (status, code.unwrap_or_default()) {
        (StatusCode::SERVICE_UNAVAILABLE | StatusCode::TOO_MANY_REQUESTS, _) => Fault::Busy(Limit::Origin),
        (StatusCode::INSUFFICIENT_STORAGE, _) | (_, "QuotaExceeded" | "XMinioStorageFull" | "InsufficientStorage") => Fault::OriginFull,
        (StatusCode::PAYLOAD_TOO_LARGE, _) | (_, "EntityTooLarge") => Fault::OriginRefusesSize,
        (_, "KeyTooLongError") => Fault::BadRequest("the name is longer than the store takes".into()),
        (_, "NoSuchBucket") => {
            Fault::Denied { source_name: NAME, why: format!("{what}: {said}: there is no such bucket; check origin.url") }
        }
        (_, "RequestTimeTooSkewed") => Fault::Denied { source_name: NAME, why: format!("{what}: {said}: set the clock of this machine") },
        (StatusCode::FORBIDDEN | StatusCode::UNAUTHORIZED, _)
        | (
            _,
            "InvalidAccessKeyId"
            | "SignatureDoesNotMatch"
            | "ExpiredToken"
            | "AccessDenied"
            | "InvalidToken"
            | "AuthorizationHeaderMalformed",
        ) => Fault::Denied { source_name: NAME, why: format!("{what}: {said}{}", hint(what, code)) },
        _ => unusable(format!("{what}: {said}")),
    }
}

/// What the operator may have to do.
fn hint(what: &str, code: Option<&str>) -> &'static str {
    match (what, code) {
        // S3 says this of a missing key, too, to those who may not list the bucket.
        ("GET" | "HEAD", Some("AccessDenied") | None) => ": castier needs s3:GetObject, and s3:ListBucket so that a missing key is a 404",
        ("PUT", Some("AccessDenied")) => ": castier needs s3:PutObject, and s3:AbortMultipartUpload",
        ("DELETE", Some("AccessDenied")) => ": castier needs s3:DeleteObject",
        _ => "",
    }
}
