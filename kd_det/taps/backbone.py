"""The tap that every detector with a backbone has."""

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager

from detectron2.layers import ShapeSpec
from torch import Tensor, nn

from kd_det.errors import InputError
from kd_det.signals import Signals


class BackboneTap:
    """Reads the signals of one model; this class knows its backbone, subclasses know more.

    A tap *records* what a model computes while its own ``forward`` runs, or *computes* the same signals without the
    rest of that forward. Both go through the same hooks, so a signal has one definition. Outside of the ``with`` block
    of :meth:`record` nothing is attached to the model.

    Args:
        model: A model with a ``backbone``: Tensor to dict of feature maps, with ``output_shape()``.
    """

    def __init__(self, model: nn.Module):
        self.model = model

    def spec(self) -> dict[str, ShapeSpec]:
        """Name to shape of every signal that the model can give."""
        spec = {}
        bottom_up = getattr(self.model.backbone, "bottom_up", None)
        if bottom_up is not None:
            spec.update(bottom_up.output_shape())
        spec.update(self.model.backbone.output_shape())
        return spec

    @contextmanager
    def record(self, names: Collection[str]) -> Iterator[Signals]:
        """Record signals while the model runs.

        Args:
            names: The signals to record.

        Yields:
            A dict that the model's forward fills.
        """
        signals: Signals = {}
        with ExitStack() as stack:
            self._attach(stack, signals, set(names))
            yield signals

    def compute(self, batched_inputs: list[dict], names: Collection[str], student: Signals) -> Signals:
        """Compute signals and nothing else.

        Args:
            batched_inputs: As the data loader gives them.
            names: The signals to compute.
            student: The student's signals, whose boxes ROI signals are computed on.
        """
        with self.record(names) as signals:
            images = self.model.preprocess_image(batched_inputs)
            self._run(self.model.backbone(images.tensor), set(names), student)
        return signals

    def check_alignment(self, teacher: "BackboneTap", names: Collection[str]) -> None:
        """Check that equal places in two models' signals mean the same.

        Args:
            teacher: The tap of the other model.
            names: The signals that are compared.

        Raises:
            InputError: If they do not, for example because the anchors differ.
        """
        maps = [name for name in names if not name.startswith(("roi_", "mask_"))]
        sizes = [tap.model.backbone.size_divisibility for tap in (self, teacher)]
        if maps and sizes[0] != sizes[1]:
            raise InputError(
                f"KD.HEADS: the student pads images to multiples of {sizes[0]} pixels, the teacher of {sizes[1]} "
                f"(backbone.size_divisibility), so {', '.join(sorted(maps))} would not line up."
            )

    def _attach(self, stack: ExitStack, signals: Signals, names: set[str]) -> None:
        """Attach what records the named signals, and let `stack` detach it."""
        for module in (self.model.backbone, getattr(self.model.backbone, "bottom_up", None)):
            wanted = names.intersection(module.output_shape()) if module is not None else ()
            if wanted:
                hook(stack, module, lambda _, output, wanted=wanted: signals.update({k: output[k] for k in wanted}))

    def _run(self, features: dict[str, Tensor], names: set[str], student: Signals) -> None:
        """Run the parts behind the backbone that the named signals need."""


def hook(stack: ExitStack, module: nn.Module, function: Callable[[tuple, object], None]) -> None:
    """Call `function(inputs, output)` after each forward of a module, until `stack` closes."""

    def call(_, inputs, output):
        function(inputs, output)

    stack.callback(module.register_forward_hook(call).remove)


def wrap(stack: ExitStack, owner: nn.Module, method: str, function: Callable[[tuple, object], None]) -> None:
    """Call `function(args, result)` after each call of a bound method, until `stack` closes."""
    shadowed = vars(owner).get(method)
    original = getattr(owner, method)

    def call(*args, **kwargs):
        result = original(*args, **kwargs)
        function(args, result)
        return result

    def restore():
        if shadowed is None:
            delattr(owner, method)
        else:
            setattr(owner, method, shadowed)

    setattr(owner, method, call)
    stack.callback(restore)
