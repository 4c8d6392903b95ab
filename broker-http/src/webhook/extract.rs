//! A push as an argument of an axum handler.

use axum::body::Body;
use axum::extract::{FromRef, FromRequest, Request};
use broker_core::{Error, Message};
use bytes::Bytes;
use http::HeaderMap;
use http_body_util::BodyExt;
use percent_encoding::percent_decode_str;

use super::layer::Verified;
use super::refused::Refused;
use super::replay::Known;
use super::verifier::Verifier;
use crate::event::{Decoded, Format, Options, binary, json};

/// A verified push of one message, in binary, structured or raw mode: with [`Verifier`] as state, or a
/// part of it, it is an axum extractor that verifies.
///
/// An extractor does not see what its handler answers. So the same push again, word for word, is
/// refused with 409, whatever became of it, and so is a retry within the second of the push before it,
/// which is signed alike; our engine lets a second pass before it pushes a signed message again. Behind a
/// [`VerifyLayer`](super::VerifyLayer), which sees the answer, it does not verify again and refuses
/// nothing; the state may then be `()`.
///
/// The id of the message is the one that was signed.
///
/// ```
/// use axum::extract::FromRequest;
/// use broker_http::webhook::{Pushed, Verifier};
/// use http::Request;
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() {
/// let request = Request::post("/hook")
///     .header("broker-id", "7")
///     .header("broker-topic", "orders.created")
///     .header("broker-attempt", "1")
///     .body("42".into())
///     .unwrap();
/// let Pushed(push) = Pushed::from_request(request, &Verifier::unsigned()).await.unwrap();
/// assert_eq!(push.message.payload(), "42");
/// assert_eq!(push.topic.unwrap().as_str(), "orders.created");
/// # }
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Pushed(pub Decoded);

/// As [`Pushed`], in any mode: the messages of a batch, or the one message there is.
///
/// To settle messages of a batch one by one, answer
/// `{"statuses": [{"id": "…", "status": "SUCCESS"}, …]}` with 200; `RETRY` and `DROP` are the others,
/// and what is left out is retried. Of messages with one id, from two sources perhaps, each has its own
/// entry, in the order of the batch.
#[derive(Clone, Debug, PartialEq)]
pub struct PushedBatch(pub Vec<Decoded>);

/// What verifies nothing itself, behind a layer that does.
impl FromRef<()> for Verifier {
    fn from_ref((): &()) -> Self {
        Self::nobody()
    }
}

impl<S: Send + Sync> FromRequest<S> for Pushed
where
    Verifier: FromRef<S>,
{
    type Rejection = Refused;

    async fn from_request(request: Request, state: &S) -> Result<Self, Refused> {
        let PushedBatch(mut pushes) = PushedBatch::from_request(request, state).await?;
        match (pushes.pop(), pushes.is_empty()) {
            (Some(push), true) => Ok(Self(push)),
            _ => Err(Refused::malformed("one message is expected, and this is a batch; subscribe without mode batch")),
        }
    }
}

impl<S: Send + Sync> FromRequest<S> for PushedBatch
where
    Verifier: FromRef<S>,
{
    type Rejection = Refused;

    async fn from_request(request: Request, state: &S) -> Result<Self, Refused> {
        let (parts, body) = request.into_parts();
        let body = match parts.extensions.get::<Verified>() {
            Some(Verified) => read(body).await?,
            None => match Verifier::from_ref(state).take(&parts.headers, body).await? {
                (body, Known::New(claim)) => {
                    claim.keep();
                    body
                }
                (_, Known::Taken | Known::Done) => return Err(Refused::repeated()),
            },
        };
        decode(&parts.headers, body).map(Self)
    }
}

/// What a layer before us has read already.
async fn read(body: Body) -> Result<Bytes, Refused> {
    let body = body.collect().await.map_err(|error| Refused::malformed(format!("the body broke off: {error}")))?;
    Ok(body.to_bytes())
}

fn decode(headers: &HeaderMap, body: Bytes) -> Result<Vec<Decoded>, Refused> {
    let options = Options::parse(None, headers)?;
    // In raw mode a payload is nothing but one, whatever its type.
    let format = if headers.contains_key("broker-id") { Format::Single } else { Format::of(headers)? };
    match format {
        // Lines are a form of publishes; a push of such is a message that has them as its payload.
        Format::Single | Format::Lines => one(headers, binary::decode(headers, &options, body, None)?),
        Format::Structured => {
            let mut decoded = json::decode(&body, &options, None)?;
            binary::take_trace_context(headers, &mut decoded.message)?;
            one(headers, decoded)
        }
        Format::Batch => {
            let events = json::decode_batch(&body, &options, None)?;
            Ok(events.into_iter().collect::<broker_core::Result<_>>()?)
        }
    }
}

/// In binary and raw mode the id is in a header of its own, beside the one that is signed.
fn one(headers: &HeaderMap, decoded: Decoded) -> Result<Vec<Decoded>, Refused> {
    match headers.get("webhook-id").map(|id| id.to_str().unwrap_or_default()) {
        Some(signed) if !names(signed, &decoded.message) => {
            Err(Error::unauthorized("header webhook-id: it names another message than the push itself").into())
        }
        _ => Ok(vec![decoded]),
    }
}

fn names(signed: &str, message: &Message) -> bool {
    let id = message.id().to_string();
    percent_decode_str(signed).eq(id.bytes())
}
