//! Where a chunked body ends (RFC 9112, section 7.1), and that each chunk says how long it is.
//!
//! pingora's body reader leaves the size line to `parse_chunk_size` of the crate httparse (src/lib.rs, 1.10.1), which takes two lines that
//! are none:
//!
//! - One without digits counts as the size 0, so a malformed body passes for one that is whole. The fix there: in the arm for `b'\r'`, and
//!   in those for `b';'`, a tab and a space, return `InvalidChunkSize` while `count` is 0. hyper has its own parser and refuses such lines.
//! - A line feed alone counts as a byte of an extension, so that two readers disagree about where the line ends. The fix there: an arm
//!   `b'\n' => return Err(InvalidChunkSize)` before the one for `in_ext`.
//!
//! Until both are in a release, such a line is spoilt here on its way to pingora, which then refuses it. Everything else that is wrong
//! with chunks it refuses by itself. Where the body ends is found out on the way, too. This holds for the bodies of requests and for those
//! of relayed answers; blobs are hashed.

/// What pingora refuses where digits should stand, or behind a carriage return.
const SPOILT: u8 = b'!';

/// How far into a chunked body its reader has come.
#[derive(Debug, Default)]
pub(crate) struct Chunks {
    at: At,
}

/// Where in a body.
#[derive(Debug, Default)]
enum At {
    /// Before a size line.
    #[default]
    Size,
    /// Within one, behind some of its digits.
    Digits(u64),
    /// Behind its digits: an extension, or the line's end. `cr`: the last byte was a carriage return.
    Extension { size: u64, cr: bool },
    /// Behind a line that ended without a carriage return: nothing is shown as it is any more.
    Spoilt,
    /// Within a chunk, with so many bytes and its line end to come.
    Data(u64),
    /// Within a trailer line, or before one. `empty`: nothing of it has come.
    Trailer { empty: bool },
    /// Behind it all.
    End,
}

impl Chunks {
    /// How many of the bytes belong to the body. Spoils what pingora must not read as a size.
    pub(crate) fn pass(&mut self, bytes: &mut [u8]) -> usize {
        let mut passed = 0;
        while passed < bytes.len() {
            let byte = bytes[passed];
            let digit = char::from(byte).to_digit(16).map(u64::from);
            self.at = match self.at {
                At::End => break,
                At::Size => match digit {
                    Some(digit) => At::Digits(digit),
                    None => {
                        bytes[passed] = SPOILT;
                        At::Size
                    }
                },
                At::Digits(size) => match digit {
                    Some(digit) => At::Digits(size.saturating_mul(16).saturating_add(digit)),
                    None => Self::after_size(size, &mut bytes[passed], false),
                },
                At::Extension { size, cr } => Self::after_size(size, &mut bytes[passed], cr),
                At::Spoilt => {
                    bytes[passed] = SPOILT;
                    At::Spoilt
                }
                At::Data(left) => {
                    let here = (bytes.len() - passed).min(usize::try_from(left).unwrap_or(usize::MAX));
                    passed += here;
                    self.at = if here as u64 == left { At::Size } else { At::Data(left - here as u64) };
                    continue;
                }
                At::Trailer { empty: true } if byte == b'\n' => At::End,
                At::Trailer { empty } => At::Trailer { empty: byte == b'\n' || (empty && byte == b'\r') },
            };
            passed += 1;
        }
        passed
    }

    /// Whether the last byte of the body has passed.
    pub(crate) const fn is_over(&self) -> bool {
        matches!(self.at, At::End)
    }

    const fn after_size(size: u64, byte: &mut u8, cr: bool) -> At {
        match (*byte, size) {
            (b'\n', _) if !cr => {
                // A carriage return and then anything but a line feed: that is refused.
                *byte = b'\r';
                At::Spoilt
            }
            (b'\n', 0) => At::Trailer { empty: true },
            // The chunk's own line end comes along.
            (b'\n', size) => At::Data(size.saturating_add(2)),
            (byte, size) => At::Extension { size, cr: byte == b'\r' },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is shown of a body that comes in parts of this length, and what is left of it.
    fn shown(text: &str, part: usize) -> (String, String) {
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
    fn a_body_ends_behind_its_trailers() {
        for body in
            ["0\r\n\r\n", "5\r\nhello\r\n0\r\n\r\n", "A;of=blob\r\n0123456789\r\n00b\r\n0123\r\n\r\n0\r\n\r\n0\r\nX: y\r\nZ:\r\n\r\n"]
        {
            for part in [1, 2, 3, 7, 1000] {
                let text = format!("{body}GET / HTTP/1.1\r\n");
                assert_eq!(shown(&text, part), (body.to_owned(), "GET / HTTP/1.1\r\n".to_owned()), "in parts of {part}");
            }
        }
    }

    #[test]
    fn a_line_feed_alone_ends_no_size_line() {
        for (body, seen) in
            [("5;x\nhello\r\n0\r\n\r\n", "5;x\r!"), ("5\nhello\r\n", "5\r!"), ("0;x\n\r\n", "0;x\r!"), ("5;a\n\nhello", "5;a\r!")]
        {
            for part in [1, 2, 1000] {
                assert!(shown(body, part).0.starts_with(seen), "{body:?}: {:?}", shown(body, part));
            }
        }
    }

    #[test]
    fn a_size_without_digits_is_spoilt() {
        for (body, seen) in [
            ("5\r\nhello\r\n\r\n6\r\n world\r\n0\r\n\r\n", "5\r\nhello\r\n!!6\r\n"),
            (";x\r\n\r\n", "!"),
            (" \r\n\r\n", "!"),
            ("\r\n", "!"),
        ] {
            for part in [1, 2, 1000] {
                assert!(shown(body, part).0.starts_with(seen), "{body:?}: {:?}", shown(body, part));
            }
        }
    }
}
