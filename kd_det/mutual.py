"""Implements the meta-architecture that trains students which teach each other."""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import cast

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.utils.events import EventStorage, get_event_storage
from torch import Tensor, nn

from kd_det.config import is_flipped
from kd_det.construction import build_network
from kd_det.errors import InputError, check_choice
from kd_det.gradients import GradientShares, build_gradient_shares
from kd_det.heads import InheritExploreHead
from kd_det.heads.coders import first_boxes
from kd_det.losses import mutual_loss
from kd_det.losses.numerics import add_up
from kd_det.meta_arch import build_student, check_finite, check_task_weight
from kd_det.peers import build_heads, check_classes, load_peer_configs
from kd_det.registry import WRAPPER_REGISTRY
from kd_det.schedules import build_schedule
from kd_det.signals import SOFTMAX_SOURCES, SOURCES, Batch, Signals, flipped
from kd_det.taps import build_tap
from kd_det.wrapper import Network, StudentWrapper

METHODS = ("dml", "ie_dml")


@META_ARCH_REGISTRY.register()
@WRAPPER_REGISTRY.register()
class MutualStudents(StudentWrapper):
    """Trains two or more unmodified students together, so that they teach each other; in inference the first one runs.

    Deep mutual learning (DML, Zhang et al., CVPR 2018, https://arxiv.org/abs/1706.00384) adds to each student's losses
    the Kullback-Leibler divergence of its class probabilities from those of a peer, averaged over its peers. No
    gradient reaches the peer. Each forward runs once, on the same batch, and all students are updated at once; or, as
    in the paper's algorithm, in turn, each taught by its peers' current predictions.

    R-CNNs are compared by the classes of the sampled boxes, and each student samples its own. A peer's ROI heads run
    once more on these boxes, in evaluation mode and without gradients, from the feature maps that its forward computed.

    In IE-DML (Huang et al., CVPR 2021, https://arxiv.org/abs/2107.00181) each student also inherits from its peers and
    explores what they lack, see :class:`InheritExploreHead`. It has two encoders for the halves of its channels, and an
    auto-encoder that is trained alongside to reconstruct its features; its peers are compared with the auto-encoder's
    factor. The reconstruction sends no gradient into the features, so a weight of it would scale only the
    auto-encoder's learning rate; the weight is 1. No code of this method is published, and it is not known whether the
    method includes DML's divergence; here it does.

    The names of the first student's losses end in ``_peer_1``, and so on.

    Args:
        students: The students.
        source: Predictions that are compared: "roi" or "cls".
        weight: Factor of the divergence.
        heads: For IE-DML one head per student, built with the student as its own teacher, all with the same number of
            factor channels; otherwise none.
        head_weight: Maps an iteration to the factor of the heads' losses.
        sequential: Whether the students are updated in turn; an iteration then has `turns` updates.
        flip_channels: Whether each student takes its images in reverse channel order; None if none does.
        mask_padding: Whether the heads leave out padding.
        task_weight: Factor of the students' own losses.
        configs: Plain config of each student; see :meth:`StudentWrapper.student_configs`.
        gradient_shares: Measures the gradients of the losses; None measures nothing.
    """

    has_peers = True

    @configurable
    def __init__(
        self,
        *,
        students: Sequence[nn.Module],
        source: str,
        weight: float = 1.0,
        heads: Sequence[InheritExploreHead] = (),
        head_weight: Callable[[int], float] = lambda _: 1.0,
        sequential: bool = False,
        flip_channels: Sequence[bool] | None = None,
        mask_padding: bool = False,
        task_weight: float = 1.0,
        configs: Sequence[CfgNode] = (),
        gradient_shares: GradientShares | None = None,
    ):
        super().__init__()
        self.students = nn.ModuleList(students)
        self.heads = nn.ModuleList(heads)
        self.taps = [build_tap(student) for student in students]
        self.logits = SOURCES[source].logits
        self.weight = weight
        self.head_weight = head_weight
        self.sequential = sequential
        self.flip_channels = list(flip_channels or [False] * len(students))
        self.mask_padding = mask_padding
        self.task_weight = task_weight
        self.configs = list(configs)
        self.gradient_shares = gradient_shares or GradientShares()
        self.signals = {self.logits, *(name for head in heads for name in head.signals)}
        self.box_signals = {name for name in self.signals if name.startswith("roi_")}

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        node = cfg.KD.MUTUAL
        check_choice("KD.MUTUAL.SOURCE", node.SOURCE, SOFTMAX_SOURCES)
        check_choice("KD.MUTUAL.METHOD", node.METHOD, METHODS)
        if not 0 <= node.WEIGHT < math.inf:
            raise InputError(f"KD.MUTUAL.WEIGHT: must be finite and 0 or more, got {node.WEIGHT}.")
        if cfg.KD.HEADS or cfg.KD.TEACHER.CONFIG_FILE:
            raise InputError("KD.HEADS and KD.TEACHER: must be empty for MutualStudents, which has no teacher.")
        if cfg.KD.INHERIT:
            raise InputError("KD.INHERIT: must be False for MutualStudents, which has no teacher.")
        check_task_weight(cfg)
        share = cfg.KD.INHERIT_EXPLORE.SCHEDULE.GRADIENT_SHARE
        if share and node.METHOD == "ie_dml":
            raise InputError(
                f"KD.INHERIT_EXPLORE.SCHEDULE.GRADIENT_SHARE: got {share}, but all students of MutualStudents have the "
                "same weight; allowed is 0."
            )
        names, configs = ["this config", *node.PEERS], load_peer_configs(cfg)
        flip_channels = [is_flipped(cfg, config, (names[0], name)) for name, config in zip(names, configs, strict=True)]
        students = [build_student(cfg)]
        # With the same seed the first student's training must draw the same random numbers with and without peers.
        with torch.random.fork_rng(devices=[]):
            students += [build_network(*peer) for peer in zip(configs[1:], node.PEERS, strict=True)]
            taps = [build_tap(student) for student in students]
            check_classes(node.SOURCE, [tap.spec() for tap in taps], names)
            if node.SOURCE == "roi":
                for tap in taps[1:]:
                    taps[0].check_alignment(tap, [SOURCES[node.SOURCE].logits])
            heads = build_heads(cfg, taps, names) if node.METHOD == "ie_dml" else []
        return {
            "students": students,
            "source": node.SOURCE,
            "weight": node.WEIGHT,
            "heads": heads,
            "head_weight": build_schedule(cfg.KD.INHERIT_EXPLORE, cfg.SOLVER.MAX_ITER, key="KD.INHERIT_EXPLORE"),
            "sequential": node.SEQUENTIAL,
            "flip_channels": flip_channels,
            "mask_padding": cfg.KD.MASK_PADDING,
            "task_weight": cfg.KD.TASK_WEIGHT,
            "configs": configs,
            "gradient_shares": build_gradient_shares(cfg, *students),
        }

    @property
    def student(self) -> nn.Module:
        """Returns the first student."""
        return self.students[0]

    @property
    def turns(self) -> int:
        return len(self.students) if self.sequential else 1

    @property
    def checkpointables(self) -> dict[str, object]:
        peers: dict[str, object] = {f"peer_{i}": student for i, student in enumerate(self.students, 1) if i > 1}
        return peers | ({"kd_heads": self.heads} if self.heads else {})

    @property
    def compared(self) -> Collection[str]:
        return self.signals

    def student_configs(self, cfg: CfgNode) -> list[CfgNode]:
        return self.configs

    def networks(self, cfg: CfgNode) -> list[Network]:
        columns = zip(self.students, self.student_configs(cfg), self.flip_channels, strict=True)
        return [Network(f"student {i}", *column) for i, column in enumerate(columns, 1)]

    def describe(self, cfg: CfgNode) -> list[str]:
        turns = ", one after the other" if self.sequential else ""
        method = cfg.KD.MUTUAL.METHOD
        return [f"They teach each other {self.logits}{turns}, weight {self.weight:g} ({method})."]

    def forward(self, batched_inputs: list[dict], turn: int | None = None):
        """Runs the first student; in training, runs all of them and returns the losses of all, or of one.

        Args:
            batched_inputs: The batch in the form that the first student takes.
            turn: Index of the only student to be trained; the others then run without gradients. None trains all.

        Raises:
            FloatingPointError: If a loss is not finite.
        """
        if not self.training:
            return self.student(batched_inputs)
        learning = range(len(self.students)) if turn is None else [turn]
        storage = get_event_storage()
        batch = Batch.from_inputs(batched_inputs, mask_padding=self.mask_padding)
        losses: dict[str, Tensor] = {}
        recorded: list[Signals] = []
        groups: dict[int, dict[str, list[Tensor]]] = {}
        for i, (student, tap) in enumerate(zip(self.students, self.taps, strict=True)):
            with ExitStack() as stack:
                if i in learning:
                    stack.enter_context(storage.name_scope(f"peer_{i + 1}"))
                else:  # A student logs its scalars only in its own turn.
                    stack.enter_context(torch.no_grad())
                    stack.enter_context(EventStorage(storage.iter))
                signals = stack.enter_context(tap.record(self.signals | set(tap.features)))
                own_losses = student(flipped(batched_inputs) if self.flip_channels[i] else batched_inputs)
            recorded.append(signals)
            if i not in learning:
                continue
            own_losses = {key: self.task_weight * loss for key, loss in own_losses.items()}
            groups[i] = {"task": list(own_losses.values())}
            if self.heads and self._head(i).pretrained:
                own_losses |= self._head(i).pretrain({}, first_boxes(self._head(i).boxes, signals)[0], batch)
            losses |= {f"{key}_peer_{i + 1}": loss for key, loss in own_losses.items()}
        weight = self.head_weight(storage.iter)
        if self.heads:
            storage.put_scalar(f"kd/weight/{InheritExploreHead.__name__}", weight, smoothing_hint=False)
        # Parts without gradients run last, because autocast may cache the first low-precision copy of a weight.
        for i in learning:
            learner = recorded[i]
            peers = {j: self._on_boxes_of(learner, j, peer) for j, peer in enumerate(recorded) if j != i}
            divergences = [mutual_loss(learner[self.logits], peer[self.logits]) for peer in peers.values()]
            peer_losses = {"loss_kd_mutual": self.weight * add_up(divergences) / len(divergences)}
            groups[i]["mutual"] = list(peer_losses.values())
            if self.heads:
                with storage.name_scope(f"peer_{i + 1}"):
                    head_losses = self._inherit_and_explore(i, learner, peers, batch, weight)
                groups[i][InheritExploreHead.__name__] = list(head_losses.values())
                peer_losses |= head_losses
            losses |= {f"{key}_peer_{i + 1}": loss for key, loss in peer_losses.items()}
        check_finite(losses, storage.iter)
        for i, group in groups.items():
            if self.gradient_shares.is_due(storage.iter, suffix := f"_peer_{i + 1}"):
                self.gradient_shares.log(self.gradient_shares.measure(self.students[i], group, suffix), suffix)
        return losses

    def _head(self, i: int) -> InheritExploreHead:
        return cast(InheritExploreHead, self.heads[i])  # A ModuleList knows no more than that it holds modules.

    @torch.no_grad()
    def _on_boxes_of(self, student: Signals, j: int, peer: Signals) -> Signals:
        """Returns the signals of peer `j`, with box signals recomputed on the boxes that the student sampled."""
        if not self.box_signals:
            return peer
        with evaluation_mode(self.students[j]):
            return peer | self.taps[j].recompute(peer, self.box_signals, student)

    def _inherit_and_explore(
        self, i: int, student: Signals, peers: Mapping[int, Signals], batch: Batch, weight: float
    ) -> dict[str, Tensor]:
        head = self._head(i)
        student, *limited = first_boxes(head.boxes, student, *peers.values())
        targets = [self._head(j).teacher_factors(peer, batch) for j, peer in zip(peers, limited, strict=True)]
        per_peer = [head.compare(student, target, batch) for target in targets]
        return {key: weight * add_up(losses[key] for losses in per_peer) / len(per_peer) for key in per_peer[0]}


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Puts a model into evaluation mode, and restores the mode of each module afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
