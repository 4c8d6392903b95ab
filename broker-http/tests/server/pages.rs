//! Web pages of allowed origins: a browser lets them read an answer that says so, and only that.

use broker_http::{Access, Action, Identity, Limits, ServerOptions, TokenHash};
use bytes::Bytes;
use http::Request;
use http_body_util::Empty;
use hyper_util::rt::{TokioExecutor, TokioIo};

use crate::support::{Reply, Running, soon};

const PAGE: &str = "https://app.example.com";

fn identity(name: &str) -> Identity {
    Identity::new(name).unwrap().with_token(TokenHash::of(name))
}

async fn guarded(change: impl FnOnce(&mut Limits)) -> Running {
    let mut limits = Limits::default();
    change(&mut limits);
    let filter = |text: &str| text.parse().unwrap();
    let access = Access::new([
        identity("ops").allowing([Action::Publish, Action::Admin], [filter(">")]),
        identity("slow").allowing([Action::Publish], [filter("a")]).with_rate(0.01, 1),
    ]);
    let options = ServerOptions::new().with_access(access.unwrap()).with_allowed_origins([PAGE]);
    Running::with(options.with_limits(limits)).await
}

async fn ask(running: &Running, origin: &str, who: &str, request: &str, body: &str) -> Reply {
    let bearer = format!("Bearer {who}");
    running.send(request, &[("origin", origin), ("authorization", bearer.as_str())], body).await
}

#[tokio::test]
async fn a_page_that_may_ask_can_read_every_answer() {
    let running = guarded(|limits| limits.uri_bytes = 200).await;
    let (long, large) = (format!("GET /topics?{}", "x".repeat(300)), "x".repeat(3 << 20));
    for (who, request, body, status) in [
        ("ops", "POST /topics/a", "x", 202),
        ("ops", "PUT /subscriptions/q", r#"{"filter":"a"}"#, 201),
        ("ops", "GET /subscriptions/q", "", 200),
        ("ops", "DELETE /subscriptions/q", "", 204),
        ("ops", "POST /topics/a?colour=red", "x", 400),
        ("", "POST /topics/a", "x", 401),
        ("wrong", "GET /topics", "", 401),
        ("slow", "POST /topics/b", "x", 403),
        ("ops", "GET /subscriptions/q", "", 404),
        ("ops", "GET /nothing", "", 404),
        ("ops", "DELETE /topics", "", 405),
        ("ops", "POST /topics/a", &large, 413),
        ("ops", &long, "", 414),
        // Its one was taken by what it may not do.
        ("slow", "POST /topics/a", "x", 429),
        ("", "GET /healthz", "", 200),
    ] {
        let reply = ask(&running, PAGE, who, request, body).await;
        assert_eq!(reply.status, status, "{who:?} {request}: {}", reply.text());
        assert_eq!(reply.header("access-control-allow-origin"), Some(PAGE), "{who:?} {request}: {reply:?}");
        assert_eq!(reply.header("vary"), Some("origin"), "{who:?} {request}");
        let exposed: Vec<_> = reply.header("access-control-expose-headers").unwrap().split(", ").collect();
        for name in ["retry-after", "ratelimit", "ratelimit-policy", "www-authenticate"] {
            assert!(exposed.contains(&name), "{name} is not told to a page: {exposed:?}");
        }
        if who == "slow" {
            assert!(reply.header("ratelimit").is_some() && reply.header("ratelimit-policy").is_some(), "{reply:?}");
        }
        let elsewhere = ask(&running, "https://evil.example", who, request, body).await;
        assert_eq!(elsewhere.header("access-control-allow-origin"), None, "{who:?} {request}");
    }
}

#[tokio::test]
async fn a_page_can_read_what_is_refused_before_any_route_over_http_2() {
    let running = guarded(|limits| limits.headers = 5).await;
    let io = TokioIo::new(running.connect().await);
    let (mut sender, connection) = hyper::client::conn::http2::handshake(TokioExecutor::new(), io).await.unwrap();
    tokio::spawn(connection);
    for (origin, allowed) in [(PAGE, Some(PAGE)), ("https://evil.example", None)] {
        let mut request = Request::get(format!("http://{}/healthz", running.address)).header("origin", origin);
        for number in 0..6 {
            request = request.header(format!("x-{number}"), "x");
        }
        let response = soon(sender.send_request(request.body(Empty::<Bytes>::new()).unwrap())).await.unwrap();
        assert_eq!(response.status().as_u16(), 431);
        let said = response.headers().get("access-control-allow-origin").map(|origin| origin.to_str().unwrap());
        assert_eq!(said, allowed);
    }
}
