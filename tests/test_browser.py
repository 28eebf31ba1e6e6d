"""The learner's way in: JupyterLab in a real browser, the workbook of 02, every cell."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from labkit.notebooks.workbook import build_workbook

CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome")
                 if (path := shutil.which(name))), None)  # fmt: skip
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync"
).split()
NOTEBOOK = "02_full_fine_tuning.ipynb"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def lab(tmp_path):
    """A JupyterLab on a fresh workbook, its settings in a scratch folder; yields its address."""
    build_workbook(target=tmp_path / "workbook")
    port, token = free_port(), "test"
    environment = dict(os.environ)
    for name in ("CONFIG", "DATA", "RUNTIME"):
        environment[f"JUPYTER_{name}_DIR"] = str(tmp_path / name.lower())
    for name in ("SETTINGS", "WORKSPACES"):
        environment[f"JUPYTERLAB_{name}_DIR"] = str(tmp_path / name.lower())
    settings = tmp_path / "settings" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    (settings / "notification.jupyterlab-settings").write_text(
        json.dumps({"fetchNews": "false", "checkForUpdates": False}), encoding="utf-8"
    )
    with (tmp_path / "lab.log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyter", "lab", "--no-browser", "--ip=127.0.0.1",
             f"--port={port}", f"--IdentityProvider.token={token}",
             "--LabApp.expose_app_in_browser=True", "--LabApp.extension_manager=readonly",
             "--allow-root"],
            cwd=tmp_path / "workbook", env=environment, stdout=log, stderr=log,
        )  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(f"{address}/api?token={token}", server, tmp_path / "lab.log")
        yield address, token
    finally:
        server.terminate()
        server.wait(timeout=30)


def wait_for(url: str, server: subprocess.Popen, log: Path) -> None:
    for _ in range(120):
        assert server.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(log.read_text())


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH (Debian: chromium)")
@pytest.mark.timeout(900)
def test_the_workbook_runs_in_a_browser_and_its_widget_listens_to_keys(lab, tmp_path):
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    address, token = lab
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch_persistent_context(
            tmp_path / "profile",
            executable_path=CHROMIUM,
            args=FLAGS,
            viewport={"width": 1300, "height": 900},
        )
        page = browser.pages[0]
        page.goto(f"{address}/lab/tree/{NOTEBOOK}?token={token}")
        page.wait_for_function(
            "() => window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel"
            "?.status === 'idle'",
            timeout=120_000,
        )
        ran = page.evaluate("() => window.jupyterapp.commands.execute('notebook:run-all-cells')")
        cells = page.evaluate(
            """() => window.jupyterapp.shell.currentWidget.content.model.sharedModel.cells
                .filter(cell => cell.cell_type === 'code')
                .map(cell => [cell.execution_count, cell.outputs.map(o => o.output_type)])"""
        )
        assert ran
        assert all(count for count, _ in cells)
        assert not [outputs for _, outputs in cells if "error" in outputs]

        handle = page.locator(".widget-slider .noUi-handle").first
        handle.scroll_into_view_if_needed()
        before = page.locator(".widget-html-content").all_inner_texts()
        handle.focus()
        page.keyboard.press("ArrowRight")
        page.wait_for_function(
            "(old) => JSON.stringify([...document.querySelectorAll('.widget-html-content')]"
            ".map(e => e.innerText)) !== JSON.stringify(old)",
            arg=before,
            timeout=30_000,
        )
        browser.close()
