"""Writes interrupted runs with the code of an earlier commit: what ``tests/test_earlier_runs.py`` resumes.

    git worktree add --detach ../earlier COMMIT
    python tests/earlier_runs/write_runs.py ../earlier tests/earlier_runs/COMMIT.tar.xz

The runs are of two iterations out of four, as a kill leaves them; the earlier code itself then resumes a copy of each,
and the losses that it logs at the end are kept as ``expected.json``.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import cv2
import numpy as np
import torch
import yaml

LEVELS = ["p2", "p3", "p4", "p5"]
DETECTOR = {
    "VERSION": 2,
    "SEED": 7,
    "MODEL": {
        "DEVICE": "cpu",
        "WEIGHTS": "",
        "PIXEL_STD": [57.375, 57.12, 58.395],
        "BACKBONE": {"NAME": "build_basic_resnet_fpn_backbone", "FREEZE_AT": 0},
        "RESNETS": {"DEPTH": 10, "NORM": "BN", "STEM_OUT_CHANNELS": 2, "RES2_OUT_CHANNELS": 1},
        "FPN": {"IN_FEATURES": ["res2", "res3", "res4", "res5"], "OUT_CHANNELS": 4},
        "ANCHOR_GENERATOR": {"SIZES": [[8], [16], [32], [64]], "ASPECT_RATIOS": [[1.0]]},
        "RPN": {"IN_FEATURES": LEVELS, "BATCH_SIZE_PER_IMAGE": 16, "POST_NMS_TOPK_TRAIN": 20},
        "ROI_HEADS": {"NAME": "StandardROIHeads", "IN_FEATURES": LEVELS, "NUM_CLASSES": 2, "BATCH_SIZE_PER_IMAGE": 16},
        "ROI_BOX_HEAD": {"NAME": "FastRCNNConvFCHead", "NUM_FC": 1, "FC_DIM": 8, "POOLER_RESOLUTION": 2},
    },
    "DATASETS": {
        "TRAIN": ["blocks"],
        "TEST": [],
        "COCO_FORMAT": {"blocks": {"JSON": "blocks.json", "IMAGE_ROOT": "."}},
    },
    "INPUT": {"MIN_SIZE_TRAIN": [64], "MAX_SIZE_TRAIN": 96, "MIN_SIZE_TEST": 64, "MAX_SIZE_TEST": 96},
    "DATALOADER": {"NUM_WORKERS": 0},
    "SOLVER": {"IMS_PER_BATCH": 2, "BASE_LR": 0.05, "WARMUP_ITERS": 0, "MAX_ITER": 4, "CHECKPOINT_PERIOD": 2},
}
TEACHER = {"MODEL": {"RESNETS": {"RES2_OUT_CHANNELS": 2}, "FPN": {"OUT_CHANNELS": 6}}}
DISTILLED = {
    "MODEL": {"META_ARCHITECTURE": "TeacherStudent"},
    "KD": {
        "STUDENT_ARCHITECTURE": "GeneralizedRCNN",
        "TEACHER": {"CONFIG_FILE": "teacher.yaml", "WEIGHTS": "teacher.pth"},
    },
}
RUNS = {
    # Heads with adapters and without, gradients of half batches, momentum, and an average of the weights.
    "heads": DISTILLED
    | {
        "SOLVER": {"ACCUMULATE": 2, "EMA_DECAY": 0.9},
        "KD": DISTILLED["KD"]
        | {
            "HEADS": ["ReviewKDHead", "HintHead", "SoftTargetHead"],
            "MASK_PADDING": True,
            "REVIEW": {"IN_FEATURES": LEVELS, "MID_CHANNELS": 4},
            "HINT": {"IN_FEATURES": ["res3"], "REGRESSOR": "rectified", "SCHEDULE": {"WARMUP": 3}},
        },
    },
    # Killed within the stage before the main run.
    "stage": DISTILLED
    | {
        "KD": DISTILLED["KD"]
        | {
            "HEADS": ["FactorTransferHead", "OverhaulHead"],
            "FACTOR_TRANSFER": {"IN_FEATURES": ["p3"]},
            "OVERHAUL": {"IN_FEATURES": ["res2"], "MARGIN": "estimate"},
            "PRETRAIN": {"MAX_ITER": 4, "BASE_LR": 0.05},
        },
    },
    "mutual": {
        "MODEL": {"META_ARCHITECTURE": "MutualStudents"},
        "KD": {
            "STUDENT_ARCHITECTURE": "GeneralizedRCNN",
            "MUTUAL": {"PEERS": ["teacher.yaml"], "OPTS": ["MODEL.RESNETS.RES2_OUT_CHANNELS", 1]},
        },
    },
}


def merged(base: dict, change: dict) -> dict:
    both = {key: merged(base[key], value) for key, value in change.items() if isinstance(base.get(key), dict)}
    return base | change | both


def write_yaml(path: Path, *parts: dict) -> None:
    config = {}
    for part in parts:
        config = merged(config, part)
    path.write_text(yaml.safe_dump(config), encoding="utf-8")


def write_images(folder: Path) -> None:
    """Writes four images of two sizes, of a dark and a bright block each, and their annotations."""
    data = {
        "images": [],
        "annotations": [],
        "categories": [{"id": i, "name": name} for i, name in ((1, "dark"), (2, "bright"))],
    }
    for i in range(1, 5):
        width, height = (96, 64) if i % 2 else (64, 64)
        pixels = np.full((height, width, 3), 128, np.uint8)
        data["images"].append({"id": i, "file_name": f"{i}.png", "width": width, "height": height})
        for category, (x, y, side) in ((1, (4 + 2 * i, 6, 24)), (2, (34, 4 + 3 * i, 26))):
            pixels[y : y + side, x : x + side] = [40 * category, 250 * (category - 1), 60 * i]
            box = {"bbox": [x, y, side, side], "area": side * side, "iscrowd": 0}
            data["annotations"].append({"id": 2 * i + category, "image_id": i, "category_id": category, **box})
        cv2.imwrite(str(folder / f"{i}.png"), pixels)
    (folder / "blocks.json").write_text(json.dumps(data), encoding="utf-8")


def train(checkout: Path, folder: Path, *arguments: str) -> None:
    command = [sys.executable, str(checkout.resolve() / "tools" / "train_net.py"), *arguments]
    environment = os.environ | {"PYTHONPATH": str(checkout.resolve()), "DETECTRON2_DATASETS": "."}
    subprocess.run(command, cwd=folder, check=True, env=environment)


def last_line(metrics: Path) -> dict:
    """Returns the losses and the learning rate that a run logged last."""
    values = json.loads(metrics.read_text().splitlines()[-1])
    return {key: value for key, value in values.items() if "loss" in key or key in ("iteration", "lr")}


def kill(run: Path, *, stage: bool) -> None:
    """Leaves of a finished run what it had after two iterations, or after two of the stage before it."""
    stopped = run / "pretrain" if stage else run
    left = {path: path.read_bytes() for path in (run / "config.yaml", stopped / "model_0000001.pth")}
    shutil.rmtree(run)
    stopped.mkdir(parents=True)
    for path, content in left.items():
        path.write_bytes(content)
    (stopped / "last_checkpoint").write_text("model_0000001.pth")


def write(checkout: Path, folder: Path) -> None:
    """Writes the data set, the teacher, the interrupted runs, and what they log at their ends."""
    write_images(folder)
    write_yaml(folder / "teacher.yaml", DETECTOR, TEACHER, {"OUTPUT_DIR": "plain"})
    train(checkout, folder, "--config-file", "teacher.yaml")
    weights = torch.load(folder / "plain" / "model_final.pth", weights_only=True)["model"]
    torch.save({"model": weights}, folder / "teacher.pth")
    shutil.rmtree(folder / "plain")
    expected = {}
    for name, change in RUNS.items():
        write_yaml(folder / f"{name}.yaml", DETECTOR, change, {"OUTPUT_DIR": name})
        train(checkout, folder, "--config-file", f"{name}.yaml")
        (folder / f"{name}.yaml").unlink()
        kill(folder / name, stage="PRETRAIN" in change["KD"])
        with tempfile.TemporaryDirectory() as scratch:
            copy = shutil.copytree(folder, Path(scratch, "copy"))
            train(checkout, copy, "--config-file", f"{name}/config.yaml", "--resume")
            for path in (copy / name).rglob("metrics.json"):
                expected[str(path.relative_to(copy))] = last_line(path)
    (folder / "expected.json").write_text(json.dumps(expected, indent=2), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="the earlier code")
    parser.add_argument("archive", type=Path, help="the .tar.xz to write")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write(args.checkout, Path(folder))
        with tarfile.open(args.archive, "w:xz", preset=9) as archive:
            archive.add(folder, ".")


if __name__ == "__main__":
    main()
