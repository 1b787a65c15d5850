"""What all tests share: a lab, and the rule about skips.

A test may be skipped because the kernel has no such thing (`capability`), because Debian does not offer a package
everywhere (`package`), or because it needs root. Where everything is meant to run (CRIU_TCPCP_TESTS_STRICT=1, as `./dev
test` sets it), the last is not accepted: it is a failure, as any other skip, so that a whole suite cannot go missing
unnoticed. The summary names what was skipped.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Generator, Iterator

import hypothesis
import pytest

import matrix
from criu_tcpcp.lab import Lab
from criu_tcpcp.transport.target import Target
from loopback_sshd import loopback_sshd

# How long an example takes says more about what else the machine does than about the code.
hypothesis.settings.register_profile("shared machine", deadline=None,
                                     suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("shared machine")

_KERNEL_LACKS, _DEBIAN_LACKS = "kernel lacks", "not installed: Debian's"


@pytest.fixture
def lab() -> Iterator[Lab]:
    """Hosts of this test's own: it takes some 50 ms, so there is no reason to share them."""
    with Lab() as built:
        yield built


@pytest.fixture(scope="module")
def ssh_target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    """A target that an sshd of this test file's own serves, on loopback."""
    with loopback_sshd(tmp_path_factory.mktemp("sshd")) as target:
        yield target


@pytest.fixture
def capability() -> Callable[[str, bool], None]:
    """`capability("VXLAN", present)`: go on only if the kernel has it. Try the thing itself; never ask for versions."""

    def require(what: str, present: bool) -> None:
        if not present:
            pytest.skip(f"{_KERNEL_LACKS} {what}")

    return require


@pytest.fixture
def package() -> Callable[[str, str], None]:
    """`package("nodejs", "node")`: go on only if the program of this package is there. Only for one that ./dev setup
    lists as optional."""

    def require(name: str, program: str) -> None:
        if shutil.which(program) is None:
            pytest.skip(f"{_DEBIAN_LACKS} {name}")

    return require


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those that need a limit of their own first: else a worker is alone with one of them at the end."""
    items.sort(key=lambda item: item.get_closest_marker("timeout") is None)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("root") is not None and os.geteuid() != 0:
        pytest.skip("needs root")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    line = matrix.summary(report for outcome in ("passed", "failed") for report in terminalreporter.getreports(outcome))
    if line is not None:
        terminalreporter.write_line(line)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _refuse_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _refuse_skip(report)
    return report


def _refuse_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    if not report.skipped or hasattr(report, "wasxfail") or os.environ.get("CRIU_TCPCP_TESTS_STRICT") != "1":
        return
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    reason = reason.removeprefix("Skipped: ")
    if not reason.startswith((_KERNEL_LACKS, _DEBIAN_LACKS)):
        report.outcome = "failed"
        report.longrepr = f"skipped, where every test has to run: {reason}"
