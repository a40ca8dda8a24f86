"""Libraries on top: what people do with GPT-2 works with a memory too. Plain GPT-2 runs through the tests beside it."""

import json

import datasets
import numpy as np
import pytest
import torch
import yaml
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    pipeline,
)

from dnc_gpt2 import DNCGPT2LMHeadModel
from dnc_gpt2.tokenization import train_tokenizer

KINDS = ("gpt2", "dnc")
WINDOW = 8  # of the model with memory; every text below is longer
TEXTS = [
    f"the sea by the old stone river was calm in year {i} and " * repeats for i, repeats in enumerate((1, 2, 3, 1))
]


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = train_tokenizer(TEXTS, 290)
    tokenizer.pad_token = tokenizer.eos_token  # as for GPT-2, which has none either
    return tokenizer


@pytest.fixture
def make(tiny_config, tokenizer):
    """A function that makes a model of a kind, in evaluation mode and away from its special start."""

    def make(kind: str, **options) -> PreTrainedModel:
        torch.manual_seed(0)
        config = tiny_config(vocab_size=len(tokenizer), n_positions=WINDOW, **options)
        if kind == "gpt2":
            shared = {name: getattr(config, name) for name in GPT2Config().to_dict() if hasattr(config, name)}
            config = GPT2Config(**{**shared, "n_positions": 128, "model_type": "gpt2"})
        model = {"gpt2": GPT2LMHeadModel, "dnc": DNCGPT2LMHeadModel}[kind](config).eval()
        # As our model says by itself; without it `Trainer` counts labels that GPT-2 does not predict.
        model.loss_type = "ForCausalLM"
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.3 * torch.randn_like(parameter)
        return model

    return make


@pytest.fixture(autouse=True)
def dataset_cache(tmp_path_factory, monkeypatch):
    """Keeps what `datasets` makes of the test files out of the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def token_rows(count: int, length: int = 20) -> list[dict[str, list[int]]]:
    tokens = np.random.default_rng(0).integers(1, 60, (count, length)).tolist()
    return [{"input_ids": row, "labels": row} for row in tokens]


def arguments(folder, **options) -> TrainingArguments:
    defaults = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 3,
        "per_device_eval_batch_size": 5,
        "max_steps": 4,
        "learning_rate": 0.01,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": [],
    }
    return TrainingArguments(**{**defaults, **options})


def losses(trainer: Trainer) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


# transformers


@pytest.mark.parametrize("kind", KINDS)
def test_pipeline_gives_a_batch_what_it_gives_each_prompt_alone(make, tokenizer, kind):
    generator = pipeline("text-generation", model=make(kind), tokenizer=tokenizer)
    prompts = [text[:length] for text, length in zip(TEXTS, (7, 60, 25, 12), strict=True)]
    options = {"max_new_tokens": 2 * WINDOW, "do_sample": False, "return_tensors": True}
    alone = [generator(prompt, **options)[0]["generated_token_ids"] for prompt in prompts]
    lengths = {len(tokenizer(prompt)["input_ids"]) for prompt in prompts}
    assert len(lengths) == len(prompts), "each is padded differently"
    for batch_size in (2, 4):
        batched = [output[0]["generated_token_ids"] for output in generator(prompts, batch_size=batch_size, **options)]
        for one, row in zip(alone, batched, strict=True):
            assert row[-2 * WINDOW :] == one[-2 * WINDOW :]


class _Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 2
        return control


@pytest.mark.parametrize("kind", KINDS)
def test_trainer_resumes_to_the_weights_of_an_unbroken_run(make, tmp_path, kind):
    def run(name: str, resume: bool = False, callbacks=None) -> Trainer:
        training = arguments(tmp_path / name, save_strategy="steps", save_steps=2)
        trainer = Trainer(make(kind, resid_pdrop=0.1), training, train_dataset=token_rows(9), callbacks=callbacks)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    unbroken = run("unbroken")
    assert losses(unbroken)[-1] < losses(unbroken)[0]
    assert run("broken", callbacks=[_Stop()]).state.global_step == 2
    resumed = run("broken", resume=True)
    assert losses(resumed) == losses(unbroken)
    for (name, p), q in zip(unbroken.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q), name


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_trainer_evaluates_and_predicts_the_logits_of_every_row(make, tmp_path, kind):
    model, rows = make(kind), token_rows(7)
    trainer = Trainer(model, arguments(tmp_path), eval_dataset=rows)
    outputs = model(torch.tensor([row["input_ids"] for row in rows]), labels=torch.tensor([r["labels"] for r in rows]))
    prediction = trainer.predict(rows)  # in batches of 5 and 2
    np.testing.assert_allclose(prediction.predictions, outputs.logits.numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(prediction.label_ids, [row["labels"] for row in rows])
    assert prediction.metrics["test_loss"] == pytest.approx(outputs.loss.item(), rel=1e-5)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(outputs.loss.item(), rel=1e-5)


# datasets


@pytest.mark.parametrize("kind", KINDS)
def test_trainer_trains_on_a_stream_as_on_a_list(make, tmp_path, kind):
    rows = token_rows(12)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stream = datasets.load_dataset("json", data_files=str(tmp_path / "rows.jsonl"), split="train", streaming=True)
    assert isinstance(stream, datasets.IterableDataset)
    trainers = [
        Trainer(make(kind), arguments(tmp_path / "run", train_sampling_strategy="sequential"), train_dataset=dataset)
        for dataset in (rows, stream)
    ]
    for trainer in trainers:
        trainer.train()
    assert losses(trainers[1]) == losses(trainers[0])


# PEFT


@pytest.fixture
def peft():
    return pytest.importorskip("peft", reason="PEFT is not installed (extra `libraries`)")


def train_adapter(model, steps: int = 8) -> list[float]:
    batch = torch.tensor([row["input_ids"] for row in token_rows(4)])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    history = []
    for _ in range(steps):
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(loss.item())
    return history


@pytest.mark.parametrize(("kind", "memory"), [("gpt2", False), ("dnc", False), ("dnc", True)])
def test_adapter_trains_saves_loads_and_merges(make, peft, tmp_path, kind, memory):
    """With `memory` the whole memory is trained beside the adapter: for a GPT-2 that was just given one."""
    model = make(kind)
    base = {name: p.clone() for name, p in model.named_parameters()}
    options = {"modules_to_save": ["memory"]} if memory else {}
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=4, fan_in_fan_out=True, **options))
    assert adapted.base_model.targeted_module_names == [f"transformer.h.{i}.attn.c_attn" for i in range(2)]
    history = train_adapter(adapted)
    assert history[-1] < 0.99 * history[0]
    adapted.save_pretrained(tmp_path / "adapter")

    again = peft.PeftModel.from_pretrained(make(kind), tmp_path / "adapter")
    tokens = torch.randint(1, 60, (2, 20))
    mask = torch.ones_like(tokens)
    options = {"attention_mask": mask, "max_new_tokens": 2 * WINDOW, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        expected, generated = adapted(input_ids=tokens).logits, adapted.generate(input_ids=tokens, **options)
        assert torch.equal(again(input_ids=tokens).logits, expected)
        merged = again.merge_and_unload()
        assert type(merged) is type(model)
        torch.testing.assert_close(merged(tokens).logits, expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(merged.generate(tokens, **options), generated)
    changed = {name for name, p in merged.named_parameters() if not torch.equal(p, base[name])}
    attention = {f"transformer.h.{i}.attn.c_attn.weight" for i in range(2)}
    assert changed == attention | ({name for name in base if ".memory." in name} if memory else set())

    merged.save_pretrained(tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert type(plain) is type(merged)
    with torch.no_grad():
        assert torch.equal(plain(tokens).logits, merged(tokens).logits)


def test_every_kind_of_adapter_that_knows_gpt2_knows_the_memory_model(make, peft):
    make("dnc")
    tables = {k: v for k, v in vars(peft.utils.constants).items() if k.startswith("TRANSFORMERS_MODELS_TO_")}
    known = {name: table["gpt2"] for name, table in tables.items() if "gpt2" in table}
    assert known["TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING"] == ["c_attn"]
    assert {name: tables[name].get("dnc_gpt2") for name in known} == known


# TRL


@pytest.fixture
def sft(make, tokenizer, tmp_path):
    """A function that trains a model of a kind on `TEXTS` with TRL; returns the losses and the tokens of a step."""
    trl = pytest.importorskip("trl", reason="TRL is not installed (extra `libraries`)")

    def run(kind: str, **options) -> tuple[list[float], float]:
        base = arguments(tmp_path / "sft", max_steps=5, per_device_train_batch_size=4).to_dict()
        chosen = {name: base[name] for name in ("output_dir", "max_steps", "learning_rate", "logging_steps")}
        training = trl.SFTConfig(
            **{**chosen, "per_device_train_batch_size": 4, "max_length": 128, **options},
            save_strategy="no",
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
            report_to=[],
        )
        trainer = trl.SFTTrainer(
            make(kind), training, train_dataset=datasets.Dataset.from_dict({"text": TEXTS}), processing_class=tokenizer
        )
        trainer.train()
        return losses(trainer), trainer.state.log_history[0]["num_tokens"]

    return run


@pytest.mark.parametrize("kind", KINDS)
def test_sft_trainer_trains_the_same_padded_flattened_and_packed(sft, kind):
    padded, tokens = sft(kind)
    assert padded[-1] < 0.95 * padded[0]
    flattened, flattened_tokens = sft(kind, padding_free=True, max_length=None)
    assert flattened_tokens == tokens
    assert flattened == pytest.approx(padded, rel=1e-3)
    packed, packed_tokens = sft(kind, packing=True)
    assert packed_tokens == tokens
    assert packed == pytest.approx(padded, rel=1e-3)


# lm-evaluation-harness


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A log-likelihood, a multiple-choice, a perplexity and a generation task: their names and their manager."""
    lm_eval_tasks = pytest.importorskip("lm_eval.tasks", reason="lm_eval is not installed (extra `libraries`)")
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {"text": text, "answer": " river", "choices": [" river", " the sea", " calm in"], "gold": i % 3}
        for i, text in enumerate(TEXTS)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    mean = {"aggregation": "mean", "higher_is_better": True}
    perplexity = {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}
    per_byte = {"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}
    definitions = {
        "likelihood": {
            "output_type": "loglikelihood",
            "doc_to_text": "{{text}}",
            "doc_to_target": "{{answer}}",
            "metric_list": [perplexity, {"metric": "acc", **mean}],
        },
        "choice": {
            "output_type": "multiple_choice",
            "doc_to_text": "{{text}}",
            "doc_to_choice": "choices",
            "doc_to_target": "gold",
            "metric_list": [{"metric": "acc", **mean}],
        },
        "rolling": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [per_byte],
        },
        "generation": {
            "output_type": "generate_until",
            "doc_to_text": "{{text}}",
            "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 12, "do_sample": False},
            "metric_list": [{"metric": "exact_match", **mean}],
        },
    }
    source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}}}
    for name, definition in definitions.items():
        task = {"task": name, **source, "test_split": "test", **definition}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))
    return list(definitions), lm_eval_tasks.TaskManager(include_path=str(folder), include_defaults=False)


def harness(model, tokenizer, **options):
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=model, tokenizer=tokenizer, device="cpu", **options)


@pytest.mark.parametrize("kind", KINDS)
def test_lm_eval_gives_the_same_scores_at_every_batch_size(make, tokenizer, tasks, kind):
    import lm_eval

    names, manager = tasks
    model = make(kind)

    def scores(batch_size: int):
        lm = harness(model, tokenizer, batch_size=batch_size, max_length=128)
        found = lm_eval.simple_evaluate(lm, tasks=names, task_manager=manager, bootstrap_iters=0)
        answers = {name: [sample["resps"] for sample in found["samples"][name]] for name in names}
        metrics = {
            f"{name} {metric}": value
            for name, values in found["results"].items()
            for metric, value in values.items()
            if isinstance(value, float)
        }
        return metrics, answers

    (metrics, answers), (others, other_answers) = scores(1), scores(3)
    assert set(metrics) >= {"likelihood perplexity,none", "rolling bits_per_byte,none", "generation exact_match,none"}
    assert metrics == pytest.approx(others, rel=1e-4)
    assert answers["generation"] == other_answers["generation"]
    assert all(len(reply[0][0]) > 0 for reply in answers["generation"])


@torch.no_grad()
def test_lm_eval_reads_windows_apart_unless_max_length_says_more(make, tokenizer, tasks):
    from lm_eval.api.instance import Instance

    model = make("dnc")
    tokens = tokenizer(TEXTS[2])["input_ids"]
    inputs = torch.tensor([[tokenizer.eos_token_id, *tokens[:-1]]])
    log_probabilities = model(inputs).logits[0].log_softmax(-1)
    whole = log_probabilities[range(len(tokens)), tokens].sum().item()
    assert len(tokens) > 3 * WINDOW

    def found(**options) -> float:
        request = Instance(request_type="loglikelihood_rolling", doc={}, arguments=(TEXTS[2],), idx=0)
        return harness(model, tokenizer, batch_size=2, **options).loglikelihood_rolling([request], disable_tqdm=True)[0]

    assert found(max_length=4 * len(tokens)) == pytest.approx(whole, rel=1e-5)
    assert harness(model, tokenizer).max_length == WINDOW
    assert abs(found() - whole) > 0.1
