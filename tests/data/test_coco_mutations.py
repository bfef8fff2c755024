"""Whatever a COCO file holds, it is either trained on and evaluated as it should be, or refused in one line."""

import json
import math
import random

import pytest
from helpers import tiny_cfg, write_coco_folder

from kd_det.errors import InputError

from .coco_mutations import define, forget, mutate, use, write

CONFIGS = {
    "boxes": {"MODEL.MASK_ON": False},
    "polygons": {},
    "bitmasks": {"INPUT.MASK_FORMAT": "bitmask"},
    "keypoints": {
        "MODEL.MASK_ON": False,
        "MODEL.KEYPOINT_ON": True,
        "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS": 2,
        "TEST.KEYPOINT_OKS_SIGMAS": [0.1, 0.1],
    },
}
SEEDS = {"boxes": range(50), "polygons": range(50, 90), "bitmasks": range(90, 120), "keypoints": range(120, 150)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_coco_folder(tmp_path_factory.mktemp("mutations") / "data")


@pytest.fixture(scope="module")
def data(folder):
    """Masks of all kinds, keypoints and a crowd."""
    data = json.loads((folder / "instances.json").read_text())
    for category in data["categories"]:
        category["keypoints"] = ["left", "right"]
    for annotation in data["annotations"]:
        annotation |= {"keypoints": [10, 10, 2, 12.5, 12, 1], "num_keypoints": 2}
    data["annotations"][1]["iscrowd"] = 1
    data["annotations"][1]["segmentation"] = {"size": [64, 96], "counts": [10, 20, 6114]}
    return data


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "seeds"), SEEDS.items(), ids=str)
def test_mutations(folder, data, tmp_path, capsys, kind, seeds):
    refused = 0
    for seed in seeds:
        mutant = mutate(data, random.Random(seed))
        cfg = tiny_cfg(options=CONFIGS[kind] | {"OUTPUT_DIR": str(tmp_path)})
        name = define(cfg, write(tmp_path / f"{seed}.json", mutant), folder / "images")
        message = results = None
        try:
            results = use(cfg, name)
        except InputError as error:
            message = str(error)
        except Exception as error:
            pytest.fail(f"seed {seed}: {error!r}")
        finally:
            forget(name)
        if message:
            refused += 1
            assert "\n" not in message, seed
            assert name in message or "MODEL." in message, seed
        else:
            assert math.isnan(results["bbox"]["AP"]) or results["bbox"]["AP"] == pytest.approx(100), seed
    assert len(seeds) / 8 < refused < len(seeds)
