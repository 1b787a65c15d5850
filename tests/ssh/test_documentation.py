"""What the documents show is true: every command line and every piece of Python in them is run, between hosts of the
names that they use; what cannot be run is named here, with the reason, and parsed all the same."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from attempt import exchange
from criu_tcpcp import journal
from criu_tcpcp.cli import main
from criu_tcpcp.kernel import netns
from criu_tcpcp.lab import Lab
from criu_tcpcp.lab.host import Host
from waiting import until
from world import COMMAND, PORT, Program, _run_directory

pytestmark = pytest.mark.root

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "HACKING.md", *sorted((ROOT / "docs").glob("*.md"))]

#: Command lines that no scenario below runs -> why.
NOT_RUN = {
    "criu-tcpcp COMMAND --help": "COMMAND stands for each; the parser's test has all of them",
    "criu-tcpcp dump --pid 42 --fd 7 -D DIR -R": "as the one with a directory that is named",
    "criu-tcpcp show -D DIR": "as the one with a directory that is named",
    "criu-tcpcp pass --pid 42 --fd 7 --host dest --into listen:9000": "an unmodified server: tests/ssh/test_graft.py",
    "criu-tcpcp serve --policy FILE --key NAME": "sshd starts it: tests/ssh/test_door.py",
    "criu-tcpcp check --host criu-tcpcp-door@dest": "through a door: tests/ssh/test_door_user.py",
    "criu-tcpcp verify": "needs captures: tests/unit/test_verify_command.py, tests/ssh/test_sabotage_on_the_wire.py",
    "criu-tcpcp verify peer.pcap origin.pcap destination.pcap": "needs captures: as the one above",
    "criu-tcpcp resolve ID": "needs a pass in doubt: tests/ssh/test_faults.py",
    "criu-tcpcp resolve ID --force-origin": "needs a pass in doubt: tests/ssh/test_faults.py",
    "criu-tcpcp release ID --force": "needs a pass that was never confirmed: tests/ssh/test_fault_matrix.py",
}
STANDS_FOR = {"PID": "42", "FD": "7", "ID": "0123456789abcdef", "DIR": "/tmp/images", "HOST": "dest", "COMMAND": "pass",
              "S": "10", "MS": "200", "FILE": "file", "NAME": "hold"}


# -- what is in the documents ------------------------------------------------------------------------------------------

def fenced(document: Path) -> Iterator[tuple[str, str]]:
    """(language, text) of each block."""
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", document.read_text(), re.MULTILINE | re.DOTALL):
        yield match[1], match[2]


def spans(document: Path) -> list[str]:
    """The code spans outside the blocks; a line break in one is a space."""
    text = re.sub(r"^```.*?^```$", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    return [" ".join(found.split()) for found in re.findall(r"`([^`]+)`", text)]


def command_lines(document: Path) -> set[str]:
    found = {span for span in spans(document) if span.startswith("criu-tcpcp ")}
    for language, block in fenced(document):
        for line in block.splitlines() if language != "python" else ():
            text = re.sub(r"^\w+# ", "", line).partition(" #")[0].strip()
            if re.match(r"(\S*/)?criu-tcpcp ", text):
                found.add(text)
    return found


def blocks(document: Path, call: str) -> list[str]:
    """Its Python in which this is called."""
    return [text for language, text in fenced(document) if language == "python" and f"{call}(" in text]


def commands_and_options() -> dict[str, set[str]]:
    top = next(action for action in main.parser()._actions if isinstance(action, argparse._SubParsersAction))
    return {name: {word for one in sub._actions for word in one.option_strings} for name, sub in top.choices.items()}


# -- they mean something -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_line_can_be_parsed(document: Path) -> None:
    for line in command_lines(document) - {"criu-tcpcp --print-completion bash"}:
        words = [STANDS_FOR.get(word, word) for word in shlex.split(line)[1:]]
        with contextlib.suppress(SystemExit):  # --help
            main.parser().parse_args(words)


def test_every_synopsis_and_option_is_the_parsers() -> None:
    known = commands_and_options()
    everywhere = {option for options in known.values() for option in options}
    # of ./dev test, of ./dev bench others, of python3 -m venv, of criu
    elsewhere = {"--all", "--criu", "--fetch", "--system-site-packages", "--tcp-established"}
    synopses = 0
    for document in DOCUMENTS:
        for span in spans(document):
            words = re.findall(r"(?<![\w-])-{1,2}[a-zA-Z][\w-]*", span)
            name = span.split()[0] if span.split() else ""
            if name in known:
                synopses += 1
                assert set(words) <= known[name], (document.name, span)
            elif span.startswith("-"):
                assert set(words) <= everywhere | elsewhere, (document.name, span)
    assert synopses > len(known)


def test_what_is_not_run_is_named_with_its_reason() -> None:
    shown = {line for document in DOCUMENTS for line in command_lines(document)}
    assert shown == {*RUN, *NOT_RUN}
    assert set(NOT_RUN) <= shown


def test_all_python_is_run() -> None:
    calls = ("criu_tcpcp.Receiver", "criu_tcpcp.register", "criu_tcpcp.pass_connection", "criu_tcpcp.dump_connection",
             "criu_tcpcp.get")
    for document in DOCUMENTS:
        for language, block in fenced(document):
            assert language != "python" or any(f"{call}(" in block for call in calls), (document.name, block)


# -- a place to run them -----------------------------------------------------------------------------------------------

SERVE = """
import os, socket, sys, threading

def serve(sock, app_state):
    print("serving", sock.fileno(), flush=True)
    threading.Thread(target=echo, args=(sock, app_state), daemon=True).start()

def echo(sock, owed=b""):
    sock.sendall(owed)
    while data := sock.recv(4096):
        sock.sendall(data)
    sock.close()
    print("end", flush=True)
"""
LISTEN = f"""
listener = socket.create_server(("0.0.0.0", {PORT}))
print("listening", flush=True)
sock, _address = listener.accept()
"""
ECHO_IN_PEACE = """
print("serving", sock.fileno(), flush=True)
try:
    echo(sock)
except OSError:
    print("end", flush=True)
threading.Event().wait()
"""
#: A program that hands its state over: what the documents' `register` needs around it. What it reads and writes, and
#: when it does not, is one lock.
REGISTERED = """
import select
quiet = threading.Lock()

def stop_reading_and_writing():
    quiet.acquire()

def my_state_for_this_connection():
    return b"what it owes "

def go_on():
    print("resumed", flush=True)
    quiet.release()

def forget():
    print("passed", flush=True)
"""
REGISTERED_LOOP = """
print("serving", sock.fileno(), flush=True)
while True:
    select.select([sock], [], [])
    with quiet:
        data = sock.recv(4096, socket.MSG_DONTWAIT)
        if not data:
            break
        sock.sendall(data)
sock.close()
print("end", flush=True)
"""


class Hosts:
    """The documents' hosts, in a lab: `dest` is the destination's name, and the programs are called `server`."""

    def __init__(self, lab: Lab, directory: Path) -> None:
        self.lab, self.directory = lab, directory
        for host in (lab.origin, lab.destination):
            with _run_directory(host.run_dir):
                journal.prepare_run_directory()
        lab.destination.start_sshd()
        (directory / ".ssh").mkdir()
        address = lab.destination.ipv4
        (directory / ".ssh" / "config").write_text(
            lab.ssh.config.read_text() + f"Host dest\n    HostName {address}\n    HostKeyAlias {address}\n")

    def program(self, host: Host, text: str) -> Program:
        path = self.directory / host.name / "server"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!{sys.executable}\n{text}")
        path.chmod(0o755)
        return Program(host, [str(path)])

    def peer(self) -> socket.socket:
        with self.lab.peer.enter():
            return socket.create_connection((str(self.lab.origin.ipv4), PORT), timeout=20)

    def run(self, argv: list[str]) -> str:
        done = self.lab.origin.run(argv, check=False, env={"HOME": str(self.directory)})
        assert done.returncode == 0, (argv, done)
        return done.stdout

    def python(self, text: str, program: Program) -> str:
        """With the documents' process and descriptor for those of a real one."""
        return self.run([sys.executable, "-c", "import criu_tcpcp\n" + for_real(text, program)])


def for_real(text: str, program: Program) -> str:
    number = program.wait_for("serving")["words"][1]
    return text.replace("pid=42", f"pid={program.process.pid}").replace("fd=7", f"fd={number}").replace(
        "--pid 42", f"--pid {program.process.pid}").replace("--fd 7", f"--fd {number}")


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    with Lab() as lab:
        yield Hosts(lab, tmp_path)


def finish(peer: socket.socket, program: Program) -> None:
    exchange(peer, b"after")
    peer.shutdown(socket.SHUT_WR)
    assert peer.recv(1) == b""
    program.wait_for("end")
    peer.close()


def shape(text: str) -> list[str]:
    """Without what differs every time: numbers, the columns' widths."""
    return [re.sub(r"\d+(\.\d+)*", "N", " ".join(line.split())) for line in text.splitlines()]


# -- they are run ------------------------------------------------------------------------------------------------------

SESSION = ["criu-tcpcp list --pid 42", "criu-tcpcp pass --pid 42 --fd 7 --host dest"]
BEFORE = {"criu-tcpcp check": "Looks good.\n", "criu-tcpcp check --host dest": "Looks good.\n",
          "criu-tcpcp resolve": "no pass is in doubt\n", "criu-tcpcp --print-completion bash": "criu-tcpcp\n"}
AFTER = ["criu-tcpcp passes", "criu-tcpcp passes --json", "criu-tcpcp release"]
RUN = [*SESSION, *BEFORE, *AFTER]


def test_the_command_lines(hosts: Hosts) -> None:
    readme = DOCUMENTS[0]
    origin = hosts.program(hosts.lab.origin, SERVE + LISTEN + ECHO_IN_PEACE)
    destination = hosts.program(hosts.lab.destination, SERVE + blocks(readme, "criu_tcpcp.Receiver")[0])
    origin.wait_for("listening")
    peer = hosts.peer()
    exchange(peer, b"before")

    def run(line: str) -> str:
        return hosts.run([COMMAND, *shlex.split(for_real(line, origin))[1:]])

    for line, end in BEFORE.items():
        assert run(line).endswith(end), line
    until(lambda: list((hosts.lab.destination.run_dir / "apps").iterdir()), "the receiver")
    session = next(text for language, text in fenced(readme) if "origin# criu-tcpcp list" in text and not language)
    for line, shown in re.findall(r"^origin# (.*)\n((?:(?!origin#).+\n)*)", session, re.MULTILINE):
        said = shape(run(line).replace(str(hosts.lab.destination.run_dir), "/run/criu-tcpcp"))
        assert [one for one in said if "LISTEN" not in one] == shape(shown)
    exchange(peer, b"passed")
    (known,) = map(json.loads, run(AFTER[1]).splitlines())
    assert known["id"] in run(AFTER[0])
    assert run(AFTER[2]).startswith(f"kept {known['id']}")
    finish(peer, destination)
    assert run(AFTER[2]) == f"released {known['id']} (origin)\n"


@pytest.mark.parametrize("document", [one for one in DOCUMENTS if blocks(one, "criu_tcpcp.pass_connection")],
                         ids=lambda path: path.name)
def test_the_python_of_applications_and_of_operators(hosts: Hosts, document: Path) -> None:
    ((receiver,), (register,), (passing,)) = (blocks(document, f"criu_tcpcp.{call}")
                                              for call in ("Receiver", "register", "pass_connection"))
    origin = hosts.program(hosts.lab.origin, "import criu_tcpcp\n" + SERVE + LISTEN + REGISTERED + register
                           + REGISTERED_LOOP)
    destination = hosts.program(hosts.lab.destination, SERVE + receiver)
    origin.wait_for("listening")
    peer = hosts.peer()
    exchange(peer, b"before")
    until(lambda: list((hosts.lab.destination.run_dir / "apps").iterdir()), "the receiver")
    for dump in blocks(document, "criu_tcpcp.dump_connection"):
        images = hosts.directory / "images"
        hosts.python(dump.replace("/tmp/images", str(images)), origin)
        origin.wait_for("resumed")
        assert str(peer.getsockname()[1]) in hosts.run([COMMAND, "show", "-D", str(images)])
        exchange(peer, b"between")
    hosts.python(passing, origin)
    origin.wait_for("passed")
    owed = b""
    while len(owed) < 13:
        owed += peer.recv(100)
    assert owed == b"what it owes "
    finish(peer, destination)


@pytest.mark.parametrize("document", [one for one in DOCUMENTS if blocks(one, "criu_tcpcp.get")],
                         ids=lambda path: path.name)
def test_the_python_of_the_bare_mechanism(document: Path) -> None:
    (text,) = blocks(document, "criu_tcpcp.get")
    around = ('import criu_tcpcp, socket\nlistener = socket.create_server(("127.0.0.1", 0))\n'
              "peer = socket.create_connection(listener.getsockname())\nsock = listener.accept()[0]\nold = sock\n"
              f'{text}\nassert sock is not old\nsock.sendall(b"after")\nassert peer.recv(10) == b"after"\n')
    with netns.private():
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        done = subprocess.run([sys.executable, "-c", around], capture_output=True, text=True, check=False,
                              env=dict(os.environ))
    assert (done.returncode, done.stderr) == (0, "")
