//! What is wrong with a configuration: all of it, one a line.

use crate::LogFormat;
use std::fmt;

/// Everything that is wrong with a configuration. Its text has one line per problem: `key: what is wrong; what would be right`, with the
/// file and the line in front if the key stands in a file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Problems {
    list: Vec<Problem>,
    /// This machine's directories, files and secrets are not looked at.
    offline: bool,
    /// `log.format`, if that could be read.
    format: Option<LogFormat>,
}

/// One of them.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Problem {
    /// The dotted key; or the file or the variable, when no key is to blame.
    subject: String,
    /// Where the value came from, if that is known.
    source: Source,
    /// What is wrong, and what would be right.
    text: String,
}

/// Where a value came from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) enum Source {
    /// From neither of these.
    #[default]
    Unknown,
    /// From an environment variable.
    Variable(String),
    /// From a file: its name, and the line.
    File(String),
}

impl Problems {
    /// None yet, of a configuration that is checked without this machine.
    pub(crate) fn offline() -> Self {
        Self { offline: true, ..Self::default() }
    }

    /// Whether what is on this machine may be looked at.
    pub(crate) const fn ask_machine(&self) -> bool {
        !self.offline
    }

    pub(crate) const fn set_format(&mut self, format: LogFormat) {
        self.format = Some(format);
    }

    /// How the program was told to write its records, as far as that could be read: for telling these problems.
    pub fn format(&self) -> LogFormat {
        self.format.unwrap_or(LogFormat::Text)
    }

    /// Notes one more. `subject` is the dotted key, or what else is to blame.
    pub fn add(&mut self, subject: impl Into<String>, text: impl fmt::Display) {
        // One problem is one line, whatever a library puts into its messages.
        let text = text.to_string().split_whitespace().collect::<Vec<_>>().join(" ");
        self.list.push(Problem { subject: subject.into(), source: Source::Unknown, text });
    }

    /// Whether nothing is wrong.
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// The dotted key (or file, or variable) of each problem, in the order of the text.
    pub fn subjects(&self) -> impl Iterator<Item = &str> {
        self.list.iter().map(|problem| problem.subject.as_str())
    }

    /// Whether none of these keys has a problem, so that it makes sense to compare their values: a value that could not be
    /// read is at its default by then, and a comparison with it would accuse the innocent.
    pub(crate) fn are_sound(&self, keys: &[&str]) -> bool {
        !self.subjects().any(|subject| keys.contains(&subject))
    }

    /// Says of each problem where its value came from.
    pub(crate) fn blame(&mut self, source_of: impl Fn(&str) -> Source) {
        for problem in &mut self.list {
            problem.source = source_of(&problem.subject);
        }
    }
}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, Problem { subject, source, text }) in self.list.iter().enumerate() {
            let end = if i == 0 { "" } else { "\n" };
            match source {
                Source::Variable(variable) => write!(f, "{end}{subject} (set by {variable}): {text}")?,
                Source::File(place) => write!(f, "{end}{place}: {subject}: {text}")?,
                Source::Unknown => write!(f, "{end}{subject}: {text}")?,
            }
        }
        Ok(())
    }
}

impl std::error::Error for Problems {}
