//! Header values of other types than ours, as text: a message somebody else wrote stays readable.

use bytes::Bytes;
use lapin::types::AMQPValue;
use serde_json::Value;

/// Tables within tables this deep are read; what is deeper is left out.
const MAX_DEPTH: usize = 16;

/// The values of a header: one, or one per element of an array of strings.
pub(crate) fn values(value: &AMQPValue) -> Vec<Bytes> {
    let strings = match value {
        AMQPValue::FieldArray(array) => array.as_slice().iter().map(string).collect::<Option<Vec<_>>>(),
        _ => None,
    };
    strings.unwrap_or_else(|| vec![one(value)])
}

fn string(value: &AMQPValue) -> Option<Bytes> {
    match value {
        AMQPValue::LongString(bytes) => Some(Bytes::copy_from_slice(bytes.as_bytes())),
        AMQPValue::ByteArray(bytes) => Some(Bytes::copy_from_slice(bytes.as_slice())),
        AMQPValue::ShortString(text) => Some(Bytes::copy_from_slice(text.as_str().as_bytes())),
        _ => None,
    }
}

/// Strings as they are, numbers and truth values as people write them, arrays and tables as JSON.
fn one(value: &AMQPValue) -> Bytes {
    if let Some(bytes) = string(value) {
        return bytes;
    }
    match json(value, MAX_DEPTH) {
        Value::Null => Bytes::new(),
        other => other.to_string().into(),
    }
}

/// An integer, of whichever width.
pub(crate) fn integer(value: &AMQPValue) -> Option<i64> {
    match value {
        AMQPValue::ShortShortInt(number) => Some((*number).into()),
        AMQPValue::ShortShortUInt(number) => Some((*number).into()),
        AMQPValue::ShortInt(number) => Some((*number).into()),
        AMQPValue::ShortUInt(number) => Some((*number).into()),
        AMQPValue::LongInt(number) => Some((*number).into()),
        AMQPValue::LongUInt(number) => Some((*number).into()),
        AMQPValue::LongLongInt(number) => Some(*number),
        AMQPValue::Timestamp(number) => i64::try_from(*number).ok(),
        _ => None,
    }
}

fn json(value: &AMQPValue, depth: usize) -> Value {
    if let Some(number) = integer(value) {
        return number.into();
    }
    let Some(deeper) = depth.checked_sub(1) else { return Value::Null };
    match value {
        AMQPValue::Boolean(truth) => (*truth).into(),
        AMQPValue::Float(number) => f64::from(*number).into(),
        AMQPValue::Double(number) => (*number).into(),
        AMQPValue::DecimalValue(decimal) => (f64::from(decimal.value) / 10_f64.powi(i32::from(decimal.scale))).into(),
        AMQPValue::FieldArray(array) => array.as_slice().iter().map(|value| json(value, deeper)).collect(),
        AMQPValue::FieldTable(table) => {
            let fields = table.inner().iter().map(|(name, value)| (name.as_str().to_owned(), json(value, deeper)));
            Value::Object(fields.collect())
        }
        other => string(other).map_or(Value::Null, |bytes| String::from_utf8_lossy(&bytes).into_owned().into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lapin::types::{FieldArray, FieldTable};

    #[test]
    fn every_type_reads_as_text() {
        let text = |value: AMQPValue| {
            let values = values(&value);
            values.iter().map(|value| String::from_utf8_lossy(value).into_owned()).collect::<Vec<_>>()
        };
        assert_eq!(text(AMQPValue::LongInt(4)), ["4"]);
        assert_eq!(text(AMQPValue::Boolean(true)), ["true"]);
        assert_eq!(text(AMQPValue::Void), [""]);
        let strings = vec![AMQPValue::LongString("a".into()), AMQPValue::LongString("b".into())];
        assert_eq!(text(AMQPValue::FieldArray(FieldArray::from(strings))), ["a", "b"]);
        let mut table = FieldTable::default();
        table.insert("count".into(), AMQPValue::LongLongInt(1));
        let array = FieldArray::from(vec![AMQPValue::FieldTable(table)]);
        assert_eq!(text(AMQPValue::FieldArray(array)), [r#"[{"count":1}]"#]);
    }

    #[test]
    fn what_is_nested_without_end_is_cut() {
        let mut value = AMQPValue::Boolean(true);
        for _ in 0..1000 {
            value = AMQPValue::FieldArray(FieldArray::from(vec![value]));
        }
        assert!(one(&value).len() < 100);
    }
}
