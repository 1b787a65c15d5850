"""What a host has that a pass could leave behind, in a form to compare: before and after must be equal.

    before = leftovers(host)
    ...
    assert leftovers(host) == before

One line a thing, sorted, each with its kind in front. What changes by itself is left out: counters, time-outs,
interface numbers, learnt neighbours, link-layer state.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from .host import Host
from .processes import inside
from .record import stat_fields

# What each command shows is a kind of thing; -o: one line a thing. Neighbours: only those that somebody configured.
_COMMANDS = {
    "rule4": ["ip", "-4", "rule", "show"],
    "rule6": ["ip", "-6", "rule", "show"],
    "route4": ["ip", "-4", "-o", "route", "show", "table", "all"],
    "route6": ["ip", "-6", "-o", "route", "show", "table", "all"],
    "link": ["ip", "-o", "link", "show"],
    "address": ["ip", "-o", "address", "show"],
    "neighbour": ["ip", "-o", "neighbour", "show", "nud", "permanent"],
    "proxy4": ["ip", "-4", "-o", "neighbour", "show", "proxy"],
    "proxy6": ["ip", "-6", "-o", "neighbour", "show", "proxy"],
    "qdisc": ["tc", "qdisc", "show"],
}

_VOLATILE = re.compile(
    r"\s+(expires|valid_lft|preferred_lft|refcnt|link-netns|link-netnsid|state|proto|used|age) \S+"      # word, value
    r"|\s+(NO-CARRIER|linkdown|dynamic|tentative|cache)\b"
    r"|(?<=<)NO-CARRIER,"
    r"|^\d+: (?=\S+ )")                                                   # "3: eth0 ...": the interface's number
#: And whose a table with an owner is, behind its brace.
_VOLATILE_NFT = re.compile(r"\s+expires \w+|(?<=counter )packets \d+ bytes \d+ ?|\s+# progname .*$")

# A pass has reasons to change these, for all interfaces or for one.
_SYSCTLS = ("forwarding", "rp_filter", "accept_local", "route_localnet", "arp_ignore", "arp_announce", "arp_notify",
            "proxy_arp", "proxy_ndp", "send_redirects", "src_valid_mark")


def leftovers(host: Host) -> list[str]:
    """Everything on `host` that our tool could have left: rules, routes, links, files, stopped processes, sysctls."""
    return sorted([*_nft(host), *_network(host), *_sysctls(host), *_files(host.run_dir), *_stopped(host)])


def _nft(host: Host) -> Iterator[str]:
    """Each line of the rule set with the lines of the blocks around it, so that sorting loses nothing."""
    blocks: list[str] = []
    # --stateless leaves counters and quotas out, but not the expiry of a set's elements.
    for line in host.run(["nft", "--stateless", "list", "ruleset"]).stdout.splitlines():
        text = _VOLATILE_NFT.sub("", line.strip())
        if text == "}":
            blocks.pop()
        elif text:
            yield " > ".join(["nft", *blocks, text.removesuffix(" {")])
            if text.endswith("{") and "}" not in text:
                blocks.append(text.removesuffix(" {"))


def _network(host: Host) -> Iterator[str]:
    for kind, command in _COMMANDS.items():
        # A table that does not exist yet is an error for some of them, and means: nothing.
        for line in host.run(command, check=False).stdout.splitlines():
            text = _VOLATILE.sub("", line.replace("\\", " "))
            yield f"{kind} {' '.join(text.split())}"


def _sysctls(host: Host) -> Iterator[str]:
    with host.enter():
        for name in _SYSCTLS:
            for path in Path("/proc/sys/net").glob(f"ipv[46]/conf/*/{name}"):
                yield f"sysctl {path.relative_to('/proc/sys')} = {path.read_text().strip()}"


def _files(directory: Path) -> Iterator[str]:
    for parent, directories, names in os.walk(directory):
        for name in [*directories, *names]:
            path = Path(parent, name)
            try:
                kind = stat.filemode(path.lstat().st_mode)[0]
            except FileNotFoundError:      # it went while we looked
                continue
            yield f"file {kind} {path.relative_to(directory)}"


def _stopped(host: Host) -> Iterator[str]:
    """Processes that are stopped by a signal (T) or by a tracer (t)."""
    for pid in inside([host.netns]):
        fields = stat_fields(pid)
        if fields is not None and fields[0] in "Tt":
            yield f"process {pid} is in state {fields[0]}"
