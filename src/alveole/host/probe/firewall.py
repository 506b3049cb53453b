"""nftables, and the rules of others that would drop what Alveole forwards.

A packet must be accepted by every chain that hooks forwarding: an accept in Alveole's own table does not overrule a
drop in another. Foreign sets can hold millions of elements, so everything is listed terse and chain by chain.
"""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from alveole.host.probe.finding import INSTALL, Finding, Status, needs_root
from alveole.host.process import run
from alveole.model.error import AlveoleError

TIMEOUT_S = 5.0
DEVICES = "av+"  # in the words of iptables: every network device of every Alveole daemon
POOLS = ("10.64.0.0/10", "10.128.0.0/10")  # what daemons choose their addresses from
_LETS_US_THROUGH = re.compile(rf'"av\*"|{re.escape(POOLS[0])}')

TRIAL = """
table inet alveole_trial {
  map backends { type inet_service : ipv4_addr . inet_service; }
  chain prerouting {
    type nat hook prerouting priority dstnat;
    fib daddr type local dnat ip to tcp dport map @backends;
  }
  chain postrouting { type nat hook postrouting priority srcnat; ip saddr 10.64.0.0/16 masquerade; }
  chain forward { type filter hook forward priority filter; policy drop; ct state established,related accept; }
  chain balance { dnat ip to numgen inc mod 2 map { 0 : 10.64.0.2, 1 : 10.64.0.3 }; }
}
delete table inet alveole_trial
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """A chain that sees forwarded IPv4 packets."""

    family: str
    table: str
    name: str
    policy: str

    def __str__(self) -> str:
        return f"{self.family} {self.table} {self.name}"


async def nftables() -> Finding:
    """Whether the kernel takes the rules Alveole writes: they are made, and deleted, in a namespace of their own."""
    if skipped := needs_root("nftables", needed=True):
        return skipped
    try:
        done = await run(["unshare", "--net", "nft", "-f", "-"], timeout_s=TIMEOUT_S, stdin=TRIAL.encode(), check=False)
        problem = done.stderr.decode(errors="replace").strip().partition("\n")[0]
    except AlveoleError as error:
        problem = error.message
    if not problem:
        return Finding(
            name="nftables",
            status=Status.OK,
            needed=True,
            found="address translation, maps, connection tracking and balancing work",
            means="published ports, isolation between networks and balancing are done by the kernel",
        )
    installed = "not found" not in problem.lower() and "No such file" not in problem
    return Finding(
        name="nftables",
        status=Status.MISSING,
        needed=True,
        found=problem[:200],
        means="instances cannot have networks",
        fix="boot a kernel with nftables (NF_TABLES_INET, NFT_NAT, NFT_CT, NFT_FIB)"
        if installed
        else "install nftables",
        command="" if installed else f"{INSTALL} nftables",
    )


async def foreign_firewalls() -> Finding:
    if skipped := needs_root("other firewalls", needed=True):
        return skipped
    try:
        dropping = [*await _nft_drops(), *await _legacy_drops()]
    except AlveoleError as error:
        return Finding(
            name="other firewalls",
            status=Status.WARN,
            needed=True,
            found=error.message[:200],
            means="it is not known whether another firewall drops the traffic of instances",
            fix="install nftables",
            command=f"{INSTALL} nftables",
        )
    if dropping:
        return dropping[0]
    return Finding(
        name="other firewalls",
        status=Status.OK,
        needed=True,
        found="no other firewall drops forwarded packets",
        means="instances can be reached through the ports they publish, and reach the outside",
    )


async def _nft_drops() -> list[Finding]:
    findings = []
    listed = await run(["nft", "-j", "list", "chains"], timeout_s=TIMEOUT_S)
    for chain in forward_chains(listed.text):
        table = await run(["nft", "-t", "list", "table", chain.family, chain.table], timeout_s=TIMEOUT_S)
        if drops(chain, table.text):
            findings.append(explain(chain, table.text))
    return findings


def forward_chains(listing: str) -> tuple[Chain, ...]:
    """Of the output of ``nft -j list chains``; Alveole's own are left out."""
    chains = (item["chain"] for item in json.loads(listing)["nftables"] if "chain" in item)
    return tuple(
        Chain(family=chain["family"], table=chain["table"], name=chain["name"], policy=chain.get("policy", "accept"))
        for chain in chains
        if chain.get("hook") == "forward"
        and chain["family"] in {"ip", "inet"}
        and not chain["table"].startswith("alveole")
    )


def drops(chain: Chain, table: str) -> bool:
    """Whether what no rule of ``chain`` names is dropped, and none names Alveole's devices or addresses.

    ``table``: the output of ``nft -t list table`` for the chain's table.
    """
    if _LETS_US_THROUGH.search(table):
        return False
    body = re.search(rf"^\tchain {re.escape(chain.name)} {{\n(.*?)^\t}}", table, re.DOTALL | re.MULTILINE)
    rules = body[1].strip().splitlines() if body else []
    last = re.sub(r"counter packets \d+ bytes \d+\s*", "", rules[-1].strip()) if rules else ""
    return chain.policy == "drop" or re.match(r"(drop|reject)\b", last) is not None


def explain(chain: Chain, table: str) -> Finding:
    """Who dropped it, by the chains that they are known to make, and their own way to let it pass."""
    if "chain DOCKER-USER" in table:
        who = "Docker"
        fix = (
            f"iptables -I DOCKER-USER -i {DEVICES} -j ACCEPT && iptables -I DOCKER-USER -o {DEVICES} -j ACCEPT "
            "(again after each start of Docker)"
        )
    elif "chain ufw-" in table:
        who, fix = "ufw", "ufw default allow routed (Alveole's own table still denies what is not published)"
    elif chain.table == "firewalld":
        who = "firewalld"
        sources = " ".join(f"--add-source={pool}" for pool in POOLS)
        fix = f"firewall-cmd --permanent --zone=trusted {sources} && firewall-cmd --reload"
    else:
        who, fix = f"the nftables chain {chain}", f"accept packets from and to devices {DEVICES} in that chain"
    return _dropped(who, f"{chain} ends in a drop", fix)


async def _legacy_drops() -> list[Finding]:
    """iptables-legacy keeps rules where nft does not see them. Asked only if it has some: asking makes the table."""
    names = Path("/proc/net/ip_tables_names")
    if not names.exists() or "filter" not in names.read_text().split():
        return []
    try:
        rules = (await run(["iptables-legacy", "-S", "FORWARD"], timeout_s=TIMEOUT_S)).text
    except AlveoleError:
        return [_dropped("possibly iptables-legacy", "its rules cannot be listed", "iptables-legacy -S FORWARD")]
    return [_legacy_explained(rules)] if legacy_drops(rules) else []


def legacy_drops(rules: str) -> bool:
    """``rules``: the output of ``iptables-legacy -S FORWARD``."""
    ends_in_drop = re.search(r"^-A FORWARD -j (DROP|REJECT)", rules, re.MULTILINE)
    return ("-P FORWARD DROP" in rules or ends_in_drop is not None) and DEVICES not in rules


def _legacy_explained(rules: str) -> Finding:
    chain = "DOCKER-USER" if "DOCKER-USER" in rules else "FORWARD"
    fix = " && ".join(f"iptables-legacy -I {chain} -{side} {DEVICES} -j ACCEPT" for side in "io")
    return _dropped("iptables-legacy", "its FORWARD chain ends in a drop", fix)


def _dropped(who: str, found: str, fix: str) -> Finding:
    return Finding(
        name="other firewalls",
        status=Status.MISSING,
        needed=True,
        found=f"{who}: {found}",
        means="packets to and from instances are dropped, whatever Alveole accepts",
        fix=fix,
    )


def forwarding() -> Finding:
    if skipped := needs_root("ip forwarding", needed=True):
        return skipped
    setting = Path("/proc/sys/net/ipv4/ip_forward")
    on = setting.read_text().strip() == "1"
    if on or os.access(setting, os.W_OK):
        return Finding(
            name="ip forwarding",
            status=Status.OK,
            needed=True,
            found="on" if on else "off",
            means="packets are routed to instances" if on else "the daemon turns it on when it starts",
        )
    return Finding(
        name="ip forwarding",
        status=Status.MISSING,
        needed=True,
        found="off, and /proc/sys cannot be written",
        means="no packet reaches an instance",
        fix="sysctl --write net.ipv4.ip_forward=1 (outside, if this is a container)",
    )
