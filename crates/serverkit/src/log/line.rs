//! One record as one line: logfmt, or JSON with the same names at the top level.
//!
//! A line stays one line, and cannot control a terminal, no matter what a client puts into a path or a header: control characters, and
//! characters that reorder or hide text, are written as escapes.

use castier_config::LogFormat;
use std::{
    error::Error,
    fmt::{self, Write as _},
    time::SystemTime,
};
use tracing::{
    Level,
    field::{Field, Visit},
};

/// The level as it stands in records, labels and the configuration.
pub(super) const fn level_name(level: Level) -> &'static str {
    match level {
        Level::ERROR => "error",
        Level::WARN => "warn",
        Level::INFO => "info",
        Level::DEBUG => "debug",
        Level::TRACE => "trace",
    }
}

/// A record being written.
pub(super) struct Line<'a> {
    out: &'a mut String,
    /// Room for a value before it is known whether it needs quotes.
    scratch: &'a mut String,
    format: LogFormat,
}

impl<'a> Line<'a> {
    /// Begins one: when, how bad, and which part of the program.
    pub(super) fn begin(
        out: &'a mut String,
        scratch: &'a mut String,
        format: LogFormat,
        at: SystemTime,
        level: Level,
        target: &str,
    ) -> Self {
        out.clear();
        let mut line = Self { out, scratch, format };
        if format == LogFormat::Json {
            line.out.push('{');
        }
        line.key("ts");
        line.quote_if_json();
        write!(line.out, "{}", humantime::format_rfc3339_micros(at)).ok();
        line.quote_if_json();
        line.text("level", level_name(level));
        line.text("target", target);
        line
    }

    /// Ends it.
    pub(super) fn end(self) {
        if self.format == LogFormat::Json {
            self.out.push('}');
        }
        self.out.push('\n');
    }

    fn key(&mut self, name: &str) {
        let json = self.format == LogFormat::Json;
        // Behind the opening brace, or at the start, nothing separates.
        if self.out.len() > usize::from(json) {
            self.out.push(if json { ',' } else { ' ' });
        }
        // Names stand in our own code, but for those of libraries.
        let name = if name == "message" { "msg" } else { name };
        self.quote_if_json();
        if name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte)) {
            self.out.push_str(name);
        } else {
            self.out.extend(name.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }));
        }
        self.quote_if_json();
        self.out.push(if json { ':' } else { '=' });
    }

    fn quote_if_json(&mut self) {
        if self.format == LogFormat::Json {
            self.out.push('"');
        }
    }

    /// Adds a text.
    pub(super) fn text(&mut self, name: &str, value: &str) {
        self.key(name);
        if self.format == LogFormat::Text && is_bare(value) {
            self.out.push_str(value);
        } else {
            quote(self.out, value);
        }
    }

    fn shown(&mut self, name: &str, value: fmt::Arguments<'_>) {
        let mut scratch = std::mem::take(self.scratch);
        scratch.clear();
        scratch.write_fmt(value).ok();
        self.text(name, &scratch);
        *self.scratch = scratch;
    }

    fn number(&mut self, name: &str, value: fmt::Arguments<'_>) {
        self.key(name);
        self.out.write_fmt(value).ok();
    }
}

impl Visit for Line<'_> {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.text(field.name(), value);
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        // What the `log` crate's records say of their origin is told as the target.
        if !field.name().starts_with("log.") {
            self.shown(field.name(), format_args!("{value:?}"));
        }
    }

    fn record_error(&mut self, field: &Field, value: &(dyn Error + 'static)) {
        self.shown(field.name(), format_args!("{value}"));
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        if !field.name().starts_with("log.") {
            self.number(field.name(), format_args!("{value}"));
        }
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.number(field.name(), format_args!("{value}"));
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.number(field.name(), format_args!("{value}"));
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        if value.is_finite() {
            self.number(field.name(), format_args!("{value:?}"));
        } else {
            self.shown(field.name(), format_args!("{value}"));
        }
    }
}

/// Whether a value of logfmt needs no quotes.
fn is_bare(value: &str) -> bool {
    !value.is_empty() && value.bytes().all(|byte| byte.is_ascii_graphic() && !matches!(byte, b'"' | b'=' | b'\\'))
}

/// A JSON string, which is also how logfmt quotes.
fn quote(out: &mut String, value: &str) {
    out.push('"');
    for c in value.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if misleads(c) => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    write!(out, "\\u{unit:04x}").ok();
                }
            }
            c => out.push(c),
        }
    }
    out.push('"');
}

/// Characters that a terminal or a viewer acts on instead of showing them: controls (C0, DEL, C1), line separators, those that change
/// the direction of text, and those that are not seen.
fn misleads(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}'
            | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(format: LogFormat, path: &str) -> String {
        let (mut out, mut scratch) = (String::new(), String::new());
        let mut line = Line::begin(&mut out, &mut scratch, format, SystemTime::UNIX_EPOCH, Level::WARN, "castier::access");
        line.text("message", "two words");
        line.text("path", path);
        line.number("status", format_args!("{}", 200));
        line.shown("cause", format_args!("{:?}", "x=y"));
        line.end();
        out
    }

    #[test]
    fn text_is_logfmt() {
        for (path, shown) in [
            ("/cas/ab", "/cas/ab"),
            ("", "\"\""),
            ("/a b", "\"/a b\""),
            ("/?x=1", "\"/?x=1\""),
            ("/\"", "\"/\\\"\""),
            ("/\\", "\"/\\\\\""),
            ("/\n\r\t\u{1b}[2J\u{7f}", "\"/\\n\\r\\t\\u001b[2J\\u007f\""),
            ("/\u{9b}2J", "\"/\\u009b2J\""),
            ("/\u{202e}fdp.exe\u{2066}", "\"/\\u202efdp.exe\\u2066\""),
            ("/\u{e0041}", "\"/\\udb40\\udc41\""),
            ("/é", "\"/é\""),
        ] {
            let line = line(LogFormat::Text, path);
            let expected = format!(
                "ts=1970-01-01T00:00:00.000000Z level=warn target=castier::access msg=\"two words\" path={shown} status=200 cause=\"\\\"x=y\\\"\"\n"
            );
            assert_eq!(line, expected);
        }
    }

    #[test]
    fn json_has_the_same_names_and_escapes_what_misleads() {
        let path = "/a \"b\" \\ \n\u{9b}\u{202e}\u{e0041}é";
        let line = line(LogFormat::Json, path);
        assert!(!line.trim_end().chars().any(misleads), "{line:?}");
        let record: serde_json::Value = serde_json::from_str(&line).unwrap();
        let names: Vec<_> = record.as_object().unwrap().keys().map(String::as_str).collect();
        let mut expected = ["ts", "level", "target", "msg", "path", "status", "cause"];
        expected.sort_unstable();
        assert_eq!(names, expected);
        assert_eq!((&record["path"], &record["status"], &record["level"]), (&path.into(), &200.into(), &"warn".into()));
    }
}
