"""Maps the class predictions of a student and of a teacher of other classes to the classes that both know."""

import functools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import torch
from detectron2.layers import ShapeSpec
from tabulate import tabulate
from torch import Tensor, nn

from kd_det.errors import InputError, shorten
from kd_det.signals import Signals

# Signals with an entry for each class.
CLASS_PREDICTIONS = frozenset({"roi_logits", "roi_deltas", "mask_logits", "dense_logits", "logits"})
# Signals that depend on the classes and cannot be mapped to others.
FIXED = frozenset(
    {
        *(f"{layer}_{kind}" for layer in ("roi_logits", "roi_deltas", "logits") for kind in ("weight", "bias")),
        "dense_cls_score_weight",
        "dense_cls_score_bias",
        "input_gradient",
    }
)
# Signals that hold the labelled class of each row.
LABELS = ("roi_classes", "mask_classes", "dense_labels", "labels")
# Number of names that a table lists at most.
LISTED = 100
# Classes in which a head sees the predictions: those that are shared, or the teacher's.
View = Literal["shared", "teacher"]


@dataclass(frozen=True)
class ClassPartition:
    """Divides the classes of student and teacher into those that both know, by name, and everything else.

    A softmax over classes becomes one over the shared classes, in the student's order, and "everything else": the
    log-sum-exp of the logits of the other classes and of the background. A student's class that the teacher does not
    know lies there next to the background, and no gradient changes how the two share its probability. The softmax of an
    image classifier has "everything else" only if both networks know other classes; if one of them has nothing to
    compare there, the softmax is over the shared classes alone. For sigmoid logits, masks and box deltas, the shared
    classes are selected.

    Attributes:
        student: Names of the student's classes, in the order of its indices.
        teacher: Names of the teacher's classes, in the order of its indices, with the student's name for each synonym.
        synonyms: Maps the teacher's own name of a class to the student's.

    Example:
        >>> classes = ClassPartition(("car", "cow"), ("dog", "car"))
        >>> classes.shared, classes.only_student, classes.only_teacher
        (('car',), ('cow',), ('dog',))
        >>> signals = {"roi_logits": torch.tensor([[1.0, 2.0, 2.0]])}
        >>> student, teacher = classes.align(signals, signals, "shared")
        >>> student["roi_logits"], teacher["roi_logits"]
        (tensor([[1.0000, 2.6931]]), tensor([[2.0000, 2.3133]]))
    """

    student: tuple[str, ...]
    teacher: tuple[str, ...]
    synonyms: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def shared(self) -> tuple[str, ...]:
        """Names the classes that both know, in the student's order."""
        return tuple(name for name in self.student if name in self.teacher)

    @cached_property
    def only_student(self) -> tuple[str, ...]:
        """Names the classes that only the student knows."""
        return tuple(name for name in self.student if name not in self.teacher)

    @cached_property
    def only_teacher(self) -> tuple[str, ...]:
        """Names the classes that only the teacher knows."""
        return tuple(name for name in self.teacher if name not in self.student)

    @property
    def covers_student(self) -> bool:
        """Returns whether the teacher knows all classes of the student."""
        return not self.only_student

    # ---- What heads see ----
    def view(self, student_signals: Collection[str], teacher_signals: Collection[str]) -> View | None:
        """Chooses the classes in which a head sees the predictions.

        A head that needs class predictions of the student compares them with the teacher's, and both are mapped to the
        shared classes. A head that needs only the teacher's gets them as they are, such as one that passes the
        student's features through the teacher's classifier. Nothing changes for a head without class predictions.

        Args:
            student_signals: Names of the signals that the head needs from the student.
            teacher_signals: Names of the signals that it needs from the teacher.
        """
        if not CLASS_PREDICTIONS.isdisjoint(student_signals):
            return "shared"
        return None if CLASS_PREDICTIONS.isdisjoint(teacher_signals) else "teacher"

    def check_head(
        self, head: nn.Module, name: str, student_signals: Collection[str], teacher_signals: Collection[str]
    ) -> None:
        """Checks that a head can be used with these classes.

        Args:
            head: The head.
            name: Its name in ``KD.HEADS``, for messages.
            student_signals: Names of the signals that it needs from the student.
            teacher_signals: Names of the signals that it needs from the teacher.

        Raises:
            InputError: If it compares what cannot be mapped, or would leave a class of the student without a loss.
        """
        key, own = f"KD.HEADS: {name}", shorten(self.only_student)
        fixed = sorted(FIXED.intersection(student_signals))
        if fixed:
            raise InputError(
                f"{key} compares {', '.join(fixed)}, which depend on all classes, so that student and teacher must "
                "know the same ones in the same order."
            )
        if self.view(student_signals, teacher_signals) != "shared":
            return
        if not self.shared:
            raise InputError(
                f"KD.TEACHER.CLASSES: {name} compares classes by name, but student and teacher share none; the "
                f"student's are {shorten(self.student, 20)}, the teacher's are {shorten(self.teacher, 20)}. "
                "KD.TEACHER.SYNONYMS maps the teacher's names to the student's."
            )
        if self.only_student and "loss_cls" in getattr(head, "replaces", ()):
            raise InputError(
                f"{key} takes the place of loss_cls, but the teacher does not know {own}, which nothing else would "
                "teach; keep the student's own loss (KD.BORN_AGAIN.LABELS True)."
            )
        if (
            "logits" in student_signals
            and self.only_student
            and not self.only_teacher
            and getattr(head, "reads_labels", False)
        ):
            raise InputError(
                f"{key} needs the labelled class of each image among those that are compared, but the teacher does "
                f"not know {own}; choose options that need no labels."
            )

    def align_specs(
        self, student_spec: Mapping[str, ShapeSpec], teacher_spec: Mapping[str, ShapeSpec]
    ) -> tuple[dict[str, ShapeSpec], dict[str, ShapeSpec]]:
        """Returns the shapes of both networks' signals after :meth:`align` has mapped them to the shared classes."""
        sides = (student_spec, len(self.student)), (teacher_spec, len(self.teacher))
        aligned = []
        for spec, count in sides:
            channels = {
                "roi_logits": len(self.shared) + 1,
                "logits": len(self.shared) + self._divides_images,
                "dense_logits": len(self.shared),
            }
            # A single channel, or four deltas, serve all classes, or are those of the only class.
            for name, per_class in (("roi_deltas", 4), ("mask_logits", 1)):
                if name in spec and spec[name].channels == count * per_class:
                    channels[name] = len(self.shared) * per_class
            aligned.append(
                dict(spec) | {name: replace(spec[name], channels=n) for name, n in channels.items() if name in spec}
            )
        return aligned[0], aligned[1]

    def align(self, student: Signals, teacher: Signals, view: View) -> tuple[Signals, Signals]:
        """Maps the class predictions of both networks, and the labels, to the same classes.

        A label that these classes do not have becomes that of everything else, or of the background. Boxes of objects
        of such classes have no masks to compare and are left out there.

        Args:
            student: Signals of the student.
            teacher: Signals of the teacher, on the same boxes.
            view: "shared" maps both to the shared classes and everything else; "teacher" leaves the teacher's as they
                are and maps only the labels.

        Returns:
            New dicts of both networks' signals; those without classes are the same tensors.
        """
        student, teacher = dict(student), dict(teacher)
        names = self.shared if view == "shared" else self.teacher
        # The label of the background comes after those of the classes; -1 marks what the student's losses leave out.
        others = len(names)
        table = *(names.index(name) if name in names else others for name in self.student), others, -1
        student |= {name: _tensor(table, student[name].device)[student[name]] for name in LABELS if name in student}
        if view == "shared":
            student |= self._share(student, self.student)
            teacher |= self._share(teacher, self.teacher)
        if "mask_classes" in student:
            rows = student["mask_classes"] < others
            student.pop("mask_counts", None)  # They would be those of all rows.
            for side in (student, teacher):
                side |= {
                    name: side[name][rows] for name in ("mask_logits", "mask_classes", "mask_boxes") if name in side
                }
        return student, teacher

    @property
    def _divides_images(self) -> bool:
        """Returns whether "everything else" is compared for images, which have no background."""
        return bool(self.only_student and self.only_teacher)

    def _share(self, signals: Signals, names: tuple[str, ...]) -> Signals:
        """Maps the class predictions of a network, whose classes have these names, to the shared classes."""
        count = len(names)
        shared = tuple(names.index(name) for name in self.shared)
        rest = tuple(i for i, name in enumerate(names) if name not in self.shared)
        mapped: Signals = {}
        if "roi_logits" in signals:
            mapped["roi_logits"] = _divide(signals["roi_logits"], shared, (*rest, count))
        if "logits" in signals:
            mapped["logits"] = _divide(signals["logits"], shared, rest if self._divides_images else ())
        if "dense_logits" in signals:
            mapped["dense_logits"] = _select(signals["dense_logits"], -1, shared)
        for name, per_class in (("roi_deltas", 4), ("mask_logits", 1)):
            if name in signals and signals[name].shape[1] == count * per_class:
                mapped[name] = _select(signals[name].unflatten(1, (count, per_class)), 1, shared).flatten(1, 2)
        return mapped

    # ---- Predictions of the teacher, for evaluations and pictures ----
    def translate(self, outputs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Translates the teacher's predictions to the indices of the student's classes; drops those of other classes.

        Args:
            outputs: One dict per image, with ``instances`` that have ``pred_classes``, or with ``scores`` (K,).
        """
        table = tuple(self.student.index(name) if name in self.student else -1 for name in self.teacher)
        translated = []
        for output in outputs:
            output = dict(output)
            if "instances" in output:
                classes = _tensor(table, output["instances"].pred_classes.device)[output["instances"].pred_classes]
                output["instances"] = output["instances"][classes >= 0]
                output["instances"].pred_classes = classes[classes >= 0]
            if "scores" in output:
                # The score of a class that the teacher does not know is below that of all others.
                scores = output["scores"].new_full((len(self.student),), -torch.inf)
                known = _tensor(table, scores.device)
                scores[known[known >= 0]] = output["scores"][known >= 0]
                output["scores"] = scores
            translated.append(output)
        return translated

    # ---- Messages ----
    def table(self) -> str:
        """Formats a table of the classes that are shared, only the student's, and only the teacher's."""
        originals = {student: teacher for teacher, student in self.synonyms.items()}
        shared = [f"{name} (the teacher's {originals[name]})" if name in originals else name for name in self.shared]
        names = {"shared": shared, "only the student's": self.only_student, "only the teacher's": self.only_teacher}
        rows = [[title, len(listed), shorten(listed, LISTED)] for title, listed in names.items()]
        return tabulate(rows, ["compared classes", "number", "names"], maxcolwidths=[None, None, 90])


@functools.cache
def _tensor(indices: tuple[int, ...], device: torch.device) -> Tensor:
    """Returns indices on a device; they are copied there once."""
    with torch.inference_mode(False):  # Otherwise autograd could not use them later.
        return torch.tensor(indices, device=device)


def _select(x: Tensor, dim: int, indices: tuple[int, ...]) -> Tensor:
    """Selects entries along an axis."""
    return x.index_select(dim, _tensor(indices, x.device))


def _divide(logits: Tensor, shared: tuple[int, ...], rest: tuple[int, ...]) -> Tensor:
    """Selects the shared classes of logits (N, K), and appends the log-sum-exp of the rest if there is one."""
    # In half precision the sum of the rest's probabilities would be inaccurate.
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    chosen = _select(logits, 1, shared)
    if not rest:
        return chosen
    return torch.cat([chosen, _select(logits, 1, rest).logsumexp(dim=1, keepdim=True)], dim=1)
