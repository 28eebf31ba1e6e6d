"""Nothing reaches the network while the course runs: a notebook runs with every network cut."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from labkit.paths import notebooks_dir, root

# Inside the new network namespace even the loopback device is down; a kernel talks over it.
RUN_WITHOUT_NETWORK = """
import fcntl, socket, struct, sys
SIOCSIFFLAGS, IFF_UP = 0x8914, 0x1
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
    fcntl.ioctl(s, SIOCSIFFLAGS, struct.pack("16sh", b"lo", IFF_UP))
try:
    socket.create_connection(("192.0.2.1", 80), timeout=2)
except OSError:
    print("network is cut", flush=True)
from labkit.notebooks.run import execute
execute(sys.argv[1], write=False)
print("notebook ran")
"""


def can_cut_the_network() -> bool:
    unshare = shutil.which("unshare")
    if not unshare:
        return False
    return subprocess.run([unshare, "-rn", "true"], capture_output=True).returncode == 0


@pytest.mark.skipif(not can_cut_the_network(), reason="needs Linux and the right to unshare -rn")
@pytest.mark.timeout(300)
def test_a_notebook_runs_with_the_network_cut():
    environment = {k: v for k, v in os.environ.items() if not k.endswith("_OFFLINE")}
    done = subprocess.run(
        ["unshare", "-rn", sys.executable, "-c", RUN_WITHOUT_NETWORK,
         str(notebooks_dir() / "00_start_here.ipynb")],
        capture_output=True,
        text=True,
        env={**environment, "PYTHONPATH": str(root())},
        cwd=Path(root()),
    )  # fmt: skip
    assert "network is cut" in done.stdout, done.stderr
    assert "notebook ran" in done.stdout, done.stderr[-2000:]
