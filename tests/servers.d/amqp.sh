# shellcheck shell=bash
# RabbitMQ for the tests: one node of our own, from Debian's package, known to nobody but an epmd of
# its own; everything on loopback and in .servers/amqp. Sourced by tests/servers. Beside AMQP_URL it prints
# AMQP_MANAGEMENT, where the management API answers, and AMQP_TLS, the folder of the certificates for
# AMQP_TLS_ADDRESS, a listener that takes clients with a certificate and no others.

AMQP_DIR="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)/.servers/amqp"

amqp_up() {
    if [ -n "${AMQP_URL:-}" ] && ! is_ours amqp "$AMQP_URL"; then
        echo "AMQP_URL=$AMQP_URL"
        return
    fi
    _amqp_install >&2
    [ -f "$AMQP_DIR/environment" ] || _amqp_prepare
    _amqp_launch >&2
    cat "$AMQP_DIR/environment"
}

amqp_down() {
    amqp_stop
    _amqp_env epmd -kill >/dev/null 2>&1 || true
    rm -rf "$AMQP_DIR"
}

amqp_stop() {
    local pid
    pid=$(_amqp_pid) || return 0
    kill "$pid"
    # Not by its pid file, which it takes away while it still holds its ports.
    local end=$((SECONDS + 60))
    while kill -0 "$pid" 2>/dev/null; do
        [ "$SECONDS" -lt "$end" ] || kill -9 "$pid"
        sleep 0.1
    done
    rm -f "$AMQP_DIR/pid"
}

amqp_start() {
    _amqp_launch
}

# Above its memory watermark the server stops reading from connections that publish.
amqp_block() {
    _amqp_ctl set_vm_memory_high_watermark absolute 1MB
}

amqp_unblock() {
    _amqp_ctl set_vm_memory_high_watermark 0.4
}

amqp_close_connections() {
    _amqp_ctl close_all_connections "the tests close every connection"
}

# Whatever else rabbitmqctl can do.
amqp_ctl() {
    _amqp_ctl "$@"
}

# --- how -------------------------------------------------------------------------------------------

_amqp_install() {
    local packages=()
    [ -x /usr/lib/rabbitmq/bin/rabbitmq-server ] || packages+=(rabbitmq-server)
    command -v openssl >/dev/null || packages+=(openssl)
    [ ${#packages[@]} -gt 0 ] || return 0
    local root=()
    [ "$(id -u)" -eq 0 ] || root=(sudo)
    echo "installing ${packages[*]}"
    "${root[@]}" apt-get update -qq
    # RUNLEVEL keeps the package from starting a node of the system's own.
    "${root[@]}" env DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 apt-get install -y -qq "${packages[@]}"
}

_amqp_prepare() {
    local ports port tls management dist epmd
    ports=$(_amqp_free_ports 5)
    read -r port tls management dist epmd <<<"$ports"
    mkdir -p "$AMQP_DIR/data" "$AMQP_DIR/log"
    _amqp_certificates >/dev/null 2>&1
    printf 'port=%s\ndist=%s\nepmd=%s\n' "$port" "$dist" "$epmd" >"$AMQP_DIR/ports"
    cat >"$AMQP_DIR/rabbitmq.conf" <<CONF
listeners.tcp.1 = 127.0.0.1:$port
listeners.ssl.1 = 127.0.0.1:$tls
ssl_options.cacertfile = $AMQP_DIR/tls/ca.pem
ssl_options.certfile = $AMQP_DIR/tls/server.pem
ssl_options.keyfile = $AMQP_DIR/tls/server.key
ssl_options.verify = verify_peer
ssl_options.fail_if_no_peer_cert = true
management.tcp.ip = 127.0.0.1
management.tcp.port = $management
log.console = false
CONF
    echo '[rabbitmq_management,rabbitmq_consistent_hash_exchange].' >"$AMQP_DIR/plugins"
    cat >"$AMQP_DIR/environment" <<ENVIRONMENT
AMQP_URL=amqp://guest:guest@127.0.0.1:$port
AMQP_MANAGEMENT=http://127.0.0.1:$management
AMQP_TLS_ADDRESS=127.0.0.1:$tls
AMQP_TLS=$AMQP_DIR/tls
ENVIRONMENT
}

# An authority nobody else trusts, and what it signs: the server's certificate and a client's.
_amqp_certificates() (
    mkdir -p "$AMQP_DIR/tls"
    cd "$AMQP_DIR/tls"
    local key=(-newkey rsa:2048 -nodes) name
    openssl req -x509 "${key[@]}" -days 3650 -subj "/CN=suite authority" -keyout ca.key -out ca.pem
    for name in server client; do
        openssl req "${key[@]}" -subj "/CN=$name" -keyout "$name.key" -out "$name.csr"
        openssl x509 -req -in "$name.csr" -CA ca.pem -CAkey ca.key -CAcreateserial -days 3650 -out "$name.pem" \
            -extfile <(printf 'subjectAltName=IP:127.0.0.1,DNS:localhost\nbasicConstraints=CA:FALSE\n')
    done
)

_amqp_launch() {
    if ! _amqp_pid >/dev/null; then
        # A session of its own, and no output of the caller's: nobody waits for it by accident.
        _amqp_env setsid --fork /usr/lib/rabbitmq/bin/rabbitmq-server </dev/null >"$AMQP_DIR/log/output" 2>&1
    fi
    if ! _amqp_await 90 _amqp_answers; then
        echo "RabbitMQ did not start:" >&2
        tail -n 20 "$AMQP_DIR/log/output" >&2
        return 1
    fi
    _amqp_ctl await_startup --timeout 90
}

# Runs a command in the node's environment; it may leave epmd running.
_amqp_env() {
    (
        # shellcheck source=/dev/null
        . "$AMQP_DIR/ports"
        # shellcheck disable=SC2154
        alone env \
            HOME="$AMQP_DIR" \
            ERL_CRASH_DUMP="$AMQP_DIR/log/erl_crash.dump" \
            RABBITMQ_NODENAME="suite-$port@localhost" \
            RABBITMQ_MNESIA_BASE="$AMQP_DIR/data" \
            RABBITMQ_LOG_BASE="$AMQP_DIR/log" \
            RABBITMQ_CONFIG_FILE="$AMQP_DIR/rabbitmq.conf" \
            RABBITMQ_ENABLED_PLUGINS_FILE="$AMQP_DIR/plugins" \
            RABBITMQ_PID_FILE="$AMQP_DIR/pid" \
            RABBITMQ_DIST_PORT="$dist" \
            RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS="-kernel inet_dist_use_interface {127,0,0,1}" \
            ERL_EPMD_PORT="$epmd" \
            ERL_EPMD_ADDRESS=127.0.0.1 \
            "$@"
    )
}

_amqp_ctl() {
    _amqp_env /usr/lib/rabbitmq/bin/rabbitmqctl --quiet "$@" </dev/null
}

# The node's pid, if it is still our node: pids are used again.
_amqp_pid() {
    local pid
    pid=$(cat "$AMQP_DIR/pid" 2>/dev/null) && [ -n "$pid" ] || return 1
    tr '\0' ' ' <"/proc/$pid/cmdline" 2>/dev/null | grep -F rabbit >/dev/null && echo "$pid"
}

_amqp_answers() {
    local port
    # shellcheck source=/dev/null
    port=$(. "$AMQP_DIR/ports" && echo "$port")
    (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null
}

# Repeats a command until it succeeds; gives up after so many seconds.
_amqp_await() {
    local end=$((SECONDS + $1))
    until "$2"; do
        [ "$SECONDS" -lt "$end" ] || return 1
        sleep 0.2
    done
}

# Below the range that outgoing connections are given ports from: a node that is stopped must find its own
# free when it starts again.
_amqp_free_ports() {
    python3 -c '
import random, socket, sys
held = []
while len(held) < int(sys.argv[1]):
    one = socket.socket()
    try:
        one.bind(("127.0.0.1", random.randrange(15000, 32000)))
        held.append(one)
    except OSError:
        one.close()
print(*(one.getsockname()[1] for one in held))' "$1"
}
