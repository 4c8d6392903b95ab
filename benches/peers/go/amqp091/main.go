// Publishes with Go's amqp091 client: so many messages, so many confirms outstanding, and prints how many
// a second and what each took of the processor. The messages are those of the adapter beside it.
//
//	amqp091 URL EXCHANGE KEY MESSAGES WINDOW PAYLOAD PERSISTENT
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"strconv"
	"syscall"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
)

func main() {
	if len(os.Args) != 8 {
		fail("usage: amqp091 URL EXCHANGE KEY MESSAGES WINDOW PAYLOAD PERSISTENT", nil)
	}
	messages, window, payload := number(os.Args[4]), number(os.Args[5]), number(os.Args[6])
	connection, err := amqp.Dial(os.Args[1])
	if err != nil {
		fail("connect", err)
	}
	channel, err := connection.Channel()
	if err != nil {
		fail("open a channel", err)
	}
	if err := channel.Confirm(false); err != nil {
		fail("ask for confirms", err)
	}
	go func() {
		for returned := range channel.NotifyReturn(make(chan amqp.Return, 1)) {
			fail("a message reached no queue: "+returned.ReplyText, nil)
		}
	}()

	message := amqp.Publishing{
		MessageId:    "0190a5e0-7a3b-7000-8000-000000000001",
		Timestamp:    time.Unix(1_700_000_000, 0),
		DeliveryMode: amqp.Transient,
		Headers:      amqp.Table{"x-broker-timestamp": int64(1_700_000_000_000)},
		Body:         make([]byte, payload),
	}
	if os.Args[7] == "true" {
		message.DeliveryMode = amqp.Persistent
	}
	for at := range message.Body {
		message.Body[at] = 'x'
	}

	began, before := time.Now(), cpu()
	outstanding := make(chan *amqp.DeferredConfirmation, window)
	for range messages {
		if len(outstanding) == window {
			wait(<-outstanding)
		}
		confirm, err := channel.PublishWithDeferredConfirmWithContext(
			context.Background(), os.Args[2], os.Args[3], true, false, message)
		if err != nil {
			fail("publish", err)
		}
		outstanding <- confirm
	}
	for len(outstanding) > 0 {
		wait(<-outstanding)
	}
	elapsed, used := time.Since(began), cpu()-before

	printed := map[string]float64{
		"messages_per_second": float64(messages) / elapsed.Seconds(),
		"cpu_micros":          float64(used.Microseconds()) / float64(messages),
	}
	if err := json.NewEncoder(os.Stdout).Encode(printed); err != nil {
		fail("print", err)
	}
	if err := connection.Close(); err != nil {
		fail("close", err)
	}
}

func wait(confirm *amqp.DeferredConfirmation) {
	if !confirm.Wait() {
		fail("a message was refused", nil)
	}
}

// cpu is what this process has taken of the processor.
func cpu() time.Duration {
	var usage syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &usage); err != nil {
		fail("getrusage", err)
	}
	return time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
}

func number(text string) int {
	value, err := strconv.Atoi(text)
	if err != nil {
		fail("a number", err)
	}
	return value
}

func fail(what string, err error) {
	fmt.Fprintln(os.Stderr, "amqp091:", what, err)
	os.Exit(1)
}
