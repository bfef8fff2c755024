"""The checkpoints in a run's output folder: which are this run's, which come before others, and which is the last."""

import logging
import os
import re
from pathlib import Path

from kd_det.checkpoint_files import Header, check_damage, read_header
from kd_det.errors import InputError, UnreadableError, reason
from kd_det.files import write_whole

logger = logging.getLogger(__name__)
FINAL = "model_final.pth"
# Holds the name of the checkpoint that a run is resumed from.
TAG = "last_checkpoint"
# Holds the id of the run, which a damaged checkpoint can no longer tell.
RUN = "run_id"


def iteration_of(path: str) -> int:
    """The iteration after which a checkpoint was written, as its name says; -1 where it says none."""
    found = re.fullmatch(r"model_(\d+)\.pth", os.path.basename(path))
    return int(found[1]) if found else -1


def read_tag(folder: str | Path) -> str:
    """Read the name of the checkpoint that a run is resumed from; it is empty if the folder has no tag.

    Raises:
        InputError: If the tag is not a text file.
    """
    path = Path(folder, TAG)
    try:
        return path.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path}: must be a text file with the name of a checkpoint, but cannot be read: {reason(error)}"
        ) from error


def record_run(folder: str, run: str) -> None:
    """Write down which run the folder's checkpoints belong to, unless that is known."""
    if recorded_run(folder) != run:
        write_whole(os.path.join(folder, RUN), lambda file: file.write(run.encode()))


def recorded_run(folder: str) -> str | None:
    """Read which run the folder's checkpoints belong to; None if that was not written down."""
    path = Path(folder, RUN)
    return path.read_text(encoding="utf-8", errors="replace").strip() if path.is_file() else None


def read_headers(folder: str) -> tuple[dict[str, Header], dict[str, str]]:
    """Read the headers of the checkpoints that a run can be resumed from.

    Returns:
        Path to header, and path to the reason why a header cannot be read.
    """
    headers, reasons = {}, {}
    for name in sorted(os.listdir(folder), reverse=True):
        path = os.path.join(folder, name)
        if iteration_of(name) >= 0 or name == FINAL:
            try:
                headers[path] = read_header(path)
            except UnreadableError as error:
                reasons[path] = str(error)
    return headers, reasons


def find_earlier(last: str) -> tuple[list[str], list[str]]:
    """Find the checkpoints of a run from before its last one, which is damaged or gone.

    Returns:
        Their paths, the newest first, and the reasons why others cannot be read.

    Raises:
        InputError: If the folder has checkpoints of several runs, and nothing says which is this one.
    """
    headers, reasons = read_headers(folder := os.path.dirname(last))
    reasons.pop(last, None)
    limit, recorded = iteration_of(last), recorded_run(folder)
    if last in headers:
        runs = {headers[last].run}
    elif recorded:
        runs = {recorded}
    else:
        runs = {header.run for header in headers.values()}
    if len(runs) > 1:
        raise InputError(
            f"--resume: {last} cannot be read, and {folder} has checkpoints of {len(runs)} runs; write the name of the "
            f"one to go on from into {folder}/{TAG}."
        )
    found = {
        path: header.iteration
        for path, header in headers.items()
        if path != last and header.run in runs and (limit < 0 or header.iteration < limit)
    }
    return sorted(found, key=found.get, reverse=True), list(reasons.values())


def find_superseded(folder: str, run: str | None, iteration: int | None, *, keep: int) -> list[str]:
    """Find the checkpoints of iterations that need not stay; those of other runs do.

    Args:
        folder: Output folder of the run.
        run: Its id.
        iteration: The one after which a checkpoint was just written. What was written after later ones, before the run
            went back, stays least, as does what cannot be read.
        keep: How many stay.
    """
    headers, reasons = read_headers(folder)
    own = {path: header.iteration for path, header in headers.items() if header.run == run} | dict.fromkeys(reasons, -1)

    def rank(path: str) -> tuple[bool, int]:
        return iteration is None or 0 <= own[path] <= iteration, own[path]

    return sorted((path for path in own if iteration_of(path) >= 0), key=rank, reverse=True)[keep:]


def finished_iterations(folder: str | Path) -> int:
    """Count the iterations of the run in a folder; 0 unless it came to its end and its final checkpoint is whole."""
    path = Path(folder, FINAL)
    header = read_whole_header(path) if read_tag(folder) == FINAL and path.is_file() else None
    return header.iteration + 1 if header else 0


def read_whole_header(path: Path) -> Header | None:
    """Read a checkpoint's header; None, with a warning, if the file is damaged anywhere."""
    try:
        check_damage(path)
        return read_header(path)
    except UnreadableError as error:
        logger.warning("%s", error)
        return None
