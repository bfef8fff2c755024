"""Resumes an optimizer: takes its accumulated state from the checkpoint and its options from the config."""

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kd_det.errors import shorten

logger = logging.getLogger(__name__)


def parameter_names(model: nn.Module, optimizer: Optimizer) -> list[str]:
    """Lists the names of an optimizer's parameters, in the order of the indices in its state."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]


def adapt_state(
    saved: dict[str, Any], optimizer: Optimizer, names: Sequence[str], saved_names: Sequence[str] | None
) -> tuple[dict[str, Any], bool]:
    """Adapts the saved state of an optimizer to the parameter groups of this config, which keep their options.

    Args:
        saved: The saved state.
        optimizer: The optimizer that is to load it.
        names: Names of the optimizer's parameters, in order.
        saved_names: Names of the parameters in the saved state; None for an old checkpoint, whose groups must match.

    Returns:
        The state to load, and whether the config's learning rates have changed. If they have not, the groups have the
        rates that the schedule had reached.

    Raises:
        ValueError: If other parameters were trained, or the accumulated state does not fit them.
    """
    current = optimizer.state_dict()
    if saved_names is None:
        saved_names = names
        sizes, saved_sizes = ([len(group["params"]) for group in x["param_groups"]] for x in (current, saved))
        if sizes != saved_sizes:
            raise ValueError("its optimizer has other groups of parameters")
    different = set(names) ^ set(saved_names)
    if different:
        raise ValueError(f"its optimizer trained other parameters: the differences are {shorten(sorted(different))}")
    order = {name: i for i, name in enumerate(saved_names)}
    saved_groups = {i: group for group in saved["param_groups"] for i in group["params"]}
    changes: Counter[tuple[str, Any, Any]] = Counter()
    state = {}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for group in current["param_groups"]:
        for i in group["params"]:
            before = saved_groups[order[names[i]]]
            options = (group.keys() & before.keys()) - {"params", "lr"}
            changes.update((key, before[key], group[key]) for key in options if group[key] != before[key])
            if order[names[i]] in saved["state"]:
                state[i] = saved["state"][order[names[i]]]
                check_entry(names[i], state[i], parameters[i])
        group["lr"] = saved_groups[order[names[group["params"][0]]]]["lr"]
    for (key, before, now), number in sorted(changes.items(), key=str):
        name = "learning rate" if key == "initial_lr" else key
        logger.warning(
            "%s: %s instead of %s from here on, for %d parameters, as the config says.", name, now, before, number
        )
    return {"state": state, "param_groups": current["param_groups"]}, any(key == "initial_lr" for key, *_ in changes)


def check_entry(name: str, entry: dict[str, Any], parameter: nn.Parameter) -> None:
    """Checks the accumulated state of a parameter: it may hold numbers, and real tensors of the parameter's shape.

    Raises:
        ValueError: If it holds anything else.
    """
    for key, value in entry.items():
        if value is None or isinstance(value, int | float):
            continue
        if not isinstance(value, Tensor):
            raise ValueError(f"its optimizer's {key} of {name} is a {type(value).__name__}")
        if value.dim() and value.shape != parameter.shape:
            raise ValueError(f"its optimizer's {key} of {name} has shape {list(value.shape)}")
        if not value.is_floating_point() or value.layout != torch.strided or value.is_meta:
            raise ValueError(f"its optimizer's {key} of {name} is not a dense tensor of real numbers")
