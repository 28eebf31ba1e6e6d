"""Two real processes over gloo: gradients, bytes, checkpoints, a killed rank, configurations."""

import contextlib
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
import torch.distributed as dist
from accelerate.utils import merge_fsdp_weights
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from transformers import AutoModelForCausalLM

from labkit import memory, models, scale
from labkit.errors import LabkitError
from labkit.scale import launch, local, sharded
from labkit.scale.batches import encode, share, supervised_tokens, ticket_rows

P = 4_992_000
EMBEDDING, LAYER = 1823 * 256, 754_176
deepspeed_only = pytest.mark.skipif(not scale.has_deepspeed(), reason="DeepSpeed is not installed")


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("job")


@pytest.fixture(scope="module")
def saved_by_one(job: Path) -> dict:
    """Two steps of FSDP2 in this process, a group of one, saved in pieces."""
    with group_of_one():
        return sharded.checkpoint(job, to_step=2, save=str(job / "by-one"))


@pytest.fixture(scope="module")
def outcome(saved_by_one: dict, job: Path) -> tuple[dict[str, list[dict]], str]:
    """Every measurement of two ranks in one start of torchrun, at whose end one fails on purpose.

    Returns:
        what the ranks measured, and the error.
    """
    by_one, by_two = str(job / "by-one"), str(job / "by-two")
    probes = {
        "ddp": {},
        "fsdp2": {},
        "zero:torch": {"engine": "torch"},
        "checkpoint": {"to_step": 4},
        "checkpoint:resumed": {"to_step": 4, "resume": by_one, "save_at": 3, "save": by_two},
    }
    if scale.has_deepspeed():
        probes["zero"] = {}
    with pytest.raises(LabkitError) as failure:
        scale.run_many(probes | {"broken": {}}, folder=job)
    return local.read_results(job, probes, 2), str(failure.value)


@pytest.fixture(scope="module")
def measured(outcome) -> dict[str, list[dict]]:
    return outcome[0]


@contextlib.contextmanager
def group_of_one() -> Iterator[None]:
    """A process group of this process alone, and no trace of it afterwards."""
    from accelerate.state import AcceleratorState

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
        AcceleratorState._reset_state(reset_partial_state=True)


# ---- data parallel -----------------------------------------------------------------------------


def batch_named(ranks: list[dict], kind: str) -> list[dict]:
    return [next(b for b in rank["batches"] if kind in b["batch"]) for rank in ranks]


@pytest.mark.parametrize("kind", ["answers only", "every token", "general on rank 1"])
def test_scale_gradients_of_two_ranks_are_those_of_one_process(measured, kind):
    for found in batch_named(measured["ddp"], kind):
        assert found["num_items_in_batch"]["relative"] < 1e-6
        assert found["num_items_in_batch"]["largest"] < 1e-5


def test_scale_gradients_agree_with_a_process_that_knows_nothing_of_ranks(measured, job):
    model, tokenizer = models.load()
    general = scale_general_rows(4)
    model(**encode(tokenizer, ticket_rows(0, 4) + general)).loss.backward()
    found = torch.load(job / "ddp_gradients.pt", weights_only=True)
    assert sum(gradient.numel() for gradient in found.values()) == P
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-5)


def scale_general_rows(n: int) -> list[dict]:
    from labkit import data

    return data.load_task("general", "train").select(range(n)).to_list()


def test_scale_a_mean_of_means_is_wrong_where_ranks_hold_unequal_tokens(measured):
    ranks = measured["ddp"]
    equal, longer, mixed = (
        batch_named(ranks, kind) for kind in ("answers only", "every token", "general on rank 1")
    )
    assert [b["tokens"] for b in equal] == [36, 36]
    assert [b["tokens"] for b in longer] == [177, 210]
    assert [b["tokens"] for b in mixed] == [36, 11]
    assert {b["tokens_of_all"] for b in mixed} == {47}
    assert equal[0]["mean_of_means"]["relative"] < 1e-6
    assert longer[0]["mean_of_means"]["relative"] == pytest.approx(0.060, abs=0.005)
    assert mixed[0]["mean_of_means"]["relative"] == pytest.approx(0.347, abs=0.02)


def test_scale_ddp_keeps_a_whole_gradient_and_sends_it_in_buckets(measured):
    for rank in measured["ddp"]:
        assert rank["gradient_bytes"] == sum(rank["bucket_bytes"]) == 4 * P


# ---- FSDP2 -------------------------------------------------------------------------------------


def test_scale_a_shard_is_as_large_as_the_formula_says(measured):
    for number, rank in enumerate(measured["fsdp2"]):
        held = scale.shard_numbers(rank["shapes"].values(), 2, number)
        reserved = scale.shard_numbers(rank["shapes"].values(), 2, number, padded=True)
        assert rank["parameters"] == rank["gradients"] == 4 * held
        assert rank["optimizer"] == 8 * held
        assert rank["parameters_reserved"] == rank["gradients_reserved"] == 4 * reserved
    # The embedding has an odd number of rows, so one rank holds a row of 256 more.
    first, second = (rank["parameters"] for rank in measured["fsdp2"])
    assert (first, second) == (9_984_512, 9_983_488)
    assert first + second == 4 * P


def test_scale_what_is_gathered_is_what_the_estimate_names(measured):
    estimate = fsdp_estimate(57)
    terms = {term.name: term.bytes for term in estimate.terms}
    for rank in measured["fsdp2"]:
        assert rank["gathered_root"] == terms["gathered: embedding, head and last norm"]
        assert rank["gathered_layer"] == terms["gathered: decoder layers"] // 2 == 4 * LAYER
        assert rank["layers_at_once"] == 1
        states = rank["parameters"] + rank["gradients"] + rank["optimizer"]
        assert states == pytest.approx(estimate.model_states_bytes, rel=1e-3)


def test_scale_the_estimate_foresees_the_peak_that_torch_tracks(measured):
    _, tokenizer = models.load()
    for number, rank in enumerate(measured["fsdp2"]):
        rows = encode(tokenizer, share(ticket_rows(16), number, 2))  # of the last step
        estimate = fsdp_estimate(rows["input_ids"].shape[1])
        assert estimate.peak_allocated_bytes == pytest.approx(rank["tracked"]["Total"], rel=0.03)


def fsdp_estimate(seq_len: int) -> memory.MemoryEstimate:
    return memory.estimate(
        "bundled",
        dtype="fp32",
        num_devices=2,
        sharding="fsdp",
        batch_size=4,
        seq_len=seq_len,
        attention="eager",
        padding=True,
        gradient_checkpointing=False,
        device="cpu",
    )


def test_scale_sharded_losses_are_those_of_one_process(measured):
    first, second = measured["fsdp2"]
    assert first["losses"] == second["losses"]
    assert first["losses"] == pytest.approx(first["losses_alone"], rel=1e-5)
    assert first["losses"][-1] < first["losses"][0] / 2


@pytest.mark.parametrize(
    ("shapes", "devices", "held"),
    [
        ([(5, 3)], 2, [9, 6]),
        ([(5, 3)], 4, [6, 6, 3, 0]),  # pieces of two rows: the fourth rank gets none
        ([(1,), (4, 2)], 2, [5, 4]),
        ([(6,)], 1, [6]),
    ],
)
def test_scale_counts_pieces_as_torch_chunk_cuts_them(shapes, devices, held):
    assert [scale.shard_numbers(shapes, devices, rank) for rank in range(devices)] == held
    cut = [torch.zeros(shape).chunk(devices) for shape in shapes]
    by_torch = [
        sum(pieces[rank].numel() for pieces in cut if rank < len(pieces)) for rank in range(devices)
    ]
    assert by_torch == held


def test_scale_refuses_a_rank_that_is_not_there():
    with pytest.raises(ValueError, match="rank=2 of devices=2: ranks count from 0"):
        scale.shard_numbers([(4, 4)], 2, 2)


# ---- ZeRO --------------------------------------------------------------------------------------


def test_scale_zero_formula_is_the_paper_s():
    assert sum(scale.zero_parts(P, 0, 2).values()) == 16 * P
    for stage, expected in ((1, 4 * P + 12 * P / 64), (2, 2 * P + 14 * P / 64), (3, 16 * P / 64)):
        parts = scale.zero_parts(P, stage, 64)
        assert sum(parts.values()) == expected == memory.sharding.zero_states(P, stage, 64)
    with pytest.raises(ValueError, match="stage=4"):
        scale.zero_parts(P, 4, 2)


@deepspeed_only
def test_scale_deepspeed_holds_what_the_formula_and_the_estimate_say(measured):
    for number, rank in enumerate(measured["zero"]):
        assert rank["numbers"] == P
        for row in rank["rows"]:
            formula = scale.zero_parts(P, row["stage"], 2)
            estimate = memory.estimate("bundled", num_devices=2, zero_stage=row["stage"])
            assert estimate.model_states_bytes == sum(formula.values())
            assert row["parameters"] == formula["parameters"]
            assert row["optimizer"] == formula["optimizer"]
            across = kept_across_the_border(measured, number) if row["stage"] == 2 else 0
            assert row["gradients"] == formula["gradients"] + across


def kept_across_the_border(measured, rank: int) -> int:
    """Bytes of bf16 gradient that stage 2 keeps beyond its half: one matrix is kept whole."""
    start, border = 0, P // 2
    for shape in measured["fsdp2"][0]["shapes"].values():
        end = start + math.prod(shape)
        if start < border < end:
            return 2 * (end - border if rank == 0 else border - start)
        start = end
    return 0


@deepspeed_only
def test_scale_the_committed_measurement_of_deepspeed_is_today_s(measured, monkeypatch):
    monkeypatch.setattr(local, "has_deepspeed", lambda: False)
    committed = scale.zero_measured()
    assert [without_version(rank) for rank in committed] == [
        without_version(rank) for rank in measured["zero"]
    ]
    with pytest.raises(LabkitError, match="processes=4: without DeepSpeed only the measurement"):
        scale.zero_measured(4)


def without_version(rank: dict) -> dict:
    return rank | {"engine": rank["engine"].split()[0]}


def test_scale_torch_divides_the_same_state_where_deepspeed_is_missing(measured):
    ranks = measured["zero:torch"]
    for row, stage in zip(ranks[0]["rows"], (1, 2, 3), strict=True):
        assert row["stage"] == stage
        for part, expected in scale.zero_parts(P, stage, 2, width=4).items():
            # FSDP cuts rows and ZeroRedundancyOptimizer deals out tensors: halves to 0.1 %.
            assert row[part] == pytest.approx(expected, rel=1e-3)
    for stage in range(3):  # and together nothing is missing or double
        assert sum(rank["rows"][stage]["optimizer"] for rank in ranks) == 8 * P


# ---- sharded checkpoints -----------------------------------------------------------------------


def test_scale_each_rank_writes_its_part_of_a_checkpoint(measured, saved_by_one):
    assert len([f for f in saved_by_one["files"] if f.startswith("pytorch_model_fsdp_0")]) == 1
    files = measured["checkpoint:resumed"][0]["files"]
    for part in ("pytorch_model_fsdp_0", "optimizer_0"):
        sizes = [size for name, size in files.items() if name.startswith(part)]
        assert len(sizes) == 2
        assert max(sizes) < 0.6 * sum(sizes)


def test_scale_a_checkpoint_of_one_process_goes_on_in_two(measured, saved_by_one):
    unbroken = measured["checkpoint"][0]["losses"]
    assert list(saved_by_one["losses"]) == ["1", "2"]
    for rank in measured["checkpoint:resumed"]:
        assert rank["first_step"] == 2
        assert list(rank["losses"]) == ["3", "4"]
        together = saved_by_one["losses"] | rank["losses"]
        assert together == pytest.approx(unbroken, rel=1e-5)


def test_scale_a_checkpoint_of_two_ranks_goes_on_in_one_process(measured, job):
    with group_of_one():
        resumed = sharded.checkpoint(job, to_step=4, resume=str(job / "by-two"))
    assert resumed["first_step"] == 3
    unbroken = measured["checkpoint"][0]
    assert resumed["losses"] == pytest.approx({"4": unbroken["losses"]["4"]}, rel=1e-5)
    assert resumed["logits"] == pytest.approx(unbroken["logits"], abs=1e-3)


def test_scale_a_sharded_checkpoint_becomes_one_ordinary_model(measured, job, tmp_path):
    merged = tmp_path / "merged"
    with group_of_one():  # what `accelerate merge-weights` calls
        merge_fsdp_weights(str(job / "by-two" / "pytorch_model_fsdp_0"), str(merged))
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (merged / name).write_bytes((job / "by-two" / name).read_bytes())
    model = AutoModelForCausalLM.from_pretrained(merged, dtype="float32")
    _, tokenizer = models.load()
    ids = encode(tokenizer, ticket_rows(0, 1))["input_ids"]
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, -1, :8].tolist()
    assert logits == pytest.approx(measured["checkpoint:resumed"][0]["logits"], abs=1e-4)
    base, _ = models.load()
    with torch.no_grad():
        untrained = base(input_ids=ids).logits[0, -1, :8].tolist()
    assert max(abs(a - b) for a, b in zip(logits, untrained, strict=True)) > 0.1


# ---- the training script -----------------------------------------------------------------------

STEPS = {"max_steps": 8, "save_steps": 3, "learning_rate": 5e-4, "rows": 64}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, local.TrainRun, local.TrainRun]:
    """A run of two ranks of which one is killed after step 7, and the run that goes on from it.

    torchrun starts the first, `accelerate launch` the second.
    """
    folder = tmp_path_factory.mktemp("train") / "run"
    options = STEPS | {"per_device_train_batch_size": 4}
    killed = scale.train(folder, kill_rank=1, kill_at_step=7, **options)
    again = scale.train(folder, launcher="accelerate", resume_from_checkpoint="last", **options)
    return folder, killed, again


def test_scale_a_killed_rank_ends_the_job_with_one_clear_line(runs):
    folder, killed, _ = runs
    assert not killed.finished
    assert killed.seconds_to_end < 20
    assert "\n" not in killed.message
    assert killed.reason.startswith("rank 1 was killed by SIGKILL")
    assert f"The newest whole checkpoint is {folder / 'checkpoint-6'}." in killed.message
    assert killed.message.endswith("--resume_from_checkpoint=last")
    assert "labkit.scale.launch torchrun --standalone" in killed.message
    assert max(killed.losses) < 8


def test_scale_a_killed_job_goes_on_to_the_last_bit(runs):
    _, killed, resumed = runs
    assert resumed.finished and resumed.message == ""
    assert sorted(resumed.losses) == [7, 8]
    assert resumed.losses[7] == killed.losses[7]
    assert "labkit.scale.launch accelerate" in resumed.command


def test_scale_one_process_trains_as_two_do(runs, tmp_path, capsys):
    from labkit.scale import finetune

    folder, killed, resumed = runs
    command = scale.train_command(
        tmp_path / "alone", processes=1, per_device_train_batch_size=8, **STEPS
    )
    finetune.train(command[3:])
    said = re.findall(r"step (\d+) of 8: loss (\S+)", capsys.readouterr().out)
    alone = {int(step): float(loss) for step, loss in said}
    together = killed.losses | resumed.losses
    assert sorted(alone) == sorted(together) == list(range(1, 9))
    assert list(alone.values()) == pytest.approx(
        [together[step] for step in sorted(together)], rel=1e-4
    )
    one, _ = models.load(tmp_path / "alone")
    two, _ = models.load(folder)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=5e-4)


def test_scale_the_script_trains_an_adapter_as_well(tmp_path, capsys):
    from labkit.scale import finetune

    options = {"max_steps": 2, "rows": 16, "lora_rank": 2, "save_strategy": "no"}
    trainer = finetune.train(scale.train_command(tmp_path, processes=1, **options)[3:])
    assert (tmp_path / "adapter_model.safetensors").is_file()
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    assert trained == 6 * 2 * (4 * 512 + 3 * 896)
    assert "step 2 of 2: loss" in capsys.readouterr().out


def test_scale_ranks_wait_for_each_other_before_they_part(monkeypatch):
    """A rank whose neighbour leaves while the two are connected is aborted, its work all done."""
    from labkit.scale import finetune

    called = []
    accelerator = SimpleNamespace(
        wait_for_everyone=lambda: called.append("wait"), end_training=lambda: called.append("part")
    )
    trained = SimpleNamespace(accelerator=accelerator)
    monkeypatch.setattr(finetune, "train", lambda: called.append("train") or trained)
    finetune.main()
    assert called == ["train", "wait", "part"]


def test_scale_going_on_from_nothing_is_refused(tmp_path):
    from labkit.scale import finetune

    with pytest.raises(LabkitError, match="has no whole checkpoint: start without it"):
        finetune.resume_from("last", str(tmp_path))
    assert finetune.resume_from("some/checkpoint-3", str(tmp_path)) == "some/checkpoint-3"
    assert finetune.resume_from(None, str(tmp_path)) is None


# ---- jobs that go wrong ------------------------------------------------------------------------


def processes_of(folder: Path) -> list[psutil.Process]:
    """Processes whose command names a folder."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if any(str(folder) in part for part in process.info["cmdline"] or []):
            found.append(process)
    return found


def test_scale_a_failing_rank_is_named_with_its_exception(outcome, job):
    expected = r"rank 1 \(process \d+\) failed with ValueError: rank 1 fails on purpose; all other"
    assert re.match(expected, outcome[1])
    assert processes_of(job) == []


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signal")
def test_scale_the_stop_button_leaves_no_process(tmp_path):
    def press() -> None:
        deadline = time.monotonic() + 60
        while not all((tmp_path / f"waiting{rank}").exists() for rank in (0, 1)):
            if time.monotonic() > deadline:
                return
            time.sleep(0.05)
        assert len(processes_of(tmp_path)) >= 3  # torchrun and two ranks
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        scale.run("endless", folder=tmp_path, timeout=90)
    assert processes_of(tmp_path) == []


def test_scale_time_that_runs_out_leaves_no_process(tmp_path):
    with pytest.raises(LabkitError, match="stopped after timeout=1 seconds; its last line was"):
        scale.run("endless", folder=tmp_path, timeout=1)
    assert processes_of(tmp_path) == []


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: scale.run("fsdp3"), "probe 'fsdp3' is unknown: use ddp, fsdp2"),
        (lambda: scale.run("ddp", 0), "processes=0: give 1 or more"),
        (lambda: scale.train("x", kill_rank=2), "kill_rank=2 of processes=2: ranks count"),
        (lambda: scale.train("x", launcher="mpirun"), "launcher='mpirun' is unknown: use torchrun"),
    ],
)
def test_scale_refuses_impossible_jobs_before_they_start(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def failure(exitcode: int, rank: int = 0) -> ProcessFailure:
    return ProcessFailure(local_rank=rank, pid=100 + rank, exitcode=exitcode, error_file="none")


def test_scale_a_killed_rank_is_the_cause_and_not_the_rank_that_lost_it():
    error = ChildFailedError("x", {0: failure(1, 0), 1: failure(-signal.SIGKILL, 1)})
    line = launch.explain(error, [], "torchrun")
    assert line.startswith("rank 1 (process 101) was killed by SIGKILL, as the system does when")
    stopped = ChildFailedError("x", {0: failure(-signal.SIGTERM, 0), 1: failure(3, 1)})
    assert launch.explain(stopped, [], "torchrun").startswith("rank 1 (process 101) ended with")


def test_scale_a_job_without_a_checkpoint_is_told_to_save_sooner(tmp_path):
    error = ChildFailedError("x", {1: failure(3, 1)})
    line = launch.explain(error, ["--output_dir", str(tmp_path)], "torchrun")
    assert line == (
        "rank 1 (process 101) ended with status 3; all other ranks were stopped. "
        f"{tmp_path} has no checkpoint yet: start again, with a smaller --save_steps."
    )


def test_scale_a_rank_that_says_nothing_is_quoted(tmp_path):
    log = tmp_path / "id" / "attempt_0" / "1"
    log.mkdir(parents=True)
    (log / "stderr.log").write_text("first\nno space left on device\n", encoding="utf-8")
    ended = local._Ended(
        1, ["rank 1 (process 7) ended with status 3; all other ranks were stopped."]
    )
    assert local._with_last_words(ended, tmp_path).endswith("was: no space left on device")


def test_scale_launch_refuses_an_unknown_engine(capsys):
    assert launch.main(["mpirun", "script.py"]) == 2
    assert "engine 'mpirun' is unknown: use torchrun or accelerate" in capsys.readouterr().err


# ---- configurations for clusters ---------------------------------------------------------------

EXPECTED = {
    "1_gpu": ("one process", 1, 1, "bf16", "none"),
    "2_cpu_processes": ("DDP", 1, 2, "no", "none"),
    "2_nodes_8_gpus_fsdp2": ("FSDP2", 2, 16, "bf16", "none"),
    "8_gpus_fsdp2": ("FSDP2", 1, 8, "bf16", "none"),
    "8_gpus_zero3_offload": ("DeepSpeed ZeRO-3", 1, 8, "bf16", "optimizer, weights"),
}


def test_scale_every_configuration_is_read_by_its_engine():
    found = {}
    for path in scale.config_paths():
        plan = scale.check_config(path)
        found[path.stem] = (
            plan.engine, plan.machines, plan.processes, plan.precision, plan.offload
        )  # fmt: skip
    assert found == EXPECTED


def test_scale_the_plugins_are_built_as_the_files_say():
    fsdp = scale.check_config(scale.config_path("8_gpus_fsdp2")).settings
    assert (fsdp["fsdp_version"], fsdp["reshard_after_forward"]) == (2, True)
    assert fsdp["state_dict_type"] == "SHARDED_STATE_DICT"
    assert fsdp["auto_wrap_policy"] == "transformer_auto_wrap_policy"
    zero = scale.check_config(scale.config_path("8_gpus_zero3_offload")).settings
    assert zero["zero_optimization"]["stage"] == 3
    assert zero["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert zero["bf16"]["enabled"]


def test_scale_commands_name_every_machine():
    plan = scale.check_config(scale.config_path("2_nodes_8_gpus_fsdp2"))
    first, second = plan.commands("--output_dir", "RUN")
    assert "--machine_rank 0 -m labkit.scale.finetune --output_dir RUN" in first
    assert "--machine_rank 1" in second


def test_scale_the_hybrid_that_a_comment_offers_is_understood(tmp_path):
    text = scale.config_path("2_nodes_8_gpus_fsdp2").read_text(encoding="utf-8")
    offered = re.findall(r"^#   (parallelism_config:|  parallelism_config_.*)$", text, re.MULTILINE)
    assert len(offered) == 3
    file = tmp_path / "hybrid.yaml"
    file.write_text(text + "\n".join(offered) + "\n", encoding="utf-8")
    assert scale.check_config(file).settings["replicas"] == 2


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("8_gpus_fsdp2", "fsdp_version", "fsdp_versoin", "fsdp_config has 'fsdp_versoin', which"),
        ("8_gpus_fsdp2", "num_machines", "machines", r"had unknown keys \(\['machines'\]\)"),
        ("8_gpus_fsdp2", "TRANSFORMER_BASED", "LAYER_BASED", "Invalid auto wrap policy: LAYER"),
        ("8_gpus_fsdp2", "SHARDED_STATE", "SHARDS", "the value 'SHARDS_DICT' is unknown"),
        ("8_gpus_fsdp2", "type: FSDP", "type: FSDP3", "'FSDP3' is not a valid DistributedType"),
        ("8_gpus_fsdp2", "bf16  #", "bf17  #", "Unknown mixed_precision mode: bf17"),
        ("8_gpus_zero3_offload", "zero_stage: 3", "zero_stages: 3", "has 'zero_stages', which"),
        ("8_gpus_zero3_offload", "num_processes: 8", "num_processes: [", "while parsing"),
    ],
)
def test_scale_wrong_keys_and_values_are_refused(tmp_path, name, old, new, message):
    text = scale.config_path(name).read_text(encoding="utf-8")
    file = tmp_path / "wrong.yaml"
    file.write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(ValueError, match=message) as refusal:
        scale.check_config(file)
    assert "\n" not in str(refusal.value)


@deepspeed_only
def test_scale_deepspeed_refuses_a_device_that_it_does_not_know(tmp_path):
    text = scale.config_path("8_gpus_zero3_offload").read_text(encoding="utf-8")
    file = tmp_path / "wrong.yaml"
    file.write_text(text.replace("param_device: cpu", "param_device: tape"), encoding="utf-8")
    with pytest.raises(ValueError, match="offload_param.device Input should be 'none', 'cpu'"):
        scale.check_config(file)


def test_scale_names_the_configurations_it_has(tmp_path):
    with pytest.raises(ValueError, match="config '9_gpus' is unknown: use 1_gpu, 2_cpu_processes"):
        scale.config_path("9_gpus")
    with pytest.raises(ValueError, match="is missing: give a file"):
        scale.check_config(tmp_path / "none.yaml")


def test_scale_costs_nothing_to_import():
    code = "import sys; from labkit import scale; scale.run_many, scale.shard_numbers; "
    code += "print(sorted({'torch', 'accelerate', 'deepspeed'} & set(sys.modules)))"
    root = Path(__file__).resolve().parent.parent
    said = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert said.stdout.strip() == "[]"


def test_scale_counts_tokens_that_have_something_before_them():
    _, tokenizer = models.load()
    rows = ticket_rows(0, 2)
    every = encode(tokenizer, rows, answers_only=False)
    assert supervised_tokens(every) == int(every["attention_mask"].sum()) - 2
    assert supervised_tokens(encode(tokenizer, rows)) == 18
