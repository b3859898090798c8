#!/usr/bin/env python3
"""Writes castier's events into a SQLite file: from a webhook, from NATS JetStream or from RabbitMQ. Copy it, and change `react`.

  consumer.py [--database events.db] webhook --secret-file FILE [--listen 127.0.0.1:8090]
  consumer.py [--database events.db] nats [--url nats://127.0.0.1:4222] [--subject castier.events]
  consumer.py [--database events.db] amqp [--url amqp://127.0.0.1:5672] [--queue castier.events]

castier delivers each event at least once. So an event is stored under its id, and an event that comes again changes nothing. Events are
stored in batches, one transaction for each, and are acknowledged only when the transaction is on disk.
"""

import argparse
import base64
import hashlib
import hmac
import http.server
import json
import pathlib
import sqlite3
import sys
import threading
import time

BATCH = 500  # events in a transaction
WAIT = 1.0  # seconds that an incomplete batch waits for more
LARGEST = 8 << 20  # bytes in the body of a webhook
TOLERANCE = 300  # seconds between the clocks, as Standard Webhooks recommends


def react(connection, event):
    """What to do for an event that is new. It is in the same transaction: if it fails, the event comes again."""


class Store:
    def __init__(self, path):
        self.lock = threading.Lock()
        self.connection = sqlite3.connect(path, check_same_thread=False)
        self.connection.execute("PRAGMA journal_mode = WAL")
        self.connection.execute("PRAGMA synchronous = FULL")
        self.connection.execute(
            "CREATE TABLE IF NOT EXISTS events (id TEXT PRIMARY KEY, type TEXT, digest TEXT, size INTEGER, node TEXT, client TEXT, time TEXT)"
        )

    def add(self, events):
        """Returns when the events are on disk."""
        with self.lock, self.connection as connection:
            for event in events:
                data = event.get("data") or {}
                row = (event["id"], event["type"], event["subject"], data.get("size"), data.get("node"), data.get("client"), event["time"])
                if connection.execute("INSERT OR IGNORE INTO events VALUES (?, ?, ?, ?, ?, ?, ?)", row).rowcount:
                    react(connection, event)


def events_of(body):
    """One CloudEvent, or a batch of them."""
    found = json.loads(body)
    return found if isinstance(found, list) else [found]


# ---- webhook ----


def is_signed(key, headers, body):
    """The check of https://www.standardwebhooks.com: the signature, and that the request is not an old one."""
    identity, timestamp = headers.get("webhook-id", ""), headers.get("webhook-timestamp", "")
    if not timestamp.isdigit() or abs(time.time() - int(timestamp)) > TOLERANCE:
        return False
    signature = hmac.new(key, f"{identity}.{timestamp}.".encode() + body, hashlib.sha256).digest()
    expected = b"v1," + base64.b64encode(signature)
    return any(hmac.compare_digest(expected, given.encode()) for given in headers.get("webhook-signature", "").split())


def webhook(store, arguments):
    secret = pathlib.Path(arguments.secret_file).read_text().strip()
    key = base64.b64decode(secret.removeprefix("whsec_"))

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 60

        def do_POST(self):
            length = self.headers.get("content-length", "")
            if not length.isdigit() or int(length) > LARGEST:
                self.close_connection = True
                return self.answer(413)
            body = self.rfile.read(int(length))
            if not is_signed(key, self.headers, body):
                return self.answer(401)
            store.add(events_of(body))
            # castier sends the events again unless it gets this.
            self.answer(204)

        def answer(self, status):
            self.send_response(status)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_):
            pass

    host, _, port = arguments.listen.rpartition(":")
    server = http.server.ThreadingHTTPServer((host, int(port)), Handler)
    print(f"listening on http://{host}:{server.server_port}", flush=True)
    server.serve_forever()


# ---- NATS JetStream: pip install nats-py ----


def nats(store, arguments):
    import asyncio

    import nats as client

    async def run():
        connection = await client.connect(arguments.url, max_reconnect_attempts=-1)
        # The consumer is durable: the broker knows what this program has acknowledged, also after a restart.
        subscription = await connection.jetstream().pull_subscribe(arguments.subject, durable="castier-consumer")
        print("connected", flush=True)
        while True:
            try:
                messages = await subscription.fetch(BATCH, timeout=WAIT)
            except TimeoutError:
                continue
            store.add(event for message in messages for event in events_of(message.data))
            for message in messages:
                await message.ack()

    asyncio.run(run())


# ---- RabbitMQ: pip install pika ----


def amqp(store, arguments):
    import pika

    connection = pika.BlockingConnection(pika.URLParameters(arguments.url))
    channel = connection.channel()
    channel.basic_qos(prefetch_count=2 * BATCH)
    print("connected", flush=True)
    batch, last = [], None
    for method, _, body in channel.consume(arguments.queue, inactivity_timeout=WAIT):
        if method:
            batch.extend(events_of(body))
            last = method.delivery_tag
        if batch and (not method or len(batch) >= BATCH):
            store.add(batch)
            channel.basic_ack(last, multiple=True)
            batch = []


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--database", default="events.db")
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("webhook")
    command.add_argument("--listen", default="127.0.0.1:8090", help="HOST:PORT; put a proxy with TLS in front of it off this machine")
    command.add_argument("--secret-file", required=True, help="the file that events.secret_file of castier names")
    command.set_defaults(run=webhook)
    command = commands.add_parser("nats")
    command.add_argument("--url", default="nats://127.0.0.1:4222")
    command.add_argument("--subject", default="castier.events")
    command.set_defaults(run=nats)
    command = commands.add_parser("amqp")
    command.add_argument("--url", default="amqp://127.0.0.1:5672")
    command.add_argument("--queue", default="castier.events")
    command.set_defaults(run=amqp)
    arguments = parser.parse_args()
    try:
        arguments.run(Store(arguments.database), arguments)
    except KeyboardInterrupt:
        sys.exit(0)


if __name__ == "__main__":
    main()
