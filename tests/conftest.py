"""What holds for every test: no network, one thread, no setting of the user's, no window.

The notebooks run in kernels that inherit this environment, so they are held to it too.
"""

import os
import shutil
import tempfile
from pathlib import Path

import pytest

SCRATCH = Path(tempfile.mkdtemp(prefix="labkit-tests-"))

for name in [name for name in os.environ if name.startswith("LABKIT_")]:
    del os.environ[name]

# An empty cache: a test that passes here needs no model or data set fetched earlier.
(SCRATCH / "hf").mkdir()
os.environ["HF_HOME"] = str(SCRATCH / "hf")
for name in (
    "HF_HUB_OFFLINE",
    "TRANSFORMERS_OFFLINE",
    "HF_DATASETS_OFFLINE",
    "HF_EVALUATE_OFFLINE",
):
    os.environ[name] = "1"

# Two processes with two threads each on two cores wait for each other most of the time.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# A settings file instead of MPLBACKEND: kernels would inherit that and lose their inline plots.
(SCRATCH / "matplotlibrc").write_text("backend: Agg\n", encoding="utf-8")
os.environ["MATPLOTLIBRC"] = str(SCRATCH / "matplotlibrc")


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(SCRATCH, ignore_errors=True)
