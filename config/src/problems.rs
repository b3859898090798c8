//! What is wrong with a configuration: all of it, one a line.

use std::fmt;

/// Everything that is wrong with a configuration. Its text has one line per problem: `key: what is wrong; what would be right`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Problems(Vec<Problem>);

/// One of them.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Problem {
    /// The dotted key; or the file or the variable, when no key is to blame.
    subject: String,
    /// The environment variable that the value came from, if it did.
    variable: Option<String>,
    /// What is wrong, and what would be right.
    text: String,
}

impl Problems {
    /// Notes one more. `subject` is the dotted key, or what else is to blame.
    pub fn add(&mut self, subject: impl Into<String>, text: impl fmt::Display) {
        // One problem is one line, whatever a library puts into its messages.
        let text = text.to_string().split_whitespace().collect::<Vec<_>>().join(" ");
        self.0.push(Problem { subject: subject.into(), variable: None, text });
    }

    /// Whether nothing is wrong.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The dotted key (or file, or variable) of each problem, in the order of the text.
    pub fn subjects(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(|problem| problem.subject.as_str())
    }

    /// Whether none of these keys has a problem, so that it makes sense to compare their values: a value that could not be
    /// read is at its default by then, and a comparison with it would accuse the innocent.
    pub(crate) fn are_sound(&self, keys: &[&str]) -> bool {
        !self.subjects().any(|subject| keys.contains(&subject))
    }

    /// Says of each problem which environment variable caused it, where one did.
    pub(crate) fn blame(&mut self, variable_of: impl Fn(&str) -> Option<String>) {
        for problem in &mut self.0 {
            problem.variable = variable_of(&problem.subject);
        }
    }
}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, Problem { subject, variable, text }) in self.0.iter().enumerate() {
            let end = if i == 0 { "" } else { "\n" };
            match variable {
                Some(variable) => write!(f, "{end}{subject} (set by {variable}): {text}")?,
                None => write!(f, "{end}{subject}: {text}")?,
            }
        }
        Ok(())
    }
}

impl std::error::Error for Problems {}
