//! A `null` where a setting is meant. Whether it stands for the default (`"dead_letter": null`) or for nothing at all
//! (no dead letters) is not for us to guess: what is left out has its default, and null is refused.

use std::fmt;

use broker_core::{Error, Result};
use serde::de::{self, Deserialize, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

/// Refuses JSON that has a null in it, wherever that stands. What is no JSON is left to who reads it.
///
/// # Errors
///
/// [`Invalid`](broker_core::ErrorKind::Invalid), naming the field.
pub(crate) fn refuse(json: &[u8]) -> Result<()> {
    if memchr::memmem::find(json, b"null").is_none() {
        return Ok(());
    }
    let mut reader = serde_json::Deserializer::from_slice(json);
    match serde_path_to_error::deserialize::<_, NoNull>(&mut reader) {
        Err(error) if error.inner().is_data() => {
            let path = error.path().to_string();
            let what = if path == "." { "the JSON" } else { &path };
            Err(Error::invalid(format!("{what}: null is no value here; what is left out has its default")))
        }
        _ => Ok(()),
    }
}

/// Any JSON without null.
struct NoNull;

impl<'de> Deserialize<'de> for NoNull {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        deserializer.deserialize_any(Self)
    }
}

impl<'de> Visitor<'de> for NoNull {
    type Value = Self;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }

    fn visit_unit<E: de::Error>(self) -> std::result::Result<Self, E> {
        Err(E::invalid_type(de::Unexpected::Unit, &self))
    }

    fn visit_bool<E>(self, _: bool) -> std::result::Result<Self, E> {
        Ok(self)
    }

    fn visit_i64<E>(self, _: i64) -> std::result::Result<Self, E> {
        Ok(self)
    }

    fn visit_u64<E>(self, _: u64) -> std::result::Result<Self, E> {
        Ok(self)
    }

    fn visit_f64<E>(self, _: f64) -> std::result::Result<Self, E> {
        Ok(self)
    }

    fn visit_str<E>(self, _: &str) -> std::result::Result<Self, E> {
        Ok(self)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> std::result::Result<Self, A::Error> {
        while items.next_element::<Self>()?.is_some() {}
        Ok(self)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut fields: A) -> std::result::Result<Self, A::Error> {
        while fields.next_entry::<IgnoredAny, Self>()?.is_some() {}
        Ok(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_field_is_named() {
        for (json, named) in [
            (r#"{"rate":null}"#, "rate: null"),
            (r#"{"a":"null","tls":{"ca":1.5,"key": null}}"#, "tls.key: null"),
            (r#"{"filters":[{"exact":{"type":"a"}},{"exact":{"type":null}}]}"#, "filters[1].exact.type: null"),
            ("null", "the JSON: null"),
        ] {
            let error = refuse(json.as_bytes()).unwrap_err();
            assert!(error.message().starts_with(named), "{json}: {error}");
        }
        for fine in [r#"{"a":"null","null":[true,-1,2,0.5,"x",{}]}"#, r#"{"a":null"#, "{null}", ""] {
            let refused = refuse(fine.as_bytes());
            assert_eq!(refused.is_ok(), fine != r#"{"a":null"#, "{fine}: {refused:?}");
        }
    }
}
