"""The lab's network: namespaces, links, addresses and routes; built in one go, deleted in one go.

                       gateway                     10.77.2.0/24, fd00:77:2::/64
    peer eth0 ------ to-peer  br0 ---+--- eth0 origin       .11
        .2             .1     .1     |
      10.77.1.0/24                   +--- eth0 destination  .12
      fd00:77:1::/64                 +--- eth0 ...          .13

The origin and the destination are on one link, the gateway is the router of everyone: so both ways to lead packets
from one to the other can be tried, over the link and over a router. A server that is `apart` stands on a link of its
own (10.77.3.0/24, fd00:77:3::/64), from which only the router's way leads to the others. Every lab has the same
addresses; only the names of the namespaces differ.

Interfaces are made inside the namespaces, never moved there from the machine's own. `ip -batch` runs do it: one
process a namespace, some 3 ms each.
"""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from criu_tcpcp.kernel import netns

NETNS_DIRECTORY = Path("/run/netns")      # where ip-netns(8) keeps them
GATEWAY = "gateway"
PEER = "peer"
_LOCAL_ROUTES_S = 5.0


@dataclass(frozen=True)
class Place:
    """Where a host stands in the network: its interface on the lab's link, its addresses there, its router's."""

    interface: str
    ipv4: ipaddress.IPv4Interface
    ipv6: ipaddress.IPv6Interface
    router: bool = False


def places(servers: Sequence[str], apart: Sequence[str] = ()) -> dict[str, Place]:
    """Every host by name: peer, gateway, and the `servers`, which share the gateway's bridge but for those `apart`."""
    return {PEER: _place("eth0", 1, 2), GATEWAY: _place("br0", 2, 1, router=True),
            **{name: _place("eth0", 3 + apart.index(name) if name in apart else 2, 11 + index)
               for index, name in enumerate(servers)}}


def _place(interface: str, link: int, number: int, *, router: bool = False) -> Place:
    return Place(interface, ipaddress.IPv4Interface(f"10.77.{link}.{number}/24"),
                 ipaddress.IPv6Interface(f"fd00:77:{link}::{number}/64"), router)


def build(plan: dict[str, Place], namespaces: dict[str, str]) -> None:
    """Make the network. `namespaces` gives the name of each host's namespace; none may exist yet."""
    # The first `ip netns add` on a machine mounts /run/netns on itself: two at once would do it twice, and the upper
    # mount would hide what lies in the lower one.
    with _alone():
        ip([], [f"netns add {name}" for name in namespaces.values()])
    for host, place in plan.items():
        with netns.enter(NETNS_DIRECTORY / namespaces[host]):
            _set_sysctls(router=place.router)
    ip(["-n", namespaces[GATEWAY]], list(_gateway_commands(plan, namespaces)))
    for host, place in plan.items():
        if not place.router:
            ip(["-n", namespaces[host]], list(_host_commands(place)))
    for host in plan:
        with netns.enter(NETNS_DIRECTORY / namespaces[host]):
            _wait_for_local_routes()


def keep_order(namespaces: Sequence[str]) -> None:
    """No two packets overtake each other any more. A veth delivers by the CPU on which the sender runs: what a process
    sends, and what a softirq sends just afterwards on another CPU, may arrive the other way round (seen: 10 us apart,
    one in some thousand packets of a stream). Receive packet steering to one CPU lets them queue there in the order in
    which they were sent. Only the sysfs of its own namespace has the switches."""
    command = "for switch in /sys/class/net/*/queues/rx-*/rps_cpus; do echo 1 >$switch || exit 1; done"
    for name in namespaces:
        done = subprocess.run(["ip", "netns", "exec", name, "sh", "-c", command], text=True, capture_output=True,
                              check=False)
        if done.returncode != 0:
            raise RuntimeError(f"packets of {name} cannot be kept in order: {done.stderr.strip()}")


def destroy(namespaces: Sequence[str]) -> None:
    """Delete the namespaces that (still) exist. The kernel takes the links down with them."""
    present = [name for name in namespaces if (NETNS_DIRECTORY / name).exists()]
    if present:
        # -force goes on after an error: somebody else may sweep the same lab.
        subprocess.run(["ip", "-force", "-batch", "-"], input="".join(f"netns del {name}\n" for name in present),
                       text=True, capture_output=True, check=False)
    stayed = [name for name in present if (NETNS_DIRECTORY / name).exists()]
    if stayed:
        raise RuntimeError(f"network namespaces could not be deleted: {' '.join(stayed)}")


def _gateway_commands(plan: dict[str, Place], namespaces: dict[str, str]) -> Iterator[str]:
    yield "link set lo up"
    # Without snooping and a forwarding delay the bridge passes neighbour discovery from the first packet on.
    yield "link add br0 type bridge forward_delay 0 mcast_snooping 0"
    yield "link set br0 up"
    yield from _address_commands("br0", plan[GATEWAY])
    for number, (host, place) in enumerate(plan.items()):
        if host == GATEWAY:
            continue
        port = "to-peer" if host == PEER else f"port{number}"
        on_bridge = place.ipv4 in plan[GATEWAY].ipv4.network
        yield f"link add {port} type veth peer name eth0 netns {namespaces[host]}"
        if on_bridge:
            yield f"link set {port} master br0"
        yield f"link set {port} up"
        if not on_bridge:
            yield from _address_commands(port, _first(place))


def _first(place: Place) -> Place:
    """The router's place on the same link."""
    v4, v6 = place.ipv4.network, place.ipv6.network
    return Place("", ipaddress.IPv4Interface((v4.network_address + 1, v4.prefixlen)),
                 ipaddress.IPv6Interface((v6.network_address + 1, v6.prefixlen)), router=True)


def _host_commands(place: Place) -> Iterator[str]:
    yield "link set lo up"
    yield f"link set {place.interface} up"
    yield from _address_commands(place.interface, place)
    yield f"route add default via {place.ipv4.network.network_address + 1}"
    yield f"route add default via {place.ipv6.network.network_address + 1}"


def _address_commands(interface: str, place: Place) -> Iterator[str]:
    yield f"address add {place.ipv4} dev {interface}"
    yield f"address add {place.ipv6} dev {interface} nodad"


def _set_sysctls(*, router: bool) -> None:
    """In the calling thread's namespace, before there is an interface: a new one takes the `default` values."""
    values = {
        # No duplicate address detection: it would keep every address, link-local too, unusable for a second.
        "ipv6/conf/default/accept_dad": 0,
        "ipv6/conf/default/accept_ra": 0,
        # IPv4's values come from the machine (net.core.devconf_inherit_init_net); these are what Debian boots with.
        "ipv4/conf/all/rp_filter": 2,
        "ipv4/conf/default/rp_filter": 2,
        "ipv4/ip_forward": int(router),
        "ipv6/conf/all/forwarding": int(router),
    }
    for name, value in values.items():
        Path("/proc/sys/net", name).write_text(f"{value}\n")


def _wait_for_local_routes() -> None:
    """The kernel makes an IPv6 address's local route some time later (net/ipv6/addrconf.c, addrconf_dad_work), also the
    one of the link-local address that it makes by itself when the link comes up."""
    deadline = time.monotonic() + _LOCAL_ROUTES_S
    while True:
        here = [line.split() for line in Path("/proc/thread-self/net/if_inet6").read_text().splitlines()]
        routes = {line.split()[0] for line in Path("/proc/thread-self/net/ipv6_route").read_text().splitlines()
                  if line.split()[1] == "80"}
        links = {address[5] for address in here}
        if all(address[0] in routes for address in here) \
                and all(any(address[5] == link and address[3] == "20" for address in here) for link in links - {"lo"}):
            return
        if time.monotonic() > deadline:
            raise RuntimeError("the kernel does not make the local routes of its IPv6 addresses")
        time.sleep(0.001)


def ip(options: Sequence[str], commands: Sequence[str]) -> None:
    """One `ip -batch` run in the calling thread's namespace. RuntimeError with what it says where one fails."""
    done = subprocess.run(["ip", *options, "-batch", "-"], input="\n".join([*commands, ""]), text=True,
                          capture_output=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"ip {' '.join(options)} failed: {done.stderr.strip()}; given: {'; '.join(commands)}")


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """No other lab on this machine is here at the same time."""
    NETNS_DIRECTORY.parent.mkdir(exist_ok=True)
    lock = os.open(NETNS_DIRECTORY.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)
