"""What the client raises: the server's error as it was told, or why the server could not be asked."""

from collections.abc import Mapping
from typing import Any


class ApiError(Exception):
    """A request that failed.

    ``code`` is one of the API's error codes (invalid, not_found, conflict, ...); ``unavailable`` is also raised
    here, when no daemon answers. ``hint`` says what to do, ``field`` names the offending part of the request.
    """

    def __init__(self, code: str, message: str, hint: str = "", field: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.hint = hint
        self.field = field

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "ApiError":
        """From the JSON of an error, as found in an answer, an operation or a status."""
        return cls(
            str(record.get("code", "internal")),
            str(record.get("message", "the daemon gave no reason")),
            str(record.get("hint") or ""),
            str(record.get("field") or ""),
        )

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message
