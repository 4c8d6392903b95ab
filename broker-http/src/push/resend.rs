//! When a request is sent again within the same attempt.

use super::connection::Broken;

/// How often in a row, while the endpoint answers nothing to anybody.
const IN_VAIN: u32 = 3;

/// What one attempt has sent again.
///
/// Connections end in the ordinary course of things, some after so many requests each, and what waits on one then was
/// not processed: that is no attempt however often it happens, as long as the endpoint answers something in between.
/// One that refuses whatever it is sent would be asked without end; it answers nothing, and a few times are enough.
/// The time of the attempt bounds all of it.
pub(crate) struct Resends {
    /// Answers the endpoint had given when the request was sent last.
    answers: u64,
    in_vain: u32,
    stale: bool,
}

impl Resends {
    pub(crate) fn new(answers: u64) -> Self {
        Self { answers, in_vain: 0, stale: false }
    }

    /// Whether a request that broke like this is sent again, the endpoint having given so many answers by now.
    pub(crate) fn is_free(&mut self, broken: &Broken, answers: u64) -> bool {
        match broken {
            Broken::Unseen => {
                self.in_vain = if answers == self.answers { self.in_vain + 1 } else { 0 };
                self.answers = answers;
                self.in_vain <= IN_VAIN
            }
            // Most likely unseen, but a request that crashes the endpoint looks the same: only once.
            Broken::Stale => !std::mem::replace(&mut self.stale, true),
            Broken::Failed(_) => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_not_seen_is_sent_again_as_long_as_there_are_answers() {
        let mut resends = Resends::new(7);
        assert!((8..1000).all(|answers| resends.is_free(&Broken::Unseen, answers)));
    }

    #[test]
    fn without_an_answer_in_between_it_is_sent_again_a_few_times() {
        let mut resends = Resends::new(7);
        assert!((0..IN_VAIN).all(|_| resends.is_free(&Broken::Unseen, 7)));
        assert!(!resends.is_free(&Broken::Unseen, 7));
        assert!(resends.is_free(&Broken::Unseen, 8));
    }

    #[test]
    fn what_may_have_been_seen_is_sent_again_once() {
        let mut resends = Resends::new(0);
        assert!(resends.is_free(&Broken::Stale, 1));
        assert!(!resends.is_free(&Broken::Stale, 2));
        assert!(!resends.is_free(&Broken::Failed("reset".into()), 3));
    }
}
