"""Configurations for `accelerate launch`, and what the engines themselves make of one.

>>> from labkit import scale
>>> plan = scale.check_config(scale.config_path("8_gpus_fsdp2"))
>>> plan.engine, plan.processes, plan.precision
('FSDP2', 8, 'bf16')
"""

import argparse
import importlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from yaml import YAMLError

SCRIPT = "labkit.scale.finetune"


@dataclass(frozen=True)
class Plan:
    """How accelerate will start a training, read from a configuration by accelerate itself."""

    name: str
    engine: str
    """`one process`, `DDP`, `FSDP2`, or `DeepSpeed ZeRO-` and its stage."""
    machines: int
    processes: int
    """On all machines together."""
    precision: str
    offload: str
    """What lies on the host between uses: `none`, `optimizer`, `weights` or both."""
    settings: dict[str, Any] = field(default_factory=dict)
    """The engine's own settings, as its plugin understood them."""

    def commands(self, *options: str) -> list[str]:
        """What to type, on one machine after another.

        Args:
            options: of the training script.
        """
        launch = ["accelerate launch", "--config_file", f"{self.name}.yaml"]
        script = ["-m", SCRIPT, *options]
        if self.machines == 1:
            return [" ".join([*launch, *script])]
        ranks = ([*launch, "--machine_rank", str(rank), *script] for rank in range(self.machines))
        return [" ".join(command) for command in ranks]


def config_paths() -> list[Path]:
    """Every configuration that comes with labkit."""
    return sorted(Path(__file__).parent.glob("*.yaml"))


def config_path(name: str) -> Path:
    """The file of one configuration.

    Raises:
        ValueError: none has that name.
    """
    for path in config_paths():
        if path.stem == name:
            return path
    raise ValueError(
        f"config {name!r} is unknown: use {', '.join(path.stem for path in config_paths())}"
    )


def check_config(path: str | Path) -> Plan:
    """Read a configuration as `accelerate launch` does, and build the engine's plugin from it.

    Raises:
        ValueError: a key or a value that accelerate, or the engine, does not take. accelerate
            passes over an unknown key inside `fsdp_config` or `deepspeed_config`; this does not.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"config {path} is missing: give a file, or a name to config_path()")
    try:
        return _read(path)
    except (ValueError, KeyError, TypeError, AssertionError, YAMLError) as error:
        said = " ".join(str(error).split())
        if isinstance(error, KeyError):  # accelerate looks values of some keys up by name
            said = f"the value {said} is unknown"
        raise ValueError(f"{path.name}: {said}") from error


def _read(path: Path) -> Plan:
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    parser = launch_command_parser()
    config = load_config_from_file(str(path))
    _refuse_unknown_keys(config, parser)
    args = parser.parse_args(["--config_file", str(path), "--module", SCRIPT])
    args, _, _ = _validate_launch_command(args)
    if args.num_machines > 1:
        args.machine_rank = 1  # as the second machine reads it: the first also takes a port
    if args.use_deepspeed:
        engine, offload, settings = _deepspeed(args)
    elif args.use_fsdp:
        engine, offload, settings = _fsdp(args)
    else:
        engine, offload = ("DDP" if args.num_processes > 1 else "one process"), "none"
        settings = {}
    return Plan(
        name=path.stem,
        engine=engine,
        machines=args.num_machines,
        processes=args.num_processes,
        precision=args.mixed_precision,
        offload=offload,
        settings=settings,
    )


def _refuse_unknown_keys(config: Any, parser: argparse.ArgumentParser) -> None:
    """Raise ValueError for a nested key that is no option of `accelerate launch`."""
    options = {action.dest for action in parser._actions}
    for section, prefix in (
        ("fsdp_config", "fsdp_"),
        ("deepspeed_config", ""),
        ("parallelism_config", "parallelism_config_"),
    ):
        for key in getattr(config, section) or {}:
            named = key if key.startswith(prefix) else prefix + key
            if named not in options:
                raise ValueError(
                    f"{section} has {key!r}, which accelerate does not know: "
                    "see `accelerate launch --help` for its options"
                )


def _fsdp(args: argparse.Namespace) -> tuple[str, str, dict[str, Any]]:
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.utils import patch_environment
    from accelerate.utils.launch import prepare_multi_gpu_env
    from torch.distributed.fsdp import CPUOffloadPolicy

    given = {
        name: value
        for name, value in prepare_multi_gpu_env(args).items()
        if name.startswith(("FSDP_", "PARALLELISM_CONFIG_"))
    }
    with patch_environment(**given):
        plugin = FullyShardedDataParallelPlugin()
        if args.use_parallelism_config:
            from accelerate.parallelism_config import ParallelismConfig

            parallel = ParallelismConfig()
            if parallel.total_size != args.num_processes:
                raise ValueError(
                    f"parallelism_config makes groups of {parallel.total_size} processes, and "
                    f"num_processes is {args.num_processes}: make them equal"
                )
    policy = getattr(plugin.auto_wrap_policy, "__name__", "none")
    settings = {
        "fsdp_version": plugin.fsdp_version,
        "reshard_after_forward": plugin.reshard_after_forward,
        "state_dict_type": getattr(plugin.state_dict_type, "name", str(plugin.state_dict_type)),
        "auto_wrap_policy": policy,
        "cpu_ram_efficient_loading": plugin.cpu_ram_efficient_loading,
        "replicas": args.parallelism_config_dp_replicate_size if args.use_parallelism_config else 1,
    }
    offload = "weights, optimizer" if isinstance(plugin.cpu_offload, CPUOffloadPolicy) else "none"
    return f"FSDP{plugin.fsdp_version}", offload, settings


def _deepspeed(args: argparse.Namespace) -> tuple[str, str, dict[str, Any]]:
    from accelerate import DeepSpeedPlugin
    from accelerate.utils import patch_environment
    from accelerate.utils.launch import prepare_deepspeed_cmd_env

    args.deepspeed_fields_from_accelerate_config = ""
    _, environment = prepare_deepspeed_cmd_env(args)
    given = {name: value for name, value in environment.items() if name.startswith("ACCELERATE_")}
    with patch_environment(**given):
        plugin = DeepSpeedPlugin()
        plugin.set_mixed_precision(args.mixed_precision)
    settings = dict(plugin.deepspeed_config)
    places = {"optimizer": plugin.offload_optimizer_device, "weights": plugin.offload_param_device}
    moved = [what for what, device in places.items() if device not in (None, "none")]
    _ask_deepspeed(settings)
    return f"DeepSpeed ZeRO-{plugin.zero_stage}", ", ".join(moved) or "none", settings


def _ask_deepspeed(settings: dict[str, Any]) -> None:
    """Let DeepSpeed read its configuration, where it is installed; a Trainer fills each `auto`."""
    from labkit.scale.local import has_deepspeed

    if not has_deepspeed():
        return
    engine: Any = importlib.import_module("deepspeed.runtime.config")
    silencer = "steps_per_print"  # infinity, by which accelerate keeps DeepSpeed quiet
    filled = {
        name: value for name, value in settings.items() if value != "auto" and name != silencer
    }
    accumulated = filled.get("gradient_accumulation_steps", 1)
    filled |= {"train_micro_batch_size_per_gpu": 1, "train_batch_size": accumulated}
    engine.DeepSpeedConfig(filled)
