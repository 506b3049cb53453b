"""The Python client of Alveole: dicts in and out, over the daemon's Unix socket, with nothing but the standard library.

from alveole.client.api import Client

client = Client("/run/alveole/alveole.sock")
for instance in client.instances():
    print(instance["name"], instance["status"]["phase"])
"""
