//! Two futures in one task that wake each other: a request, and the connection it goes over.
//!
//! By the task's own waker each of these wake-ups would run the task once more, which has just done what it was woken for. So
//! each has a waker of its own: while the task is at work on them a wake-up is noted, and whoever was woken is polled before the
//! task rests; only then does it wake the task.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::task::{Context, Poll, Wake, Waker};

/// How often both are looked at before other tasks have their turn. A future that has used up its
/// [budget](tokio::task::coop) wakes itself until then.
const TURNS: usize = 8;

/// The wakers of the two, made for one task.
pub(crate) struct Wakers {
    task: Waker,
    request: Note,
    connection: Note,
}

impl Wakers {
    pub(crate) fn new(task: &Waker) -> Self {
        Self { task: task.clone(), request: Note::new(task), connection: Note::new(task) }
    }

    /// Whether they are for this task.
    pub(crate) fn are_of(&self, task: &Waker) -> bool {
        self.task.will_wake(task)
    }

    /// There is another request: both are to be polled.
    pub(crate) fn begin(&self) {
        self.request.note();
        self.connection.note();
    }

    /// Polls whichever of the two was woken, until neither is. Ready when the request is; `connection` is ready when it has
    /// ended.
    pub(crate) fn poll<T>(
        &self,
        mut request: Pin<&mut impl Future<Output = T>>,
        mut connection: impl FnMut(&mut Context<'_>) -> Poll<()>,
    ) -> Poll<T> {
        for _ in 0..TURNS {
            if self.request.was_woken()
                && let Poll::Ready(output) = request.as_mut().poll(&mut self.request.context())
            {
                return Poll::Ready(output);
            }
            if self.connection.was_woken() && connection(&mut self.connection.context()).is_ready() {
                // It has nobody left to wake, and the request is to hear of it.
                self.request.note();
            }
            if self.request.rests() && self.connection.rests() {
                return Poll::Pending;
            }
        }
        self.task.wake_by_ref();
        Poll::Pending
    }
}

/// A wake-up is for the task.
const RESTS: u8 = 0;
/// The task is at work, and looks for wake-ups before it rests.
const AT_WORK: u8 = 1;
/// There was a wake-up.
const WOKEN: u8 = 2;

/// One of the two, and whether it was woken.
struct Note {
    state: Arc<State>,
    waker: Waker,
}

struct State {
    task: Waker,
    now: AtomicU8,
}

impl Note {
    fn new(task: &Waker) -> Self {
        let state = Arc::new(State { task: task.clone(), now: AtomicU8::new(WOKEN) });
        Self { waker: Waker::from(Arc::clone(&state)), state }
    }

    fn context(&self) -> Context<'_> {
        Context::from_waker(&self.waker)
    }

    fn note(&self) {
        self.state.now.store(WOKEN, Ordering::Release);
    }

    /// Whether it was woken since this was asked.
    fn was_woken(&self) -> bool {
        self.state.now.swap(AT_WORK, Ordering::AcqRel) == WOKEN
    }

    /// Rests, unless it was woken.
    fn rests(&self) -> bool {
        let rested = self.state.now.compare_exchange(AT_WORK, RESTS, Ordering::AcqRel, Ordering::Acquire);
        rested != Err(WOKEN)
    }
}

impl Wake for State {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if self.now.swap(WOKEN, Ordering::AcqRel) == RESTS {
            self.task.wake_by_ref();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::pin::pin;
    use std::sync::atomic::AtomicUsize;
    use std::time::Duration;

    use super::*;

    /// A task that counts its wake-ups.
    #[derive(Default)]
    struct Task(AtomicUsize);

    impl Wake for Task {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn task() -> (Arc<Task>, Wakers) {
        let task = Arc::new(Task::default());
        let wakers = Wakers::new(&Waker::from(Arc::clone(&task)));
        (task, wakers)
    }

    #[test]
    fn wake_ups_within_the_task_are_polled_and_wake_nobody() {
        let (task, wakers) = task();
        let (mut asked, mut of_request) = (0, None);
        let mut request = pin!(poll_fn(|cx| {
            asked += 1;
            of_request = Some(cx.waker().clone());
            Poll::<()>::Pending
        }));
        let mut of_connection = None;
        let mut driven = 0;
        let polled = wakers.poll(request.as_mut(), |cx| {
            driven += 1;
            of_connection = Some(cx.waker().clone());
            if driven == 1 {
                // It hears of something at once.
                cx.waker().wake_by_ref();
            }
            Poll::Pending
        });
        assert!(polled.is_pending());
        assert_eq!((driven, task.0.load(Ordering::Relaxed)), (2, 0));
        // At rest: now the task is woken, once, and only who was woken is polled.
        let of_connection = of_connection.unwrap();
        of_connection.wake_by_ref();
        of_connection.wake_by_ref();
        assert_eq!(task.0.load(Ordering::Relaxed), 1);
        let mut again = 0;
        let polled = wakers.poll(request.as_mut(), |_| {
            again += 1;
            Poll::Pending
        });
        assert!(polled.is_pending());
        assert_eq!((asked, again, of_request.is_some()), (1, 1, true));
    }

    #[test]
    fn a_request_hears_that_its_connection_ended() {
        let (_, wakers) = task();
        let mut asked = 0;
        let mut request = pin!(poll_fn(|_| {
            asked += 1;
            if asked == 2 { Poll::Ready("ended") } else { Poll::Pending }
        }));
        assert_eq!(wakers.poll(request.as_mut(), |_| Poll::Ready(())), Poll::Ready("ended"));
    }

    /// As one does that has used up its budget.
    #[test]
    fn who_wakes_itself_for_ever_lets_others_have_their_turn() {
        let (task, wakers) = task();
        let mut request = pin!(poll_fn(|cx| {
            cx.waker().wake_by_ref();
            Poll::<()>::Pending
        }));
        for turn in 1..4 {
            assert!(wakers.poll(request.as_mut(), |_| Poll::Pending).is_pending());
            assert_eq!(task.0.load(Ordering::Relaxed), turn);
        }
    }

    /// Wake-ups from elsewhere, at any moment: none is lost, or this hangs.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn no_wake_up_from_elsewhere_is_lost() {
        const TIMES: usize = 100_000;
        let (asking, mut asked) = tokio::sync::mpsc::unbounded_channel::<usize>();
        let (answering, mut answers) = tokio::sync::mpsc::unbounded_channel::<usize>();
        let echo = tokio::spawn(async move {
            while let Some(number) = asked.recv().await {
                answering.send(number).unwrap();
            }
        });
        let both = async {
            let mut wakers = None;
            for number in 0..TIMES {
                let (telling, told) = tokio::sync::oneshot::channel();
                let mut telling = Some(telling);
                let mut request = pin!(async {
                    asking.send(number).unwrap();
                    told.await.unwrap()
                });
                let mut begins = true;
                let heard = poll_fn(|cx| {
                    let wakers = wakers.get_or_insert_with(|| Wakers::new(cx.waker()));
                    assert!(wakers.are_of(cx.waker()));
                    if std::mem::take(&mut begins) {
                        wakers.begin();
                    }
                    wakers.poll(request.as_mut(), |cx| {
                        while let Poll::Ready(answer) = answers.poll_recv(cx) {
                            telling.take().unwrap().send(answer.unwrap()).unwrap();
                        }
                        Poll::Pending
                    })
                })
                .await;
                assert_eq!(heard, number);
            }
        };
        tokio::time::timeout(Duration::from_secs(60), both).await.unwrap();
        drop(asking);
        echo.await.unwrap();
    }
}
