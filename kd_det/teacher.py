"""Builds and runs the teacher: a frozen model that no optimizer, checkpoint or DDP bucket contains."""

import hashlib
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from torch import Tensor, nn

from kd_det.alignment import Alignment, View
from kd_det.class_partition import ClassPartition
from kd_det.config import is_flipped
from kd_det.errors import InputError
from kd_det.signals import BOX_SIGNALS, Signals, flipped
from kd_det.taps import BackboneTap, build_tap, padding_of
from kd_det.teacher_kinds import teacher_kind
from kd_det.teacher_weights import check_foldable, fold_norms, store_weights

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Teacher:
    """Computes signals of a frozen model through its tap.

    It is not an ``nn.Module``: a module that holds it excludes it from its parameters, its state_dict and its
    ``train()``. Before its first forward pass the weights are stored in the precision of that pass.

    Args:
        model: The trained model. It is frozen and put into evaluation mode.
        flip_channels: Whether the images come in the opposite channel order (RGB instead of BGR, or the reverse).
        student_std: Pixel standard deviations of the network whose input gradients are compared with the teacher's, in
            the order of that network's channels; None if they are those of the model.
        dtype: Precision of the forward pass.
        batch_statistics: Whether its batch norms use the statistics of the batch instead of the stored ones, which do
            not change.
        channels_last: Whether its convolution weights are stored with the channels last.
        compiled: Whether its backbone is compiled, without the FPN on top of it.
        side_stream: Whether :meth:`start` computes on a separate CUDA stream; this has no effect without a GPU.
        fold_norm: Whether batch norms are folded into the convolutions before them, up to rounding.
        source: Origin of the model, for messages.
        cfg: Its plain config, which describes its images and its data sets; None if nothing does.
        weights: Origin of its weights.
        features: Maps names of the student's feature maps to those of the model's that stand for them.
        scale: Factor by which the images are enlarged for the model.

    Attributes:
        classes: Division of its classes from its student's; None if they are the same.

    Raises:
        InputError: If batch norms are to use the statistics of the batch, but the model has none, or only frozen ones;
            or if they are to be folded, but the model has none that can be.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        flip_channels: bool = False,
        student_std: Sequence[float] | None = None,
        dtype: torch.dtype = torch.float32,
        batch_statistics: bool = False,
        channels_last: bool = False,
        compiled: bool = False,
        side_stream: bool = False,
        fold_norm: bool = False,
        source: str = "a model without a file",
        cfg: CfgNode | None = None,
        weights: str = "",
        features: Mapping[str, str] | None = None,
        scale: float = 1.0,
    ):
        self.source = source
        self.cfg = cfg
        self.weights = weights
        self.model = model.eval().requires_grad_(False)
        self.tap = build_tap(model)
        # Until a student is known, the teacher is aligned with a twin of itself.
        self.alignment = Alignment(self.tap, self.tap, scale=scale)
        self.features = dict(features or {})
        self.classes: ClassPartition | None = None
        self.flip_channels = flip_channels
        self.student_std = student_std
        self.dtype = dtype
        self.compiled = compiled
        self.side_stream = side_stream
        self.stream: torch.cuda.Stream | None = None
        self.fold_norm = fold_norm
        # Whether a head reads weights of the layers after the backbone.
        self.gives_weights = False
        self._prepared = False
        self._logged_memory = False
        self._fingerprint = ""
        if batch_statistics:
            use_batch_statistics(model)
        if fold_norm:
            check_foldable(model)
        if channels_last:
            model.to(memory_format=torch.channels_last)
        if compiled:
            # Only the method is compiled: the hooks on the module, which the tap sets at each step, stay outside.
            network = self.tap.bottom_up
            network.forward = torch.compile(network.forward, dynamic=True)

    @property
    def device(self) -> torch.device:
        return self.tap.device

    def fingerprint(self) -> str:
        """Computes a hash of the weights that the model was given."""
        if not self._fingerprint:
            digest = hashlib.sha256()
            for key, value in self.model.state_dict().items():
                digest.update(key.encode())
                digest.update(value.detach().cpu().contiguous().numpy().tobytes())
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def to(self, device: torch.device) -> "Teacher":
        """Moves the model to a device, unless it is already there."""
        if self.device != device:
            self.model.to(device)
        return self

    def align_with(self, student: BackboneTap) -> None:
        """Gives signals with the level names and on the boxes and grids of a student from now on.

        Args:
            student: The student's tap.

        Raises:
            InputError: If ``features`` names a feature map that a network does not have.
        """
        features = self.tap.stand_ins(student) | self.features
        self.alignment = Alignment(student, self.tap, features=features, scale=self.alignment.scale)
        self.alignment.check_features()

    def spec(self) -> dict[str, ShapeSpec]:
        """Maps the name of every signal that the teacher gives to its shape."""
        return self.alignment.spec()

    @property
    def sees_given_images(self) -> bool:
        """Returns whether the model gets the images of the batch, neither flipped nor enlarged."""
        return not self.flip_channels and self.alignment.scale == 1

    def check(self, names: Collection[str]) -> None:
        """Checks that the teacher can compute the named signals, all of which its model has.

        Raises:
            InputError: If one of them comes from inside the compiled backbone, or cannot be aligned with the student's.
        """
        self.alignment.check(names)
        inside = sorted(name for name in names if name.endswith("_preact") and not name.startswith(BOX_SIGNALS))
        if self.compiled and inside:
            raise InputError(
                f"KD.TEACHER.COMPILE: must be False for heads that read {', '.join(inside)}, which a compiled backbone "
                "does not give."
            )
        norms = sorted(name for name in names if "_norm_" in name)
        if self.fold_norm and norms:
            raise InputError(
                f"KD.TEACHER.FOLD_NORM: must be False for heads that read {', '.join(norms)}, which are gone once the "
                "batch norms are folded."
            )
        self.gives_weights = any(name.endswith(("_weight", "_bias")) for name in set(names).difference(norms))

    def prepare(self) -> None:
        """Folds batch norms and stores weights in the precision of the forward pass, once, as far as asked for.

        The first forward pass does this, on whose device the weights are by then. Earlier the weights are as they were
        given, for :meth:`fingerprint` and ``KD.INHERIT``.
        """
        if self._prepared:
            return
        self._prepared = True
        halves = self.dtype != torch.float32
        if halves or self.fold_norm:
            self.fingerprint()
        if self.fold_norm:
            count = fold_norms(self.model)
            logging.getLogger(__name__).info("KD.TEACHER.FOLD_NORM: folded %d batch norms of the teacher.", count)
        if halves:
            # Heads that read the weights of a layer get all their digits.
            store_weights(self.tap.backbone if self.gives_weights else self.model, self.dtype)

    @torch.no_grad()
    def __call__(self, batched_inputs: list[dict], names: Collection[str], student: Signals) -> Signals:
        """Computes the named signals on the student's batch.

        Args:
            batched_inputs: The batch that the data loader gives to the student.
            names: The signals that some head asked for; parts of the model that none of them needs do not run.
            student: The student's signals; ROI signals are computed on their boxes.
        """
        self.prepare()
        view = self.alignment.view(batched_inputs, names)
        own_names = {self.alignment.own_name(name) for name in names}
        signals = self._compute(view, own_names, self.alignment.scaled_boxes(student, view))
        return self.alignment.aligned(signals, names, view)

    def _compute(self, view: View, names: set[str], student: Signals) -> Signals:
        """Computes signals by the teacher's own names, on its own grids."""
        inputs = flipped(view.inputs) if self.flip_channels else view.inputs
        self.tap.extent = view.own_extent
        try:
            with self.autocast():
                signals = self.tap.compute(inputs, names, student)
        finally:
            self.tap.extent = None
        if "input_gradient" in signals:
            signals["input_gradient"] = self._by_student_input(signals["input_gradient"])
        return {name: signal.detach() for name, signal in signals.items()}

    @torch.no_grad()
    def start(self, batched_inputs: list[dict], names: Collection[str]) -> "Started":
        """Computes the signals that need no boxes, before the student runs; :meth:`finish` computes the others.

        With a side stream, only :meth:`finish` may read the result.

        Args:
            batched_inputs: The batch that the data loader gives to the student.
            names: The signals that some head asked for.
        """
        self.prepare()  # This happens on the current stream, which may reuse the memory of the weights as they were.
        early = {self.alignment.own_name(name) for name in names if not name.startswith(BOX_SIGNALS)}
        if any(name.startswith(BOX_SIGNALS) for name in names):
            early.update(self.tap.features)
        view = self.alignment.view(batched_inputs, names)
        with self._aside():
            return Started(self._compute(view, early, {}), view)

    @torch.no_grad()
    def finish(self, started: "Started", names: Collection[str], student: Signals) -> Signals:
        """Computes the signals of boxes.

        Args:
            started: The result of :meth:`start` for these names.
            names: The signals that some head asked for.
            student: The student's signals, on whose boxes they are computed.

        Returns:
            The signals that :meth:`__call__` would return.
        """
        if self.stream is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self.stream)
            for signal in started.values():
                signal.record_stream(current)
            self._log_stream_memory()
        late = {name for name in names if name.startswith(BOX_SIGNALS)}
        signals: Signals = started
        if late:
            with self.autocast():
                recomputed = self.tap.recompute(started, late, self.alignment.scaled_boxes(student, started.view))
            signals = started | {name: signal.detach() for name, signal in recomputed.items()}
        return self.alignment.aligned(signals, names, started.view)

    def _by_student_input(self, gradient: Tensor) -> Tensor:
        """Converts a gradient, by the chain rule, to the student's normalisation of the image (N, C, H, W)."""
        std = self.model.get_buffer("pixel_std")
        if self.flip_channels:
            gradient, std = gradient.flip(1), std.flip(0)
        if self.student_std is None:
            return gradient
        return gradient * (torch.tensor(self.student_std).view(-1, 1, 1).to(std) / std)

    def autocast(self) -> AbstractContextManager:
        """Runs the model inside the block in the teacher's precision."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """Runs the body on the side stream, after everything that the current stream has queued so far."""
        if not self.side_stream or self.device.type != "cuda":
            yield
            return
        if self.stream is None:
            self.stream = torch.cuda.Stream(self.device)
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            yield

    def _log_stream_memory(self) -> None:
        """Logs, after the first step, how much memory the side stream holds, which the main stream cannot use."""
        if self._logged_memory or self.stream is None:
            return
        self._logged_memory = True
        segments = [x for x in torch.cuda.memory_snapshot() if x["stream"] == self.stream.cuda_stream]
        logging.getLogger(__name__).info(
            "The teacher runs on its own CUDA stream, which holds %d MB of GPU memory for itself; "
            "KD.TEACHER.SIDE_STREAM False saves most of it and may be slower.",
            sum(segment["total_size"] for segment in segments) // 2**20,
        )


class Started(Signals):
    """Holds the signals that need no boxes, by the teacher's own names and on its own grids, and its view of the batch.

    Args:
        signals: The signals.
        view: The view.
    """

    def __init__(self, signals: Signals, view: View):
        super().__init__(signals)
        self.view = view


def use_batch_statistics(model: nn.Module) -> None:
    """Makes the batch norms of a model in evaluation mode use the statistics of the batch without storing them."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        raise InputError("KD.TEACHER.BATCH_NORM: is 'train', but the teacher has no batch norm, or frozen ones only.")
    for norm in norms:
        norm.training, norm.track_running_stats = True, False


def build_teacher(cfg: CfgNode, *, trained: bool = True) -> Teacher:
    """Builds the teacher that ``KD.TEACHER`` names and loads its weights strictly.

    Args:
        cfg: The student's config.
        trained: Whether to load weights; without them it is of use for measurements of time only.

    Raises:
        InputError: If the config or the weights do not exist or do not fit each other.
    """
    options, kind = teacher_options(cfg), teacher_kind(cfg)
    teacher_cfg = kind.description
    weights = kind.weights if trained else kind.untrained_weights
    model = kind.build(trained=trained)
    flip_channels = is_flipped(cfg, teacher_cfg, ("the student", "the teacher"))
    check_square(cfg, model)
    if trained:
        kind.load(model)
    logging.getLogger(__name__).info("Teacher: %s, weights %s", kind.name, weights)
    return Teacher(
        model,
        flip_channels=flip_channels,
        student_std=cfg.MODEL.PIXEL_STD,
        source=f"{kind.name} with {weights}",
        cfg=teacher_cfg,
        weights=weights,
        **options,
    )


def check_square(cfg: CfgNode, model: nn.Module) -> None:
    """Checks that the largest image fits into the square to which a teacher such as ViTDet pads its images.

    These are the images of the training and, if pictures are drawn, of the test.

    Args:
        cfg: The student's config.
        model: The teacher.

    Raises:
        InputError: If it does not.
    """
    square, scale = padding_of(getattr(model, "backbone", model))[1], cfg.KD.TEACHER.SCALE
    factors = {"MAX_SIZE_TRAIN": scale} | ({"MAX_SIZE_TEST": 1.0} if cfg.VIS_PERIOD else {})
    for key, factor in factors.items():
        if square and cfg.INPUT[key] * factor > square:
            raise InputError(
                f"INPUT.{key}: must be at most {int(square / factor)} for a teacher that pads its images to squares of "
                f"{square} pixels, got {cfg.INPUT[key]}."
            )


def teacher_options(cfg: CfgNode) -> dict:
    """Collects the arguments of :class:`Teacher` that ``KD.TEACHER`` holds, such as its precision.

    Raises:
        InputError: If KD.TEACHER.DTYPE or KD.TEACHER.BATCH_NORM is unknown, or a switch excludes another.
    """
    node, on_gpu = cfg.KD.TEACHER, torch.device(cfg.MODEL.DEVICE).type == "cuda"
    if node.BATCH_NORM not in ("eval", "train"):
        raise InputError(f"KD.TEACHER.BATCH_NORM: got {node.BATCH_NORM!r}; allowed are eval, train.")
    if node.DTYPE not in (*DTYPES, "auto"):
        raise InputError(
            f"KD.TEACHER.DTYPE: got {node.DTYPE!r}; allowed are {', '.join(DTYPES)}. auto is that of SOLVER.AMP."
        )
    if node.FOLD_NORM and node.BATCH_NORM == "train":
        raise InputError("KD.TEACHER.FOLD_NORM: must be False where KD.TEACHER.BATCH_NORM is 'train', got True.")
    if node.SIDE_STREAM is True and not on_gpu:
        logging.getLogger(__name__).warning("KD.TEACHER.SIDE_STREAM: has no effect on %s.", cfg.MODEL.DEVICE)
    return {
        "dtype": teacher_dtype(cfg),
        "batch_statistics": node.BATCH_NORM == "train",
        "channels_last": node.CHANNELS_LAST,
        "compiled": node.COMPILE,
        "side_stream": on_gpu if node.SIDE_STREAM in (None, "auto") else node.SIDE_STREAM,
        "fold_norm": node.FOLD_NORM,
        "features": dict(node.FEATURES or {}),
        "scale": node.SCALE,
    }


def teacher_dtype(cfg: CfgNode) -> torch.dtype:
    """Returns the precision of the teacher's forward pass, which by default is that of the run.

    Raises:
        InputError: If the run's precision is unknown.
    """
    name, amp = cfg.KD.TEACHER.DTYPE, cfg.SOLVER.AMP
    if name == "auto":
        name = amp.DTYPE if amp.ENABLED else "float32"
    if name not in DTYPES:
        raise InputError(f"SOLVER.AMP.DTYPE: got {name!r}; allowed are float16, bfloat16.")
    return DTYPES[name]


def load_teacher_config(cfg: CfgNode) -> tuple[CfgNode, str]:
    """Loads the teacher's own config, set to the student's device, and the path of its weights."""
    kind = teacher_kind(cfg)
    return kind.description, kind.weights
