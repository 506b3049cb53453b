"""What an error of the operating system means to the user."""

import errno

from alveole.model.error import AlveoleError, exhausted, internal


def is_full(error: OSError) -> bool:
    return error.errno in {errno.ENOSPC, errno.EDQUOT}


def told(error: OSError) -> AlveoleError:
    words = f"{error.strerror}: {error.filename or ''}".rstrip(": ")
    return exhausted(words, hint="free space on that disk and try again") if is_full(error) else internal(words)
