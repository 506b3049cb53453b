"""JSON data as block YAML."""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

_PLAIN = re.compile(r"^[A-Za-z_][A-Za-z0-9_./@-]*$")
_WORDS = frozenset({"y", "n", "yes", "no", "on", "off", "true", "false", "null"})
_ESCAPED = re.compile("[\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff\ufffe\uffff]")


def to_yaml(value: Any) -> str:
    """Strings that YAML could read as something else are quoted."""
    return "".join(_lines(value, ""))


def _lines(value: Any, indent: str) -> Iterable[str]:
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _entry(f"{indent}{_scalar(str(key))}:", item, indent)
    elif isinstance(value, list | tuple) and value:
        for item in value:
            yield from _entry(f"{indent}-", item, indent)
    else:
        yield f"{indent}{_scalar(value)}\n"


def _entry(lead: str, item: Any, indent: str) -> Iterable[str]:
    if isinstance(item, Mapping | list | tuple) and item:
        yield f"{lead}\n"
        yield from _lines(item, indent + "  ")
    else:
        yield f"{lead} {_scalar(item)}\n"


def _scalar(value: Any) -> str:
    if isinstance(value, str) and _PLAIN.match(value) and value.lower() not in _WORDS:
        return value
    # JSON is YAML, but for the characters that YAML wants escaped.
    return _ESCAPED.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(value, ensure_ascii=False))
