"""Packaging of kd_det: `pip install -e .` beside your own Detectron2; `make` builds an environment from nothing."""

from pathlib import Path

from setuptools import find_packages, setup

# What `make` adds: Detectron2's own requirements, because the wheel of tools/install_detectron2.py comes without them,
# and a developer's tools. setuptools 81 dropped pkg_resources, with which Detectron2 finds its model zoo.
DETECTRON2 = [
    "cloudpickle",
    "hydra-core>=1.1",
    "iopath>=0.1.7",
    "matplotlib",
    "omegaconf>=2.1,<2.4",
    "packaging",
    "Pillow>=7.1",
    "setuptools<81",
    "tensorboard",
    "termcolor>=1.1",
    "yacs>=0.1.8",
]
# Fuses the boxes of several detectors: kd_det/analysis/ensemble.py.
ENSEMBLE = ["ensemble-boxes>=1.0.9"]
# Write and check ONNX files: kd_det/export/onnx_file.py.
DEPLOY = ["onnx>=1.16", "onnxruntime>=1.18"]
# scikit-learn brings the images of the data sets digits_train and digits_test.
# zennit is another implementation of relevance propagation, which tests compare with.
TOOLS = ["mypy", "pytest>=7", "pytest-xdist>=3", "ruff", "scikit-learn", "types-PyYAML", "types-tabulate", "types-tqdm"]
TOOLS += ["zennit>=0.5"]
DOCS = ["furo", "myst-parser>=4", "sphinx>=8"]

readme = Path(__file__).with_name("README.md")

setup(
    name="kd_det",
    version="0.1.0",
    description="Knowledge distillation for Detectron2: any config trains a better student from a teacher",
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    author="The kd_det authors",
    # The top-level configs/ is installed inside the package.
    packages=[*find_packages(include=["kd_det", "kd_det.*"]), "kd_det.configs"],
    package_dir={"kd_det.configs": "configs"},
    package_data={
        "kd_det.configs": ["**/*.yaml"],
        "kd_det.export": ["templates/*"],
        "kd_det.reporting": ["templates/*"],
    },
    entry_points={"console_scripts": ["kd-det = kd_det.commands.console:main"]},
    python_requires=">=3.10",
    # Not Detectron2 itself: no index has it under its own name. Wide ranges: a build of it is tied to its own torch.
    install_requires=[
        "fvcore>=0.1.5",
        "huggingface_hub>=0.24",
        "jinja2>=3.1",
        "numpy",
        "opencv-python",
        "pycocotools>=2.0.2",
        "safetensors>=0.4",
        "scipy",
        "tabulate",
        # The first whose every way to load weights has weights_only; earlier ones run code from some files of hf-hub:.
        "timm>=1.0.26",
        # The first to load checkpoints with weights_only by default.
        "torch>=2.6",
        "torchvision>=0.21",
        "tqdm",
    ],
    extras_require={
        "dev": DETECTRON2 + DEPLOY + ENSEMBLE + TOOLS + DOCS,
        "deploy": DEPLOY,
        "ensemble": ENSEMBLE,
        "wandb": ["wandb"],
    },
)
