//! What the server's and librdkafka's errors mean in the contract's words.

use broker_core::{Error, ErrorKind};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};

/// The kind of a Kafka protocol error code (as listed in "Kafka protocol guide, Error codes"); codes
/// that are not named are [`Backend`](ErrorKind::Backend).
///
/// ```
/// use broker_core::ErrorKind;
/// assert_eq!(broker_kafka::error_kind(10), ErrorKind::TooLarge);
/// ```
pub fn error_kind(code: i16) -> ErrorKind {
    match code {
        // UNKNOWN_TOPIC_OR_PARTITION, GROUP_ID_NOT_FOUND
        3 | 69 => ErrorKind::NotFound,
        // LEADER_NOT_AVAILABLE, NOT_LEADER_OR_FOLLOWER, BROKER_NOT_AVAILABLE, REPLICA_NOT_AVAILABLE
        5 | 6 | 8 | 9 => ErrorKind::Unavailable,
        // NETWORK_EXCEPTION, COORDINATOR_LOAD_IN_PROGRESS, COORDINATOR_NOT_AVAILABLE, NOT_COORDINATOR
        13..=16 => ErrorKind::Unavailable,
        // NOT_ENOUGH_REPLICAS, NOT_ENOUGH_REPLICAS_AFTER_APPEND
        19 | 20 => ErrorKind::Unavailable,
        // ILLEGAL_GENERATION, UNKNOWN_MEMBER_ID, REBALANCE_IN_PROGRESS: the group moves on by itself
        22 | 25 | 27 => ErrorKind::Unavailable,
        // CONCURRENT_TRANSACTIONS: the one before is just being ended
        51 => ErrorKind::Unavailable,
        // OUT_OF_ORDER_SEQUENCE_NUMBER, UNKNOWN_PRODUCER_ID: the server has lost count of the producer's batches; a new
        // producer begins from 0
        45 | 59 => ErrorKind::Unavailable,
        // KAFKA_STORAGE_ERROR, FENCED_LEADER_EPOCH, UNKNOWN_LEADER_EPOCH, OFFSET_NOT_AVAILABLE,
        // UNSTABLE_OFFSET_COMMIT, THROTTLING_QUOTA_EXCEEDED
        56 | 74 | 75 | 78 | 88 | 89 => ErrorKind::Unavailable,
        // REQUEST_TIMED_OUT
        7 => ErrorKind::Timeout,
        // MESSAGE_TOO_LARGE, RECORD_LIST_TOO_LARGE
        10 | 18 => ErrorKind::TooLarge,
        // INVALID_TOPIC_EXCEPTION, INVALID_PARTITIONS, INVALID_REPLICATION_FACTOR,
        // INVALID_REPLICA_ASSIGNMENT, INVALID_CONFIG, INVALID_RECORD, INVALID_TIMESTAMP
        17 | 32 | 37..=40 | 87 => ErrorKind::Invalid,
        // TOPIC_, GROUP_ and CLUSTER_AUTHORIZATION_FAILED, UNSUPPORTED_SASL_MECHANISM,
        // ILLEGAL_SASL_STATE, TRANSACTIONAL_ID_AUTHORIZATION_FAILED, SASL_AUTHENTICATION_FAILED
        29..=31 | 33 | 34 | 53 | 58 => ErrorKind::Unauthorized,
        // UNSUPPORTED_VERSION
        35 => ErrorKind::Unsupported,
        // TOPIC_ALREADY_EXISTS, NON_EMPTY_GROUP; another has the same transactional.id or group.instance.id:
        // INVALID_PRODUCER_EPOCH, FENCED_INSTANCE_ID, PRODUCER_FENCED
        36 | 68 | 47 | 82 | 90 => ErrorKind::Conflict,
        _ => ErrorKind::Backend,
    }
}

/// The kind of an error code of librdkafka, whose own are negative.
pub(crate) fn code_kind(code: RDKafkaErrorCode) -> ErrorKind {
    match code {
        RDKafkaErrorCode::MessageTimedOut | RDKafkaErrorCode::OperationTimedOut => ErrorKind::Timeout,
        RDKafkaErrorCode::BrokerTransportFailure
        | RDKafkaErrorCode::AllBrokersDown
        | RDKafkaErrorCode::Resolve
        | RDKafkaErrorCode::QueueFull
        | RDKafkaErrorCode::WaitingForCoordinator
        | RDKafkaErrorCode::InProgress
        | RDKafkaErrorCode::State
        | RDKafkaErrorCode::NoOffset
        | RDKafkaErrorCode::AssignmentLost => ErrorKind::Unavailable,
        // No trust between us and the server: its certificate, or what we prove.
        RDKafkaErrorCode::Authentication | RDKafkaErrorCode::SSL => ErrorKind::Unauthorized,
        RDKafkaErrorCode::Fenced => ErrorKind::Conflict,
        RDKafkaErrorCode::UnknownTopic | RDKafkaErrorCode::UnknownPartition | RDKafkaErrorCode::UnknownGroup => {
            ErrorKind::NotFound
        }
        RDKafkaErrorCode::PurgeQueue | RDKafkaErrorCode::PurgeInflight => ErrorKind::Closed,
        RDKafkaErrorCode::InvalidArgument => ErrorKind::Invalid,
        code => i16::try_from(code as i32).map_or(ErrorKind::Backend, error_kind),
    }
}

/// Whether it is of a connection, which is made anew by itself.
pub(crate) fn is_of_connection(code: RDKafkaErrorCode) -> bool {
    matches!(
        code,
        RDKafkaErrorCode::AllBrokersDown
            | RDKafkaErrorCode::BrokerTransportFailure
            | RDKafkaErrorCode::Resolve
            | RDKafkaErrorCode::Authentication
            | RDKafkaErrorCode::SSL
    )
}

/// An error of librdkafka met while doing `what`.
pub(crate) fn failed(what: impl std::fmt::Display, error: &KafkaError) -> Error {
    match error.rdkafka_error_code() {
        Some(code) => coded(what, code),
        None => Error::backend(format!("{what}: {error}")),
    }
}

/// The error that a client of librdkafka ended with: the one that takes its place may do better, unless it is refused for
/// what we are.
pub(crate) fn fatal(code: RDKafkaErrorCode, why: &str) -> Error {
    let kind = match code_kind(code) {
        kind @ (ErrorKind::Unauthorized | ErrorKind::Unsupported) => kind,
        _ => ErrorKind::Unavailable,
    };
    Error::new(kind, format!("the client had to be replaced, so it may have been written or not: {why}"))
}

/// An error code of librdkafka met while doing `what`.
pub(crate) fn coded(what: impl std::fmt::Display, code: RDKafkaErrorCode) -> Error {
    let advice = match code {
        RDKafkaErrorCode::InvalidTimestamp => {
            "; the topic's message.timestamp.after.max.ms (an hour, unless it is set) and message.timestamp.before.max.ms say \
             how far a message's time may be from the server's"
        }
        _ => "",
    };
    Error::new(code_kind(code), format!("{what}: {code}{advice}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_passes_by_itself_is_worth_another_try() {
        for code in [5, 6, 7, 15, 19, 27, 45, 56] {
            assert!(Error::new(error_kind(code), "").is_retryable(), "{code}");
        }
        for code in [3, 10, 17, 29, 35, 36, 58, -1, i16::MAX] {
            assert!(!Error::new(error_kind(code), "").is_retryable(), "{code}");
        }
        for code in [RDKafkaErrorCode::MessageTimedOut, RDKafkaErrorCode::BrokerTransportFailure] {
            assert!(Error::new(code_kind(code), "").is_retryable(), "{code}");
        }
        assert_eq!(code_kind(RDKafkaErrorCode::MessageSizeTooLarge), ErrorKind::TooLarge);
    }
}
