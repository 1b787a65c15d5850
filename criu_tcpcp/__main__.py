"""`python -m criu_tcpcp`: the command, where it is not in the PATH, and for itself to start again."""

from .cli.main import entry

entry()
