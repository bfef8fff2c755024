"""Compares an exported ONNX file with its run, and measures the time of both: python compare_exports.py RUN EXPORTED.

It prints the largest differences on all test images, and the median CPU time over 20 of them and five rounds, in ms.
The models take turns on one thread, and only their own work counts, so that other work on the machine hardly matters.
"""

import statistics
import sys
import time
from pathlib import Path

import torch
from detectron2.data import DatasetCatalog

from kd_det.data import choose_images, register_datasets
from kd_det.engine import build_test_mapper
from kd_det.export import ExportedModel, find_run, load_student, read_sample, read_student_config
from kd_det.export.onnx_file import OnnxOutputs, open_session, run

IMAGES, ROUNDS = 20, 5

torch.set_num_threads(1)
folder, exported = sys.argv[1:]
config, weights = find_run(folder)
cfg = read_student_config(config)
register_datasets(cfg)
mapper, records = build_test_mapper(cfg), DatasetCatalog.get(cfg.DATASETS.TEST[0])
eager = load_student(cfg, weights, "cpu")

student, session = OnnxOutputs(eager, read_sample(cfg, None, None)), open_session(str(Path(exported, "student.onnx")))
largest, detections, equal = dict.fromkeys(student.names, 0.0), 0, 0
for record in records:
    image = mapper(dict(record))["image"].float()
    expected, found = dict(zip(student.names, student(image), strict=True)), run(session, image)
    detections += len(expected["scores"])
    if len(expected["scores"]) == len(found["scores"]):
        equal += 1
        for name, tensor in expected.items() if len(expected["scores"]) else ():
            largest[name] = max(largest[name], float((tensor.double() - found[name].double()).abs().max()))
differences = ", ".join(f"{name} {value:.1g}" for name, value in largest.items())
print(
    f"{equal} of {len(records)} images with as many detections, {detections} in all; largest differences: {differences}"
)

models = {"eager": eager}
for title, name in (("TorchScript", "student.ts"), ("ONNX", "student.onnx")):
    models[title] = ExportedModel(str(Path(exported, name)), cfg, name)
times = {title: [] for title in models}
batches = [[mapper(dict(record))] for record in choose_images(records, IMAGES)]
with torch.no_grad():
    for i in range(ROUNDS + 1):
        for batch in batches:
            for title, model in models.items():
                begin = time.process_time()
                model(batch)
                if i > 0:  # The first round only warms up.
                    times[title].append(1000 * (time.process_time() - begin))
print(", ".join(f"{title} {statistics.median(values):.1f} ms" for title, values in times.items()))
