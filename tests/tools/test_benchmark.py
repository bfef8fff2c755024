"""Tests that kd-det benchmark runs and measures the same work on both sides; times are not tested."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from detectron2.utils.events import EventStorage
from helpers import WIDE, tiny_cfg, with_data, write_yaml
from torch import nn
from torch.autograd import DeviceType

from kd_det import benchmarking
from kd_det.benchmarking import Row, Setup, case, loader_speed, measurement, switches, switches_table
from kd_det.benchmarking.gpu_use import Use, measure_use, summarize_events
from kd_det.benchmarking.head_memory import recording_kept_memory


@pytest.fixture
def benchmark(run_tool, monkeypatch, tiny_networks):
    """Run the command with tiny detectors, and without processes of their own."""
    monkeypatch.setattr(measurement, "in_new_processes", lambda jobs: [measurement.measure_memory(job) for job in jobs])
    tiny = ["--size", 64, "--batch", 1, "--rounds", 2, "--depths", 18, 34]
    return lambda *arguments: run_tool("benchmark", *tiny, *arguments)


def test_table_and_json(benchmark, tmp_path, capsys):
    benchmark("--heads", "none", "HintHead,SoftTargetHead", "--output", tmp_path / "out")
    table = (tmp_path / "out/benchmark.md").read_text()
    assert table in capsys.readouterr().out
    assert "| HintHead,SoftTargetHead" in table
    results = json.loads((tmp_path / "out/benchmark.json").read_text())
    none, both = (results["rows"][name] for name in ("none", "HintHead,SoftTargetHead"))
    assert none["B"] < both["B"]
    assert both["ratio_low"] <= both["ratio"] <= both["ratio_high"]
    assert both["memory"] > 0
    assert none["kept"] == 0 < both["kept"]


def test_another_teacher(benchmark, tmp_path, capsys):
    """It has random weights, sees larger images, and its config may be Python, as the command line names it."""
    wide = write_yaml(tmp_path / "wide.yaml", tiny_cfg(options=WIDE | {"MODEL.ROI_HEADS.NUM_CLASSES": 6}))
    benchmark("--heads", "HintHead", "--teacher", wide, "KD.TEACHER.SCALE", "1.5")
    assert f"FPN from {wide}, random weights" in capsys.readouterr().out
    (tmp_path / "lazy.py").write_text("x = 1")
    with pytest.raises(SystemExit, match="describes no model"):
        benchmark("--heads", "HintHead", "--teacher", tmp_path / "lazy.py")


def test_a_teacher_of_feature_maps(benchmark, capsys):
    benchmark("--heads", "PearsonHead", "--teacher", "timm:test_vit")
    assert "FPN from timm:test_vit, random weights" in capsys.readouterr().out


def test_several_teachers(benchmark, tmp_path, capsys):
    """All of them run, each with its own overrides; features of several are refused."""
    files = [write_yaml(tmp_path / f"{i}.yaml", tiny_cfg(options={"MODEL.ROI_HEADS.NUM_CLASSES": 6})) for i in (1, 2)]
    several = ("--teacher", files[0], "--teacher", files[1], "KD.TEACHER.DTYPE", "bfloat16")
    benchmark("--heads", "SoftTargetHead", *several)
    assert f"FPN from {files[0]} and {files[1]}, random weights" in capsys.readouterr().out
    with pytest.raises(
        SystemExit, match=r"KD.HINT.TEACHERS: names 2 teachers, teacher, teacher2, but HintHead compares"
    ):
        benchmark("--heads", "HintHead", *several)


@pytest.mark.usefixtures("benchmark")
@pytest.mark.parametrize("options", [{}, {"SOLVER.AMP.ENABLED": True, "SOLVER.AMP.DTYPE": "bfloat16"}])
def test_weights_and_boxes_stay_the_same(options):
    """All steps of a case do the same work: they change no weight, and the teacher sees the boxes of the student."""
    row, setup = Row("a", ("SoftTargetHead",), options), Setup(depths=(18, 34), batch=1, size=64, rounds=1)
    student, teacher = case.build_networks(case.row_config(row, setup), setup)
    with EventStorage():
        first = case.Case(row, setup, student, teacher)
        before = {key: value.clone() for key, value in student.state_dict().items()}
        first.plain_step()
        first.distilled_step()
        again = case.Case(row, setup, student, teacher)
    assert all(torch.equal(value, before[key]) for key, value in student.state_dict().items())
    assert torch.equal(first.signals["roi_boxes"], again.signals["roi_boxes"])
    found = teacher(first.batch, first.names, first.signals)
    assert len(found["roi_logits"]) == len(first.signals["roi_boxes"]) > 0


def test_switches(benchmark, monkeypatch, tmp_path, capsys):
    off = Row("all off", ("HintHead",))
    rows = [off, *(row for row in switches(off) if row.name == "KD.TEACHER.CHANNELS_LAST")]
    monkeypatch.setattr(benchmarking, "switches", lambda row: rows)
    benchmark("--switches", "--heads", "none", "HintHead", "--output", tmp_path)
    assert "| KD.TEACHER.CHANNELS_LAST |" in capsys.readouterr().out
    results = json.loads((tmp_path / "benchmark.json").read_text())
    assert list(results["rows"]) == ["all off", "KD.TEACHER.CHANNELS_LAST"]
    for x in results["rows"].values():
        assert x["images_per_second"] == pytest.approx(1000 / x["C"])


def test_each_row_has_its_switch_and_the_common_options():
    rows = {row.name: row.options for row in switches(Row("a", ("HintHead",), {"SOLVER.AMP.ENABLED": True}))}
    assert rows.pop("all off") == {"SOLVER.AMP.ENABLED": True}
    assert rows["KD.TEACHER.COMPILE"] == {"SOLVER.AMP.ENABLED": True, "KD.TEACHER.COMPILE": True}
    together = rows.pop("all, bfloat16")
    assert all(options.keys() <= together.keys() for options in rows.values())


# ---- On a GPU ----
def test_columns_of_a_gpu():
    """They are there if they were measured."""
    times = {"A": 40.0, "B": 10.0, "C": 48.0, "ratio": 0.96, "ratio_to_plain": 1.2, "images_per_second": 41.7}
    on_gpu = {"gpu": 36.0, "idle": 0.25, "kernels": 1500.0, "waits": 12}
    setup = vars(Setup(depths=(18, 101), batch=2, size=800, rounds=3)) | {"amp": "none"}
    setup |= {"device": "a GPU", "memory_kind": "allocated", "plain_memory": 1.0, "heads": ("HintHead",)}
    tables = [switches_table(setup | {"rows": {"a": times | x | {"memory": 2.0}}}) for x in ({}, on_gpu)]
    assert ["idle" in table for table in tables] == [False, True]
    header, _, row = ([x.strip() for x in line.split("|")] for line in tables[1].splitlines()[:3])
    found = dict(zip(header, row, strict=True))
    assert [found[key] for key in ("C on the GPU, ms", "idle", "kernels", "waits")] == ["36.0", "25%", "1500", "12"]


def event(name, start, end, device=DeviceType.CUDA, **others):
    return SimpleNamespace(name=name, device_type=device, time_range=SimpleNamespace(start=start, end=end), **others)


def test_time_on_the_gpu_counts_once():
    """Streams overlap, copies are no kernels, and names of parts are neither."""
    events = [
        event("aten::add", 0, 9000, DeviceType.CPU),
        event("kd_det: student", 0, 9000, is_user_annotation=True),
        event("kernel", 1000, 2000, is_user_annotation=False),
        event("kernel of the other stream", 1500, 3500),
        event("inside", 1600, 1700),
        event("Memcpy HtoD", 5000, 5500),
    ]
    assert summarize_events(events) == (3.0, 3)


def test_use_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    calls = []
    use = measure_use(lambda: calls.append(0), rounds=3, warm_up=2)
    assert (use.busy, use.idle, use.kernels, use.waits, len(calls)) == (None, None, None, None, 5)
    assert Use(wall=4.0, busy=3.0).idle == 0.25


# ---- Memory ----
class Exponential(nn.Module):
    """Keeps the exponential of the student's signal, and nothing else of its own."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.ones(5))

    def forward(self, student, teacher, batch):
        return {"loss": ((student["a"] * self.factor).exp() * teacher["a"]).sum()}


def test_memory_that_a_head_keeps():
    heads = nn.ModuleDict({"a": Exponential()})
    signals = [{"a": torch.ones(3, 5, requires_grad=x)} for x in (True, False)]
    with recording_kept_memory(heads) as kept:
        heads["a"](*signals, None)
    assert kept == {"a": 3 * 5 * 4}
    assert "forward" not in vars(heads["a"])


def test_profile(benchmark, tmp_path, capsys):
    benchmark("--profile", "--heads", "none", "SoftTargetHead", "--output", tmp_path)
    assert "kd_det: student " in capsys.readouterr().out
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    for part in ("student", "teacher", "teacher, boxes", "SoftTargetHead"):
        assert names.count(f"kd_det: {part}") == 3


@pytest.mark.usefixtures("in_process")
def test_loader(benchmark, monkeypatch, coco_folder, tmp_path, capsys):
    monkeypatch.setattr(loader_speed, "SECONDS", 0.1)
    config = write_yaml(tmp_path / "config.yaml", with_data(tiny_cfg(), coco_folder, tmp_path))
    benchmark("--loader", config, "SOLVER.IMS_PER_BATCH", 3)
    found = re.fullmatch(r"\S+: (\d+) images per second with 0 workers, 3 per batch\n", capsys.readouterr().out)
    assert int(found[1]) > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", 0], "--rounds"),
        (["--heads", "NoHead"], "'NoHead' is not a distillation head"),
        (["--heads", "none", "--switches"], "--heads: only 'none' is named"),
        (["--heads", "none", "--profile"], "--heads: only 'none' is named"),
        (["--loader", "a.yaml"], "--loader: there is no such file"),
        (["--heads", "HintHead", "--teacher", "a.yaml"], "KD.TEACHER.CONFIG_FILE: there is no such file"),
        (["--heads", "HintHead", "--teacher", "a.yaml", "KD.TEACHER.X", "1"], "--teacher: Non-existent key: KD.TEACH"),
    ],
)
def test_mistakes_end_in_one_line(arguments, message, benchmark):
    with pytest.raises(SystemExit, match=message):
        benchmark(*arguments)
