"""Tests that the tables of docs/results.md are what docs/results/write_tables.py makes of the numbers per seed."""

import json
import sys

import pytest
from helpers import ROOT

from kd_det.analysis.differences import find_differences
from kd_det.errors import InputError

sys.path.insert(0, str(ROOT / "docs" / "results"))
import write_tables

sys.path.pop(0)


def test_no_number_is_typed_by_hand():
    text = write_tables.PAGE.read_text(encoding="utf-8")
    assert write_tables.fill_page(text, write_tables.FOLDER) == text


def run(name, seed, ap, **metrics):
    costs = {"parameters (M)": 1.2, "ms per image": 60.0 + seed, "score threshold": 0.5}
    return {"name": name, "seed": seed, "metrics": {"bbox AP": ap, "bbox AP-a|b": 1.0, "F1": 50.0, **metrics, **costs}}


RUNS = [run("teacher", 0, 50.0, **{"bbox AP50": 80.0})]
RUNS += [run("plain", seed, 10.0 + seed, **{"bbox AP50": 40.0}) for seed in (1, 2, 3)]
RUNS += [run("so|ft", seed, 18.0 + seed + seed % 2, **{"bbox AP50": 38.0 - seed}) for seed in (1, 2, 3)]
RUNS += [run("plain_as_long_as_so|ft", seed, 20.0 + 2 * seed, **{"bbox AP50": 50.0}) for seed in (1, 2, 3)]
RUNS += [run("broken", seed, None) for seed in (1, 2, 3)]
BASELINES = [("so|ft", "plain"), ("broken", "plain"), ("so|ft", "plain_as_long_as_so|ft")]


@pytest.fixture
def save_output(tmp_path):
    """Write what kd-det repeat leaves and a table needs."""

    def save(name, runs, baselines=(), **origin):
        folder = tmp_path / name
        (folder / "comparison").mkdir(parents=True)
        comparison = {"dataset": "d_test", "dataset_images": 7, "device": "CPU", "runs": runs}
        comparison |= find_differences(runs, baselines) if baselines else {}
        (folder / "comparison/comparison.json").write_text(json.dumps(comparison))
        origin = {"commands": [f"kd-det repeat {name}"], "commits": ["abc"], "versions": {"torch": "2.9"}} | origin
        (folder / "repeat.json").write_text(json.dumps(origin))
        return folder

    return save


def test_a_table_from_an_output(save_output, tmp_path):
    folder = tmp_path / "numbers"
    folder.mkdir()
    numbers = write_tables.collect_numbers([save_output("out", RUNS, BASELINES)], machine="two | cores")
    (folder / "made_up.json").write_text(json.dumps(numbers))
    page = "# Results\n\n<!-- results:made_up -->\nold\n<!-- end -->\n\nText.\n"
    text = write_tables.fill_page(page, folder)
    assert write_tables.fill_page(text, folder) == text
    begin, *table, notes, _, end, _, rest = text.splitlines()[2:]
    assert (begin, end, rest) == ("<!-- results:made_up -->", "<!-- end -->", "Text.")
    rows = [[cell.strip() for cell in line.replace("\\|", "!").split("|")[1:-1]] for line in table if line]
    # so|ft is 9, 8 and 9 above plain, and 2, 4 and 4 below the longer training.
    assert rows[:1] + rows[2:] == [
        ["", "seeds", "bbox AP", "difference", "verdict", "difference at equal compute", "verdict", "bbox AP50"],
        ["teacher", "0", "50.0", "", "", "", "", "80.0"],
        ["plain_as_long_as_so!ft", "1, 2, 3", "24.0 ± 2.0", "", "", "", "", "50.0 ± 0.0"],
        [
            *("so!ft", "1, 2, 3", "20.7 ± 1.2", "+8.7 [+7.2, +10.1]", "helps"),
            *("-3.3 [-6.2, -0.5]", "hurts", "36.0 ± 1.0, hurts"),
        ],
        ["**plain**", "1, 2, 3", "12.0 ± 1.0", "", "", "", "", "40.0 ± 0.0"],
        ["broken", "1, 2, 3", "nan", "nan", "", "", "", "-"],
    ]
    assert notes.startswith("d_test, 7 images. ±: standard deviation over seeds. Differences: to plain, seed by seed.")
    assert notes.endswith("two | cores; torch 2.9; commit abc. [Raw numbers](numbers/made_up.json).")


def test_a_file_holds_no_more_than_a_table_needs(save_output):
    numbers = write_tables.collect_numbers([save_output("out", RUNS, BASELINES)], ["bbox AP50", "F1"])
    assert numbers["columns"] == ["bbox AP50", "F1"]
    assert numbers["runs"][1] == {
        "name": "plain",
        "seed": 1,
        "metrics": {"bbox AP": 11.0, "F1": 50.0, "bbox AP50": 40.0},
    }
    assert [tuple(pair) for pair in numbers["baselines"]] == BASELINES


def test_several_outputs_share_runs(save_output):
    """Times differ from one comparison to the next; a run that is in both is there once."""
    again = [{**each, "metrics": {**each["metrics"], "ms per image": 99.0}} for each in RUNS[:4]]
    folders = [
        save_output("one", RUNS, BASELINES),
        save_output("two", [*again, run("hint", 1, 5.0)], [("hint", "plain")], commits=["abc", "abd"]),
    ]
    numbers = write_tables.collect_numbers(folders)
    assert numbers["commands"] == ["kd-det repeat one", "kd-det repeat two"]
    assert numbers["commits"] == ["abc", "abd"]
    assert [each["name"] for each in numbers["runs"]] == [*(each["name"] for each in RUNS), "hint"]
    assert [tuple(pair) for pair in numbers["baselines"]] == [*BASELINES, ("hint", "plain")]


@pytest.mark.parametrize(
    ("runs", "origin", "message"),
    [
        ([run("plain", 1, 99.0)], {}, "two: plain with seed 1 differs from that of an earlier folder"),
        ([run("hint", 1, 9.0)], {"versions": {}}, "two: differs from .*one in versions, so that they share no table"),
    ],
)
def test_outputs_that_contradict_each_other(runs, origin, message, save_output):
    folders = [save_output("one", RUNS, BASELINES), save_output("two", runs, **origin)]
    with pytest.raises(InputError, match=message):
        write_tables.collect_numbers(folders)


def test_wrong_arguments(save_output, tmp_path):
    folder = save_output("out", RUNS)
    with pytest.raises(InputError, match="--columns: 'segm AP' is not one of 'bbox AP', 'F1', 'bbox AP50'"):
        write_tables.collect_numbers([folder], ["segm AP"])
    with pytest.raises(InputError, match=r"repeat\.json: must be a file that kd-det repeat wrote"):
        write_tables.collect_numbers([tmp_path / "nowhere"])


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ("<!-- results:a -->\n", "needs a line <!-- end -->"),
        ("<!-- results:a -->\n<!-- results:a -->\n<!-- end -->\n", "needs a line <!-- end -->"),
        ("<!-- results:a -->\n<!-- end -->\n<!-- end -->\n", "needs a line <!-- end -->"),
        ("<!-- results:b -->\n<!-- end -->\n", "has no block <!-- results:a -->"),
        (
            "<!-- results:a -->\n<!-- end -->\n<!-- results:b -->\n<!-- end -->\n",
            "has a block of b.json, which",
        ),
    ],
)
def test_damaged_pages(page, message, tmp_path):
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(InputError, match=message):
        write_tables.fill_page(page, tmp_path)
