"""Killed, told to stop, out of room: what is saved stays whole, and a resumed run is the unbroken one, bit for bit."""

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from fault_worker import run_process
from safetensors.torch import load_file
from tiny_runs import tiny_options, tiny_run

from dnc_gpt2.checkpoints import MANIFEST, fault, newest_whole, numbered
from dnc_gpt2.trainer import DNCTrainer

MEASURED = ("train_runtime", "eval_runtime", "tokens_per_second", "train_samples_per_second", "train_steps_per_second")
OPTIONS = {
    "model": "dnc",
    "carry_memory": True,
    "dropout": 0.1,
    "max_steps": 6,
    "save_steps": 2,
    "eval_steps": 3,
    "logging_steps": 4,  # of no checkpoint's step: what is still to be logged survives too
    "gradient_accumulation_steps": 2,
    "per_device_train_batch_size": 2,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def unbroken(folder):
    """A function that gives the folder of an unbroken run, made once, of one process or several."""
    made = {}

    def make(ranks: int = 1, **changes) -> Path:
        key = (ranks, *changes.items())
        if key not in made:
            made[key] = folder / f"unbroken_{len(made)}"
            log = folder / f"unbroken_{len(made)}.log"
            codes = run_process(options(folder, made[key], ranks, **changes), log=log, ranks=ranks)
            assert codes == [0] * ranks, log.read_text()[-3000:]
        return made[key]

    return make


def options(folder: Path, output_dir: Path, ranks: int = 1, **changes) -> dict:
    two = {"per_device_train_batch_size": 2 // ranks, "ddp_backend": "gloo"} if ranks > 1 else {}
    return tiny_options(folder, **{**OPTIONS, **two, "output_dir": output_dir, **changes})


def history(run: Path) -> list[dict]:
    """All that was logged of training and evaluation but what depends on the time."""
    rows = json.loads((run / "dnc" / "trainer_state.json").read_text())["log_history"]
    kept = [{k: v for k, v in row.items() if not k.endswith(MEASURED)} for row in rows if "train_runtime" not in row]
    return [row for row in kept if "loss" in row or "eval_loss" in row]


def assert_same_run(run: Path, other: Path) -> None:
    assert history(run) == history(other)
    weights = [(folder / "dnc" / "model.safetensors").read_bytes() for folder in (run, other)]
    assert weights[0] == weights[1]
    states = [sorted((folder / "dnc" / "checkpoint-6").glob("*_state_*.safetensors")) for folder in (run, other)]
    assert [path.name for path in states[0]] == [path.name for path in states[1]] != []
    for path, other_path in zip(*states, strict=True):
        tensors, others = load_file(path), load_file(other_path)
        assert set(tensors) == set(others)
        assert all(torch.equal(x, others[name]) for name, x in tensors.items()), path


def survive(folder: Path, run: Path, faults: list, expected: Path, ranks: int = 1, **changes) -> str:
    """Resume a run through one fault after the other, then to its end; returns all that it said."""
    log = run.with_suffix(".log")
    resumed = {}
    for what, hit in faults:
        codes = run_process(options(folder, run, ranks, **resumed, **changes), what, log=log, ranks=ranks, hit=hit)
        assert codes[hit] == -signal.SIGKILL, (what, codes, log.read_text()[-3000:])
        assert all(codes), f"{what}: a process went on alone"
        for path in numbered(run / "dnc"):
            assert fault(path) is None or not (path / MANIFEST).exists() or "rotating" in what
        resumed = {"resume_from_checkpoint": "true"}
    codes = run_process(options(folder, run, ranks, **resumed, **changes), log=log, ranks=ranks)
    assert codes == [0] * ranks, log.read_text()[-3000:]
    assert_same_run(run, expected)
    return log.read_text()


# Killed

KILLS = [
    "killed_in_step 0",
    *(
        f"killed_writing checkpoint-2/{file}"
        for file in (
            *("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "log_state_0.safetensors"),
            *("memory_state_0.safetensors", "trainer_state.json"),
        )
    ),
    "killed_closing checkpoint-2",
    "killed_before evaluate",
    "killed_in_step 3",
    "killed_writing checkpoint-4/trainer_state.json",
    "killed_in_step 5",
    "killed_writing checkpoint-6/memory_state_0.safetensors",
    "killed_writing dnc/model.safetensors",
]


def test_a_run_that_is_killed_again_and_again_is_the_unbroken_one(folder, unbroken, tmp_path):
    said = survive(folder, tmp_path / "run", [(what, 0) for what in KILLS], unbroken())
    for step in (2, 4, 6):
        assert f"checkpoint-{step} is not whole (it has no {MANIFEST}" in said
    assert "going on from" in said and "there is no other" in said


def test_killed_while_old_checkpoints_are_removed_the_newest_is_whole(folder, unbroken, tmp_path):
    faults = [("killed_rotating checkpoint-2", 0), ("killed_rotating checkpoint-4", 0)]
    survive(folder, tmp_path / "run", faults, unbroken(), save_total_limit=1)
    newest, *older = numbered(tmp_path / "run" / "dnc")
    assert newest.name == "checkpoint-6" and fault(newest) is None and all(map(fault, older))


@pytest.mark.parametrize(
    "changes",
    [{"carry_memory": False}, {"streaming": True, "max_eval_tokens": 200}],
    ids=["shuffled", "streaming"],
)
def test_the_place_in_the_data_survives(folder, unbroken, tmp_path, changes):
    options(folder, tmp_path)  # writes the text
    lines = (folder / "train.txt").read_text().splitlines(keepends=True)
    for part in range(8):
        (folder / f"part_{part}.txt").write_text("".join(lines[3 * part : 3 * part + 4]))
    changes = {**changes, "train_file": str(folder / "part_*.txt")}
    faults = [(f"killed_in_step {step}", 0) for step in (1, 3, 5)]
    survive(folder, tmp_path / "run", faults, unbroken(**changes), **changes)


def test_one_of_two_processes_is_killed_again_and_again(folder, unbroken, tmp_path):
    faults = [
        ("killed_in_step 3", 1),
        ("killed_writing checkpoint-4/rng_state_1.pth", 1),
        ("killed_writing checkpoint-4/model.safetensors", 0),
        ("killed_in_step 5", 0),
    ]
    survive(folder, tmp_path / "run", faults, unbroken(ranks=2), ranks=2)


# Told to stop


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_ends_training_with_a_checkpoint_of_its_step(folder, unbroken, tmp_path, name, code):
    run, log = tmp_path / "run", tmp_path / "log"
    assert run_process(options(folder, run), f"signalled {name} 2", log=log) == [code]
    said = log.read_text()
    assert f"ended by {name} after step 3 of 6" in said and "--resume_from_checkpoint true" in said
    assert "Traceback" not in said
    assert newest_whole(run / "dnc") == (run / "dnc" / "checkpoint-3", {})
    assert run_process(options(folder, run, resume_from_checkpoint="true"), log=log) == [0]
    shutil.rmtree(run / "dnc" / "checkpoint-3")
    assert_same_run(run, unbroken())


def test_all_processes_stop_after_the_same_step_whichever_was_told(folder, unbroken, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    assert run_process(options(folder, run, 2), "signalled SIGTERM 2", log=log, ranks=2, hit=1) == [143, 143]
    assert log.read_text().count("ended by SIGTERM after step 3 of 6") == 1
    codes = run_process(options(folder, run, 2, resume_from_checkpoint="true"), log=log, ranks=2)
    assert codes == [0, 0], log.read_text()[-3000:]
    assert_same_run(run, unbroken(ranks=2))


def test_a_second_signal_ends_the_process_at_once(folder, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    assert run_process(options(folder, run), "impatient 2", log=log) == [130]
    assert "ended by SIGINT; what was saved is intact" in log.read_text() and "Traceback" not in log.read_text()
    assert newest_whole(run / "dnc")[0] == run / "dnc" / "checkpoint-2"


# No room


def test_a_full_disk_leaves_the_last_checkpoint_and_says_so(folder, unbroken, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    assert run_process(options(folder, run), "full 2 20000", log=log) == [1]
    said = log.read_text()
    assert "checkpoint-4 could not be saved" in said and "checkpoint-2 is whole" in said and "Make room" in said
    assert "Traceback" not in said
    assert [path.name for path in numbered(run / "dnc")] == ["checkpoint-2"], "what was half written makes room"
    assert run_process(options(folder, run, resume_from_checkpoint="true"), log=log) == [0]
    assert_same_run(run, unbroken())


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of its own; a function that mounts it with these options."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(flags: str) -> Path:
        if subprocess.run(["mount", "-t", "tmpfs", "-o", flags, "tmpfs", place], capture_output=True).returncode:
            pytest.skip("no right to mount a disk here")
        return place

    yield mount
    subprocess.run(["umount", place], capture_output=True)


def test_a_disk_that_fills_up_leaves_the_last_checkpoint(folder, unbroken, small_disk, tmp_path):
    pages = sum(-(-file.stat().st_size // 4096) for file in (unbroken() / "dnc" / "checkpoint-2").iterdir())
    disk, log = small_disk(f"size={pages * 6}k"), tmp_path / "log"  # one and a half checkpoints
    assert run_process(options(folder, disk / "run"), log=log) == [1]
    said = log.read_text()
    assert "could not be saved" in said and "Make room" in said and "Traceback" not in said
    last, skipped = newest_whole(disk / "run" / "dnc")
    assert last is not None and f"{last} is whole" in said and not skipped


def test_a_folder_that_may_not_be_written_to_is_refused_before_any_work(folder, small_disk, tmp_path):
    disk, log = small_disk("size=1m,ro"), tmp_path / "log"
    assert run_process(options(folder, disk / "run"), log=log) == [1]
    assert f"{disk} may not be written to; choose another --output_dir" in log.read_text()


# The same seed, the same run


def test_the_same_seed_gives_the_same_run_and_another_seed_another(folder, unbroken, tmp_path):
    for name, seed in (("same", 5), ("other", 6)):
        assert run_process(options(folder, tmp_path / name, seed=seed), log=tmp_path / "log") == [0]
    assert_same_run(tmp_path / "same", unbroken())
    metrics = [
        json.loads((run / "comparison.json").read_text())["models"]["dnc"]["metrics"]
        for run in (unbroken(), tmp_path / "same")
    ]
    assert all(metrics[0][name] == metrics[1][name] for name in metrics[0] if name not in MEASURED)
    assert history(tmp_path / "other") != history(unbroken())


def test_the_seed_and_the_versions_are_in_every_output(unbroken):
    run, outputs = unbroken(), ("comparison.json", "comparison.md", "dnc/README.md", "dnc/run.json")
    for name in (*outputs, f"dnc/checkpoint-6/{MANIFEST}"):
        text = (run / name).read_text()
        assert "seed" in text.lower() and torch.__version__.split("+")[0] in text, name
    for name in ("comparison.json", "dnc/run.json", f"dnc/checkpoint-6/{MANIFEST}"):
        content = json.loads((run / name).read_text())
        assert content["seed"] == 5 and set(content["versions"]) >= {"python", "torch", "transformers"}


# Asked for by name


def test_a_checkpoint_that_is_not_whole_is_refused_by_its_name(folder, unbroken, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    shutil.copytree(unbroken(), run)
    checkpoint = run / "dnc" / "checkpoint-4"
    whole = (checkpoint / "optimizer.pt").read_bytes()
    (checkpoint / "optimizer.pt").write_bytes(whole[:-1])
    asked = options(folder, run, resume_from_checkpoint=checkpoint)
    assert run_process(asked, log=log) == [1]
    assert (
        f"not a whole checkpoint (optimizer.pt has {len(whole) - 1} bytes instead of {len(whole)})" in log.read_text()
    )


def test_every_whole_checkpoint_knows_its_step_seed_and_versions(unbroken):
    for path in numbered(unbroken() / "dnc"):
        manifest = json.loads((path / MANIFEST).read_text())
        assert (f"checkpoint-{manifest['step']}", manifest["seed"]) == (path.name, 5)
        assert {"python", "torch", "transformers"} <= set(manifest["versions"])
        assert set(manifest["files"]) == {file.name for file in path.iterdir()} - {MANIFEST}


def test_a_signal_while_the_last_step_is_evaluated_ends_the_run(tmp_path, monkeypatch):
    evaluate, sent = DNCTrainer.evaluate, []

    def interrupted(self, *args, **kwargs):
        if self.state.global_step == self.state.max_steps and not sent:
            sent.append(self.args.output_dir)
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(self, *args, **kwargs)

    monkeypatch.setattr(DNCTrainer, "evaluate", interrupted)
    with pytest.raises(SystemExit) as end:
        tiny_run(tmp_path)
    assert end.value.code == 128 + signal.SIGTERM
    assert len(sent) == 1 and not (tmp_path / "run" / "dnc").exists()
