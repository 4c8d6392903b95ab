# shellcheck shell=bash
# Apache Kafka for the tests: one KRaft node of our own on free ports, from Maven Central's jars. Sourced by
# tests/servers.
#
# Needs a JDK 17 or newer and Maven, once. The jars are kept in ~/.cache/broker-tests; everything else is
# in .servers/kafka of this repository. Sourced by tests/servers, which calls kafka_up and so on.
#
# Besides the plain listener the node has LINKS listeners that tell their clients another port to come
# back to: a test puts a proxy on that port and has a connection that it can cut. They are printed as
# KAFKA_LINKS=ADVERTISED:LISTENING,…
#
# Three more listeners want TLS, a password, or both: KAFKA_TLS, KAFKA_SASL, KAFKA_SASL_TLS, each HOST:PORT. KAFKA_CA
# is the certificate to trust, KAFKA_LOGIN=USER:PASSWORD who is let in, by PLAIN and by SCRAM.
#
# KAFKA_SASL_LINK=ADVERTISED:LISTENING:SHUT are two listeners for PLAIN that tell their clients the same port to come back
# to. The second knows another password: a test that puts a proxy on the port has whoever was let in refused, and let in.
#
# Rights count where somebody has given some: who comes without a user may do everything, and give them.

KAFKA_VERSION=4.3.0
KAFKA_HOME_DIR="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)/.servers/kafka"
KAFKA_CACHE="${XDG_CACHE_HOME:-$HOME/.cache}/broker-tests/kafka-$KAFKA_VERSION"
KAFKA_LINK_COUNT=4
# Good for this server alone, which listens on loopback.
KAFKA_LOGIN_USER=suite
KAFKA_LOGIN_PASSWORD=suite-own

kafka_up() {
    if [ -n "${KAFKA_URL:-}" ] && ! is_ours kafka "$KAFKA_URL"; then
        echo "KAFKA_URL=$KAFKA_URL"
        return
    fi
    if ! _kafka_runs; then
        [ -f "$KAFKA_HOME_DIR/server.properties" ] || _kafka_prepare || return
        _kafka_launch || return
    fi
    cat "$KAFKA_HOME_DIR/environment"
}

kafka_down() {
    kafka_stop
    rm -rf "$KAFKA_HOME_DIR"
}

kafka_stop() {
    local pid
    pid=$(_kafka_pid) || return 0
    # A clean stop first: an unclean one costs the next start a recovery.
    kill -TERM "$pid" 2>/dev/null || true
    _kafka_wait 300 _kafka_gone || { kill -KILL "$pid" 2>/dev/null; _kafka_wait 50 _kafka_gone; }
    rm -f "$KAFKA_HOME_DIR/pid"
}

kafka_start() {
    _kafka_runs && return
    [ -f "$KAFKA_HOME_DIR/server.properties" ] || { echo "kafka: nothing to start; use up" >&2; return 1; }
    _kafka_launch
}

# --- how -------------------------------------------------------------------------------------------

_kafka_prepare() {
    local java
    java=$(java -version 2>&1 | sed -n 's/.*version "\([0-9]*\).*/\1/p' | head -1)
    [ "${java:-0}" -ge 17 ] || { echo "kafka: needs Java 17 or newer (openjdk-17-jre-headless)" >&2; return 1; }
    _kafka_fetch || return
    mkdir -p "$KAFKA_HOME_DIR"
    local ports=() port links="" advertised="" listeners="" protocols="" n
    # Free ports that stay ours: bound to be known, all at once so that they differ.
    read -r -a ports < <(_kafka_free_ports $((8 + 2 * KAFKA_LINK_COUNT)))
    [ "${#ports[@]}" -eq $((8 + 2 * KAFKA_LINK_COUNT)) ] || { echo "kafka: no free ports" >&2; return 1; }
    local secure=("TLS:SSL:${ports[2]}" "SASL:SASL_PLAINTEXT:${ports[3]}" "SASLTLS:SASL_SSL:${ports[4]}")
    for n in "${secure[@]}"; do
        listeners+=",${n%%:*}://127.0.0.1:${n##*:}"
        advertised+=",${n%%:*}://127.0.0.1:${n##*:}"
        protocols+=",${n%:*}"
    done
    listeners+=",SASLLINK://127.0.0.1:${ports[6]},SASLSHUT://127.0.0.1:${ports[7]}"
    advertised+=",SASLLINK://127.0.0.1:${ports[5]},SASLSHUT://127.0.0.1:${ports[5]}"
    protocols+=",SASLLINK:SASL_PLAINTEXT,SASLSHUT:SASL_PLAINTEXT"
    for ((n = 0; n < KAFKA_LINK_COUNT; n++)); do
        local told=${ports[8 + 2 * n]} listening=${ports[9 + 2 * n]}
        listeners+=",LINK$n://127.0.0.1:$listening"
        advertised+=",LINK$n://127.0.0.1:$told"
        protocols+=",LINK$n:PLAINTEXT"
        links+="${links:+,}$told:$listening"
    done
    cat >"$KAFKA_HOME_DIR/server.properties" <<-PROPERTIES
		process.roles=broker,controller
		node.id=1
		controller.quorum.voters=1@127.0.0.1:${ports[1]}
		listeners=PLAINTEXT://127.0.0.1:${ports[0]},CONTROLLER://127.0.0.1:${ports[1]}$listeners
		advertised.listeners=PLAINTEXT://127.0.0.1:${ports[0]}$advertised
		listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT$protocols
		inter.broker.listener.name=PLAINTEXT
		controller.listener.names=CONTROLLER
		log.dirs=$KAFKA_HOME_DIR/data
		offsets.topic.replication.factor=1
		offsets.topic.num.partitions=4
		transaction.state.log.replication.factor=1
		transaction.state.log.min.isr=1
		transaction.state.log.num.partitions=4
		share.coordinator.state.topic.replication.factor=1
		share.coordinator.state.topic.min.isr=1
		group.initial.rebalance.delay.ms=0
		num.partitions=3
		auto.create.topics.enable=false
		ssl.keystore.location=$KAFKA_HOME_DIR/server.p12
		ssl.keystore.type=PKCS12
		ssl.keystore.password=$KAFKA_LOGIN_PASSWORD
		sasl.enabled.mechanisms=PLAIN,SCRAM-SHA-256,SCRAM-SHA-512
		authorizer.class.name=org.apache.kafka.metadata.authorizer.StandardAuthorizer
		super.users=User:ANONYMOUS
		allow.everyone.if.no.acl.found=true
	PROPERTIES
    _kafka_certify || return
    local listener mechanism module password
    for listener in sasl sasltls sasllink saslshut; do
        password=$KAFKA_LOGIN_PASSWORD
        [ "$listener" != saslshut ] || password+=-of-another
        module="org.apache.kafka.common.security.plain.PlainLoginModule required user_$KAFKA_LOGIN_USER=\"$password\";"
        echo "listener.name.$listener.plain.sasl.jaas.config=$module"
        for mechanism in scram-sha-256 scram-sha-512; do
            module="org.apache.kafka.common.security.scram.ScramLoginModule required;"
            echo "listener.name.$listener.$mechanism.sasl.jaas.config=$module"
        done
    done >>"$KAFKA_HOME_DIR/server.properties"
    cat >"$KAFKA_HOME_DIR/log4j2.properties" <<-PROPERTIES
		rootLogger.level=WARN
		rootLogger.appenderRef.stdout.ref=out
		appender.stdout.type=Console
		appender.stdout.name=out
		appender.stdout.layout.type=PatternLayout
		appender.stdout.layout.pattern=%d %p %c %m%n
	PROPERTIES
    cat >"$KAFKA_HOME_DIR/environment" <<-ENVIRONMENT
		KAFKA_URL=kafka://127.0.0.1:${ports[0]}
		KAFKA_LINKS=$links
		KAFKA_TLS=127.0.0.1:${ports[2]}
		KAFKA_SASL=127.0.0.1:${ports[3]}
		KAFKA_SASL_TLS=127.0.0.1:${ports[4]}
		KAFKA_SASL_LINK=${ports[5]}:${ports[6]}:${ports[7]}
		KAFKA_CA=$KAFKA_HOME_DIR/ca.pem
		KAFKA_LOGIN=$KAFKA_LOGIN_USER:$KAFKA_LOGIN_PASSWORD
	ENVIRONMENT
    local login="name=$KAFKA_LOGIN_USER,password=$KAFKA_LOGIN_PASSWORD"
    java -Xmx256m -cp "$KAFKA_CACHE/libs/*" kafka.tools.StorageTool format -t broker-tests-cluster-00 \
        --add-scram "SCRAM-SHA-256=[$login]" --add-scram "SCRAM-SHA-512=[$login]" \
        -c "$KAFKA_HOME_DIR/server.properties" >"$KAFKA_HOME_DIR/format.log" 2>&1 ||
        { cat "$KAFKA_HOME_DIR/format.log" >&2; rm -rf "$KAFKA_HOME_DIR"; return 1; }
}

# A key of its own and a certificate that signs itself; keytool comes with every Java.
_kafka_certify() {
    local store=(-keystore "$KAFKA_HOME_DIR/server.p12" -storetype PKCS12 -storepass "$KAFKA_LOGIN_PASSWORD" -alias server)
    keytool -genkeypair "${store[@]}" -keyalg EC -groupname secp256r1 -dname CN=localhost -validity 3650 \
        -ext san=ip:127.0.0.1,dns:localhost -ext bc=ca:true >"$KAFKA_HOME_DIR/keytool.log" 2>&1 &&
        keytool -exportcert -rfc "${store[@]}" -file "$KAFKA_HOME_DIR/ca.pem" >>"$KAFKA_HOME_DIR/keytool.log" 2>&1 ||
        { cat "$KAFKA_HOME_DIR/keytool.log" >&2; return 1; }
}

_kafka_fetch() {
    [ -f "$KAFKA_CACHE/complete" ] && return
    command -v mvn >/dev/null || { echo "kafka: needs Maven (apt-get install maven) to fetch Kafka once" >&2; return 1; }
    mkdir -p "$KAFKA_CACHE"
    cat >"$KAFKA_CACHE/pom.xml" <<-POM
		<project xmlns="http://maven.apache.org/POM/4.0.0">
		  <modelVersion>4.0.0</modelVersion>
		  <groupId>broker-tests</groupId><artifactId>kafka</artifactId><version>1</version>
		  <dependencies>
		    <dependency><groupId>org.apache.kafka</groupId><artifactId>kafka_2.13</artifactId><version>$KAFKA_VERSION</version></dependency>
		    <dependency><groupId>org.apache.logging.log4j</groupId><artifactId>log4j-slf4j-impl</artifactId><version>2.25.1</version></dependency>
		  </dependencies>
		</project>
	POM
    (cd "$KAFKA_CACHE" && timeout 600 mvn -q -B dependency:copy-dependencies -DoutputDirectory=libs) >"$KAFKA_CACHE/fetch.log" 2>&1 ||
        { tail -20 "$KAFKA_CACHE/fetch.log" >&2; return 1; }
    touch "$KAFKA_CACHE/complete"
}

_kafka_launch() {
    # Apart from our terminal and pipes, so that it outlives this script and holds nobody's output open.
    alone setsid java -Xmx512m -XX:+UseSerialGC -Dlog4j2.configurationFile="$KAFKA_HOME_DIR/log4j2.properties" \
        -cp "$KAFKA_CACHE/libs/*" kafka.Kafka "$KAFKA_HOME_DIR/server.properties" \
        >>"$KAFKA_HOME_DIR/server.log" 2>&1 </dev/null &
    echo $! >"$KAFKA_HOME_DIR/pid"
    _kafka_wait 600 _kafka_answers_or_gone && _kafka_runs ||
        { echo "kafka: it did not start:" >&2; tail -20 "$KAFKA_HOME_DIR/server.log" >&2; return 1; }
}

_kafka_port() { sed -n 's/^KAFKA_URL=.*:\([0-9]*\)$/\1/p' "$KAFKA_HOME_DIR/environment"; }

_kafka_answers() { (exec 3<>"/dev/tcp/127.0.0.1/$(_kafka_port)") 2>/dev/null; }

_kafka_answers_or_gone() { _kafka_answers || _kafka_gone; }

# The pid, if it is still our server: pids are used again.
_kafka_pid() {
    local pid
    pid=$(cat "$KAFKA_HOME_DIR/pid" 2>/dev/null) || return 1
    tr '\0' ' ' <"/proc/$pid/cmdline" 2>/dev/null | grep -qF "$KAFKA_HOME_DIR/server.properties" && echo "$pid"
}

_kafka_runs() { _kafka_pid >/dev/null; }

_kafka_gone() { ! _kafka_runs; }

# Waits up to $1 tenths of a second for a command to succeed.
_kafka_wait() {
    local n
    for ((n = 0; n < $1; n++)); do
        "$2" && return
        sleep 0.1
    done
    return 1
}

_kafka_free_ports() {
    python3 -c '
import socket, sys
held = [socket.socket() for _ in range(int(sys.argv[1]))]
for one in held: one.bind(("127.0.0.1", 0))
print(*(one.getsockname()[1] for one in held))' "$1"
}
