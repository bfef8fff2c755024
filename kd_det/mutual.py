"""The meta-architecture that trains students which teach each other."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.utils.events import EventStorage, get_event_storage
from torch import Tensor, nn

from kd_det.config import is_flipped
from kd_det.construction import build_network
from kd_det.errors import InputError
from kd_det.gradients import GradientShares, build_gradient_shares
from kd_det.heads import InheritExploreHead
from kd_det.heads.coders import first_boxes
from kd_det.losses import mutual_loss
from kd_det.meta_arch import build_student, check_finite, check_task_weight
from kd_det.peers import SOURCES, build_heads, check_classes, load_peer_configs
from kd_det.schedules import build_schedule
from kd_det.signals import Batch, Signals, flipped
from kd_det.taps import build_tap

METHODS = ("dml", "ie_dml")


@META_ARCH_REGISTRY.register()
class MutualStudents(nn.Module):
    """Two or more students, untouched, that train together and teach each other. In inference it is the first of them.

    Deep mutual learning (DML, Zhang et al., CVPR 2018, https://arxiv.org/abs/1706.00384): each student's losses gain
    the Kullback-Leibler divergence of its class probabilities from those of a peer, mean over its peers. No gradient
    reaches the peer. Each forward runs once, on the same batch, and all are updated at once; or, as in the paper's
    algorithm, one after the other, each with the predictions of its peers as they then are.

    Of R-CNNs the classes of the sampled boxes are compared, and each student samples its own. A peer's ROI heads run
    once more on these, in evaluation mode and without gradients, from the feature maps that its forward computed.

    IE-DML (Huang et al., CVPR 2021, https://arxiv.org/abs/2107.00181): each student further inherits from its peers and
    explores what they lack, see :class:`InheritExploreHead`. It owns two encoders for the halves of its channels, and
    an auto-encoder, trained together with it to reconstruct its features, whose factor its peers are compared with. No
    gradient reaches the features from there, so a weight of the reconstruction would scale the auto-encoder's learning
    rate alone: it is 1. No code of this method is published, and whether it has DML's divergence is not known; here it
    has.

    The losses of the first student end in ``_peer_1``, and so on.

    Args:
        students: The students.
        source: "roi" or "cls": what is compared.
        weight: Factor of the divergence.
        heads: For IE-DML one head per student, which compares the student with itself, and of which all factors have
            the same number of channels; else none.
        head_weight: Factor of the heads' losses at an iteration.
        sequential: Whether the students shall be updated one after the other; then an iteration has `turns`.
        flip_channels: Of each student whether its images are in the reversed channel order; None for no student.
        mask_padding: Whether the heads leave out padding.
        task_weight: Factor of the students' own losses.
        configs: Plain config of each student, for whoever evaluates or saves it.
        gradient_shares: When to measure the losses' gradients; None: never.
    """

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
        self.logits = SOURCES[source][0]
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
        for option, allowed in (("SOURCE", tuple(SOURCES)), ("METHOD", METHODS)):
            if node[option] not in allowed:
                raise InputError(f"KD.MUTUAL.{option}: {node[option]!r} is not one of {', '.join(allowed)}.")
        if not 0 <= node.WEIGHT < math.inf:
            raise InputError(f"KD.MUTUAL.WEIGHT: must be finite and 0 or more, got {node.WEIGHT}.")
        if cfg.KD.HEADS or cfg.KD.TEACHER.CONFIG_FILE:
            raise InputError("KD.HEADS and KD.TEACHER: must be empty for MutualStudents, which has no teacher.")
        check_task_weight(cfg)
        names, configs = ["this config", *node.PEERS], load_peer_configs(cfg)
        flip_channels = [is_flipped(cfg, own, (names[0], name)) for name, own in zip(names, configs, strict=True)]
        students = [build_student(cfg)]
        # With the same seed the first student's training must draw the same random numbers with and without peers.
        with torch.random.fork_rng(devices=[]):
            students += [build_network(*peer) for peer in zip(configs[1:], node.PEERS, strict=True)]
            taps = [build_tap(student) for student in students]
            check_classes(node.SOURCE, [tap.spec() for tap in taps], names)
            if node.SOURCE == "roi":
                for tap in taps[1:]:
                    taps[0].check_alignment(tap, [SOURCES[node.SOURCE][0]])
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
        """The first student."""
        return self.students[0]

    @property
    def turns(self) -> int:
        """How many updates an iteration has."""
        return len(self.students) if self.sequential else 1

    @property
    def checkpointables(self) -> dict[str, object]:
        """What lies beside the first student in a checkpoint."""
        peers = {f"peer_{i}": student for i, student in enumerate(self.students, 1) if i > 1}
        return peers | ({"kd_heads": self.heads} if self.heads else {})

    def forward(self, batched_inputs: list[dict], turn: int | None = None):
        """See the first student's forward; in training the losses of all students, or of one.

        Args:
            batched_inputs: As the first student reads them.
            turn: The one student that is to learn, counted from 0; the others then run without gradients.

        Raises:
            FloatingPointError: If a loss is not finite.
        """
        if not self.training:
            return self.student(batched_inputs)
        learning = range(len(self.students)) if turn is None else [turn]
        storage = get_event_storage()
        batch = Batch.from_inputs(batched_inputs, mask_padding=self.mask_padding)
        losses, recorded, groups = {}, [], {}
        for i, (student, tap) in enumerate(zip(self.students, self.taps, strict=True)):
            with ExitStack() as stack:
                if i in learning:
                    stack.enter_context(storage.name_scope(f"peer_{i + 1}"))
                else:  # Its scalars are those of its own turn.
                    stack.enter_context(torch.no_grad())
                    stack.enter_context(EventStorage(storage.iter))
                signals = stack.enter_context(tap.record(self.signals | set(tap.features)))
                found = student(flipped(batched_inputs) if self.flip_channels[i] else batched_inputs)
            recorded.append(signals)
            if i not in learning:
                continue
            found = {key: self.task_weight * loss for key, loss in found.items()}
            groups[i] = {"task": list(found.values())}
            if self.heads and self.heads[i].pretrained:
                found |= self.heads[i].pretrain({}, first_boxes(self.heads[i].boxes, signals)[0], batch)
            losses |= {f"{key}_peer_{i + 1}": loss for key, loss in found.items()}
        weight = self.head_weight(storage.iter)
        if self.heads:
            storage.put_scalar(f"kd/weight/{InheritExploreHead.__name__}", weight, smoothing_hint=False)
        # What runs without gradients runs last: autocast may keep the first low-precision copy of a weight.
        for i in learning:
            own = recorded[i]
            peers = {j: self._on_boxes_of(own, j, peer) for j, peer in enumerate(recorded) if j != i}
            divergences = [mutual_loss(own[self.logits], peer[self.logits]) for peer in peers.values()]
            found = {"loss_kd_mutual": self.weight * sum(divergences) / len(divergences)}
            groups[i]["mutual"] = list(found.values())
            if self.heads:
                with storage.name_scope(f"peer_{i + 1}"):
                    compared = self._inherit_and_explore(i, own, peers, batch, weight)
                groups[i][InheritExploreHead.__name__] = list(compared.values())
                found |= compared
            losses |= {f"{key}_peer_{i + 1}": loss for key, loss in found.items()}
        check_finite(losses, storage.iter)
        for i, group in groups.items():
            if self.gradient_shares.is_due(storage.iter, suffix := f"_peer_{i + 1}"):
                self.gradient_shares.measure(self.students[i], group, suffix)
        return losses

    @torch.no_grad()
    def _on_boxes_of(self, own: Signals, j: int, peer: Signals) -> Signals:
        """A peer's signals, those of boxes computed on the boxes that the student sampled."""
        if not self.box_signals:
            return peer
        with evaluation_mode(self.students[j]):
            return peer | self.taps[j].recompute(peer, self.box_signals, own)

    def _inherit_and_explore(
        self, i: int, own: Signals, peers: Mapping[int, Signals], batch: Batch, weight: float
    ) -> dict[str, Tensor]:
        head = self.heads[i]
        own, *others = first_boxes(head.boxes, own, *peers.values())
        targets = [self.heads[j].teacher_factors(peer, batch) for j, peer in zip(peers, others, strict=True)]
        found = [head.compare(own, target, batch) for target in targets]
        return {key: weight * sum(losses[key] for losses in found) / len(found) for key in found[0]}


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode; afterwards each module is in the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
