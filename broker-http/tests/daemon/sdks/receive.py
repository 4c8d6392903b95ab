"""Receives pushes: verifies them with the Standard Webhooks library, reads them with the CloudEvents SDK.

Prints its port, then what it got, one JSON object a line.
"""

import base64
import json
import sys
import threading
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from cloudevents.core.bindings.http import HTTPMessage, from_http_event
from standardwebhooks.webhooks import Webhook, WebhookVerificationError

webhook = Webhook(sys.argv[1])
printing = threading.Lock()


def shown(event):
    attributes = {
        name: value.isoformat(timespec="milliseconds") if isinstance(value, datetime) else value
        for name, value in event.get_attributes().items()
    }
    data = event.get_data()
    if isinstance(data, bytes):
        return attributes | {"data_base64": base64.b64encode(data).decode()}
    return attributes | {"data": data}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        headers = dict(self.headers.items())
        try:
            webhook.verify(body, headers, json_parse=False)
            event = shown(from_http_event(HTTPMessage(headers=headers, body=body)))
            told, status = {"path": self.path, "events": [event]}, 204
        except WebhookVerificationError as error:
            told, status = {"path": self.path, "refused": str(error)}, 401
        with printing:
            print(json.dumps(told), flush=True)
        self.send_response(status)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(server.server_port, flush=True)
server.serve_forever()
