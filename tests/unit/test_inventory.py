"""The inventory that finds leftovers, on this very host."""

from tests import inventory


def test_difference_names_what_appeared_and_vanished() -> None:
    empty = inventory.Inventory(*(frozenset[str]() for _ in range(12)))
    one = inventory.Inventory(frozenset({"7 conmon"}), *(frozenset[str]() for _ in range(11)))
    assert inventory.difference(empty, empty) == []
    assert inventory.difference(empty, one) == ["processes: left over: 7 conmon"]
    assert inventory.difference(one, empty) == ["processes: vanished: 7 conmon"]


def test_program_is_known_by_name_module_or_script() -> None:
    for argv in (
        ["/usr/bin/conmon", "-c", "x"],
        ["qemu-system-x86_64", "-name", "x"],
        ["python3", "-m", "alveole.entry"],
        ["python3", "/v/bin/alveole"],
    ):
        assert inventory.is_program(argv), argv
    for argv in ([""], ["python3", "-m", "pytest", "tests"], ["vim", "alveole.py"], ["python3", "-c", "print(1)"]):
        assert not inventory.is_program(argv), argv
