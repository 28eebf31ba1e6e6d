"""Other estimators of memory, run for real: accelerate's command and DeepSpeed's functions.

Run as `python -m labkit.memory.rivals`, in a process of its own, it prints what they say as JSON.
Nothing is downloaded. accelerate looks a model up on a hub before it builds it on the meta device;
here that look-up is answered with the config.json of `data/memory/`, and the rest is accelerate's.
"""

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from labkit.errors import LabkitError
from labkit.memory import reference
from labkit.memory.architecture import read

ACCELERATE_LOADED, ACCELERATE_ADAM = "accelerate: loaded in fp32", "accelerate: trained with Adam"
ACCELERATE_MIXED = "accelerate: trained with Adam, mixed precision"
ZERO2, ZERO3 = "DeepSpeed ZeRO-2", "DeepSpeed ZeRO-3"
OFFLOADS = {"none": (False, False), "optimizer": (True, False), "all": (True, True)}
"""Of DeepSpeed's tables: (states to the host, weights to the host)."""


def run(models: Iterable[str] | None = None) -> dict[str, Any]:
    """What every estimator that is installed says, from a fresh process with the network off.

    Args:
        models: names of `reference.models()`; None is those of the rows that were trained in full.

    Returns:
        `versions`, `accelerate` (model -> what it says -> bytes), `deepspeed` (row -> bytes), which
        is missing where DeepSpeed is not installed.

    Raises:
        LabkitError: the process failed.
    """
    names = list(full_models() if models is None else models)
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "DS_ACCELERATOR": "cpu",
    }
    done = subprocess.run(
        [sys.executable, "-m", "labkit.memory.rivals", *names],
        capture_output=True,
        text=True,
        env=environment,
        encoding="utf-8",
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise LabkitError(
            f"other estimators ended with exit code {done.returncode} ({last}): run "
            "`python -m labkit.memory.rivals` to see all of it, or use the committed numbers"
        )
    return json.loads(done.stdout.splitlines()[-1])


def full_models() -> list[str]:
    """Models of the measured rows that were fine-tuned in full: what these tools speak about."""
    return list(dict.fromkeys(row.model for row in full_rows()))


def full_rows() -> list[reference.Row]:
    return [row for row in reference.rows() if row.options.get("method", "full") == "full"]


# ---- accelerate --------------------------------------------------------------------------------


def accelerate_says(config: Mapping[str, Any]) -> dict[str, int]:
    """Bytes that `accelerate estimate-memory` gives for a configuration.

    It builds transformers' `AutoModel`, which has no output head, and counts it in fp32. What it
    calls training is the largest of weights, gradients, states and step, not their sum; in mixed
    precision (its `float16` line) that is 8 B a parameter, in fp32 16 B.
    """
    from accelerate.commands import estimate as command

    with tempfile.TemporaryDirectory() as folder, _answered(command):
        config = {name: value for name, value in config.items() if name != "torch_dtype"}
        (Path(folder) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        arguments = [folder, "--library_name", "transformers", "--dtypes", "float32", "float16"]
        whole, half = command.gather_data(command.estimate_command_parser().parse_args(arguments))
    return {
        ACCELERATE_LOADED: int(whole[2]),
        ACCELERATE_ADAM: int(max(whole[3].values())),
        ACCELERATE_MIXED: int(max(half[3].values())),
    }


def accelerate_trains(parameters: float) -> dict[str, int]:
    """The same from a count of parameters, where there is no configuration to build."""
    from accelerate.commands.estimate import estimate_training_usage

    fp32_bytes = int(4 * parameters)
    return {
        ACCELERATE_ADAM: int(max(estimate_training_usage(fp32_bytes, "float32").values())),
        ACCELERATE_MIXED: int(max(estimate_training_usage(fp32_bytes, "float16").values())),
    }


@contextmanager
def _answered(command):
    """accelerate's look-up on the hub, answered here: the model is the folder it is given."""
    real = command.verify_on_hub
    command.verify_on_hub = lambda repo, token=None: SimpleNamespace(
        library_name="transformers", config={}
    )
    try:
        with redirect_stdout(sys.stderr):  # it prints what it loads
            yield
    finally:
        command.verify_on_hub = real


# ---- DeepSpeed ---------------------------------------------------------------------------------


def has_deepspeed() -> bool:
    return importlib.util.find_spec("deepspeed") is not None


def deepspeed_says() -> dict[str, dict[str, list[int]]]:
    """Row -> stage -> (bytes of a device, bytes of a host), from DeepSpeed's own functions.

    Rows are those that were measured in full fine-tuning, on as many devices as they had; the table
    of the ZeRO paper; and the row of DeepSpeed's documentation, by what is offloaded.
    """
    with redirect_stdout(sys.stderr):
        from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs as stage3
        from deepspeed.runtime.zero.stage_1_and_2 import (
            estimate_zero2_model_states_mem_needs as stage2,
        )

    def device_and_host(result) -> list[int]:
        host, device = result[:2]
        return [device, host]

    said: dict[str, dict[str, list[int]]] = {}
    for row in full_rows():
        arch, devices = read(row.config), row.options.get("num_devices", 1)
        said[row.name] = {
            ZERO2: device_and_host(stage2(arch.parameters, devices, 1, cpu_offload=False)),
            ZERO3: device_and_host(
                stage3(
                    arch.parameters, arch.largest_tensor, devices, 1,
                    cpu_offload=False, cpu_offload_params=False,
                )
            ),
        }  # fmt: skip
    paper, docs = reference.public()["zero"], reference.public()["deepspeed"]
    nodes = paper["devices"] // 8
    said["ZeRO paper"] = {
        ZERO2: device_and_host(stage2(paper["parameters"], 8, nodes, cpu_offload=False)),
        # The paper has no layers, so none is the largest one.
        ZERO3: device_and_host(
            stage3(paper["parameters"], 0, 8, nodes, cpu_offload=False, cpu_offload_params=False)
        ),
    }
    for name, (states, weights) in OFFLOADS.items():
        said[f"T5-3B, offload {name}"] = {
            ZERO3: device_and_host(
                stage3(
                    docs["parameters"], docs["largest_layer"], docs["devices"], 1,
                    cpu_offload=states, cpu_offload_params=weights,
                )
            )
        }  # fmt: skip
    return said


def main(models: list[str]) -> int:
    """Print one line of JSON, the last one, with what the installed estimators say."""
    names = ["accelerate", "transformers", "torch"] + ["deepspeed"] * has_deepspeed()
    result: dict[str, Any] = {
        "versions": {name: importlib.metadata.version(name) for name in names},
        "accelerate": {name: accelerate_says(reference.model(name)) for name in models},
    }
    result["accelerate"]["bert-base-cased"] = accelerate_says(reference.public()["bert"]["config"])
    result["accelerate"]["ZeRO paper"] = accelerate_trains(reference.public()["zero"]["parameters"])
    if has_deepspeed():
        result["deepspeed"] = deepspeed_says()
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
