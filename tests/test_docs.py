"""The documentation agrees with the code: the reference has all keys, and links lead somewhere."""

import ast
import re
import sys

import pytest
from detectron2.config import CfgNode, get_cfg
from helpers import ROOT

from kd_det import KD_HEAD_REGISTRY
from kd_det.config import HEAD_KEYS, default_config, look_up
from kd_det.registry import config_key

PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "datasets/README.md")]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
# [text](target), ![text](target) and ``` {literalinclude} target; a target may have an anchor.
LINK = re.compile(r"\]\(([^)\s]+)\)|^```\{(?:literal)?include\} (\S+)$", re.MULTILINE)


@pytest.fixture(scope="module")
def reference():
    """Maps each key of the reference's pages to its default and its comment."""
    sys.path.insert(0, str(ROOT / "docs" / "_extensions"))
    from config_reference import general_keys, head_keys

    sys.path.pop(0)
    sections = general_keys() | head_keys()
    return {name: (default, comment) for keys in sections.values() for name, default, comment in keys}


def flat(node, prefix=""):
    """Yields the full name of each key in a config that has a value."""
    for name, value in node.items():
        whole = isinstance(value, CfgNode) and value and name != "SCHEDULE"
        yield from flat(value, f"{prefix}{name}.") if whole else [f"{prefix}{name}"]


def test_every_key_has_a_default_and_a_comment_in_the_reference(reference):
    cfg = default_config()
    plugins = {config_key(name) for name, head in KD_HEAD_REGISTRY if not head.__module__.startswith("kd_det.")}
    nodes = {config_key(name) for name, _ in KD_HEAD_REGISTRY} - plugins
    added = {name for name in flat(cfg) if name.split(".")[:2] not in [["KD", node] for node in plugins]}
    added -= set(flat(get_cfg()))
    common = {f"KD.{node}.{key}" for node in nodes for key in HEAD_KEYS}
    listed = {name for name in reference if "<HEAD>" not in name}
    assert added - common == listed - common
    assert {f"KD.<HEAD>.{key}" for key in HEAD_KEYS} == reference.keys() - listed
    assert not [name for name, (_, comment) in reference.items() if not comment]
    for name in listed:
        assert ast.literal_eval(reference[name][0]) == look_up(cfg, name), name


def anchors(path):
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_something(page):
    for groups in LINK.findall(page.read_text()):
        target, _, anchor = "".join(groups).partition("#")
        if not re.match(r"[a-z]+:", target):
            path = page.parent / target if target else page
            assert path.exists(), target
            assert not anchor or anchor in anchors(path), f"{target}#{anchor}"
