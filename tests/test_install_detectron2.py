"""tools/install_detectron2.py: leaves a working Detectron2 alone, installs only the wheel it knows, fails in one line.

Nothing here reaches the network: the virtual environments are real but empty, and pip finds files in one folder alone.
"""

import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "tools" / "install_detectron2.py"
DIST_INFO = "sal_detectron2-0.7.2.dist-info"
WHEEL_FILES = {
    "detectron2/__init__.py": "__version__ = '0.7.2'\n",
    "detectron2/modeling/__init__.py": "",
    f"{DIST_INFO}/METADATA": "Metadata-Version: 2.1\nName: sal-detectron2\nVersion: 0.7.2\n",
    f"{DIST_INFO}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: cp310-none-any\n",
    f"{DIST_INFO}/RECORD": "",
}


class Environment:
    """A virtual environment that has pip, by way of a link, and finds packages in one folder alone."""

    def __init__(self, folder):
        pip = pytest.importorskip("pip")
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
        self.python = folder / "venv" / "bin" / "python"
        self.wheels = folder / "wheels"
        links = folder / "links"
        for new in (self.wheels, links):
            new.mkdir()
        (links / "pip").symlink_to(Path(pip.__file__).parent)
        self.variables = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "PYTHON"))}
        self.variables |= {"PYTHONPATH": str(links), "PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1"}
        self.variables["PIP_FIND_LINKS"] = str(self.wheels)

    @property
    def site_packages(self):
        return next((self.python.parents[1] / "lib").glob("python*/site-packages"))

    def add_wheel(self):
        """Writes a stand-in for the wheel and returns its hash."""
        path = self.wheels / "sal_detectron2-0.7.2-cp310-none-any.whl"
        with zipfile.ZipFile(path, "w") as archive:
            for name, text in WHEEL_FILES.items():
                archive.writestr(name, text)
        return hashlib.sha256(path.read_bytes()).hexdigest()

    def run(self, *, sha256=None):
        """Runs the script, expecting `sha256` instead of the real wheel's hash where it is given."""
        command = [self.python, SCRIPT]
        if sha256:
            code = f"import install_detectron2 as i; i.SHA256 = {sha256!r}; i.main()"
            command = [self.python, "-c", f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r}); {code}"]
        return subprocess.run(command, env=self.variables, capture_output=True, text=True)


@pytest.fixture
def environment(tmp_path):
    return Environment(tmp_path)


def last_line(done):
    return done.stderr.strip().splitlines()[-1]


def test_leaves_a_working_detectron2_alone():
    detectron2 = pytest.importorskip("detectron2")
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout == f"detectron2 {detectron2.__version__} in {Path(detectron2.__file__).parent}\n"


def test_installs_the_wheel_and_completes_half_of_one(environment):
    sha256 = environment.add_wheel()
    half = environment.site_packages / "detectron2"
    half.mkdir()
    (half / "__init__.py").write_text("from . import modeling\n")
    done = environment.run(sha256=sha256)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"detectron2 0.7.2 in {half}\n")


def test_a_wheel_with_another_hash_is_refused(environment):
    environment.add_wheel()
    done = environment.run()
    assert done.returncode == 1
    assert "DO NOT MATCH THE HASHES" in done.stderr
    assert last_line(done).startswith("install_detectron2: pip could not install sal-detectron2==0.7.2.")
    assert not (environment.site_packages / "detectron2").exists()


def test_without_the_wheel_it_names_the_official_build(environment):
    done = environment.run()
    assert done.returncode == 1
    assert last_line(done).endswith("'git+https://github.com/facebookresearch/detectron2.git'")
    assert "Traceback" not in done.stderr


def test_a_broken_official_build_is_not_overwritten(environment):
    sha256 = environment.add_wheel()
    info = environment.site_packages / "detectron2-0.6.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: detectron2\nVersion: 0.6\n")
    done = environment.run(sha256=sha256)
    assert done.returncode == 1
    assert "your build of Detectron2 cannot be imported (ModuleNotFoundError" in last_line(done)
    assert not (environment.site_packages / "detectron2").exists()


def test_refuses_a_python_that_is_no_virtual_environment(tmp_path):
    code = f"""
import sys
sys.path.insert(0, {str(SCRIPT.parent)!r})
import install_detectron2 as i
i.probe = lambda: (False, "")
i.has_official_build = lambda: False
sys.prefix = sys.base_prefix = {str(tmp_path)!r}
i.main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "is not a virtual environment" in last_line(done)
