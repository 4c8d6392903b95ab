//! The keys a push may be signed with, as Standard Webhooks writes them.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use broker_core::{Error, Result};
use ed25519_dalek::{Signature, SigningKey, VerifyingKey};
use hmac::{Hmac, Mac};
use sha2::Sha256;

/// A key that tells whether a signature is by it.
#[derive(Clone)]
pub(super) enum Key {
    Symmetric(Box<Hmac<Sha256>>),
    Ed25519(Box<VerifyingKey>),
}

impl Key {
    /// Reads `whsec_…`, `whpk_…` or `whsk_…`.
    ///
    /// # Errors
    ///
    /// [`Invalid`](broker_core::ErrorKind::Invalid); the key is not repeated.
    pub(super) fn parse(text: &str) -> Result<Self> {
        let invalid = || {
            Error::invalid(
                "webhook key: it is whsec_ and the base64 of 24 to 64 bytes, or whpk_ and that of an ed25519 public key",
            )
        };
        let decoded = |base64: &str| STANDARD.decode(base64).map_err(|_| invalid());
        if let Some(secret) = text.strip_prefix("whsec_") {
            let secret = decoded(secret)?;
            if !(24..=64).contains(&secret.len()) {
                return Err(invalid());
            }
            return Ok(Self::Symmetric(Box::new(Hmac::new_from_slice(&secret).map_err(|_| invalid())?)));
        }
        let public = match (text.strip_prefix("whpk_"), text.strip_prefix("whsk_")) {
            (Some(public), _) => VerifyingKey::from_bytes(&decoded(public)?.try_into().map_err(|_| invalid())?),
            // The private key has the public one in it, or leads to it.
            (_, Some(private)) => match decoded(private)?.first_chunk() {
                Some(seed) => Ok(SigningKey::from_bytes(seed).verifying_key()),
                None => return Err(invalid()),
            },
            _ => return Err(invalid()),
        };
        Ok(Self::Ed25519(Box::new(public.map_err(|_| invalid())?)))
    }

    /// Whether `signature` (`v1,…` or `v1a,…`) is this key's of the content. Takes as long whether it
    /// is or not.
    pub(super) fn signed(&self, signature: &str, content: &[&[u8]]) -> bool {
        let decoded = |base64: &str| STANDARD.decode(base64).ok();
        match self {
            Self::Symmetric(mac) => {
                let Some(signature) = signature.strip_prefix("v1,").and_then(decoded) else { return false };
                let mut mac = mac.as_ref().clone();
                content.iter().for_each(|part| mac.update(part));
                mac.verify_slice(&signature).is_ok()
            }
            Self::Ed25519(key) => {
                let signature = signature.strip_prefix("v1a,").and_then(decoded);
                let Some(signature) = signature.and_then(|bytes| Signature::from_slice(&bytes).ok()) else {
                    return false;
                };
                key.verify_strict(&content.concat(), &signature).is_ok()
            }
        }
    }
}
