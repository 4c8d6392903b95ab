// Publishes with Watermill's AMQP module, as its documentation does: confirms on, one message after another
// from each of so many goroutines; prints how many a second and what each took of the processor.
//
//	watermill URL EXCHANGE KEY MESSAGES WINDOW PAYLOAD PERSISTENT
package main

import (
	"encoding/json"
	"fmt"
	"os"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/ThreeDotsLabs/watermill"
	"github.com/ThreeDotsLabs/watermill-amqp/v3/pkg/amqp"
	"github.com/ThreeDotsLabs/watermill/message"
)

func main() {
	if len(os.Args) != 8 {
		fail("usage: watermill URL EXCHANGE KEY MESSAGES WINDOW PAYLOAD PERSISTENT", nil)
	}
	messages, window, payload := number(os.Args[4]), number(os.Args[5]), number(os.Args[6])
	exchange, persistent := os.Args[2], os.Args[7] == "true"
	config := amqp.Config{
		Connection: amqp.ConnectionConfig{AmqpURI: os.Args[1]},
		Marshaler:  amqp.DefaultMarshaler{NotPersistentDeliveryMode: !persistent},
		Exchange: amqp.ExchangeConfig{
			GenerateName: func(string) string { return exchange },
			Type:         "topic",
			Durable:      true,
		},
		Publish: amqp.PublishConfig{
			GenerateRoutingKey: func(topic string) string { return topic },
			ConfirmDelivery:    true,
			ChannelPoolSize:    window,
			Mandatory:          true,
		},
		TopologyBuilder: &amqp.DefaultTopologyBuilder{},
	}
	publisher, err := amqp.NewPublisher(config, watermill.NopLogger{})
	if err != nil {
		fail("connect", err)
	}
	body := make([]byte, payload)
	for at := range body {
		body[at] = 'x'
	}

	began, before := time.Now(), cpu()
	var group sync.WaitGroup
	for worker := range window {
		group.Add(1)
		go func() {
			defer group.Done()
			for at := worker; at < messages; at += window {
				if err := publisher.Publish(os.Args[3], message.NewMessage(watermill.NewUUID(), body)); err != nil {
					fail("publish", err)
				}
			}
		}()
	}
	group.Wait()
	elapsed, used := time.Since(began), cpu()-before

	printed := map[string]float64{
		"messages_per_second": float64(messages) / elapsed.Seconds(),
		"cpu_micros":          float64(used.Microseconds()) / float64(messages),
	}
	if err := json.NewEncoder(os.Stdout).Encode(printed); err != nil {
		fail("print", err)
	}
	if err := publisher.Close(); err != nil {
		fail("close", err)
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
	fmt.Fprintln(os.Stderr, "watermill:", what, err)
	os.Exit(1)
}
