#!/usr/bin/env python3
"""Install Detectron2 from PyPI, without a compiler, unless this Python can already import one.

Detectron2 publishes no wheels. The package sal-detectron2 0.7.2 is Detectron2's main branch of mid-2024 under another
name: its Python files are the official ones. pip installs it as if for Python 3.10, the only version it was uploaded
for, and refuses any file but the one with the hash below. Good to know:

- The compiled part, `detectron2._C`, loads in Python 3.10 on x86-64 Linux only. Faster R-CNN, Mask R-CNN and RetinaNet
  do not use it; rotated boxes and deformable convolutions do, and need an official build.
- Its declared requirements are skipped because they exclude NumPy 2; `pip install -e '.[dev]'` installs what it needs,
  including setuptools<81 for `pkg_resources`.
- It also installs Detectron2's scripts as a top-level module named `tools`.

An official build has priority: if one is installed, this script leaves it alone. If it is interrupted, run it again.
"""

import argparse
import importlib.metadata
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

WHEEL = "sal-detectron2==0.7.2"
SHA256 = "491af0c7f79bdb2d178e46f6cb16a97c4ac968d45c41ea3f6b6435d59bbee561"
OFFICIAL = "pip install --no-build-isolation 'git+https://github.com/facebookresearch/detectron2.git'"
PROBE = "import detectron2, detectron2.modeling; print(detectron2.__version__, 'in', detectron2.__path__[0])"


def probe() -> tuple[bool, str]:
    """Imports Detectron2 in a fresh Python, away from the current directory.

    Returns:
        Whether it worked, and the version and place, or the last line of the error.
    """
    done = subprocess.run([sys.executable, "-c", PROBE], cwd=sys.prefix, capture_output=True, text=True)
    lines = (done.stderr if done.returncode else done.stdout).strip().splitlines()
    return done.returncode == 0, lines[-1] if lines else f"Python ended with status {done.returncode}"


def in_virtual_environment() -> bool:
    return sys.prefix != sys.base_prefix or Path(sys.prefix, "conda-meta").is_dir()


def has_official_build() -> bool:
    """Returns whether a distribution named detectron2 is installed; the wheel's is named sal-detectron2."""
    return any(True for _ in importlib.metadata.distributions(name="detectron2"))


def install() -> bool:
    """Installs the wheel, or what an interrupted run left out of it, into site-packages; returns whether it worked."""
    with tempfile.TemporaryDirectory() as folder:
        requirements = Path(folder, "requirements.txt")
        requirements.write_text(f"{WHEEL} --hash=sha256:{SHA256}\n")
        command = [sys.executable, "-m", "pip", "install", "--no-deps", "--require-hashes"]
        command += ["--only-binary=:all:", "--python-version=3.10", f"--requirement={requirements}"]
        command += ["--upgrade", f"--target={sysconfig.get_path('purelib')}", "--disable-pip-version-check"]
        return subprocess.run(command).returncode == 0


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    works, result = probe()
    if works:
        print(f"detectron2 {result}")
        return
    if has_official_build():
        sys.exit(f"install_detectron2: your build of Detectron2 cannot be imported ({result}). Rebuild it: {OFFICIAL}")
    if not in_virtual_environment():
        sys.exit("install_detectron2: this Python is not a virtual environment; create one: python3 -m venv .venv")
    print(f"Installing {WHEEL} from PyPI", flush=True)
    if not install():
        sys.exit(f"install_detectron2: pip could not install {WHEEL}. Try again, or use an official build: {OFFICIAL}")
    works, result = probe()
    if not works:
        sys.exit(
            f"install_detectron2: {WHEEL} is installed but cannot be imported ({result}). "
            f"Install what it needs: pip install -e '.[dev]', or use an official build: {OFFICIAL}"
        )
    print(f"detectron2 {result}")


if __name__ == "__main__":
    main()
