"""Tests the file that an interrupted labelling goes on from."""

import pytest

from kd_det import InputError
from kd_det.labeling.journal import Journal

TASK = {"images": "a", "thresholds": [0.5]}


def write(path, *entries):
    journal = Journal(path, TASK)
    for entry in entries:
        journal.append(entry)
    journal.close()


def test_entries_survive(tmp_path):
    path = str(tmp_path / "journal")
    write(path, {"n": 1}, {"n": 2})
    write(path, {"n": 3})
    journal = Journal(path, TASK)
    assert journal.entries == [{"n": 1}, {"n": 2}, {"n": 3}]
    journal.remove()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("torn", [b'{"n": ', b'{"n": 2}', b'{"n": 2\n{"n": 3}\n', b"\0\0\0\0", b"2\n"])
def test_what_was_not_written_to_its_end_is_dropped(tmp_path, torn):
    path = tmp_path / "journal"
    write(str(path), {"n": 1})
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    journal = Journal(str(path), TASK)
    assert journal.entries == [{"n": 1}]
    journal.close()
    assert path.read_bytes() == whole


def test_a_torn_first_line_begins_anew(tmp_path):
    path = tmp_path / "journal"
    write(str(path))
    whole = path.read_bytes()
    path.write_bytes(whole[:10])
    write(str(path))
    assert path.read_bytes() == whole


def test_another_task_is_refused(tmp_path):
    path = tmp_path / "journal"
    write(str(path), {"n": 1})
    before = path.read_bytes()
    with pytest.raises(InputError, match=r"journal: is of an interrupted run with other thresholds; delete it"):
        Journal(str(path), {**TASK, "thresholds": [0.4]})
    assert path.read_bytes() == before


def test_one_writer(tmp_path):
    journal = Journal(str(tmp_path / "journal"), TASK)
    with pytest.raises(InputError, match="another process is writing"):
        Journal(str(tmp_path / "journal"), TASK)
    journal.close()
