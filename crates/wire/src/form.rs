//! Recognises the file in a multipart form.

use http::HeaderValue;

/// Whether a part with this `Content-Disposition` is a file: it has a parameter `filename` or `filename*`, in upper or lower case, with any
/// bytes as value (RFC 7578, section 4.2).
pub fn is_file(disposition: &HeaderValue) -> bool {
    let mut rest = disposition.as_bytes();
    // The first word is the disposition's type.
    while let Some(at) = rest.iter().position(|byte| *byte == b';') {
        rest = rest[at + 1..].trim_ascii_start();
        let end = rest.iter().position(|byte| matches!(byte, b'=' | b';')).unwrap_or(rest.len());
        let (name, value) = rest.split_at(end);
        let name = name.trim_ascii();
        if value.starts_with(b"=") && (name.eq_ignore_ascii_case(b"filename") || name.eq_ignore_ascii_case(b"filename*")) {
            return true;
        }
        rest = value;
        // A semicolon within quotes does not end the parameter.
        if let Some(quoted) = value.strip_prefix(b"=").map(<[u8]>::trim_ascii_start).and_then(|value| value.strip_prefix(b"\"")) {
            let mut escaped = false;
            let close = quoted.iter().position(|byte| {
                let closes = *byte == b'"' && !escaped;
                escaped = *byte == b'\\' && !escaped;
                closes
            });
            rest = &quoted[close.map_or(quoted.len(), |at| at + 1)..];
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_with_a_file_name_is_a_file() {
        for (disposition, file) in [
            (&b"form-data; name=\"file\"; filename=\"x.bin\""[..], true),
            (b"form-data; filename*=UTF-8''na%C3%AFve.bin; name=file", true),
            (b"form-data; name=file; FileName = x", true),
            (b"Form-Data;NAME=file;FILENAME*=x", true),
            (b"form-data; name=\"file\"; filename=\"na\xefve.bin\"", true),
            (b"form-data; name=\"a;b\\\"; c\"; filename=\"\"", true),
            (b"form-data; name=\"a; filename=x\"", false),
            (b"form-data; name=filename", false),
            (b"form-data; name=x; filename", false),
            (b"form-data; name=x; nofilename=y; filenames=z", false),
            (b"form-data; name=\"open; filename=x", false),
            (b"filename=x", false),
            (b"", false),
        ] {
            let value = HeaderValue::from_bytes(disposition).unwrap();
            assert_eq!(is_file(&value), file, "{value:?}");
        }
    }
}
