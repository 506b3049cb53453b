"""What the guest of a machine tells, and that a hostile one can tell nothing that harms."""

import base64
import os
import threading
from pathlib import Path

import pytest

from alveole.model.error import AlveoleError, ErrorCode
from alveole.runtime.qemu.argv import COMMANDS, CONTROL, STATUS, WORDS
from alveole.runtime.qemu.capture import read_state
from alveole.runtime.qemu.guest import Guest, Told
from alveole.runtime.qemu.words import with_words

WAIT_S = 0.2


def told(directory: Path, content: bytes) -> Told:
    (directory / STATUS).write_bytes(content)
    return Guest(directory).told()


def test_a_whole_life_is_read(tmp_path: Path) -> None:
    said = told(tmp_path, b"waiting\nstarted\nexited 3 exited\n")
    assert said.is_waiting
    assert said.has_started
    assert said.exit == (3, False)
    assert said.failure is None


def test_before_it_has_said_anything(tmp_path: Path) -> None:
    for said in (Guest(tmp_path).told(), told(tmp_path, b"")):
        assert not said.is_waiting
        assert not said.has_started
        assert said.exit is None
        assert said.failure is None


def test_a_line_counts_when_it_is_whole(tmp_path: Path) -> None:
    assert told(tmp_path, b"waiting\nexited 1").exit is None
    assert told(tmp_path, b"waiting\nexited 1").is_waiting
    assert told(tmp_path, b"waiting\r\nexited 137 oom\r\n").exit == (137, True)


def test_why_it_failed_is_decoded(tmp_path: Path) -> None:
    words = "executable file `nothing` not found: é\n"
    line = b"failed " + base64.b64encode(words.encode()) + b"\n"
    assert told(tmp_path, line).failure == words


@pytest.mark.parametrize(
    "line",
    [
        *("exited", "exited x exited", "exited -1 exited", "exited 1234 exited", "exited 1 exited more", "exited 1"),
        *("exited 1 killed by nobody", " exited 1 exited", "started 1", "xstarted", "\x00started", "waiting\x0b"),
    ],
)
def test_a_line_that_no_guest_of_ours_writes_says_nothing(tmp_path: Path, line: str) -> None:
    said = told(tmp_path, f"{line}\n".encode())
    assert said.exit is None
    assert not said.has_started
    assert not said.is_waiting


@pytest.mark.parametrize("words", [b"!!!", b"\xff\xfe", "é".encode(), b"YQ", b"a" * 9000, b""])
def test_words_that_are_no_base64_are_no_error_of_ours(tmp_path: Path, words: bytes) -> None:
    failure = told(tmp_path, b"failed " + words + b"\n").failure
    assert failure is not None
    assert len(failure) <= 4096


def test_an_exit_code_is_one_of_a_process(tmp_path: Path) -> None:
    assert told(tmp_path, b"exited 999 exited\n").exit == (999 & 0xFF, False)


def test_what_it_said_first_stands(tmp_path: Path) -> None:
    assert told(tmp_path, b"exited 0 exited\nexited 1 oom\n").exit == (0, False)


def test_no_more_is_read_than_a_guest_of_ours_says(tmp_path: Path) -> None:
    said = told(tmp_path, b"started\n" + b"x" * (3 << 20) + b"\nexited 1 exited\n")
    assert said.has_started
    assert said.exit is None
    assert sum(map(len, said.lines)) <= 1 << 20


def test_a_link_in_place_of_its_file_is_not_followed(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("waiting\n")
    (tmp_path / STATUS).symlink_to(secret)
    with pytest.raises(OSError, match="symbolic links"):
        Guest(tmp_path).told()


def test_of_commands_only_the_last_are_kept(tmp_path: Path) -> None:
    guest, file = Guest(tmp_path), tmp_path / COMMANDS
    guest.forget_commands()
    assert not guest.has_command_started("aa")
    file.write_text("first\n" + "x" * (1 << 20) + "\nlast\n")
    guest.forget_commands()
    assert guest.has_command_started("last")
    assert not guest.has_command_started("first")
    assert file.stat().st_blocks * 512 < 64 << 10


async def test_a_request_to_one_that_has_ended_is_dropped(tmp_path: Path) -> None:
    await Guest(tmp_path).send("signal 9")
    os.mkfifo(tmp_path / f"{CONTROL}.in")
    await Guest(tmp_path).send("signal 9")


async def test_a_long_request_arrives_as_its_reader_takes_it(tmp_path: Path) -> None:
    fifo, content = tmp_path / f"{CONTROL}.in", os.urandom(300_000)
    os.mkfifo(fifo)
    received = bytearray()
    opened = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)

    def read() -> None:
        os.set_blocking(opened, True)
        while chunk := os.read(opened, 4096):
            received.extend(chunk)

    reader = threading.Thread(target=read)
    keeper = os.open(fifo, os.O_WRONLY)
    reader.start()
    try:
        await Guest(tmp_path).send("seed 300000 1", content)
    finally:
        os.close(keeper)
        reader.join()
        os.close(opened)
    assert bytes(received) == b"seed 300000 1\n" + content


async def test_waiting_ends_when_the_machine_does(tmp_path: Path) -> None:
    guest = Guest(tmp_path)
    with pytest.raises(AlveoleError, match="ended before") as caught:
        await guest.until(lambda said: said.is_waiting, alive=lambda: False, timeout_s=WAIT_S)
    assert caught.value.code == ErrorCode.INTERNAL
    with pytest.raises(AlveoleError, match="not ready") as caught:
        await guest.until(lambda said: said.is_waiting, alive=lambda: True, timeout_s=WAIT_S)
    assert caught.value.code == ErrorCode.TIMEOUT


def test_last_words_are_printable_and_few(tmp_path: Path) -> None:
    (tmp_path / WORDS).write_bytes(b"x" * 100_000 + b"\n\x1b[2Jit \xff said\x07 this\n")
    message = with_words(AlveoleError(ErrorCode.INTERNAL, "ended"), tmp_path).message
    assert message.startswith("ended: ")
    assert "said this" in message
    assert message.isprintable()
    assert len(message) <= 5000


def test_a_sparse_file_of_qemus_does_not_fill_our_memory(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"state")
    assert read_state(source) == b"state"
    os.truncate(source, 1 << 40)
    with pytest.raises(AlveoleError, match="larger than"):
        read_state(source)
