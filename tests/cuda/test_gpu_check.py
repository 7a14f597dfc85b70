"""`benchmarks/gpu_check.sh` where it cannot run: it says so in a line, and leaves no report."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton", reason="triton is not installed")

SCRIPT = Path(__file__).parents[2] / "benchmarks/gpu_check.sh"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, and the check takes ten minutes")
@pytest.mark.skipif(sys.platform == "win32", reason="needs a shell")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    done = subprocess.run(
        ["bash", SCRIPT, out], capture_output=True, text=True, env=os.environ | {"PYTHON": sys.executable}
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "finds no NVIDIA GPU here" in done.stderr
    assert not out.exists()
