#!/usr/bin/env python3
"""A hook that moves a passed connection by the map of an nftables balancer: `pass --redirect hook:CMD` calls it.

    criu-tcpcp pass ... --redirect "hook:nft_balancer.py --gateway 'ssh gw' --mark 10.77.2.12=2"

The gateway routes by mark, and a map says which connection has which; what is in no map goes where it always went:

    table ip balancer {
        map moved { type ipv4_addr . inet_service . inet_service : mark; }
        chain steer { type filter hook prerouting priority mangle;
                      meta mark set ip saddr . tcp sport . tcp dport map @moved; }
    }
    ip rule add fwmark 2 lookup 102;  ip route add default via 10.77.2.12 table 102

That is the balancer's own setting, made beforehand (for IPv6: ip6, ipv6_addr, ip6 saddr, ip -6). One element of the map
is one connection: `commit` sets it, `undo` and `release` take it away. The origin host is out of the way from `commit`
on; until then it sends the packets on. Every event may come twice, so to find the work done is no error. A connection
that is passed on, or home again, has an element already: its mark is replaced in one transaction.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from typing import Any


def gateway(words: str, order: str, accepted: str = "") -> bool:
    """Have nft do it there, all or nothing; exit with what it says where it cannot. False where it says `accepted`."""
    done = subprocess.run([*shlex.split(words), "nft", "-f", "-"], input=order, text=True, stderr=subprocess.PIPE,
                          stdout=subprocess.DEVNULL, check=False)
    if done.returncode and not (accepted and accepted in done.stderr):
        sys.exit(f"nft, {order!r}: {done.stderr.strip().splitlines()[0] if done.stderr.strip() else done.returncode}")
    return done.returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gateway", default="", metavar="WORDS", help="what runs a command on the gateway: 'ssh gw'")
    parser.add_argument("--table", default="balancer")
    parser.add_argument("--mark", action="append", default=[], metavar="ADDRESS=MARK",
                        help="the mark by which the gateway routes to that destination")
    arguments = parser.parse_args()
    occasion: dict[str, Any] = json.load(sys.stdin)
    (_local, local_port), (peer, peer_port) = occasion["flow"]["local"], occasion["flow"]["peer"]
    marks = dict(one.split("=") for one in arguments.mark)
    where = occasion["destination"]["address"]
    family = "ip6" if ":" in peer else "ip"
    moved = f"{family} {arguments.table} moved"
    connection = f"{peer} . {peer_port} . {local_port}"
    if where not in marks:
        sys.exit(f"the balancer has no mark for {where}")
    add = f"add element {moved} {{ {connection} : {marks[where]} }}"
    delete = f"delete element {moved} {{ {connection} }}"
    match occasion["event"]:
        case "stage":  # can the gateway be reached, and has it the map?
            gateway(arguments.gateway, f"list map {moved}")
        case "commit":
            if not gateway(arguments.gateway, add, "File exists"):
                gateway(arguments.gateway, f"{delete}\n{add}")
        case "undo" | "release":
            gateway(arguments.gateway, delete, "No such file or directory")


if __name__ == "__main__":
    main()
