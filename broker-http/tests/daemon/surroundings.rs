//! What the environment has for others is none of the daemon's: proxies.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::json;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpListener;

use crate::support::{Daemon, command, endpoint, soon};

#[tokio::test]
async fn a_proxy_named_in_the_environment_is_not_asked() {
    let proxy = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", proxy.local_addr().unwrap());
    let asked = Arc::new(AtomicUsize::new(0));
    let counting = Arc::clone(&asked);
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = proxy.accept().await {
            counting.fetch_add(1, Ordering::SeqCst);
            let _ = stream.write_all(b"HTTP/1.1 502 Bad Gateway\r\ncontent-length: 0\r\n\r\n").await;
        }
    });
    let names = ["http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"];
    let proxies: Vec<_> = names.iter().map(|name| (*name, url.as_str())).chain([("no_proxy", "")]).collect();
    let (hook, mut told) = endpoint(&[]).await;
    let daemon = Daemon::start_with(&[], &proxies).await;
    for scheme in ["http", "https"] {
        let spec = json!({"filter": "a", "endpoint": format!("{scheme}://{hook}/"), "retry": {"max_attempts": 1}});
        assert_eq!(daemon.send(&format!("PUT /subscriptions/{scheme}"), &spec.to_string()).await.0, 201);
    }
    // The command line's way to the daemon is as direct.
    let broker = format!("http://{}", daemon.address);
    let published = command(&["pub", "--broker", &broker, "a", "direct"]).envs(proxies.iter().copied()).output();
    let published = soon(published).await.unwrap();
    assert!(published.status.success(), "{}", String::from_utf8_lossy(&published.stderr));
    assert!(soon(told.recv()).await.unwrap().ends_with("direct"));
    // The one over TLS has failed, at the endpoint itself.
    soon(async {
        while !daemon.json("GET /subscriptions/https/attempts", "").await["attempts"][0].is_object() {
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    })
    .await;
    assert_eq!(asked.load(Ordering::SeqCst), 0);
}
