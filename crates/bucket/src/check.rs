//! What a bucket lets castier do: tried at the start, and by `--check-config --online`.

use crate::{blobs::Bucket, fault::fault, transport::Failure};
use castier_cache::Fault;
use castier_config::Problems;
use http::StatusCode;
use object_store::{Error, ObjectStoreExt as _, path::Path};

/// An operation that failed.
struct Lack {
    /// get, head, put, list or abort. Empty: all of them.
    operation: &'static str,
    /// Why.
    fault: Fault,
    /// The key of the configuration, below `[origin]` or `[store]`, that decides about it. `None`: none does.
    key: Option<&'static str>,
}

impl Bucket {
    /// Tries what castier does in a bucket, and leaves nothing there. Returns what failed.
    async fn check(&self) -> Vec<Lack> {
        let path = Path::from(format!("{}castier-check", self.prefix));
        let get = found(self.store.get(&path).await);
        // What is wrong with everything is told once.
        if let Some((key, error)) = get.as_ref().err().and_then(|error| Some((concerns_all(error)?, error))) {
            return vec![Lack { operation: "", fault: fault("GET", error), key }];
        }
        let mut lacks = Vec::new();
        let mut note = |operation, done: Result<(), Fault>| {
            lacks.extend(done.err().map(|fault| Lack { operation, fault, key: Some("url") }));
        };
        note("get", get.map_err(|error| fault("GET", &error)));
        note("head", self.head(&path).await.map(drop));
        note("list", self.list_one().await.map_err(|error| fault("LIST", &error)));
        match self.store.put_multipart(&path).await {
            Ok(mut upload) => note("abort", upload.abort().await.map_err(|error| fault("ABORT", &error))),
            Err(error) => note("put", Err(fault("PUT", &error))),
        }
        lacks
    }

    /// What [`Self::check`] finds, as problems of the configuration. `section`: `origin` or `store`.
    pub async fn problems(&self, section: &str) -> Problems {
        let mut problems = Problems::default();
        for Lack { operation, fault, key } in self.check().await {
            let subject = match key {
                // The other services have no such section.
                Some(key) if key.starts_with("s3.") && self.raw.is_none() => format!("{section}.url"),
                Some(key) => format!("{section}.{key}"),
                None => "the clock of this machine".to_owned(),
            };
            let before = if operation.is_empty() { String::new() } else { format!("cannot {operation}: ") };
            problems.add(subject, format!("{before}{fault}"));
        }
        problems
    }

    /// Logs what [`Self::check`] finds.
    pub async fn log_check(&self) {
        let mut lacks = self.check().await;
        let is_missing = matches!(&lacks[..], [Lack { operation: "", key: Some("url"), .. }]);
        // SeaweedFS makes a bucket at the first upload of an administrator.
        if is_missing && let Ok(mut upload) = self.store.put_multipart(&Path::from(format!("{}castier-check", self.prefix))).await {
            upload.abort().await.ok();
            lacks = self.check().await;
        }
        for Lack { operation, fault, .. } in lacks {
            let operation = if operation.is_empty() { "all" } else { operation };
            tracing::warn!(bucket = self.name, operation, %fault, "the bucket does not let castier do this; requests that need it fail");
        }
    }
}

/// An object that is not there is an answer.
fn found<T>(answer: Result<T, Error>) -> Result<(), Error> {
    match answer {
        Ok(_) | Err(Error::NotFound { .. }) => Ok(()),
        Err(error) => Err(error),
    }
}

/// The key that an error is about which every operation would get; `None` if another operation may do better.
fn concerns_all(error: &Error) -> Option<Option<&'static str>> {
    Some(match Failure::of(error) {
        Some(Failure::Connect(_) | Failure::Broke(_) | Failure::Silent) => Some("s3.endpoint"),
        Some(Failure::Status { status: StatusCode::UNAUTHORIZED, .. }) => Some("s3.access_key_id"),
        Some(Failure::Status { code, .. }) => match code.as_deref()? {
            "NoSuchBucket" | "ContainerNotFound" => Some("url"),
            "InvalidAccessKeyId" | "InvalidToken" | "ExpiredToken" => Some("s3.access_key_id"),
            "SignatureDoesNotMatch" => Some("s3.secret_access_key_file"),
            "AuthorizationHeaderMalformed" => Some("s3.region"),
            // The clock of this machine is wrong.
            "RequestTimeTooSkewed" => None,
            _ => return None,
        },
        Some(Failure::Crowded | Failure::Whole) => return None,
        // There are no credentials, for instance.
        None => Some("s3.access_key_id"),
    })
}
