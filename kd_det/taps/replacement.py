"""Replaces a feature map of a network while it runs, so that all later layers see the new values."""

import weakref
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from kd_det.errors import InputError


@torch.no_grad()
def find_producer(network: nn.Module, images: Tensor, name: str) -> nn.Module:
    """Finds the module of a network that computes one of its maps, from a run on some images.

    To replace a map in the network's output would not be enough: the stages after it would still see the old one.

    Args:
        network: Maps images to a dict of feature maps.
        images: Images (N, 3, H, W) to run the network on.
        name: Name of the map.

    Raises:
        InputError: If no module returns this map and nothing else.
    """
    finished: list[tuple[nn.Module, weakref.ref[Tensor], int]] = []
    calls: Counter[nn.Module] = Counter()

    def note(module: nn.Module, _inputs: tuple, output: Any) -> None:
        calls[module] += 1
        tensor = only_tensor(output)
        if tensor is not None:
            finished.append((module, weakref.ref(tensor), tensor._version))

    with ExitStack() as stack:
        for module in network.modules():
            stack.callback(module.register_forward_hook(note).remove)
        target: Tensor = network(images)[name]
    # A residual block adds to the output of its last layer in place, which raises the tensor's version.
    for module, reference, version in finished:
        if reference() is target and version == target._version and calls[module] == 1:
            return module
    raise InputError(
        f"{name}: cannot be changed while {type(network).__name__} runs, since none of its modules returns this map "
        "alone."
    )


def only_tensor(output: Any) -> Tensor | None:
    """Returns the output of a module if it is a tensor, or the tensor in it if it holds a single one."""
    if isinstance(output, dict):
        output = list(output.values())
    if isinstance(output, list | tuple) and len(output) == 1:
        output = output[0]
    return output if isinstance(output, Tensor) else None


def replace_output(stack: ExitStack, module: nn.Module, function: Callable[[Tensor], Tensor]) -> None:
    """Replaces the only tensor that a module returns by a function of it, until `stack` closes."""

    def call(_module: nn.Module, _inputs: tuple, output: Any) -> Any:
        if isinstance(output, dict):
            return {key: function(value) for key, value in output.items()}
        return function(output) if isinstance(output, Tensor) else [function(value) for value in output]

    stack.callback(module.register_forward_hook(call).remove)


def replace_input(stack: ExitStack, module: nn.Module, function: Callable[[Tensor], Tensor]) -> None:
    """Replaces the first argument of a module by a function of it, until `stack` closes."""

    def call(_module: nn.Module, inputs: tuple) -> tuple:
        return (function(inputs[0]), *inputs[1:])

    stack.callback(module.register_forward_pre_hook(call).remove)
