//! Where a push may go: a name is looked up once and dialled as it was checked; nothing leads elsewhere.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use broker_core::Message;
use broker_http::push::{Guard, PushClient};
use tokio::net::TcpListener;

use crate::support::{Endpoint, QUICK, Rig, status};

/// Answers each look-up with the next of these, and the last from then on; counts them.
fn answering(answers: Vec<Vec<SocketAddr>>) -> (PushClient, Arc<AtomicUsize>) {
    let count = Arc::new(AtomicUsize::new(0));
    let counting = Arc::clone(&count);
    let resolver = move |_: &str, port: u16| -> std::io::Result<Vec<SocketAddr>> {
        let index = counting.fetch_add(1, Ordering::SeqCst).min(answers.len() - 1);
        // The port is the endpoint's, whatever it is.
        Ok(answers[index].iter().map(|address| SocketAddr::new(address.ip(), port)).collect())
    };
    (PushClient::new(Guard::new().with_development(true)).with_resolver(resolver), count)
}

fn address(text: &str) -> SocketAddr {
    SocketAddr::new(text.parse().unwrap(), 0)
}

#[tokio::test]
async fn a_second_answer_cannot_change_the_target() {
    let mut endpoint = Endpoint::always(status(200)).await;
    let port = endpoint.url().rsplit(':').next().unwrap().split('/').next().unwrap().to_owned();
    // A name that is harmless when it is looked at, and a private address a moment later.
    let (client, lookups) = answering(vec![vec![address("127.0.0.1")], vec![address("10.0.0.1")]]);
    let rig = Rig::with(&format!("http://hook.example:{port}/"), QUICK, &client).await;
    rig.publish([Message::new("1")]).await;
    endpoint.next().await;
    rig.drained().await;
    assert_eq!(lookups.load(Ordering::SeqCst), 1, "one look-up, checked and dialled");
}

#[tokio::test]
async fn of_a_names_addresses_only_those_allowed_are_dialled() {
    let mut endpoint = Endpoint::always(status(200)).await;
    let port = endpoint.url().rsplit(':').next().unwrap().split('/').next().unwrap().to_owned();
    let refused = ["10.0.0.1", "169.254.169.254", "::ffff:127.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::"];
    let mixed = refused.iter().chain(&["127.0.0.1"]).map(|text| address(text)).collect();
    let (client, _) = answering(vec![mixed]);
    let rig = Rig::with(&format!("http://hook.example:{port}/"), QUICK, &client).await;
    rig.publish([Message::new("1")]).await;
    endpoint.next().await;
    rig.drained().await;

    let (client, _) = answering(vec![refused.iter().map(|text| address(text)).collect()]);
    let rig = Rig::with(&format!("http://hook.example:{port}/"), QUICK, &client).await;
    rig.publish([Message::new("1")]).await;
    let reason = rig.dead(1).await.remove(0).failure.reason().to_owned();
    assert!(reason.contains("10.0.0.1 of hook.example may not be dialled"), "{reason}");
}

#[tokio::test]
async fn a_redirect_is_not_followed() {
    let elsewhere = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let target = elsewhere.local_addr().unwrap();
    let redirecting = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/", redirecting.local_addr().unwrap());
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = redirecting.accept().await.unwrap();
            tokio::spawn(async move {
                let answer = format!(
                    "HTTP/1.1 307 Temporary Redirect\r\nlocation: http://{target}/\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
                );
                let mut heard = [0; 4096];
                let _ = tokio::io::AsyncReadExt::read(&mut stream, &mut heard).await;
                let _ = tokio::io::AsyncWriteExt::write_all(&mut stream, answer.as_bytes()).await;
            });
        }
    });
    let rig = Rig::new(&url, QUICK).await;
    rig.publish([Message::new("1")]).await;
    let dead = rig.dead(1).await.remove(0);
    assert_eq!(dead.failure.status(), Some("307"));
    let followed = tokio::time::timeout(std::time::Duration::from_millis(50), elsewhere.accept()).await;
    assert!(followed.is_err(), "the redirect was followed");
}
