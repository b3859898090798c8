//! JSON documents in one pass: the values at a path, where they stand. Nothing but one of them is in memory, however many there are.

use crate::edit::{Edit, range_in};
use serde::{
    Deserialize as _, Deserializer,
    de::{DeserializeSeed, IgnoredAny, MapAccess, SeqAccess, Visitor},
};
use serde_json::value::RawValue;
use std::fmt;

/// A step into a JSON document.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// To the member of this name.
    Member(&'static str),
    /// To each member of an object, or each element of an array.
    Each,
}

/// Calls `found` with each value at the path, in their order. What is not there is passed over. Of members with one name all count.
pub(crate) fn each<'d>(document: &'d str, steps: &[Step], found: &mut dyn FnMut(&'d RawValue)) -> serde_json::Result<()> {
    let mut parser = serde_json::Deserializer::from_str(document);
    Each { steps, found }.deserialize(&mut parser)?;
    parser.end()
}

/// The members of an object in their order: the name, and where name and value stand. None of another value.
pub(crate) fn members(document: &str) -> serde_json::Result<Vec<(String, &RawValue)>> {
    let mut parser = serde_json::Deserializer::from_str(document);
    let mut all = Vec::new();
    parser.deserialize_any(Members(&mut all))?;
    parser.end()?;
    Ok(all)
}

/// The document without the members of these names, at any depth. `None`: it has none of them.
pub(crate) fn without(document: &str, names: &[&str]) -> serde_json::Result<Option<String>> {
    let mut edit = Edit::of(document);
    let mut parser = serde_json::Deserializer::from_str(document);
    Without { document, names, edit: &mut edit }.deserialize(&mut parser)?;
    parser.end()?;
    Ok(edit.finish())
}

/// The methods of a visitor that passes over everything but objects and arrays.
macro_rules! pass_over_scalars {
    () => {
        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a JSON value")
        }
        fn visit_bool<E>(self, _: bool) -> Result<(), E> {
            Ok(())
        }
        fn visit_i64<E>(self, _: i64) -> Result<(), E> {
            Ok(())
        }
        fn visit_u64<E>(self, _: u64) -> Result<(), E> {
            Ok(())
        }
        fn visit_f64<E>(self, _: f64) -> Result<(), E> {
            Ok(())
        }
        fn visit_str<E>(self, _: &str) -> Result<(), E> {
            Ok(())
        }
        fn visit_unit<E>(self) -> Result<(), E> {
            Ok(())
        }
    };
}

struct Each<'f, 'd> {
    steps: &'f [Step],
    found: &'f mut dyn FnMut(&'d RawValue),
}

impl<'d> DeserializeSeed<'d> for Each<'_, 'd> {
    type Value = ();
    fn deserialize<D: Deserializer<'d>>(self, value: D) -> Result<(), D::Error> {
        if !self.steps.is_empty() {
            return value.deserialize_any(self);
        }
        (self.found)(<&RawValue>::deserialize(value)?);
        Ok(())
    }
}

impl<'d> Visitor<'d> for Each<'_, 'd> {
    type Value = ();
    pass_over_scalars!();

    fn visit_seq<A: SeqAccess<'d>>(self, mut elements: A) -> Result<(), A::Error> {
        match self.steps.split_first() {
            Some((Step::Each, steps)) => while elements.next_element_seed(Each { steps, found: &mut *self.found })?.is_some() {},
            _ => while elements.next_element::<IgnoredAny>()?.is_some() {},
        }
        Ok(())
    }

    fn visit_map<A: MapAccess<'d>>(self, mut members: A) -> Result<(), A::Error> {
        let Some((step, steps)) = self.steps.split_first() else { return Ok(()) };
        while let Some(is_on_path) = members.next_key_seed(IsOnPath(*step))? {
            if is_on_path {
                members.next_value_seed(Each { steps, found: &mut *self.found })?;
            } else {
                members.next_value::<IgnoredAny>()?;
            }
        }
        Ok(())
    }
}

/// Whether a step leads to the member of a name.
struct IsOnPath(Step);

impl<'d> DeserializeSeed<'d> for IsOnPath {
    type Value = bool;
    fn deserialize<D: Deserializer<'d>>(self, name: D) -> Result<bool, D::Error> {
        name.deserialize_str(self)
    }
}

impl Visitor<'_> for IsOnPath {
    type Value = bool;
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a name")
    }
    fn visit_str<E>(self, name: &str) -> Result<bool, E> {
        Ok(matches!(self.0, Step::Each) || matches!(self.0, Step::Member(wanted) if wanted == name))
    }
}

struct Members<'f, 'd>(&'f mut Vec<(String, &'d RawValue)>);

impl<'d> Visitor<'d> for Members<'_, 'd> {
    type Value = ();
    pass_over_scalars!();

    fn visit_seq<A: SeqAccess<'d>>(self, mut elements: A) -> Result<(), A::Error> {
        while elements.next_element::<IgnoredAny>()?.is_some() {}
        Ok(())
    }

    fn visit_map<A: MapAccess<'d>>(self, mut members: A) -> Result<(), A::Error> {
        while let Some(member) = members.next_entry()? {
            self.0.push(member);
        }
        Ok(())
    }
}

struct Without<'f, 'd> {
    document: &'d str,
    names: &'f [&'f str],
    edit: &'f mut Edit<'d>,
}

impl<'d> DeserializeSeed<'d> for Without<'_, 'd> {
    type Value = ();
    fn deserialize<D: Deserializer<'d>>(self, value: D) -> Result<(), D::Error> {
        value.deserialize_any(self)
    }
}

impl<'d> Visitor<'d> for Without<'_, 'd> {
    type Value = ();
    pass_over_scalars!();

    fn visit_seq<A: SeqAccess<'d>>(self, mut elements: A) -> Result<(), A::Error> {
        while elements.next_element_seed(Without { edit: &mut *self.edit, ..self })?.is_some() {}
        Ok(())
    }

    fn visit_map<A: MapAccess<'d>>(self, mut members: A) -> Result<(), A::Error> {
        // A member after one that stays goes with the comma before it. Before the first one that stays, a member goes with the comma after it.
        let mut any_stays = false;
        let mut gap: Option<usize> = None;
        while let Some(key) = members.next_key::<&'d RawValue>()? {
            let start = range_in(self.document, key.get()).start;
            if let Some(from) = gap.take() {
                self.edit.replace(from..start, "");
            }
            let name: String = serde_json::from_str(key.get()).map_err(serde::de::Error::custom)?;
            if !self.names.contains(&name.as_str()) {
                any_stays = true;
                members.next_value_seed(Without { edit: &mut *self.edit, ..self })?;
                continue;
            }
            let end = range_in(self.document, members.next_value::<&'d RawValue>()?.get()).end;
            if any_stays {
                let comma = self.document.get(..start).and_then(|before| before.rfind(',')).unwrap_or(start);
                self.edit.replace(comma..end, "");
            } else {
                self.edit.replace(start..end, "");
                gap = Some(end);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::Value;

    const PATH: &[Step] = &[Step::Member("a"), Step::Each, Step::Member("b")];

    fn found(document: &str) -> serde_json::Result<Vec<&str>> {
        let mut values = Vec::new();
        each(document, PATH, &mut |value| values.push(value.get()))?;
        Ok(values)
    }

    #[test]
    fn values_at_a_path() {
        let document =
            r#" {"x":{"a":[{"b":0}]},"a":[{"b": 1 ,"c":1e999},{"b":[ 2]},{},7,null,[{"b":0}]],"\u0061":{"p":{"b":"é"}},"a":true} "#;
        assert_eq!(found(document).unwrap(), ["1", "[ 2]", "\"é\""]);
        for nothing in ["{}", "[]", "null", "7", "-1", "1.5", "\"x\"", "{\"a\":7}", "{\"a\":[]}"] {
            assert_eq!(found(nothing).unwrap(), [""; 0], "{nothing}");
        }
        for broken in ["", "{", "{\"a\":[{\"b\":1}", "{} {}", "{\"a\":[{\"b\":1}]]", "<html>"] {
            assert!(found(broken).is_err(), "{broken}");
        }
        let deep = format!("{}1{}", "{\"a\":[".repeat(100_000), "]}".repeat(100_000));
        assert!(found(&deep).is_ok(), "what is not on the path costs no stack");
    }

    #[test]
    fn members_in_their_order() {
        let all = members(r#"{"b":1, "a" : [2,3] ,"b":null}"#).unwrap();
        let all: Vec<_> = all.iter().map(|(name, value)| (name.as_str(), value.get())).collect();
        assert_eq!(all, [("b", "1"), ("a", "[2,3]"), ("b", "null")]);
        assert!(members("[1]").unwrap().is_empty() && members("7").unwrap().is_empty() && members("{").is_err());
    }

    #[test]
    fn members_are_left_out() {
        for (document, expected) in [
            (r#"{"x":1}"#, Some("{}")),
            (r#"{ "x" : 1 }"#, Some("{  }")),
            (r#"{"x":1,"y":2}"#, Some("{}")),
            (r#"{"x":1, "a":2}"#, Some(r#"{"a":2}"#)),
            (r#"{"a":2 , "x":1 }"#, Some(r#"{"a":2  }"#)),
            (r#"{"x":1,"y":2,"a":3,"x":4,"y":{"x":5},"b":6,"x":7}"#, Some(r#"{"a":3,"b":6}"#)),
            (r#"[{"a":[{"x":1,"é":",x"},"x",{"x":{}}],"\u0078":1},1.50]"#, Some(r#"[{"a":[{"é":",x"},"x",{}]},1.50]"#)),
            (r#"{"a":"x","b":["x","y"],"xx":1}"#, None),
            ("[]", None),
            ("7", None),
        ] {
            assert_eq!(without(document, &["x", "y"]).unwrap().as_deref(), expected, "{document}");
        }
        assert!(without("{\"x\":1", &["x"]).is_err());
        let deep = format!("{}1{}", "[".repeat(100_000), "]".repeat(100_000));
        assert!(without(&deep, &["x"]).is_err());
    }

    fn strip(value: Value) -> Value {
        match value {
            Value::Object(members) => {
                Value::Object(members.into_iter().filter(|(name, _)| name != "x").map(|(name, value)| (name, strip(value))).collect())
            }
            Value::Array(elements) => Value::Array(elements.into_iter().map(strip).collect()),
            other => other,
        }
    }

    fn any_value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![Just(Value::Null), any::<i32>().prop_map(Value::from), "[a-x,:{}\"]{0,3}".prop_map(Value::from)];
        leaf.prop_recursive(4, 40, 5, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
                prop::collection::btree_map("[a-bx]{1,1}", inner, 0..4).prop_map(|members| Value::Object(members.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn what_is_left_out_is_all_that_differs(value in any_value(), pretty: bool) {
            let document = if pretty { serde_json::to_string_pretty(&value).unwrap() } else { value.to_string() };
            let left = without(&document, &["x"]).unwrap().unwrap_or(document);
            prop_assert_eq!(serde_json::from_str::<Value>(&left).unwrap(), strip(value));
        }

        #[test]
        fn no_json_panics(document in "[\\[\\]{}:,\"a-bx0-9\\\\ é]{0,40}") {
            let _ = (found(&document).is_ok(), without(&document, &["x"]), members(&document).is_ok());
        }
    }
}
