"""The registries that users extend."""

import re
from collections.abc import Iterator

from detectron2.utils.registry import Registry

from kd_det.lazy import import_names


class CompleteRegistry(Registry):
    """A registry that contains all of this package's classes, whichever of its modules has been imported."""

    def get(self, name: str) -> type:
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

* ``signals``: the names of the signals that it needs of both networks;
* ``teacher_signals``, optional: what it needs of the teacher, if that is something else; what is compared stands first,
  in the order of ``signals``;
* ``replaces``, optional: names of the student's own losses whose place its losses take while its weight is above 0;
* ``forward(student, teacher, batch)``: both networks' signals and the :class:`kd_det.signals.Batch` to a dict of
  unweighted scalar losses, in float32, with names ``loss_kd_<head>[_<part>]``.

A head of which a stage before the run trains a part has further

* ``pretrained``: the names of its submodules that the stage trains; the rest of the head is then frozen. In the run it
  is the other way round: they have no gradient and are in evaluation mode, and ``forward`` runs under
  ``torch.no_grad()`` what it needs of them;
* ``pretrain_signals``: the names of the student's signals that the stage needs; with none the student does not run;
* ``pretrain_teacher_signals``: those of the teacher's; signals of boxes are of the boxes that the teacher proposes;
* ``pretrains_student``: whether the stage trains the student, too;
* ``pretrain(student, teacher, batch)``: both networks' signals and the batch to a dict of the stage's losses, named
  like those of ``forward``. They are summed as they are; WEIGHT and SCHEDULE are of the run.

A head whose work ends with its stage has ``signals = ()``, and its ``forward`` returns no loss. As WEIGHT has no
meaning in the run, such a head multiplies the losses of ``pretrain`` by it.

Its keys live in the config node ``KD.<CONFIG_KEY>`` (see :func:`config_key`), with WEIGHT and SCHEDULE in every one.
Their defaults are the class attribute ``config``, a dict.
"""

TAP_REGISTRY = CompleteRegistry("TAP")
TAP_REGISTRY.__doc__ = """
Registry of taps: ``XTap`` reads the signals of the meta-architecture ``X`` and of its subclasses.

The registered object will be called with ``obj(model)`` and is expected to be a :class:`kd_det.taps.BackboneTap`.
"""


def config_key(head_name: str) -> str:
    """Return the name of a head's config node.

    >>> config_key("AttentionTransferHead"), config_key("ReviewKDHead"), config_key("PKDHead")
    ('ATTENTION_TRANSFER', 'REVIEW', 'PKD')
    """
    stem = re.sub(r"((?<=[a-z])KD)?Head$", "", head_name) or head_name
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", stem).upper()
