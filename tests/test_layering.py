"""Imports point one way: ground <- losses, taps <- heads <- meta_arch <- engine <- analysis <- commands."""

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CONFIG = {"config", "config_files", "config_kinds", "config_checks", "construction", "lazy_configs"}
GROUND = CONFIG | {"errors", "lazy", "registry", "signals", "schedules", "files", "fetching", "class_partition"}
GROUND |= {"checkpoint_files", "unpickling", "formats", "timm_models", "teacher_choices"}
DISTILS = {
    "taps",
    "heads",
    "losses",
    "alignment",
    "timm_teachers",
    "teacher_kinds",
    "teacher",
    "teacher_classes",
    "teacher_weights",
    "averaging",
    "inherit",
    "gradients",
    "gradient_balance",
    "wrapper",
    "meta_arch",
    "peers",
    "mutual",
    "score_weights",
}
CHECKPOINTS = {"checkpoint", "checkpoint_folder"}
BELOW_ENGINE = GROUND | DISTILS | CHECKPOINTS | {"data", "classification", "backbones"}
# What a part of kd_det may import of kd_det beside itself; of `data.x` and `heads.x` the first word counts.
ALLOWED = {
    "losses": set(),
    **dict.fromkeys(GROUND, GROUND),
    **dict.fromkeys(CHECKPOINTS, GROUND | CHECKPOINTS),
    "data": GROUND,
    "backbones": GROUND,
    "classification": GROUND | {"data"},
    "taps": GROUND,
    "heads": GROUND | {"losses"},
    "alignment": GROUND | {"taps"},
    "timm_teachers": GROUND,
    "teacher_kinds": GROUND | CHECKPOINTS | {"timm_teachers"},
    "teacher_weights": GROUND,
    "teacher": GROUND | {"taps", "alignment", "teacher_kinds", "teacher_weights"},
    "averaging": GROUND | {"heads", "losses"},
    "inherit": GROUND | {"taps", "checkpoint"},
    "gradients": GROUND,
    "gradient_balance": GROUND | {"gradients", "heads"},
    "teacher_classes": GROUND | {"teacher_kinds", "data"},
    "wrapper": GROUND | {"heads", "teacher"},
    "meta_arch": GROUND
    | {
        "taps",
        "teacher",
        "heads",
        "losses",
        "averaging",
        "gradients",
        "gradient_balance",
        "wrapper",
        "teacher_classes",
    },
    "peers": GROUND | {"taps", "heads", "checkpoint"},
    "mutual": GROUND | {"taps", "heads", "losses", "gradients", "wrapper", "meta_arch", "peers"},
    "score_weights": GROUND,
    "reporting": GROUND,
    "engine": BELOW_ENGINE | {"reporting"},
    "export": BELOW_ENGINE | {"engine", "reporting"},
    "analysis": BELOW_ENGINE | {"engine", "export", "reporting"},
    "labeling": BELOW_ENGINE | {"engine", "export", "analysis", "reporting"},
    "benchmarking": BELOW_ENGINE | {"engine"},
    "commands": BELOW_ENGINE | {"engine", "export", "analysis", "labeling", "benchmarking"},
    "__main__": {"commands"},
}
ALLOWED_IN_LOSSES = {"torch", "__future__", *sys.stdlib_module_names}


def modules():
    for path in sorted((ROOT / "kd_det").rglob("*.py")):
        parts = path.relative_to(ROOT / "kd_det").with_suffix("").parts
        yield path, parts[0] if parts != ("__init__",) else "kd_det"


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def is_module(name: str) -> bool:
    return ROOT.joinpath(*name.split(".")).with_suffix(".py").is_file()


def imports(path: Path, source: str | None = None) -> set[str]:
    """Dotted names of all modules that a file imports, wherever in the file, relative ones resolved."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(source or path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            # `from kd_det import taps` imports kd_det.taps
            names = {f"{module}.{alias.name}" for alias in node.names}
            found |= names if module == "kd_det" else {name if is_module(name) else module for name in names}
    return found


def breaches(part: str, names: set[str]) -> set[str]:
    """The imports that a part of kd_det may not have."""
    found = {name for name in names if name.split(".")[0] == "tools"}
    if part == "losses":
        outside = {name for name in names if name.split(".")[0] not in ALLOWED_IN_LOSSES | {"kd_det"}}
        found |= outside
    if part in ALLOWED:
        own = {name: name.split(".")[1] for name in names if name.startswith("kd_det.")}
        found |= {name for name, other in own.items() if other != part and other not in ALLOWED[part]}
    return found


@pytest.mark.parametrize(("path", "part"), list(modules()), ids=lambda x: x.stem if isinstance(x, Path) else x)
def test_imports_point_one_way(path, part):
    assert not breaches(part, imports(path))


def test_every_part_has_its_place():
    """A new part of kd_det is to be named in ALLOWED."""
    assert {part for _, part in modules()} - {"kd_det"} == ALLOWED.keys()


def test_modules_do_not_import_each_other_in_a_circle():
    graph = {module_name(path): imports(path) for path, _ in modules()}
    TopologicalSorter({name: found & graph.keys() - {name} for name, found in graph.items()}).prepare()


def test_files_have_names_of_their_own():
    names = [path.name for path, _ in modules() if path.name not in ("__init__.py", "build.py")]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("part", "line"),
    [
        ("losses", "import numpy"),
        ("losses", "from kd_det.errors import InputError"),
        ("losses", "from ..errors import InputError"),
        ("heads", "from kd_det.taps import build_tap"),
        ("heads", "from kd_det.teacher import Teacher"),
        ("heads", "import kd_det.meta_arch"),
        ("heads", "from kd_det import TeacherStudent"),
        ("heads", "def f():\n    from kd_det.engine import Trainer"),
        ("taps", "from kd_det.heads import HintHead"),
        ("taps", "from ..meta_arch import TeacherStudent"),
        ("signals", "from kd_det.losses import hint_loss"),
        ("config", "from kd_det.heads.build import build_kd_heads"),
        ("meta_arch", "from kd_det.engine import Trainer"),
        ("teacher", "from kd_det.meta_arch import TeacherStudent"),
        ("engine", "import tools.train_net"),
    ],
)
def test_breaches_are_found(part, line):
    folder = part if part in ("losses", "heads", "taps") else ""
    assert breaches(part, imports(ROOT / "kd_det" / folder / "made_up.py", line))
