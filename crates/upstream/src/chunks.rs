//! Finds the end of a chunked body (RFC 9112, section 7.1), and works around two faults of the crate httparse.
//!
//! pingora's body reader parses the size line of a chunk with `parse_chunk_size` of httparse 1.10.1 (src/lib.rs). That accepts two
//! malformed lines:
//!
//! - A line without digits counts as size 0, so that a malformed body looks complete. Fix in httparse: in the arms for `b'\r'`, `b';'`, tab
//!   and space, return `InvalidChunkSize` while `count` is 0. hyper has its own parser, and rejects such lines.
//! - A line feed without a carriage return counts as part of an extension, so that two readers disagree about the end of the line. Fix in
//!   httparse: an arm `b'\n' => return Err(InvalidChunkSize)` before the one for `in_ext`.
//!
//! Until a release has both fixes, this module overwrites a byte of such a line before pingora sees it, so that pingora rejects the body.
//! pingora rejects all other malformed chunks itself. The module is used for bodies of requests and of relayed answers. Blobs do not need
//! it, since their bytes are hashed.

/// pingora rejects this byte in place of a digit, and after a carriage return.
const INVALID: u8 = b'!';

/// The position of a reader in a chunked body.
#[derive(Debug, Default)]
pub struct Chunks {
    at: ChunkState,
}

#[derive(Debug, Default)]
enum ChunkState {
    /// Before a size line.
    #[default]
    Size,
    /// In a size line, after some digits.
    Digits(u64),
    /// In a size line, after the digits. `cr`: the last byte was a carriage return.
    Extension { size: u64, cr: bool },
    /// After a line that ended without a carriage return. Everything that follows is invalid.
    Invalid,
    /// In a chunk. The value is the number of bytes to come, including the chunk's line end.
    Data(u64),
    /// In the trailers. `empty`: the current line has no byte yet.
    Trailer { empty: bool },
    /// After the body.
    End,
}

impl Chunks {
    /// Advances over `bytes`. Returns how many of them belong to the body. Overwrites a byte that pingora must not accept as part of a
    /// size line.
    pub fn pass(&mut self, bytes: &mut [u8]) -> usize {
        let mut passed = 0;
        while passed < bytes.len() {
            let byte = bytes[passed];
            let digit = char::from(byte).to_digit(16).map(u64::from);
            self.at = match self.at {
                ChunkState::End => break,
                ChunkState::Size => match digit {
                    Some(digit) => ChunkState::Digits(digit),
                    None => {
                        bytes[passed] = INVALID;
                        ChunkState::Size
                    }
                },
                ChunkState::Digits(size) => match digit {
                    Some(digit) => ChunkState::Digits(size.saturating_mul(16).saturating_add(digit)),
                    None => Self::after_size(size, &mut bytes[passed], false),
                },
                ChunkState::Extension { size, cr } => Self::after_size(size, &mut bytes[passed], cr),
                ChunkState::Invalid => {
                    bytes[passed] = INVALID;
                    ChunkState::Invalid
                }
                ChunkState::Data(left) => {
                    let here = (bytes.len() - passed).min(usize::try_from(left).unwrap_or(usize::MAX));
                    passed += here;
                    self.at = if here as u64 == left { ChunkState::Size } else { ChunkState::Data(left - here as u64) };
                    continue;
                }
                ChunkState::Trailer { empty: true } if byte == b'\n' => ChunkState::End,
                ChunkState::Trailer { empty } => ChunkState::Trailer { empty: byte == b'\n' || (empty && byte == b'\r') },
            };
            passed += 1;
        }
        passed
    }

    /// Whether the body has ended.
    pub const fn is_over(&self) -> bool {
        matches!(self.at, ChunkState::End)
    }

    const fn after_size(size: u64, byte: &mut u8, cr: bool) -> ChunkState {
        match (*byte, size) {
            (b'\n', _) if !cr => {
                // pingora rejects a carriage return that no line feed follows. The next byte becomes `INVALID`.
                *byte = b'\r';
                ChunkState::Invalid
            }
            (b'\n', 0) => ChunkState::Trailer { empty: true },
            // Plus the chunk's line end.
            (b'\n', size) => ChunkState::Data(size.saturating_add(2)),
            (byte, size) => ChunkState::Extension { size, cr: byte == b'\r' },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Passes `text` in parts of `part` bytes. Returns the body as pingora sees it, and the bytes after the body.
    fn pass(text: &str, part: usize) -> (String, String) {
        let (mut chunks, mut bytes, mut at) = (Chunks::default(), text.as_bytes().to_vec(), 0);
        while at < bytes.len() {
            let end = bytes.len().min(at + part);
            match chunks.pass(&mut bytes[at..end]) {
                0 => break,
                passed => at += passed,
            }
        }
        let rest = bytes.split_off(at);
        (String::from_utf8(bytes).unwrap(), String::from_utf8(rest).unwrap())
    }

    #[test]
    fn a_body_ends_after_its_trailers() {
        for body in
            ["0\r\n\r\n", "5\r\nhello\r\n0\r\n\r\n", "A;of=blob\r\n0123456789\r\n00b\r\n0123\r\n\r\n0\r\n\r\n0\r\nX: y\r\nZ:\r\n\r\n"]
        {
            for part in [1, 2, 3, 7, 1000] {
                let text = format!("{body}GET / HTTP/1.1\r\n");
                assert_eq!(pass(&text, part), (body.to_owned(), "GET / HTTP/1.1\r\n".to_owned()), "in parts of {part}");
            }
        }
    }

    #[test]
    fn a_line_feed_alone_ends_no_size_line() {
        for (body, seen) in
            [("5;x\nhello\r\n0\r\n\r\n", "5;x\r!"), ("5\nhello\r\n", "5\r!"), ("0;x\n\r\n", "0;x\r!"), ("5;a\n\nhello", "5;a\r!")]
        {
            for part in [1, 2, 1000] {
                assert!(pass(body, part).0.starts_with(seen), "{body:?}: {:?}", pass(body, part));
            }
        }
    }

    #[test]
    fn a_size_without_digits_is_made_invalid() {
        for (body, seen) in [
            ("5\r\nhello\r\n\r\n6\r\n world\r\n0\r\n\r\n", "5\r\nhello\r\n!!6\r\n"),
            (";x\r\n\r\n", "!"),
            (" \r\n\r\n", "!"),
            ("\r\n", "!"),
        ] {
            for part in [1, 2, 1000] {
                assert!(pass(body, part).0.starts_with(seen), "{body:?}: {:?}", pass(body, part));
            }
        }
    }
}
