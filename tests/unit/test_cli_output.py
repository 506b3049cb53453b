"""What is printed: YAML that means the same as the JSON, tables that align, and nothing that drives the terminal."""

from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alveole.cli import output
from alveole.cli.yaml import to_yaml

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(JSON)
def test_yaml_means_what_the_json_means(value: Any) -> None:
    yaml = pytest.importorskip("yaml")
    assert _floats(yaml.safe_load(to_yaml(value))) == _floats(value)


def _floats(value: Any) -> Any:
    """Floats as text: PyYAML reads 1e+20 as text, as YAML 1.1 has it."""
    if isinstance(value, dict):
        return {key: _floats(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_floats(item) for item in value]
    return repr(value) if isinstance(value, float) else value


@pytest.mark.parametrize(
    "word", ["no", "Yes", "ON", "null", "~", "1", "1.5", "0x1", "a: b", "- a", "", " a", "a #b", "1e3"]
)
def test_text_that_yaml_could_take_for_something_else_is_quoted(word: str) -> None:
    yaml = pytest.importorskip("yaml")
    assert yaml.safe_load(to_yaml({word: word})) == {word: word}


def test_plain_words_are_not_quoted() -> None:
    assert to_yaml({"name": "web", "ports": [80], "labels": {}}) == "name: web\nports:\n  - 80\nlabels: {}\n"


def test_tables_align_and_cannot_drive_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    output.table(("NAME", "IMAGE"), [("web", "a"), ("database", "\x1b[31mred\n"), ("x", "")])
    assert capsys.readouterr().out == "NAME      IMAGE\nweb       a\ndatabase  \ufffd[31mred\ufffd\nx         -\n"


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (None, ""),
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 kB"),
        (10 << 30, "10.0 GB"),
        (150 << 20, "150 MB"),
        (1 << 70, "1048576 PB"),
    ],
)
def test_sizes_are_short(number: int | None, text: str) -> None:
    assert output.size(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-1, "0s"), (0, "0s"), (119, "119s"), (120, "2m"), (7199, "119m"), (7200, "2h"), (200000, "2d")],
)
def test_spans_are_in_their_largest_unit(seconds: float, text: str) -> None:
    assert output.span(seconds) == text


def test_ages_count_from_rfc_3339() -> None:
    assert output.age("2026-01-31T12:00:00.000000Z", datetime(2026, 1, 31, 13, 0, tzinfo=UTC)) == "60m"
    assert output.age(None) == ""


class Terminal:
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("variable", "value", "coloured"), [("X", "", True), ("NO_COLOR", "1", False), ("TERM", "dumb", False)]
)
def test_colour_is_for_terminals_that_want_it(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, coloured: bool
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv(variable, value)
    assert ("\x1b[" in output.style("x", "red", Terminal())) is coloured
