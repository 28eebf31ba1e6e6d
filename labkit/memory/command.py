"""`labkit estimate`: options to a table or JSON. No torch is imported."""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from labkit.memory import options as choices
from labkit.memory.closed_form import MemoryEstimate, build_step, estimate
from labkit.memory.inference import InferenceEstimate, estimate_generation, estimate_merge
from labkit.memory.units import size_text
from labkit.usage import Parser

MAKES = {
    "train": "one training step",
    "generate": "generating text",
    "merge": "merging an adapter",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what a training step takes, term by term; exits with 0."""
    given = vars(build_parser().parse_args(arguments))
    config, task, as_json = given.pop("config"), given.pop("task"), given.pop("json")
    new_tokens, traced = given.pop("new_tokens"), given.pop("trace")
    asked = {name: value for name, value in given.items() if value is not None}
    if new_tokens is not None:
        if task != "generate":
            raise ValueError(f"--new-tokens with --task {task}: only text has any: leave one out")
        asked["new_tokens"] = new_tokens
    if traced:
        return _trace(config, task, as_json, asked)
    if task == "generate":
        result = estimate_generation(config, **asked)
    elif task == "merge":
        result = estimate_merge(config, **asked)
    else:
        result = estimate(config, **asked)
    if as_json:
        print(json.dumps(result.to_json(), indent=2))
        return 0
    print("\n".join(_lines(result, f"{config}: {MAKES[task]}")))
    return 0


def _trace(config: str, task: str, as_json: bool, asked: dict[str, Any]) -> int:
    """Run the step on fake tensors as well, and print both; this imports torch."""
    if task != "train":
        raise ValueError(f"--trace with --task {task}: a training step is traced: leave one out")
    step = build_step(config, asked)
    choices.check_traceable(step.arch, step.options)  # before torch, which takes seconds
    from labkit.memory import agreement

    found = agreement.compare(config, **asked)
    if as_json:
        print(json.dumps(found.to_json(), indent=2))
    else:
        title = f"{config}: {MAKES[task]}, by closed form and by running it on fake tensors"
        print("\n".join(agreement.lines(found, title)))
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Options of `labkit estimate`; one that is not given is left to `labkit.memory.Options`."""
    parser = Parser(
        prog="labkit estimate",
        description=(
            "Predict the peak memory of a training step on one device from a config.json: every "
            "term with its formula and how sure it is; --json has sources, too. Takes milliseconds."
        ),
        epilog="example: labkit estimate config.json --method qlora --batch-size 4 --seq-len 2048",
    )
    add_config(parser)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--trace",
        action="store_true",
        help="also run the step on fake tensors, without memory, and print both; takes seconds",
    )
    parser.add_argument("--task", choices=list(MAKES), default="train", help="(train)")
    parser.add_argument("--new-tokens", type=int, help="of --task generate (256)")
    add_training_options(parser)
    return parser


def add_config(parser: argparse.ArgumentParser) -> None:
    """The model, as every command of memory takes it."""
    parser.add_argument(
        "config", help="a config.json, a model's folder, `bundled`, or a downloaded model's id"
    )


def add_training_options(parser: argparse.ArgumentParser) -> None:
    """One option for each field of `labkit.memory.Options`; None where it is not given."""
    default = choices.Options

    def choice(name: str, values: Sequence) -> None:
        usual = getattr(default, name, None)
        parser.add_argument(
            _flag(name), choices=values, type=type(values[0]), help=usual and f"({usual})"
        )

    def number(name: str, meaning: str, kind: type = int) -> None:
        usual = getattr(default, name)
        said = f" ({usual})" if usual is not None else ""
        parser.add_argument(_flag(name), type=kind, metavar="N", help=meaning + said)

    def switch(name: str, meaning: str) -> None:
        said = "on" if getattr(default, name) else "off"
        parser.add_argument(
            _flag(name), action=argparse.BooleanOptionalAction, help=f"{meaning} ({said})"
        )

    choice("method", choices.METHODS)
    choice("objective", choices.OBJECTIVES)
    number("lora_rank", "rank of LoRA and QLoRA")
    parser.add_argument(
        "--target-modules", help="names with commas, such as q_proj,v_proj (all-linear)"
    )
    number("lora_dropout", "0 saves a mask and a copy for each adapter", float)
    number("num_virtual_tokens", "of prompt, p-tuning and prefix")
    number("encoder_hidden_size", "of p-tuning (the model's own)")
    number("trainable_layers", "that freeze trains, from the top")
    number("batch_size", "rows, or pairs, per device and pass")
    number("seq_len", "tokens of a row")
    number("accumulation_steps", "passes per optimizer step")
    parser.add_argument(
        "--dtype", choices=list(choices.DTYPES), help="of the weights (the config's own, or bf16)"
    )
    switch("autocast", "compute in 16 bits under torch.autocast")
    choice("optimizer", choices.OPTIMIZERS)
    switch("foreach", "update all weights at once")
    switch("fused", "update them in one kernel")
    choice("attention", choices.ATTENTION)
    switch("padding", "rows are padded, so sdpa needs a mask")
    switch("gradient_checkpointing", "compute layers again in backward")
    switch("reentrant", "run a recomputed layer to its end before its backward pass")
    choice("loss_path", choices.LOSS_PATHS)
    switch("double_quant", "quantize the constants of NF4, too")
    switch("kbit_prepared", "norms in fp32 before QLoRA, as PEFT prepares them")
    parser.add_argument(
        "--experts",
        choices=choices.EXPERTS,
        help="of a mixture: in one parameter, as transformers 5, or in linear layers (stacked)",
    )
    switch("tables_per_layer", "tables of all positions in each layer, as in early 2024")
    switch("precompute_reference", "DPO without its reference model in memory")
    number("num_devices", "that share the work")
    parser.add_argument(
        "--zero-stage", type=int, choices=(0, 1, 2, 3), help="of DeepSpeed (no DeepSpeed)"
    )
    choice("sharding", choices.SHARDING)
    choice("offload", choices.OFFLOAD)
    choice("device", choices.DEVICES)
    number("cublas_workspace", "bytes cuBLAS works in, for each thread; 33,554,432 from Hopper on")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _lines(result: MemoryEstimate | InferenceEstimate, title: str) -> list[str]:
    """The table: largest term first, then phases and notes."""
    lines = [
        f"{title} peaks at {size_text(result.peak_allocated_bytes)} "
        f"({result.peak_allocated_bytes:,} bytes), in phase: {result.phase}"
    ]
    if isinstance(result, MemoryEstimate):
        lines.append(
            f"{result.moment}; {result.trainable_parameters:,} of {result.parameters:,} "
            "parameters of the base are trained"
            if not _adds(result)
            else f"{result.moment}; {result.trainable_parameters:,} parameters are trained beside "
            f"{result.parameters:,}"
        )
    lines.append("")
    ordered = sorted(result.terms, key=lambda one: -one.bytes)
    name_width = max(len(one.name) for one in ordered)
    for one in ordered:
        share = one.bytes / result.peak_allocated_bytes
        lines.append(
            f"{one.name:<{name_width}}  {size_text(one.bytes):>12}  {share:>6.1%}  "
            f"{one.status:<10}  {one.formula}"
        )
    if isinstance(result, MemoryEstimate):
        lines.append("")
        phases = (f"{phase} {size_text(n_bytes)}" for phase, n_bytes in result.phases.items())
        lines.append("phases: " + "; ".join(phases))
        if result.paged_bytes:
            lines.append(f"paged optimizer states beside it: {size_text(result.paged_bytes)}")
        if result.host_bytes:
            lines.append(f"on all hosts together: {size_text(result.host_bytes)}")
    return lines + [f"note: {note}" for note in result.notes]


def _adds(result: MemoryEstimate) -> bool:
    return any(one.name in ("adapters", "soft prompt") for one in result.terms)


if __name__ == "__main__":
    sys.exit(main())
