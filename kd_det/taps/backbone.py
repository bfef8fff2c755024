"""Implements the tap that serves every model with a backbone, and the hooks that taps use."""

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import chain
from typing import Any, cast

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import Backbone, ResNet, build_backbone
from detectron2.modeling.backbone.resnet import BasicBlock, BottleneckBlock
from detectron2.structures import ImageList
from torch import Tensor, nn

from kd_det.errors import InputError
from kd_det.signals import BOX_SIGNALS, Signals
from kd_det.taps.preprocessing import ImageModel, padded_size, padding_of
from kd_det.taps.replacement import find_producer, replace_output


class BackboneTap:
    """Reads the signals of one model; this class covers the backbone, and subclasses cover the parts after it.

    A tap *records* what a model computes while its own ``forward`` runs, or *computes* the same signals without the
    rest of that forward. Both go through the same hooks, so a signal has one definition. Outside the ``with`` block of
    :meth:`record` nothing is attached to the model.

    A tap for another meta-architecture is registered in :data:`kd_det.TAP_REGISTRY` and extends four methods:
    :meth:`spec` names its signals, :meth:`attach` hooks the modules that compute them, :meth:`run` runs the parts after
    the backbone that they need, and :meth:`head_defaults` names the predictions that heads can compare.

    Args:
        model: A model with a ``backbone`` that maps a tensor to a dict of feature maps and has ``output_shape()``.

    Attributes:
        box_features: Features of boxes that the model has in addition to the maps of its backbone.

    Example:
        >>> from detectron2.modeling.backbone import BasicStem
        >>> model = nn.Module()
        >>> model.backbone = ResNet(BasicStem(), ResNet.make_default_stages(18), out_features=["res5"])
        >>> with BackboneTap(model).record(["res5", "res5_preact"]) as signals:
        ...     _ = model.backbone(torch.zeros(1, 3, 64, 64))
        >>> {name: tuple(x.shape) for name, x in sorted(signals.items())}
        {'res5': (1, 512, 2, 2), 'res5_preact': (1, 512, 2, 2)}
    """

    box_features: tuple[str, ...] = ()
    # Height and width, in pixels of the model's input, that a batch is padded to at least and that the predictions for
    # anchors are cut to; None neither pads nor cuts.
    extent: tuple[int, int] | None = None

    def __init__(self, model: nn.Module):
        self.model = model

    @classmethod
    def feature_levels(cls, cfg: CfgNode) -> list[str]:
        """Names the maps that a model of this config predicts from: by default all outputs of its backbone."""
        with torch.device("meta"):  # Only the shapes are needed.
            return list(build_backbone(cfg).output_shape())

    @classmethod
    def head_defaults(cls, cfg: CfgNode) -> dict[str, Any]:
        """Maps keys of heads, such as SOURCES, to values that replace their defaults, which suit an R-CNN."""
        return {}

    def spec(self) -> dict[str, ShapeSpec]:
        """Maps the name of every signal that the model can give to its shape."""
        spec = {}
        for module in self._backbones:
            shapes = module.output_shape()
            spec.update(shapes)
            for name, source in preactivations(module).items():
                if name in shapes:
                    spec[f"{name}_preact"] = shapes[name]
                    if not is_folded(last_norm(source)):
                        vector = ShapeSpec(channels=shapes[name].channels)
                        spec.update({f"{name}_norm_{key}": vector for key in norm_parameters(source)})
        return spec

    def strides(self) -> dict[str, int]:
        """Maps the name of each signal that is a map of the image to its pixels per cell."""
        return {name: shape.stride for name, shape in self.spec().items() if shape.stride is not None}

    def stand_ins(self, student: "BackboneTap") -> dict[str, str]:
        """Maps feature maps of a student to those of this model that stand for them where the config names none.

        By default only maps of the same name are compared.
        """
        return {}

    @property
    def cut_signals(self) -> Collection[str]:
        """Lists the predictions for anchors whose levels pass through :meth:`cut` before they are flattened."""
        return set()

    def cut(self, level: Tensor, stride: int) -> Tensor:
        """Cuts a map (N, C, H, W) of predictions for anchors to :attr:`extent`."""
        if self.extent is None:
            return level
        height, width = (-(-pixels // stride) for pixels in self.extent)
        return level[..., :height, :width]

    @property
    def device(self) -> torch.device:
        """Returns the device of the model."""
        # A frozen TorchScript module has no parameters.
        return next(chain(self.model.parameters(), self.model.buffers())).device

    @property
    def backbone(self) -> Backbone:
        """Returns the model's backbone."""
        return self.model.get_submodule("backbone")

    @property
    def bottom_up(self) -> Backbone:
        """Returns the network below the FPN, or the whole backbone if it has none."""
        return getattr(self.backbone, "bottom_up", self.backbone)

    def class_layers(self) -> list[nn.Module]:
        """Lists the modules whose weights mean nothing to a model of other classes.

        By default these are all modules outside the backbone that hold weights.
        """
        return [x for x in self.model.children() if x is not self.backbone and x.state_dict()]

    @property
    def _backbones(self) -> list[Backbone]:
        """Lists the bottom-up network, if there is one, and the backbone."""
        return list(dict.fromkeys([self.bottom_up, self.backbone]))

    @contextmanager
    def record(self, names: Collection[str]) -> Iterator[Signals]:
        """Records signals while the model runs.

        Args:
            names: The signals to record.

        Yields:
            A dict that the model's forward fills.
        """
        signals: Signals = {}
        with ExitStack() as stack:
            self.attach(stack, signals, set(names))
            yield signals

    @property
    def replaceable(self) -> list[str]:
        """Lists the signals that :meth:`replace` can change: the maps of the backbone."""
        return [name for module in self._backbones for name, shape in module.output_shape().items() if shape.stride]

    @contextmanager
    def replace(self, name: str, function: Callable[[Tensor], Tensor], batched_inputs: list[dict]) -> Iterator[None]:
        """Replaces a signal by a function of it while the model runs, so that all later layers see the new values.

        Args:
            name: One of :attr:`replaceable`.
            function: Maps the signal of a batch to one of the same shape.
            batched_inputs: A batch that the backbone is run on once, to find the module that computes the signal.

        Raises:
            InputError: If no module of the backbone computes the signal and nothing else.
        """
        network = next(module for module in self._backbones if name in module.output_shape())
        images: ImageList | Tensor = self.preprocess(batched_inputs)
        producer = find_producer(network, images if isinstance(images, Tensor) else images.tensor, name)
        with ExitStack() as stack:
            replace_output(stack, producer, function)
            yield

    def compute(self, batched_inputs: list[dict], names: Collection[str], student: Signals) -> Signals:
        """Computes the named signals and nothing else.

        Args:
            batched_inputs: The batch as the data loader returns it.
            names: The signals to compute.
            student: The student's signals; ROI signals are computed on its boxes.
        """
        with self.record(names) as signals:
            self.forward(batched_inputs, set(names), student)
        return signals

    @property
    def features(self) -> list[str]:
        """Lists the names of the backbone's outputs."""
        return list(self.backbone.output_shape())

    def recompute(self, signals: Signals, names: Collection[str], student: Signals) -> Signals:
        """Computes signals of the parts after the backbone once more, on other boxes.

        Args:
            signals: The model's recorded signals, with at least all of its :attr:`features`.
            names: The signals to compute.
            student: The signals of the model that sampled the boxes.
        """
        with self.record(names) as recomputed:
            self.run({name: signals[name] for name in self.features}, set(names), student)
        return recomputed

    def check_alignment(self, teacher: "BackboneTap", names: Collection[str]) -> None:
        """Checks that the signals of two models correspond element by element.

        Args:
            teacher: The tap of the other model.
            names: The signals that are compared.

        Raises:
            InputError: If they do not, for example because the anchors differ.
        """

    def check_padding(self, teacher: "BackboneTap", names: Collection[str]) -> None:
        """Checks that two models pad a batch to the same size, if one of the named signals depends on it.

        Raises:
            InputError: If they do not.
        """
        maps = [name for name in names if not name.startswith(BOX_SIGNALS)]
        paddings = [padding_of(tap.backbone) for tap in (self, teacher)]
        if maps and paddings[0] != paddings[1]:
            sizes = [tap.backbone.size_divisibility for tap in (self, teacher)]
            squares = (
                f" and squares of {paddings[0][1]} and {paddings[1][1]}" if paddings[0][1] != paddings[1][1] else ""
            )
            raise InputError(
                f"KD.HEADS: the student pads images to multiples of {sizes[0]} pixels, the teacher of {sizes[1]}"
                f"{squares} (backbone.size_divisibility), so {', '.join(sorted(maps))} would not line up."
            )

    def check_replaced(self, head: str, losses: Collection[str]) -> None:
        """Checks that the model has the losses that a head replaces, as far as its class determines them.

        Raises:
            InputError: If it lacks one.
        """

    def attach(self, stack: ExitStack, signals: Signals, names: set[str]) -> None:
        """Attaches the hooks that record the named signals, by :func:`hook` and :func:`wrap`.

        Args:
            stack: Detaches the hooks when it closes.
            signals: The dict that receives the recorded signals by their names.
            names: The signals to record; they may include those of other taps in the class hierarchy.
        """
        for module in self._backbones:
            wanted = names.intersection(module.output_shape())
            if wanted:
                hook(stack, module, partial(store_outputs, signals, wanted))
            for name, source in preactivations(module).items():
                if f"{name}_preact" in names:
                    hook_preactivation(stack, source, partial(signals.__setitem__, f"{name}_preact"))
                vectors = {f"{name}_norm_{key}": x for key, x in norm_parameters(source).items()}
                signals.update({key: x for key, x in vectors.items() if key in names})

    def forward(self, batched_inputs: list[dict], names: set[str], student: Signals) -> None:
        """Runs the model as far as the named signals need it, without its losses and its post-processing.

        Args:
            batched_inputs: The batch as the data loader returns it.
            names: The signals to compute.
            student: The student's signals; ROI signals are computed on its boxes.
        """
        images = self.padded_images(batched_inputs)
        if not self.run_bottom_up(images.tensor, names):
            self.run(self.backbone(images.tensor), names, student)

    def preprocess(self, batched_inputs: list[dict]) -> ImageList:
        """Normalises and pads the images of a batch as the model's own forward does."""
        return cast(ImageModel, self.model).preprocess_image(batched_inputs)

    def padded_images(self, batched_inputs: list[dict]) -> ImageList:
        """Preprocesses a batch, and pads it further if it does not cover :attr:`extent`."""
        images = self.preprocess(batched_inputs)
        if self.extent is None:
            return images
        size = images.tensor.shape[-2:]
        least = padded_size(self.extent, (padding_of(self.backbone)[0], 0))
        missing = [max(wanted - there, 0) for wanted, there in zip(least, size, strict=True)]
        if any(missing):
            images = ImageList(F.pad(images.tensor, (0, missing[1], 0, missing[0])), images.image_sizes)
        return images

    def run_bottom_up(self, images: Tensor, names: set[str]) -> bool:
        """Runs only the bottom-up network if all named signals come from it, and returns whether they do."""
        bottom_up, *above = self._backbones
        stages = tuple(f"{name}_" for name in preactivations(bottom_up))
        alone = all(name in bottom_up.output_shape() or name.startswith(stages) for name in names)
        if above and alone:
            bottom_up(images)
        return bool(above) and alone

    def run(self, features: dict[str, Tensor], names: set[str], student: Signals) -> None:
        """Runs the parts after the backbone that the named signals need; by default there are none.

        Args:
            features: Outputs of the backbone, by their names.
            names: The signals to compute.
            student: The student's signals; ROI signals are computed on its boxes.
        """


def store_outputs(signals: Signals, names: set[str], _: tuple, outputs: dict[str, Tensor]) -> None:
    """Adds a backbone's outputs of the given names to the signals, as a function for :func:`hook`."""
    signals.update({name: outputs[name] for name in names})


def preactivations(backbone: nn.Module) -> dict[str, nn.Module]:
    """Maps each stage to the module that feeds its final ReLU: a residual block, or a module whose output it is.

    In Detectron2's ResNets it is the last block of a stage; other backbones declare their modules in an attribute
    ``preactivations``.
    """
    if isinstance(backbone, ResNet):
        blocks = {name: stage[-1] for name, stage in zip(backbone.stage_names, backbone.stages, strict=True)}
        return {name: block for name, block in blocks.items() if isinstance(block, BasicBlock | BottleneckBlock)}
    return getattr(backbone, "preactivations", {})


def norm_parameters(source: nn.Module) -> dict[str, Tensor]:
    """Returns weight and bias (C,) of the batch norm before the ReLU after a module of :func:`preactivations`."""
    norm = last_norm(source)
    if isinstance(norm, FrozenBatchNorm2d | nn.modules.batchnorm._BatchNorm):
        return {"weight": norm.weight, "bias": norm.bias}
    return {}


def last_norm(source: nn.Module) -> nn.Module:
    """Returns the normalisation at the end of a residual block; any other module is returned itself."""
    if isinstance(source, BasicBlock | BottleneckBlock):
        return (source.conv3 if isinstance(source, BottleneckBlock) else source.conv2).norm
    return source


def is_folded(norm: nn.Module) -> bool:
    """Reports whether the statistics of a frozen batch norm were folded into its weight and bias.

    This is so in Detectron2's converted models.
    """
    if not isinstance(norm, FrozenBatchNorm2d):
        return False
    return not norm.running_mean.any() and torch.allclose(norm.running_var + norm.eps, torch.ones(()).to(norm.weight))


def hook_preactivation(stack: ExitStack, source: nn.Module, function: Callable[[Tensor], object]) -> None:
    """Calls `function(x)` with the input of the ReLU after a module of :func:`preactivations`, until `stack` closes."""
    if not isinstance(source, BasicBlock | BottleneckBlock):
        hook(stack, source, lambda _, output: function(output))
        return
    # The block adds the shortcut to the branch and rectifies the sum, both in place.
    parts: dict[str, Tensor] = {}
    branch = source.conv3 if isinstance(source, BottleneckBlock) else source.conv2
    hook(stack, branch, lambda _, output: parts.update(branch=output.clone()))
    if source.shortcut is not None:
        hook(stack, source.shortcut, lambda _, output: parts.update(shortcut=output))
    hook(stack, source, lambda inputs, _: function(parts.pop("branch") + parts.pop("shortcut", inputs[0])))


def hook(stack: ExitStack, module: nn.Module, function: Callable[[tuple, Any], object]) -> None:
    """Calls `function(inputs, output)` after each forward of a module, until `stack` closes."""

    def call(_, inputs, output):
        function(inputs, output)

    stack.callback(module.register_forward_hook(call).remove)


def wrap(stack: ExitStack, owner: nn.Module, method: str, function: Callable[[tuple, Any], object]) -> None:
    """Calls `function(args, result)` after each call of a bound method, until `stack` closes."""
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
