// Publishes the events of standard input, one a line, with the CloudEvents SDK; prints the answers.

import { createInterface } from "node:readline";
import { CloudEvent, HTTP } from "cloudevents";

const url = process.argv[2];

function event(attributes) {
  const { data_base64, ...rest } = attributes;
  return new CloudEvent(data_base64 === undefined ? rest : { ...rest, data: Buffer.from(data_base64, "base64") });
}

for await (const line of createInterface({ input: process.stdin })) {
  const { mode, event: wanted } = JSON.parse(line);
  // The SDK reads batches and has no way to write one.
  const message =
    mode === "batch"
      ? { headers: { "content-type": "application/cloudevents-batch+json" }, body: JSON.stringify(wanted.map(event)) }
      : HTTP[mode](event(wanted));
  const response = await fetch(url, { method: "POST", headers: message.headers, body: message.body });
  console.log(JSON.stringify({ status: response.status, answer: await response.json() }));
}
