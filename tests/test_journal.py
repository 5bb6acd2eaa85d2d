"""What the journal promises: durable, ordered, sealed, and honest about damage."""

import os
import resource
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import JournalError
from common.failpoints import Failpoint
from common.journal import DiskFull, Journal, Position, read, seal_of
from common.records import Admit, AnyRecord, Drop, Issue, Open, Step
from common.wire import Grading, Sampling, Ticket


def opened(folder: Path, incarnation: int = 1, segment_bytes: int = 64 << 20) -> Journal:
    """A journal that a new incarnation has begun, as a learner begins it."""
    folder.mkdir(exist_ok=True)
    sealed = seal_of(folder)
    journal = Journal(folder, incarnation, segment_bytes)
    journal.append(Open(run="r", incarnation=incarnation, config={"a": 1}, sealed=sealed))
    journal.commit()
    return journal


def some_records(n: int) -> list[AnyRecord]:
    kinds = [
        lambda i: Admit(ticket=i, frame=bytes([i % 256]) * (i * 7 % 90), at=i / 2),
        lambda i: Step(t=i, version=i + 1, digest="d", consumed=(i,), dropped=((i, "stale"),)),
        lambda i: Drop(ticket=i, reason="surplus"),
    ]
    return [kinds[i % len(kinds)](i) for i in range(n)]


def records(folder: Path, start: Position | None = None) -> list[AnyRecord]:
    return [record for _, record in read(folder, start) if not isinstance(record, Open)]


def test_records_come_back_in_order_from_any_position_across_segments(tmp_path: Path) -> None:
    written = some_records(50)
    journal = opened(tmp_path / "j", segment_bytes=300)
    positions = []
    for i, record in enumerate(written):
        positions.append(journal.append(record))
        if i % 3 == 0:
            journal.commit()
    journal.close()
    assert len(list((tmp_path / "j").iterdir())) > 5
    assert records(tmp_path / "j") == written
    assert positions == sorted(positions)
    for i, position in enumerate(positions):
        assert records(tmp_path / "j", position) == written[i:]


def test_a_ticket_comes_back_with_its_prompt(tmp_path: Path) -> None:
    prompt = np.arange(9, dtype=np.int32)
    ticket = Ticket(
        id=3, kind="main", problem="p", prompt=prompt, n=2, sampling=Sampling(), grading=Grading()
    )
    journal = opened(tmp_path)
    journal.append(Issue(ticket=ticket))
    journal.close()
    (record,) = records(tmp_path)
    assert isinstance(record, Issue)
    assert record.ticket.id == 3
    assert record.ticket.prompt.tolist() == prompt.tolist()


def test_nothing_is_in_the_file_before_the_commit_and_everything_after(tmp_path: Path) -> None:
    journal = opened(tmp_path)
    journal.append(Drop(ticket=1, reason="failed"))
    assert records(tmp_path) == []
    journal.commit()
    assert len(records(tmp_path)) == 1


def test_a_commit_of_thousands_of_pieces_is_written_whole(tmp_path: Path) -> None:
    journal = opened(tmp_path)
    written = [Admit(ticket=i, frame=b"x" * 100) for i in range(5000)]
    for record in written:
        journal.append(record)
    journal.commit()
    assert records(tmp_path) == written


def test_records_appended_while_others_are_written_are_all_there_in_order(tmp_path: Path) -> None:
    written = some_records(3000)
    journal = opened(tmp_path, segment_bytes=20_000)
    with ThreadPoolExecutor(1) as disk:
        commit = disk.submit(journal.commit)
        positions = []
        for record in written:
            positions.append(journal.append(record))
            if commit.done():
                commit.result()
                commit = disk.submit(journal.commit)
    commit.result()
    journal.close()
    assert len(list(tmp_path.iterdir())) > 1
    assert [
        (position, record) for position, record in read(tmp_path) if not isinstance(record, Open)
    ] == list(zip(positions, written, strict=True))


def test_wherever_a_crash_cuts_the_file_the_records_before_the_cut_survive(tmp_path: Path) -> None:
    written = some_records(6)
    journal = opened(tmp_path)
    ends = []
    for record in written:
        journal.append(record)
        ends.append(journal.end().offset)
    journal.close()
    path = next(tmp_path.glob("*.journal"))
    whole = path.read_bytes()
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        assert records(tmp_path) == written[: sum(end <= length for end in ends)]
        sealed = seal_of(tmp_path)
        assert sealed is not None
        assert sealed[1] <= length


def test_wherever_a_crash_cuts_a_life_of_several_segments_the_next_life_goes_on(
    tmp_path: Path,
) -> None:
    """The last segment of the first life at every length; then a second life, and all of it."""
    written, positions = some_records(9), []
    journal = opened(tmp_path, segment_bytes=250)
    for record in written:
        journal.commit()
        positions.append(journal.append(record))
    journal.close()
    last = max(tmp_path.glob("*.journal"))
    whole, kept = last.read_bytes(), [p for p in positions if p.segment == last.stem]
    earlier = len(written) - len(kept)
    assert earlier > 3
    assert len(kept) > 1, "several records to be cut between"
    ends = [*(p.offset for p in kept[1:]), len(whole)]
    for length in range(len(whole) + 1):
        last.write_bytes(whole[:length])
        second = opened(tmp_path, incarnation=2)
        second.append(Drop(ticket=99, reason="failed"))
        second.close()
        survive = earlier + sum(end <= length for end in ends)
        assert records(tmp_path) == [*written[:survive], Drop(ticket=99, reason="failed")]
        for path in tmp_path.glob("000002-*.journal"):
            path.unlink()


def test_a_sealed_segment_is_refused_at_whatever_length_it_is_cut_and_whatever_byte_is_flipped(
    tmp_path: Path,
) -> None:
    """The successor said how long it is: there is no torn tail any more, only damage."""
    journal = opened(tmp_path)
    for record in some_records(3):
        journal.append(record)
    journal.close()
    first = next(tmp_path.glob("*.journal"))
    whole = first.read_bytes()
    opened(tmp_path, incarnation=2).close()
    for at in range(len(whole)):
        first.write_bytes(whole[:at])
        with pytest.raises(JournalError, match=first.name):
            records(tmp_path)
        flipped = bytearray(whole)
        flipped[at] ^= 0x55
        first.write_bytes(flipped)
        with pytest.raises(JournalError, match=first.name):
            records(tmp_path)


def test_a_torn_tail_is_cut_off_by_the_successor_and_the_journal_goes_on(tmp_path: Path) -> None:
    opened(tmp_path).close()
    path = next(tmp_path.glob("*.journal"))
    good = path.stat().st_size
    with path.open("ab") as file:
        file.write(b"\x40\x00\x00\x00half a record")
    successor = opened(tmp_path, incarnation=2)
    assert path.stat().st_size == good
    successor.append(Drop(ticket=1, reason="failed"))
    successor.close()
    assert len(records(tmp_path)) == 1


@settings(max_examples=60, deadline=None)
@given(where=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_a_flipped_byte_is_refused_with_its_offset_or_ends_the_tail(
    tmp_path_factory: pytest.TempPathFactory, where: float, flip: int
) -> None:
    folder = tmp_path_factory.mktemp("j")
    journal = opened(folder)
    written = some_records(12)
    starts = [journal.append(record).offset for record in written]
    journal.close()
    path = next(folder.glob("*.journal"))
    data = bytearray(path.read_bytes())
    at = starts[0] + int(where * (len(data) - starts[0]))
    data[at] ^= flip
    path.write_bytes(data)
    damaged = max(start for start in starts if start <= at)
    if damaged == starts[-1]:
        assert records(folder) == written[:-1]
        return
    with pytest.raises(JournalError, match=f"{path.name}, offset {damaged}"):
        records(folder)
    with pytest.raises(JournalError, match=f"offset {damaged}"):
        seal_of(folder)


def test_bad_bytes_inside_an_earlier_segment_are_damage_even_at_its_end(tmp_path: Path) -> None:
    journal = opened(tmp_path, segment_bytes=60)
    for record in some_records(9):
        journal.append(record)
        journal.commit()
    journal.close()
    first = min(tmp_path.glob("*.journal"))
    with first.open("ab") as file:
        file.write(b"tail")
    with pytest.raises(JournalError, match="damaged record"):
        records(tmp_path)


def test_a_segment_shorter_than_its_seal_is_damage(tmp_path: Path) -> None:
    opened(tmp_path).close()
    opened(tmp_path, incarnation=2).close()
    first = min(tmp_path.glob("*.journal"))
    os.truncate(first, first.stat().st_size - 1)
    with pytest.raises(JournalError, match="cut off"):
        records(tmp_path)


def test_what_a_zombie_writes_after_its_seal_does_not_exist(tmp_path: Path) -> None:
    zombie = opened(tmp_path, segment_bytes=200)
    zombie.append(Drop(ticket=1, reason="failed"))
    zombie.commit()
    successor = opened(tmp_path, incarnation=2)
    for i in range(20):  # into the sealed segment and into new ones
        zombie.append(Drop(ticket=100 + i, reason="failed"))
        zombie.commit()
    successor.append(Drop(ticket=2, reason="failed"))
    successor.close()
    assert [record.ticket for record in records(tmp_path)] == [1, 2]
    assert seal_of(tmp_path)[0].startswith("000002")


def test_a_zombie_that_opens_late_seals_nothing(tmp_path: Path) -> None:
    first = opened(tmp_path)
    sealed = seal_of(tmp_path)
    zombie = Journal(tmp_path, 2)
    zombie.append(Open(run="r", incarnation=2, config={}, sealed=sealed))
    first.append(Drop(ticket=1, reason="failed"))
    first.close()
    opened(tmp_path, incarnation=3).close()
    zombie.append(Drop(ticket=99, reason="failed"))
    zombie.close()
    assert [record.ticket for record in records(tmp_path)] == [1]


def test_a_successor_that_died_before_its_first_record_is_passed_over(tmp_path: Path) -> None:
    first = opened(tmp_path)
    first.append(Drop(ticket=1, reason="failed"))
    first.close()
    (tmp_path / "000002-000000.journal").write_bytes(b"ISE")
    third = opened(tmp_path, incarnation=3)
    third.append(Drop(ticket=3, reason="failed"))
    third.close()
    assert [record.ticket for record in records(tmp_path)] == [1, 3]


def test_a_journal_refuses_an_incarnation_that_is_not_new(tmp_path: Path) -> None:
    opened(tmp_path, incarnation=2).close()
    with pytest.raises(JournalError, match="incarnation 2"):
        Journal(tmp_path, 2)


def test_a_position_behind_the_end_of_its_segment_is_damage(tmp_path: Path) -> None:
    journal = opened(tmp_path)
    end = journal.end()
    journal.close()
    assert records(tmp_path, end) == []
    with pytest.raises(JournalError, match="cut off"):
        records(tmp_path, end._replace(offset=end.offset + 1))


def test_pruning_deletes_only_segments_before_the_position(tmp_path: Path) -> None:
    journal = opened(tmp_path, segment_bytes=100)
    written = some_records(30)
    positions = []
    for record in written:
        positions.append(journal.append(record))
        journal.commit()
    journal.prune(positions[20])
    assert records(tmp_path, positions[20]) == written[20:]
    assert not (tmp_path / f"{positions[0].segment}.journal").exists()
    with pytest.raises(JournalError, match="pruned"):
        records(tmp_path, positions[0])
    journal.close()


FULL_DISK = """
import resource, sys
from pathlib import Path
from common.journal import DiskFull, Journal
from common.records import Admit, Open

folder = Path(sys.argv[1])
journal = Journal(folder, 1)
journal.append(Open(run="r", incarnation=1, config={}))
journal.commit()
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))
for i in range(3):
    journal.append(Admit(ticket=i, frame=b"x" * 4000))
size = next(folder.glob("*.journal")).stat().st_size
for _ in range(2):
    try:
        journal.commit()
    except DiskFull as error:
        print(error)
    assert next(folder.glob("*.journal")).stat().st_size == size
journal.append(Admit(ticket=3, frame=b"y"))
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
journal.commit()
"""


def test_a_full_disk_loses_nothing_and_the_journal_goes_on_when_there_is_space(
    tmp_path: Path,
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("nothing is lost") == 2
    assert [record.ticket for record in records(tmp_path)] == [0, 1, 2, 3]
    assert issubclass(DiskFull, JournalError)


def test_a_failed_fsync_is_final(tmp_path: Path) -> None:
    journal = opened(tmp_path)
    path = next(tmp_path.glob("*.journal"))
    (fd,) = (int(f.name) for f in Path("/proc/self/fd").iterdir() if f.resolve() == path.resolve())
    null = os.open("/dev/null", os.O_WRONLY)  # takes every byte and can not be synced
    os.dup2(null, fd)
    os.close(null)
    journal.append(Drop(ticket=1, reason="failed"))
    with pytest.raises(JournalError, match="fsync failed"):
        journal.commit()
    for call in (journal.commit, lambda: journal.append(Drop(ticket=2, reason="failed"))):
        with pytest.raises(JournalError, match="fsync failed"):
            call()
    journal.close()


DIES = """
import sys
from pathlib import Path
from common.failpoints import Failpoint
from common.journal import Journal
from common.records import Drop, Open

journal = Journal(Path(sys.argv[1]), 1)
failpoint = Failpoint.parse("after_append:3")
journal.append(Open(run="r", incarnation=1, config={}))
for i in range(9):
    journal.append(Drop(ticket=i, reason="failed"))
    journal.commit()
    failpoint("after_append")
    journal.append(Drop(ticket=100 + i, reason="failed"))
"""


def test_a_failpoint_kills_at_its_count_and_what_was_committed_survives(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", DIES, str(tmp_path)])
    assert done.returncode == -9
    assert [record.ticket for record in records(tmp_path)] == [0, 100, 1, 101, 2]


def test_an_empty_failpoint_never_fires_and_a_wrong_one_names_the_nearest() -> None:
    Failpoint.parse("")("after_append")
    with pytest.raises(ValueError, match="after_append"):
        Failpoint.parse("after_apend:3")
    for text in ("after_ack:0", "after_ack:x", "after_ack:-1"):
        with pytest.raises(ValueError, match="NAME:COUNT"):
            Failpoint.parse(text)


def test_reading_takes_memory_for_one_segment_not_for_the_journal(tmp_path: Path) -> None:
    journal = opened(tmp_path, segment_bytes=1 << 20)
    for i in range(64):
        journal.append(Admit(ticket=i, frame=bytes(1 << 20)))
        journal.commit()
    journal.close()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert sum(1 for _ in read(tmp_path)) == 65
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 30_000  # kB
