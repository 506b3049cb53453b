"""nftables: whole rulesets through the ``nft`` program, single elements through libnftables in this process.

A process costs about 6 ms, the library 0.4 ms; but the library keeps memory in proportion to the largest ruleset it has
read, so that large ones go through the program. Both carry out one text as one atomic transaction.
"""

import ctypes
import errno
import threading

from alveole.host.process import run
from alveole.model.error import internal, unsupported

_LIBRARY = "libnftables.so.1"
_RULESET_TIMEOUT_S = 30.0
_turn = threading.Lock()
"""The library serves one thread at a time: its contexts share a cache of devices and a count of users."""


async def load(text: str) -> None:
    """Carry out commands of any size. Raises AlveoleError with nft's words, and nothing is changed."""
    await run(["nft", "-f", "-"], timeout_s=_RULESET_TIMEOUT_S, stdin=text.encode())


async def list_table(name: str) -> str | None:
    """Rules of a table of family inet, without set elements; None if there is no such table."""
    result = await run(["nft", "-t", "list", "table", "inet", name], timeout_s=_RULESET_TIMEOUT_S, check=False)
    if result.code == 0:
        return result.text
    if b"No such file or directory" in result.stderr:
        return None
    raise result.failure()


async def list_tables() -> list[str]:
    """Names of all tables of family inet."""
    result = await run(["nft", "list", "tables", "inet"], timeout_s=_RULESET_TIMEOUT_S)
    return [line.split()[-1] for line in result.text.splitlines()]


class Library:
    """A libnftables context of the network namespace it is made in. ``execute`` blocks: call it in a thread."""

    def __init__(self) -> None:
        """Raises AlveoleError(UNSUPPORTED) if the library is not installed."""
        try:
            self._library = ctypes.CDLL(_LIBRARY)
        except OSError as error:
            raise unsupported(f"{_LIBRARY} is not installed", hint="install libnftables1") from error
        self._library.nft_ctx_new.restype = ctypes.c_void_p
        for name in ("nft_ctx_buffer_output", "nft_ctx_buffer_error", "nft_ctx_free"):
            getattr(self._library, name).argtypes = (ctypes.c_void_p,)
        self._library.nft_run_cmd_from_buffer.argtypes = (ctypes.c_void_p, ctypes.c_char_p)
        self._library.nft_ctx_get_error_buffer.argtypes = (ctypes.c_void_p,)
        self._library.nft_ctx_get_error_buffer.restype = ctypes.c_char_p
        with _turn:
            self._context: int | None = self._library.nft_ctx_new(0)
        self._library.nft_ctx_buffer_output(self._context)
        self._library.nft_ctx_buffer_error(self._context)

    def execute(self, text: str) -> None:
        """Carry out a few commands as one transaction. Raises AlveoleError with the library's words."""
        with _turn:
            if self._context is None:
                raise OSError(errno.EBADF, "the nftables library was closed")
            if self._library.nft_run_cmd_from_buffer(self._context, text.encode()) == 0:
                return
            words = self._library.nft_ctx_get_error_buffer(self._context).decode(errors="replace").strip()
        raise internal(f"nftables refused: {words.splitlines()[0] if words else 'without a reason'}", hint=text.strip())

    def close(self) -> None:
        with _turn:
            context, self._context = self._context, None
            if context is not None:
                self._library.nft_ctx_free(context)
