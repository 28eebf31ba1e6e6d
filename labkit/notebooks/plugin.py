"""A pytest plugin that makes nbval strict: a notebook that fails in any way fails its test.

    pytest -p labkit.notebooks.plugin --nbval notebooks/

nbval alone passes a cell that was never run, a mistyped magic and a cell marked NBVAL_SKIP, loses
output beyond some 10,000 messages, cannot see `clear_output`, and notices a dead kernel only when
the cell's time is up. Cells run here in the Python that runs pytest, offline, without a seed or
model of the caller's; outputs are compared after `sanitize.cfg`; stderr is not compared.
"""

import contextlib
import subprocess
import time
from collections import deque
from collections.abc import Generator
from queue import Empty

import nbval.plugin
import pytest
from jupyter_client.manager import KernelManager
from nbval.kernel import RunningKernel

from labkit.notebooks.normalise import sanitisers
from labkit.notebooks.run import ONE_THREAD, ThisPython, kernel_env

CELL_TIMEOUT_SECONDS = 600
LOOK_SECONDS = 0.2
"""How often a running cell's kernel is looked at."""
UNSEEN_MESSAGES = ("clear_output", "update_display_data")
"""Messages that change output already shown; a comparison of outputs cannot follow them."""
NOT_PASSED_ON = ("LABKIT_MODEL", "LABKIT_PROFILE")
"""Committed outputs are those of the bundled model."""


class KernelDied(Exception):
    """The kernel process ended while a cell was running."""


class WatchedKernel(RunningKernel):
    """Reads output while a cell runs, and notices within a second that the kernel is gone."""

    reply_error: str | None = None
    """Error named by the reply to the last cell, with or without a traceback."""
    unseen: str | None = None
    """Type of a message of the last cell that a comparison cannot follow."""

    def __init__(self, kernel_name: str, cwd: str, startup_timeout: float = 60) -> None:
        self._output: deque[dict] = deque()
        self.km = KernelManager(kernel_name="python3", kernel_spec_manager=ThisPython())
        env = {k: v for k, v in kernel_env(ONE_THREAD).items() if k not in NOT_PASSED_ON}
        self.km.start_kernel(cwd=cwd, env=env, stderr=subprocess.DEVNULL)
        self.kc = self.km.client()
        self.kc.context.rcvhwm = 0  # an unlimited queue loses no output
        self.kc.start_channels()
        self.kc.wait_for_ready(timeout=startup_timeout)
        self._ensure_iopub_up()

    def execute_cell_input(self, cell_input: str, allow_stdin: bool | None = None) -> str:
        """Send one cell to the kernel; returns the id of the request."""
        self.reply_error = self.unseen = None
        return super().execute_cell_input(cell_input, allow_stdin=allow_stdin)

    def await_reply(self, msg_id: str, timeout: float | None = None) -> None:
        """Wait for the reply to one request, taking in output meanwhile.

        Raises:
            Empty: no reply within `timeout` seconds.
            KernelDied: the kernel process ended.
        """
        deadline = time.monotonic() + (CELL_TIMEOUT_SECONDS if timeout is None else timeout)
        while time.monotonic() < deadline:
            self._take_in_output()
            try:
                reply = self.kc.get_shell_msg(timeout=LOOK_SECONDS)
            except Empty:
                self._check_alive()
                continue
            if reply["parent_header"].get("msg_id") == msg_id:
                content = reply["content"]
                if content["status"] == "error":
                    self.reply_error = f"{content.get('ename')}: {content.get('evalue')}"
                return
        raise Empty

    def get_message(self, stream: str, timeout: float | None = None) -> dict:
        """The next message of a stream; of output, first what came in while the cell ran.

        Raises:
            Empty: no message within `timeout` seconds.
            KernelDied: the kernel process ended.
        """
        if stream != "iopub":
            return super().get_message(stream, timeout=timeout)
        deadline = time.monotonic() + (CELL_TIMEOUT_SECONDS if timeout is None else timeout)
        while not self._output:
            try:
                self._output.append(self.kc.get_iopub_msg(timeout=LOOK_SECONDS))
            except Empty:
                self._check_alive()
                if time.monotonic() > deadline:
                    raise
        message = self._output.popleft()
        if message["msg_type"] in UNSEEN_MESSAGES:
            self.unseen = message["msg_type"]
        return message

    def close(self) -> None:
        """Give back sockets and files of a kernel that is already dead; nbval would not."""
        self.kc.stop_channels()
        self.km.cleanup_resources()

    def _take_in_output(self) -> None:
        with contextlib.suppress(Empty):
            while True:
                self._output.append(self.kc.get_iopub_msg(timeout=0))

    def _check_alive(self) -> None:
        if not self.is_alive():
            raise KernelDied


def pytest_configure(config: pytest.Config) -> None:
    """Let nbval start kernels that are watched, and give cells minutes instead of half an hour."""
    nbval.plugin.RunningKernel = WatchedKernel
    if config.option.nbval_cell_timeout == 2000:  # nbval's own default
        config.option.nbval_cell_timeout = CELL_TIMEOUT_SECONDS


def pytest_itemcollected(item: pytest.Item) -> None:
    """Sanitise outputs as the course does, and leave stderr out of the comparison."""
    if isinstance(item, nbval.plugin.IPyNbCell):
        # Done here, not by option: nbval reads its file in the system's encoding, ours is UTF-8.
        item.parent.sanitize_patterns.update(sanitisers())
        item.parent.skip_compare = {*item.parent.skip_compare, "stderr"}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    """Fail a cell that was never run, is skipped, kills its kernel, or whose reply is an error."""
    if not isinstance(item, nbval.plugin.IPyNbCell):
        return (yield)
    if item.options["skip"]:
        item.raise_cell_error("NBVAL_SKIP: a cell that is not tested: remove the marker")
    if item.cell.execution_count is None and item.cell.source.strip():
        item.raise_cell_error("the cell was never run: python -m labkit.notebooks.run FILE")
    kernel = item.parent.kernel
    if not kernel.is_alive():
        item.raise_cell_error("the kernel died in an earlier cell")
    try:
        result = yield
    except KernelDied:
        kernel.close()
        item.raise_cell_error("the kernel died: look for a crash or too little memory")
    if kernel.reply_error and not item.options["check_exception"]:
        item.raise_cell_error(kernel.reply_error)
    if kernel.unseen and item.options["check"]:
        item.raise_cell_error(
            f"{kernel.unseen} changes output already shown, which cannot be compared: "
            "set the value of a widget instead"
        )
    return result
