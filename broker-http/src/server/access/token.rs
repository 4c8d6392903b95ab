//! Bearer tokens: made once, shown once, kept as a hash.

use std::fmt;
use std::str::FromStr;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use broker_core::{Error, Result};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use sha2::{Digest, Sha256};
use subtle::{Choice, ConstantTimeEq};

/// A bearer token: 256 random bits. It is shown to who will use it, and kept by nobody else.
///
/// ```
/// use broker_http::Token;
///
/// let token = Token::random()?;
/// assert!(token.expose().starts_with("brk_"));
/// assert!(token.hash().to_string().starts_with("sha256:"));
/// assert!(!format!("{token:?}").contains(token.expose()));
/// # Ok::<(), broker_core::Error>(())
/// ```
pub struct Token(String);

impl Token {
    /// A new one.
    ///
    /// # Errors
    ///
    /// [`Unavailable`](broker_core::ErrorKind::Unavailable) if the system has no randomness to give.
    pub fn random() -> Result<Self> {
        let mut bytes = [0; 32];
        getrandom::fill(&mut bytes)
            .map_err(|error| Error::unavailable(format!("the system gives no random bytes: {error}")))?;
        Ok(Self(format!("brk_{}", URL_SAFE_NO_PAD.encode(bytes))))
    }

    /// The token, for who will use it.
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// What is kept of it.
    pub fn hash(&self) -> TokenHash {
        TokenHash::of(&self.0)
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(***)")
    }
}

/// What is kept of a token: `sha256:` and 64 hexadecimal digits. A token has 256 random bits, so
/// that no slow hash is needed to keep it from being guessed.
///
/// ```
/// use broker_http::TokenHash;
///
/// // printf %s secret | sha256sum
/// let hash: TokenHash = "sha256:2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b".parse()?;
/// assert_eq!(hash, TokenHash::of("secret"));
/// # Ok::<(), broker_core::Error>(())
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TokenHash([u8; 32]);

impl TokenHash {
    /// The hash of a token's text.
    pub fn of(token: impl AsRef<[u8]>) -> Self {
        Self(Sha256::digest(token).into())
    }

    /// Whether both are the same, in a time that does not tell how much of them is.
    pub(crate) fn matches(&self, other: &Self) -> Choice {
        self.0.ct_eq(&other.0)
    }
}

impl fmt::Display for TokenHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("sha256:")?;
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for TokenHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TokenHash({self})")
    }
}

impl FromStr for TokenHash {
    type Err = Error;

    /// Never repeats what it was given: it may be the token itself.
    fn from_str(text: &str) -> Result<Self> {
        let invalid = || {
            Error::invalid(
                "a token's hash is sha256: and 64 hexadecimal digits; `broker-http token new` prints it beside the token",
            )
        };
        let digits = text.strip_prefix("sha256:").ok_or_else(invalid)?.as_bytes();
        let mut hash = [0; 32];
        if digits.len() != 2 * hash.len() {
            return Err(invalid());
        }
        let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
        for (byte, pair) in hash.iter_mut().zip(digits.chunks_exact(2)) {
            let &[high, low] = pair else { return Err(invalid()) };
            *byte = digit(high).zip(digit(low)).map(|(high, low)| high << 4 | low).ok_or_else(invalid)?;
        }
        Ok(Self(hash))
    }
}

impl Serialize for TokenHash {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for TokenHash {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        text.parse().map_err(|error: Error| serde::de::Error::custom(error.message()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_differ_and_hashes_are_read_back() {
        let (one, two) = (Token::random().unwrap(), Token::random().unwrap());
        assert_ne!(one.expose(), two.expose());
        assert_eq!(one.expose().len(), "brk_".len() + 43);
        let hash: TokenHash = one.hash().to_string().parse().unwrap();
        assert!(bool::from(hash.matches(&one.hash())) && !bool::from(hash.matches(&two.hash())));
    }

    #[test]
    fn what_is_no_hash_is_refused_and_not_repeated() {
        for text in ["", "hunter2", "sha256:hunter2", &format!("sha256:{}", "g".repeat(64)), "md5:00", "sha256:+1"] {
            let error = text.parse::<TokenHash>().unwrap_err();
            assert!(error.message().contains("64 hexadecimal") && !error.message().contains("hunter2"), "{error}");
        }
    }
}
