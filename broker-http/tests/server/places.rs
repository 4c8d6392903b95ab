//! One address does not keep the others out by holding every connection.

use broker_http::{Limits, ServerOptions};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};

use crate::support::{Reply, Running, read_until, soon};

async fn limited(connections: usize) -> Running {
    let mut limits = Limits::default();
    limits.connections = connections;
    Running::with(ServerOptions::new().with_limits(limits)).await
}

/// A connection from this address of the loopback.
pub(crate) async fn connect_from(from: &str, to: std::net::SocketAddr) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind(format!("{from}:0").parse().unwrap()).unwrap();
    soon(socket.connect(to)).await.unwrap()
}

const FLOOD: &str = "127.0.0.9";
const HEALTHZ: &[u8] = b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n";

/// Connections that have said this, and have read the answer if there is one.
async fn flood(running: &Running, count: usize, said: &[u8], answer: &str) -> Vec<TcpStream> {
    let mut flood = Vec::new();
    for _ in 0..count {
        let mut stream = connect_from(FLOOD, running.address).await;
        stream.write_all(said).await.unwrap();
        if !answer.is_empty() {
            read_until(&mut stream, answer).await;
        }
        flood.push(stream);
    }
    flood
}

/// Connections of others, each served and kept.
async fn guests(running: &Running, count: usize) -> Vec<TcpStream> {
    let mut guests = Vec::new();
    for _ in 0..count {
        let mut stream = running.connect().await;
        stream.write_all(HEALTHZ).await.unwrap();
        assert!(read_until(&mut stream, "ok\n").await.starts_with("HTTP/1.1 200"));
        guests.push(stream);
    }
    guests
}

async fn is_told_503(mut stream: TcpStream) {
    let mut answer = Vec::new();
    soon(stream.read_to_end(&mut answer)).await.unwrap();
    Reply::parse(&answer).is_problem(503, "too many connections");
}

/// What was counted, asked for over a connection that stands.
async fn gave_way(stream: &mut TcpStream, count: usize) {
    stream.write_all(b"GET /metrics HTTP/1.1\r\nhost: localhost\r\n\r\n").await.unwrap();
    let metrics = read_until(stream, "broker_streams ").await;
    assert!(metrics.contains(&format!("broker_refused_total{{reason=\"gave_way\"}} {count}\n")), "{metrics}");
}

#[tokio::test]
async fn what_is_at_no_request_gives_way_to_others() {
    for (said, answer) in [(&b""[..], ""), (b"GET /healthz HTTP/1.1\r\nx-slow: ", ""), (HEALTHZ, "ok\n")] {
        let running = limited(10).await;
        let mut flood = flood(&running, 10, said, answer).await;
        is_told_503(connect_from(FLOOD, running.address).await).await;
        let mut guests = guests(&running, 5).await;
        // Those that were quiet longest are closed, at once.
        for mut stream in flood.drain(..5) {
            let heard = soon(stream.read_to_end(&mut Vec::new())).await;
            assert!(heard.map_or(!said.is_empty(), |heard| heard == 0), "{answer}");
        }
        // Equal shares do not chase each other out, and another finds a place.
        for _ in 0..3 {
            is_told_503(connect_from(FLOOD, running.address).await).await;
            is_told_503(running.connect().await).await;
        }
        let mut another = connect_from("127.0.0.8", running.address).await;
        another.write_all(HEALTHZ).await.unwrap();
        read_until(&mut another, "ok\n").await;
        gave_way(guests.last_mut().unwrap(), 6).await;
    }
}

#[tokio::test]
async fn what_is_at_a_request_is_not_cut_for_others() {
    let running = limited(10).await;
    let stream = b"GET /topics/a/stream HTTP/1.1\r\nhost: localhost\r\n\r\n";
    let mut streams = flood(&running, 1, stream, ": connected").await;
    let body = b"POST /topics/b HTTP/1.1\r\nhost: localhost\r\ncontent-length: 2\r\nexpect: 100-continue\r\n\r\n";
    let mut slow = flood(&running, 1, body, "100 Continue").await;
    let idle = flood(&running, 8, b"", "").await;
    let mut guests = guests(&running, 5).await;
    gave_way(&mut guests[0], 5).await;
    guests[0].write_all(b"POST /topics/a HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1\r\n\r\nx").await.unwrap();
    read_until(&mut streams[0], "id: ").await;
    slow[0].write_all(b"hi").await.unwrap();
    read_until(&mut slow[0], "HTTP/1.1 202").await;
    drop(idle);

    // Where nobody can, the newcomer is told.
    let running = limited(3).await;
    let _streams = flood(&running, 3, stream, ": connected").await;
    is_told_503(running.connect().await).await;
}

#[tokio::test]
async fn a_socket_counts_until_it_ends() {
    let running = limited(3).await;
    let opening = b"GET /topics/a/stream HTTP/1.1\r\nhost: localhost\r\nupgrade: websocket\r\nconnection: upgrade\r\n\
        sec-websocket-version: 13\r\nsec-websocket-key: YWFhYWFhYWFhYWFhYWFhYQ==\r\n\r\n";
    let mut sockets = flood(&running, 3, opening, "HTTP/1.1 101").await;
    // Of its own address and of another: none of them gives way.
    is_told_503(connect_from(FLOOD, running.address).await).await;
    is_told_503(running.connect().await).await;
    // Its end gives the place back, as soon as it is noticed.
    drop(sockets.pop());
    let mut stream = loop {
        let mut stream = running.connect().await;
        stream.write_all(HEALTHZ).await.unwrap();
        if read_until(&mut stream, "\r\n\r\n").await.starts_with("HTTP/1.1 200") {
            break stream;
        }
    };
    gave_way(&mut stream, 0).await;
}
