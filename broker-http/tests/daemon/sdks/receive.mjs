// Receives pushes: verifies them with the Standard Webhooks library, reads them with the CloudEvents SDK.
// Prints its port, then what it got, one JSON object a line.

import { createServer } from "node:http";
import { HTTP } from "cloudevents";
import { Webhook, WebhookVerificationError } from "standardwebhooks";

const webhook = new Webhook(process.argv[2]);

const server = createServer(async (request, response) => {
  const chunks = [];
  for await (const chunk of request) chunks.push(chunk);
  const bytes = Buffer.concat(chunks);
  const isText = /json|^text\//.test(request.headers["content-type"] ?? "");
  let told = { path: request.url };
  let status = 204;
  try {
    webhook.verify(bytes.toString(), request.headers, { jsonParse: false });
    const event = HTTP.toEvent({ headers: request.headers, body: isText ? bytes.toString() : bytes });
    told.events = [event].flat();
  } catch (error) {
    if (!(error instanceof WebhookVerificationError)) throw error;
    told.refused = error.message;
    status = 401;
  }
  console.log(JSON.stringify(told));
  response.writeHead(status).end();
});
server.listen(0, "127.0.0.1", () => console.log(server.address().port));
