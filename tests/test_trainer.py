"""Training and evaluation: the losses are the stated ones, however a batch is split, and nothing unscored counts."""

import json
import math
from dataclasses import fields

import numpy as np
import pytest
import torch
from torch.nn.functional import log_softmax
from transformers import TrainerCallback, TrainingArguments

import dnc_gpt2.corpus
from dnc_gpt2.corpus import Corpus, Exam
from dnc_gpt2.evaluation import evaluate, prediction_columns, write_entropy, write_sparsity
from dnc_gpt2.examples import EMPTY, ExampleDataset, collate
from dnc_gpt2.models import new_models
from dnc_gpt2.tasks import Question
from dnc_gpt2.tokenization import TokenizedText, train_tokenizer
from dnc_gpt2.trainer import WITHOUT_EFFECT, DNCTrainer, DNCTrainingArguments, take_sample
from losses_dnc_gpt2 import IGNORED

WINDOW, EXAMPLE, VOCABULARY = 8, 16, 67
ADDRESSINGS = ("lru", "dnc", "simplified")
LANGUAGE_MODEL_METRICS = (
    *("loss", "ppl", "bpt", "top1_acc", "top5_acc", "confidence", "mean_rank", "pred_entropy"),
    *("bits_per_byte", "word_perplexity"),
)
MEMORY_METRICS = ("avg_gate", "gate_std", "write_rate", "write_sparsity", "mem_kl")


def random_text(num_tokens: int, seed: int = 0) -> TokenizedText:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, VOCABULARY, (num_tokens,), generator=generator)
    tokens[generator_places(num_tokens)] = 0
    starts = torch.cat([torch.tensor([True]), tokens[:-1] == 0])
    return TokenizedText(tokens, starts, num_bytes=3 * num_tokens, num_words=num_tokens // 2)


def generator_places(num_tokens: int) -> list[int]:
    return list(range(21, num_tokens - 1, 37))


def examples(num_tokens: int, seed: int = 0, **options) -> ExampleDataset:
    return ExampleDataset(random_text(num_tokens, seed), WINDOW, EXAMPLE // WINDOW, **options)


def arguments(folder, **options) -> DNCTrainingArguments:
    defaults = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        # AdamW turns differences of rounding into differences of steps where a gradient is near 0.
        "optim": "sgd",
        "learning_rate": 0.1,
        "lambda_routing": 1.0,
        "lambda_entropy": 0.5,
    }
    return DNCTrainingArguments(**{**defaults, **options})


@pytest.fixture
def models(tiny_config):
    """A function that makes both models without dropout, the memory away from its special start."""

    def make(**options):
        made = new_models(tiny_config(scan="eager", **options), ["baseline", "dnc"], seed=0)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in made["dnc"].transformer.memory.parameters():
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
        return made

    return make


def train(model, folder, dataset, carry_memory=False, eval_dataset=None, callbacks=None, resume=None, **options):
    trainer = DNCTrainer(
        model, arguments(folder, **options), dataset, eval_dataset, carry_memory=carry_memory, callbacks=callbacks
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def training_rows(trainer) -> list[dict[str, float]]:
    return [row for row in trainer.state.log_history if "loss" in row]


def padded_batch() -> dict[str, torch.Tensor]:
    """A whole example, one with 5 of 16 tokens, and the empty one."""
    dataset = examples(EXAMPLE + 6)
    return collate([dataset[0], dataset[1], dataset[EMPTY]])


def hand_computed_terms(outputs, targets, addressing: str, detach: bool = True):
    """L_LM, L_routing and L_entropy, token by token; the KL (and the gate that weighs the entropy) as constants."""
    language = routing = entropy = torch.zeros((), dtype=torch.float64)
    count = 0
    for row in range(targets.shape[0]):
        for t in range(targets.shape[1]):
            if targets[row, t] == IGNORED:
                continue
            count += 1
            with_memory = log_softmax(outputs.logits[row, t].double(), -1)
            without = log_softmax(outputs.base_logits[row, t].double(), -1)
            language = language - with_memory[targets[row, t]]
            divergence = (with_memory.exp() * (with_memory - without)).sum()
            gate = outputs.write_gates[row, t].double()
            routing = routing - gate * (divergence.detach() if detach else divergence)
            w = outputs.write_weights[row, t].double()
            if addressing == "simplified":
                entropy = entropy - (w * w.log()).sum()
            elif w.sum() >= 1e-6:
                share = w / w.sum()
                entropy = entropy - gate.detach() * torch.xlogy(share, share).sum()
    return language / count, routing / count, entropy / count


def loss_and_outputs(model, folder, batch, **options):
    trainer = DNCTrainer(model, arguments(folder, **options), examples(200))
    model.train()
    outputs = model(**batch, output_memory=True, output_base_logits=True, use_cache=False)
    return trainer.compute_loss(model, batch, num_items_in_batch=(batch["shift_labels"] != IGNORED).sum()), outputs


# The composite loss


@pytest.mark.parametrize("addressing", ADDRESSINGS)
def test_composite_loss_equals_a_hand_computation(models, tmp_path, addressing):
    batch = padded_batch()
    model = models(addressing=addressing)["dnc"]
    loss, outputs = loss_and_outputs(model, tmp_path, batch, lambda_routing=0.7, lambda_entropy=0.3)
    language, routing, entropy = hand_computed_terms(outputs, batch["shift_labels"], addressing)
    assert routing < 0 < entropy
    assert loss.item() == pytest.approx((language + 0.7 * routing + 0.3 * entropy).item(), rel=1e-5)


@pytest.mark.parametrize("addressing", ADDRESSINGS)
def test_no_gradient_passes_through_the_divergence_or_the_entropys_gate(models, tmp_path, addressing):
    batch = padded_batch()
    model = models(addressing=addressing)["dnc"]
    loss, outputs = loss_and_outputs(model, tmp_path, batch, lambda_routing=5.0, lambda_entropy=3.0)
    parameters = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)

    def expected(detach):
        language, routing, entropy = hand_computed_terms(outputs, batch["shift_labels"], addressing, detach)
        total = language + 5.0 * routing + 3.0 * entropy
        return torch.autograd.grad(total, parameters, allow_unused=True, retain_graph=True)

    def distance(others):
        pairs = [(a, b) for a, b in zip(grads, others, strict=True) if a is not None and b is not None]
        return max(float((a - b).norm() / (b.norm() + 1e-3)) for a, b in pairs)

    assert distance(expected(detach=True)) < 1e-3
    assert distance(expected(detach=False)) > 1e-2  # the test would notice


def test_baseline_loss_is_the_cross_entropy_of_the_same_targets(models, tmp_path):
    batch = padded_batch()
    baseline = models()["baseline"].train()
    trainer = DNCTrainer(baseline, arguments(tmp_path), examples(200))
    scored = batch["shift_labels"] != IGNORED
    loss = trainer.compute_loss(baseline, batch, num_items_in_batch=scored.sum())
    logits = torch.cat([baseline(window).logits for window in batch["input_ids"].split(WINDOW, dim=1)], dim=1)
    expected = torch.nn.functional.cross_entropy(logits[scored], batch["shift_labels"][scored])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_an_empty_batch_costs_nothing_and_has_finite_gradients(models, tmp_path):
    model = models()["dnc"]
    dataset = examples(200)
    trainer = DNCTrainer(model, arguments(tmp_path), dataset)
    loss = trainer.compute_loss(model.train(), collate([dataset[EMPTY]] * 2), num_items_in_batch=torch.tensor(7))
    loss.backward()
    assert loss.item() == 0
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_write_entropy_and_sparsity_of_known_weights():
    weights = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.5, 0.0, 0.0, 0.0], [0.1, 0.1, 0.1, 0.1], [0.2, 0.2, 0.0, 0.0]])
    torch.testing.assert_close(write_entropy(weights), torch.tensor([0.0, 0.0, math.log(4), math.log(2)]))
    torch.testing.assert_close(write_sparsity(weights), torch.tensor([1.0, 1.0, 0.0, 0.5]))
    assert write_sparsity(torch.tensor([[0.3]])).item() == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("lambda_routing", -0.1), ("lambda_entropy", math.nan), ("learning_rate", -1.0), ("num_train_epochs", 0)),
        *(("per_device_train_batch_size", 0), ("gradient_accumulation_steps", 0)),
        *(("logging_steps", 0), ("save_steps", 0), ("eval_steps", 0), ("eval_steps", -5)),
    ],
)
def test_invalid_training_arguments_are_refused_by_name(tmp_path, name, value):
    with pytest.raises(ValueError, match=name):
        arguments(tmp_path, **{name: value})


def test_several_devices_are_never_used_by_data_parallel(tmp_path, monkeypatch):
    training = arguments(tmp_path)
    monkeypatch.setattr(training, "_n_gpu", 4)
    assert training.n_gpu == 1
    assert training.train_batch_size == training.per_device_train_batch_size


# Logging

MEMORY_STATISTICS = ("write_gate", "write_rate", "slot_use", "read_strength", "reads_beyond_window")


def test_every_term_is_logged_at_every_logging_step(models, tmp_path):
    both = models(addressing="dnc")
    dataset = examples(20 * EXAMPLE + 1)
    for kind, terms in (
        ("baseline", {"lm_loss", "top1_acc"}),
        ("dnc", {"lm_loss", "top1_acc", "routing_loss", "entropy_loss", *MEMORY_STATISTICS}),
    ):
        trainer = train(both[kind], tmp_path, dataset, max_steps=6, logging_steps=2)
        rows = training_rows(trainer)
        assert [row["step"] for row in rows] == [2, 4, 6]
        known = {"loss", "learning_rate", "grad_norm", "epoch", "step"}
        assert all(set(row) - known == terms for row in rows)
        for row in rows:
            total = row["lm_loss"] + row.get("routing_loss", 0.0) + 0.5 * row.get("entropy_loss", 0.0)
            assert row["loss"] == pytest.approx(total, abs=2e-4)
            assert 0 <= row["top1_acc"] <= 1


def test_logged_terms_are_those_of_the_batches_since_the_last_logging_step(models, tmp_path):
    dataset = examples(8 * EXAMPLE + 1)  # with streams: 2 steps of 4 rows an epoch
    model = models()["dnc"]
    trainer = train(model, tmp_path, dataset, max_steps=2, logging_steps=2, learning_rate=0.0)
    batch = collate([dataset[i] for i in range(8)])
    outputs = model(**batch, output_memory=True, output_base_logits=True)
    language, routing, entropy = hand_computed_terms(outputs, batch["shift_labels"], "lru")
    (row,) = training_rows(trainer)
    assert row["lm_loss"] == pytest.approx(language.item(), rel=1e-5)
    assert row["routing_loss"] == pytest.approx(routing.item(), rel=1e-3)
    assert row["entropy_loss"] == pytest.approx(entropy.item(), rel=1e-4)
    assert row["write_gate"] == pytest.approx(outputs.write_gates.mean().item(), rel=1e-5)
    right = outputs.logits.argmax(-1) == batch["shift_labels"]
    assert row["top1_acc"] == pytest.approx(right.double().mean().item())


# Accumulation


@pytest.mark.parametrize("carry_memory", [False, True])
@pytest.mark.parametrize("kind", ["baseline", "dnc"])
def test_accumulated_batches_equal_one_large_batch(models, tmp_path, kind, carry_memory):
    # 11 examples in batches of 8: every epoch's second step is part padding, in whole rows and inside of one.
    dataset = examples(10 * EXAMPLE + 6, streams=8 if carry_memory else None)
    runs = [
        train(
            models()[kind],
            tmp_path,
            dataset,
            carry_memory,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=8 // batch_size,
            max_steps=4,
        )
        for batch_size in (8, 4)
    ]
    whole, split = runs
    for row, other_row in zip(training_rows(whole), training_rows(split), strict=True):
        assert row == pytest.approx(other_row, rel=1e-4, abs=1e-5)
    for (name, p), q in zip(whole.model.named_parameters(), split.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_carried_memory_passes_from_step_to_step_without_gradient(models, tmp_path):
    dataset = examples(16 * EXAMPLE + 1, streams=4)
    model = models()["dnc"]
    trainer = train(model, tmp_path, dataset, True, max_steps=3, learning_rate=0.0)
    (state,) = trainer.memory_states.values()
    assert not any(x.requires_grad for x in state if x is not None)
    # Without learning, three steps of four streams read what one pass over three examples a stream reads.
    streams = torch.stack([dataset.text.tokens[4 * i * EXAMPLE :][: 3 * EXAMPLE] for i in range(4)])
    expected = model(streams).memory_state
    torch.testing.assert_close(state.memory, expected.memory, rtol=1e-4, atol=1e-5)


def test_evaluation_during_training_leaves_the_training_streams_alone(models, tmp_path):
    dataset = examples(16 * EXAMPLE + 1, streams=4)
    held_out = examples(5 * EXAMPLE, seed=1, streams=4)
    runs = [
        train(models()["dnc"], tmp_path, dataset, True, eval_dataset=held_out, **options)
        for options in ({}, {"eval_strategy": "steps", "eval_steps": 1})
    ]
    plain, evaluated = map(training_rows, runs)
    assert [row["loss"] for row in plain] == [row["loss"] for row in evaluated]


# Evaluation


def naive_metrics(model, dataset: ExampleDataset, streams: int | None) -> dict[str, float]:
    """Token by token over the whole text, windows and streams laid out by hand."""
    tokens, memory = dataset.text.tokens, model.config.model_type == "dnc_gpt2"
    inputs, targets = tokens[:-1], tokens[1:]
    # Runs of text over which the memory lasts.
    length = EXAMPLE if streams is None else dataset.stream_length * EXAMPLE
    rows: list[dict[str, float]] = []
    for start in range(0, len(inputs), length):
        run = inputs[start : start + length][None]
        if memory:
            reset = (
                dataset.text.document_starts[None, start : start + run.shape[1]] if dataset.reset_at_documents else None
            )
            outputs = model(run, output_memory=True, output_base_logits=True, memory_reset=reset)
            logits, base_logits = outputs.logits[0].double(), outputs.base_logits[0].double()
        else:
            logits = torch.cat([model(window).logits[0] for window in run.split(WINDOW, dim=1)]).double()
        for t, target in enumerate(targets[start : start + length].tolist()):
            log_p = log_softmax(logits[t], -1)
            row = {
                "nll": -log_p[target],
                "rank": 1 + (log_p > log_p[target]).sum(),
                "confidence": log_p[target].exp(),
                "entropy": -(log_p.exp() * log_p).sum(),
            }
            if memory:
                w = outputs.write_weights[0, t].double()
                share = w / w.sum() if w.sum() >= 1e-6 else torch.zeros_like(w)
                row["gate"] = outputs.write_gates[0, t]
                row["sparsity"] = 1 + torch.xlogy(share, share).sum() / math.log(len(w))
                row["kl"] = (log_p.exp() * (log_p - log_softmax(base_logits[t], -1))).sum()
            rows.append({name: float(x) for name, x in row.items()})
    column = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    metrics = {
        "loss": column["nll"].mean(),
        "ppl": math.exp(column["nll"].mean()),
        "bpt": column["nll"].mean() / math.log(2),
        "top1_acc": (column["rank"] == 1).mean(),
        "top5_acc": (column["rank"] <= 5).mean(),
        "confidence": column["confidence"].mean(),
        "mean_rank": column["rank"].mean(),
        "pred_entropy": column["entropy"].mean(),
        "bits_per_byte": column["nll"].sum() / math.log(2) / dataset.text.num_bytes,
        "word_perplexity": math.exp(column["nll"].sum() / dataset.text.num_words),
    }
    if memory:
        metrics |= {
            "avg_gate": column["gate"].mean(),
            "gate_std": column["gate"].std(),
            "write_rate": (column["gate"] > 0.7).mean(),
            "write_sparsity": column["sparsity"].mean(),
            "mem_kl": column["kl"].mean(),
        }
    return metrics


@torch.no_grad()
@pytest.mark.parametrize("streams", [None, 3])
@pytest.mark.parametrize("kind", ["baseline", "dnc"])
def test_evaluation_equals_a_naive_computation_over_the_whole_text(models, kind, streams):
    model = models()[kind].eval()
    dataset = examples(10 * EXAMPLE + 6, streams=streams, reset_at_documents=True)
    result = evaluate(model, dataset, carry_memory=streams is not None, streams=streams or 4, progress=False)
    metrics = result.metrics(dataset.text.num_bytes, dataset.text.num_words)
    assert metrics.pop("tokens_per_second") > 0
    assert set(metrics) == {*LANGUAGE_MODEL_METRICS, *(MEMORY_METRICS if kind == "dnc" else ())}
    # In float32 a KL divergence, the difference of like numbers, is known to some 1e-7.
    assert metrics == pytest.approx(naive_metrics(model, dataset, streams), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("kind", ["baseline", "dnc"])
def test_evaluation_without_carried_memory_does_not_depend_on_the_batch_size(models, kind):
    model, dataset = models()[kind], examples(10 * EXAMPLE + 6)
    first, *others = (evaluate(model, dataset, batch_size=size, progress=False).columns for size in (1, 3, 50))
    for columns in others:
        for name in first:
            np.testing.assert_allclose(columns[name], first[name], rtol=1e-4, atol=1e-6, err_msg=name)


def test_carried_evaluation_depends_on_the_number_of_streams_alone(models):
    model = models()["dnc"]

    def columns(streams, **options):
        dataset = examples(10 * EXAMPLE + 6, streams=streams)
        return evaluate(model, dataset, carry_memory=True, streams=streams, progress=False, **options).columns

    small, large = columns(3, batch_size=1), columns(3, batch_size=50)
    for name in small:
        np.testing.assert_array_equal(small[name], large[name])
    # Two processes score a part each; their sum is what one scores.
    parts = [columns(3, rank=rank, world_size=2, gather=lambda x: x) for rank in range(2)]
    for name in small:
        np.testing.assert_allclose(parts[0][name] + parts[1][name], small[name], rtol=1e-4, atol=1e-6, err_msg=name)
    assert abs(columns(1)["nll"] - small["nll"]).max() > 1e-4


def test_padding_is_never_scored(models):
    model = models()["dnc"]
    dataset = examples(3 * EXAMPLE + 6)  # the last example has 5 of 16 tokens
    result = evaluate(model, dataset, batch_size=8, progress=False)
    assert all(len(column) == 3 * EXAMPLE + 5 for column in result.columns.values())
    assert (result.columns["nll"] > 0).all() and (result.columns["rank"] >= 1).all()
    dataset.pad_token_id = 5
    padded_otherwise = evaluate(model, dataset, batch_size=8, progress=False)
    for name, column in result.columns.items():
        np.testing.assert_array_equal(column, padded_otherwise.columns[name])


def test_evaluation_gives_the_model_back_in_its_mode(models):
    model = models()["baseline"].train()
    evaluate(model, examples(40), progress=False)
    assert model.training


def test_of_equal_logits_the_lower_id_ranks_first():
    columns = prediction_columns(torch.zeros(3, 4), torch.tensor([0, 1, 3]))
    assert columns["rank"].tolist() == [1, 2, 4]
    torch.testing.assert_close(columns["entropy"], torch.full((3,), math.log(4)))


def test_logits_of_minus_infinity_give_finite_entropy():
    columns = prediction_columns(torch.tensor([[0.0, -math.inf, 0.0]]), torch.tensor([0]))
    assert columns["entropy"].item() == pytest.approx(math.log(2))


def test_recall_on_a_hand_made_case(monkeypatch):
    document = "ab 12. cd 34. ab 12. xxxxxxxxxxxxxxxxxxxx ab 12. cd 34."
    tokenizer = train_tokenizer([document], 257)  # a token a byte
    tokens = torch.tensor(tokenizer(document)["input_ids"])
    text = TokenizedText(tokens, torch.zeros(len(tokens), dtype=torch.bool), len(tokens), 1)
    asked = [("12", 17, 5), ("12", 45, 19), ("34", 52, 12)]
    questions = [
        Question(document=0, start=start, end=start + 2, fact_end=fact_end, kind="k", answer=answer)
        for answer, start, fact_end in asked
    ]
    assert all(document[q.start : q.end] == q.answer == document[q.fact_end - 2 : q.fact_end] for q in questions)
    corpus = Corpus({"validation": [document]}, {}, questions)
    dataset = ExampleDataset(text, 20, 3, streams=1)
    exam = Exam.of(corpus, dataset, tokenizer)
    ranks = np.full(len(tokens) - 1, 9)
    ranks[[16, 17]] = 1  # both digits of the first answer, inside the window of 20
    ranks[[44, 45]] = 1  # both of the second, whose fact is 2 windows back
    ranks[51] = 1  # one of the two digits of the third: not right
    result = exam.recall(ranks, window=20)
    assert result["recall_inside_window"] == 1.0
    assert result["recall_outside_window"] == 0.5
    assert result["recall_by_distance"] == {}, "two questions say nothing of a distance"
    monkeypatch.setattr(dnc_gpt2.corpus, "FEWEST_QUESTIONS", 2)
    assert exam.recall(ranks, window=20)["recall_by_distance"] == {"2": 0.5}
    assert exam.guessing(20) == {"recall_by_guessing": 0.5}
    # Where every example starts empty, a fact in an earlier example was never seen: 1 example a window.
    alone = Exam.of(corpus, ExampleDataset(text, 20, 1), tokenizer)
    assert alone.recall(ranks, window=20)["recall_outside_window"] is None
    assert alone.recall(ranks, window=20)["recall_inside_window"] == 1.0


# Checkpoints


class _Interrupt(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


CHECKPOINTED = {
    "max_steps": 7,
    "save_strategy": "steps",
    "save_steps": 3,
    "optim": "adamw_torch",
    "learning_rate": 0.01,
}


@pytest.mark.parametrize(("addressing", "carry_memory"), [("lru", False), ("lru", True), ("dnc", True)])
def test_a_resumed_run_equals_an_unbroken_one(models, tmp_path, carry_memory, addressing):
    # 4 steps an epoch, interrupted in the second one after the checkpoint of step 6; dropout needs the random state.
    dataset = examples(15 * EXAMPLE + 3, streams=4 if carry_memory else None)
    held_out = examples(40, seed=1, streams=4 if carry_memory else None)

    def run(name, **options):
        model = models(addressing=addressing, resid_pdrop=0.1)["dnc"]
        return train(model, tmp_path / name, dataset, carry_memory, held_out, **CHECKPOINTED, **options)

    unbroken = run("unbroken")
    with pytest.raises(KeyboardInterrupt):
        run("broken", callbacks=[_Interrupt(7)])
    resumed = run("broken", resume=str(tmp_path / "broken" / "checkpoint-6"))
    for (name, p), q in zip(unbroken.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q), name
    for row, resumed_row in zip(training_rows(unbroken), training_rows(resumed), strict=True):
        assert row == resumed_row
    assert bool(resumed.memory_states) == carry_memory
    if carry_memory:
        for x, y in zip(unbroken.memory_states[0], resumed.memory_states[0], strict=True):
            assert (x is None and y is None) or torch.equal(x, y)


def test_resuming_from_the_last_step_trains_no_further(models, tmp_path):
    dataset = examples(15 * EXAMPLE + 3)
    trainer = train(models()["baseline"], tmp_path, dataset, eval_dataset=examples(40, seed=1), **CHECKPOINTED)
    expected = {name: p.clone() for name, p in trainer.model.named_parameters()}
    again = DNCTrainer(models()["baseline"], arguments(tmp_path, **CHECKPOINTED), dataset)
    assert not again.load_finished(str(tmp_path / "checkpoint-6"))
    assert again.load_finished(str(tmp_path / "checkpoint-7"))
    assert again.state.global_step == 7
    assert all(torch.equal(p, expected[name]) for name, p in again.model.named_parameters())


def test_carried_memory_that_a_checkpoint_lacks_is_an_error(models, tmp_path):
    dataset = examples(15 * EXAMPLE + 3, streams=4)
    train(models()["dnc"], tmp_path, dataset, carry_memory=False, **CHECKPOINTED)
    with pytest.raises(ValueError, match=r"memory_state_0.*carry_memory"):
        train(models()["dnc"], tmp_path, dataset, True, resume=str(tmp_path / "checkpoint-3"), **CHECKPOINTED)


def test_every_checkpoint_can_be_resumed_and_knows_its_perplexity(models, tmp_path):
    train(models()["dnc"], tmp_path, examples(200), eval_dataset=examples(40, seed=1), **CHECKPOINTED)
    folders = sorted(tmp_path.glob("checkpoint-*"))
    assert [folder.name for folder in folders] == [f"checkpoint-{step}" for step in (3, 6, 7)]
    for folder in folders:
        assert (folder / "optimizer.pt").is_file() and (folder / "scheduler.pt").is_file()
        state = json.loads((folder / "trainer_state.json").read_text())
        step = int(folder.name.split("-")[1])
        (evaluated,) = [row for row in state["log_history"] if "eval_ppl" in row and row["step"] == step]
        assert evaluated["eval_ppl"] == pytest.approx(math.exp(evaluated["eval_loss"]))


def test_the_saved_configuration_keeps_the_cache_on(models, tmp_path):
    both = models()
    for kind, model in both.items():
        trainer = train(model, tmp_path / kind, examples(200), max_steps=1)
        trainer.save_model()
        assert json.loads((tmp_path / kind / "config.json").read_text())["use_cache"] is True


def test_nothing_is_printed_while_training_without_progress_bars(models, tmp_path, capsys):
    train(models()["dnc"], tmp_path, examples(200), eval_dataset=examples(40, seed=1), **CHECKPOINTED)
    assert capsys.readouterr().out == ""


def test_a_card_that_is_there_is_kept(models, tmp_path):
    trainer = DNCTrainer(models()["dnc"], arguments(tmp_path), examples(200))
    (tmp_path / "README.md").write_text("ours")
    trainer.create_model_card(model_name="dnc")
    assert (tmp_path / "README.md").read_text() == "ours"


def test_mixed_precision_and_gradient_checkpointing_train_both_models(models, tmp_path):
    dataset = examples(200)
    for model in models().values():
        plain = train(model, tmp_path, dataset, max_steps=1, learning_rate=0.0)
        reduced = train(model, tmp_path, dataset, max_steps=1, learning_rate=0.0, bf16=True)
        recomputed = train(model, tmp_path, dataset, max_steps=1, learning_rate=0.0, gradient_checkpointing=True)
        losses = [training_rows(trainer)[0]["lm_loss"] for trainer in (plain, reduced, recomputed)]
        assert losses[1] == pytest.approx(losses[0], rel=0.02)
        assert losses[2] == pytest.approx(losses[0], rel=1e-6)
        norms = [training_rows(trainer)[0]["grad_norm"] for trainer in (plain, recomputed)]
        assert norms[1] == pytest.approx(norms[0], rel=1e-4)


# Sampling the routing term


@pytest.mark.parametrize("share", [0.25, 0.3, 0.9])
def test_every_scored_token_is_sampled_with_the_same_probability(share):
    torch.manual_seed(0)
    scored = torch.arange(60).view(3, 20) % 4 != 1
    samples = torch.stack([take_sample(scored, share) for _ in range(2000)])
    assert not samples[:, ~scored].any()
    sizes = samples.sum((1, 2))
    assert sizes.max() - sizes.min() <= 1
    torch.testing.assert_close(samples.double().mean(0)[scored], torch.full((45,), share).double(), rtol=0, atol=0.05)


def test_sampled_routing_term_is_an_unbiased_estimate(models, tmp_path):
    batch = padded_batch()
    model = models()["dnc"]
    count = (batch["shift_labels"] != IGNORED).sum()
    exact = DNCTrainer(model, arguments(tmp_path, lambda_routing=1.0), examples(200))
    sampled = DNCTrainer(model, arguments(tmp_path, lambda_routing=1.0, routing_sample=0.3), examples(200))
    model.eval()
    with torch.no_grad():
        expected = exact.compute_loss(model, batch, num_items_in_batch=count)
        estimates = torch.stack([sampled.compute_loss(model, batch, num_items_in_batch=count) for _ in range(100)])
    assert estimates.std() > 0
    assert abs(estimates.mean() - expected) < 4 * estimates.std() / 10


@pytest.mark.parametrize("share", [0, -0.1, 1.5, float("nan")])
def test_a_routing_sample_out_of_range_is_an_error(tmp_path, share):
    with pytest.raises(ValueError, match=r"routing_sample=.* above 0 and at most 1"):
        arguments(tmp_path, routing_sample=share)


@pytest.mark.parametrize("kind", ["baseline", "dnc"])
def test_training_builds_no_logits_for_either_model(models, tmp_path, kind, monkeypatch):
    model = models()[kind]
    monkeypatch.setattr(model.lm_head, "forward", lambda *_: pytest.fail("logits were built"))
    trainer = DNCTrainer(model, arguments(tmp_path), examples(200))
    trainer.compute_loss(model, padded_batch()).backward()
    assert model.lm_head.weight.grad.any()


def test_options_of_the_library_that_would_have_no_effect_are_refused(tmp_path):
    known = {field.name: field for field in fields(TrainingArguments)}
    for name in known.keys() & set(WITHOUT_EFFECT):
        default = known[name].default
        value = not default if isinstance(default, bool) else ["loss"] if name == "include_for_metrics" else 7
        with pytest.raises(ValueError, match=f"{name}=.* would have no effect here.* leave it out"):
            arguments(tmp_path, **{name: value})
    assert not set(WITHOUT_EFFECT) - known.keys()  # of the tested version
    arguments(tmp_path, label_smoothing_factor=0.0, dataloader_in_order=True)


def test_a_process_whose_rows_are_all_empty_has_no_loss(tmp_path, tiny_config):
    model = new_models(tiny_config(vocab_size=VOCABULARY), ["dnc"], seed=0)["dnc"]
    dataset = examples(100)
    trainer = DNCTrainer(model, arguments(tmp_path), dataset)
    batch = collate([dataset[EMPTY], dataset[EMPTY]])
    assert (batch["shift_labels"] == IGNORED).all()
    assert trainer.compute_loss(model, batch, num_items_in_batch=torch.tensor(0)) == 0
