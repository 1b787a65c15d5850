"""The layer rule: imports point down only. The table is the rule; the code is held against it by its syntax tree."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import criu_tcpcp.core

ROOT = Path(criu_tcpcp.core.__file__).parents[1]
PACKAGE = ROOT.name

# Lowest first. A module (a file, or a package) may import what stands on a lower floor, and its own package. A floor in
# APART is one whose modules may not import each other either.
FLOORS: tuple[frozenset[str], ...] = (
    frozenset({"_version"}),
    frozenset({"core"}),
    frozenset({"kernel"}),
    frozenset({"faults", "journal", "transport", "verify"}),
    frozenset({"apps", "endpoints", "obstacles", "tracking"}),
    frozenset({"inventory", "redirect", "graft", "application", "pipeline", "policy", "rehearsal", "report", "api",
               "holding", "greeting", "imagedir", "audit"}),
    frozenset({"namespaces", "outside"}),
    frozenset({"executor", "merging", "door", "carrying"}),
    frozenset({"origin", "destination", "imagewriter"}),
    frozenset({"carrier", "onward"}),
    frozenset({"keeper"}),
    frozenset({"settle", "features"}),
    frozenset({"serve", "passing"}),
    frozenset({"batch", "drain", "dump"}),
    frozenset({"lab"}),
    frozenset({"demo"}),
    frozenset({"cli"}),
    frozenset({"__init__"}),
    frozenset({"__main__"}),
)
APART = (frozenset({"origin", "destination"}),)
#: Programs of their own, which the tests, `./dev lab`, the demo and the examples start: beside the product, not in it.
#: They may use the package as any other program does.
LAB_PROGRAMS = frozenset({"lab/__main__.py", "lab/datagrams.py", "lab/load.py", "lab/node.py", "lab/relay.py",
                          "lab/strict/__main__.py", "demo/file_server.py", "demo/example.py"})
#: Who may use the lab: it is beside the product, not in it.
LAB_USERS = frozenset({"lab", "demo"})
#: Nothing that tells the time, waits, logs, or does I/O; `socket` only for its constants and address texts.
CORE_MAY_IMPORT = frozenset({"__future__", "collections", "contextlib", "dataclasses", "enum", "functools",
                             "ipaddress", "json", "re", "socket", "struct", "typing"})
SOCKET_IN_CORE = frozenset({"AF_INET", "AF_INET6", "SOCK_STREAM", "SOCK_DGRAM", "SOL_SOCKET", "IPPROTO_TCP",
                            "IPPROTO_UDP", "IPPROTO_IP",
                            "IPPROTO_IPV6", "inet_ntop", "inet_pton"})


def sources() -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.rglob("*.py") if "__pycache__" not in path.parts)


def top(file: str) -> str:
    """The name under which the table has a file: its package's, or its own."""
    return file.split("/")[0].removesuffix(".py")


def floor(name: str) -> int:
    found = [number for number, names in enumerate(FLOORS) if name in names]
    assert len(found) == 1, f"{name} has no floor of its own: add it to FLOORS in {Path(__file__).name}"
    return found[0]


def tree(file: str) -> ast.Module:
    return ast.parse((ROOT / file).read_text())


def imports(file: str) -> Iterator[tuple[str, int]]:
    """(absolute dotted name, line) of everything imported anywhere in the file, lazily too, but not for types alone."""
    package = [PACKAGE, *file.split("/")[:-1]]
    module = tree(file)
    guarded = (node for node in ast.walk(module)
               if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
    typing_only = {id(inner) for node in guarded for inner in ast.walk(node)}
    for node in ast.walk(module):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from ((one.name, node.lineno) for one in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[:len(package) - node.level + 1] if node.level else []
            name = [*base, *((node.module or "").split(".") if node.module else [])]
            # `from . import x` may name a module.
            yield from ((".".join([*name, one.name]), node.lineno) for one in node.names)


def own_imports(file: str) -> Iterator[tuple[str, int]]:
    """(name in the table, line) of what it imports of this package."""
    for name, line in imports(file):
        parts = name.split(".")
        if parts[0] != PACKAGE:
            continue
        is_module = len(parts) > 1 and ((ROOT / f"{parts[1]}.py").exists() or (ROOT / parts[1]).is_dir())
        yield (parts[1] if is_module else "__init__"), line  # what is no module is a name in __init__.py


def outside(file: str) -> set[str]:
    return {name.split(".")[0] for name, _line in imports(file)} - {PACKAGE}


def used(file: str, module: str) -> set[str]:
    """The attributes of an imported module that the file names."""
    return {node.attr for node in ast.walk(tree(file))
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == module}


def test_every_module_has_a_floor() -> None:
    assert {file for file in sources() if not any(top(file) in names for names in FLOORS)} == set()


def test_imports_point_down() -> None:
    wrong = []
    for file in sources():
        own = top(file)
        for name, line in own_imports(file):
            apart = any(own in names and name in names for names in APART)
            as_a_user = name == "__init__" and file in LAB_PROGRAMS
            if name != own and not as_a_user and (floor(name) > floor(own) or apart):
                wrong.append(f"{file}:{line} imports {name}, which is not below it")
    assert wrong == []


def test_nothing_but_the_demo_uses_the_lab() -> None:
    assert {file for file in sources() if top(file) not in LAB_USERS and file not in LAB_USERS
            and "lab" in {name for name, _line in own_imports(file)}} == set()


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    uses = {top(file): set[str]() for file in sources()}
    for file in sources():
        uses[top(file)] |= {name for name, _line in own_imports(file)} - {top(file)}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"a circle of imports: {' -> '.join([*path, name])}"
        if name not in done:
            for other in uses.get(name, set()) - {"__init__"}:
                visit(other, (*path, name))
            done.add(name)

    for name in uses:
        visit(name, ())


def test_core_is_pure() -> None:
    for file in (file for file in sources() if top(file) == "core"):
        lazy_loader = file == "core/criu.py"
        assert outside(file) <= CORE_MAY_IMPORT | ({"importlib", "os", "sys"} if lazy_loader else set()), file
        assert used(file, "socket") <= SOCKET_IN_CORE | {"socket"}, file  # the class, as a type
        assert used(file, "os") <= {"environ"}, file
        calls = {ast.unparse(node.func) for node in ast.walk(tree(file)) if isinstance(node, ast.Call)}
        assert not calls & {"open", "print", "input", "exec", "eval", "socket.socket"}, file


def test_only_the_command_line_prints_or_exits_or_parses_arguments() -> None:
    wrong = []
    for file in (file for file in sources() if top(file) not in ("cli", "__main__") and file not in LAB_PROGRAMS):
        if "argparse" in outside(file):
            wrong.append(f"{file} imports argparse")
        for node in ast.walk(tree(file)):
            name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if name in ("print", "sys.exit", "exit", "SystemExit", "sys.stdout.write", "sys.stderr.write"):
                wrong.append(f"{file}:{node.lineno} calls {name}")
    assert wrong == []


def test_only_the_kernel_floor_calls_libc() -> None:
    assert {file for file in sources() if "ctypes" in outside(file) and top(file) not in ("kernel", "lab")} == set()


def test_each_heavy_library_has_one_home() -> None:
    users = {library: {file for file in sources() if library in outside(file)}
             for library in ("paramiko", "pycriu", "pyroute2")}
    assert users["paramiko"] <= {"transport/ssh.py", "transport/ssh_config.py"}
    assert users["pycriu"] == set()  # core/criu.py looks for it by name
    assert {top(file) for file in users["pyroute2"]} <= {"kernel", "lab"}


@pytest.mark.parametrize("module", ["application", "apps", "journal", "transport.link"])
def test_light_modules_load_nothing_heavy(module: str) -> None:
    heavy = ("paramiko", "pycriu", "pyroute2", "google.protobuf", "cryptography", "asyncio")
    script = f"import sys, {PACKAGE}.{module}; print(*(name for name in {heavy!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], text=True, capture_output=True, check=False)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "", "")
