"""Reads pickles of numpy arrays without running code in them and without trusting what they say about memory."""

import pickle
from typing import Any

import numpy as np


def load_arrays(path: str) -> Any:
    """Reads a pickle of numeric arrays and plain containers, such as Detectron2's zoo and proposal files.

    Raises:
        pickle.UnpicklingError: If it holds anything else. A broken file may cause any exception.
    """
    with open(path, "rb") as file:
        return _ArrayUnpickler(file, encoding="latin1").load()


class _Dtype:
    """Replaces numpy's dtype, whose state has flags that numpy trusts, by one that allows numbers only."""

    __slots__ = ("value",)

    def __init__(self, name: str, *_: Any):
        self.value = np.dtype(name) if isinstance(name, str) else None
        if self.value is None or self.value.kind not in "biufc":
            raise pickle.UnpicklingError(f"it asks for an array of {name!r}, which are no numbers")

    def __setstate__(self, state: tuple) -> None:
        self.value = self.value.newbyteorder(state[1])


class _Array(np.ndarray):
    """Checks the state of an array before numpy accepts it."""

    def __new__(cls, *_: Any):
        return super().__new__(cls, 0, np.uint8)

    def __setstate__(self, state: tuple) -> None:
        *_, shape, dtype, is_fortran, data = state
        data = data.encode("latin1") if isinstance(data, str) else data  # Python 2 wrote a string.
        checked = np.ndarray(shape, dtype.value, data)
        if checked.nbytes != len(data):
            raise pickle.UnpicklingError(f"it has {len(data)} bytes for an array of {checked.nbytes}")
        state = 1, checked.shape, checked.dtype, bool(is_fortran), bytes(data)
        super().__setstate__(state)  # type: ignore[arg-type]  # numpy takes a bool, though its types ask for its own.

    @classmethod
    def from_buffer(
        cls, data: bytes, dtype: _Dtype, shape: tuple[int, ...], order: str, axes: tuple[int, ...] | None = None
    ) -> "_Array":
        """Rebuilds an array that ``pickle`` wrote with protocol 5 or later."""
        array = cls()
        array.__setstate__((shape, dtype, order == "F", data))
        return array.transpose(axes) if order == "K" else array

    @classmethod
    def scalar(cls, dtype: _Dtype, data: bytes) -> np.generic:
        array = cls()
        array.__setstate__(((), dtype, False, data))
        return array[()]  # type: ignore[return-value]  # By numpy's types this is an array.


class _ArrayUnpickler(pickle.Unpickler):
    # Maps the names that a file may call to replacements. The opcode BUILD would set attributes of a class or a method,
    # but these refuse it: the classes have a __setstate__, and methods have no attributes.
    allowed = {  # noqa: RUF012
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _Dtype,
        ("numpy._core.multiarray", "_reconstruct"): _Array,
        ("numpy._core.multiarray", "scalar"): _Array.scalar,
        ("numpy._core.numeric", "_frombuffer"): _Array.from_buffer,
        ("detectron2.structures.boxes", "BoxMode"): int,  # Proposal files use it.
    }

    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("numpy.core", "numpy._core")
        if (module, name) in {("collections", "OrderedDict"), ("_codecs", "encode"), ("__builtin__", "bytes")}:
            return super().find_class(module, name)
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return self.allowed[module, name]
