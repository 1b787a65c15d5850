"""Programs of others that are newer than this Debian's, for the benchmarks: fetched by apt, unpacked, never installed.

    ./dev bench newer criu [--suite forky] [--mirror URL]

Prints the paths of the package's programs, which run with the libraries that came with them:

- criu: Debian 12's 3.17.1 does not start on Linux 6.13 and later
  (https://github.com/checkpoint-restore/criu/issues/2532), and 13's 4.1.1 dumps no TCP socket on 6.16 and later
  (https://github.com/checkpoint-restore/criu/issues/2705; 4.2 does).
- passt: Debian 12's is of 2023, and migrates nothing; that came with 2025_02_17.

apt works in a directory of its own (its lists, its cache, an empty list of installed packages, so that every library
comes along), with the machine's proxies and keys; the machine's own packages are neither read nor changed. What is
unpacked stays in $XDG_CACHE_HOME/criu-tcpcp, or ~/.cache/criu-tcpcp, 15 to 30 MB a package, and is used again.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from ways.unwinding import unwinding

SUITE = "forky"
#: By Debian's name of the package: where its programs are in it.
PROGRAMS = {"criu": ("usr/sbin/criu",), "passt": ("usr/bin/passt", "usr/bin/passt-repair")}
MIRROR = "http://deb.debian.org/debian"      # apt checks signatures, so that plain http will do
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"


class FetchError(Exception):
    """Why there is nothing newer."""


def fetch(package: str, suite: str = SUITE, mirror: str = MIRROR) -> list[Path]:
    """The paths of the programs of `package`, in the order of PROGRAMS; from the cache if they are there."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "criu-tcpcp"
    home = cache / f"{package}-{suite}"
    commands = [home / Path(program).name for program in PROGRAMS[package]]
    if _all_there(commands):
        return commands
    cache.mkdir(parents=True, exist_ok=True)
    with unwinding(), tempfile.TemporaryDirectory(prefix="fetching-", dir=cache) as work:
        _download(package, Path(work), suite, mirror)
        tree = Path(work, "tree")
        for archive in sorted(Path(work, "archives").glob("*.deb")):
            _run(["dpkg-deb", "--extract", str(archive), str(tree)])
        for program in PROGRAMS[package]:
            _write_command(program, tree, home)
        try:
            tree.rename(home)
        except OSError:      # somebody else was faster
            if not _all_there(commands):
                raise
    return commands


def _all_there(commands: list[Path]) -> bool:
    return all(command.exists() for command in commands)


def _download(package: str, work: Path, suite: str, mirror: str) -> None:
    for name in ("lists/partial", "archives/partial"):
        Path(work, name).mkdir(parents=True)
    Path(work, "status").touch()
    Path(work, "sources.list").write_text(f"deb [signed-by={KEYRING}] {mirror} {suite} main\n")
    settings = {"Dir::State": work, "Dir::State::lists": work / "lists", "Dir::State::status": work / "status",
                "Dir::Cache": work, "Dir::Cache::archives": work / "archives",
                "Dir::Etc::sourcelist": work / "sources.list", "Dir::Etc::sourceparts": "/dev/null",
                "Dir::Etc::preferences": "/dev/null", "Dir::Etc::preferencesparts": "/dev/null",
                "Acquire::Languages": "none",
                "APT::Sandbox::User": "root",        # _apt cannot write into this directory
                "Debug::NoLocking": "true"}          # dpkg's lock is for who installs
    apt = ["apt-get", "-q", *(word for name, value in settings.items() for word in ("-o", f"{name}={value}"))]
    _run([*apt, "update"])
    _run([*apt, "install", "-y", "--no-install-recommends", "--download-only", package])


def _write_command(program: str, tree: Path, home: Path) -> None:
    """A command in `tree`, which will be moved to `home`: by its own loader, since this machine's libc may be too
    old."""
    def one(pattern: str) -> str:
        found = sorted(tree.glob(pattern))
        if not found:
            raise FetchError(f"the packages have no {pattern}")
        return shlex.quote(str(home / found[0].relative_to(tree)))

    loader, libraries = one("usr/lib*/ld-linux*.so.*"), one("usr/lib/*-linux-gnu*")
    command = tree / Path(program).name
    command.write_text(f'#!/bin/sh\nexec {loader} --library-path {libraries} {one(program)} "$@"\n')
    command.chmod(0o755)


def _run(argv: list[str]) -> None:
    try:
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    except OSError as error:
        raise FetchError(f"{argv[0]}: {error.strerror}") from None
    if done.returncode != 0:
        raise FetchError(f"{argv[0]} failed: {' '.join(done.stderr.split()) or done.stdout.strip()}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="./dev bench newer", description=__doc__.split("\n")[0])
    parser.add_argument("package", choices=sorted(PROGRAMS))
    parser.add_argument("--suite", default=SUITE)
    parser.add_argument("--mirror", default=MIRROR)
    arguments = parser.parse_args()
    try:
        print(*fetch(arguments.package, arguments.suite, arguments.mirror), sep="\n")
    except FetchError as error:
        print(f"newer: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
