//! Running a part of a check on a runtime of its own.

use std::fmt::Write as _;
use std::future::Future;
use std::sync::Arc;

use parking_lot::Mutex;
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

use crate::{Attempt, Failed};

/// Runs `body` on a runtime and a thread of its own, to its end.
pub(super) fn on_another_runtime<T: Send, F: Future<Output = Attempt<T>>>(
    body: impl FnOnce() -> F + Send,
) -> Attempt<T> {
    let thread = || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        runtime.map_err(|error| Failed(format!("no runtime: {error}")))?.block_on(body())
    };
    // Whoever else runs on this thread's runtime goes on meanwhile.
    tokio::task::block_in_place(|| {
        std::thread::scope(|threads| threads.spawn(thread).join())
            .unwrap_or_else(|_| Err(Failed("it panicked on another runtime".to_owned())))
    })
}

/// As [`on_another_runtime`], with every event and span of the thread written to `log`.
pub(super) fn logged<T: Send, F: Future<Output = Attempt<T>>>(
    log: &Log,
    body: impl FnOnce() -> F + Send,
) -> Attempt<T> {
    let log = log.clone();
    on_another_runtime(move || async move {
        let _guard = tracing::subscriber::set_default(log);
        body().await
    })
}

/// Log lines, kept as text.
#[derive(Clone, Default)]
pub(super) struct Log(Arc<Mutex<String>>);

impl Log {
    pub(super) fn new() -> Self {
        Self::default()
    }

    /// Everything that was logged.
    pub(super) fn text(&self) -> String {
        self.0.lock().clone()
    }
}

impl Subscriber for Log {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn new_span(&self, span: &Attributes<'_>) -> Id {
        span.record(&mut Line(&mut self.0.lock()));
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, values: &Record<'_>) {
        values.record(&mut Line(&mut self.0.lock()));
    }

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        event.record(&mut Line(&mut self.0.lock()));
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

struct Line<'a>(&'a mut String);

impl Visit for Line<'_> {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        // Writing to a String cannot fail.
        let _ = writeln!(self.0, "{}={value:?}", field.name());
    }
}
