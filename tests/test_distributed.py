"""Two ranks with gloo on the CPU: the students stay the same without find_unused_parameters."""

import pytest
import torch
import torch.multiprocessing
from detectron2.engine import create_ddp_model
from helpers import build, distilled_cfg, run_train_net, step, tiny_inputs, with_data, write_yaml

HEADS = ["ReviewKDHead", "HintHead", "AttentionTransferHead", "SoftTargetHead"]
# HintHead is idle in step 0, ReviewKDHead in step 2.
OPTIONS = {"KD.HINT.SCHEDULE.START": 1, "KD.REVIEW.SCHEDULE.STOP": 2, "KD.SOFT_TARGET.SOURCES": ["roi", "rpn", "mask"]}
STEPS = 3


def train(rank, teacher, folder):
    """Three steps on a rank's own data, from its own random weights; DDP hands out those of rank 0."""
    torch.distributed.init_process_group("gloo", f"file://{folder}/init", world_size=2, rank=rank)
    cfg = distilled_cfg(teacher, HEADS, OPTIONS)
    model = create_ddp_model(build(cfg, seed=rank), broadcast_buffers=False, device_ids=None)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    history = []
    for iteration in range(STEPS):
        # of one rank's batches one has no objects: its mask and box losses are zero
        inputs = tiny_inputs(seed=10 * rank + iteration, empty=(0, 1) if (rank, iteration) == (1, 1) else ())
        losses = step(model, inputs, iteration=iteration)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        history.append({key: loss.detach() for key, loss in losses.items()})
    results = {
        "parameters": {key: p.detach() for key, p in model.module.named_parameters()},
        "losses": history,
        "find_unused_parameters": model.find_unused_parameters,
        "tensors_in_buckets": model._get_ddp_logging_data()["num_parameter_tensors"],
    }
    torch.save(results, f"{folder}/{rank}.pth")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(train, args=(teacher, str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pth", weights_only=True) for rank in range(2)]


def test_ranks_saw_different_data(ranks):
    assert ranks[0]["losses"][0]["loss_kd_review"] != ranks[1]["losses"][0]["loss_kd_review"]


def test_weights_are_equal_after_the_steps(ranks, teacher):
    first, second = (rank["parameters"] for rank in ranks)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    start = dict(build(distilled_cfg(teacher, HEADS, OPTIONS), seed=0).named_parameters())
    for part in ("student.backbone.", "heads.ReviewKDHead.", "heads.HintHead."):
        assert any(not torch.equal(first[key], start[key]) for key in first if key.startswith(part)), part


def test_heads_were_idle(ranks):
    for losses in (rank["losses"] for rank in ranks):
        assert ["loss_kd_idle" in x for x in losses] == [True, False, True]
        assert ["loss_kd_hint" in x for x in losses] == [False, True, True]
        assert ["loss_kd_review" in x for x in losses] == [True, True, False]


def test_unused_parameters_are_not_looked_for(ranks):
    assert [rank["find_unused_parameters"] for rank in ranks] == [False, False]


def test_buckets_hold_the_student_and_the_heads(ranks):
    assert {rank["tensors_in_buckets"] for rank in ranks} == {len(ranks[0]["parameters"])}
    assert {key.split(".")[0] for key in ranks[0]["parameters"]} == {"student", "heads"}


def test_torchrun(teacher, coco_folder, tmp_path):
    cfg = with_data(distilled_cfg(teacher, ["ReviewKDHead"]), coco_folder, tmp_path / "output")
    cfg.DATASETS.TEST = ()
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = run_train_net("--config-file", write_yaml(tmp_path / "c.yaml", cfg), launcher=launcher)
    assert done.returncode == 0, done.stderr
    assert torch.load(tmp_path / "output" / "model_final.pth", weights_only=True)["iteration"] == 1
    assert (tmp_path / "output" / "log.txt.rank1").is_file()
