"""A TRL run killed with SIGKILL at any moment resumes to the same weights."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.tiny import tiny_model

STEPS = 12
SCRIPT = """
import json, sys
from datasets import Dataset
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer
from labkit import models, training

model_folder, run_folder, evidence = sys.argv[1:4]

class Tell(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        print("step", state.global_step, flush=True)

training.seed_everything(0)
model, tokenizer = models.load(model_folder)
rows = [
    {"messages": [dict(role="user", content=f"say {i}"), dict(role="assistant", content=str(i))]}
    for i in range(48)
]
trainer = SFTTrainer(
    model=model,
    args=SFTConfig(
        output_dir=run_folder, max_steps=12, per_device_train_batch_size=4, learning_rate=1e-3,
        save_steps=2, save_total_limit=2, logging_steps=1, assistant_only_loss=True,
        activation_checkpointing=False, bf16=False, use_cpu=True, seed=0, report_to="none",
        disable_tqdm=True,
    ),
    train_dataset=Dataset.from_list(rows),
    processing_class=tokenizer,
    callbacks=[Tell()],
)
newest = training.latest_checkpoint(run_folder)
trainer.train(resume_from_checkpoint=str(newest) if newest else None)
losses = training.history(trainer)["loss"].dropna().tolist()
with open(evidence, "w") as file:
    json.dump({"weights": models.fingerprint(trainer.model), "losses": losses}, file)
"""


def start(folder: Path, model: Path, run: str) -> subprocess.Popen:
    script = folder / "train.py"
    script.write_text(SCRIPT, encoding="utf-8")
    return subprocess.Popen(
        [sys.executable, str(script), str(model), str(folder / run), str(folder / f"{run}.json")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
    )


def finish(process: subprocess.Popen, evidence: Path) -> dict:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return json.loads(evidence.read_text(encoding="utf-8"))


@pytest.mark.timeout(600)
def test_a_run_killed_at_random_moments_ends_with_the_same_weights(tmp_path):
    model = tmp_path / "model"
    tiny_model("llama", model)
    whole = finish(start(tmp_path, model, "whole"), tmp_path / "whole.json")

    rng = random.Random(time.time_ns())
    moments = sorted(rng.sample(range(1, STEPS), 2))
    print("killed after steps", moments)
    for moment in moments:
        victim = start(tmp_path, model, "killed")
        for line in victim.stdout:
            if line.startswith("step") and int(line.split()[1]) >= moment:
                time.sleep(rng.random() * 0.05)  # sometimes in the middle of a save
                break
        victim.kill()
        victim.communicate()
    resumed = finish(start(tmp_path, model, "killed"), tmp_path / "killed.json")

    assert resumed["weights"] == whole["weights"]
    assert resumed["losses"] == whole["losses"]
