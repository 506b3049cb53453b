"""Where records are kept in the store. Everything a project owns is below ``projects/PROJECT/``."""

NODES = "nodes/"
ADDRESSES = "addresses/"
SUBNETS = "subnets/"


def collection(project: str, plural: str) -> str:
    return f"projects/{project}/{plural}/"


def instance(project: str, name: str) -> str:
    return collection(project, "instances") + name


def image(project: str, name: str) -> str:
    return collection(project, "images") + name


def network(project: str, name: str) -> str:
    return collection(project, "networks") + name


def volume(project: str, name: str) -> str:
    return collection(project, "volumes") + name


def snapshot(project: str, name: str) -> str:
    return collection(project, "snapshots") + name


def operation(project: str, identifier: str) -> str:
    return collection(project, "operations") + identifier


def node(name: str) -> str:
    return NODES + name


def address(value: str) -> str:
    """Taken addresses: the value is the instance's id."""
    return ADDRESSES + value


def subnet(value: str) -> str:
    """Taken subnets: the value is the network's id."""
    return SUBNETS + value.replace("/", "-")


def subnet_of(name: str) -> str:
    """The subnet that the last part of a key of ``subnet`` stands for."""
    return name.replace("-", "/")


def idempotency(project: str, key: str) -> str:
    return f"idempotency/{project}/{key}"


def table_of(key: str) -> str:
    """The collection a key belongs to, the unit the cache indexes by."""
    parts = key.split("/", 3)
    return "/".join(parts[:3]) + "/" if parts[0] == "projects" else parts[0] + "/"
