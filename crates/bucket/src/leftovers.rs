//! Multipart uploads that a killed castier has left behind. Their parts take space, and no list of objects shows them.
//!
//! Only S3 has a list of them, and `object_store` has no call for it. So the request is a signed URL, sent over the same transport.
//!
//! Invariant: only uploads to a key that the key template can make are aborted. Other programs may use the same bucket.

use crate::{blobs::Bucket, fault::fault, transport::Transport};
use castier_cache::Fault;
use futures::{StreamExt as _, stream};
use http::Method;
use http_body_util::BodyExt as _;
use object_store::{
    Error,
    aws::AmazonS3,
    client::{HttpRequestBody, HttpService as _},
    multipart::MultipartStore as _,
    path::Path,
    signer::{SignedUrlOptions, Signer as _},
};
use percent_encoding::percent_decode_str;
use quick_xml::events::Event;
use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

/// How many pages of a thousand uploads are read. The next start goes on.
const PAGES: usize = 10;
/// The most bytes of a page.
const PAGE_BYTES: usize = 4 << 20;
/// How many uploads are aborted at once.
const AT_ONCE: usize = 4;
/// How long all of it may take.
const TIME: Duration = Duration::from_secs(600);
/// How long a signed URL is good.
const SIGNED_FOR: Duration = Duration::from_secs(60);

/// The client of S3, for what the trait `ObjectStore` has not.
pub(crate) struct Raw {
    pub(crate) client: Arc<AmazonS3>,
    pub(crate) transport: Transport,
    /// `origin.s3.abort_leftovers_after`; `None`: never.
    pub(crate) after: Option<Duration>,
}

/// A page of the list.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Page {
    /// The uploads.
    pub uploads: Vec<Unfinished>,
    /// Where the next page begins: key and id.
    pub next: Option<(String, String)>,
}

/// An upload that was begun, and neither completed nor aborted.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Unfinished {
    /// Its key.
    pub key: String,
    /// Its id.
    pub id: String,
    /// When it was begun.
    pub begun: Option<SystemTime>,
}

impl Bucket {
    /// Aborts uploads that were begun longer ago than `origin.s3.abort_leftovers_after`, and logs how many there were. A failure is logged, too.
    pub async fn abort_leftovers(&self) {
        let Some((raw, after)) = self.raw.as_ref().and_then(|raw| Some((raw, raw.after?))) else { return };
        let mut aborted = 0;
        let ended = tokio::time::timeout(TIME, self.abort_pages(raw, after, &mut aborted)).await;
        if aborted > 0 {
            tracing::info!(
                bucket = self.name,
                uploads = aborted,
                "unfinished uploads to the bucket were older than s3.abort_leftovers_after, and were aborted"
            );
        }
        match ended {
            Ok(Ok(())) => {}
            Ok(Err(fault)) => {
                tracing::warn!(bucket = self.name, %fault, "unfinished uploads to the bucket could not be listed; they stay until the next start, or until a rule of the bucket removes them")
            }
            Err(_) => tracing::warn!(bucket = self.name, "aborting unfinished uploads took too long; the next start goes on"),
        }
    }

    async fn abort_pages(&self, raw: &Raw, after: Duration, aborted: &mut u64) -> Result<(), Fault> {
        // Blobs that were uploaded in parts have such keys. Entries are one request each.
        let prefix = format!("{}{}", self.prefix, self.key.literal_prefix());
        let mut from = None;
        for _ in 0..PAGES {
            let page = raw.page(&prefix, from.take()).await.map_err(|error| fault("LIST", &error))?;
            let now = SystemTime::now();
            let is_left = |upload: &Unfinished| {
                let age = upload.begun.and_then(|begun| now.duration_since(begun).ok());
                self.digest_of(&upload.key).is_some() && age.is_some_and(|age| age >= after)
            };
            let left = page.uploads.into_iter().filter(is_left);
            let abort = |upload: Unfinished| async move { raw.client.abort_multipart(&Path::from(upload.key), &upload.id).await.is_ok() };
            let mut ends = stream::iter(left).map(abort).buffer_unordered(AT_ONCE);
            while let Some(is_aborted) = ends.next().await {
                // Another castier may have aborted it at the same time.
                if is_aborted {
                    *aborted += 1;
                    self.metrics.aborted();
                }
            }
            from = page.next;
            if from.is_none() {
                break;
            }
        }
        Ok(())
    }
}

impl Raw {
    async fn page(&self, prefix: &str, from: Option<(String, String)>) -> Result<Page, Error> {
        let other = |why: String| Error::Generic { store: "S3", source: why.into() };
        let mut query = vec![("uploads", String::new()), ("encoding-type", "url".to_owned()), ("prefix", prefix.to_owned())];
        if let Some((key, id)) = from {
            query.extend([("key-marker", key), ("upload-id-marker", id)]);
        }
        let options = SignedUrlOptions::new().with_query(query);
        let url = self.client.signed_url_opts(Method::GET, &Path::default(), SIGNED_FOR, &options).await?;
        let request = http::Request::get(url.as_str()).body(HttpRequestBody::empty()).map_err(|error| other(error.to_string()))?;
        let failed = |error: object_store::client::HttpError| Error::Generic { store: "S3", source: error.into() };
        let mut body = self.transport.call(request).await.map_err(failed)?.into_body();
        let mut text = Vec::new();
        while let Some(frame) = body.frame().await.transpose().map_err(failed)? {
            let data = frame.into_data().unwrap_or_default();
            if text.len() + data.len() > PAGE_BYTES {
                return Err(other("a list of uploads is too long".into()));
            }
            text.extend_from_slice(&data);
        }
        Page::parse(&String::from_utf8_lossy(&text)).ok_or_else(|| other("a list of uploads cannot be understood".into()))
    }
}

impl Page {
    /// Parses a page; `None`: it is none.
    pub fn parse(xml: &str) -> Option<Self> {
        let mut reader = quick_xml::Reader::from_str(xml);
        let (mut page, mut next, mut is_whole, mut is_encoded) = (Self::default(), (String::new(), String::new()), true, false);
        let mut is_list = false;
        loop {
            let start = match reader.read_event().ok()? {
                Event::Start(start) => start,
                Event::Eof => break,
                _ => continue,
            };
            let name = start.name();
            match name.as_ref() {
                "ListMultipartUploadsResult" => is_list = true,
                "Upload" => page.uploads.push(Unfinished::default()),
                // Sections whose elements have the names of others.
                "Initiator" | "Owner" | "CommonPrefixes" => {
                    reader.read_to_end(name).ok()?;
                }
                wanted @ ("Key" | "UploadId" | "Initiated" | "IsTruncated" | "NextKeyMarker" | "NextUploadIdMarker" | "EncodingType") => {
                    let wanted = wanted.to_owned();
                    let text = reader.read_text(name).ok()?;
                    let text = quick_xml::escape::unescape(text.trim()).ok()?.into_owned();
                    match (wanted.as_str(), page.uploads.last_mut()) {
                        ("Key", Some(upload)) => upload.key = text,
                        ("UploadId", Some(upload)) => upload.id = text,
                        ("Initiated", Some(upload)) => upload.begun = OffsetDateTime::parse(&text, &Rfc3339).ok().map(SystemTime::from),
                        ("IsTruncated", _) => is_whole = text != "true",
                        ("NextKeyMarker", _) => next.0 = text,
                        ("NextUploadIdMarker", _) => next.1 = text,
                        ("EncodingType", _) => is_encoded = text == "url",
                        _ => {}
                    }
                }
                _ => {}
            }
        }
        let decoded = |text: &str| percent_decode_str(text).decode_utf8_lossy().into_owned();
        if is_encoded {
            next.0 = decoded(&next.0);
            page.uploads.iter_mut().for_each(|upload| upload.key = decoded(&upload.key));
        }
        page.next = (!is_whole && !next.0.is_empty()).then_some(next);
        is_list.then_some(page)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages() {
        let xml = "<?xml version=\"1.0\"?><ListMultipartUploadsResult><Bucket>b</Bucket><KeyMarker/><EncodingType>url</EncodingType>\
            <NextKeyMarker>cas/x%20y</NextKeyMarker><NextUploadIdMarker>7&amp;8</NextUploadIdMarker><IsTruncated>true</IsTruncated>\
            <Upload><Key>cas/a%2Bb</Key><UploadId>1</UploadId><Initiator><ID>Key</ID></Initiator><Initiated>2020-01-02T03:04:05.000Z</Initiated></Upload>\
            <Upload><Key>cas/c</Key><UploadId>2</UploadId><Initiated>never</Initiated></Upload></ListMultipartUploadsResult>";
        let page = Page::parse(xml).unwrap();
        let [first, second] = &page.uploads[..] else { panic!("{page:?}") };
        assert_eq!((first.key.as_str(), first.id.as_str()), ("cas/a+b", "1"));
        assert_eq!(first.begun, Some(SystemTime::UNIX_EPOCH + Duration::from_secs(1_577_934_245)));
        assert_eq!((second.key.as_str(), second.begun), ("cas/c", None));
        assert_eq!(page.next, Some(("cas/x y".into(), "7&8".into())));
        // Not every store knows the encoding. The last page has no next one.
        let plain = xml.replace("<EncodingType>url</EncodingType>", "").replace(">true<", ">false<");
        let page = Page::parse(&plain).unwrap();
        assert_eq!((page.uploads[0].key.as_str(), page.next), ("cas/a%2Bb", None));
        for text in ["", "<html></html>", "<ListMultipartUploadsResult><Upload>", "<Error><Code>x</Code></Error>"] {
            let page = Page::parse(text);
            assert!(page.is_none_or(|page| page.uploads.iter().all(|upload| upload.begun.is_none())), "{text}");
        }
    }
}
