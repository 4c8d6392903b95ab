//! `GET /readyz`: the server takes requests, and so does the broker behind it; it says what that one can do, and to admins
//! where it is and what is wrong with it.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use broker_core::Error;
use http::StatusCode;
use serde_json::json;
use tokio::sync::Mutex;
use tokio::time::Instant;

use super::Shared;
use super::problem::Problem;
use super::query::no_query;
use super::subscriptions::respond;

/// How long what the broker said of itself is taken for true: whoever asks here need not say who he is, and a broker of
/// many groups takes a while to say.
const FRESH: Duration = Duration::from_millis(500);

/// What the broker said last.
#[derive(Debug, Default)]
pub(crate) struct Readiness(Mutex<Option<(Instant, Said)>>);

#[derive(Clone, Debug)]
enum Said {
    Active(String),
    /// In a word, and in full.
    Not(String, Error),
}

impl Readiness {
    /// Asks the broker, once for all who ask here meanwhile.
    async fn of(&self, shared: &Shared) -> Said {
        let mut said = self.0.lock().await;
        if let Some((when, said)) = &*said
            && when.elapsed() < FRESH
        {
            return said.clone();
        }
        let now = match shared.broker.status().await {
            Ok(status) if matches!(status.state, broker_core::State::Active) => Said::Active(status.name),
            Ok(status) => {
                let error = status.last_error.map(|error| format!(": {error}")).unwrap_or_default();
                let state = serde_json::to_value(status.state).unwrap_or_default();
                let state = state.as_str().unwrap_or("not active").to_owned();
                let told = Error::unavailable(format!("the broker {} is {state}{error}", status.name));
                Said::Not(state, told)
            }
            Err(error) => Said::Not("out of reach".to_owned(), error),
        };
        *said = Some((Instant::now(), now.clone()));
        now
    }
}

pub(crate) async fn readyz(State(shared): State<Arc<Shared>>, request: Request) -> Response {
    if let Err(problem) = no_query(request.uri()) {
        return problem.into_response();
    }
    if shared.is_draining() {
        return Problem::draining().into_response();
    }
    let is_admin = match shared.gate.is_admin(&shared.metrics, request.extensions().get(), request.headers()).await {
        Ok(is_admin) => is_admin,
        Err(problem) => return problem.into_response(),
    };
    match shared.readiness.of(&shared).await {
        Said::Active(name) => {
            let mut ready = json!({ "status": "ready", "capabilities": shared.broker.capabilities() });
            if let Some(fields) = ready.as_object_mut().filter(|_| is_admin) {
                fields.insert("broker".to_owned(), name.into());
            }
            respond(StatusCode::OK, &ready)
        }
        Said::Not(_, error) if is_admin => Problem::from(error).into_response(),
        Said::Not(state, _) => {
            Problem::from(Error::unavailable(format!("not ready: the broker is {state}"))).into_response()
        }
    }
}

#[cfg(test)]
mod tests {
    use broker_core::{Broker, MemoryBroker};

    use super::super::{Server, ServerOptions};
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_broker_is_asked_once_for_all_who_ask_meanwhile() {
        let broker = Arc::new(MemoryBroker::new());
        let server = Server::new(Arc::clone(&broker) as Arc<dyn Broker>, ServerOptions::new());
        let asked = async || server.shared.readiness.of(&server.shared).await;
        assert!(matches!(asked().await, Said::Active(_)));
        broker.close(Duration::ZERO).await;
        assert!(matches!(asked().await, Said::Active(_)), "it was asked again at once");
        tokio::time::advance(FRESH).await;
        assert!(matches!(asked().await, Said::Not(..)));
    }
}
