"""Finds the checkpoints in an output folder: those of a run, the earlier ones, and the last one."""

import logging
import os
import re
from pathlib import Path

from kd_det.checkpoint_files import Header, check_damage, read_header
from kd_det.errors import InputError, UnreadableError, reason
from kd_det.files import write_whole

logger = logging.getLogger(__name__)
FINAL = "model_final.pth"
# File that holds the name of the checkpoint to resume from.
TAG = "last_checkpoint"
# File that holds the id of the run, for when the checkpoint that has it is damaged.
RUN = "run_id"


def iteration_of(path: str) -> int:
    """Returns the iteration in the name of a checkpoint; -1 if its name has none."""
    match = re.fullmatch(r"model_(\d+)\.pth", os.path.basename(path))
    return int(match[1]) if match else -1


def read_tag(folder: str | Path) -> str:
    """Reads the name of the checkpoint to resume from; it is empty if the folder has no tag.

    Raises:
        InputError: If the tag is not a text file, or a link that leads nowhere.
    """
    path = Path(folder, TAG)
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        if isinstance(error, FileNotFoundError) and not path.is_symlink():
            return ""
        raise InputError(
            f"{path}: must be a text file with the name of a checkpoint, but cannot be read: {reason(error)}"
        ) from error


def record_run(folder: str, run: str) -> None:
    """Records which run the checkpoints in the folder belong to, unless that is already recorded."""
    if recorded_run(folder) != run:
        write_whole(os.path.join(folder, RUN), lambda file: file.write(run.encode()))


def recorded_run(folder: str) -> str | None:
    """Reads which run the checkpoints in the folder belong to; None if that is not recorded."""
    path = Path(folder, RUN)
    return path.read_text(encoding="utf-8", errors="replace").strip() if path.is_file() else None


def read_headers(folder: str) -> tuple[dict[str, Header], dict[str, str]]:
    """Reads the headers of the checkpoints that a run can be resumed from.

    Returns:
        A dict that maps paths to headers, and one that maps paths to the reasons why their headers cannot be read.
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
    """Finds the checkpoints of a run that precede its last one, which is damaged or gone.

    Returns:
        Their paths, newest first, and the reasons why other checkpoints cannot be read.

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
    iterations = {
        path: header.iteration
        for path, header in headers.items()
        if path != last and header.run in runs and (limit < 0 or header.iteration < limit)
    }
    return sorted(iterations, key=iterations.__getitem__, reverse=True), list(reasons.values())


def find_superseded(folder: str, run: str | None, iteration: int | None, *, keep: int) -> list[str]:
    """Finds the checkpoints of iterations that may be deleted; those of other runs are never among them.

    Args:
        folder: Output folder of the run.
        run: Id of the run.
        iteration: The iteration after which a checkpoint was just written. Checkpoints of later iterations, which the
            run wrote before it went back, are the first to go, together with those that cannot be read.
        keep: Number of checkpoints to keep.
    """
    headers, reasons = read_headers(folder)
    iterations = {path: header.iteration for path, header in headers.items() if header.run == run}
    iterations |= dict.fromkeys(reasons, -1)

    def rank(path: str) -> tuple[bool, int]:
        return iteration is None or 0 <= iterations[path] <= iteration, iterations[path]

    return sorted((path for path in iterations if iteration_of(path) >= 0), key=rank, reverse=True)[keep:]


def finished_iterations(folder: str | Path) -> int:
    """Counts the iterations of the run in a folder; 0 unless the run finished and its final checkpoint is intact."""
    path = Path(folder, FINAL)
    header = read_whole_header(path) if read_tag(folder) == FINAL and path.is_file() else None
    return header.iteration + 1 if header else 0


def read_whole_header(path: Path) -> Header | None:
    """Reads a checkpoint's header; returns None and logs a warning if any part of the file is damaged."""
    try:
        check_damage(path)
        return read_header(path)
    except UnreadableError as error:
        logger.warning("%s", error)
        return None
