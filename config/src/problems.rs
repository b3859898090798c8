//! What is wrong with a configuration: all of it, one a line. Also what is right, and worth a note.

use crate::LogFormat;
use std::{collections::BTreeSet, fmt};

/// Everything that is wrong with a configuration. Its text has one line for each problem: `key: what is wrong; what would be right`, with the
/// file and the line in front if the key is in a file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Problems {
    list: Vec<Problem>,
    /// What is not wrong. An operator should know it all the same.
    notes: Vec<Problem>,
    /// The configuration is for another machine: the checks do not look at directories, files and secrets.
    offline: bool,
    /// The keys that the file or the environment set.
    explicit: BTreeSet<String>,
    /// `log.format`, if that could be read.
    format: Option<LogFormat>,
}

/// One thing that is wrong, or one note.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Problem {
    /// The dotted key. Or the file or the variable, if the problem is not that of a key.
    subject: String,
    set_by: SetBy,
    text: String,
}

/// What set a value.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) enum SetBy {
    /// Neither of these, as for a missing key.
    #[default]
    Unknown,
    /// An environment variable.
    Variable(String),
    /// A file: `NAME:LINE`.
    File(String),
}

impl Problems {
    /// No problems yet, of a configuration for another machine.
    pub(crate) fn offline() -> Self {
        Self { offline: true, ..Self::default() }
    }

    /// Whether the checks may look at directories, files and secrets.
    pub const fn ask_machine(&self) -> bool {
        !self.offline
    }

    pub(crate) fn set_explicit(&mut self, keys: BTreeSet<String>) {
        self.explicit = keys;
    }

    /// Whether the operator set this key, even to its default.
    pub(crate) fn is_set(&self, key: &str) -> bool {
        self.explicit.contains(key)
    }

    pub(crate) const fn set_format(&mut self, format: LogFormat) {
        self.format = Some(format);
    }

    /// The `log.format` of the configuration, if that could be read: in which format to log these problems.
    pub fn format(&self) -> LogFormat {
        self.format.unwrap_or(LogFormat::Text)
    }

    /// Adds one. `subject` is the dotted key (`route[1].path`, for a section that can be there several times), or the file or the variable.
    pub fn add(&mut self, subject: impl Into<String>, text: impl fmt::Display) {
        self.list.push(Problem::new(subject.into(), &text));
    }

    /// Adds a note: the configuration is sound, and `--check-config` says this about it.
    pub fn note(&mut self, subject: impl Into<String>, text: impl fmt::Display) {
        self.notes.push(Problem::new(subject.into(), &text));
    }

    /// Adds those of `more` whose keys have no problem yet: the second problem of a value mostly comes from the first one.
    pub(crate) fn add_new(&mut self, more: Self) {
        let new: Vec<_> = more.list.into_iter().filter(|problem| self.are_sound(&[&problem.subject])).collect();
        self.list.extend(new);
        self.notes.extend(more.notes);
    }

    /// The notes, one line each.
    pub(crate) fn notes(&self) -> Vec<String> {
        self.notes.iter().map(ToString::to_string).collect()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// The dotted key (or file, or variable) of each problem, in the order of the text.
    pub fn subjects(&self) -> impl Iterator<Item = &str> {
        self.list.iter().map(|problem| problem.subject.as_str())
    }

    /// Whether none of these keys has a problem, so that a check may compare them. A value that could not be read has its default by then,
    /// and a comparison with the default would report a false problem.
    pub fn are_sound(&self, keys: &[&str]) -> bool {
        !self.subjects().any(|subject| keys.contains(&subject))
    }

    /// Calls the only section of a list by the name of the list: `events.url` for `events[0].url`.
    pub(crate) fn name_as_single(&mut self, list: &str) {
        let first = format!("{list}[0]");
        for problem in self.list.iter_mut().chain(&mut self.notes) {
            if let Some(rest) = problem.subject.strip_prefix(&first) {
                problem.subject = format!("{list}{rest}");
            }
        }
    }

    /// Says for each problem and note what set the value.
    pub(crate) fn say_who_set(&mut self, set_by: impl Fn(&str) -> SetBy) {
        for problem in self.list.iter_mut().chain(&mut self.notes) {
            problem.set_by = set_by(&problem.subject);
        }
    }
}

impl Problem {
    fn new(subject: String, text: &dyn fmt::Display) -> Self {
        // One problem is one line. Messages of libraries may have several.
        let text = text.to_string().split_whitespace().collect::<Vec<_>>().join(" ");
        Self { subject, set_by: SetBy::Unknown, text }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { subject, set_by, text } = self;
        match set_by {
            SetBy::Variable(variable) => write!(f, "{subject} (set by {variable}): {text}"),
            SetBy::File(line) => write!(f, "{line}: {subject}: {text}"),
            SetBy::Unknown => write!(f, "{subject}: {text}"),
        }
    }
}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, problem) in self.list.iter().enumerate() {
            let end = if i == 0 { "" } else { "\n" };
            write!(f, "{end}{problem}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Problems {}
