"""The parts of the benchmarks that need no host: what can be measured, where a newer one comes from, the figures."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

import newer
from ways import Unfit, criu, passt
from ways.watched import Seen, figures

#: What Debian 12's criu says to `criu check` on Linux 6.18.
OLD = """Error (criu/util.c:642): exited, status=1
Error (criu/util.c:642): exited, status=1
Error (criu/vdso.c:381): vdso: Unexpected rt vDSO area bounds
Error (criu/crtools.c:260): Could not initialize kernel features detection.
"""


def program(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_a_criu_that_does_not_work_here_says_why(tmp_path: Path) -> None:
    old = program(tmp_path / "criu", "[ $1 = --version ] && echo Version: 3.17.1 && exit\n"
                                     f"cat >&2 <<'END'\n{OLD}END\nexit 1")
    with pytest.raises(Unfit) as why:
        criu.version(old)
    assert str(why.value).startswith("3.17.1 on Linux ")
    assert str(why.value).endswith(": exited, status=1; vdso: Unexpected rt vDSO area bounds; "
                                   "Could not initialize kernel features detection.")


def test_a_criu_that_works_tells_its_version(tmp_path: Path) -> None:
    new = program(tmp_path / "criu", "echo Version: 4.2.1\necho GitID: 0")
    assert criu.version(new) == "4.2.1"


def test_no_criu_at_all(tmp_path: Path) -> None:
    with pytest.raises(Unfit, match="No such file"):
        criu.version(tmp_path / "criu")


def test_passts_version_is_debians(tmp_path: Path) -> None:
    assert passt.version(program(tmp_path / "passt", "echo passt 0.0~git1-1\necho Copyright: nobody")) == "0.0~git1-1"


def test_no_passt_at_all(tmp_path: Path) -> None:
    with pytest.raises(Unfit, match="No such file"):
        passt.version(tmp_path / "passt")


@pytest.mark.parametrize(("said", "why"), [
    ("(00.1) Error (criu/sockets.c:628): sockets: Can't get 1:16 opt\n(00.2) Error (criu/cr-dump.c:2111): FAILED.",
     "sockets: Can't get 1:16 opt; FAILED."),
    ("Error: no memory", "Error: no memory"),
    ("chrt: failed\nto set", "chrt: failed to set"),
    ("", "no reason given")])
def test_the_reason_is_what_it_said(said: str, why: str) -> None:
    assert criu.reason(said) == why


def test_what_was_fetched_once_is_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    there = tmp_path / "criu-tcpcp" / "criu-forky" / "criu"
    there.parent.mkdir(parents=True)
    there.touch()
    assert newer.fetch("criu", "forky") == [there]


def test_a_fetch_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    program(tmp_path / "apt-get", 'echo "E: no network" >&2\nexit 100')
    with pytest.raises(newer.FetchError, match=r"^apt-get failed: E: no network$"):
        newer.fetch("criu")
    assert list((tmp_path / "cache" / "criu-tcpcp").iterdir()) == []


@pytest.mark.parametrize(("package", "programs"), [("criu", ["usr/sbin/criu"]),
                                                   ("passt", ["usr/bin/passt", "usr/bin/passt-repair"])])
def test_what_is_unpacked_runs_by_its_own_loader(package: str, programs: list[str], tmp_path: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    """With a mirror of made-up packages: apt's and dpkg's part is played."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache dir"))
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    program(tmp_path / "apt-get", "\n".join([
        "for word; do", '[ "${word%%=*}" != Dir::Cache::archives ] || touch "${word#*=}/one.deb"', "done",
        f'[ "$word" = update ] || [ "$word" = {package} ]']))
    program(tmp_path / "dpkg-deb", "\n".join([
        'mkdir -p "$3/usr/lib64" "$3/usr/lib/x86_64-linux-gnu" "$3/usr/sbin" "$3/usr/bin"',
        *(f'touch "$3/{one}"' for one in programs),
        r'printf "#!/bin/sh\necho loaded \"\$@\"\n" >"$3/usr/lib64/ld-linux-x86-64.so.2"',
        'chmod 755 "$3/usr/lib64/ld-linux-x86-64.so.2"']))
    home = tmp_path / "cache dir" / "criu-tcpcp" / f"{package}-sid"
    assert newer.fetch(package, "sid") == [home / Path(one).name for one in programs]
    for one in programs:
        said = subprocess.run([home / Path(one).name, "x"], capture_output=True, text=True, check=True).stdout
        assert said == f"loaded --library-path {home}/usr/lib/x86_64-linux-gnu {home}/{one} x\n"
    assert [path.name for path in home.parent.iterdir()] == [home.name]


def test_figures_are_of_all_connections() -> None:
    """Each was moved some times; what is counted for a move is counted over all of them."""
    found = figures("by hand", [Seen([1.0, 2.0], {"lift": [0.5, 0.7]}, 10, 0.1, 1),
                                Seen([9.0], {"lift": [0.6]}, 5, 0.3, 0)])
    assert found == {"way": "by hand", "moves": 3, "requests": 15, "usual_ms": 0.2, "sent_again": 0.33,
                     "stall": {"median_ms": 2.0, "p90_ms": 9.0, "worst_ms": 9.0},
                     "steps": {"lift": {"median_ms": 0.6, "p90_ms": 0.7, "worst_ms": 0.7}}}
