#!/usr/bin/env python
"""Write the tables of docs/results.md from the numbers in docs/results/, so that no number is typed by hand.

    python docs/results/write_tables.py                           write all tables again
    python docs/results/write_tables.py --add bccd output/bccd    take bccd.json from an output of kd-det repeat first

A table stands between the lines <!-- results:NAME --> and <!-- end -->, and has the numbers of docs/results/NAME.json:
the accuracy of each run with its seed, the commands, the machine, the versions and the commits.
"""

import argparse
import json
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kd_det.analysis.differences import Difference, direction, find_differences, value_of
from kd_det.analysis.table import (
    DIFFERENCE_NOTE,
    format_difference,
    format_number,
    format_table,
    summarise,
    without_nan,
)
from kd_det.engine import run_tool
from kd_det.engine.arguments import make_parser
from kd_det.engine.picture_grid import printable
from kd_det.errors import InputError
from kd_det.files import write_whole

# Maps a metric to its "mean" and "std".
Column = Mapping[str, Mapping[str, float]]
FOLDER = Path(__file__).resolve().parent
PAGE = FOLDER.with_suffix(".md")
BLOCK = re.compile(r"(<!-- results:([\w-]+) -->\n)(?:(?!<!-- results:).)*?(<!-- end -->)", re.DOTALL)
# Titles of the columns with the differences to an experiment's first and second baseline.
TITLES = ("difference", "difference at equal compute")


# ---- From the output of kd-det repeat to the numbers ----
def collect_numbers(folders: Sequence[Path], columns: Sequence[str] = (), machine: str = "") -> dict[str, Any]:
    """Collects what a table needs from output folders of ``kd-det repeat`` on one test set.

    A run that several folders have, such as that of the plain student, is taken once.

    Args:
        folders: The output folders.
        columns: Metrics of the table, of which the first one orders its rows; by default, all AP or top-1 and top-5.
        machine: Description of the machine; by default, the device that the comparison names.

    Raises:
        InputError: If a file is missing or is not what the command writes, or folders contradict each other.
    """
    numbers: dict[str, Any] = {}
    for folder in folders:
        origin, comparison = (read_json(folder / name) for name in ("repeat.json", "comparison/comparison.json"))
        same = {key: comparison[key] for key in ("dataset", "dataset_images")}
        same |= {"machine": machine or comparison["device"], "versions": origin["versions"]}
        if not numbers:
            numbers = {"commands": [], "commits": [], **same, "columns": [], "baselines": [], "runs": []}
        different = [key for key, value in same.items() if numbers[key] != value]
        if different:
            raise InputError(f"{folder}: differs from {folders[0]} in {different[0]}, so that they share no table.")
        for key in ("commands", "commits"):
            numbers[key] += [text for text in origin[key] if text not in numbers[key]]
        for run in comparison["runs"]:
            metrics = {key: x for key, x in run["metrics"].items() if direction(key) > 0 and "-" not in key}
            add_run(numbers["runs"], {"name": run["name"], "seed": run.get("seed"), "metrics": metrics}, folder)
        pairs = [[name, base] for base, names in comparison.get("differences", {}).items() for name in names]
        numbers["baselines"] += [pair for pair in pairs if pair not in numbers["baselines"]]
    metrics = list(dict.fromkeys(metric for run in numbers["runs"] for metric in run["metrics"]))
    unknown = [column for column in columns if column not in metrics]
    if unknown:
        raise InputError(f"--columns: {unknown[0]!r} is not one of {', '.join(map(repr, metrics))}.")
    return numbers | {"columns": list(columns) or [metric for metric in metrics if metric != "F1"]}


def add_run(runs: list[dict[str, Any]], run: dict[str, Any], folder: Path) -> None:
    """Adds a run, unless it is already there.

    Raises:
        InputError: If a run of the same name and seed has other metrics.
    """
    same = [other for other in runs if (other["name"], other["seed"]) == (run["name"], run["seed"])]
    if not same:
        runs.append(run)
    elif run not in same:
        raise InputError(f"{folder}: {run['name']} with seed {run['seed']} differs from that of an earlier folder.")


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON file.

    Raises:
        InputError: If that is not possible.
    """
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: must be a file that kd-det repeat wrote, but {error}.") from error


# ---- From the numbers to the page ----
def make_table(numbers: dict[str, Any]) -> str:
    """Formats the numbers of one file as a Markdown table with one row per experiment, the best one first.

    Args:
        numbers: Result of :func:`collect_numbers`.
    """
    runs, (main, *others) = numbers["runs"], numbers["columns"]
    names, seeds = [run["name"] for run in runs], defaultdict(list)
    for run in runs:
        seeds[run["name"]].append("" if run["seed"] is None else str(run["seed"]))
    summary = summarise(names, [{metric: value_of(run, metric) for metric in run["metrics"]} for run in runs])
    baselines = {name: [base for each, base in numbers["baselines"] if each == name] for name in summary}
    found = find_differences(runs, [(name, base) for name, base in numbers["baselines"]])["differences"]
    titles = TITLES[: max(map(len, baselines.values()))]
    plain = list(dict.fromkeys(bases[0] for bases in baselines.values() if bases))

    def row(name: str) -> list[str]:
        differences = [found[base][name] for base in baselines[name]]
        values = [format_cell(summary[name], metric, len(seeds[name])) for metric in (main, *others)]
        cells = [f"**{name}**" if name in plain else name, ", ".join(seeds[name]), values[0]]
        for i in range(len(titles)):
            cells += split_difference(differences[i].get(main) if i < len(differences) else None)
        for metric, value in zip(others, values[1:], strict=True):
            verdict = split_difference(differences[0].get(metric) if differences else None)[1]
            cells.append(f"{value}, {verdict}" if verdict else value)
        return cells

    headers = ["", "seeds", main, *(x for title in titles for x in (title, "verdict")), *others]
    rows = [row(name) for name in sorted(summary, key=lambda name: rank(summary[name], main))]
    versions = ", ".join(f"{name} {version}" for name, version in numbers["versions"].items())
    notes = [f"{numbers['dataset']}, {numbers['dataset_images']} images. ±: standard deviation over seeds."]
    if plain:
        notes.append(f"Differences: to {', '.join(plain)}, seed by seed. {DIFFERENCE_NOTE}")
    notes.append(f"{numbers['machine']}; {versions}; commit {', '.join(numbers['commits']) or 'unknown'}.")
    return f"{format_table(rows, headers)}\n\n{' '.join(map(printable, notes))}"


def rank(column: Column, metric: str) -> float:
    """Returns a number to sort experiments by: the highest mean comes first, an experiment without a mean last."""
    mean = column[metric]["mean"] if metric in column else math.nan
    return math.inf if math.isnan(mean) else -mean


def format_cell(column: Column, metric: str, runs: int) -> str:
    """Formats the mean and the deviation of a metric; a dash stands for one that the experiment lacks."""
    return format_number(column[metric], 1, runs) if metric in column else "-"


def split_difference(difference: Difference | None) -> tuple[str, str]:
    """Formats a difference, and its verdict by itself; both are empty if there is none."""
    if difference is None:
        return "", ""
    return format_difference({**difference, "verdict": ""}, 1), difference["verdict"]


def fill_page(text: str, folder: Path) -> str:
    """Writes the table of each block of a page.

    Args:
        text: The page.
        folder: Folder of the files with the numbers.

    Raises:
        InputError: If a block has no end or no file, or a file no block.
    """
    blocks = BLOCK.findall(text)
    names, files = [name for _, name, _ in blocks], sorted(path.stem for path in folder.glob("*.json"))
    if not len(names) == text.count("<!-- results:") == text.count("<!-- end -->"):
        raise InputError("results.md: each line <!-- results:NAME --> needs a line <!-- end --> before the next one.")
    for name in sorted(set(names) ^ set(files)):
        missing = f"no block <!-- results:{name} -->" if name in files else f"a block of {name}.json, which is missing"
        raise InputError(f"results.md: has {missing}.")

    def fill(match: re.Match) -> str:
        table = make_table(read_json(folder / f"{match[2]}.json"))
        return f"{match[1]}\n{table} [Raw numbers]({folder.name}/{match[2]}.json).\n\n{match[3]}"

    return BLOCK.sub(fill, text)


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--add", nargs="+", metavar=("NAME", "FOLDER"), help="take NAME.json from these outputs of kd-det repeat"
    )
    parser.add_argument("--columns", nargs="+", default=[], metavar="METRIC", help="columns of NAME's table")
    parser.add_argument("--machine", default="", help="the machine, in words (default: its device)")
    args = parser.parse_args()
    if args.add and len(args.add) < 2:
        parser.error("--add: needs a name and at least one folder")
    return args


def main(args: argparse.Namespace) -> None:
    if args.add:
        name, *folders = args.add
        numbers = collect_numbers(list(map(Path, folders)), args.columns, args.machine)
        write(FOLDER / f"{name}.json", json.dumps(without_nan(numbers), indent=1) + "\n")
    write(PAGE, fill_page(PAGE.read_text(encoding="utf-8"), FOLDER))


def write(path: Path, text: str) -> None:
    """Writes a text file atomically."""
    write_whole(str(path), lambda file: file.write(text.encode()))


if __name__ == "__main__":
    run_tool(lambda: main(parse_args()))
