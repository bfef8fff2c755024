"""Trainings whose input was damaged at random: each must train, or end with one line that says what is wrong.

    python tests/fuzz.py --count 2000
    python tests/fuzz.py --seconds 600 --seed 3 --kinds config yaml
    python tests/fuzz.py --case 3:17

The last command repeats case 17 of seed 3 in a folder that it names and leaves. ``tests/test_fuzz.py`` runs cases for
60 seconds, or as many as the environment variable KD_DET_FUZZ_SECONDS says, of seed KD_DET_FUZZ_SEED.

Every case runs in a process of its own, with limits of time and memory, from the command line's arguments to the
evaluation after two iterations. It fails by a traceback, by a signal, by an error in several lines or in none, or by
outlasting the limits.
"""

import argparse
import copy
import json
import multiprocessing
import os
import pickle
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
import yaml
from children import FORKS
from classification.models import classifier_cfg
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from helpers import WIDE, distilled_cfg, save_teacher, tiny_cfg, train_net, write_yaml

from kd_det.config import default_config
from kd_det.config_kinds import leaves
from kd_det.data.shapes import CLASSES
from kd_det.data.shapes_folder import write_shapes
from kd_det.engine import Trainer, stages

CPU_SECONDS, WALL_SECONDS = 60, 240
MEMORY = 4 * 2**30
STEPS = 6
CONFIGS = ("distilled", "staged", "retinanet", "mutual", "classifier")
# Which data they are trained on, if not "coco".
LAYOUTS = {"retinanet": "voc", "classifier": "folder"}
DEFAULTS = default_config()
# Other values of these make a case slow, or reach out of its folder.
SPARED = ("*COMPILE*", "*.PRECISE_BN.NUM_ITER", "*.MARGIN_BATCHES", "MODEL.TIMM.*", "OUTPUT_DIR", "WANDB.*")
VALUES = [
    *(None, True, False, 0, 1, -1, 2, 3, 7, -(10**9), 10**9, 2**31, 2**63, 10**12, 10**30),
    *(0.0, -0.5, 0.5, 1.5, 1e-30, 1e30, -1e30, 1e308, float("nan"), float("inf"), float("-inf")),
    *("", " ", "none", "None", "null", "p2", "p9", "res5", "roi", "BN", "GN", "no such", "no/such.yaml", "~", "~/x"),
    *("é", "a\nb", "\0", "\ud800", "x" * 5000, "[", "{}", "1e5", "0x1F", "../..", ".", "/dev/null"),
    *([], [[]], [None], [0], [-1], [1, 2], [2, 1], [0.5], [float("nan")], [""], ["p2"], ["p2", "p2"], ["res2", "res9"]),
    *([[1], [2]], [[[1]]], [True], {}, {"A": 1}, {"A": {"B": []}}),
]
SNIPPETS = [
    *("\t", ":", "- ", "&a ", "*a", "!!binary x", "!!set {a}", "!!python/name:os.system", "? [a]", "%YAML 9", "---\n"),
    *("<<: *a\n", "{", "[" * 3000, "]", "'", '"', "|\n", "2020-01-01", "0o7", "~", "\0", "\xff", "\u2028", "#"),
    *(
        "_BASE_: config.yaml\n",
        "_BASE_: [teacher.yaml, distilled.yaml]\n",
        "_BASE_: 3\n",
        "_BASE_: []\n",
        "_BASE_: .\n",
    ),
    *("_BASE_: x.py\n", "VERSION: 1\n", "VERSION: 99\n", "3: 4\n", "MODEL:\n", "KD: 3\n", "null: 1\n", "A.B: 1\n"),
]
# Other tensors in place of one.
TENSORS: list[Callable[[torch.Tensor], Any]] = [
    torch.Tensor.half,
    torch.Tensor.double,
    torch.Tensor.int,
    lambda tensor: tensor.to(torch.complex64),
    lambda tensor: tensor[:0],
    lambda tensor: tensor.flatten(),
    lambda tensor: tensor.unsqueeze(0),
    lambda tensor: torch.full_like(tensor, -1),
    lambda tensor: tensor.float() * float("nan"),
    lambda tensor: tensor.to_sparse(),
    lambda tensor: tensor.to("meta"),
    lambda tensor: tensor.tolist(),
    lambda tensor: tensor.numpy(),
]


def is_spared(key: str) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in SPARED)


# ---- Sound input ----
def prepare(root: Path) -> None:
    """Write the sound files that cases begin with: data sets, a teacher, checkpoints, configs and a run to resume."""
    write_shapes(root / "data", train=3, test=2, size=64)
    for split in ("train", "test"):
        for i, path in enumerate(sorted((root / "data/JPEGImages").iterdir())):
            folder = root / "data" / split / "abc"[i % 3]
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, folder)
    options = {"MODEL.ROI_HEADS.NUM_CLASSES": len(CLASSES), "MODEL.RETINANET.NUM_CLASSES": len(CLASSES)}
    teacher = {key: Path(path).name for key, path in save_teacher(root, tiny_cfg(options=options | WIDE)).items()}
    torch.save({"model": build_model(tiny_cfg(options=options)).state_dict()}, root / "student.pth")
    write_yaml(root / "peer.yaml", tiny_cfg(options=options))
    configs = {
        "distilled": distilled_cfg(teacher, ["HintHead", "SoftTargetHead"], options),
        "staged": distilled_cfg(teacher, ["InheritExploreHead"], options | {"KD.PRETRAIN.MAX_ITER": 1}),
        "retinanet": tiny_cfg("retinanet", options),
        "mutual": tiny_cfg(options=options | {"KD.MUTUAL.PEERS": ["peer.yaml"]}),
        "classifier": classifier_cfg(options={"SOLVER.MAX_ITER": 2}),
    }
    configs["mutual"].MODEL.META_ARCHITECTURE = "MutualStudents"
    for name, cfg in configs.items():
        write_yaml(root / f"{name}.yaml", with_data(cfg, LAYOUTS.get(name, "coco")))
    for name, output in (("distilled", "run"), ("staged", "stage")):
        options = ["SOLVER.CHECKPOINT_PERIOD", "1", "OUTPUT_DIR", output]
        status, text = run_child(root, ["--config-file", f"{name}.yaml", *options])
        assert status == 0, text
    shutil.move(root / "stage/pretrain/model_final.pth", root / "stage.pth")
    shutil.rmtree(root / "stage")


def with_data(cfg: CfgNode, layout: str) -> CfgNode:
    """Train and test on the data of :func:`prepare`, and do nothing that takes long."""
    for split in ("train", "test"):
        coco = {"JSON": f"data/coco/instances_{split}.json", "IMAGE_ROOT": "data/JPEGImages"}
        cfg.DATASETS.COCO_FORMAT[f"coco_{split}"] = CfgNode(coco)
        voc = {"ROOT": "data", "SPLIT": split, "CLASSES": list(CLASSES)}
        cfg.DATASETS.VOC_FORMAT[f"voc_{split}"] = CfgNode(voc)
        cfg.DATASETS.IMAGE_FOLDER[f"folder_{split}"] = CfgNode({"ROOT": f"data/{split}"})
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (f"{layout}_train",), (f"{layout}_test",)
    cfg.TEST.PRECISE_BN.NUM_ITER = cfg.KD.OVERHAUL.MARGIN_BATCHES = 1
    cfg.MODEL.TIMM.PRETRAINED = False
    cfg.OUTPUT_DIR = "output"
    return cfg


# ---- Damage ----
def damage_value(rng: random.Random, value: Any) -> Any:
    """Another value, of any kind or close to what was there."""
    chance = rng.random()
    if chance < 0.6:
        alike = [other for other in VALUES if type(other) is type(value)] if chance < 0.35 else []
        return copy.deepcopy(rng.choice(alike or VALUES))
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return rng.choice([value + 1, value - 1, -value, value * 1000, float(value), str(value)])
    if isinstance(value, str):
        return rng.choice([value[1:], value + "x", value.upper(), value.lower(), f" {value}", [value]])
    if isinstance(value, list | tuple):
        value = list(value)
        return rng.choice([value * 2, value[1:], value[::-1], [value], [*value, None], [*value, "x"], [*value, -1]])
    return copy.deepcopy(rng.choice(VALUES))


def damage_tree(rng: random.Random, tree: Any) -> Any:
    """Change, remove or double one value somewhere in nested mappings and lists, at any depth."""
    places = list(walk(tree))
    if not places:
        return damage_value(rng, tree)
    node, key = rng.choice(places)
    kind = rng.random()
    if kind < 0.7:
        node[key] = damage_value(rng, node[key])
    elif kind < 0.9:
        del node[key]
    elif isinstance(node, list):
        node.append(copy.deepcopy(node[key]))
    else:
        node[rng.choice(["", "x", f"{key}x"])] = node[key]
    return tree


def walk(tree: Any) -> Iterator[tuple[Any, Any]]:
    """All containers in a tree, with each of their keys."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in list(items):
        yield tree, key
        yield from walk(value)


def damage_bytes(rng: random.Random, data: bytes) -> bytes:
    """Truncate, flip bits, blank, insert or append."""
    at = rng.randrange(len(data)) if data else 0
    kind = rng.randrange(6)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data + rng.randbytes(rng.choice([1, 100]))
    if kind == 2:
        return data[:at] + bytes(min(len(data) - at, rng.choice([1, 64, 4096]))) + data[at + 4096 :]
    if kind == 3:
        return data[:at] + rng.choice(SNIPPETS).encode("utf-8", "replace") + data[at:]
    if kind == 4:
        return data[: at // 2] + data[at:]
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 8])):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def damage_file(rng: random.Random, path: Path) -> None:
    path.write_bytes(damage_bytes(rng, path.read_bytes()))


# ---- Kinds of cases: each damages files in the folder and gives the arguments ----
def damaged_config(rng: random.Random, folder: Path) -> list[str]:
    """Values of any keys of Detectron2 and kd_det, in the run's config, its teacher's or peer's, or as overrides."""
    name = rng.choice(CONFIGS)
    arguments = ["--config-file", f"{name}.yaml"]
    other = {"distilled": "teacher", "staged": "teacher", "mutual": "peer"}.get(name, name)
    target = folder / f"{rng.choice([name, name, name, other])}.yaml"
    tree = yaml.safe_load(target.read_text(encoding="utf-8"))
    keys = [(key, value) for key, value, _ in leaves(CfgNode(tree), DEFAULTS) if not is_spared(key)]
    own = [
        (key, value) for key, value in keys if key.startswith(("KD.", "SOLVER.", "INPUT.", "MODEL.RPN", "MODEL.ROI"))
    ]
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        key, value = rng.choice(rng.choice([keys, own]))
        value = damage_value(rng, value)
        if rng.random() < 0.3 and value != "":
            arguments += [key, str(value).replace("\0", "").encode("utf-8", "replace").decode()]
            continue
        *parents, last = key.split(".")
        node = tree
        for parent in parents:
            node = node[parent]
        node[last] = value
        if rng.random() < 0.1:
            node[rng.choice(["X", 3, "", "A.B", last.lower()])] = value
    target.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8", errors="surrogatepass")
    return arguments


def damaged_yaml(rng: random.Random, folder: Path) -> list[str]:
    """The text of the YAML file, not only its values."""
    name = rng.choice(CONFIGS)
    path = folder / f"{name}.yaml"
    for _ in range(rng.choice([1, 1, 3])):
        text = path.read_bytes()
        lines = text.splitlines(keepends=True)
        if rng.random() < 0.3 or not lines:
            path.write_bytes(damage_bytes(rng, text))
            continue
        at = rng.randrange(len(lines))
        kind = rng.randrange(4)
        if kind == 0:
            lines.insert(at, rng.choice(SNIPPETS).encode("utf-8", "replace"))
        elif kind == 1:
            lines[at] = b" " * rng.randrange(9) + lines[at].lstrip()
        elif kind == 2:
            lines[at : at + rng.randrange(1, 9)] = []
        else:
            lines[at] = lines[at].split(b":")[0] + b": " + rng.choice(SNIPPETS).encode("utf-8", "replace") + b"\n"
        path.write_bytes(b"".join(lines))
    return ["--config-file", path.name]


def damaged_coco(rng: random.Random, folder: Path) -> list[str]:
    """The annotation file of the training or the test set, as text or as what is in it."""
    path = folder / f"data/coco/instances_{rng.choice(['train', 'test'])}.json"
    if rng.random() < 0.2:
        damage_file(rng, path)
    else:
        tree = json.loads(path.read_text())
        for _ in range(rng.choice([1, 1, 2])):
            part = rng.choice(["images", "annotations", "categories", ""]) if isinstance(tree, dict) else ""
            if part and part in tree:
                tree[part] = damage_tree(rng, tree[part])
            else:
                tree = damage_tree(rng, tree)
        path.write_text(json.dumps(tree))
    return ["--config-file", "distilled.yaml", "MODEL.MASK_ON", str(rng.random() < 0.7)]


def damaged_voc(rng: random.Random, folder: Path) -> list[str]:
    """An annotation file, or the list of the images, of a VOC set."""
    path = rng.choice([*(folder / "data/Annotations").iterdir(), *(folder / "data/ImageSets/Main").iterdir()])
    if path.suffix == ".txt" or rng.random() < 0.2:
        damage_file(rng, path)
    else:
        root = ElementTree.parse(path).getroot()
        for _ in range(rng.choice([1, 1, 2])):
            parent = rng.choice([node for node in root.iter() if len(node)] or [root])
            if not len(parent):
                break
            node = rng.choice(list(parent))
            kind = rng.randrange(4)
            if kind == 0:
                parent.remove(node)
            elif kind == 1:
                parent.append(copy.deepcopy(node))
            elif kind == 2:
                node.tag = rng.choice(["x", "name", "bndbox", "object", "size"])
            else:
                node.text = re.sub("[\0\ud800]", "", str(damage_value(rng, node.text or "")))
        path.write_bytes(ElementTree.tostring(root, encoding=rng.choice(["utf-8", "utf-16", "latin-1"])))
    return ["--config-file", "retinanet.yaml"]


def damaged_checkpoint(rng: random.Random, folder: Path) -> list[str]:
    """A student's, teacher's or stage's weights, or a run that is resumed."""
    role = rng.choice(["MODEL.WEIGHTS", "KD.TEACHER.WEIGHTS", "--resume", "KD.PRETRAIN.WEIGHTS"])
    name = {"MODEL.WEIGHTS": "student.pth", "KD.TEACHER.WEIGHTS": "teacher.pth"}.get(role, "output/model_0000000.pth")
    path = folder / name
    arguments = ["--config-file", f"{'staged' if role == 'KD.PRETRAIN.WEIGHTS' else 'distilled'}.yaml"]
    if role == "--resume":
        shutil.copytree(folder / "run", folder / "output")
        (folder / "output/last_checkpoint").write_text("model_0000000.pth")
        arguments += ["--resume"]
        if rng.random() < 0.2:
            path = rng.choice([x for x in (folder / "output").iterdir() if x.is_file()])
    elif role == "KD.PRETRAIN.WEIGHTS":
        path = folder / "stage.pth"
    if path.suffix != ".pth" or rng.random() < 0.4:
        damage_file(rng, path)
    else:
        damage_checkpoint(rng, path)
    return arguments + ([] if role == "--resume" else [role, path.name])


def damage_checkpoint(rng: random.Random, path: Path) -> None:
    """Damage what is in a checkpoint, which stays a sound file of some format."""
    tree = torch.load(path, weights_only=True)
    for _ in range(rng.choice([1, 1, 2])):
        places = [(node, key) for node, key in walk(tree) if isinstance(node[key], torch.Tensor)]
        if places and rng.random() < 0.5:
            node, key = rng.choice(places)
            tensor = node[key]
            node[key] = rng.choice([*TENSORS])(tensor)
        else:
            tree = damage_tree(rng, tree)
    if rng.random() < 0.2:
        with path.open("wb") as file:
            pickle.dump(tree, file)
    else:
        torch.save(tree, path, _use_new_zipfile_serialization=rng.random() < 0.8)


KINDS: dict[str, Callable[[random.Random, Path], list[str]]] = {
    "config": damaged_config,
    "yaml": damaged_yaml,
    "coco": damaged_coco,
    "voc": damaged_voc,
    "checkpoint": damaged_checkpoint,
}


# ---- Cases ----
@dataclass(frozen=True)
class Outcome:
    """What became of a case.

    Attributes:
        name: The case, as ``--case`` takes it.
        kind: What was damaged.
        verdict: "trained", "told" (in one line), "traceback", "hang" or "died".
        arguments: Of the training.
        text: What it printed.
    """

    name: str
    kind: str
    verdict: str
    arguments: list[str]
    text: str

    @property
    def failed(self) -> bool:
        return self.verdict not in ("trained", "told")

    def __str__(self) -> str:
        lines = "\n    ".join(self.text.splitlines()[-12:])
        return (
            f"{self.verdict}: {self.kind}; python tests/fuzz.py --case {self.name}\n"
            f"    {' '.join(self.arguments)[:500]}\n    {lines}"
        )


def run_case(seed: int, index: int, root: Path, folder: Path, kinds: Sequence[str] = tuple(KINDS)) -> Outcome:
    """Damage something in a copy of what :func:`prepare` wrote, and train with it."""
    rng = random.Random(f"{seed}:{index}")
    kind = kinds[index % len(kinds)]
    shutil.copytree(root, folder)
    arguments = KINDS[kind](rng, folder)
    status, text = run_child(folder, arguments)
    return Outcome(f"{seed}:{index}", kind, judge(status, text), arguments, text)


def judge(status: int | None, text: str) -> str:
    """The verdict on an exit status, None if it was killed for outlasting a limit, and what was printed."""
    if status in (None, -signal.SIGXCPU):
        return "hang"
    if "Traceback" in text:
        return "traceback"
    if status == 0:
        return "trained"
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    if status == 1 and len(errors) == 1 and text.splitlines()[-1] == errors[0]:
        return "told"
    return "died"


def run_child(folder: Path, arguments: list[str]) -> tuple[int | None, str]:
    """Train in a process of its own: its exit status, None if it was killed, and what it printed."""
    process = FORKS.Process(target=_train, args=(folder, arguments))
    process.start()
    process.join(WALL_SECONDS)
    status = process.exitcode
    if status is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()
    return status, (folder / "printed.txt").read_text(encoding="utf-8", errors="replace")


def _train(folder: Path, arguments: list[str]) -> None:
    os.setsid()
    os.chdir(folder)
    sys.stdout = sys.stderr = open("printed.txt", "w", buffering=1, errors="backslashreplace")  # noqa: SIM115
    os.dup2(sys.stderr.fileno(), 1)
    os.dup2(sys.stderr.fileno(), 2)
    os.environ |= {"DETECTRON2_DATASETS": ".", "HF_HUB_OFFLINE": "1", "HOME": str(folder)}
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 5))
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # Of data loaders, as in a training that nobody forked.
    stages.log_summary = lambda *_, **__: None  # It takes a third of such a training's time.
    step, left = Trainer.run_step, iter(range(STEPS))

    def run_step(trainer: Trainer) -> None:
        if next(left, None) is None:
            sys.exit()  # Long runs are legal.
        step(trainer)

    Trainer.run_step = run_step
    train_net(*arguments)


def run_cases(seed: int, count: int, seconds: float, kinds: Sequence[str] = tuple(KINDS)) -> list[Outcome]:
    """Run the first cases of a seed, up to a number or for some time; prints failures and counts."""
    begin, outcomes = time.monotonic(), []
    with tempfile.TemporaryDirectory() as folder:
        root, case = Path(folder, "sound"), Path(folder, "case")
        prepare(root)
        for index in range(count):
            if time.monotonic() - begin > seconds:
                break
            outcomes.append(run_case(seed, index, root, case, kinds))
            shutil.rmtree(case, ignore_errors=True)
            if outcomes[-1].failed:
                print(outcomes[-1], flush=True)
    for (kind, verdict), number in sorted(Counter((x.kind, x.verdict) for x in outcomes).items()):
        print(f"{kind:12}{verdict:12}{number:6}")
    print(f"{len(outcomes)} cases of seed {seed}, {sum(x.failed for x in outcomes)} failed")
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000, help="number of cases (%(default)s)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="time after which no new case begins")
    parser.add_argument("--seed", type=int, default=0, help="%(default)s")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="kinds of cases (all)")
    parser.add_argument("--case", metavar="SEED:INDEX", help="repeat this one; give --kinds as they were")
    args = parser.parse_args()
    if args.case:
        folder = Path(tempfile.mkdtemp())
        prepare(folder / "sound")
        print(run_case(*map(int, args.case.split(":")), folder / "sound", folder / "case", args.kinds))
        print(folder / "case")
        return
    outcomes = run_cases(args.seed, args.count, args.seconds, args.kinds)
    sys.exit(any(outcome.failed for outcome in outcomes))


if __name__ == "__main__":
    main()
