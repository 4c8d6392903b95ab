//! Running checks: each in a task of its own, guarded against hanging and panicking.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use broker_core::Broker;
use futures_util::StreamExt;
use futures_util::stream;

use crate::report::{Outcome, Report};
use crate::{CHECKS, Check, Failed, Harness, Scene, Verdict, Wrapper};

/// How a check sees the broker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// The value itself.
    Value,
    /// Through `Box<dyn Broker>`.
    Boxed,
    /// Through `Arc<dyn Broker>`, as a service holds it.
    Shared,
    /// Through a [`Wrapper`].
    Wrapped,
}

impl Form {
    /// Every form.
    pub const ALL: [Self; 4] = [Self::Value, Self::Boxed, Self::Shared, Self::Wrapped];

    /// Its name on the command line.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Value => "value",
            Self::Boxed => "box",
            Self::Shared => "arc",
            Self::Wrapped => "wrapper",
        }
    }
}

impl fmt::Display for Form {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Form {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL
            .into_iter()
            .find(|form| form.as_str() == text)
            .ok_or_else(|| format!("form {text:?}: it is value, box, arc or wrapper"))
    }
}

type Make = dyn Fn() -> Arc<dyn Harness> + Send + Sync;

/// The checks against brokers of one kind. Needs a multi-thread tokio runtime.
#[derive(Clone)]
pub struct Suite {
    name: String,
    make: Arc<Make>,
    checks: Vec<&'static Check>,
    form: Form,
    parallel: usize,
}

impl Suite {
    /// Every check, through `Arc<dyn Broker>`, one after another; `make` makes the harness of each.
    pub fn new<H: Harness + 'static>(
        name: impl Into<String>,
        make: impl Fn() -> Arc<H> + Send + Sync + 'static,
    ) -> Self {
        let make = move || -> Arc<dyn Harness> { make() };
        Self {
            name: name.into(),
            make: Arc::new(make),
            checks: CHECKS.iter().collect(),
            form: Form::Shared,
            parallel: 1,
        }
    }

    /// What the broker is called.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Under another name in the table.
    #[must_use]
    pub fn named(mut self, name: impl Into<String>) -> Self {
        self.name = name.into();
        self
    }

    /// The checks that are run.
    pub fn checks(&self) -> &[&'static Check] {
        &self.checks
    }

    /// Only these checks: ids (`"A1"`) or letters (`"B"`).
    #[must_use]
    pub fn only<S: AsRef<str>>(mut self, wanted: impl IntoIterator<Item = S>) -> Self {
        let wanted: Vec<S> = wanted.into_iter().collect();
        let is_wanted = |check: &Check| {
            let letter = check.id.get(..1).unwrap_or_default();
            wanted.iter().any(|id| id.as_ref() == check.id || id.as_ref() == letter)
        };
        self.checks.retain(|check| is_wanted(check));
        self
    }

    /// In this form.
    #[must_use]
    pub fn form(mut self, form: Form) -> Self {
        self.form = form;
        self
    }

    /// So many checks at a time.
    #[must_use]
    pub fn parallel(mut self, parallel: usize) -> Self {
        self.parallel = parallel.max(1);
        self
    }

    /// Runs the checks; `seen` gets each report as it is known, in the order of the table.
    pub async fn run(&self, mut seen: impl FnMut(&Report)) -> Vec<Report> {
        let mut running =
            stream::iter(self.checks.iter().copied().map(|check| self.run_one(check))).buffered(self.parallel);
        let mut reports = Vec::with_capacity(self.checks.len());
        while let Some(report) = running.next().await {
            seen(&report);
            reports.push(report);
        }
        reports
    }

    /// Runs one check.
    pub async fn run_one(&self, check: &'static Check) -> Report {
        let (make, form) = (Arc::clone(&self.make), self.form);
        let task = tokio::spawn(async move { guarded(check, make(), form).await });
        let begin = std::time::Instant::now();
        let verdict = task.await.unwrap_or_else(|error| Err(Failed(describe(error))));
        Report {
            broker: self.name.clone(),
            check: check.id,
            title: check.title,
            form,
            outcome: Outcome::from(verdict),
            millis: u64::try_from(begin.elapsed().as_millis()).unwrap_or(u64::MAX),
        }
    }
}

impl fmt::Debug for Suite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Suite")
            .field("name", &self.name)
            .field("checks", &self.checks)
            .field("form", &self.form)
            .field("parallel", &self.parallel)
            .finish_non_exhaustive()
    }
}

async fn guarded(check: &'static Check, harness: Arc<dyn Harness>, form: Form) -> Verdict {
    let scene = Scene::new(harness);
    let guard = scene.timing().guard;
    let stuck = |what: &str| Failed(format!("{what} hung: it did not end within {guard:?}"));
    let verdict = tokio::time::timeout(guard, run_in_form(check, &scene, form)).await;
    let verdict = verdict.unwrap_or_else(|_| Err(stuck("the check")));
    let cleaned = tokio::time::timeout(guard, scene.clean()).await.unwrap_or_else(|_| Err(stuck("cleaning up")));
    // What a failed check left behind may not be its own to clean; the first failure tells more.
    verdict.and_then(|shown| cleaned.map(|()| shown).map_err(|failed| failed.context("cleaning up")))
}

async fn run_in_form(check: &Check, scene: &Scene, form: Form) -> Verdict {
    let broker = scene.open().await?;
    let verdict = match form {
        Form::Value => check.run(&*broker, scene).await,
        Form::Boxed => {
            let boxed: Box<dyn Broker> = Box::new(Arc::clone(&broker));
            check.run(&boxed, scene).await
        }
        Form::Shared => check.run(&broker, scene).await,
        Form::Wrapped => check.run(&Wrapper::new(Arc::clone(&broker)), scene).await,
    };
    // What is left of a check is not waited for: its verdict is in.
    let patience = scene.timing().patience;
    let closing = tokio::time::timeout(patience, broker.close(Duration::from_millis(500))).await;
    match closing {
        Ok(_) => verdict,
        Err(_) => {
            verdict.and(Err(Failed(format!("closing the broker after the check did not end within {patience:?}"))))
        }
    }
}

fn describe(error: tokio::task::JoinError) -> String {
    match error.try_into_panic() {
        Ok(panic) => {
            let text = panic.downcast_ref::<&str>().copied().or(panic.downcast_ref::<String>().map(String::as_str));
            format!("panicked: {}", text.unwrap_or("no message"))
        }
        Err(_) => "the runtime ended before the check".to_owned(),
    }
}
