"""Completion scripts for shells, from the parser that reads the command line (shtab)."""

from __future__ import annotations

import argparse

#: What a metavar says about the words that can stand there.
_FILES = frozenset({"FILE", "FILE|-", "KEY", "SSH_CONFIG"})
_DIRECTORIES = frozenset({"DIR"})


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """For this shell: to be sourced, or to be put where the shell looks for such scripts."""
    import shtab
    _say_what_is_a_file(parser, shtab.FILE, shtab.DIRECTORY)
    return str(shtab.complete(parser, shell))


def _say_what_is_a_file(parser: argparse.ArgumentParser, file: object, directory: object) -> None:
    for action in parser._actions:  # argparse has no other way to them, and shtab takes the same
        if isinstance(action, argparse._SubParsersAction):
            for sub in action.choices.values():
                _say_what_is_a_file(sub, file, directory)
        elif action.metavar in _FILES:
            action.complete = file  # type: ignore[attr-defined]
        elif action.metavar in _DIRECTORIES:
            action.complete = directory  # type: ignore[attr-defined]
