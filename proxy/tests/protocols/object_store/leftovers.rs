//! Multipart uploads that were left behind are aborted at the start.

use super::{Weed, castier_origin, is_list_of_uploads};
use crate::support::{Response, castier, eventually, sha256, turn};
use tempfile::TempDir;

impl Weed {
    /// The configuration with this age.
    fn config_after(&self, after: &str) -> String {
        // The section [origin.s3] is the last one.
        format!("{}abort_leftovers_after = \"{after}\"\n", self.config(""))
    }

    fn begin(&self, key: &str) {
        let (status, body) = self.curl("POST", &format!("/blobs/{key}?uploads="), b"");
        assert_eq!(status, 200, "{}", String::from_utf8_lossy(&body));
    }

    /// The keys of the uploads that were begun and not ended.
    fn unfinished(&self) -> Vec<String> {
        let (status, body) = self.curl("GET", "/blobs?uploads=", b"");
        assert_eq!(status, 200);
        let text = String::from_utf8(body).unwrap();
        let uploads = text.split("<Upload>").skip(1);
        let mut keys: Vec<_> =
            uploads.map(|upload| upload.split("<Key>").nth(1).unwrap().split('<').next().unwrap().replace("%2F", "/")).collect();
        keys.sort();
        keys
    }
}

#[test]
fn only_old_uploads_of_blobs_are_aborted() {
    let _turn = turn();
    let Some(weed) = Weed::start() else { return };
    let digest = sha256(b"left behind");
    let ours = format!("cas/{}/{digest}", &digest[..2]);
    // Other programs': another folder, the right folder and no blob, another castier's prefix.
    let theirs = ["backup/huge.tar".to_owned(), format!("cas/00/{digest}"), format!("team/{ours}")];
    weed.begin(&ours);
    weed.begin(&ours);
    theirs.iter().for_each(|key| weed.begin(key));
    let all = weed.unfinished();
    assert_eq!(all.len(), 5, "{all:?}");
    // Too young, or switched off.
    for (after, asks) in [("1h", true), ("0s", false)] {
        weed.take();
        let castier = castier(&weed.config_after(after));
        let is_checked = || weed.proxy.count(|seen| seen.method == "DELETE" && seen.target.contains("castier-check")) > 0;
        eventually("the bucket is checked", || is_checked().then_some(()));
        if asks {
            eventually("the list is asked for", || (weed.proxy.count(is_list_of_uploads) > 0).then_some(()));
        }
        drop(castier);
        assert_eq!((weed.unfinished(), weed.proxy.count(is_list_of_uploads) > 0), (all.clone(), asks), "{after}");
    }
    // The first page has none of ours, and says that there is another one. SeaweedFS has pages of 10,000, and nothing behind a marker: so the second
    // page is its whole list.
    let (_, list) = weed.curl("GET", "/blobs?uploads=", b"");
    weed.proxy.intercept(move |request| {
        let is_list = request.method == "GET" && request.target.contains("uploads=");
        let page = if request.target.contains("key-marker=cas%2F") {
            list.clone()
        } else {
            b"<ListMultipartUploadsResult><IsTruncated>true</IsTruncated><NextKeyMarker>cas/</NextKeyMarker><NextUploadIdMarker></NextUploadIdMarker>\
              <Upload><Key>cas/x</Key><UploadId>1</UploadId><Initiated>2020-01-01T00:00:00Z</Initiated></Upload></ListMultipartUploadsResult>"
                .to_vec()
        };
        is_list.then(|| Response::ok("application/xml", page))
    });
    let config = weed.config_after("1ms");
    let castier = castier(&config);
    eventually("they are aborted", || (castier.metric("castier_bucket_uploads_aborted_total", &[]) >= 2.0).then_some(()));
    let mut left = theirs.to_vec();
    left.sort();
    assert_eq!(weed.unfinished(), left);
    weed.proxy.intercept(|_| None);

    // The same for castier-origin below a prefix. A list that fails keeps nothing from starting.
    let dir = TempDir::new().unwrap();
    let config = config.replace("origin.", "store.").replace("s3://blobs", "s3://blobs/team");
    let (origin, ..) = castier_origin(dir.path(), &config, |_| {});
    eventually("it is aborted", || (weed.unfinished() == left[..2]).then_some(()));
    drop(origin);
    weed.proxy.intercept(|request| {
        request.target.contains("uploads=").then(|| Response::new(403).body("<Error><Code>AccessDenied</Code></Error>"))
    });
    let (mut origin, ..) = castier_origin(dir.path(), &config, |_| {});
    origin.says("that it cannot list them", |log| log.contains("could not be listed").then_some(()));
}
