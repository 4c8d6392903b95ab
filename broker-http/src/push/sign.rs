//! Signatures of pushes, by Standard Webhooks.
//!
//! The signed content is `ID.TIMESTAMP.BODY`. A symmetric key (`whsec_…`) signs with HMAC-SHA256 as
//! `v1,BASE64`, an ed25519 key (`whsk_…`) as `v1a,BASE64`; while keys rotate, the header carries the
//! signatures of both, separated by a space.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use broker_core::{Error, Result, Timestamp};
use ed25519_dalek::{Signer as _, SigningKey};
use hmac::{Hmac, Mac};
use sha2::Sha256;
use smallvec::SmallVec;

use crate::{Secret, Signing};

/// Signs pushes with one key, or with two while they rotate.
#[derive(Clone)]
pub(crate) struct Signer(SmallVec<[(Key, Option<Timestamp>); 1]>);

#[derive(Clone)]
enum Key {
    /// The key is mixed in already: a signature costs its content alone.
    Symmetric(Box<Hmac<Sha256>>),
    Ed25519(Box<SigningKey>),
}

impl Signer {
    /// Reads the keys.
    ///
    /// # Errors
    ///
    /// [`Invalid`](broker_core::ErrorKind::Invalid) for a key that does not parse; it is not
    /// repeated.
    pub(crate) fn new(signing: &Signing) -> Result<Self> {
        let mut keys = SmallVec::new();
        keys.push((Key::parse("signing.secret", &signing.secret)?, None));
        if let Some(previous) = &signing.previous {
            keys.push((Key::parse("signing.previous", previous)?, signing.until));
        }
        Ok(Self(keys))
    }

    /// The value of `webhook-signature` for a push made `now`.
    pub(crate) fn sign(&self, id: &str, now: Timestamp, body: &[u8]) -> String {
        let seconds = seconds(now).to_string();
        let mut header = String::with_capacity(64);
        for (key, until) in &self.0 {
            if until.is_some_and(|until| until < now) {
                continue;
            }
            if !header.is_empty() {
                header.push(' ');
            }
            key.sign(&[id.as_bytes(), b".", seconds.as_bytes(), b".", body], &mut header);
        }
        header
    }
}

/// Seconds since the Unix epoch, as `webhook-timestamp` has them.
pub(crate) fn seconds(now: Timestamp) -> i64 {
    now.as_millis().div_euclid(1000)
}

impl Key {
    fn parse(field: &str, secret: &Secret) -> Result<Self> {
        let invalid = || Error::invalid(format!("{field}: it is whsec_ or whsk_ and the base64 of a key"));
        let text = secret.expose();
        if let Some(key) = text.strip_prefix("whsec_") {
            let key = STANDARD.decode(key).map_err(|_| invalid())?;
            let mac = Hmac::new_from_slice(&key).map_err(|_| invalid())?;
            return Ok(Self::Symmetric(Box::new(mac)));
        }
        let key = text.strip_prefix("whsk_").ok_or_else(invalid)?;
        let key = STANDARD.decode(key).map_err(|_| invalid())?;
        // A seed, or a seed and the public key that belongs to it.
        let key = match (<&[u8; 32]>::try_from(key.as_slice()), <&[u8; 64]>::try_from(key.as_slice())) {
            (Ok(seed), _) => SigningKey::from_bytes(seed),
            (_, Ok(pair)) => SigningKey::from_keypair_bytes(pair)
                .map_err(|_| Error::invalid(format!("{field}: the public half is not that of the private one")))?,
            _ => return Err(invalid()),
        };
        Ok(Self::Ed25519(Box::new(key)))
    }

    fn sign(&self, content: &[&[u8]], header: &mut String) {
        match self {
            Self::Symmetric(mac) => {
                let mut mac = mac.as_ref().clone();
                content.iter().for_each(|part| mac.update(part));
                header.push_str("v1,");
                STANDARD.encode_string(mac.finalize().into_bytes(), header);
            }
            Self::Ed25519(key) => {
                // Ed25519 reads its content twice, so that it must lie in one piece.
                header.push_str("v1a,");
                STANDARD.encode_string(key.sign(&content.concat()).to_bytes(), header);
            }
        }
    }
}

impl std::fmt::Debug for Signer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Signer({} keys)", self.0.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ed25519_dalek::Verifier as _;

    const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
    const ID: &str = "msg_p5jXN8AQM9LWM0D4loKWxJek";
    const BODY: &[u8] = br#"{"test": 2432232314}"#;
    const SIGNATURE: &str = "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=";
    const TIME: Timestamp = Timestamp::from_millis(1_614_265_330_500);

    fn signer(secret: &str, previous: Option<&str>, until: Option<Timestamp>) -> Result<Signer> {
        Signer::new(&Signing { secret: Secret::new(secret), previous: previous.map(Secret::new), until })
    }

    #[test]
    fn the_published_vector() {
        assert_eq!(signer(SECRET, None, None).unwrap().sign(ID, TIME, BODY), SIGNATURE);
    }

    #[test]
    fn ed25519_verifies_with_the_public_key() {
        let key = SigningKey::from_bytes(&[7; 32]);
        for secret in [STANDARD.encode(key.to_bytes()), STANDARD.encode(key.to_keypair_bytes())] {
            let header = signer(&format!("whsk_{secret}"), None, None).unwrap().sign(ID, TIME, BODY);
            let signature = STANDARD.decode(header.strip_prefix("v1a,").unwrap()).unwrap();
            let content = [ID.as_bytes(), b".1614265330.", BODY].concat();
            let signature = ed25519_dalek::Signature::from_slice(&signature).unwrap();
            key.verifying_key().verify(&content, &signature).unwrap();
        }
    }

    #[test]
    fn while_keys_rotate_both_sign() {
        let old = format!("whsk_{}", STANDARD.encode([7; 32]));
        let both = signer(SECRET, Some(&old), Some(TIME)).unwrap();
        let header = both.sign(ID, TIME, BODY);
        let (new, previous) = header.split_once(' ').unwrap();
        assert_eq!(new, SIGNATURE);
        assert!(previous.starts_with("v1a,"));
        let later = Timestamp::from_millis(TIME.as_millis() + 1);
        assert_eq!(both.sign(ID, later, BODY), SIGNATURE, "the old key's time is over");
        assert!(signer(SECRET, Some(&old), None).unwrap().sign(ID, later, BODY).contains(' '));
    }

    #[test]
    fn keys_that_are_none_are_refused_and_not_repeated() {
        let mut pair = SigningKey::from_bytes(&[7; 32]).to_keypair_bytes();
        pair[40] ^= 1;
        for bad in [
            "hunter2",
            "whsec_hunter2!",
            "whsk_hunter2!",
            &format!("whsk_{}", STANDARD.encode([7; 31])),
            &format!("whsk_{}", STANDARD.encode(pair)),
        ] {
            let error = signer(bad, None, None).unwrap_err();
            assert_eq!(error.kind(), broker_core::ErrorKind::Invalid);
            assert!(!error.to_string().contains(bad) && error.message().contains("signing.secret"), "{error}");
        }
        assert!(signer(SECRET, Some("x"), None).unwrap_err().message().contains("signing.previous"));
        assert!(!format!("{:?}", signer(SECRET, None, None).unwrap()).contains("MfKQ"));
    }
}
