"""Implements the tap of a timm network that teaches by its feature maps."""

from math import log2

from kd_det.registry import TAP_REGISTRY
from kd_det.signals import Signals
from kd_det.taps.backbone import BackboneTap


@TAP_REGISTRY.register()
class TimmFeaturesTap(BackboneTap):
    """Taps the feature maps of a ``TimmFeatures``, which computes only those that are asked for."""

    def stand_ins(self, student: BackboneTap) -> dict[str, str]:
        own = self.strides()
        deepest_first = list(own)[::-1]

        def nearest(stride: int) -> str:
            return min(deepest_first, key=lambda name: abs(log2(own[name] / stride)))

        maps = {name: x for name, x in student.strides().items() if name not in own and not name.endswith("_preact")}
        return {name: nearest(stride) for name, stride in maps.items()}

    def forward(self, batched_inputs: list[dict], names: set[str], student: Signals) -> None:
        self.backbone(self.padded_images(batched_inputs).tensor, names)
