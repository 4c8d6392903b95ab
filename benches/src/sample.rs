//! What one side of one round came to, with the processor time it took.

use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

/// One round of one side: its number, and where the side measures it the processor time of this
/// process for each message. A server in a process of its own is not in it.
///
/// ```
/// use broker_benches::sample::{Sample, Stopwatch};
///
/// let watch = Stopwatch::start();
/// let sample = watch.per_message(1_000);
/// assert!(sample.value > 0.0 && sample.cpu_micros.is_some());
/// assert_eq!(Sample::from(7.0).cpu_micros, None);
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sample {
    /// In the comparison's unit.
    pub value: f64,
    /// Processor time of this process, user and system, in microseconds a message.
    pub cpu_micros: Option<f64>,
}

impl From<f64> for Sample {
    fn from(value: f64) -> Self {
        Self { value, cpu_micros: None }
    }
}

/// Wall clock and processor time of this process (`CLOCK_PROCESS_CPUTIME_ID`: every thread, in
/// nanoseconds) from one moment on.
#[derive(Clone, Copy, Debug)]
pub struct Stopwatch {
    wall: Instant,
    cpu: Duration,
}

impl Stopwatch {
    /// From now on.
    pub fn start() -> Self {
        Self { wall: Instant::now(), cpu: cpu() }
    }

    /// Messages a second since then, and the processor time of each.
    pub fn per_message(self, messages: u64) -> Sample {
        let (wall, cpu) = (self.wall.elapsed(), cpu().saturating_sub(self.cpu));
        let messages = messages as f64;
        Sample { value: messages / wall.as_secs_f64(), cpu_micros: Some(cpu.as_secs_f64() * 1e6 / messages) }
    }
}

fn cpu() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    let (seconds, nanos) = (u64::try_from(time.tv_sec), u32::try_from(time.tv_nsec));
    Duration::new(seconds.unwrap_or(0), nanos.unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sleeping_takes_no_processor_time_and_work_does() {
        let watch = Stopwatch::start();
        let mut sum = 0_u64;
        while cpu() - watch.cpu < Duration::from_millis(20) {
            sum = std::hint::black_box(sum.wrapping_add(1));
        }
        let sample = watch.per_message(10);
        assert!(sample.cpu_micros.unwrap() >= 2_000.0, "{sample:?}");
        assert!(sample.value <= 500.0 * 2.0, "wall time is at least processor time on one thread: {sample:?}");
    }
}
