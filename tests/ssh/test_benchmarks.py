"""The benchmarks run; how long anything takes is theirs to say, and no test's."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.root

OTHERS = Path(__file__).parents[2] / "benchmarks" / "others.py"


def test_the_others_are_measured_and_a_criu_that_cannot_dump_is_left_out(tmp_path: Path) -> None:
    """One that passes its own check but dumps no socket, as 4.1.1 on Linux 6.16 and later."""
    criu = tmp_path / "criu"
    criu.write_text("#!/bin/sh\ncase $1 in dump) echo \"Error (criu/sockets.c:628): sockets: Can't get 1:16 opt\" >&2; "
                    "exit 1;; --version) echo Version: 4.1.1;; esac\n")
    criu.chmod(0o755)
    done = subprocess.run([sys.executable, OTHERS, "--rounds", "1", "--criu", criu, "--json"], capture_output=True,
                          text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert [one["way"].split()[0] for one in result["ways"]] == ["nothing", "SCM_RIGHTS", "criu-tcpcp"]
    assert all(one["moves"] == 1 and one["stall"]["worst_ms"] > 0 for one in result["ways"])
    why = result["not_measured"]["criu"]
    assert why.startswith("4.1.1 on Linux ")
    assert why.endswith(f"`{criu} dump`: sockets: Can't get 1:16 opt")
