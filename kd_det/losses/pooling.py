"""Averages maps over the cells of coarser grids, by matrix products.

``adaptive_avg_pool2d`` gives the same averages, but on a GPU its backward pass adds them up in no fixed order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])


def kept(function: F) -> F:
    """Keeps what a function of sizes returns, so that it is computed once for each size.

    torch.compile computes it anew, since it would take the sizes for constants and compile for each of them.
    """

    @functools.lru_cache(maxsize=4096)
    def remember(*args: Any) -> Any:
        with torch.inference_mode(False):  # What is kept may be used in training.
            return function(*args)

    @functools.wraps(function)
    def wrapper(*args: Any) -> Any:
        return (function if torch.compiler.is_compiling() else remember)(*args)

    return cast(F, wrapper)


def pool(x: Tensor, rows: tuple[int, ...], columns: tuple[int, ...]) -> Tensor:
    """Averages a map over the cells of grids; a cell is as large, and as placed, as by ``adaptive_avg_pool2d``.

    Args:
        x: (N, C, H, W).
        rows: Number of cells along the height of each grid.
        columns: The same along the width.

    Returns:
        (N, C, R, S) with the sums R of `rows` and S of `columns`: the averages over each of the cells along the height
        and along the width, of every grid with every other one.

    Example:
        >>> pool(torch.tensor([[[[1.0, 2.0, 3.0, 6.0]]]]), rows=(1,), columns=(2, 1))
        tensor([[[[1.5000, 4.5000, 3.0000]]]])
    """
    of_rows = cell_shares(x.shape[2], rows, x.dtype, x.device)
    of_columns = cell_shares(x.shape[3], columns, x.dtype, x.device)
    return of_rows.mT @ (x @ of_columns)


@kept
def cell_shares(length: int, grids: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Computes the share of each of `length` places in the average over each cell of the grids, (length, cells)."""
    cells = torch.cat([torch.arange(grid, device=device) for grid in grids])
    sides = torch.cat([torch.full((grid,), grid, device=device) for grid in grids])
    first, end = cells * length // sides, ((cells + 1) * length + sides - 1) // sides
    places = torch.arange(length, device=device)[:, None]
    return ((places >= first) & (places < end)).to(dtype) / (end - first)
