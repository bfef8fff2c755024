"""Tests plain students that train for as long as distilled ones: how long that is, and that it is decided once."""

import json
import shlex
from itertools import pairwise

import pytest
import torch
from helpers import ROOT, tiny_cfg, write_yaml

from kd_det.commands import calls, repeat
from kd_det.commands.equal_compute import LENGTHS, plan_longer, training_time
from kd_det.config import read_config
from kd_det.errors import InputError


def save_part(folder, *, iterations, times, options=None):
    """Write what a finished training leaves: its config, its final checkpoint and the times of its iterations."""
    folder.mkdir(parents=True)
    write_yaml(folder / "config.yaml", tiny_cfg(options=options))
    torch.save({"model": {}, "iteration": iterations - 1}, folder / "model_final.pth")
    (folder / "last_checkpoint").write_text("model_final.pth")
    lines = [json.dumps({"iteration": i, "time": time}) for i, time in enumerate(times)]
    (folder / "metrics.json").write_text("\n".join([*lines, '{"bbox/AP": 1.0}', '{"iter']))


def save_students(output, times, *, seeds=(1, 2, 3)):
    """Write 100 iterations of plain and distilled students, each with one time per seed."""
    for name, seconds in times.items():
        for seed, time in zip(seeds, seconds, strict=True):
            options = {"SOLVER.MAX_ITER": 100, "SOLVER.STEPS": (60, 90), "SEED": seed}
            save_part(output / f"{name}_seed{seed}", iterations=100, times=[time], options=options)


def test_stages_count_and_a_pause_does_not(tmp_path):
    save_part(tmp_path / "run", iterations=10, times=[0.5, 0.7, 900.0])
    assert training_time(tmp_path / "run") == pytest.approx(10 * 0.7)
    save_part(tmp_path / "run" / "pretrain", iterations=4, times=[0.25])
    assert training_time(tmp_path / "run") == pytest.approx(10 * 0.7 + 4 * 0.25)


def test_all_generations_count(tmp_path):
    save_part(tmp_path / "chain", iterations=1, times=[])
    write_yaml(tmp_path / "chain/config.yaml", tiny_cfg(options={"KD.GENERATIONS": 2}))
    for i in (1, 2, 3):  # The third is of an earlier, longer chain.
        save_part(tmp_path / f"chain/gen_{i}", iterations=10, times=[float(i)])
    save_part(tmp_path / "chain/gen_2/pretrain", iterations=5, times=[1.0])
    assert training_time(tmp_path / "chain") == pytest.approx(10 + 20 + 5)


def test_the_plain_student_trains_for_as_long(tmp_path):
    save_students(tmp_path, {"plain": [0.5, 1.0, 2.0], "soft": [0.7, 1.5, 9.0], "hint": [0.6, 1.2, 2.4]})
    planned = plan_longer(tmp_path, {"soft": "plain", "hint": "plain"}, [1, 2, 3])
    found = {training.output.name: (name, training) for training, name in planned.items()}
    # The seeds' ratios are 1.4, 1.5 and 4.5; their median counts.
    name, training = found["plain_as_long_as_soft_seed2"]
    assert name == "plain_as_long_as_soft"
    cfg = read_config(training.configs, options=training.options)
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS, cfg.SEED) == (150, (90, 135), 2)
    cfg = read_config(found["plain_as_long_as_hint_seed3"][1].configs)
    cfg.merge_from_list(found["plain_as_long_as_hint_seed3"][1].options)
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS, cfg.SEED) == (120, (72, 108), 3)
    assert len(planned) == 6


def test_the_length_is_decided_once(tmp_path):
    """An interrupted command, or one with more seeds, trains for as long as it did before, whatever it measures."""
    baselines = {"soft": "plain"}
    save_students(tmp_path, {"plain": [1.0, 1.0], "soft": [1.5, 1.5]}, seeds=(1, 2))
    first = plan_longer(tmp_path, baselines, [1, 2])
    save_students(tmp_path, {"plain": [1.0], "soft": [9.0], "hint": [2.0]}, seeds=(3,))
    again = plan_longer(tmp_path, baselines, [3, 1, 2])
    assert first.keys() < again.keys()
    assert {training.options for training in again} == {training.options for training in first}
    plan_longer(tmp_path, {"hint": "plain"}, [3])
    recorded = json.loads((tmp_path / LENGTHS).read_text())
    assert {name: length["iterations"] for name, length in recorded.items()} == {"soft": 150, "hint": 200}


def test_a_plain_student_of_another_length_is_refused(tmp_path):
    save_students(tmp_path, {"plain": [1.0], "soft": [1.5]}, seeds=(1,))
    plan_longer(tmp_path, {"soft": "plain"}, [1])
    write_yaml(tmp_path / "plain_seed1/config.yaml", tiny_cfg(options={"SOLVER.MAX_ITER": 300}))
    message = "soft was measured against 100 iterations of plain, but now it is 300 of plain; delete the file"
    with pytest.raises(InputError, match=message):
        plan_longer(tmp_path, {"soft": "plain"}, [1])


@pytest.mark.parametrize("text", ["", "[]", '{"soft": {}}', '{"soft": 5}', "\x00"])
def test_a_damaged_record_is_named(text, tmp_path):
    save_students(tmp_path, {"plain": [1.0], "soft": [1.5]}, seeds=(1,))
    (tmp_path / LENGTHS).write_text(text)
    with pytest.raises(InputError, match=f"{LENGTHS}: must hold the lengths that an earlier call decided") as error:
        plan_longer(tmp_path, {"soft": "plain"}, [1])
    assert "\n" not in str(error.value)


def test_runs_without_times_are_named(tmp_path):
    save_students(tmp_path, {"plain": [1.0], "soft": [0.0]}, seeds=(1,))
    with pytest.raises(InputError, match=r"soft_seed1/metrics\.json does not say how long an iteration took"):
        plan_longer(tmp_path, {"soft": "plain"}, [1])
    (tmp_path / "soft_seed1/metrics.json").unlink()
    with pytest.raises(InputError, match=r"soft_seed1/metrics\.json does not say"):
        plan_longer(tmp_path, {"soft": "plain"}, [1])


def test_repeat_compares_with_both(tmp_path, monkeypatch, capsys):
    """Trainings are stood in for by the files that they would leave, and kd-det compare by nothing."""
    trained = []

    def train(trainings, commands, plugins, *, jobs):
        for training in trainings:
            trained.append(training.output.name)
            options = {"SOLVER.MAX_ITER": 100, "SOLVER.STEPS": (60,)}
            save_part(training.output, iterations=100, times=[1 + 0.5 * ("soft" in trained[-1])], options=options)

    monkeypatch.setattr(repeat, "train", train)
    monkeypatch.setattr(calls, "KD_DET", ("true",))
    student, output = f"{ROOT}/configs/BCCD/student.yaml", tmp_path / "out"
    command = ["--teacher", f"{ROOT}/configs/BCCD/teacher.yaml", "--student", f"plain={student}", "--seeds", "4", "5"]
    command += ["--student", f"soft={student}", "recipes/soft_target.yaml", "--equal-compute", "--output", str(output)]
    repeat.main(repeat.parse_args(command))
    longer = [f"plain_as_long_as_soft_seed{seed}" for seed in (4, 5)]
    assert trained == ["teacher", "plain_seed4", "soft_seed4", "plain_seed5", "soft_seed5", *longer]
    lines = capsys.readouterr().out.splitlines()
    assert "plain_as_long_as_soft: 150 iterations, 1.50 times those of plain." in lines
    arguments = shlex.split(next(line for line in lines if line.startswith("$ kd-det compare ")))
    baselines = [after for before, after in pairwise(arguments) if before == "--baseline"]
    assert baselines == ["soft=plain", "soft=plain_as_long_as_soft"]
    assert f"plain_as_long_as_soft={output}/{longer[1]}" in arguments
    origin = json.loads((output / "repeat.json").read_text())
    assert origin["commands"] == [shlex.join(["kd-det", "repeat", *command])]
    assert {"Python", "kd_det", "torch", "detectron2"} <= origin["versions"].keys()


def test_all_commands_of_a_folder_are_recorded(tmp_path):
    for command in ("first", "second", "first"):
        repeat.record_origin(tmp_path / "out", command)
    origin = json.loads((tmp_path / "out/repeat.json").read_text())
    assert origin["commands"] == ["first", "second"]
    assert len(origin["commits"]) <= 1  # A source tree without git has none.
