"""Pretends that a machine has a GPU, to count what a training step asks of it: kernels, and waits of the host.

Inside :class:`PretendedGPU` tensors can be made on, and moved to, the device ``cuda:0``. They hold their values on the
CPU and compute there, so all numbers are real. The mode counts two things:

* kernels: operations that compute or copy, and do not merely view. A GPU launches at least one kernel for each;
* waits: operations for which the host stops until the GPU has caught up, as ``torch.cuda.set_sync_debug_mode`` reports
  them. They read a value or a number of elements, or copy between host and device. A copy to the device with
  ``non_blocking`` is none, because torch only puts it into the GPU's queue.

An operation on tensors of both devices raises, as on a real GPU. Streams, memory, autocast and the numerics of a GPU
are not pretended.
"""

import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, TypeVar
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

T = TypeVar("T")
GPU = torch.device("cuda", 0)
# Operations that read values of a tensor of the device, or whose result has a size that depends on values.
READING = {
    "_local_scalar_dense",
    "_unique2",
    "bincount",
    "equal",
    "is_nonzero",
    "masked_select",
    "nms",
    "nonzero",
    "unique_consecutive",
    "unique_dim",
}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
# Operations that launch nothing though their results are no views.
LAUNCHING_NOTHING = {"_unsafe_view", "_local_scalar_dense", "is_same_size", "resize_", "set_"}
SKIPPED_FRAMES = ("/torch/", "/torchvision/", __file__)


class Wait(NamedTuple):
    """Describes one wait of the host: what it does, the code that asks for it, and the part of the step."""

    kind: str
    code: str
    part: str


class GPUTensor(Tensor):
    """Stands for a tensor of the device: torch sees shape, dtype and dispatch keys; the values are in ``values``."""

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor, *, requires_grad: bool = False) -> "GPUTensor":
        shell = torch.empty_strided(values.size(), values.stride(), dtype=values.dtype, device="meta")
        self = torch.Tensor._make_subclass(cls, shell, requires_grad, device_for_backend_keys=GPU)
        self.values = values
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: GPU)
    is_cuda = property(lambda self: True)
    is_meta = property(lambda self: False)
    is_cpu = property(lambda self: False)

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"GPUTensor({self.values})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise RuntimeError(f"{function} ran outside PretendedGPU.")


class PretendedGPU(TorchDispatchMode):
    """Makes the device exist inside a ``with`` block, and counts.

    Attributes:
        waits: The waits so far.
        kernels: Maps each part of the step to the number of its kernels.
        own_kernels: The same, for those only that code of kd_det launches itself, in the parts `attributed`.
    """

    def __init__(self, *, attributed: Collection[str] = ()):
        super().__init__()
        self.waits: list[Wait] = []
        self.kernels: Counter[str] = Counter()
        self.own_kernels: Counter[str] = Counter()
        self.attributed = set(attributed)
        self._part = ""
        self._stack = ExitStack()

    def __enter__(self) -> "PretendedGPU":
        torch._C._ensureCUDADeviceGuardSet()
        with ExitStack() as stack:
            stack.enter_context(mock.patch.object(torch.cuda, "_lazy_init"))
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
            # The backward pass runs in this thread, which is the one that counts.
            stack.enter_context(torch.autograd.set_multithreading_enabled(False))
            stack.enter_context(lifting_only_cpu_tensors())
            super().__enter__()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._stack.close()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Counts what runs inside as a part of the step."""
        outer, self._part = self._part, name
        try:
            yield
        finally:
            self._part = outer

    def label(self, patch, owner: object, method: str, name: str) -> None:
        """Counts a method of an object as a part of the step until `patch`, pytest's monkeypatch, is undone."""
        function = getattr(owner, method)

        def labelled(*args, **kwargs):
            with self.part(name):
                return function(*args, **kwargs)

        patch.setattr(owner, method, labelled)

    def clear(self) -> None:
        """Forgets all counts."""
        self.waits.clear()
        self.kernels.clear()
        self.own_kernels.clear()

    def waits_in(self, *parts: str, own: bool = False) -> int:
        """Counts the waits of parts of the step; with `own` those only that code of kd_det asks for itself."""
        return sum(wait.part in parts and (not own or wait.code.startswith("kd_det/")) for wait in self.waits)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.name().split("::")[-1].split(".")[0]
        tensors: list[Tensor] = []
        map_tensors(lambda x: tensors.append(x), (args, kwargs))
        on_gpu = [x for x in tensors if isinstance(x, GPUTensor)]
        gives_gpu = bool(on_gpu)
        if kwargs.get("device") is not None:
            gives_gpu = torch.device(kwargs["device"]).type in ("cuda", "meta")
        elif name == "copy_":
            gives_gpu = isinstance(args[0], GPUTensor)
        kind = wait_kind(name, args, kwargs, on_gpu, gives_gpu)
        if kind:
            self.waits.append(Wait(kind, innermost_code(), self._part))
        elif on_gpu and name not in ("copy_", "_to_copy"):
            mixed = [x for x in tensors if not isinstance(x, GPUTensor) and x.dim()]
            if mixed:
                shapes = [(tuple(x.shape), x.device.type) for x in tensors]
                raise RuntimeError(f"{function} at {innermost_code()} got tensors of both devices: {shapes}")
        if (on_gpu or gives_gpu) and launches(function, name):
            self.kernels[self._part] += 1
            if self._part in self.attributed:
                self.own_kernels[self._part] += innermost_code().startswith("kd_det/")
        return self._compute(function, args, kwargs, on_gpu, gives_gpu)

    def _compute(self, function, args, kwargs, on_gpu: list[GPUTensor], gives_gpu: bool):
        """Runs an operation on the CPU; its results lie on the device if `gives_gpu`."""
        args, kwargs = map_tensors(lambda x: x.values if isinstance(x, GPUTensor) else x, (args, kwargs))
        if kwargs.get("device") is not None and gives_gpu:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        results = function(*args, **kwargs)
        if not gives_gpu:
            return results
        # An operation in place returns the tensor that it was given.
        given = {id(x.values): x for x in on_gpu}

        def wrap(x: Tensor) -> Tensor:
            if id(x) not in given:
                return GPUTensor(x)
            if given[id(x)].shape != x.shape:
                raise NotImplementedError(f"{function} gives a tensor another shape in place.")
            return given[id(x)]

        return map_tensors(wrap, results)


def wait_kind(name: str, args: tuple, kwargs: dict, on_gpu: list[GPUTensor], gives_gpu: bool) -> str:
    """Names what an operation makes the host wait for; "" if it does not wait."""
    if name in ("_to_copy", "copy_"):
        source = args[1] if name == "copy_" else args[0]
        if isinstance(source, GPUTensor) and not gives_gpu:
            return "copy to the host"
        if not isinstance(source, GPUTensor) and gives_gpu and not non_blocking(name, args, kwargs):
            return "copy to the device"
        return ""
    if not on_gpu:
        return ""
    if name in READING:
        return name
    if name == "repeat_interleave" and kwargs.get("output_size") is None:
        return name
    if name in INDEXING and isinstance(args[0], GPUTensor):
        indices = [x for x in args[1] if x is not None]
        if any(x.dtype in (torch.bool, torch.uint8) for x in indices):
            return "boolean index"
        if any(not isinstance(x, GPUTensor) for x in indices):
            return "index on the host"
    return ""


def non_blocking(name: str, args: tuple, kwargs: dict) -> bool:
    return kwargs.get("non_blocking", False) or (name == "copy_" and len(args) > 2 and args[2])


def launches(function, name: str) -> bool:
    """Reports whether an operation launches a kernel."""
    return not (function.is_view or name in LAUNCHING_NOTHING or name.startswith(("empty", "new_empty")))


def innermost_code() -> str:
    """Names the file and the function of the innermost frame outside torch: who asks for an operation."""
    frame = sys._getframe(2)
    while frame is not None:
        path = frame.f_code.co_filename
        if not any(part in path for part in SKIPPED_FRAMES):
            package = next((x for x in ("kd_det", "detectron2") if f"/{x}/" in path), None)
            short = f"{package}/{path.rpartition(f'/{package}/')[2]}" if package else path.rpartition("/")[2]
            return f"{short}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "torch"


def map_tensors(function: Callable[[Tensor], object], x: Any) -> Any:
    """Maps the tensors in lists, tuples and dicts; this is faster than torch's functions for any structure."""
    if isinstance(x, Tensor):
        return function(x)
    if isinstance(x, dict):
        return {key: map_tensors(function, value) for key, value in x.items()}
    if type(x) in (list, tuple):
        return type(x)([map_tensors(function, value) for value in x])
    return x


@contextmanager
def lifting_only_cpu_tensors() -> Iterator[None]:
    """Lets ``torch.tensor(x, device="cuda")`` make the tensor on the CPU first, and then copy it, as torch does."""
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        yield
    finally:
        torch._C._set_only_lift_cpu_tensors(before)


def to_gpu(x: T) -> T:
    """Moves a module in place, or the tensors of a structure, to the device; keeps what is there already."""
    if not isinstance(x, nn.Module):
        return map_tensors(put, x)
    for module in x.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(put(parameter.detach()), parameter.requires_grad)
        module._buffers.update({name: put(x) for name, x in module._buffers.items() if x is not None})
    return x


def put(x: Tensor) -> Tensor:
    if isinstance(x, GPUTensor):
        return x
    with _disable_current_modes():  # This is no operation of the step.
        return GPUTensor(x.detach(), requires_grad=x.requires_grad)
