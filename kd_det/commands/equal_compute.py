"""Plans plain students that train for as long as distilled ones took: what the same time buys without a teacher."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from kd_det.analysis.runs import find_generations
from kd_det.checkpoint_folder import finished_iterations
from kd_det.commands.trainings import Training
from kd_det.config import read_config
from kd_det.engine.event_writers import logged_number
from kd_det.errors import InputError
from kd_det.files import write_whole

# File in the output folder that holds the decided lengths, so that an interrupted command goes on with the same ones.
LENGTHS = "equal_compute.json"


@dataclass(frozen=True)
class Length:
    """Describes how long the plain student trains to take as long as a distilled one.

    Attributes:
        plain: Name of the plain student.
        plain_iterations: Its SOLVER.MAX_ITER.
        time_ratio: Training time of the distilled student over that of the plain one.
        iterations: SOLVER.MAX_ITER of the longer training.
        steps: SOLVER.STEPS of the longer training.
    """

    plain: str
    plain_iterations: int
    time_ratio: float
    iterations: int
    steps: list[int]


def longer_name(name: str, plain: str) -> str:
    """Returns the name of the plain student that trains for as long as a distilled one took."""
    return f"{plain}_as_long_as_{name}"


def plan_longer(output: Path, baselines: Mapping[str, str], seeds: Sequence[int]) -> dict[Training, str]:
    """Plans a longer training of the plain student for each distilled student and seed.

    A training starts from the config that the plain student's run of its seed has saved, so that it differs from that
    run in SOLVER.MAX_ITER and SOLVER.STEPS alone.

    Args:
        output: The output folder of ``kd-det repeat``, in which all students are trained.
        baselines: Maps the name of each distilled student to that of its plain one.
        seeds: The seeds.

    Returns:
        A dict that maps the trainings to the names of their students.

    Raises:
        InputError: If a run has recorded no times, or the file of decided lengths cannot be used.
    """
    lengths = decide_lengths(output, baselines, seeds)
    return {
        Training(
            (str(output / f"{plain}_seed{seed}" / "config.yaml"),),
            output / f"{longer_name(name, plain)}_seed{seed}",
            ("SOLVER.MAX_ITER", str(lengths[name].iterations), "SOLVER.STEPS", str(tuple(lengths[name].steps))),
        ): longer_name(name, plain)
        for seed in seeds
        for name, plain in baselines.items()
    }


def decide_lengths(output: Path, baselines: Mapping[str, str], seeds: Sequence[int]) -> dict[str, Length]:
    """Decides how long the longer trainings are, unless that has been decided before, and records it.

    Args:
        output: See :func:`plan_longer`.
        baselines: See :func:`plan_longer`.
        seeds: See :func:`plan_longer`.
    """
    path = output / LENGTHS
    decided = read_lengths(path)
    for name, plain in baselines.items():
        cfg = read_config(str(output / f"{plain}_seed{seeds[0]}" / "config.yaml"), other_heads=True)
        length = decided.get(name)
        if length is None:
            pairs = [[output / f"{student}_seed{seed}" for student in (name, plain)] for seed in seeds]
            factor = statistics.median(training_time(student) / training_time(other) for student, other in pairs)
            iterations = max(1, round(cfg.SOLVER.MAX_ITER * factor))
            steps = [round(step * factor) for step in cfg.SOLVER.STEPS]
            length = decided[name] = Length(plain, cfg.SOLVER.MAX_ITER, factor, iterations, steps)
        elif (length.plain, length.plain_iterations) != (plain, cfg.SOLVER.MAX_ITER):
            raise InputError(
                f"{path}: {name} was measured against {length.plain_iterations} iterations of {length.plain}, but now "
                f"it is {cfg.SOLVER.MAX_ITER} of {plain}; delete the file, and the folders of "
                f"{longer_name(name, length.plain)}, to measure again."
            )
        ratio = f"{length.time_ratio:.2f} times those of {plain}"
        print(f"{longer_name(name, plain)}: {length.iterations} iterations, {ratio}.", flush=True)
    text = json.dumps({name: asdict(length) for name, length in decided.items()}, indent=2) + "\n"
    write_whole(str(path), lambda file: file.write(text.encode()))
    return decided


def read_lengths(path: Path) -> dict[str, Length]:
    """Reads the lengths that were decided before; {} if there is no such file.

    Raises:
        InputError: If the file is not what :func:`decide_lengths` writes.
    """
    if not path.is_file():
        return {}
    try:
        return {name: Length(**length) for name, length in json.loads(path.read_bytes()).items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise InputError(f"{path}: must hold the lengths that an earlier call decided, but {error}.") from error


def training_time(folder: Path) -> float:
    """Estimates how many seconds a finished run has trained, with its stages and generations but without evaluations.

    Each part counts as its iterations times the median time of one, since the sum of all times would contain whatever
    else has slowed the machine down for a while.

    Raises:
        InputError: If the metrics of a part hold no times.
    """
    runs = [Path(path) for _, path in find_generations(folder.name, str(folder))] or [folder]
    parts = [part for run in runs for part in (run / "pretrain", run) if part == run or part.is_dir()]
    return sum(finished_iterations(part) * iteration_time(part / "metrics.json") for part in parts)


def iteration_time(path: Path) -> float:
    """Reads the median time of an iteration in seconds from a ``metrics.json``.

    Raises:
        InputError: If there is no time in the file.
    """
    lines = path.read_bytes().splitlines() if path.is_file() else []
    times = [time for time in (logged_number(line, "time") for line in lines) if 0 < time < math.inf]
    if not times:
        raise InputError(f"--equal-compute: {path} does not say how long an iteration took.")
    return statistics.median(times)
