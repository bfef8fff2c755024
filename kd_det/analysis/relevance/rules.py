"""Implements the rules of layer-wise relevance propagation (LRP) as modified gradients.

Bach et al., "On Pixel-Wise Explanations for Non-Linear Classifier Decisions by Layer-Wise Relevance Propagation", PLOS
ONE 2015, https://doi.org/10.1371/journal.pone.0130140; rules and their names as in Montavon et al., "Layer-Wise
Relevance Propagation: An Overview", 2019, https://doi.org/10.1007/978-3-030-28954-6_10.

A layer z_k = sum_j a_j w_jk + b_k hands the relevance R_k of its outputs to its inputs in proportion to contributions
z'_jk, which are a_j w_jk in LRP-0 and modified in the other rules. With R_k = z_k c_k, the input's share is a_j times
the gradient of sum_k z'_k (z_k / z'_k) c_k, if the quotient counts as a constant. So it is enough to replace the output
of each convolution and linear layer by a sum of the same value with this gradient: input times gradient is the
relevance then. All other layers of a piecewise linear network need no rule. For sums such as those of residual blocks
and FPNs, for pooling, ROIAlign and interpolation, gradients give LRP-0; through ReLUs and max pooling they pass on the
relevance of what is active.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from kd_det.errors import InputError

# Functions through which gradients give the relevance, by their names without underscores.
COVERED = {
    *("relu", "leaky_relu", "max_pool2d", "adaptive_max_pool2d"),
    *("avg_pool2d", "adaptive_avg_pool2d", "mean", "sum", "interpolate", "roi_align"),
    *("cat", "stack", "flatten", "reshape", "view", "permute", "transpose", "movedim", "squeeze", "unsqueeze"),
    *("getitem", "setitem", "index_put", "index_select", "split", "chunk", "unbind", "expand", "pad"),
    *("contiguous", "clone", "to", "float", "double", "dropout", "alpha_dropout", "dropout2d"),
}
# Maps the operators that Python calls by other names to the functions.
OPERATORS = {"iadd": "add", "radd": "add", "imul": "mul", "rmul": "mul", "itruediv": "div", "truediv": "div"}
LAYERS = ("conv1d", "conv2d", "conv3d", "linear")


# ---- Rules ----
@dataclass(frozen=True)
class Zero:
    """LRP-0: contributions are a_j w_jk.

    Attributes:
        needs_signs: Whether the rule looks at the sums of positive contributions.
    """

    needs_signs: ClassVar[bool] = False

    def __call__(self, total: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the sums of the rule's contributions, and what the relevance is divided by.

        Args:
            total: The sums of all a_j w_jk, the bias included.
            positive: The sums of those that are positive.
        """
        return total, total


@dataclass(frozen=True)
class Epsilon(Zero):
    """LRP-epsilon: epsilon, with the sign of the sum, is added to the divisor and absorbs small relevance."""

    epsilon: float = 1e-6

    def __call__(self, total: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
        return total, total + self.epsilon * torch.where(total < 0, -1.0, 1.0).to(total)


@dataclass(frozen=True)
class Gamma(Zero):
    """LRP-gamma: contributions with the sign of the sum count 1 + gamma times.

    For inputs that are not negative, as after a ReLU, and a positive sum, the weights are w + gamma max(w, 0). The
    general form, which signed features such as those of an FPN need, is that of Andéol et al., "Learning Domain
    Invariant Representations by Joint Wasserstein Distance Minimization", 2023, https://arxiv.org/abs/2106.04923.
    """

    needs_signs: ClassVar[bool] = True
    gamma: float = 0.25

    def __call__(self, total: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
        modified = total + self.gamma * torch.where(total > 0, positive, total - positive)
        return modified, modified


@dataclass(frozen=True)
class ZPlus(Zero):
    """z-plus, or alpha-1-beta-0: only positive contributions a_j w_jk count, those of two negative factors included."""

    needs_signs: ClassVar[bool] = True

    def __call__(self, total: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
        return positive, positive


@dataclass(frozen=True)
class PixelBox(Zero):
    """z-B, for pixels between bounds l and h: contributions are x w - l max(w, 0) - h min(w, 0).

    Montavon et al., "Explaining Nonlinear Classification Decisions with Deep Taylor Decomposition", 2017,
    https://arxiv.org/abs/1512.02479. Biases get no relevance.
    """


@dataclass(frozen=True)
class Composite:
    """Chooses the rule of each layer.

    Attributes:
        first: Rule of a convolution on the pixels.
        convolution: Rule of other convolutions.
        linear: Rule of linear layers.
        output: Rule of the layer that computes the logits.
    """

    first: Zero
    convolution: Zero
    linear: Zero
    output: Zero

    @classmethod
    def uniform(cls, rule: Zero) -> "Composite":
        """Uses one rule in all layers."""
        return cls(rule, rule, rule, rule)


COMPOSITES = {
    "layered": Composite(PixelBox(), Gamma(), Epsilon(), Zero()),
    "zero": Composite.uniform(Zero()),
    "epsilon": Composite.uniform(Epsilon()),
    "gamma": Composite.uniform(Gamma()),
    "z_plus": Composite.uniform(ZPlus()),
}


# ---- Propagation ----
@dataclass(frozen=True)
class Pixels:
    """Holds the normalised pixels that enter a network, (1, 3, H, W), and their bounds; all require gradients."""

    values: Tensor
    low: Tensor
    high: Tensor

    @property
    def leaves(self) -> list[Tensor]:
        return [self.values, self.low, self.high]


@dataclass(frozen=True)
class Sums:
    """Holds the sums over the inputs of a layer, without its bias, which broadcasts to their shape.

    Attributes:
        total: All contributions a_j w_jk.
        positive: The positive ones; for PixelBox, the sums l max(w, 0) + h min(w, 0).
        negative: The negative ones; for PixelBox, the sums l min(w, 0) + h max(w, 0).
        bias: The bias.
    """

    total: Tensor
    positive: Tensor
    negative: Tensor
    bias: Tensor

    def scale(self, factor: Tensor) -> "Sums":
        """Returns the sums of the layer whose weights and bias are multiplied by a factor for each output channel."""
        positive = torch.where(factor < 0, self.negative, self.positive)
        negative = torch.where(factor < 0, self.positive, self.negative)
        return Sums(self.total * factor, positive * factor, negative * factor, self.bias * factor)


class RelevanceMode(TorchFunctionMode):
    """Changes the gradients of all functions that are called within it to those of LRP; their values stay the same.

    It sees functions rather than modules, so that it covers Detectron2's in-place ReLUs, the sums of residual blocks
    and FPNs, ROIAlign and frozen batch norms, none of which is a module of its own or holds its parameters as one. An
    affine function that directly follows a convolution or linear layer, as batch norm does in evaluation, is folded
    into it.

    Args:
        model: The model, for the names of its modules.
        composite: The rule of each layer.
        pixels: The input of the network.
        outputs: The parameters of the layers that compute the logits.

    Attributes:
        constants: All that layers add: their relevance is what does not reach the pixels.
    """

    def __init__(self, model: nn.Module, composite: Composite, pixels: Pixels, outputs: Collection[Tensor]):
        super().__init__()
        self.composite = composite
        self.pixels = pixels
        self.outputs = {id(x) for x in outputs}
        self.constants: list[Tensor] = []
        self._names = {module: name for name, module in model.named_modules()}
        self._running: list[nn.Module] = []
        # The last layer, which a batch norm may follow: its output, its rule and its sums.
        self._last: tuple[Tensor, Zero, Sums] | None = None

    @contextmanager
    def follow(self) -> Iterator[None]:
        """Enters the mode, and keeps track of the running module for messages."""
        enter = register_module_forward_pre_hook(lambda module, _: self._running.append(module))
        leave = register_module_forward_hook(self._leave, always_call=True)
        try:
            with self:
                yield
        finally:
            enter.remove()
            leave.remove()

    def _leave(self, *_: object) -> None:
        self._running.pop()

    def __torch_function__(
        self, func: Callable, types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        is_output = len(args) > 1 and id(args[1]) in self.outputs
        # Parameters are constants here, whether they are trained or not.
        args, kwargs = tree_map(lambda x: x.detach() if isinstance(x, nn.Parameter) else x, (args, kwargs))
        if not any(map(carries_relevance, tree_leaves((args, kwargs)))):
            return func(*args, **kwargs)
        full_name = getattr(func, "__name__", str(func))
        name = OPERATORS.get(full_name.strip("_"), full_name.strip("_"))
        # A method such as add_ changes its tensor, and its caller may ignore what it returns; += uses it.
        in_place = full_name.endswith("_") and not full_name.endswith("__")
        one_constant = len(args) == 2 and not all(map(carries_relevance, args))
        last, self._last = self._last, None
        if name in LAYERS and carries_relevance(args[0]):
            return self._run_layer(func, name, args, kwargs, is_output)
        if name == "batch_norm" and carries_relevance(args[0]):
            scale, shift = self._read_batch_norm(*args, **kwargs)
            return self._add(*self._multiply(args[0], scale, last), shift)
        if name in ("hardtanh", "relu6"):
            return self._pass_through(args[0], func(args[0].clone(), *args[1:], **kwargs))
        if name in ("add", "mul") and one_constant and not kwargs and not in_place:
            relevant, constant = args if carries_relevance(args[0]) else reversed(args)
            if name == "mul":
                return self._multiply(relevant, constant, last)[0]
            return self._add(relevant, last, torch.as_tensor(constant).to(relevant))
        output = func(*args, **kwargs)
        linear = name == "add" or (name == "mul" and one_constant) or (name == "div" and not carries_relevance(args[1]))
        if not any(map(carries_relevance, tree_leaves(output))):
            self._last = last  # It only looked at the tensor, for example at its shape.
        elif not linear and name not in COVERED:
            raise self._not_covered(name)
        return output

    def _run_layer(self, func: Callable, name: str, args: tuple, kwargs: dict[str, Any], is_output: bool) -> Tensor:
        named = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
        x, weight, bias = named.pop("input"), named.pop("weight"), named.pop("bias", None)

        def apply(values: Tensor, weights: Tensor) -> Tensor:
            return func(values, weights, None, *args[3:], **named)

        is_convolution = name != "linear"
        rule = self.composite.convolution if is_convolution else self.composite.linear
        if is_output:
            rule = self.composite.output
        elif is_convolution and x is self.pixels.values:
            rule = self.composite.first
        elif isinstance(rule, PixelBox):
            raise InputError(f"composite: PixelBox is a rule for pixels alone, not for {self._place()}.")
        total = apply(x, weight)
        if isinstance(rule, PixelBox):
            above, below = weight.clamp(min=0), weight.clamp(max=0)
            low, high = self.pixels.low, self.pixels.high
            positive, negative = apply(low, above) + apply(high, below), apply(low, below) + apply(high, above)
        elif rule.needs_signs:
            positive = apply(x.clamp(min=0), weight.clamp(min=0))
            if (x < 0).any():
                positive = positive + apply(x.clamp(max=0), weight.clamp(max=0))
            negative = total - positive
        else:
            positive = negative = total
        if bias is None:
            bias = weight.new_zeros(len(weight))
        if is_convolution:
            bias = bias.view(-1, *[1] * (weight.dim() - 2))
        return self._attach(rule, Sums(total, positive, negative, bias))

    def _attach(self, rule: Zero, sums: Sums) -> Tensor:
        """Returns the output of a layer, with the gradients of its rule."""
        bias = self._track(sums.bias)
        value = sums.total + bias
        if isinstance(rule, PixelBox):
            parts = divisor = sums.total - sums.positive
        else:
            parts, divisor = rule(value, sums.positive + bias.clamp(min=0))
        output = value
        if type(rule) is not Zero:
            quotient = torch.where(divisor == 0, 0.0, value / divisor).detach()
            output = output.detach() + with_value_zero(parts * quotient)
        self._last = output, rule, sums
        return output

    def _multiply(
        self, x: Tensor, factor: Any, last: tuple[Tensor, Zero, Sums] | None
    ) -> tuple[Tensor, tuple[Tensor, Zero, Sums] | None]:
        """Multiplies by a constant; folds a factor for each channel into the last layer if x is its output.

        Returns:
            The product, and the layer that it is the output of.
        """
        if last is None or last[0] is not x or not is_by_channel(factor, last[2].bias):
            return x * factor, None
        return self._attach(last[1], last[2].scale(factor.view_as(last[2].bias))), self._last

    def _add(self, x: Tensor, last: tuple[Tensor, Zero, Sums] | None, constant: Tensor) -> Tensor:
        """Adds a constant; adds it to the bias of the last layer if x is its output."""
        if last is None or last[0] is not x or not is_by_channel(constant, last[2].bias):
            self._last = None
            return x + self._track(constant)
        sums = last[2]
        return self._attach(last[1], replace(sums, bias=sums.bias + constant.view_as(sums.bias)))

    def _pass_through(self, x: Tensor, output: Tensor) -> Tensor:
        """Passes the relevance of an activation that bends away from zero on to its input, as a ReLU does."""
        return output.detach() + with_value_zero(x * torch.where(x == 0, 0.0, output / x).detach())

    def _read_batch_norm(
        self,
        x: Tensor,
        mean: Tensor | None,
        variance: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> tuple[Tensor, Tensor]:
        """Returns the factor and the summand of each channel; takes the arguments of torch's function."""
        if training or mean is None or variance is None:
            raise self._not_covered("batch_norm with the statistics of the batch")
        scale = (variance + eps).rsqrt() * (1 if weight is None else weight)
        shift = (0 if bias is None else bias) - mean * scale
        shape = (-1, *[1] * (x.dim() - 2))
        return scale.view(shape), shift.view(shape)

    def _track(self, constant: Tensor) -> Tensor:
        """Makes a constant whose gradient is wanted of another one."""
        self.constants.append(constant.detach().clone().requires_grad_())
        return self.constants[-1]

    def _place(self) -> str:
        """Names the module that is running."""
        if not self._running:
            return "the model"
        module = self._running[-1]
        name = self._names.get(module)
        return f"{name} ({type(module).__name__})" if name else type(module).__name__

    def _not_covered(self, function: str) -> InputError:
        return InputError(f"relevance: no rule of LRP covers {function} in {self._place()}.")


def carries_relevance(x: Any) -> bool:
    """Checks whether relevance flows through a value, which is whether it depends on the pixels."""
    return isinstance(x, Tensor) and x.requires_grad


def with_value_zero(x: Tensor) -> Tensor:
    """Returns zeros that have the gradient of x."""
    return x - x.detach()


def is_by_channel(constant: Any, bias: Tensor) -> bool:
    """Checks whether a constant has one number for each channel, as the bias of a layer has, and broadcasts like it."""
    if not isinstance(constant, Tensor) or constant.numel() != bias.numel():
        return False
    return constant.dim() >= bias.dim() and constant.shape[-bias.dim() :] == bias.shape
