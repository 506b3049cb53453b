"""Which template a key means. Pure."""

from collections.abc import Iterable

from alveole.model.error import conflict, not_found
from alveole.model.template import Template


def find_template(templates: Iterable[Template], key: str) -> Template:
    """By its key, or the beginning of one. Raises NOT_FOUND, or CONFLICT naming the candidates."""
    found = [template for template in templates if key and template.key.startswith(key)]
    if not found:
        raise not_found(f"template {key} does not exist", hint="alveole template ls shows all")
    if len(found) > 1:
        keys = ", ".join(template.key for template in found[:5])
        raise conflict(f"{key!r} is not unique: {keys}", hint="give more of the key")
    return found[0]
