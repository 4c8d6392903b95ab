//! Every check, by letter and number.

mod a_publish;
mod b_groups;
mod c_settlement;
mod d_order;
mod e_life;
mod elsewhere;
mod f_faults;
mod g_extras;

use std::fmt;

use broker_core::{BoxFuture, Broker};

use crate::{Scene, Verdict};

/// A check: one line of the contract, and the function that defends it.
#[derive(Clone, Copy)]
pub struct Check {
    /// Its letter and number, as in `"C5"`.
    pub id: &'static str,
    /// What it shows.
    pub title: &'static str,
    run: for<'a> fn(&'a dyn Broker, &'a Scene) -> BoxFuture<'a, Verdict>,
}

impl Check {
    /// Runs it. It may hang on a broker that does; a [`Suite`](crate::Suite) guards against that.
    ///
    /// # Errors
    ///
    /// What it found wrong.
    pub async fn run(&self, broker: &dyn Broker, scene: &Scene) -> Verdict {
        (self.run)(broker, scene).await
    }
}

impl fmt::Debug for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Check({})", self.id)
    }
}

macro_rules! checks {
    ($($module:ident { $($id:ident $function:ident $title:literal)* })*) => {
        /// The table.
        pub const CHECKS: &[Check] = &[$($(
            Check {
                id: stringify!($id),
                title: $title,
                run: |broker, scene| Box::pin($module::$function(broker, scene)),
            },
        )*)*];
    };
}

checks! {
    a_publish {
        A1 messages_arrive_whole "n messages: same set, payload, headers, key, content type, id"
        A2 payloads_byte_for_byte "empty, JSON and non-UTF-8 payloads byte for byte"
        A3 odd_headers "odd header names, binary values, repeats, many headers: carried or refused, never mangled"
        A4 largest_payload "the largest message is accepted, one byte more is too large"
        A5 no_cross_talk "no cross-talk between topics"
        A6 twenty_topics "20 topics at once"
        A7 fifty_by_fifty "50 publishers by 50 subscribers"
        A8 id_and_timestamp "id and timestamp are set when the caller gave none"
        A9 batches "a batch keeps its order and reports a partial failure per message"
        A10 patterns "pattern subscriptions: *, >, and topics that appear later"
        A11 absent_and_empty_keys "an absent key and an empty key are kept apart"
        A12 publishing_changes_nothing "the publisher's message is not changed by publishing"
        A13 publishing_in_a_handler "publishing from inside a handler does not deadlock"
    }
    b_groups {
        B1 two_groups "two groups each get everything"
        B2 members_split "members of a group split the messages: none twice, none lost, each gets some"
        B3 no_group "without a group, a copy each"
        B4 created_ahead "a group created before its first member keeps what arrives"
        B5 start "a late subscriber sees what its start says"
        B6 unsubscribing "unsubscribing stops delivery and disturbs nobody else"
        B7 members_of_one_process "two members of one group on one handle split, too"
        B8 two_groups_one_process "two groups with handlers in one process: each handler runs once per message"
    }
    c_settlement {
        C1 acked_never_returns "an acked message never returns"
        C2 retry_redelivers "retry redelivers"
        C3 reject_dead_letters "reject does not redeliver, and dead-letters with reason, attempts and origin"
        C4 settled_once "a delivery is settled once"
        C5 acks_are_exact "an ack out of order does not settle earlier messages"
        C6 dropped_comes_back "a delivery dropped unsettled comes back"
        C7 failing_handlers "a handler that panics or errs: the message is retried, the subscription lives"
        C8 attempts_grow "the attempt number grows"
        C9 exhausted "max attempts, then the dead letter, exactly once"
        C10 retry_delay_is_a_floor "a retry delay is a floor"
        C11 cancelled_handler "a cancelled handler settles nothing"
    }
    d_order {
        D1 order_per_key "order per key with several members"
        D2 one_of_a_key "ordered: nothing of a key while one of it is unsettled"
        D3 max_in_flight "at most max_in_flight unsettled"
        D4 slow_groups "a slow or absent member stalls nobody below its group's bound; at it, only who matches it"
        D5 retries_stall_their_key "a retry on one key does not stall the others"
        D6 overflow "a full group pushes back by waiting, refusing or losing, as configured, and counts"
        D7 leaving_keeps_order "what a member of an ordered group holds when it leaves is overtaken by nothing of its key"
    }
    e_life {
        E1 closed "publish and subscribe after close are refused as closed"
        E2 close_twice "close twice is fine"
        E3 close_in_flight "close with an unread and an unsettled delivery ends by its deadline"
        E4 dropping_ends "dropping a subscription ends it"
        E5 cancelling "a cancelled publish is withdrawn or whole, a cancelled subscribe leaves nothing"
        E6 missing_topic "a missing topic, where topics must exist, is not found; elsewhere it is made"
        E7 close_flushes "close flushes every publish"
        E8 before_close "an ack and a publish just before close hold"
        E9 drain "drain: a handler in flight finishes and its ack counts"
        E10 no_io "constructing does no I/O"
        E11 another_runtime "usable from another runtime"
        E12 ten_at_once "ten subscribers subscribing and closing at once"
        E13 reopening "closing and reopening between batches loses nothing"
        E14 close_while_down "close is bounded with the broker down"
    }
    f_faults {
        F1 restarts "the broker restarts twice under load: nothing published to a group is lost"
        F2 lost_connection "a lost connection: groups and consumers come back by themselves"
        F3 members_come_and_go "members join and leave mid-flight: no loss, few duplicates"
        F4 undecodable "a message that cannot be decoded is refused or dead-lettered, and wedges nobody"
        F5 tombstone "a tombstone is delivered as such"
        F6 unroutable "unroutable with require_route is refused as unroutable"
        F7 blocked "a broker that refuses or blocks gives an error or a timeout, never a hang"
        F8 expired "an expired message is not delivered"
        F9 unreachable "an unreachable broker: a clear error within the connect timeout"
    }
    g_extras {
        G1 batch_receive "a batch is received, and settled one by one"
        G2 replay "replay from an offset or a time, where supported"
        G3 traceparent "traceparent survives, a retry and a dead letter included"
        G4 no_credentials "no credential in errors, Debug or status"
        G5 raw_client "the raw client is reachable where an adapter has one"
        G6 in_parallel "many scenes at once do not disturb each other"
        G7 delay_is_a_floor "delayed delivery is a floor"
        G8 capabilities_are_true "what the broker says it can do it does, and refuses the rest"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_has_every_number_of_every_letter_once() {
        let expected = [("A", 13), ("B", 8), ("C", 11), ("D", 7), ("E", 14), ("F", 9), ("G", 8)];
        let expected: Vec<String> =
            expected.iter().flat_map(|(l, n)| (1..=*n).map(move |i| format!("{l}{i}"))).collect();
        let have: Vec<&str> = CHECKS.iter().map(|check| check.id).collect();
        assert_eq!(have, expected);
    }
}
