//! Reads the files that a configuration names. A program reads them again while it serves. So nothing here waits for a writer that may never
//! come, and nothing takes more memory than a configuration needs.

use rustix::fs::OFlags;
use std::{
    fs::{File, OpenOptions},
    io::{self, Read as _},
    os::unix::fs::OpenOptionsExt as _,
    path::Path,
};
use zeroize::Zeroizing;

/// The largest file that is read: far above any configuration or list of certificates.
const MOST: u64 = 1 << 20;

/// Opens a regular file. It follows a symbolic link to one, since Kubernetes mounts files as such links.
pub(crate) fn open(path: &Path) -> io::Result<File> {
    // Without O_NONBLOCK opening a FIFO waits for a writer.
    let flags = i32::try_from((OFlags::NONBLOCK | OFlags::NOCTTY).bits()).unwrap_or(0);
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
    let kind = file.metadata()?.file_type();
    if kind.is_dir() {
        return Err(io::Error::other("it is a directory"));
    }
    if !kind.is_file() {
        return Err(io::Error::other("it is not a regular file, but a pipe, a socket or a device"));
    }
    Ok(file)
}

/// The whole text of a file.
pub(crate) fn read_text(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    let read = open(path)?.take(MOST + 1).read_to_string(&mut text)?;
    if read as u64 > MOST {
        return Err(io::Error::other(format!("it is larger than {} MiB", MOST >> 20)));
    }
    Ok(text)
}

/// As [`read_text`], for a secret: the memory is overwritten when it is not needed any more.
pub(crate) fn read_secret(path: &Path) -> io::Result<Zeroizing<String>> {
    // A text that grew would leave copies behind.
    let mut text = Zeroizing::new(String::with_capacity(64 << 10));
    open(path)?.take(64 << 10).read_to_string(&mut text)?;
    if text.len() == 64 << 10 {
        return Err(io::Error::other("it is larger than 64 KiB"));
    }
    Ok(text)
}

/// Checks that the file can be read, and is not empty.
pub(crate) fn first_byte(path: &Path) -> io::Result<()> {
    let read = open(path)?.read(&mut [0])?;
    if read == 0 { Err(io::Error::other("it is empty")) } else { Ok(()) }
}
