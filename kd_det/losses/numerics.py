"""What every loss shares: float32 at least, means that survive empty inputs, and checks with readable messages."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def in_float32(function: Callable[P, R]) -> Callable[P, R]:
    """Runs a function in float32 at least: half precision is cast up, float64 stays, autocast is off inside."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        args = [cast_up(value) for value in args]
        kwargs = {key: cast_up(value) for key, value in kwargs.items()}
        device = next((v.device.type for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), "cpu")
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return wrapper


def cast_up(value: Any) -> Any:
    """Casts a floating tensor of fewer than 32 bits to float32; anything else, float64 too, is returned as it is."""
    if isinstance(value, Tensor) and value.is_floating_point() and value.element_size() < 4:
        return value.float()
    return value


def cast_for_layers(x: Tensor) -> Tensor:
    """Casts up what layers in float32 take: under autocast they cast by themselves, and the copy would cost."""
    return x if torch.is_autocast_enabled(x.device.type) else cast_up(x)


def mean(x: Tensor) -> Tensor:
    """Averages all elements; without elements the result is 0, still attached to the graph, where `x.mean()` is NaN."""
    return x.sum() / max(x.numel(), 1)


def masked_mean(x: Tensor, mask: Tensor | None) -> Tensor:
    """Averages x (N, C, H, W) over the channels of the cells that are true in mask (N, 1, H, W); 0 if none is."""
    if mask is None:
        return mean(x)
    return x.masked_fill(~mask, 0).sum() / (mask.sum() * x.shape[1]).clamp(min=1)


def check_same_shape(name: str, student: Tensor, teacher: Tensor) -> None:
    """Raises ValueError unless both tensors have the same shape."""
    if student.shape != teacher.shape:
        found = f"{tuple(student.shape)} and {tuple(teacher.shape)}"
        raise ValueError(f"{name}: student and teacher must have the same shape, got {found}")


def check_shape(name: str, what: str, found: Tensor, allowed: tuple[int, ...]) -> None:
    """Raises ValueError unless the tensor called `what` has exactly the shape `allowed`."""
    if tuple(found.shape) != tuple(allowed):
        raise ValueError(f"{name}: {what} must have the shape {tuple(allowed)}, got {tuple(found.shape)}")


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
    """Raises ValueError unless mask is None or boolean with one value for each cell of the map `like` (N, C, H, W)."""
    if mask is None:
        return
    check_maps(name, like)
    check_shape(name, "mask", mask, (like.shape[0], 1, *like.shape[2:]))
    if mask.dtype != torch.bool:
        raise ValueError(f"{name}: mask must be boolean, true where a cell is valid, got {mask.dtype}")


def check_choice(name: str, key: str, found: str, allowed: tuple[str, ...]) -> None:
    """Raises ValueError unless the option `key` has one of the allowed values."""
    if found not in allowed:
        raise ValueError(f"{name}: {key} must be one of {', '.join(map(repr, allowed))}, got {found!r}")
