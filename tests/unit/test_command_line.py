"""The parser, and what is made from it: completion scripts, the manual page. It costs next to nothing to build."""

from __future__ import annotations

import argparse
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator

import pytest

from criu_tcpcp.cli import console, main
from criu_tcpcp.core.errors import Refused


def options() -> Iterator[tuple[str, str]]:
    """(command, option) of all that the help shows."""
    for action in main.parser()._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, sub in action.choices.items():
                yield from ((name, option) for one in sub._actions for option in one.option_strings
                            if one.help is not argparse.SUPPRESS)


def completion(shell: str) -> str:
    done = subprocess.run([sys.executable, "-m", "criu_tcpcp", "--print-completion", shell], capture_output=True,
                          text=True, check=True)
    assert done.stderr == ""
    return done.stdout


def test_the_parser_loads_nothing_heavy() -> None:
    heavy = ("paramiko", "pycriu", "pyroute2", "google.protobuf", "cryptography", "asyncio", "shtab", "subprocess")
    script = ("import sys; from criu_tcpcp.cli import main; main.parser(); "
              f"print(*(name for name in {heavy!r} if name in sys.modules))")
    done = subprocess.run([sys.executable, "-c", script], text=True, capture_output=True, check=False)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "", "")


def completed(script: str, *words: str) -> set[str]:
    """What bash would offer for the last of these words."""
    ask = (f"{script}\nCOMP_WORDS=({shlex.join(['criu-tcpcp', *words])}); COMP_CWORD={len(words)}\n"
           'function=$(complete -p criu-tcpcp); function=${function#*-F }; ${function%% *}\nprintf "%s\\n" '
           '"${COMPREPLY[@]}"\n')
    done = subprocess.run(["bash", "--norc"], input=ask, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return {word.strip() for word in done.stdout.splitlines()}


def test_bash_completes_commands_options_and_choices() -> None:
    script = completion("bash")
    assert completed(script, "") >= set(main.COMMANDS)
    for command in main.COMMANDS:
        assert completed(script, command, "-") >= {option for name, option in options() if name == command}
    assert completed(script, "pass", "--origin-sees", "") >= {"reset", "eof"}
    assert completed(script, "serve", "--im") == {""}


def test_zsh_knows_all_options() -> None:
    script = completion("zsh")
    assert script.startswith("#compdef criu-tcpcp")
    for _command, option in options():
        assert option in script


def test_another_shell_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["--print-completion", "fish"]) == 2
    assert "criu-tcpcp: " in capsys.readouterr().err


def test_the_manual_page_has_all_of_the_parser() -> None:
    maker = shutil.which("argparse-manpage", path=str(sys.prefix) + "/bin")
    assert maker is not None
    done = subprocess.run([maker, "--module", "criu_tcpcp.cli.main", "--function", "parser", "--prog", "criu-tcpcp",
                           "--author", "x", "--version", "1"], capture_output=True, text=True, check=True)
    text = re.sub(r"\\(f[BIR]|[,/])", "", done.stdout).replace("\\-", "-")
    for command, option in options():
        section = "".join(part for part in text.split(".SH ") if f"'criu-tcpcp {command}'" in part.splitlines()[0])
        assert option in section or option in ("-h", "--help"), (command, option)
    assert "Exit status" in text


@pytest.mark.parametrize(("variables", "coloured"), [
    ({}, True), ({"NO_COLOR": ""}, True), ({"NO_COLOR": "0"}, False), ({"TERM": "dumb"}, False)], ids=str)
def test_colour_is_for_terminals_that_want_it(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str],
                                              coloured: bool) -> None:
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert (console._emphasised("x") != "x") is coloured
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    assert console._emphasised("x") == "x"


def test_a_table_is_as_wide_as_what_is_in_it(capsys: pytest.CaptureFixture[str]) -> None:
    console.table([["State", "Local Address:Port", "Process"], ["ESTAB", "[2001:db8::1]:9000", "a-long-name-16ch(1)"],
                   ["CLOSE-WAIT", "192.0.2.1:1", "x(4194304)"]])
    head, one, two = capsys.readouterr().out.splitlines()
    assert head.index("Process") == one.index("a-long") == two.index("x(")
    assert head.index("Local") == one.index("[2001") == two.index("192")


def test_what_a_terminal_would_act_upon_is_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    """Words come from the other host, from file names and from processes."""
    for say in (console.result, console.log):
        say("a\tb\n\x1b]0;owned\x07 \x9b31m \u202e \udcff end")
    console.error(Refused("no\x1b[2J", hint="\x08"), about_connection=False)
    said = capsys.readouterr()
    line = "a\tb\n\\x1b]0;owned\\x07 \\x9b31m \\u202e \\udcff end\n"
    assert said.out == line
    assert said.err == f"criu-tcpcp: {line}criu-tcpcp: no\\x1b[2J (\\x08)\n"
