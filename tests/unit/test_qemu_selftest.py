"""What is concluded from the boots of machines. That they boot is for tests/integration/test_machine_selftest.py."""

import pytest

from alveole.host.probe.finding import Status
from alveole.runtime.qemu.selftest import SLOW_S, Outcome, judge

FAST, SLOW, NONE = Outcome(0.4), Outcome(SLOW_S + 2), Outcome(None, "KVM internal error")


@pytest.mark.parametrize(
    ("kvm", "tcg", "expected"),
    [
        (FAST, SLOW, [Status.OK, Status.OK]),
        (SLOW, SLOW, [Status.WARN, Status.OK]),
        (NONE, SLOW, [Status.WARN, Status.OK]),
        (FAST, NONE, [Status.OK, Status.WARN]),
        (NONE, NONE, [Status.MISSING, Status.MISSING]),
    ],
)
def test_something_is_missing_only_where_no_machine_boots(kvm: Outcome, tcg: Outcome, expected: list[Status]) -> None:
    """Interpreting takes its time; a processor that takes as long is none."""
    findings = judge({"kvm": kvm, "tcg": tcg})
    assert [finding.status for finding in findings] == expected
    assert all(finding.needed for finding in findings)


def test_how_long_it_took_or_why_it_did_not_is_told() -> None:
    kvm, tcg = judge({"kvm": NONE, "tcg": Outcome(4.26)})
    assert "booted in 4.3 s" in tcg.found
    assert "KVM internal error" in kvm.found
    assert "interpreted" in kvm.means
    assert "as if emulated" in judge({"kvm": SLOW})[0].found
