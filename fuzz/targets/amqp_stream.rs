//! What RabbitMQ sends on a connection: the first byte is how long the pieces are in which the rest comes.
#![no_main]

use broker_amqp::fuzzing;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let [piece, stream @ ..] = data else { return };
    fuzzing::stream(stream, usize::from(*piece));
});
