"""A whole pass on this machine, in network namespaces, explained: curl downloads a file, and the connection is passed
to another host in the middle, over real SSH.

Nothing outside the demo's own namespaces is touched, and nothing stays, also when it is interrupted."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import ExitCode, UsageError
from . import console
from .arguments import number

if TYPE_CHECKING:
    from ..demo.download import Result

_SHORTEST_S = 4.0  # a pass takes a second or two from the start of its command
HELP = "a whole pass on this machine, explained"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="draw what the peer saw, as a time-sequence plot")
    parser.add_argument("--size", type=_size, default=256, metavar="MB", help="of the file (default: %(default)s)")
    parser.add_argument("--rate", type=_rate, default=20, metavar="MB/S",
                        help="of the download (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="one JSON object")


def _size(text: str) -> int:
    return number(text, 1, 99999)


def _rate(text: str) -> int:
    return number(text, 1, 4000)  # SO_MAX_PACING_RATE takes 32 bits of bytes a second


def run(arguments: argparse.Namespace) -> int:
    from ..demo import download, plot
    if arguments.plot is not None and not arguments.plot.resolve().parent.is_dir():
        raise UsageError(f"--plot {arguments.plot}: there is no directory {arguments.plot.resolve().parent}")
    if arguments.plot is not None and arguments.plot.is_dir():
        raise UsageError(f"--plot {arguments.plot}: is a directory")
    seconds = (arguments.size << 20) / (arguments.rate * 1e6)
    if seconds < _SHORTEST_S:
        raise UsageError(f"{arguments.size} MB at {arguments.rate} MB/s are {seconds:.1f} s: the download would be "
                         "over before the pass", hint="a larger --size, or a smaller --rate")
    result = download.play(size=arguments.size << 20, rate=arguments.rate,
                           say=console.progress if arguments.json else console.result)
    if arguments.json:
        console.result_json(result.to_json())
    else:
        _print(result)
    if arguments.plot is not None:
        ms = f"{result.gap_ms:.1f} ms"
        _write(arguments.plot, plot.svg(result.record, f"A download that was passed on: the longest silence was {ms}"))
        if not arguments.json:
            console.result(f"the picture: {arguments.plot}")
    result.require_ok()
    return int(ExitCode.OK)


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError as error:
        raise UsageError(f"--plot {path}: {error.strerror}") from None


def _print(result: Result) -> None:
    """What happened, in three tables."""
    bytes_by_host, packets = result.bytes_by_host, result.record.packets_by_host()
    counts = result.verdict.counts
    console.result("")
    console.table([
        ["", "origin", "destination", "peer"],
        ["address", result.addresses["origin"], result.addresses["destination"], result.addresses["peer"]],
        ["packets to the peer", str(packets["origin"]), str(packets["destination"]), ""],
        ["bytes to the peer", str(bytes_by_host["origin"]), str(bytes_by_host["destination"]),
         f"{result.downloaded} + {result.head} of HTTP's head, says curl"],
        ["SHA-256", *(f"{result.sha256[name][:16]}..." for name in ("origin", "destination")),
         f"{result.sha256['peer'][:16]}... of curl's output"]])
    console.result("")
    rows = [["what the peer saw", ""],
            ["longest silence", f"{result.gap_ms:.1f} ms (usual: {result.usual_gap_ms:.2f} ms)"]]
    rows += [[f"from {one.old} to {one.new}", f"{one.silence_ms:.1f} ms between the last packet and the first"]
             for one in result.switches]
    rows += [["sent again", f"{counts.retransmissions['passed']} packets to the peer, "
                            f"{counts.retransmissions['peer']} by it ({_probes(counts.tail_loss_probes)})"],
             ["resets", str(sum(counts.resets.values()))]]
    console.table(rows)
    console.result("")
    console.table([["wire assertion", ""], *([f"{one['number']:2} {one['name']}", _verdict(one)]
                                             for one in result.assertions())])
    console.result("")
    console.table([["step of the pass", "by", "ms"],
                   *([step["name"], step["side"], f"{step['ms']:8.3f}"] for report in result.reports
                     for step in report["steps"])])
    console.result("")
    if not result.problems():
        console.result(f"The peer got every byte, from two hosts, and could not tell: SHA-256 {result.sha256['peer']}")


def _probes(counts: dict[str, int]) -> str:
    return f"tail-loss probes among them: {sum(counts.values())}"


def _verdict(one: dict[str, Any]) -> str:
    if one["violations"]:
        return f"VIOLATED {len(one['violations'])} times: {one['violations'][0]}"
    return "holds" + (f"; not checked: {'; '.join(one['not_checked'])}" if one["not_checked"] else "")
