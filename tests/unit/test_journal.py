"""The journal on real files: what a crash, a full disk, other processes and other users can do to it."""

from __future__ import annotations

import ctypes
import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from criu_tcpcp import journal
from criu_tcpcp.core.errors import JournalError
from criu_tcpcp.journal import DESTINATION, ORIGIN, Journal, all_journals, new_id, run_directory

ID = "0123456789abcdef"


@pytest.fixture(autouse=True)
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CRIU_TCPCP_RUN_DIR", str(tmp_path / "run"))
    return tmp_path / "run"


@pytest.fixture
def made() -> Journal:
    found = Journal(ID, ORIGIN)
    found.create()
    return found


def mode(path: Path) -> str:
    return oct(stat.S_IMODE(path.lstat().st_mode))


def test_records_come_back_in_order_with_the_boot_that_wrote_them(made: Journal) -> None:
    made.write("intent", pid=42, name="ü\n")
    made.write("note", text="x")
    again = Journal(ID, ORIGIN)
    assert [one["record"] for one in again.records()] == ["intent", "note"]
    assert again.records()[0] | {"pid": 42, "name": "ü\n"} == again.records()[0]
    assert again.records()[0]["boot"] == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert again.last() == "intent"  # a note tells no stage
    made.write("intent", pid=43)
    assert (again.field("intent") or {})["pid"] == 43
    assert again.field("offered") is None


def test_an_empty_journal_has_no_records(made: Journal) -> None:
    assert made.records() == []
    assert made.last() == ""
    assert Journal("f" * 16, ORIGIN).records() == []


@pytest.mark.parametrize("torn", [b'{"record":"offered"', b"{", b'{"record":"offered","boot":"x"}', b"\0\0\0"])
def test_a_torn_last_line_was_never_written(made: Journal, torn: bytes) -> None:
    made.write("intent")
    with open(made.directory / "log", "ab") as log:
        log.write(torn)
    assert [one["record"] for one in made.records()] == ["intent"]


@pytest.mark.parametrize("line", [b"noise\n", b"[1]\n", b'"offered"\n', b'{"record":1}\n', b"{}\n", b"\xff\n", b"\n"])
def test_a_spoilt_line_does_not_spoil_the_others(made: Journal, line: bytes) -> None:
    made.write("intent")
    with open(made.directory / "log", "ab") as log:
        log.write(line)
    made.write("offered")
    assert [one["record"] for one in made.records()] == ["intent", "offered"]


def test_a_record_after_a_torn_line_counts(made: Journal) -> None:
    """The process died within a write; the one that recovers goes on in the same file."""
    made.write("intent")
    with open(made.directory / "log", "ab") as log:
        log.write(b'{"record":"offe')
    made.write("aborted")
    assert made.last() == "aborted"


def test_a_group_that_may_make_journals_reads_them_but_no_payload(made: Journal, run_dir: Path) -> None:
    (run_dir / "passes").chmod(0o3770)
    another = Journal("fedcba9876543210", journal.DESTINATION)
    another.create()
    another.write("claimed")
    another.save("state", b"payload")
    another.decide("committed")
    assert mode(another.directory)[-3:] == "750"
    assert [mode(another.directory / name) for name in ("log", "verdict", "state")] == ["0o640", "0o640", "0o600"]


def test_nobody_else_can_read_anything(made: Journal, run_dir: Path) -> None:
    old = os.umask(0)
    try:
        made.write("intent")
        made.save("state", b"payload")
        made.decide("committed")
    finally:
        os.umask(old)
    assert mode(run_dir / "passes") == "0o700"
    assert mode(made.directory) == "0o700"
    for name in ("log", "state", "verdict"):
        assert mode(made.directory / name) == "0o600", name
    assert mode(run_dir / "apps") == "0o1777"
    assert mode(run_dir) == "0o755"


def test_the_applications_directory_is_open_whatever_the_umask(run_dir: Path) -> None:
    old = os.umask(0o077)
    try:
        journal.prepare_run_directory()
    finally:
        os.umask(old)
    assert mode(run_dir / "apps") == "0o1777"
    assert mode(run_dir) == "0o755", "an application that is not root could not reach its directory"


def test_an_id_is_used_once(made: Journal) -> None:
    with pytest.raises(JournalError):
        Journal(ID, ORIGIN).create()
    Journal(ID, DESTINATION).create()  # the other side, on the same machine
    assert [(one.pass_id, one.side) for one in all_journals()] == [(ID, DESTINATION), (ID, ORIGIN)]
    assert new_id() != new_id()


@pytest.mark.parametrize("bad", ["", "..", "../../etc", ID + "/..", ID.upper(), ID[:-1], ID + "0", ID + "\n", "\0" * 16,
                                 "0123456789abcdeg", "０" * 16])
def test_an_id_that_is_none_is_refused(bad: str) -> None:
    with pytest.raises(JournalError):
        Journal(bad, DESTINATION)


def test_what_is_no_pass_is_not_listed(made: Journal, run_dir: Path) -> None:
    for name in ("x", f"{ID}.elsewhere", f"{ID}", f"{ID}.origin.old", ".."):
        (run_dir / "passes" / name).mkdir(exist_ok=True)
    assert [one.pass_id for one in all_journals()] == [ID]


def test_payload_goes_into_a_new_file_only(made: Journal, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    (made.directory / "state").symlink_to(victim)
    with pytest.raises(JournalError):
        made.save("state", b"payload")
    made.forget("state")
    (made.directory / "log").symlink_to(victim)
    with pytest.raises(JournalError):
        made.write("intent")
    assert victim.read_bytes() == b"precious"


def test_payload_is_kept_once_and_forgotten(made: Journal) -> None:
    made.save("state", b"x" * 100000)
    assert made.load("state") == b"x" * 100000
    with pytest.raises(JournalError):
        made.save("state", b"other")
    made.forget("state")
    made.forget("state")
    assert not (made.directory / "state").exists()
    with pytest.raises(JournalError):
        made.load("state")


def test_a_link_is_not_read_either(made: Journal, tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("committed")
    (tmp_path / "log").write_text('\n{"record":"offered","boot":"x"}\n')
    for name, target in (("verdict", "victim"), ("log", "log"), ("state", "victim")):
        (made.directory / name).symlink_to(tmp_path / target)
    for read in (made.verdict, made.records, lambda: made.load("state")):
        with pytest.raises(JournalError):
            read()


@pytest.mark.parametrize("name", ["verdict", "log", "state"])
def test_a_file_that_is_too_large_is_not_read(made: Journal, name: str) -> None:
    """It is sparse: that it is refused takes no time and no memory."""
    with open(made.directory / name, "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(JournalError, match="none of ours"):
        {"verdict": made.verdict, "log": made.records, "state": lambda: made.load("state")}[name]()


@pytest.mark.parametrize(("part", "mode"), [("", 0o777), ("", 0o775), ("", 0o1777), ("passes", 0o755),
                                            ("passes", 0o701), ("apps", 0o777), ("apps", 0o775)])
def test_a_run_directory_that_others_can_change_is_refused(made: Journal, run_dir: Path, part: str, mode: int) -> None:
    assert all_journals()[0].pass_id == ID
    (run_dir / part).chmod(mode)
    for use in (all_journals, journal.prepare_run_directory, Journal(new_id(), ORIGIN).create):
        with pytest.raises(JournalError, match="chmod"):
            use()


@pytest.mark.parametrize("part", ["", "passes", "apps"])
def test_a_link_in_the_place_of_the_run_directory_is_not_followed(made: Journal, run_dir: Path, tmp_path: Path,
                                                                 part: str) -> None:
    (run_dir / part).rename(tmp_path / "elsewhere")
    (run_dir / part).symlink_to(tmp_path / "elsewhere")
    for use in (all_journals, journal.prepare_run_directory, Journal(new_id(), ORIGIN).create):
        with pytest.raises(JournalError, match="not a directory"):
            use()
    (run_dir / part).unlink()
    (run_dir / part).write_text("")
    with pytest.raises(JournalError, match=r"not a directory|cannot make"):
        journal.prepare_run_directory()


@pytest.mark.root
@pytest.mark.parametrize("part", ["", "passes", "apps"])
def test_a_run_directory_of_another_user_is_refused(made: Journal, run_dir: Path, part: str) -> None:
    os.chown(run_dir / part, 65534, 65534)
    for use in (all_journals, journal.prepare_run_directory):
        with pytest.raises(JournalError, match="another user"):
            use()


@pytest.mark.parametrize("line", [
    b"null", b"[]", b"1", b'"intent"', b"{}", b'{"record":"intent"}', b'{"record":1,"boot":"x"}',
    b'{"record":"intent","boot":1}', b'{"record":"intent","boot":"x","pid":"42"}', b"[" * 100000, b"9" * 10000, b"\xff",
    b'{"record":"staged","boot":"x","taker":[1]}', b'{"record":"staged","boot":"x","taker":[1,"2"]}',
    b'{"record":"intent","boot":"x","descriptors":[]}', b'{"record":"intent","boot":"x","flow":[]}'],
    ids=lambda line: repr(line[:40]))
def test_a_line_that_is_no_record_of_ours_does_not_count(made: Journal, line: bytes) -> None:
    made.write("intent", pid=42)
    with open(made.directory / "log", "ab") as log:
        log.write(b"\n" + line + b"\n")
    made.write("offered")
    assert [one["record"] for one in made.records()] == ["intent", "offered"]


def test_what_a_record_does_not_say_is_a_damaged_journal(made: Journal) -> None:
    made.write("intent", pid=42)
    intent = made.field("intent")
    assert intent is not None
    with pytest.raises(JournalError, match="'intent' has no 'flow'"):
        intent["flow"]


def test_a_planted_verdict_does_not_lead_elsewhere(made: Journal, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    (made.directory / f".committed.{os.getpid()}").symlink_to(victim)
    with pytest.raises(JournalError):
        made.decide("committed")
    assert victim.read_bytes() == b"precious"


def test_the_first_verdict_stands(made: Journal) -> None:
    assert made.verdict() is None
    assert made.decide("aborted") == "aborted"
    assert made.decide("committed") == "aborted"
    assert Journal(ID, ORIGIN).verdict() == "aborted"


@pytest.mark.parametrize("text", ["", "commit", "committed\n", "COMMITTED"])
def test_a_verdict_that_reads_as_none_is_an_error_not_a_choice(made: Journal, text: str) -> None:
    (made.directory / "verdict").write_text(text)
    for ask in (made.verdict, lambda: made.decide("aborted")):
        with pytest.raises(JournalError):
            ask()


DECIDER = """if True:
    import sys
    from criu_tcpcp.journal import DESTINATION, Journal
    mine = Journal(sys.argv[1], DESTINATION)
    print("ready", flush=True)
    sys.stdin.readline()
    print(mine.decide(sys.argv[2]), flush=True)
"""


def test_of_sixteen_that_decide_at_once_one_wins_and_all_learn_it() -> None:
    for _ in range(2):
        pass_id = new_id()
        Journal(pass_id, DESTINATION).create()
        deciders = [subprocess.Popen([sys.executable, "-c", DECIDER, pass_id, ("committed", "aborted")[number % 2]],
                                     stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for number in range(16)]
        try:
            for one in deciders:
                assert one.stdout is not None
                assert one.stdout.readline() == "ready\n"
            for one in deciders:
                assert one.stdin is not None
                one.stdin.write("go\n")
                one.stdin.flush()
            answers = {one.communicate(timeout=30)[0].strip() for one in deciders}
        finally:
            for one in deciders:
                one.kill()
                one.wait()
                for stream in (one.stdin, one.stdout):
                    if stream is not None:
                        stream.close()
        assert answers in ({"committed"}, {"aborted"})
        assert Journal(pass_id, DESTINATION).verdict() == answers.pop()
        assert {path.name for path in Journal(pass_id, DESTINATION).directory.iterdir()} == {"verdict"}


def test_one_worker_at_a_time(made: Journal) -> None:
    with made.locked() as mine:
        assert mine
        with Journal(ID, ORIGIN).locked(wait=False) as other:
            assert not other
    with Journal(ID, ORIGIN).locked(wait=False) as other:
        assert other


def test_the_lock_of_a_killed_worker_is_free(made: Journal) -> None:
    script = (f"from criu_tcpcp.journal import ORIGIN, Journal\n"
              f"with Journal({ID!r}, ORIGIN).locked():\n    print('mine', flush=True)\n    input()\n")
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as worker:
        assert worker.stdout is not None
        assert worker.stdout.readline() == b"mine\n"
        with made.locked(wait=False) as mine:
            assert not mine
        worker.kill()
        with made.locked() as mine:
            assert mine


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A run directory on a file system of its own, of 8 pages, which the test can fill."""
    libc = ctypes.CDLL(None, use_errno=True)
    place = tmp_path / "small"
    place.mkdir()
    if libc.mount(b"tmpfs", os.fsencode(place), b"tmpfs", 0, b"size=32k,mode=755") != 0:
        raise OSError(ctypes.get_errno(), "mount")
    monkeypatch.setenv("CRIU_TCPCP_RUN_DIR", str(place))
    try:
        yield place
    finally:
        libc.umount2(os.fsencode(place), 2)  # MNT_DETACH


def fill(place: Path, leave: int = 0) -> None:
    with pytest.raises(OSError), open(place / "filler", "wb", buffering=0) as filler:  # noqa: PT012
        while True:
            filler.write(b"x" * 4096)
    if leave:
        os.truncate(place / "filler", (place / "filler").stat().st_size - leave)


@pytest.mark.root
def test_on_a_full_disk_nothing_counts_that_was_not_written_whole(small: Path) -> None:
    made = Journal(ID, ORIGIN)
    made.create()
    made.write("intent", text="a" * 1000)
    fill(small)
    with pytest.raises(JournalError, match="No space"):
        made.write("offered", text="b" * 8000)  # the page is full after some 3000 of them: cut short
    assert [one["record"] for one in made.records()] == ["intent"]
    (small / "filler").unlink()
    made.write("aborted")
    assert [one["record"] for one in made.records()] == ["intent", "aborted"]


@pytest.mark.root
def test_on_a_full_disk_there_is_no_verdict_and_a_later_one_stands(small: Path) -> None:
    made = Journal(ID, DESTINATION)
    made.create()
    fill(small)
    with pytest.raises(JournalError):
        made.decide("committed")
    assert made.verdict() is None
    with pytest.raises(JournalError):
        made.save("state", b"x" * 10000)
    (small / "filler").unlink()
    assert made.decide("aborted") == "aborted"
    made.forget("state")
    assert {path.name for path in made.directory.iterdir()} == {"verdict"}


@pytest.mark.root
def test_state_that_did_not_fit_leaves_no_payload_behind(small: Path) -> None:
    made = Journal(ID, ORIGIN)
    made.create()
    fill(small, leave=4096)
    with pytest.raises(JournalError):
        made.save("state", b"SECRET" * 5000)
    assert not (made.directory / "state").exists()


@pytest.mark.root
def test_the_run_directory_cannot_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CRIU_TCPCP_RUN_DIR", "/proc/no-such-place")
    with pytest.raises(JournalError) as caught:
        Journal(ID, ORIGIN).create()
    assert "/proc/no-such-place" in str(caught.value)
    assert all_journals() == []


def test_the_run_directory_is_the_environments_or_the_standard_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CRIU_TCPCP_RUN_DIR", "/elsewhere")
    assert run_directory() == Path("/elsewhere")
    for unset in ("", None):
        if unset is None:
            monkeypatch.delenv("CRIU_TCPCP_RUN_DIR")
        else:
            monkeypatch.setenv("CRIU_TCPCP_RUN_DIR", unset)
        assert run_directory() == Path("/run/criu-tcpcp")


def test_two_writers_do_not_mix_their_lines(made: Journal) -> None:
    script = (f"from criu_tcpcp.journal import ORIGIN, Journal\nmine = Journal({ID!r}, ORIGIN)\n"
              "for number in range(200): mine.write('note', number=number, text='x' * 500)\n")
    writers = [subprocess.Popen([sys.executable, "-c", script]) for _ in range(3)]
    assert [one.wait(60) for one in writers] == [0, 0, 0]
    assert len(made.records()) == 600
    assert len((made.directory / "log").read_bytes().split()) == 600
    assert all(json.dumps(one) for one in made.records())


def test_a_removed_pass_is_gone(made: Journal) -> None:
    made.write("done")
    made.save("state", b"x")
    made.remove()
    assert not made.exists()
    made.remove()


def test_an_unreadable_run_directory_is_not_an_empty_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is to believe that nothing is in doubt."""
    monkeypatch.setenv("CRIU_TCPCP_RUN_DIR", str(tmp_path / "none"))
    assert all_journals() == []
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("CRIU_TCPCP_RUN_DIR", str(tmp_path / "file"))
    with pytest.raises(JournalError, match="not a directory"):
        all_journals()
