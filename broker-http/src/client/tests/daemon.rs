//! The client and a daemon in this process, over a real socket.

use std::sync::Arc;
use std::time::Duration;

use broker_core::{
    Backlog, Broker, BrokerExt, ErrorKind, Group, GroupName, GroupOptions, MemoryBroker, Message, Overflow,
    PublisherOptions, Subscribe, TopicFilter,
};
use futures_util::FutureExt;
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;
use tokio::net::TcpListener;

use super::{broker, soon, topic};
use crate::client::HttpBroker;
use crate::event::arbitrary;
use crate::{Server, ServerOptions};

async fn daemon() -> (Server, HttpBroker) {
    let server = Server::new(Arc::new(MemoryBroker::new()), ServerOptions::new().with_development(true));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let serving = server.clone();
    tokio::spawn(async move { serving.serve(listener).await.unwrap() });
    (server, broker(address, ""))
}

/// Any messages the contract allows, that are delivered now.
fn messages(count: usize) -> Vec<Message> {
    let mut runner = TestRunner::default();
    let strategy = arbitrary::message().prop_filter("delivered now and not deduplicated", |message| {
        message.deliver_at().is_none() && message.expires_at().is_none() && message.dedup_key().is_none()
    });
    (0..count).map(|_| strategy.new_tree(&mut runner).unwrap().current()).collect()
}

#[tokio::test]
async fn every_message_arrives_as_it_was_published_alone_and_in_batches() {
    let (_server, broker) = daemon().await;
    soon(broker.connect()).await.unwrap();
    let topic = topic("orders.created");
    let mut subscription = soon(broker.subscribe(&TopicFilter::from(&topic), Subscribe::new())).await.unwrap();
    let messages = messages(100);
    let publisher = broker.publisher(&topic, PublisherOptions::new()).unwrap();
    for message in &messages[..50] {
        let receipt = soon(publisher.publish(message.clone())).await.unwrap();
        assert_eq!((&receipt.id, receipt.matched), (message.id(), Some(1)));
    }
    for result in soon(publisher.publish_batch(messages[50..].to_vec())).await.unwrap() {
        result.unwrap();
    }
    for message in &messages {
        let delivery = soon(subscription.next()).await.unwrap().unwrap();
        assert_eq!(delivery.message(), message);
        assert_eq!(delivery.topic(), &topic);
        soon(delivery.ack()).await.unwrap();
    }
    assert!(soon(broker.close(Duration::from_secs(10))).await.complete);
}

#[tokio::test]
async fn a_group_is_what_it_is_elsewhere() {
    let (server, broker) = daemon().await;
    let group: Group = "billing@orders.>".parse().unwrap();
    let options = GroupOptions::new().with_backlog(Backlog::default().with_max_messages(3).unwrap());
    assert!(soon(broker.create_group(&group, options.clone())).await.unwrap());
    assert!(!soon(broker.create_group(&group, options)).await.unwrap());
    let other = GroupOptions::new().with_ordered(true);
    assert_eq!(soon(broker.create_group(&group, other)).await.unwrap_err().kind(), ErrorKind::Conflict);

    // The same group, joined inside the daemon's process.
    let inside = Subscribe::group(GroupName::new("billing").unwrap());
    let mut member = soon(server.broker().subscribe(&group.filter, inside)).await.unwrap();
    soon(broker.publish(&topic("orders.created"), Message::new("1"))).await.unwrap();
    soon(soon(member.next()).await.unwrap().unwrap().ack()).await.unwrap();
    drop(member);

    let overflow = GroupOptions::new()
        .with_backlog(Backlog::default().with_max_messages(1).unwrap().with_overflow(Overflow::Reject));
    soon(broker.alter_group(&group, overflow)).await.unwrap();
    soon(broker.publish(&topic("orders.created"), Message::new("2"))).await.unwrap();
    let full = soon(broker.publish(&topic("orders.created"), Message::new("3"))).await.unwrap_err();
    assert_eq!(full.kind(), ErrorKind::Unavailable);
    assert!(full.retry_after().is_some() && full.message().contains("billing"), "{full}");
    let status = soon(broker.status()).await.unwrap();
    assert_eq!(status.group(&group).unwrap().lag, Some(1));
    assert_eq!(soon(broker.purge_group(&group)).await.unwrap(), 1);
    assert!(soon(broker.delete_group(&group)).await.unwrap());
    assert!(!soon(broker.delete_group(&group)).await.unwrap());
    assert_eq!(soon(broker.purge_group(&group)).await.unwrap_err().kind(), ErrorKind::NotFound);
}

#[tokio::test]
async fn dead_letters_are_listed_redriven_and_purged() {
    let (_server, broker) = daemon().await;
    let group: Group = "billing@orders".parse().unwrap();
    let mut member = soon(broker.subscribe(&group.filter, Subscribe::group(group.name.clone()))).await.unwrap();
    let message = Message::new(&b"\xff\x00"[..]).with_key("").with_header("Odd Näme", &b"\xfe"[..]).unwrap();
    soon(broker.publish(&topic("orders"), message.clone())).await.unwrap();
    soon(soon(member.next()).await.unwrap().unwrap().reject("no such customer")).await.unwrap();
    let dead = soon(async {
        loop {
            let dead = broker.dead_letters(&group, 10).await.unwrap();
            if !dead.is_empty() {
                return dead;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    assert_eq!(dead[0].message, message);
    assert_eq!(dead[0].failure.reason(), "no such customer");
    assert_eq!((&dead[0].topic, dead[0].group.as_ref(), dead[0].attempts), (&topic("orders"), Some(&group), 1));
    assert_eq!(soon(broker.redrive(&group, 10)).await.unwrap(), 1);
    let again = soon(member.next()).await.unwrap().unwrap();
    assert_eq!((again.message(), again.attempt()), (&message, 1));
    soon(again.reject("still not")).await.unwrap();
    soon(async {
        while broker.purge_dead_letters(&group).await.unwrap() == 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}

#[tokio::test]
async fn an_idle_member_keeps_nothing_from_the_others() {
    let (_server, broker) = daemon().await;
    let filter = TopicFilter::new("t").unwrap();
    let join = || broker.subscribe(&filter, Subscribe::group(GroupName::new("g").unwrap()));
    let mut idle = soon(join()).await.unwrap();
    let mut busy = soon(join()).await.unwrap();
    for n in 0..20 {
        soon(broker.publish(&topic("t"), Message::new(n.to_string()))).await.unwrap();
    }
    let held = soon(idle.next()).await.unwrap().unwrap();
    for _ in 0..19 {
        soon(soon(busy.next()).await.unwrap().unwrap().ack()).await.unwrap();
    }
    soon(held.ack()).await.unwrap();
    soon(idle.close()).await.unwrap();
}

/// Outside of a runtime there is an error, inside of another one it works, and at the end of one
/// nobody is left waiting.
#[test]
fn a_broker_outlives_its_runtimes() {
    let runtime = || tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let serving = runtime();
    let (_server, broker) = serving.block_on(daemon());
    let filter = TopicFilter::new("t").unwrap();
    let outside = broker.publish(&topic("t"), Message::new("0"));
    let first = runtime();
    assert_eq!(first.block_on(soon(outside)).unwrap_err().kind(), ErrorKind::Invalid);
    let mut subscription =
        first.block_on(soon(broker.subscribe(&filter, Subscribe::group(GroupName::new("g").unwrap())))).unwrap();
    first.block_on(async { soon(broker.publish(&topic("t"), Message::new("1"))).await }).unwrap();
    let held = first.block_on(soon(subscription.next())).unwrap().unwrap();
    // The pull that waits now ends with its runtime.
    assert!(first.block_on(async { subscription.next().now_or_never() }).is_none());
    drop(first);
    let second = runtime();
    second.block_on(async { soon(broker.publish(&topic("t"), Message::new("2"))).await }).unwrap();
    let next = second.block_on(soon(subscription.next())).unwrap().unwrap();
    assert_eq!(next.message().payload().as_ref(), b"2");
    second.block_on(async { soon(next.ack()).await }).unwrap();
    // Dropped where no task can be started: the lease ends by itself.
    drop(held);
    second.spawn(async move {
        let _subscription = subscription;
        std::future::pending::<()>().await;
    });
    drop(second);
    assert!(runtime().block_on(soon(broker.close(Duration::from_secs(5)))).complete);
}

#[tokio::test]
async fn what_is_unroutable_too_large_or_beyond_the_calendar_is_refused() {
    let (_server, broker) = daemon().await;
    let publisher = broker.publisher(&topic("nobody"), PublisherOptions::new().with_require_route(true)).unwrap();
    assert_eq!(soon(publisher.publish(Message::new("1"))).await.unwrap_err().kind(), ErrorKind::Unroutable);
    let large = Message::new(vec![0; (1 << 20) + 1]);
    assert_eq!(soon(publisher.publish(large)).await.unwrap_err().kind(), ErrorKind::TooLarge);
    let late = Message::new("1").with_expires_at(broker_core::Timestamp::from_millis(i64::MAX));
    let results = soon(publisher.publish_batch(vec![late, Message::new("2")])).await.unwrap();
    assert_eq!(results[0].as_ref().unwrap_err().kind(), ErrorKind::Invalid);
    assert_eq!(results[1].as_ref().unwrap_err().kind(), ErrorKind::Unroutable);
}
