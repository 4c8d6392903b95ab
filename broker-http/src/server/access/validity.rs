//! Until when a certificate is good: read out of its DER form, of which the verifier tells no times.

use broker_core::Timestamp;

const SEQUENCE: u8 = 0x30;
const VERSION: u8 = 0xa0;
const UTC_TIME: u8 = 0x17;
const GENERALIZED_TIME: u8 = 0x18;

/// The first moment at which a certificate is good no more: the second after its `notAfter` (RFC 5280, section 4.1.2.5).
/// `None` if it says it in no way that we know.
pub(super) fn end(certificate: &[u8]) -> Option<Timestamp> {
    let (signed, _) = expect(SEQUENCE, certificate)?;
    let (fields, _) = expect(SEQUENCE, signed)?;
    // The version is left out where it is the first.
    let fields = element(fields).filter(|(tag, ..)| *tag == VERSION).map_or(fields, |(_, _, rest)| rest);
    // Serial number, algorithm and issuer.
    let validity = (0..3).try_fold(fields, |fields, _| element(fields).map(|(_, _, rest)| rest))?;
    let (times, _) = expect(SEQUENCE, validity)?;
    let (_, _, after) = element(times)?;
    let (tag, text, _) = element(after)?;
    let text = std::str::from_utf8(text).ok()?;
    let text = match tag {
        // Two digits of the year: below 50 it is of this century.
        UTC_TIME => format!("{}{text}", if text < "5" { "20" } else { "19" }),
        GENERALIZED_TIME => text.to_owned(),
        _ => return None,
    };
    let digits = text.strip_suffix('Z').filter(|digits| digits.len() == 14 && digits.is_ascii())?;
    let part = |from: usize, to: usize| digits.get(from..to);
    let (year, month, day) = (part(0, 4)?, part(4, 6)?, part(6, 8)?);
    let (hour, minute, second) = (part(8, 10)?, part(10, 12)?, part(12, 14)?);
    let last: Timestamp = format!("{year}-{month}-{day}T{hour}:{minute}:{second}Z").parse().ok()?;
    Some(Timestamp::from_millis(last.as_millis().saturating_add(1_000)))
}

/// The content of the first element, if it is of this kind, and what follows it.
fn expect(tag: u8, input: &[u8]) -> Option<(&[u8], &[u8])> {
    element(input).filter(|(have, ..)| *have == tag).map(|(_, content, rest)| (content, rest))
}

/// The first element: its tag, its content, and what follows it (X.690, section 8.1, definite lengths).
fn element(input: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let (&tag, rest) = input.split_first()?;
    let (&first, rest) = rest.split_first()?;
    let (length, rest) = match first {
        0..=0x7f => (usize::from(first), rest),
        0x81..=0x84 => {
            let (length, rest) = rest.split_at_checked(usize::from(first & 0x7f))?;
            (length.iter().fold(0, |length, byte| length << 8 | usize::from(*byte)), rest)
        }
        _ => return None,
    };
    let (content, rest) = rest.split_at_checked(length)?;
    Some((tag, content, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn issued(year: i32) -> Vec<u8> {
        let mut params = rcgen::CertificateParams::new(["a.internal".to_owned()]).unwrap();
        params.not_before = rcgen::date_time_ymd(1990, 1, 1);
        params.not_after = rcgen::date_time_ymd(year, 2, 3);
        params.self_signed(&rcgen::KeyPair::generate().unwrap()).unwrap().der().to_vec()
    }

    #[test]
    fn the_end_is_read_in_either_form() {
        for year in [1999, 2000, 2026, 2049, 2050, 2999] {
            let end = end(&issued(year)).unwrap();
            assert_eq!(end, format!("{year}-02-03T00:00:01Z").parse().unwrap(), "{year}");
        }
    }

    #[test]
    fn what_is_cut_or_changed_is_no_panic() {
        let whole = issued(2030);
        for length in 0..whole.len() {
            end(&whole[..length]);
            for byte in [0, 0x30, 0x7f, 0x80, 0x84, 0xff] {
                let mut changed = whole.clone();
                changed[length] = byte;
                end(&changed);
            }
        }
        assert_eq!(end(b""), None);
    }
}
