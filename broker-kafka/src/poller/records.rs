//! Records on their way from the partitions' queues to the member.

use std::time::Duration;

use broker_core::{Error, Topic};
use rdkafka::Offset;
use rdkafka::consumer::Consumer as _;
use rdkafka::message::{BorrowedMessage, Message as _};

use super::Poller;
use crate::batch::{BATCH, Record};
use crate::member::Arrival;
use crate::record::{Copies, Format};
use crate::state::Place;
use crate::wire;

impl Poller {
    pub(super) fn admit_stray(&mut self, record: &BorrowedMessage<'_>) {
        let Ok(topic) = Topic::new(record.topic()) else { return };
        if let Some(place) = self.places.get(&(topic, record.partition())) {
            let Some(record) = Record::of(record) else { return };
            let arrival = arrival(&record, self.admin.config().format, &mut self.copies);
            if let Some(end) = self.member.admit(*place, [arrival]) {
                self.cut(*place, end);
            }
        }
    }

    pub(super) fn read(&mut self) -> bool {
        let mut busy = false;
        let format = self.admin.config().format;
        let (mut arrivals, mut copies) = (std::mem::take(&mut self.arrivals), std::mem::take(&mut self.copies));
        let mut cut = Vec::new();
        for (place, queue) in &self.queues {
            if !self.member.state(|state| state.has_room(*place)) {
                continue;
            }
            let read = queue.read(|record| match record {
                Ok(record) => arrivals.push(arrival(&record, format, &mut copies)),
                Err(error) => self.failed(&error),
            });
            busy |= read == BATCH;
            if !arrivals.is_empty() {
                self.has_read = true;
                let end = self.member.admit(*place, arrivals.drain(..));
                cut.extend(end.map(|end| (*place, end)));
            }
        }
        (self.arrivals, self.copies) = (arrivals, copies);
        cut.into_iter().for_each(|(place, end)| self.cut(place, end));
        busy
    }

    /// The log of a partition does not go on where it was read to, but earlier: its topic was deleted and made again, or its
    /// leader had not all of it (KIP-320). What is there now under the offsets of before are other records, to be delivered.
    /// librdkafka reads on at the end it found, or at the beginning; we go back as far as something is not settled.
    fn cut(&mut self, place: Place, end: i64) {
        let Some((anew, partition, from)) = self.member.state(|state| state.cut(place, end)) else { return };
        let (topic, number) = &partition;
        self.report_error(Err(Error::backend(format!("partition {number} of {topic}: its log was cut at {end}"))));
        // Without waiting: what was read before is left out from now on.
        let sought = self.consumer.seek(topic.as_str(), *number, Offset::Offset(from), Duration::ZERO);
        self.report(sought);
        for (of_queue, _) in &mut self.queues {
            if *of_queue == place {
                *of_queue = anew;
            }
        }
        self.places.insert(partition, anew);
    }
}

fn arrival(record: &Record<'_>, format: Format, copies: &mut Copies) -> Arrival {
    Arrival { offset: record.offset(), decoded: wire::decode(record, format, copies) }
}
