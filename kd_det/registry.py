"""Defines the registries that users extend."""

import re
from collections.abc import Iterator
from typing import Any

from detectron2.utils.registry import Registry

from kd_det.lazy import import_names


class CompleteRegistry(Registry):
    """Registers classes as its base does, and imports all of this package's classes before it looks one up."""

    def get(self, name: str) -> Any:
        import_names("kd_det")
        return super().get(name)

    def __contains__(self, name: str) -> bool:
        import_names("kd_det")
        return super().__contains__(name)

    def __iter__(self) -> Iterator[tuple[str, type]]:
        import_names("kd_det")
        return super().__iter__()


KD_HEAD_REGISTRY = CompleteRegistry("KD_HEAD")
KD_HEAD_REGISTRY.__doc__ = """
Registry of distillation heads: one paper, one module, adapters and loss together.

The registered object will be called with ``obj(cfg, student_spec, teacher_spec)``, where a spec maps the name of each
signal that a network has to its :class:`ShapeSpec`. It is expected to return a ``nn.Module`` with

* ``signals``: the names of the signals that it needs from both networks;
* ``teacher_signals``, optional: the names of the signals that it needs from the teacher, if they differ; the signals to
  compare come first, in the order of ``signals``;
* ``temperature``, optional: the temperature at which it compares class logits, at which those of several teachers are
  averaged;
* ``reads_labels``, optional: whether it uses the labelled class of each row among the classes that are compared;
* ``replaces``, optional: names of the student's own losses that its losses replace while its weight is above 0;
* ``forward(student, teacher, batch)``: maps both networks' signals and the :class:`kd_det.signals.Batch` to a dict of
  unweighted scalar losses, in float32, with names ``loss_kd_<head>[_<part>]``.

If a stage before the run trains a part of the head, it also has

* ``pretrained``: the names of its submodules that the stage trains, while the rest of the head is frozen. In the run it
  is the other way round: these submodules have no gradient and are in evaluation mode, and ``forward`` uses them under
  ``torch.no_grad()``;
* ``pretrain_signals``: the names of the student's signals that the stage needs; if there are none, the student does not
  run;
* ``pretrain_teacher_signals``: the names of the teacher's signals that the stage needs; box signals are computed on the
  boxes that the teacher proposes;
* ``pretrains_student``: whether the stage also trains the student;
* ``pretrain(student, teacher, batch)``: maps both networks' signals and the batch to a dict of the stage's losses,
  named like those of ``forward``. They are summed without weights; WEIGHT and SCHEDULE apply to the run.

A head that is used only in the stage has ``signals = ()``, and its ``forward`` returns no loss. As WEIGHT has no
meaning in the run, such a head multiplies the losses of ``pretrain`` by it.

The keys of a head live in the config node ``KD.<CONFIG_KEY>`` (see :func:`config_key`), where every head has WEIGHT and
SCHEDULE. Their defaults are the class attribute ``config``, a dict.
"""

TAP_REGISTRY = CompleteRegistry("TAP")
TAP_REGISTRY.__doc__ = """
Registry of taps: ``XTap`` reads the signals of the meta-architecture ``X`` and of its subclasses.

The registered object will be called with ``obj(model)`` and is expected to be a :class:`kd_det.taps.BackboneTap`.
"""

WRAPPER_REGISTRY = CompleteRegistry("WRAPPER")
WRAPPER_REGISTRY.__doc__ = """
Registry of wrappers: the meta-architectures that train unmodified students, which ``KD.STUDENT_ARCHITECTURE`` names.

The registered object is expected to be a :class:`kd_det.StudentWrapper`.
"""


def config_key(head_name: str) -> str:
    """Returns the name of a head's config node.

    >>> config_key("AttentionTransferHead"), config_key("ReviewKDHead"), config_key("PKDHead")
    ('ATTENTION_TRANSFER', 'REVIEW', 'PKD')
    """
    stem = re.sub(r"((?<=[a-z])KD)?Head$", "", head_name) or head_name
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", stem).upper()
