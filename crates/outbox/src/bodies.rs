//! The bodies that are too large for the journal: a file each, in `bodies/`. A file's name is used once, so two uploads of one blob have two files.

use castier_cache::{Pool, PoolError};
use rand::RngExt as _;
use std::{
    collections::HashSet,
    fs::{self, File},
    io::{self, Read as _, Seek as _, SeekFrom, Write as _},
    path::{Path, PathBuf},
};

/// After so many bytes a file is synced while the rest comes, so that the last sync does not take long.
const SYNC_EVERY: u64 = 32 << 20;

/// The directory of the bodies.
#[derive(Clone)]
pub(crate) struct Bodies {
    directory: PathBuf,
    pub pool: Pool,
}

/// Why a body cannot be written or read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failed {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error(transparent)]
    Pool(#[from] PoolError),
}

impl Bodies {
    /// Makes the directory if it is missing, and deletes every file in it that is not `known`. Blocks.
    pub(crate) fn open(directory: &Path, pool: Pool, known: &HashSet<&str>) -> io::Result<Self> {
        fs::create_dir_all(directory)?;
        for entry in fs::read_dir(directory)? {
            let entry = entry?;
            if entry.file_name().to_str().is_none_or(|name| !known.contains(name)) {
                fs::remove_file(entry.path())?;
            }
        }
        File::open(directory)?.sync_all()?;
        Ok(Self { directory: directory.to_owned(), pool })
    }

    /// A new file. It is deleted again unless [`NewBody::keep`] is called.
    pub(crate) async fn create(&self) -> Result<NewBody, Failed> {
        let name = format!("{:032x}", rand::rng().random::<u128>());
        let path = self.directory.join(&name);
        // Made there too: if the client leaves meanwhile, nobody else deletes the file.
        let body = OwnedBody { bodies: self.clone(), name: Some(name) };
        let create = move || File::options().write(true).create_new(true).open(path).map(|file| (file, body));
        let (file, body) = self.pool.run(create).await??;
        Ok(NewBody { file: Some(file), unsynced: 0, body })
    }

    /// Up to `most` bytes of a body from an offset on.
    pub(crate) async fn read(&self, file: File, from: u64, most: usize) -> Result<(File, Vec<u8>), Failed> {
        let read = move || {
            let (mut file, mut bytes) = (file, Vec::with_capacity(most));
            file.seek(SeekFrom::Start(from))?;
            (&file).take(most as u64).read_to_end(&mut bytes)?;
            Ok::<_, io::Error>((file, bytes))
        };
        Ok(self.pool.run(read).await??)
    }

    pub(crate) async fn open_body(&self, name: &str) -> Result<File, Failed> {
        let path = self.directory.join(name);
        Ok(self.pool.run(move || File::open(path)).await??)
    }

    /// Deletes a body, some time.
    pub(crate) fn delete(&self, name: &str) {
        let path = self.directory.join(name);
        self.pool.run_detached(move || {
            if let Err(error) = fs::remove_file(&path)
                && error.kind() != io::ErrorKind::NotFound
            {
                tracing::warn!(%error, path = %path.display(), "a file of the outbox could not be deleted; the next start does it");
            }
        });
    }

    /// Sets a damaged body aside, for inspection. Returns where it is.
    pub(crate) async fn set_aside(&self, name: &str) -> Result<PathBuf, Failed> {
        let from = self.directory.join(name);
        let directory = self.directory.with_file_name("damaged");
        let to = directory.join(name);
        let moved = to.clone();
        self.pool.run(move || fs::create_dir_all(&directory).and_then(|()| fs::rename(from, to))).await??;
        Ok(moved)
    }
}

/// A body on its way.
pub(crate) struct NewBody {
    file: Option<File>,
    unsynced: u64,
    body: OwnedBody,
}

/// A file that is deleted when this is dropped.
pub(crate) struct OwnedBody {
    bodies: Bodies,
    name: Option<String>,
}

impl OwnedBody {
    /// From now on a record refers to the file.
    pub(crate) fn keep(mut self) {
        self.name = None;
    }
}

impl Drop for OwnedBody {
    fn drop(&mut self) {
        if let Some(name) = self.name.take() {
            self.bodies.delete(&name);
        }
    }
}

impl NewBody {
    /// Appends bytes.
    pub(crate) async fn write(&mut self, bytes: Vec<u8>) -> Result<(), Failed> {
        self.unsynced += bytes.len() as u64;
        let sync = self.unsynced >= SYNC_EVERY;
        if sync {
            self.unsynced = 0;
        }
        let Some(mut file) = self.file.take() else { return Err(io::Error::other("a write before it has failed").into()) };
        let write = move || {
            file.write_all(&bytes)?;
            if sync {
                file.sync_data()?;
            }
            Ok::<_, io::Error>(file)
        };
        self.file = Some(self.body.bodies.pool.run(write).await??);
        Ok(())
    }

    /// Makes the file and its name durable. Returns its name.
    pub(crate) async fn finish(mut self) -> Result<(OwnedBody, String), Failed> {
        let (file, directory) = (self.file.take(), self.body.bodies.directory.clone());
        let sync = move || {
            file.ok_or_else(|| io::Error::other("a write before it has failed"))?.sync_all()?;
            File::open(directory)?.sync_all()
        };
        self.body.bodies.pool.run(sync).await??;
        let name = self.body.name.clone().unwrap_or_default();
        Ok((self.body, name))
    }
}
