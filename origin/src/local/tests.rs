use super::*;
use crate::{Backend, Options, Origin};
use castier_blob::Verifier;
use castier_cache::contract;
use futures::StreamExt as _;
use std::{fs, path::PathBuf};
use tempfile::TempDir;

struct World {
    local: Local,
    origin: Origin,
    dir: TempDir,
}

fn local(origin: &Origin, config: &castier_config::Origin) -> Local {
    let Backend::Files(files) = &origin.0.backend else { panic!("an origin of files") };
    Local::new(origin.0.clone(), files.store.clone(), config)
}

impl World {
    fn new(allow_delete: bool) -> Self {
        let dir = TempDir::new().unwrap();
        let options = Options { allow_delete, ..Options::from(&castier_config::OriginServer::default()) };
        let origin = Origin::open(dir.path(), options).unwrap();
        let local = local(&origin, &castier_config::Origin::default());
        Self { local, origin, dir }
    }

    fn file(&self, digest: &Digest) -> PathBuf {
        let name = digest.to_string();
        self.dir.path().join(&name[..2]).join(&name[2..4]).join(name)
    }

    async fn put(&self, bytes: &Bytes) -> Result<Put, Fault> {
        let body = stream::iter([Ok(bytes.clone())]).boxed();
        let mut upload = Upload::new(Some(Digest::of(bytes)), None, body).await?;
        self.local.put(&mut upload).await
    }

    async fn open(&self, digest: Digest, from: u64) -> Result<Answer, Fault> {
        self.local.open(Ask { key: castier_cache::Key::Blob(digest), from }).await
    }
}

#[tokio::test]
async fn the_disk_is_a_store() {
    assert_eq!(contract::store(&World::new(true).local).await, contract::Lacks::default());
}

#[tokio::test]
async fn the_empty_blob_is_always_there_and_held_when_stored() {
    let world = World::new(true);
    let stat = world.local.stat(&[Digest::EMPTY]).await.unwrap();
    assert_eq!(stat, [Stat::Present(Some(0))]);
    let Ok(Answer::Bytes(mut incoming)) = world.open(Digest::EMPTY, 0).await else { panic!("no empty blob") };
    assert!(incoming.size == Some(0) && incoming.next().await.unwrap().is_none());
    assert_eq!(world.local.holds(&Digest::EMPTY, Some(0)).await.unwrap(), None, "it is not stored");
    assert_eq!(world.put(&Bytes::new()).await.unwrap(), Put::Created);
    assert_eq!(world.local.holds(&Digest::EMPTY, Some(0)).await.unwrap(), Some(0));
}

#[tokio::test]
async fn limits_hold_at_once() {
    let world = World::new(false);
    let blob = Bytes::from(vec![7; 100_000]);
    let digest = Digest::of(&blob);
    assert_eq!(world.put(&blob).await.unwrap(), Put::Created);
    assert!(matches!(world.local.delete(&digest).await, Err(Fault::NotAllowed)));
    let mut limits = castier_config::OriginServer::default().limits;
    limits.max_blob = "99999B".parse().unwrap();
    world.origin.set_limits(limits);
    assert!(matches!(world.put(&blob).await, Err(Fault::OriginRefusesSize)));
    assert_eq!(world.local.holds(&digest, Some(100_000)).await.unwrap(), None, "an upload that would be refused is not acknowledged");
    assert!(matches!(world.open(digest, 100_000).await, Err(Fault::Unusable { .. })), "nothing is behind the end");
    assert!(matches!(world.open(digest, 99_999).await, Ok(Answer::Bytes(_))), "it is there all the same");
}

/// A small one is an error at once, a large one breaks before its end. Then both are absent, and can be stored again.
#[tokio::test]
async fn a_rotten_blob_never_ends_well() {
    let world = World::new(false);
    for size in [1000, 1_000_000] {
        let blob = Bytes::from(vec![7; size]);
        let digest = Digest::of(&blob);
        world.put(&blob).await.unwrap();
        let mut rotten = blob.to_vec();
        rotten[size - 1] = 8;
        fs::write(world.file(&digest), rotten).unwrap();
        match world.open(digest, 0).await {
            Err(fault) => assert!(size == 1000 && matches!(fault, Fault::Unusable { source_name: "origin", .. }), "{fault}"),
            Ok(Answer::Bytes(mut incoming)) => {
                let mut read = Verifier::of(digest, ());
                let fault = loop {
                    match incoming.next().await {
                        Ok(Some(bytes)) => read.update(&bytes),
                        Ok(None) => panic!("a clean end"),
                        Err(fault) => break fault,
                    }
                };
                assert!(matches!(fault, Fault::Unreachable { source_name: "origin", .. }) && read.seen() < blob.len() as u64, "{fault}");
            }
            Ok(_) => panic!("it was stored"),
        }
        assert!(matches!(world.open(digest, 0).await, Ok(Answer::Absent)));
        assert_eq!(world.put(&blob).await.unwrap(), Put::Created);
    }
    let metrics = world.origin.0.metrics.text(world.origin.0.totals()).unwrap();
    assert!(metrics.contains("castier_origin_corrupt_blobs_total 2"), "{metrics}");
}

/// A disk that hangs costs `origin.read_timeout`. So do the requests that wait for it to give back their permits.
#[tokio::test]
async fn every_wait_ends() {
    let world = World::new(false);
    let config = castier_config::Origin { read_timeout: "50ms".parse().unwrap(), max_requests: 1, ..castier_config::Origin::default() };
    let local = local(&world.origin, &config);
    let hang = local.blocking(|| {
        std::thread::sleep(Duration::from_millis(300));
        Ok(())
    });
    assert!(matches!(hang.await, Err(Fault::Silent { source_name: "origin", .. })));
    let held = local.permit().await.unwrap();
    assert!(matches!(local.stat(&[Digest::EMPTY]).await, Err(Fault::Busy(Limit::Requests))));
    drop(held);
    assert!(local.stat(&[Digest::EMPTY]).await.is_ok());
}
