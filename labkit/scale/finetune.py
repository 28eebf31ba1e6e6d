"""The one training script: the same file on a laptop, under torchrun, and on a cluster.

    python -m labkit.scale.finetune --output_dir runs/one --use_cpu
    torchrun --standalone --nproc-per-node 2 -m labkit.scale.finetune --output_dir runs/two \\
        --use_cpu
    accelerate launch --config_file 8_gpus_fsdp2.yaml -m labkit.scale.finetune \\
        --output_dir runs/big --model meta-llama/Llama-3.1-8B-Instruct --assistant_only_loss

Nothing here asks how many processes there are: accelerate finds out, and TRL's trainer does the
rest. Every field of TRL's `SFTConfig` is an option, with its own default.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from peft import LoraConfig
from torch.distributed.elastic.multiprocessing.errors import record
from transformers import AutoTokenizer, HfArgumentParser, PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportPrivateImportUsage]

from labkit import data, models, paths, training
from labkit.chat_templates import with_generation_markers
from labkit.checkpoints import latest_checkpoint
from labkit.errors import LabkitError


@dataclass
class ScriptArguments:
    """What to train on what; how is `SFTConfig`'s."""

    model: str = field(default="bundled", metadata={"help": "bundled, a folder, or a model id"})
    model_dtype: str = field(
        default="float32",
        metadata={"help": "type of the weights; under bf16=True they are computed with in bf16"},
    )
    task: str = field(default="d1_tickets", metadata={"help": "a folder of data/tasks"})
    rows: int = field(default=0, metadata={"help": "first training rows to take; 0 takes all"})
    lora_rank: int = field(default=0, metadata={"help": "0 trains every weight"})


class StepLines(TrainerCallback):
    """One plain line for each logged step, from one process only: a log that others can read."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs and state.is_world_process_zero:
            print(f"step {state.global_step} of {state.max_steps}: loss {logs['loss']}", flush=True)


@record  # a failing rank leaves its exception where torchrun reads it
def main() -> None:
    end(train())


def end(trainer: SFTTrainer) -> None:
    """Leave together: gloo aborts a rank whose neighbour is gone while the two are connected."""
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


def train(arguments: Sequence[str] | None = None) -> SFTTrainer:
    """Train, save the model in `--output_dir`, and return the trainer.

    Args:
        arguments: of the command line; None takes this process's own.
    """
    parser = HfArgumentParser([ScriptArguments, SFTConfig])  # pyright: ignore
    script, args = parser.parse_args_into_dataclasses(
        list(sys.argv[1:] if arguments is None else arguments)
    )
    training.seed_everything(args.seed)
    models.check(script.model)
    source = str(paths.base_model_dir()) if script.model == "bundled" else script.model
    rows = data.load_task(script.task, "train")
    if script.rows:
        rows = rows.select(range(script.rows))
    args.model_init_kwargs = {"dtype": script.model_dtype} | (args.model_init_kwargs or {})
    trainer = SFTTrainer(
        model=source,  # TRL loads it: ZeRO-3 and FSDP each want a model loaded their own way
        args=args,
        train_dataset=rows,
        processing_class=with_generation_markers(AutoTokenizer.from_pretrained(source)),
        peft_config=LoraConfig(
            r=script.lora_rank,
            lora_alpha=2 * script.lora_rank,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        if script.lora_rank
        else None,
        callbacks=[StepLines()],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=resume_from(args.resume_from_checkpoint, args.output_dir))
    if trainer.is_fsdp_enabled:  # the last save is one ordinary model, gathered from all ranks
        plugin: Any = trainer.accelerator.state.fsdp_plugin
        plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model()
    trainer.save_state()
    return trainer


def resume_from(wanted: str | None, folder: str) -> str | None:
    """The checkpoint to go on from: a folder as it was given, or the newest whole one for `last`.

    Raises:
        LabkitError: `last`, and there is none.
    """
    if wanted != "last":
        return wanted
    newest = latest_checkpoint(folder)
    if newest is None:
        raise LabkitError(
            f"--resume_from_checkpoint=last: {folder} has no whole checkpoint: start without it"
        )
    return str(newest)


if __name__ == "__main__":
    main()
