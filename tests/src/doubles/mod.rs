//! Doubles: brokers that are wrong in one way each, and the checks that must catch them.
//!
//! A check that nothing fails proves nothing. Every double here is a right broker with one defect
//! around it; every check of the table is caught failing by at least one of them. `tests/doubles.rs`
//! runs them all, and a right one between them that must pass.

mod broker;
mod defect;
mod deliver;
mod life;
mod publish;
mod remote;
mod settle;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use broker_core::{Broker, Result};

use crate::{Harness, InProcess, Place, Secret, Suite, Timing};
use broker::Flawed;
use defect::Defect;
use remote::{Flaws, Remote};

/// A broker with one defect.
#[derive(Clone, Copy)]
pub struct Double {
    /// What it does wrong.
    pub name: &'static str,
    /// The checks that must catch it, and words of what each says then: caught for another reason, it is
    /// not caught.
    pub caught_by: &'static [(&'static str, &'static str)],
    make: Make,
}

#[derive(Clone, Copy)]
enum Make {
    /// Around the in-process broker.
    Around(fn() -> Defect),
    /// In a server that can be cut off.
    Remote(fn(&mut Flaws)),
}

impl Double {
    const fn new(
        name: &'static str,
        caught_by: &'static [(&'static str, &'static str)],
        defect: fn() -> Defect,
    ) -> Self {
        Self { name, caught_by, make: Make::Around(defect) }
    }

    const fn remote(
        name: &'static str,
        caught_by: &'static [(&'static str, &'static str)],
        flaws: fn(&mut Flaws),
    ) -> Self {
        Self { name, caught_by, make: Make::Remote(flaws) }
    }

    /// A suite that runs against it the checks that must catch it.
    pub fn suite(&self) -> Suite {
        let suite = match self.make {
            Make::Around(defect) => Suite::new(self.name, move || Arc::new(Around::new(defect(), timing(false)))),
            Make::Remote(flaws) => Suite::new(self.name, move || {
                let mut flawed = Flaws::default();
                flaws(&mut flawed);
                Arc::new(Remote::new(flawed, timing(false)))
            }),
        };
        suite.only(self.caught_by.iter().map(|(check, _)| check))
    }
}

impl fmt::Debug for Double {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Double").field("name", &self.name).field("caught_by", &self.caught_by).finish_non_exhaustive()
    }
}

/// Every double.
pub fn doubles() -> impl Iterator<Item = &'static Double> {
    [publish::DOUBLES, deliver::DOUBLES, settle::DOUBLES, life::DOUBLES, remote::DOUBLES].into_iter().flatten()
}

/// The same machinery without a defect: every check must pass, or the doubles prove nothing.
pub fn right() -> [Suite; 2] {
    [
        Suite::new("no defect", || Arc::new(Around::new(Defect::default(), timing(true)))),
        Suite::new("no flaw", || Arc::new(Remote::new(Flaws::default(), timing(true)))).only(remote::CHECKS),
    ]
}

/// What a double that is about leases has.
const LEASE: Duration = Duration::from_millis(200);

/// Times for brokers that answer at once. What a double leaves out is not waited for long; a right
/// one has all the time it may need on a busy machine.
fn timing(right: bool) -> Timing {
    Timing {
        patience: Duration::from_secs(if right { 30 } else { 1 }),
        quiet: Duration::from_millis(60),
        lease: LEASE,
        guard: Duration::from_secs(60),
    }
}

/// The in-process broker with a defect around each of its handles.
#[derive(Debug)]
struct Around {
    right: InProcess,
    defect: Arc<Defect>,
    timing: Timing,
}

impl Around {
    fn new(defect: Defect, timing: Timing) -> Self {
        Self { right: InProcess::new(), defect: Arc::new(defect), timing }
    }

    fn wrap(&self, opened: Result<Arc<dyn Broker>>) -> Result<Arc<dyn Broker>> {
        Ok(Arc::new(Flawed::new(opened?, Arc::clone(&self.defect))))
    }
}

impl Harness for Around {
    fn name(&self) -> String {
        "double".to_owned()
    }

    fn open(&self) -> Result<Arc<dyn Broker>> {
        self.wrap(self.right.open())
    }

    fn place(&self) -> Place {
        Place::InProcess
    }

    fn timing(&self) -> Timing {
        self.timing
    }

    fn retaining(&self) -> Result<Arc<dyn Broker>> {
        self.wrap(self.right.retaining())
    }

    fn secret(&self) -> Option<Secret> {
        self.right.secret()
    }
}
