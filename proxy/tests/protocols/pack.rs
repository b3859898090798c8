//! Archives without compression, for the packages of the tests: the same files always give the same bytes.

/// A file of an archive: its path and its content.
pub(crate) type File<'a> = (&'a str, &'a [u8]);

/// The CRC-32 of zip and gzip.
fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc: u32, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| if crc & 1 == 1 { crc >> 1 ^ 0xedb8_8320 } else { crc >> 1 })
    })
}

fn size(bytes: &[u8]) -> [u8; 4] {
    u32::try_from(bytes.len()).unwrap().to_le_bytes()
}

/// A zip archive.
pub(crate) fn zip(files: &[File<'_>]) -> Vec<u8> {
    let (mut zip, mut directory) = (Vec::new(), Vec::new());
    for (path, content) in files {
        let at = size(&zip);
        // Version 2.0, no flags, stored, at midnight on 1 January 1980.
        let mut common = vec![20, 0, 0, 0, 0, 0, 0, 0, 0x21, 0];
        for field in [crc32(content).to_le_bytes(), size(content), size(content)] {
            common.extend_from_slice(&field);
        }
        common.extend_from_slice(&u16::try_from(path.len()).unwrap().to_le_bytes());
        zip.extend_from_slice(&[b"PK\x03\x04", &common[..], &[0, 0], path.as_bytes(), content].concat());
        // Made on Unix; no extra field and no comment; a regular file that all may read.
        directory.extend_from_slice(
            &[b"PK\x01\x02", &[20, 3][..], &common, &[0; 8], &(0o100_644_u32 << 16).to_le_bytes(), &at, path.as_bytes()].concat(),
        );
    }
    let (start, count) = (size(&zip), u16::try_from(files.len()).unwrap().to_le_bytes());
    let end = [b"PK\x05\x06", &[0; 4][..], &count, &count, &size(&directory), &start, &[0, 0]].concat();
    [zip, directory, end].concat()
}

/// A gzipped tar archive.
pub(crate) fn tgz(files: &[File<'_>]) -> Vec<u8> {
    let mut tar = Vec::new();
    for (path, content) in files {
        let mut head = vec![0; 512];
        // The checksum counts as spaces.
        let fields = [
            (0, (*path).to_owned()),
            (100, "0000644\0".to_owned()),
            (108, "0000000\0".to_owned()),
            (116, "0000000\0".to_owned()),
            (124, format!("{:011o}\0", content.len())),
            (136, format!("{:011o}\0", 499_162_500)),
            (148, " ".repeat(8)),
            (156, "0".to_owned()),
            (257, "ustar\x0000".to_owned()),
        ];
        for (at, field) in fields {
            head[at..at + field.len()].copy_from_slice(field.as_bytes());
        }
        let sum: u32 = head.iter().map(|byte| u32::from(*byte)).sum();
        head[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        tar.extend_from_slice(&head);
        tar.extend_from_slice(content);
        tar.resize(tar.len().next_multiple_of(512), 0);
    }
    tar.resize(tar.len() + 1024, 0);
    gzip(&tar)
}

/// A gzip file with stored blocks.
pub(crate) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut gz = vec![0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 3];
    for block in bytes.chunks(65_535) {
        let length = u16::try_from(block.len()).unwrap();
        gz.extend_from_slice(&[&[0][..], &length.to_le_bytes(), &(!length).to_le_bytes(), block].concat());
    }
    // An empty last block.
    gz.extend_from_slice(&[1, 0, 0, 0xff, 0xff]);
    gz.extend_from_slice(&crc32(bytes).to_le_bytes());
    gz.extend_from_slice(&size(bytes));
    gz
}
