//! Whether a push is from whom it should be, and fresh.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::response::{IntoResponse, Response};
use broker_core::{Error, Result, Timestamp};
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, StatusCode, header};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use sha2::{Digest, Sha256};

use super::keys::Key;
use super::refused::Refused;
use super::replay::{Known, Print, Replays};
use crate::push::consent::{ALLOWED_ORIGIN, ALLOWED_RATE, REQUEST_ORIGIN, REQUEST_RATE};

/// Signatures of one push that are looked at: one for each key while keys rotate.
const MAX_SIGNATURES: usize = 10;

/// How long a body may take to arrive.
const BODY_TIME: Duration = Duration::from_secs(60);

/// The keys by which pushes are verified, and how strictly.
///
/// Cloning shares what it remembers of pushes that were here.
///
/// ```
/// use std::time::Duration;
/// use broker_http::webhook::Verifier;
///
/// // While keys rotate, both are good.
/// let verifier = Verifier::new("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")?
///     .or("whpk_11qYAYKxCrfVS/7TyWQHOg7hcvPapiMlrwIaaPcHURo=")?
///     .with_tolerance(Duration::from_secs(60));
/// # let _ = verifier;
/// # Ok::<(), broker_core::Error>(())
/// ```
#[derive(Clone)]
pub struct Verifier {
    trust: Trust,
    tolerance: Duration,
    window: usize,
    max_body_bytes: usize,
    origins: Arc<[String]>,
    replays: Replays,
}

#[derive(Clone)]
enum Trust {
    /// Who signs with one of these.
    Keys(Arc<[Key]>),
    Everybody,
    Nobody,
}

impl Verifier {
    /// Takes pushes that are signed with this key: `whsec_…`, the secret of the subscription, or
    /// `whpk_…`, the public half of its ed25519 key.
    ///
    /// Made not more than 5 minutes ago, nor in a future beyond that; of the last 100,000 pushes none
    /// again; with a body of 32 MiB at most.
    ///
    /// # Errors
    ///
    /// [`Invalid`](broker_core::ErrorKind::Invalid) for what is no key; it is not repeated.
    pub fn new(key: &str) -> Result<Self> {
        Ok(Self::trusting(Trust::Keys([Key::parse(key)?].into())))
    }

    /// Takes every push, signed or not: for development, and behind something else that verifies.
    pub fn unsigned() -> Self {
        Self::trusting(Trust::Everybody)
    }

    /// Takes none: what stands where there is no verifier.
    pub(super) fn nobody() -> Self {
        Self::trusting(Trust::Nobody)
    }

    fn trusting(trust: Trust) -> Self {
        Self {
            trust,
            tolerance: Duration::from_secs(300),
            window: 100_000,
            max_body_bytes: 32 << 20,
            origins: Arc::new([]),
            replays: Replays::new(),
        }
    }

    /// Takes pushes that are signed with this key as well, while keys rotate.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new).
    pub fn or(mut self, key: &str) -> Result<Self> {
        let key = Key::parse(key)?;
        self.trust = Trust::Keys(match &self.trust {
            Trust::Keys(keys) => keys.iter().cloned().chain([key]).collect(),
            Trust::Everybody | Trust::Nobody => [key].into(),
        });
        Ok(self)
    }

    /// Sets how old a push may be, and how far in the future by a clock that goes wrong (5 minutes).
    #[must_use]
    pub fn with_tolerance(mut self, tolerance: Duration) -> Self {
        self.tolerance = tolerance;
        self
    }

    /// Sets how many pushes are remembered, so that none is taken twice (100,000; about 150 bytes
    /// each). They are remembered only for as long as they would pass for fresh.
    #[must_use]
    pub fn with_replay_window(mut self, pushes: usize) -> Self {
        self.window = pushes;
        self
    }

    /// Sets how many bytes a body may have (32 MiB).
    #[must_use]
    pub fn with_max_body_bytes(mut self, bytes: usize) -> Self {
        self.max_body_bytes = bytes;
        self
    }

    /// Sets from which brokers pushes are wanted, by their names, or from all by `*`: what
    /// [`consent`](Self::consent) answers. None, unless it is set.
    #[must_use]
    pub fn with_allowed_origins(mut self, origins: impl IntoIterator<Item = impl Into<String>>) -> Self {
        self.origins = origins.into_iter().map(Into::into).collect();
        self
    }

    /// Verifies signature and time of a push, as of now; what was here before is not looked at.
    ///
    /// # Errors
    ///
    /// [`Unauthorized`](broker_core::ErrorKind::Unauthorized), naming the header that is missing or
    /// wrong.
    ///
    /// ```
    /// use broker_http::webhook::Verifier;
    /// use http::HeaderMap;
    ///
    /// let verifier = Verifier::new("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")?;
    /// let error = verifier.verify(&HeaderMap::new(), b"42").unwrap_err();
    /// assert!(error.message().contains("webhook-id"), "{error}");
    /// # Ok::<(), broker_core::Error>(())
    /// ```
    pub fn verify(&self, headers: &HeaderMap, body: &[u8]) -> Result<()> {
        self.verify_at(headers, body, Timestamp::now())
    }

    /// As [`verify`](Self::verify), as of another time.
    ///
    /// # Errors
    ///
    /// As [`verify`](Self::verify).
    pub fn verify_at(&self, headers: &HeaderMap, body: &[u8], now: Timestamp) -> Result<()> {
        let keys = match &self.trust {
            Trust::Keys(keys) => keys,
            Trust::Everybody => return Ok(()),
            Trust::Nobody => return Err(Error::backend("this service has no key to verify a push with")),
        };
        let Signed { id, seconds, signatures } = Signed::of(headers)?;
        let age = now.as_millis() - seconds.parse::<i64>().unwrap_or_default().saturating_mul(1000);
        // The sender leaves parts of a second out.
        let tolerance = i64::try_from(self.tolerance.as_millis()).unwrap_or(i64::MAX).saturating_add(1000);
        if age.saturating_abs() > tolerance {
            let what = if age > 0 { "too old" } else { "too far in the future" };
            return Err(Error::unauthorized(format!("header webhook-timestamp: the push is {what}")));
        }
        let content: [&[u8]; 5] = [id.as_bytes(), b".", seconds.as_bytes(), b".", body];
        let mut candidates = signatures.split(' ').filter(|text| !text.is_empty()).take(MAX_SIGNATURES);
        if candidates.any(|signature| keys.iter().any(|key| key.signed(signature, &content))) {
            return Ok(());
        }
        Err(Error::unauthorized("header webhook-signature: no signature in it is by a key that is known here"))
    }

    /// Reads the body of a request, verifies it, and looks whether it was here before.
    pub(super) async fn take<B>(&self, headers: &HeaderMap, body: B) -> Result<(Bytes, Known), Refused>
    where
        B: http_body::Body<Data = Bytes>,
        B::Error: Into<axum::BoxError>,
    {
        let body = self.read(body).await?;
        self.verify(headers, &body)?;
        let known = match print(headers, &body).filter(|_| matches!(self.trust, Trust::Keys(_))) {
            // Nothing beyond twice the tolerance after it came passes for fresh.
            Some(print) => {
                let kept = self.tolerance.saturating_mul(2).saturating_add(Duration::from_secs(2));
                self.replays.claim(print, Instant::now(), kept, self.window)
            }
            None => self.replays.claim(Print::default(), Instant::now(), Duration::ZERO, 0),
        };
        Ok((body, known))
    }

    async fn read<B>(&self, body: B) -> Result<Bytes, Refused>
    where
        B: http_body::Body<Data = Bytes>,
        B::Error: Into<axum::BoxError>,
    {
        let body = std::pin::pin!(Limited::new(body, self.max_body_bytes).collect());
        match tokio::time::timeout(BODY_TIME, body).await {
            Ok(Ok(body)) => Ok(body.to_bytes()),
            Ok(Err(error)) if error.is::<LengthLimitError>() => Err(Refused::too_large(self.max_body_bytes)),
            Ok(Err(error)) => Err(Refused::malformed(format!("the body broke off: {error}"))),
            Err(_) => Err(Refused::too_slow()),
        }
    }

    /// Answers the `OPTIONS` by which a broker asks whether its pushes are wanted (CloudEvents' web
    /// hooks, section 4); [`VerifyLayer`](super::VerifyLayer) does so by itself.
    ///
    /// ```
    /// # fn main() -> broker_core::Result<()> {
    /// use axum::{Router, extract::State, routing::post};
    /// use broker_http::webhook::{Pushed, Verifier};
    ///
    /// let verifier = Verifier::new("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")?
    ///     .with_allowed_origins(["broker.example.com"]);
    /// let hook = post(async |Pushed(push): Pushed| println!("{:?}", push.message))
    ///     .options(async |State(verifier): State<Verifier>, headers: http::HeaderMap| verifier.consent(&headers));
    /// let app: Router = Router::new().route("/hook", hook).with_state(verifier);
    /// # let _ = app; Ok(()) }
    /// ```
    pub fn consent(&self, headers: &HeaderMap) -> Response {
        let asked = headers.get(REQUEST_ORIGIN).filter(|asked| {
            let is = |allowed: &String| allowed == "*" || asked.as_bytes().eq_ignore_ascii_case(allowed.as_bytes());
            self.origins.iter().any(is)
        });
        let mut response = match asked {
            Some(_) => StatusCode::OK.into_response(),
            None => StatusCode::FORBIDDEN.into_response(),
        };
        if let Some(origin) = asked {
            let answer = response.headers_mut();
            answer.insert(ALLOWED_ORIGIN, origin.clone());
            if headers.contains_key(REQUEST_RATE) {
                answer.insert(ALLOWED_RATE, HeaderValue::from_static("*"));
            }
            answer.insert(header::ALLOW, HeaderValue::from_static("POST"));
        }
        response.map(|_: Body| Body::empty())
    }
}

/// What a signature is made of, beside the body.
struct Signed<'a> {
    id: &'a str,
    seconds: &'a str,
    signatures: &'a str,
}

impl<'a> Signed<'a> {
    fn of(headers: &'a HeaderMap) -> Result<Self> {
        let one = |name: &str| {
            let mut values = headers.get_all(name).iter();
            let value = values.next().ok_or_else(|| Error::unauthorized(format!("header {name}: it is missing")))?;
            match value.to_str() {
                Ok(text) if !text.is_empty() && values.next().is_none() => Ok(text),
                _ => Err(Error::unauthorized(format!("header {name}: one value in visible ASCII is expected"))),
            }
        };
        let signed =
            Self { id: one("webhook-id")?, seconds: one("webhook-timestamp")?, signatures: one("webhook-signature")? };
        let is_number = signed.seconds.len() <= 12 && signed.seconds.bytes().all(|byte| byte.is_ascii_digit());
        if !is_number {
            return Err(Error::unauthorized("header webhook-timestamp: it is seconds since 1970"));
        }
        Ok(signed)
    }
}

/// The hash of what is signed: the same push has the same, whichever of its signatures it shows.
fn print(headers: &HeaderMap, body: &[u8]) -> Option<Print> {
    let Signed { id, seconds, .. } = Signed::of(headers).ok()?;
    let mut hash = Sha256::new();
    [id.as_bytes(), b".", seconds.as_bytes(), b".", body].iter().for_each(|part| hash.update(part));
    Some(hash.finalize().into())
}

/// Without keys.
impl fmt::Debug for Trust {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Keys(keys) => write!(f, "{} keys", keys.len()),
            Self::Everybody => f.write_str("everybody"),
            Self::Nobody => f.write_str("nobody"),
        }
    }
}

impl fmt::Debug for Verifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Verifier")
            .field("trust", &self.trust)
            .field("tolerance", &self.tolerance)
            .field("window", &self.window)
            .field("max_body_bytes", &self.max_body_bytes)
            .field("origins", &self.origins)
            .finish_non_exhaustive()
    }
}
