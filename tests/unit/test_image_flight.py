"""Which objects of the image store may not be collected, and which are undone."""

from pathlib import Path

import pytest

from alveole.image.flight import Flights


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def flights(clock: Clock) -> Flights:
    return Flights(fresh_s=60, clock=clock)


def test_held_while_flying_and_a_while_after(flights: Flights, clock: Clock) -> None:
    flight = flights.begin(Path("/t"))
    flights.hold(flight, ["a"])
    flights.create(flight, "b")
    assert flights.held() == {"a", "b"}
    flights.land(flight)
    flights.end(flight)
    clock.now_s += 59
    assert flights.held() == {"a", "b"}
    clock.now_s += 2
    assert flights.held() == set()


def test_failed_flight_holds_nothing(flights: Flights) -> None:
    flight = flights.begin(Path("/t"))
    flights.create(flight, "b")
    flights.end(flight)
    assert flight.created == {"b"}
    assert flights.held() == set()


def test_what_another_relies_on_is_not_undone(flights: Flights) -> None:
    first, second = flights.begin(Path("/1")), flights.begin(Path("/2"))
    flights.create(first, "a")
    flights.hold(second, ["a"])
    flights.hold(first, ["a"])
    assert first.created == set()
    flights.end(first)
    assert flights.held() == {"a"}


def test_a_second_use_by_the_creator_is_still_undone(flights: Flights) -> None:
    """An image may name one layer twice."""
    flight = flights.begin(Path("/1"))
    flights.create(flight, "a")
    flights.hold(flight, ["a"])
    assert flight.created == {"a"}


def test_a_long_flight_keeps_what_landed_meanwhile(flights: Flights, clock: Clock) -> None:
    """A build adds layers by operations of their own, and names them all at its end."""
    build = flights.begin(Path("/build"))
    clock.now_s += 1
    layer = flights.begin(Path("/layer"))
    flights.create(layer, "a")
    flights.land(layer)
    flights.end(layer)
    clock.now_s += 3600
    assert flights.held() == {"a"}
    assert flights.directories() == {Path("/build")}
    flights.end(build)
    assert flights.held() == set()
