"""Measures the memory that heads keep from their forward pass until the backward pass."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from kd_det.signals import Signals


@contextmanager
def recording_kept_memory(heads: nn.ModuleDict) -> Iterator[dict[str, int]]:
    """Records, while heads run in the block, the bytes that autograd saves in each.

    What exists without the head does not count: the signals of both networks, and the head's parameters.

    Args:
        heads: The heads by their names; their ``forward`` must not be compiled.

    Yields:
        A dict that maps a head's name to its bytes, once the head has run.
    """
    kept: dict[str, int] = {}

    def record(name: str, head: nn.Module) -> None:
        original = head.forward

        def forward(student: Signals, teacher: Signals, *rest):
            given = [*student.values(), *teacher.values(), *head.parameters()]
            known = {x.untyped_storage().data_ptr() for x in given}
            # The tensors are held until all of them are counted, so that none takes the place of another.
            saved: dict[int, Tensor] = {}

            def pack(x: Tensor) -> Tensor:
                place = x.untyped_storage().data_ptr()
                if place not in known:
                    saved[place] = x.detach()
                return x

            with saved_tensors_hooks(pack, lambda x: x):
                losses = original(student, teacher, *rest)
            kept[name] = sum(x.untyped_storage().nbytes() for x in saved.values())
            return losses

        setattr(head, "forward", forward)  # noqa: B010
        stack.callback(delattr, head, "forward")

    with ExitStack() as stack:
        for name, head in heads.items():
            record(name, head)
        yield kept
