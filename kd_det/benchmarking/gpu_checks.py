"""Checks on a GPU what tests on a CPU cannot see: equal results, streams, float16, determinism, processes, speed."""

import copy
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from detectron2.engine import create_ddp_model
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import Tensor, nn
from torch.multiprocessing import start_processes
from tqdm import tqdm

from kd_det.benchmarking.case import Case, build_networks, row_config
from kd_det.benchmarking.cost_table import markdown
from kd_det.benchmarking.gpu_use import Use, count_waits, measure_use
from kd_det.benchmarking.measurement import kept_memory
from kd_det.benchmarking.rows import Row, Setup, mixed_precision
from kd_det.engine.determinism import make_deterministic
from kd_det.engine.ema import build_ema
from kd_det.errors import InputError
from kd_det.registry import KD_HEAD_REGISTRY
from kd_det.signals import Batch, Signals

# Largest relative difference that the order of additions may cause, in a head's losses and gradients.
ROUNDING = 1e-3
# The same for losses after a few steps, in which differences grow.
DRIFT = 1e-2
# Groups of heads that together try most of what heads do.
GROUPS = (
    ("ReviewKDHead",),
    ("AttentionTransferHead", "HintHead"),
    ("SoftTargetHead", "BornAgainHead"),
    ("OverhaulHead",),
    ("SoftmaxRegressionHead",),
    ("FactorTransferHead", "InheritExploreHead"),
)
BOTH = ("ReviewKDHead", "SoftTargetHead")


@dataclass(frozen=True)
class Scale:
    """Holds the sizes of the checks.

    Attributes:
        device: Where they run.
        depths: Depths of the ResNets of student and teacher.
        size: Side of the images in pixels where results are compared.
        speed_size: The same where time and memory are measured.
        batches: Numbers of images per step for which time is measured.
        steps: Number of steps of a short training.
        rounds: Number of measurements of a time.
    """

    device: str
    depths: tuple[int, int]
    size: int
    speed_size: int
    batches: tuple[int, ...]
    steps: int
    rounds: int


ON_GPU = Scale("cuda", (18, 101), size=320, speed_size=800, batches=(2, 8), steps=12, rounds=7)
REHEARSAL = Scale("cpu", (18, 18), size=64, speed_size=64, batches=(1,), steps=1, rounds=1)


@dataclass(frozen=True)
class Finding:
    """Holds what a check has found.

    Attributes:
        text: What it was.
        good: Whether this is as it should be; None if the check only measures.
    """

    text: str
    good: bool | None = None


def run_checks(names: Sequence[str], scale: Scale, seconds: float) -> tuple[str, bool]:
    """Runs checks one after the other; an error in one does not end the others.

    Args:
        names: Keys of CHECKS.
        scale: The sizes.
        seconds: Time after which no further check begins.

    Returns:
        A table for an issue, and whether nothing was wrong.
    """
    start, rows, fine = time.monotonic(), [], True
    for name in tqdm(names, unit="check", disable=None):
        begin = time.monotonic()
        if begin - start > seconds:
            rows.append([name, "not run", "the time was up", ""])
            continue
        try:
            findings = CHECKS[name](scale)
        except Exception as error:  # A defect in what is checked, whatever it is, is a finding.
            traceback.print_exc()
            findings = [Finding(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", good=False)]
        took = f"{time.monotonic() - begin:.0f}"
        for finding in findings:
            rows.append([name, {None: "measured", True: "ok", False: "WRONG"}[finding.good], finding.text, took])
            fine &= finding.good is not False
            took = ""
    return markdown(rows, ["check", "result", "finding", "seconds"]) + f"\n\n{describe_machine(scale)}", fine


def describe_machine(scale: Scale) -> str:
    """Describes where the checks ran, and with what."""
    versions = f"PyTorch {torch.__version__}, Python {sys.version.split()[0]}"
    if scale.device != "cuda":
        return f"Rehearsal on a CPU, {versions}: no GPU was used."
    properties = torch.cuda.get_device_properties(0)
    memory = f"{properties.total_memory / 2**30:.0f} GiB"
    return f"{properties.name}, {memory}, CUDA {torch.version.cuda}, {versions}."


def make_case(
    scale: Scale,
    heads: Sequence[str],
    options: Mapping[str, object] | None = None,
    *,
    batch: int = 2,
    size: int = 0,
) -> Case:
    """Builds networks and heads; the same arguments always give the same weights."""
    setup = Setup(depths=scale.depths, batch=batch, size=size or scale.size, rounds=1)
    row = Row("", tuple(heads), {"MODEL.DEVICE": scale.device} | dict(options or {}))
    with EventStorage():
        return Case(row, setup, *build_networks(row_config(row, setup), setup))


def train(case: Case, steps: int, model: nn.Module | None = None) -> dict[str, float]:
    """Trains the distilled student for a few steps; returns the last losses."""
    model = model or case.distilled
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-4, momentum=0.9)
    losses: dict[str, Tensor] = {}
    for i in range(steps):
        torch.manual_seed(i)
        with EventStorage(i):
            losses = model(case.batch)
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
    return {key: float(loss) for key, loss in losses.items()}


# ---- Results ----
def check_heads(scale: Scale) -> list[Finding]:
    """Compares the losses and gradients of every head on the GPU with those on the CPU, in float32 without TF32."""
    setup = Setup(depths=scale.depths, batch=2, size=scale.size, rounds=1)
    networks = build_networks(row_config(Row("", BOTH, {"MODEL.DEVICE": "cpu"}), setup), setup)
    worst, compared, far = 0.0, 0, []
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        for name in [name for name, head in KD_HEAD_REGISTRY if head.__module__.startswith("kd_det.")]:
            try:
                with EventStorage():
                    case = Case(Row("", (name,), {"MODEL.DEVICE": "cpu"}), setup, *networks)
            except InputError:  # The head is for other networks.
                continue
            if not case.names:  # Its work ends with the stage before the run.
                continue
            assert case.teacher is not None
            head, teacher = case.distilled.heads[name], case.teacher(case.batch, case.names, case.signals)
            results = [run_head(head, case.signals, teacher, case.batch, x) for x in ("cpu", scale.device)]
            found = difference(*results)
            compared, worst = compared + 1, max(worst, found)
            if found > ROUNDING:
                far.append(f"{name} {found:.1e}")
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
    text = f"{compared} heads like on the CPU: largest relative difference {worst:.1e}"
    return [Finding(text + (f"; too far: {', '.join(far)}" if far else ""), good=not far and compared > 0)]


def run_head(head: nn.Module, student: Signals, teacher: Signals, batch: list[dict], device: str) -> list[Tensor]:
    """Returns a head's losses, and its gradients for the student's signals, as computed on a device."""
    head = copy.deepcopy(head).to(device)
    sides = [{key: x.detach().to(device) for key, x in side.items()} for side in (student, teacher)]
    inputs = [x.requires_grad_() for x in sides[0].values() if x.is_floating_point()]
    with EventStorage():
        losses = list(head(*sides, Batch.from_inputs(batch)).values())
    gradients = torch.autograd.grad(torch.stack(losses).sum(), inputs, allow_unused=True)
    return [x.detach().cpu() for x in (*losses, *(x for x in gradients if x is not None))]


def difference(expected: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """Returns the largest distance of a tensor from the expected one, in relation to the length of the latter."""
    return max(float((a - b).norm() / a.norm().clamp(min=1e-6)) for a, b in zip(expected, found, strict=True))


def check_streams(scale: Scale) -> list[Finding]:
    """Compares a training whose teacher has its own stream with one whose teacher has none."""
    with deterministic(cudnn_only=True):
        alone, aside = (
            train(make_case(scale, (*BOTH, "HintHead"), {"KD.TEACHER.SIDE_STREAM": value}), scale.steps)
            for value in (False, True)
        )
    worst = max(abs(aside[key] - loss) / (abs(loss) + 1e-9) for key, loss in alone.items())
    text = f"losses after {scale.steps} steps with and without SIDE_STREAM: largest relative difference {worst:.1e}"
    return [Finding(text, good=worst < DRIFT)]


def check_races(scale: Scale) -> list[Finding]:
    """Runs :func:`check_streams` once more under PyTorch's sanitizer, which finds streams that do not wait."""
    command = [sys.executable, "-m", "kd_det", "gpu-check", "--only", "streams"]
    command += [] if scale.device == "cuda" else ["--rehearse"]
    environment = os.environ | {"TORCH_CUDA_SANITIZER": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    races = done.stderr.count("CSAN detected")
    ended = "" if done.returncode == 0 else f"; it ended with {done.returncode}: {done.stderr[-200:]!r}"
    return [Finding(f"PyTorch's CUDA sanitizer: {races} races{ended}", good=races == 0 and done.returncode == 0)]


def check_float16(scale: Scale) -> list[Finding]:
    """Trains groups of heads in float16; their losses and scaled gradients must stay finite."""
    findings = []
    for heads in GROUPS:
        case = make_case(scale, heads, mixed_precision("float16"))
        with EventStorage():
            for _ in range(scale.steps):
                case.distilled_step()  # A loss that is not finite raises.
        scaling = case.scaler.get_scale()
        # The scale begins at 65536 and is halved in each step whose gradients overflow.
        findings.append(Finding(f"{', '.join(heads)}: gradients scaled by {scaling:.0f}", good=scaling > 65536 / 2**6))
    return findings


def check_determinism(scale: Scale) -> list[Finding]:
    """Compares two equal trainings bit for bit, with ``KD.DETERMINISTIC`` and without."""
    findings = []
    for asked in (False, True):
        with deterministic() if asked else restoring_flags():
            states = []
            for _ in range(2):
                case = make_case(scale, (*BOTH, "FactorTransferHead"))
                train(case, min(scale.steps, 3))
                states.append({key: x.cpu() for key, x in case.distilled.state_dict().items()})
        differing = sum(not torch.equal(x, states[1][key]) for key, x in states[0].items())
        text = f"KD.DETERMINISTIC {asked}: {differing} of {len(states[0])} tensors differ between two equal runs"
        findings.append(Finding(text, good=differing == 0 if asked else None))
    return findings


@contextmanager
def restoring_flags() -> Iterator[None]:
    """Restores PyTorch's switches of determinism after the block."""
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.deterministic = before[1]


@contextmanager
def deterministic(*, cudnn_only: bool = False) -> Iterator[None]:
    """Makes the block deterministic, or only the choice of convolution algorithms in it."""
    with restoring_flags():
        if cudnn_only:
            torch.backends.cudnn.deterministic = True
        else:
            cfg = row_config(Row("", (), {"KD.DETERMINISTIC": True}), Setup((18, 18), batch=1, size=64, rounds=1))
            make_deterministic(cfg)
        yield


def check_processes(scale: Scale) -> list[Finding]:
    """Trains with two processes, by gloo on one GPU; their weights must stay equal, also where a head is idle."""
    with tempfile.TemporaryDirectory() as folder:
        start_processes(train_rank, args=(folder, scale), nprocs=2)
        sums = [Path(folder, str(rank)).read_text(encoding="utf-8") for rank in range(2)]
    return [Finding(f"weights of two processes are equal: {sums[0] == sums[1]}", good=sums[0] == sums[1])]


def train_rank(rank: int, folder: str, scale: Scale) -> None:
    """Trains as one of two processes, and writes down the sum of the weights."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    comm.create_local_process_group(2)
    case = make_case(scale, (*BOTH, "HintHead"))
    case.distilled.schedules = {"HintHead": lambda i: float(i > 0)}
    options = {"device_ids": None, "gradient_as_bucket_view": True}
    model = create_ddp_model(case.distilled, broadcast_buffers=False, **options)
    case.batch[0]["image"] = case.batch[0]["image"] // (rank + 1)  # Each process has its own images.
    train(case, max(scale.steps // 4, 2), model)
    total = sum(float(p.detach().double().sum()) for p in model.parameters())
    Path(folder, str(rank)).write_text(repr(total), encoding="utf-8")
    torch.distributed.destroy_process_group()


# ---- Cost ----
def check_waits(scale: Scale) -> list[Finding]:
    """Counts the waits of the host that heads add to a step."""
    plain: int | None = None
    texts = []
    for heads in ((), *GROUPS):
        case = make_case(scale, heads)
        with EventStorage():
            case.distilled_step()
            waits = count_waits(case.distilled_step)
        plain = waits if plain is None else plain
        texts.append(f"{', '.join(heads) or 'plain step'}: {waits}" + (f" ({waits - plain:+d})" if heads else ""))
    return [Finding("waits of the host per step: " + "; ".join(texts))]


def check_speed(scale: Scale) -> list[Finding]:
    """Measures the plain step, the teacher and the distillation step in bfloat16, and what switches gain."""
    findings = []
    for batch in scale.batches:
        size = scale.speed_size
        case = make_case(scale, BOTH, mixed_precision("bfloat16"), batch=batch, size=size)
        plain, teacher, distilled = (use_of(part, scale) for part in case.parts)
        images = f"{batch} images of {size}, bfloat16"
        findings.append(Finding(f"{images}, plain step: {show(plain)}"))
        findings.append(Finding(f"{images}, teacher: {show(teacher)}"))
        ratio = distilled.wall / plain.wall
        findings.append(Finding(f"{images}, {' + '.join(BOTH)}: {show(distilled)}; {ratio:.2f} plain steps"))
        for head in BOTH:
            one = use_of(make_case(scale, (head,), mixed_precision("bfloat16"), batch=batch, size=size).parts[2], scale)
            findings.append(Finding(f"{images}, {head}: {show(one)}; {one.wall / plain.wall:.2f} plain steps"))
        for switch, value in (
            ("KD.TEACHER.SIDE_STREAM", False),
            ("KD.TEACHER.DTYPE", "float32"),
            ("KD.TEACHER.FOLD_NORM", True),
            ("KD.TEACHER.CHANNELS_LAST", True),
        ):
            options = mixed_precision("bfloat16") | {switch: value}
            other = use_of(make_case(scale, BOTH, options, batch=batch, size=size).parts[2], scale)
            findings.append(Finding(f"{images}, {switch} {value}: {show(other)}; {other.wall / plain.wall:.2f} plain"))
    return findings


def use_of(part: Callable[[], None], scale: Scale) -> Use:
    with EventStorage():
        return measure_use(part, rounds=scale.rounds, warm_up=3 if scale.device == "cuda" else 0)


def show(use: Use) -> str:
    """Formats a measurement."""
    if use.busy is None or use.idle is None:
        return f"{use.wall:.1f} ms"
    waits = f"{use.kernels:.0f} kernels, {use.waits} waits"
    return f"{use.wall:.1f} ms, GPU {use.busy:.1f} ms, idle {use.idle:.0%}, {waits}"


def check_memory(scale: Scale) -> list[Finding]:
    """Measures what each head keeps until the backward pass, and the peak of a step."""
    texts = []
    for head in [name for group in GROUPS for name in group]:
        case = make_case(scale, (head,), mixed_precision("bfloat16"), size=scale.speed_size)
        with EventStorage():
            text = f"{head} {kept_memory(case):.0f} MB"
            if scale.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
                case.distilled_step()
                text += f" (peak {torch.cuda.max_memory_allocated() / 2**20:.0f})"
        texts.append(text)
    return [Finding("kept until backward, 2 images: " + ", ".join(texts))]


def check_average(scale: Scale) -> list[Finding]:
    """Measures an update of ``SOLVER.EMA_DECAY``, which must not wait for the GPU."""
    case = make_case(scale, (), {"SOLVER.EMA_DECAY": 0.999, "MODEL.RESNETS.NORM": "BN"})
    average = build_ema(case.cfg, case.student)
    assert average is not None
    average.update_parameters(case.student)
    use = measure_use(lambda: average.update_parameters(case.student), rounds=scale.rounds, warm_up=1)
    return [Finding(f"one update: {show(use)}", good=not use.waits)]


def check_compilation(scale: Scale) -> list[Finding]:
    """Measures how long the first step takes with compiled parts, and the later ones."""
    findings = []
    for switch, heads in (("KD.TEACHER.COMPILE", BOTH), ("KD.COMPILE_HEADS", ("ReviewKDHead", "HintHead"))):
        case = make_case(scale, heads, mixed_precision("bfloat16") | {switch: True})
        with EventStorage():
            begin = time.monotonic()
            case.distilled_step()
            first = time.monotonic() - begin
        later = use_of(case.distilled_step, scale)
        findings.append(Finding(f"{switch}: first step {first:.0f} s, later {later.wall:.1f} ms"))
    return findings


# The most telling checks come first: the last ones are left out if the time is up.
CHECKS: dict[str, Callable[[Scale], list[Finding]]] = {
    "heads": check_heads,
    "waits": check_waits,
    "streams": check_streams,
    "speed": check_speed,
    "float16": check_float16,
    "memory": check_memory,
    "determinism": check_determinism,
    "races": check_races,
    "average": check_average,
    "processes": check_processes,
    "compilation": check_compilation,
}
