"""Provides what losses share: float32 or wider, steps that survive empty and constant inputs, checks of arguments."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def in_float32(function: Callable[P, R]) -> Callable[P, R]:
    """Runs a function in float32 or wider: half precision is cast up, float64 stays, and autocast is off inside."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> R:
        cast_args = [cast_up(value) for value in args]
        cast_kwargs = {key: cast_up(value) for key, value in kwargs.items()}
        device = next((v.device.type for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), "cpu")
        with torch.autocast(device, enabled=False):
            return function(*cast_args, **cast_kwargs)

    return wrapper


def cast_up(value: Any) -> Any:
    """Casts a floating-point tensor of fewer than 32 bits to float32; returns anything else, float64 too, unchanged."""
    if isinstance(value, Tensor) and value.is_floating_point() and value.element_size() < 4:
        return value.float()
    return value


def cast_for_layers(x: Tensor) -> Tensor:
    """Casts up the input of float32 layers, except under autocast, where the layers cast by themselves."""
    return x if torch.is_autocast_enabled(x.device.type) else cast_up(x)


def without_float16(device: str) -> AbstractContextManager:
    """Switches autocast off inside if it is to float16, in which large values overflow; bfloat16 has float32's range.

    Args:
        device: Type of the device, such as "cuda".
    """
    half = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16
    return torch.autocast(device, enabled=False) if half else nullcontext()


def add_up(losses: Iterable[Tensor]) -> Tensor:
    """Adds up one loss or more, from the first to the last."""
    return functools.reduce(operator.add, losses)


def mean(x: Tensor) -> Tensor:
    """Averages all elements; an empty tensor gives 0, still attached to the graph, where `x.mean()` gives NaN."""
    return x.sum() / max(x.numel(), 1)


def masked_mean(x: Tensor, mask: Tensor | None) -> Tensor:
    """Averages x (N, C, H, W) over all channels of the cells where mask (N, 1, H, W) is true; 0 if there are none."""
    if mask is None:
        return mean(x)
    return x.masked_fill(~mask, 0).sum() / (mask.sum() * x.shape[1]).clamp(min=1)


class _SumOfSquares(torch.autograd.Function):
    """Sums squares over dimensions; its backward pass reads x once, where that of a power has three passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dims: tuple[int, ...]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.dims = dims
        return x.square().sum(dims)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        shape = [1 if dim in ctx.dims else size for dim, size in enumerate(x.shape)]
        return x * (2 * gradients[0]).reshape(shape), None


def sum_of_squares(x: Tensor, *dims: int) -> Tensor:
    """Sums the squares over the given dimensions, counted from 0, or over all of them."""
    return cast(Tensor, _SumOfSquares.apply(x, dims or tuple(range(x.dim()))))


def mean_square(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Averages the squares of all elements, or of those in the cells where `mask` is true; see :func:`masked_mean`."""
    if mask is None:
        return sum_of_squares(x) / max(x.numel(), 1)
    return sum_of_squares(x.masked_fill(~mask, 0)) / (mask.sum() * x.shape[1]).clamp(min=1)


def square_per_sample(x: Tensor) -> Tensor:
    """Divides the sum of all squares by the number of samples; 0 without samples."""
    return sum_of_squares(x) / max(x.shape[0], 1)


class _UnitVectors(torch.autograd.Function):
    """Scales rows to unit length, with a gradient in four steps instead of twelve."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp(min=eps)
        unit = x / length
        ctx.save_for_backward(unit, length)
        return unit

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        unit, length = ctx.saved_tensors
        (gradient,) = gradients
        along = (gradient * unit).sum(dim=1, keepdim=True)
        return torch.addcmul(gradient, unit, along, value=-1) / length, None


def unit_vectors(x: Tensor, *, eps: float = 1e-12) -> Tensor:
    """Divides each row of x (N, D) by its length, or by eps if that is larger; a row of zeros stays zeros."""
    return cast(Tensor, _UnitVectors.apply(x, eps))


def weighted(name: str, rows: Tensor, weights: Tensor | None) -> Tensor:
    """Multiplies each row's value by its weight, through which no gradient flows; None stands for weights of 1."""
    if weights is None:
        return rows
    check_shape(name, "weights", weights, tuple(rows.shape))
    return weights.detach().to(rows) * rows


def mean_weights(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Weights rows so that the weighted mean over all of them is the plain mean over those where `rows` is true.

    In contrast to an index of the true rows, this does not make a CPU wait for a GPU to count them.
    """
    return rows * (rows.numel() / rows.sum(dtype=dtype).clamp(min=1))


def sum_per_sample(x: Tensor) -> Tensor:
    """Divides the sum of all elements by the number of samples; 0 without samples."""
    return x.sum() / max(x.shape[0], 1)


def standardize(x: Tensor, dims: tuple[int, ...], *, eps: float, mask: Tensor | None = None) -> Tensor:
    """Subtracts the mean over `dims` and divides by the unbiased standard deviation plus eps.

    Where `mask`, which broadcasts to x, is false, elements do not count, and the result is 0. A single value gives 0,
    and constant values give 0 up to rounding. The gradient passes through the mean and the standard deviation.
    """
    if mask is None:
        count = x.new_full((), math.prod(x.shape[dim] for dim in dims))
    else:
        count = mask.sum(dims, keepdim=True).to(x)
        x = x.masked_fill(~mask, 0)
    centred = x - x.sum(dims, keepdim=True) / count.clamp(min=1)
    if mask is not None:
        centred = centred.masked_fill(~mask, 0)
    # The gradient of a norm of 0 is 0 in torch, where that of the root of a sum of squares would be NaN.
    deviation = torch.linalg.vector_norm(centred, dim=dims, keepdim=True) / (count - 1).clamp(min=1).sqrt()
    return centred / (deviation + eps)


def select_class(x: Tensor, classes: Tensor, *, per_class: int) -> Tensor:
    """Selects the channels of each row's class, (R, K * per_class, ...) to (R, per_class, ...); returns x if K is 1."""
    if x.shape[1] == per_class:
        return x
    x = x.unflatten(1, (-1, per_class))
    return x[torch.arange(len(x), device=x.device), classes]


def unit_rows(x: Tensor) -> Tensor:
    """Scales the last axis to unit length, except rows shorter than 1e-12, whose gradient would be huge or NaN."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / norm.masked_fill(norm < 1e-12, 1)


def divergence(s_logits: Tensor, t_logits: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """Computes T^2 * KL(teacher || student) for each row."""
    divisor = temperature[..., None] if isinstance(temperature, Tensor) else temperature
    log_p = (t_logits.detach() / divisor).log_softmax(dim=-1)
    log_q = (s_logits / divisor).log_softmax(dim=-1)
    return temperature**2 * divergence_terms(log_p, log_q).sum(dim=-1)


def divergence_terms(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Computes p log(p / q) + q - p for each class; their sum is the Kullback-Leibler divergence, as q - p sums to 0.

    Near q = p the terms p log(p / q) alone would nearly cancel each other, and float32 would lose most digits of a
    small divergence.
    """
    p, q = log_p.exp(), log_q.exp()
    ratio = (log_p - log_q).masked_fill(p == 0, 0)  # 0 * log 0 = 0
    near = (ratio.abs() < 1) & (p > 0)
    return p * ratio + torch.where(near, p * (-ratio.clamp(-1, 1)).expm1(), q - p)


def keep_logits(logits: Tensor, mask: Tensor) -> Tensor:
    """Gives the classes where mask is false the probability 0; a row without any other becomes uniform.

    The value is finite, because the softmax of a row of -inf would be NaN.
    """
    return logits.masked_fill(~mask, -1e30)


def check_same_shape(name: str, student: Tensor, teacher: Tensor) -> None:
    """Raises ValueError unless both tensors have the same shape."""
    if student.shape != teacher.shape:
        shapes = f"{tuple(student.shape)} and {tuple(teacher.shape)}"
        raise ValueError(f"{name}: student and teacher must have the same shape, got {shapes}")


def check_shape(name: str, argument: str, x: Tensor, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless the tensor passed as `argument` has exactly the given shape."""
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name}: {argument} must have the shape {tuple(shape)}, got {tuple(x.shape)}")


def check_logits(name: str, *logits: Tensor) -> None:
    """Raises ValueError unless every tensor is (N, K)."""
    for x in logits:
        if x.dim() != 2:
            raise ValueError(f"{name}: expected a tensor of shape (N, K), got {tuple(x.shape)}")


def check_maps(name: str, *maps: Tensor) -> None:
    """Raises ValueError unless every tensor is (N, C, H, W)."""
    for x in maps:
        if x.dim() != 4:
            raise ValueError(f"{name}: expected a feature map of shape (N, C, H, W), got {tuple(x.shape)}")


def check_mask(name: str, mask: Tensor | None, like: Tensor) -> None:
    """Raises ValueError unless the mask is None, or boolean with one value per cell of the map `like` (N, C, H, W)."""
    if mask is None:
        return
    check_maps(name, like)
    check_shape(name, "mask", mask, (like.shape[0], 1, *like.shape[2:]))
    if mask.dtype != torch.bool:
        raise ValueError(f"{name}: mask must be boolean, true where a cell is valid, got {mask.dtype}")


def check_positive(name: str, key: str, value: float) -> None:
    """Raises ValueError unless the option `key` is above 0."""
    if value <= 0:
        raise ValueError(f"{name}: {key} must be above 0, got {value}")


def check_choice(name: str, key: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raises ValueError unless the option `key` has one of the allowed values."""
    if value not in allowed:
        raise ValueError(f"{name}: {key} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
