"""The one error type that crosses layers. It imports nothing, so that every layer can raise it cheaply."""

from enum import StrEnum


class ErrorCode(StrEnum):
    """What kind of failure it is, and so what a caller can do about it. A closed set."""

    INVALID = "invalid"  # the request itself is wrong: correct it
    NOT_FOUND = "not_found"  # the thing named does not exist
    EXISTS = "exists"  # the name or port is taken
    CONFLICT = "conflict"  # the thing is in a state that does not allow this, or changed meanwhile
    DENIED = "denied"  # not allowed
    EXHAUSTED = "exhausted"  # no space, addresses, memory or identifiers left
    UNSUPPORTED = "unsupported"  # this host or isolation cannot do it
    UNAVAILABLE = "unavailable"  # no answer: daemon stopped, registry unreachable
    TIMEOUT = "timeout"  # the deadline passed
    CANCELLED = "cancelled"  # somebody cancelled the operation
    GONE = "gone"  # the revision asked for was compacted away: list again
    INTERNAL = "internal"  # a fault of Alveole or its engines


class AlveoleError(Exception):
    """A failure told to the user: what happened, and what to do.

    ``message`` names the object and what is wrong with it; ``hint`` says what to do;
    ``field`` is the dotted path of the offending request field or the file line.
    """

    def __init__(self, code: ErrorCode, message: str, *, hint: str = "", field: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.hint = hint
        self.field = field

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


def invalid(message: str, *, hint: str = "", field: str = "") -> AlveoleError:
    return AlveoleError(ErrorCode.INVALID, message, hint=hint, field=field)


def not_found(message: str, *, hint: str = "") -> AlveoleError:
    return AlveoleError(ErrorCode.NOT_FOUND, message, hint=hint)


def conflict(message: str, *, hint: str = "") -> AlveoleError:
    return AlveoleError(ErrorCode.CONFLICT, message, hint=hint)


def exhausted(message: str, *, hint: str = "") -> AlveoleError:
    return AlveoleError(ErrorCode.EXHAUSTED, message, hint=hint)


def unsupported(message: str, *, hint: str = "") -> AlveoleError:
    return AlveoleError(ErrorCode.UNSUPPORTED, message, hint=hint)


def unavailable(message: str, *, hint: str = "") -> AlveoleError:
    return AlveoleError(ErrorCode.UNAVAILABLE, message, hint=hint)


def internal(message: str, *, hint: str = "") -> AlveoleError:
    return AlveoleError(ErrorCode.INTERNAL, message, hint=hint)
