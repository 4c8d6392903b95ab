//! The records of one partition, read many at a time, which takes `unsafe`.
//!
//! rdkafka's safe interface polls one record at a time, and each poll asks for the time, makes an event and takes the
//! partition's lock to say how far the application is. librdkafka's `rd_kafka_consume_batch_queue` does that once for
//! a whole batch. What it costs and gains is in benches/README.md, "Kafka".
//!
//! The queue is the one that rdkafka has split off, as a second handle to it: assignment, seeks and wake-ups stay
//! rdkafka's, and records of an assignment that is gone are left out by librdkafka, as they are from a poll.

#![allow(unsafe_code, reason = "rdkafka has no safe way to read a batch; each use says why it is sound")]

use std::ffi::{CStr, CString};
use std::marker::PhantomData;
use std::mem::ManuallyDrop;
use std::ptr::{self, NonNull};
use std::slice;
use std::sync::Arc;

use rdkafka::bindings;
use rdkafka::consumer::Consumer as _;
use rdkafka::consumer::base_consumer::PartitionQueue;
use rdkafka::error::{KafkaError, KafkaResult};
use rdkafka::message::{BorrowedMessage, Header, Headers, Message, Timestamp};
use rdkafka::types::{RDKafkaHeaders, RDKafkaMessage, RDKafkaQueue, RDKafkaRespErr};

use crate::admin::Partition;
use crate::consumer::{Callbacks, Client};

/// Records read at once at most.
pub(crate) const BATCH: usize = 512;

/// The queue of one partition.
pub(crate) struct Batches {
    queue: NonNull<RDKafkaQueue>,
    /// Keeps the client alive, and calls back when records come; after `queue`, which is given back first.
    _split: PartitionQueue<Callbacks>,
}

// SAFETY: librdkafka's queues may be used from any thread; the handle is counted and belongs to this value alone.
unsafe impl Send for Batches {}

impl Batches {
    /// Splits the partition's queue off the client's; `roused` is called when records come. `None` if it has none.
    pub(crate) fn split(
        consumer: &Arc<Client>,
        (topic, number): &Partition,
        roused: impl Fn() + Send + Sync + 'static,
    ) -> Option<Self> {
        let mut split = consumer.split_partition_queue(topic.as_str(), *number)?;
        split.set_nonempty_callback(roused);
        let name = CString::new(topic.as_str()).ok()?;
        // SAFETY: the client is alive, the name ends with NUL and is only read during the call.
        let queue =
            unsafe { bindings::rd_kafka_queue_get_partition(consumer.client().native_ptr(), name.as_ptr(), *number) };
        Some(Self { queue: NonNull::new(queue)?, _split: split })
    }

    /// Gives up to [`BATCH`] records that are there, or errors, to `take`, waiting for none; tells how many there were.
    pub(crate) fn read(&self, mut take: impl FnMut(KafkaResult<Record<'_>>)) -> usize {
        let mut read = [ptr::null_mut(); BATCH];
        // SAFETY: the queue is this value's; librdkafka fills at most as many places as the array has.
        let count =
            unsafe { bindings::rd_kafka_consume_batch_queue(self.queue.as_ptr(), 0, read.as_mut_ptr(), read.len()) };
        // Negative is an error, of arguments only.
        let count = usize::try_from(count).unwrap_or(0);
        for record in read.iter().take(count).filter_map(|record| NonNull::new(*record)) {
            take(Record { record, queue: PhantomData }.checked());
        }
        count
    }
}

impl Drop for Batches {
    fn drop(&mut self) {
        // SAFETY: the handle is this value's and is used no more; the client outlives it in `_split`.
        unsafe { bindings::rd_kafka_queue_destroy(self.queue.as_ptr()) }
    }
}

/// A record as librdkafka lends it, given back when dropped: before its queue, and with it the client, goes.
pub(crate) struct Record<'a> {
    record: NonNull<RDKafkaMessage>,
    queue: PhantomData<&'a Batches>,
}

impl<'a> Record<'a> {
    /// A record of rdkafka's, which stays its own: read as ours are.
    pub(crate) fn of(message: &'a BorrowedMessage<'_>) -> Option<ManuallyDrop<Self>> {
        Some(ManuallyDrop::new(Record { record: NonNull::new(message.ptr())?, queue: PhantomData }))
    }

    fn fields(&self) -> &RDKafkaMessage {
        // SAFETY: librdkafka gave this record away; it is valid and unchanged until it is destroyed.
        unsafe { self.record.as_ref() }
    }

    /// What is no record is an error, as rdkafka says it.
    fn checked(self) -> KafkaResult<Self> {
        match self.fields().err {
            RDKafkaRespErr::RD_KAFKA_RESP_ERR_NO_ERROR => Ok(self),
            RDKafkaRespErr::RD_KAFKA_RESP_ERR__PARTITION_EOF => Err(KafkaError::PartitionEOF(self.fields().partition)),
            error @ RDKafkaRespErr::RD_KAFKA_RESP_ERR__FATAL => Err(KafkaError::MessageConsumptionFatal(error.into())),
            error => Err(KafkaError::MessageConsumption(error.into())),
        }
    }

    /// # Safety
    ///
    /// `bytes` is null, or that many bytes of this record.
    unsafe fn part(&self, bytes: *const std::ffi::c_void, length: usize) -> Option<&[u8]> {
        // SAFETY: the caller's promise; they live as long as the record.
        (!bytes.is_null()).then(|| unsafe { slice::from_raw_parts(bytes.cast(), length) })
    }
}

impl Drop for Record<'_> {
    fn drop(&mut self) {
        // SAFETY: it is ours, and used no more.
        unsafe { bindings::rd_kafka_message_destroy(self.record.as_ptr()) }
    }
}

impl Message for Record<'_> {
    type Headers = RecordHeaders;

    fn key(&self) -> Option<&[u8]> {
        // SAFETY: both are the record's own fields.
        unsafe { self.part(self.fields().key, self.fields().key_len) }
    }

    fn payload(&self) -> Option<&[u8]> {
        // SAFETY: both are the record's own fields.
        unsafe { self.part(self.fields().payload, self.fields().len) }
    }

    /// Nobody changes a record.
    unsafe fn payload_mut(&mut self) -> Option<&mut [u8]> {
        None
    }

    fn topic(&self) -> &str {
        // SAFETY: a record that is no error has a topic; its name ends with NUL and lives as long as the topic, which the
        // record keeps alive.
        let name = unsafe { CStr::from_ptr(bindings::rd_kafka_topic_name(self.fields().rkt)) };
        name.to_str().unwrap_or_default()
    }

    fn partition(&self) -> i32 {
        self.fields().partition
    }

    fn offset(&self) -> i64 {
        self.fields().offset
    }

    fn timestamp(&self) -> Timestamp {
        use bindings::rd_kafka_timestamp_type_t::*;
        let mut kind = RD_KAFKA_TIMESTAMP_NOT_AVAILABLE;
        // SAFETY: the record is valid, and `kind` is there to be written to.
        let millis = unsafe { bindings::rd_kafka_message_timestamp(self.record.as_ptr(), &mut kind) };
        match kind {
            RD_KAFKA_TIMESTAMP_CREATE_TIME if millis != -1 => Timestamp::CreateTime(millis),
            RD_KAFKA_TIMESTAMP_LOG_APPEND_TIME if millis != -1 => Timestamp::LogAppendTime(millis),
            _ => Timestamp::NotAvailable,
        }
    }

    fn headers(&self) -> Option<&RecordHeaders> {
        let mut headers: *mut RDKafkaHeaders = ptr::null_mut();
        // SAFETY: the record is valid, and `headers` is there to be written to. They are the record's own, are changed by
        // nobody while it is borrowed, and `RecordHeaders` has no bytes that could be read.
        unsafe {
            match bindings::rd_kafka_message_headers(self.record.as_ptr(), &mut headers) {
                RDKafkaRespErr::RD_KAFKA_RESP_ERR_NO_ERROR => headers.cast::<RecordHeaders>().as_ref(),
                _ => None,
            }
        }
    }
}

/// The headers of a record; only ever behind a reference to librdkafka's own.
#[repr(C)]
pub(crate) struct RecordHeaders([u8; 0]);

impl RecordHeaders {
    /// Name and value as they are: a name is anybody's bytes. A value that is null is empty.
    pub(crate) fn bytes(&self, index: usize) -> Option<(&[u8], &[u8])> {
        let (mut name, mut value, mut length) = (ptr::null(), ptr::null(), 0);
        // SAFETY: the reference was made of valid headers; name and value are theirs, the name ends with NUL, and the
        // value has that many bytes.
        unsafe {
            match bindings::rd_kafka_header_get_all(self.native(), index, &mut name, &mut value, &mut length) {
                RDKafkaRespErr::RD_KAFKA_RESP_ERR_NO_ERROR => {
                    let value = if value.is_null() { &[][..] } else { slice::from_raw_parts(value.cast(), length) };
                    Some((CStr::from_ptr(name).to_bytes(), value))
                }
                _ => None,
            }
        }
    }

    fn native(&self) -> *const RDKafkaHeaders {
        ptr::from_ref(self).cast()
    }
}

impl Headers for RecordHeaders {
    fn count(&self) -> usize {
        // SAFETY: the reference was made of valid headers.
        unsafe { bindings::rd_kafka_header_cnt(self.native()) }
    }

    /// `None` also where the name is not UTF-8.
    fn try_get(&self, index: usize) -> Option<Header<'_, &[u8]>> {
        let (name, value) = self.bytes(index)?;
        Some(Header { key: std::str::from_utf8(name).ok()?, value: Some(value) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a record of somebody else's may have: rdkafka panics at the second.
    #[test]
    fn the_name_of_a_header_is_anybodys_bytes() {
        // SAFETY: the headers are made here, read while they are there, and destroyed; names and values have the lengths
        // that are said, and are copied.
        unsafe {
            let native = bindings::rd_kafka_headers_new(2);
            for (name, value) in [(&b"x"[..], &b"1"[..]), (b"\xff\xfe", b"2")] {
                bindings::rd_kafka_header_add(
                    native,
                    name.as_ptr().cast(),
                    name.len() as isize,
                    value.as_ptr().cast(),
                    value.len() as isize,
                );
            }
            let headers = native.cast::<RecordHeaders>().as_ref().unwrap();
            assert_eq!(headers.count(), 2);
            assert_eq!(headers.try_get(0).map(|header| (header.key, header.value)), Some(("x", Some(&b"1"[..]))));
            assert!(headers.try_get(1).is_none());
            assert_eq!(headers.bytes(1), Some((&b"\xff\xfe"[..], &b"2"[..])));
            assert_eq!(headers.bytes(2), None);
            bindings::rd_kafka_headers_destroy(native);
        }
    }
}
