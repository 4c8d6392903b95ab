//! Descriptors: as many as the daemon may have, and no more connections than they are enough for.

/// How many files and connections this process may have open: all that its hard limit allows, since the
/// soft one (1,024, mostly) is for programs that `select`. `None` where nobody says.
#[cfg(unix)]
pub(super) fn raise() -> Option<u64> {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    // The hard limit may be more than a kernel gives.
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }) {
        tracing::warn!(%error, "the number of open files stays as it is");
    }
    getrlimit(Resource::Nofile).current
}

#[cfg(not(unix))]
pub(super) fn raise() -> Option<u64> {
    None
}

/// The connections that this many descriptors are enough for: a quarter is left for pushes, the broker behind
/// and files.
pub(super) fn connections(descriptors: u64) -> usize {
    usize::try_from((descriptors - descriptors / 4).max(1)).unwrap_or(usize::MAX)
}
