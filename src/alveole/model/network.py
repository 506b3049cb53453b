"""A network: instances on the same one reach each other; nothing else reaches them unless published."""

from typing import Literal

from alveole.model.base import Name, Record, Timestamp


class Network(Record):
    """Key ``projects/PROJECT/networks/NAME``."""

    kind: Literal["network"] = "network"
    id: str  # 8 hex digits
    project: Name = "default"
    name: Name
    subnet: str  # IPv4 prefix inside the address pool of this Alveole, "10.203.16.0/20"
    internal: bool = False  # no way out to other networks or the internet
    removing: bool = False  # nothing new may use it: it goes as soon as it is certain that nobody does
    created_at: Timestamp
