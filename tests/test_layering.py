"""Imports point one way: losses <- heads <- meta_arch <- engine <- tools; signals, config and their like are leaves."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LEAVES = {"errors", "registry", "signals", "config", "schedules", "files", "formats"}
# What a part of kd_det may import of kd_det beside itself; of `data.x` and `heads.x` the first word counts.
ALLOWED = {
    "losses": set(),
    **dict.fromkeys(LEAVES, LEAVES),
    "similarity": {"errors"},
    "concepts": {"errors"},
    "checkpoint": LEAVES,
    "data": LEAVES,
    "backbones": LEAVES,
    "classification": LEAVES | {"data"},
    "ema": LEAVES,
    "evaluation": LEAVES | {"data", "classification"},
    "taps": LEAVES,
    "heads": LEAVES | {"losses"},
    "teacher": LEAVES | {"taps", "checkpoint"},
    "ensemble": LEAVES | {"taps"},
    "flops": {"ensemble"},
    "gradients": LEAVES,
    "meta_arch": LEAVES | {"taps", "teacher", "heads", "losses", "gradients"},
    "peers": LEAVES | {"taps", "heads", "checkpoint"},
    "mutual": LEAVES | {"taps", "heads", "losses", "gradients", "meta_arch", "peers"},
}
# These stand above all of them; nothing below may import them.
ABOVE = {
    "accumulation",
    "hooks",
    "interruption",
    "launching",
    "engine",
    "sanity",
    "stages",
    "summary",
    "export",
    "comparison",
    "pictures",
    "visualization",
    "writers",
    "benchmarking",
}
ALLOWED_IN_LOSSES = {"torch", "__future__", *sys.stdlib_module_names}


def modules():
    for path in sorted((ROOT / "kd_det").rglob("*.py")):
        parts = path.relative_to(ROOT / "kd_det").with_suffix("").parts
        yield path, parts[0] if parts != ("__init__",) else "kd_det"


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
            found |= {f"{module}.{alias.name}" for alias in node.names} if module == "kd_det" else {module}
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
    """A new part of kd_det is to be named in ALLOWED or in ABOVE."""
    parts = {part for _, part in modules()} - {"kd_det"}
    assert parts - ALLOWED.keys() <= ABOVE


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
