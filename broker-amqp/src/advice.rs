//! What to do about a connection that is refused, said beside the reason.
//!
//! Neither the server's words nor those of TLS tell an operator what comes next; the server's say no more of a refused
//! login than that it was.

use broker_core::{Error, ErrorKind};

use crate::AmqpOptions;

/// The error of connecting to `host`, and what to do about it where that is known.
pub(crate) fn advised(error: Error, host: &str, options: &AmqpOptions) -> Error {
    match advice(&error, host, options) {
        Some(advice) => Error::new(error.kind(), format!("{}; {advice}", error.message())).with_source(error),
        None => error,
    }
}

fn advice(error: &Error, host: &str, options: &AmqpOptions) -> Option<String> {
    let text = error.message();
    let says = |words: &[&str]| words.iter().all(|word| text.contains(word));
    let vhost = &options.vhost;
    let known = match () {
        () if says(&["vhost", "not found"]) => {
            format!("create it with rabbitmqctl add_vhost '{vhost}', or name another in the URL's path")
        }
        () if says(&["vhost", "is down"]) => format!("start it with rabbitmqctl restart_vhost -p '{vhost}'"),
        () if says(&["vhost", "connection limit"]) => format!(
            "raise it with rabbitmqctl set_vhost_limits -p '{vhost}', or close others: a broker value has three \
             connections"
        ),
        () if says(&["user connection limit"]) => {
            "raise it with rabbitmqctl set_user_limits, or close others: a broker \
             value has three connections"
                .to_owned()
        }
        () if says(&["access to vhost", "refused"]) => {
            format!("permit it with rabbitmqctl set_permissions -p '{vhost}' USER '.*' '.*' '.*'")
        }
        () if says(&["Login was refused"]) => "the URL's user or its password is not the server's (rabbitmqctl \
             change_password; what is special in a URL is percent-encoded), or it is guest, who is let in from the \
             server's own host alone"
            .to_owned(),
        () if says(&["UnknownIssuer"]) => "the server's certificate is signed by nobody trusted here: give its \
             authority's with the URL's ca=FILE"
            .to_owned(),
        () if says(&["certificate not valid for name"]) => {
            format!("the server's certificate is for another name than {host}: connect to one that it has")
        }
        () if says(&["KeyMismatch"]) => "the URL's key=FILE is not that of its cert=FILE".to_owned(),
        () if options.tls && says(&["no items found"]) => {
            "the URL's key=FILE has no private key that can be read: it is PEM, and not encrypted".to_owned()
        }
        () if options.tls && says(&["peer sent no certificates"]) => {
            "the URL's cert=FILE has no certificate".to_owned()
        }
        () if options.tls && says(&["InvalidContentType"]) => {
            "the port speaks no TLS: give the one that does (5671), or amqp:// for none".to_owned()
        }
        () if !options.tls && says(&["failed to parse"]) => {
            "the port speaks no AMQP in the clear: give the one that does (5672), or amqps:// for TLS".to_owned()
        }
        // TLS 1.3 lets a client finish before the server has looked for its certificate, and then the server just goes.
        () if options.tls
            && options.cert.is_none()
            && error.kind() == ErrorKind::Unavailable
            && !says(&["onnection refused"]) =>
        {
            "the server may ask for a client certificate: give one with the URL's cert=FILE and key=FILE".to_owned()
        }
        () => return None,
    };
    Some(known)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_said_of_what_is_not_known() {
        let options = |url| AmqpOptions::from_url(broker_core::BrokerUrl::parse(url).unwrap()).unwrap();
        let (plain, tls) = (options("amqp://h"), options("amqps://h"));
        let refused = Error::unavailable("the connection failed: Connection refused (os error 111)");
        for options in [&plain, &tls] {
            assert_eq!(advised(refused.clone(), "h", options).message(), refused.message());
        }
        let reset = Error::unavailable("the connection failed: Connection reset by peer");
        assert_eq!(advised(reset.clone(), "h", &plain).message(), reset.message());
        assert!(advised(reset, "h", &tls).message().contains("cert=FILE"));
    }
}
