"""No file that a user names runs code, writes outside the cache, or corrupts memory: a test for each way in.

What is promised stands in docs/security.md.
"""

import contextlib
import os
import pickle
import threading
import zipfile
from collections import OrderedDict
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2 import model_zoo
from helpers import build, parse, tiny_cfg, train_net, with_data, write_yaml

from kd_det import InputError, build_teacher
from kd_det.analysis.runs import load_runs
from kd_det.checkpoint import KDCheckpointer, load_strictly
from kd_det.config import merge_file
from kd_det.config_files import find_config
from kd_det.data.proposals import read_proposals
from kd_det.engine.stages import load_stage
from kd_det.fetching import fetch
from kd_det.peers import load_peer_configs
from kd_det.unpickling import load_arrays


class Hostile:
    """Makes a folder when it is unpickled."""

    def __init__(self, canary):
        self.canary = str(canary)

    def __reduce__(self):
        return os.mkdir, (self.canary,)


@pytest.fixture
def canary(tmp_path):
    """A folder that only code of a file would make."""
    path = tmp_path / "canary"
    yield path
    assert not path.exists()


@pytest.fixture
def plain():
    return build(tiny_cfg())


# ---- URLs ----
@pytest.fixture
def host(tmp_path, monkeypatch):
    """A web server that answers every request with `content`, and a cache in the test's folder."""
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            server.requests.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", str(len(server.content)))
            self.end_headers()
            self.wfile.write(server.content)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.requests, server.content = [], b"SEED: 5"
        server.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def test_a_url_is_kept_in_the_cache(host, tmp_path):
    local = fetch(f"{host.url}/a/b.yaml", "K")
    assert Path(local) == tmp_path / "cache" / "a" / "b.yaml"
    assert Path(local).read_bytes() == b"SEED: 5"


ESCAPES = [
    "/../../pwned/a.pth",
    "/a/../../../pwned/a.pth",
    "/..",
    "/a/%2e%2e/%2E%2e/pwned/a.pth",
    "/a/%252e%252e/pwned/a.pth",
    "/a/..%2f..%2fpwned/a.pth",
    "/a\\..\\..\\pwned\\a.pth",
    "/a/.\t./.\t./.\t./pwned/a.pth",
    "/a/.\n./.\n./.\n./pwned/a.pth",
    "/a/../../../pwned/a.pth?x=1",
    "/a?x=/..",
    "/a#/..",
    "/a/..;x/../pwned",
]


@pytest.mark.parametrize("path", ESCAPES)
def test_a_url_that_leaves_the_cache_is_refused(host, tmp_path, path):
    with pytest.raises(InputError, match=r"^K: .* is refused: a URL may not hold '\.\.'") as error:
        fetch(f"{host.url}{path}", "K")
    assert "\n" not in str(error.value)
    assert not host.requests
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("url", ["detectron2://../../pwned/a.pkl", "ftp://host/../../a.pth", "https://h/%2e%2e/a"])
def test_other_schemes_that_leave_the_cache_are_refused(url):
    with pytest.raises(InputError, match=r"^K: .* is refused: a URL may not hold '\.\.'"):
        fetch(url, "K")


@pytest.mark.parametrize("url", ["file:///etc/passwd", "HTTP://host/a", "s3://bucket/a", "local-dir://a"])
def test_unknown_schemes_are_refused(url):
    with pytest.raises(InputError, match=r"^K: .*:// is not supported; give a path, or a URL of http, https, ftp, det"):
        fetch(url, "K")


def test_a_name_that_the_catalog_lacks():
    with pytest.raises(InputError, match=r"^K: catalog://\.\./x cannot be fetched|^K: .* is refused"):
        fetch("catalog://../x", "K")
    with pytest.raises(InputError, match=r"^K: catalog://x cannot be fetched: model not present in the catalog: x"):
        fetch("catalog://x", "K")


def with_option(key, url):
    cfg = tiny_cfg()
    cfg.merge_from_list([key, url])
    return cfg


STAGED = SimpleNamespace(
    named_heads={}, students=[torch.nn.Linear(1, 1)], teacher=torch.nn.Linear(1, 1), checkpointables={}
)
# How the file that a key names is fetched.
WAYS = {
    "MODEL.WEIGHTS": lambda key, url: KDCheckpointer(torch.nn.Linear(1, 1)).load(url),
    "KD.TEACHER.WEIGHTS": lambda key, url: load_strictly(torch.nn.Linear(1, 1), url, key=key),
    "KD.PRETRAIN.WEIGHTS": lambda key, url: load_stage(STAGED, url),
    "--config-file": lambda key, url: find_config(url),
    "KD.TEACHER.CONFIG_FILE": lambda key, url: build_teacher(with_option(key, url)),
    "KD.MUTUAL.PEERS": lambda key, url: load_peer_configs(with_option(key, [url])),
    "DATASETS.PROPOSAL_FILES_TRAIN": lambda key, url: read_proposals(url, key),
}


@pytest.mark.parametrize("key", WAYS)
def test_every_key_refuses_such_a_url(host, tmp_path, key):
    with pytest.raises(InputError, match=rf"^{key}: .* is refused: a URL may not hold '\.\.'"):
        WAYS[key](key, f"{host.url}/../../pwned/a.yaml")
    assert not host.requests
    assert list(tmp_path.iterdir()) == []


# ---- Configs ----
CODE = b"SEED: !!python/object/apply:os.mkdir [CANARY]"


def hostile_config(canary):
    return CODE.replace(b"CANARY", str(canary).encode())


@pytest.mark.parametrize("bases", ["URL", "[URL]", "[plain.yaml, URL]"])
@pytest.mark.parametrize("path", ["/x.yaml", "/a/../../../../../..FOLDER/x.yaml", "FOLDER/x.yaml"])
def test_a_base_behind_a_url_runs_no_code(host, tmp_path, canary, monkeypatch, bases, path):
    """Detectron2's own files may run code; what a host sends is none of them, wherever its path seems to lie."""
    host.content = hostile_config(canary)
    folder = str(Path(model_zoo.__file__).parent / "configs")
    monkeypatch.chdir(folder)  # There even a plain URL seems to lie in it, when it is taken for a path.
    (tmp_path / "plain.yaml").write_text("SEED: 1")
    (tmp_path / "a.yaml").write_text("_BASE_: " + bases.replace("URL", f'"{host.url}{path}"'.replace("FOLDER", folder)))
    with pytest.raises(InputError, match=r"not a safe YAML file|is refused"):
        merge_file(tiny_cfg(), str(tmp_path / "a.yaml"))


def test_a_base_of_a_base_runs_no_code(host, tmp_path, canary):
    (tmp_path / "hostile.yaml").write_bytes(hostile_config(canary))
    host.content = f"_BASE_: {tmp_path}/hostile.yaml".encode()
    (tmp_path / "a.yaml").write_text(f"_BASE_: [{host.url}/x.yaml]")
    with pytest.raises(InputError, match=r"hostile.yaml, line 1: not a safe YAML file"):
        merge_file(tiny_cfg(), str(tmp_path / "a.yaml"))


def test_a_config_behind_a_url(host, tmp_path):
    """Its bases are relative to it."""
    host.content = b"SEED: 5"
    fetch(f"{host.url}/configs/base.yaml", "K")
    host.content = b"_BASE_: base.yaml"
    cfg = tiny_cfg()
    merge_file(cfg, find_config(f"{host.url}/configs/a.yaml"))
    assert cfg.SEED == 5


def test_detectron2s_own_files_are_read():
    cfg = tiny_cfg()
    merge_file(cfg, find_config("COCO-Detection/retinanet_R_50_FPN_1x.yaml"))
    assert cfg.MODEL.ANCHOR_GENERATOR.SIZES[0][0] == 32


@pytest.mark.parametrize(
    "content", ["KD: !!python/object/apply:os.mkdir [CANARY]", "[1]", "KD: 3", "KD: {GENERATIONS: x}", "{", "\x00", ""]
)
def test_the_config_of_a_chain_runs_no_code(tmp_path, canary, content):
    """Of a folder that is compared with others."""
    (tmp_path / "run" / "gen_1").mkdir(parents=True)
    (tmp_path / "run" / "gen_1x").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(content.replace("CANARY", str(canary)))
    with pytest.raises(InputError, match=f"{tmp_path}/run") as error:
        load_runs([("a", str(tmp_path / "run"))], None, "cpu")
    assert "\n" not in str(error.value)


def test_help_says_that_plugins_run(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    assert "Python file whose code is run first, with all your rights" in " ".join(capsys.readouterr().out.split())


# ---- Weights ----
def write_hostile(path, canary):
    data = {"model": {"weight": Hostile(canary)}, "__author__": "x", "model_state": {}}
    if "legacy" in path.stem or (path.suffix == ".pkl" and path.stem != "torch"):
        path.write_bytes(pickle.dumps(data, protocol=2))
    else:
        torch.save(data, path)


LOADS = [partial(load_strictly, key="K"), lambda model, path: KDCheckpointer(model).load(path)]
FILES = ["a.pkl", "torch.pkl", "a.pth", "legacy.pth", "a.pyth", "legacy.pyth", "legacy.tar"]


@pytest.mark.parametrize("switch", ["", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"])
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "load", [partial(load_strictly, key="K"), lambda model, path: KDCheckpointer(model).load(path)]
)
def test_weights_run_no_code(plain, tmp_path, canary, monkeypatch, name, load, switch):
    """Nor where people have told torch to trust old files."""
    if switch:
        monkeypatch.setenv(switch, "1")
    write_hostile(tmp_path / name, canary)
    with pytest.raises(InputError, match=r"not a checkpoint that can be loaded safely: .*mkdir") as error:
        load(plain, str(tmp_path / name))
    assert "\n" not in str(error.value)


def test_weights_run_no_code_with_the_default_of_torch_before_2_6(plain, tmp_path, canary, monkeypatch):
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *a, weights_only=False, **k: load(*a, weights_only=weights_only, **k))
    for name in ("a.pth", "legacy.pth", "a.pyth"):
        write_hostile(tmp_path / name, canary)
        with pytest.raises(InputError, match="mkdir"):
            KDCheckpointer(plain).load(str(tmp_path / name))


def test_weights_of_timm_run_no_code(tmp_path, canary):
    (tmp_path / "config.json").write_text('{"architecture": "resnet18"}')
    torch.save({"weight": Hostile(canary)}, tmp_path / "pytorch_model.bin")
    options = {"MODEL.BACKBONE.NAME": "build_timm_fpn_backbone", "MODEL.TIMM.NAME": f"local-dir:{tmp_path}"}
    with pytest.raises(InputError, match=r"^MODEL\.TIMM\.\w+: .*weights") as error:
        build(tiny_cfg(options=options))
    assert "\n" not in str(error.value)


def test_the_canary_works(tmp_path):
    write_hostile(tmp_path / "a.pkl", tmp_path / "made")
    pickle.loads((tmp_path / "a.pkl").read_bytes())
    assert (tmp_path / "made").exists()


# ---- Proposals ----
@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("arguments", [(), ("--eval-only",)], ids=["training", "eval-only"])
def test_proposals_run_no_code(coco_folder, tmp_path, canary, arguments):
    torch.save({"model": build(tiny_cfg()).state_dict()}, tmp_path / "a.pth")
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"ids": [1], "boxes": Hostile(canary)}))
    cfg = with_data(tiny_cfg(options={"MODEL.WEIGHTS": str(tmp_path / "a.pth")}), coco_folder, tmp_path / "output")
    cfg.MODEL.LOAD_PROPOSALS = True
    cfg.DATASETS.PROPOSAL_FILES_TRAIN = cfg.DATASETS.PROPOSAL_FILES_TEST = (str(tmp_path / "a.pkl"),)
    with pytest.raises(SystemExit) as end:
        train_net("--config-file", write_yaml(tmp_path / "config.yaml", cfg), *arguments)
    split = "TEST" if arguments else "TRAIN"
    assert end.value.code.startswith(
        f"error: DATASETS.PROPOSAL_FILES_{split}: {tmp_path}/a.pkl: not a file of proposals"
    )


# ---- Pickles of arrays ----
PLAIN_STATE = (3, "<", None, None, None, -1, -1, 0)


def crafted(shape=(2,), data=b"01234567", name="f4", state=PLAIN_STATE):
    """A pickle of an array, as numpy writes it, with a state of one's own."""

    def part(value):
        return pickle.dumps(value, 2)[2:-1]

    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n" + part((0,)) + part("b") + b"\x87R"
    dtype = b"cnumpy\ndtype\n" + part((name, 0, 1)) + b"R" + part(state) + b"b"
    data = b"T" + len(data).to_bytes(4, "little") + data
    return b"\x80\x02" + array + b"(K\x01" + part(shape) + dtype + b"\x89" + data + b"tb."


def load_bytes(tmp_path, content):
    (tmp_path / "a.pkl").write_bytes(content)
    return load_arrays(str(tmp_path / "a.pkl"))


def test_a_crafted_array_is_an_array(tmp_path):
    found = load_bytes(tmp_path, crafted())
    assert np.array_equal(found, np.frombuffer(b"01234567", "<f4"))


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    "array",
    [
        np.arange(6.0, dtype=np.float32).reshape(2, 3),
        np.arange(6).reshape(2, 3).T,
        np.arange(24).reshape(2, 3, 4).transpose(2, 0, 1)[:, ::2],
        np.arange(3, dtype=">f8"),
        np.array(3, np.int16),
        np.zeros((0, 4)),
        np.array([True, False]),
        np.ones(2, np.complex64),
        np.float32(2.5),
    ],
    ids=lambda x: f"{x.dtype}{x.shape}",
)
def test_arrays_of_numbers_are_read(tmp_path, array, protocol):
    found = load_bytes(tmp_path, pickle.dumps(array, protocol))
    assert np.array_equal(found, array)
    assert found.dtype == array.dtype.newbyteorder("=")


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    "array",
    [
        np.array([None]),
        np.array(["a"]),
        np.array([b"a"]),
        np.zeros(1, "f4,f4"),
        np.zeros(1, "M8[s]"),
        np.zeros(1, "V3"),
    ],
    ids=lambda x: str(x.dtype),
)
def test_arrays_of_anything_else_are_refused(tmp_path, array, protocol):
    with pytest.raises(pickle.UnpicklingError, match="which are no numbers"):
        load_bytes(tmp_path, pickle.dumps(array, protocol))


@pytest.mark.parametrize("name", ["O", "f4,f4", "(2,)f4", ["f4"], None, "S8", "m8"])
def test_dtypes_that_are_no_numbers_are_refused(tmp_path, name):
    with pytest.raises(pickle.UnpicklingError, match="which are no numbers"):
        load_bytes(tmp_path, crafted(name=name))


def test_the_flags_of_a_dtype_never_reach_numpy(tmp_path):
    """With those of objects, numpy would take the file's bytes for their addresses."""
    hostile = (3, "|", None, ("a",), {"a": ("O", 0)}, 8, 8, 0x3F)
    found = load_bytes(tmp_path, crafted((1,), b"01234567", "f8", hostile))
    assert found.dtype == np.float64
    assert not found.dtype.hasobject
    assert found.dtype.flags == 0


@pytest.mark.parametrize("data", [b"01234567", b""])
@pytest.mark.parametrize(
    "shape", [(3,), (2**62, 4), (2**32, 2**32), (2**63,), (0, 2**62), (-3,), "ab", (1.5,), ((1,),), 5, [9]]
)
def test_shapes_that_do_not_fit_are_refused(tmp_path, shape, data):
    with pytest.raises((pickle.UnpicklingError, ValueError, TypeError)):
        load_bytes(tmp_path, crafted(shape, data))


@pytest.mark.parametrize("name", ["numpy\ndtype", "numpy\nndarray", "numpy.core.multiarray\nscalar", "_codecs\nencode"])
def test_a_pickle_changes_no_class(tmp_path, name):
    """A BUILD of a class would set its attributes, for all files that are read later."""
    for state in ({"__setstate__": 1}, (None, {"__setstate__": 1})):
        content = b"\x80\x02c" + name.encode() + b"\n" + pickle.dumps(state, 2)[2:-1] + b"b."
        with contextlib.suppress(Exception):
            load_bytes(tmp_path, content)
    test_a_crafted_array_is_an_array(tmp_path)


# ---- Odd contents ----
class Shadowed:
    """Pickled as a state dict whose attributes hide its methods."""

    def __init__(self, state, attributes):
        self.state, self.attributes = state, attributes

    def __reduce__(self):
        return OrderedDict, (), self.attributes, None, iter(self.state.items())


@pytest.mark.parametrize(
    "attributes",
    [{"items": 1, "keys": 1, "pop": 1, "copy": 1}, {"_metadata": 3}, {"_metadata": {"": 1, 2: {"version": ""}}}],
)
def test_attributes_of_a_state_dict_do_not_count(plain, tmp_path, attributes):
    torch.save({"model": Shadowed(plain.state_dict(), attributes)}, tmp_path / "a.pth")
    load_strictly(plain, str(tmp_path / "a.pth"), key="K")


def ones(**options):
    return torch.ones(2, 2, **options)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "state",
    [
        {1: ones()},
        {None: ones()},
        {"a": ones().to_sparse()},
        {"a": ones().to_sparse_csr()},
        {"a": ones(device="meta")},
        {"a": torch.quantize_per_tensor(ones(), 0.1, 0, torch.qint8)},
        {"a": None},
        {"a": {"b": ones()}},
        {},
    ],
    ids=["int", "none", "sparse", "csr", "meta", "quantized", "no tensor", "dict", "nothing"],
)
@pytest.mark.parametrize("load", LOADS)
def test_weights_that_are_no_dense_tensors(plain, tmp_path, load, state):
    torch.save({"model": state}, tmp_path / "a.pth")
    with pytest.raises(InputError, match=r"a\.pth: (not a checkpoint: neither|a is a sparse, quantized)") as error:
        load(plain, str(tmp_path / "a.pth"))
    assert "\n" not in str(error.value)


def cycle():
    state = {}
    state["model"] = state
    return state


@pytest.mark.parametrize(
    "content",
    [
        {"model": {1: np.ones(1)}, "__author__": "x"},
        {1: np.ones(1)},
        {"blobs": {1: np.ones(1)}},
        {"blobs": [1]},
        {"conv1_w": np.ones(1, np.longdouble)},
        {"bbox_pred_w": np.array(1.0), "cls_score_w": np.array(1.0)},
        [1],
        3,
        cycle() | {"__author__": "x"},
    ],
    ids=str,
)
@pytest.mark.parametrize("load", LOADS)
def test_odd_pickles_are_told_in_one_line(plain, tmp_path, load, content):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(InputError, match=r"a\.pkl: ") as error:
        load(plain, str(tmp_path / "a.pkl"))
    assert "\n" not in str(error.value)


def test_a_file_that_unpacks_to_many_times_its_size(plain, tmp_path):
    torch.save({"model": {"a": torch.zeros(10**6)}}, tmp_path / "a.pth")
    with zipfile.ZipFile(tmp_path / "a.pth") as stored, zipfile.ZipFile(tmp_path / "b.pth", "w") as deflated:
        for name in stored.namelist():
            deflated.writestr(name, stored.read(name), zipfile.ZIP_DEFLATED)
    with pytest.raises(InputError, match=r"b\.pth: not a .* it would unpack to \d+ bytes, more than 10 times its size"):
        KDCheckpointer(plain).load(str(tmp_path / "b.pth"))
