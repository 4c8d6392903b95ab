//! Why a connection does not stand: what librdkafka says of it, in the contract's words, and what to do next.

use broker_core::{Error, ErrorKind};
use rdkafka::error::RDKafkaErrorCode;

use crate::error::code_kind;

/// What is to be done, by what is said. The first that fits.
const ADVICE: [(&str, &str); 14] = [
    ("certificate verify failed", "name the certificate to trust with ca= in the broker's URL"),
    ("Failed to verify", "the certificate is of another host than the broker's URL and the server name"),
    ("alert", "the server wants a client's certificate, see librdkafka.ssl.certificate.location"),
    ("wrong version number", NO_TLS),
    ("connecting to a PLAINTEXT", NO_TLS),
    ("Unsupported SASL mechanism", "choose one that the server has with sasl= in the broker's URL"),
    ("current SASL state", "no password is wanted here: take it out of the broker's URL, or check the port"),
    ("SASL authentication error", "check the user and the password in the broker's URL"),
    ("connecting to a SSL listener", "the server may want TLS: security=ssl in the broker's URL"),
    ("might require SASL", "the server may want a user and a password in the broker's URL"),
    ("Connection refused", "check that a server listens there"),
    ("Failed to resolve", "check the host in the broker's URL"),
    (
        "connection closed by peer",
        "the server may want TLS or a password, or neither: see security= and sasl= of the broker's URL",
    ),
    ("timed out", "check the address, and whether the server is to be reached from here"),
];

const NO_TLS: &str =
    "the server may not speak TLS there: check the port, or leave security=ssl out of the broker's URL";

/// Where librdkafka's own advice begins, which is of settings that have other names here, or something that helps nobody.
const NO_HELP: [&str; 8] = [
    ": broker's supported mechanisms: (n/a)",
    ": broker's supported mechanisms:  ",
    ": broker certificate could not be verified",
    ": client SSL authentication might",
    ": connecting to a PLAINTEXT",
    ": receive 0 ",
    ": requesting ApiVersion: might",
    ": verify that security.protocol",
];

/// The error of a connection of which librdkafka says `reason`. It is [`Unauthorized`](ErrorKind::Unauthorized) only where
/// one side has said that it does not trust the other: a connection that broke in the middle of that has not.
pub(crate) fn cause(code: RDKafkaErrorCode, reason: &str) -> Error {
    let kind = match code_kind(code) {
        ErrorKind::Unauthorized if !is_definite(reason) => ErrorKind::Unavailable,
        kind => kind,
    };
    let said = said(reason);
    match ADVICE.iter().find(|(saying, _)| reason.contains(saying)) {
        Some((_, advice)) => Error::new(kind, format!("{said}; {advice}")),
        None => Error::new(kind, said),
    }
}

fn is_definite(reason: &str) -> bool {
    if reason.contains("SSL") && !reason.contains("SASL") {
        let alerts = ["certificate", "unknown ca", "handshake failure", "access denied"];
        return ["certificate verify failed", "Failed to verify"].iter().any(|saying| reason.contains(saying))
            || (reason.contains("alert") && alerts.iter().any(|alert| reason.contains(alert)));
    }
    // "Local" is what befell the request, "Broker" what the server answered.
    !(reason.contains("handshake failed: Local") || reason.contains("hung up"))
}

/// `PROTOCOL://HOST:PORT/NODE: WHAT (after 1ms in state CONNECT)`, to the point.
fn said(reason: &str) -> String {
    let end = NO_HELP.iter().chain([&" (after "]).filter_map(|advice| reason.find(advice)).min();
    let reason = end.and_then(|end| reason.get(..end)).unwrap_or(reason);
    let Some((place, what)) = reason.split_once(": ") else { return reason.to_owned() };
    let place = place.split_once("://").map_or(place, |(_, place)| place);
    let place = place.split_once('/').map_or(place, |(place, _)| place);
    format!("{place}: {what}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cause_says_what_to_do_next_and_is_no_refusal_unless_somebody_refused() {
        use ErrorKind::*;
        use RDKafkaErrorCode::*;
        for (code, reason, kind, said, advice) in [
            (
                BrokerTransportFailure,
                "127.0.0.1:9/bootstrap: Connect to ipv4#127.0.0.1:9 failed: Connection refused (after 0ms in state CONNECT)",
                Unavailable,
                "127.0.0.1:9: Connect to ipv4#127.0.0.1:9 failed: Connection refused; ",
                "a server listens",
            ),
            (
                Resolve,
                "none.invalid:9092/bootstrap: Failed to resolve 'none.invalid:9092': Name or service not known (after 5ms in \
                 state CONNECT)",
                Unavailable,
                "none.invalid:9092: Failed to resolve 'none.invalid:9092': Name or service not known; ",
                "check the host",
            ),
            (
                Authentication,
                "sasl_plaintext://[::1]:9/bootstrap: SASL authentication error: Authentication failed: Invalid username or \
                 password (after 300ms in state AUTH_REQ, 1 identical error(s) suppressed)",
                Unauthorized,
                "[::1]:9: SASL authentication error: Authentication failed: Invalid username or password; ",
                "the password",
            ),
            (
                Authentication,
                "sasl_ssl://a:9/bootstrap: SASL PLAIN mechanism handshake failed: Broker: Unsupported SASL mechanism: broker's \
                 supported mechanisms: SCRAM-SHA-512 (after 1ms in state AUTH_HANDSHAKE)",
                Unauthorized,
                "a:9: SASL PLAIN mechanism handshake failed: Broker: Unsupported SASL mechanism: broker's supported mechanisms: \
                 SCRAM-SHA-512; ",
                "sasl=",
            ),
            // A server that ends in the middle of it.
            (
                Authentication,
                "sasl_plaintext://a:9/1: SASL PLAIN mechanism handshake failed: Local: Broker transport failure: broker's \
                 supported mechanisms: (n/a) (after 1ms in state AUTH_HANDSHAKE)",
                Unavailable,
                "a:9: SASL PLAIN mechanism handshake failed: Local: Broker transport failure",
                "failure",
            ),
            (
                Authentication,
                "sasl_plaintext://a:9/1: Disconnected: hung up from peer in state AUTH_LEGACY (after 1ms in state AUTH_LEGACY)",
                Unavailable,
                "a:9: Disconnected: hung up",
                "",
            ),
            (
                SSL,
                "ssl://a:9/1: SSL handshake failed: error:0A000126:SSL routines::unexpected eof while reading (after 1ms in \
                 state SSL_HANDSHAKE)",
                Unavailable,
                "a:9: SSL handshake failed: error:0A000126:SSL routines::unexpected eof while reading",
                "",
            ),
            (
                SSL,
                "ssl://a:9/bootstrap: SSL handshake failed: error:0A000086:SSL routines::certificate verify failed: broker \
                 certificate could not be verified, verify that ssl.ca.location is correctly configured or root CA certificates \
                 are installed (install ca-certificates package) (after 3ms in state SSL_HANDSHAKE)",
                Unauthorized,
                "a:9: SSL handshake failed: error:0A000086:SSL routines::certificate verify failed; ",
                "ca=",
            ),
            (
                SSL,
                "ssl://a:9/bootstrap: SSL handshake failed: error:0A00010B:SSL routines::wrong version number (after 3ms in \
                 state SSL_HANDSHAKE)",
                Unavailable,
                "a:9: SSL handshake failed: error:0A00010B:SSL routines::wrong version number; ",
                "security=ssl",
            ),
            (
                BrokerTransportFailure,
                "a:9/1: Disconnected: verify that security.protocol is correctly configured, broker might require SASL \
                 authentication (after 2ms in state UP)",
                Unavailable,
                "a:9: Disconnected; ",
                "user and a password",
            ),
        ] {
            let error = cause(code, reason);
            assert_eq!(error.kind(), kind, "{reason}");
            assert!(error.message().starts_with(said) && error.message().contains(advice), "{error}");
        }
    }
}
