"""Subnets and addresses never overlap, and are given out until there are none."""

from collections.abc import Callable
from ipaddress import IPv4Address, IPv4Network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alveole.model.error import AlveoleError, ErrorCode
from alveole.policy.address import RESERVED_PREFIX, check_subnet, choose_address, choose_subnet

POOL = IPv4Network("10.64.0.0/16")
RESERVED = IPv4Network((POOL.network_address, RESERVED_PREFIX))
prefixes = st.integers(17, 24)
inside = st.builds(
    lambda prefix, host: IPv4Network((int(POOL.network_address) + host, prefix), strict=False),
    prefixes,
    st.integers(0, 65535),
)


def answer(call: Callable[[], IPv4Network]) -> IPv4Network | AlveoleError:
    try:
        return call()
    except AlveoleError as error:
        return error


@given(st.lists(inside, max_size=8), prefixes)
def test_a_chosen_subnet_is_free_and_the_lowest(used: list[IPv4Network], prefix: int) -> None:
    chosen = answer(lambda: choose_subnet(POOL, [str(subnet) for subnet in used], prefix))
    if isinstance(chosen, AlveoleError):
        assert chosen.code is ErrorCode.EXHAUSTED
        assert all(any(block.overlaps(u) for u in [*used, RESERVED]) for block in POOL.subnets(new_prefix=prefix))
        return
    assert chosen.subnet_of(POOL)
    assert chosen.prefixlen == prefix
    assert not any(chosen.overlaps(other) for other in [*used, RESERVED])
    lower = (block for block in POOL.subnets(new_prefix=prefix) if block < chosen)
    assert all(any(block.overlaps(other) for other in [*used, RESERVED]) for block in lower)


def test_a_pool_is_given_out_whole() -> None:
    used: list[str] = []
    for _ in range(63):
        used.append(str(choose_subnet(POOL, used, 22)))
    with pytest.raises(AlveoleError, match="no free /22") as refused:
        choose_subnet(POOL, used, 22)
    assert refused.value.code is ErrorCode.EXHAUSTED


@given(st.lists(inside, max_size=4), inside)
def test_a_wanted_subnet_is_given_or_refused_by_name(used: list[IPv4Network], wanted: IPv4Network) -> None:
    free = not any(wanted.overlaps(other) for other in [*used, RESERVED])
    got = answer(lambda: check_subnet(POOL, [str(subnet) for subnet in used], str(wanted)))
    if isinstance(got, AlveoleError):
        assert not free
        assert (got.code, got.field) == (ErrorCode.INVALID, "subnet")
    else:
        assert free
        assert got == wanted


@pytest.mark.parametrize(
    "wanted",
    ["", "x", "10.64.8.1/24", "10.65.0.0/24", "0.0.0.0/0", "10.64.0.0/16", "10.64.8.0/31", "10.64.8.0/33", "fd00::/64"],
)
def test_what_is_no_usable_subnet_is_refused(wanted: str) -> None:
    with pytest.raises(AlveoleError) as refused:
        check_subnet(POOL, [], wanted)
    assert refused.value.code is ErrorCode.INVALID
    assert refused.value.field == "subnet"


SMALL = IPv4Network("10.64.8.0/28")
hosts = st.sampled_from([str(host) for host in SMALL.hosts()])


@given(st.sets(hosts), st.just("") | hosts | st.just("10.99.0.7"))
def test_an_address_is_free_and_the_next_one(used: set[str], after: str) -> None:
    free = [IPv4Address(host) for host in set(map(str, SMALL.hosts())) - used]
    if not free:
        with pytest.raises(AlveoleError, match="no free address") as refused:
            choose_address(SMALL, used, after)
        assert refused.value.code is ErrorCode.EXHAUSTED
        return
    chosen = IPv4Address(choose_address(SMALL, used, after))
    assert chosen in free
    if after and IPv4Address(after) in SMALL:
        above = [address for address in free if address > IPv4Address(after)]
        assert chosen == min(above or free)


def test_an_address_given_back_is_not_given_out_at_once() -> None:
    first = choose_address(SMALL, set())
    assert choose_address(SMALL, set(), first) != first


def test_every_address_is_given_out_once() -> None:
    used: set[str] = set()
    latest = ""
    for _ in SMALL.hosts():
        latest = choose_address(SMALL, used, latest)
        assert latest not in used
        used.add(latest)
    assert used == {str(host) for host in SMALL.hosts()}
