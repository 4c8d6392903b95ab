"""What schemathesis asks of the daemon: things that are there, and nothing that takes long. See tests/schemathesis."""

import os
import re

import requests
import schemathesis

# The name that schemathesis.toml gives every subscription.
NAME = "orders"

# A pull that waits for a message waits for nothing here: what may be said is asked, not how long it takes.
DURATION = re.compile(r"([0-9]+(d|h|m|s|ms))+")
SHORT = "10ms"

# Of who may make subscriptions, where the daemon has identities.
TOKEN = os.environ.get("BROKER_TOKEN")


@schemathesis.hook
def before_call(context, case, kwargs):
    query = case.query
    if isinstance(query, dict) and DURATION.fullmatch(str(query.get("wait", ""))):
        query["wait"] = SHORT
    path = case.operation.path
    makes = path == "/subscriptions/{name}" and case.method == "PUT"
    if path.startswith("/subscriptions/{name}") and not makes:
        make(case.operation.schema.get_base_url())


def make(base):
    """Makes the subscription anew where it is gone: deleting it is asked as well."""
    headers = {"if-none-match": "*"}
    if TOKEN:
        headers["authorization"] = f"Bearer {TOKEN}"
    url = f"{base.rstrip('/')}/subscriptions/{NAME}"
    made = requests.put(url, json={"filter": NAME}, headers=headers, timeout=10)
    assert made.status_code in (201, 412), f"{made.status_code}: {made.text}"
