"""Every example plays to its end, says what it should, and leaves nothing."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from criu_tcpcp.demo import download
from criu_tcpcp.lab.record import records
from criu_tcpcp.lab.streams import Stream

pytestmark = pytest.mark.root

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
#: name -> (options that keep it short, what it must say at the end)
PLAYED = {
    "file_server": ([], r"wire assertions violated: 0$"),
    "ping_pong": (["--passes", "2"], r"^2 passes, one connection: "),
    "load_balancing": (["--clients", "2"], r"'line 1, says origin', then 'line 2, says destination'"),
    "process_migration": (["--clients", "2"], r"'x \+ 100' at the new one: 101$"),
    "planned_failover": ([], r": a new client is answered$"),
}
MB = 1 << 20


def play(name: str, *options: str) -> str:
    """What it says; it ended well, in silence on stderr, and its lab is gone."""
    with subprocess.Popen([sys.executable, str(EXAMPLES / f"{name}.py"), *options], text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as example:
        out, err = example.communicate()
    assert (example.returncode, err) == (0, ""), out
    assert "Traceback" not in out
    assert [one for one in records() if one.creator_pid == example.pid] == []
    return out


def test_all_of_them_are_played_and_in_the_index() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(PLAYED)
    index = re.findall(r"^\| `(\w+)` \|", (EXAMPLES / "README.md").read_text(), re.MULTILINE)
    assert set(PLAYED) <= set(index)


@pytest.mark.parametrize("name", PLAYED)
def test_it_plays(name: str) -> None:
    options, words = PLAYED[name]
    out = play(name, *options)
    assert re.search(words, out, re.MULTILINE), out
    if name == "file_server":
        assert out.count(Stream(download.SEED).sha256(256 * MB)) == 2


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_download_is_passed_ten_times() -> None:
    out = play("file_server", "--passes", "10", "--size", "768", "--rate", "16")
    assert out.count(Stream(download.SEED).sha256(768 * MB)) == 2
    assert out.count("# criu-tcpcp pass") == 10
    assert re.search(r"^passes: 10; .*wire assertions violated: 0$", out, re.MULTILINE), out
