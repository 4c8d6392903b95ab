"""Publishes the events of standard input, one a line, with the CloudEvents SDK; prints the answers."""

import base64
import json
import sys
import urllib.error
import urllib.request
from datetime import datetime

from cloudevents.core.bindings.http import to_binary_event, to_structured_event
from cloudevents.core.v1.event import CloudEvent

url = sys.argv[1]
for line in sys.stdin:
    wanted = json.loads(line)
    attributes = wanted["event"]
    if "data_base64" in attributes:
        data = base64.b64decode(attributes.pop("data_base64"))
    else:
        data = attributes.pop("data")
    attributes["time"] = datetime.fromisoformat(attributes["time"].replace("Z", "+00:00"))
    event = CloudEvent(attributes, data)
    encode = {"binary": to_binary_event, "structured": to_structured_event}[wanted["mode"]]
    message = encode(event)
    request = urllib.request.Request(url, data=message.body, headers=message.headers, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            status, answer = response.status, response.read()
    except urllib.error.HTTPError as error:
        status, answer = error.code, error.read()
    print(json.dumps({"status": status, "answer": json.loads(answer)}), flush=True)
