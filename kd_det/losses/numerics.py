"""Provides what all losses share: float32 or wider, means that survive empty inputs, checks with clear messages."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def in_float32(function: Callable[P, R]) -> Callable[P, R]:
    """Runs a function in float32 or wider: half precision is cast up, float64 stays, and autocast is off inside."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        args = [cast_up(value) for value in args]
        kwargs = {key: cast_up(value) for key, value in kwargs.items()}
        device = next((v.device.type for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), "cpu")
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return wrapper


def cast_up(value: Any) -> Any:
    """Casts a floating-point tensor of fewer than 32 bits to float32; returns anything else, float64 too, unchanged."""
    if isinstance(value, Tensor) and value.is_floating_point() and value.element_size() < 4:
        return value.float()
    return value


def cast_for_layers(x: Tensor) -> Tensor:
    """Casts up the input of float32 layers, except under autocast, where the layers cast by themselves."""
    return x if torch.is_autocast_enabled(x.device.type) else cast_up(x)


def mean(x: Tensor) -> Tensor:
    """Averages all elements; an empty tensor gives 0, still attached to the graph, where `x.mean()` gives NaN."""
    return x.sum() / max(x.numel(), 1)


def masked_mean(x: Tensor, mask: Tensor | None) -> Tensor:
    """Averages x (N, C, H, W) over all channels of the cells where mask (N, 1, H, W) is true; 0 if there are none."""
    if mask is None:
        return mean(x)
    return x.masked_fill(~mask, 0).sum() / (mask.sum() * x.shape[1]).clamp(min=1)


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


def check_choice(name: str, key: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raises ValueError unless the option `key` has one of the allowed values."""
    if value not in allowed:
        raise ValueError(f"{name}: {key} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
