"""Sharing: a saved folder is enough to load the model anywhere, and what is pushed says what it is."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, ModelCard, RepoUrl
from huggingface_hub.utils import filter_repo_objects
from local_hub import local_hub
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from dnc_gpt2 import DNCGPT2Config, DNCGPT2LMHeadModel, DNCGPT2Model
from dnc_gpt2.card import model_card
from dnc_gpt2.examples import ExampleDataset
from dnc_gpt2.tokenization import TokenizedText, train_tokenizer
from dnc_gpt2.trainer import DNCTrainer, DNCTrainingArguments

ADDRESSINGS = ["lru", "dnc", "simplified"]
PARTS = (
    "configuration",
    "modeling",
    "cache",
    "masks",
    "memory",
    "stack",
    "losses",
    "inputs",
    "pointer",
    "kernels",
    "kernels_cpu",
    "kernels_cuda",
)
CODE = {f"{part}_dnc_gpt2.py" for part in PARTS}
METRICS = {"loss": 3.5, "ppl": 33.115, "top1_acc": 0.2718}
PROJECT = Path(__file__).parents[1]

ALONE = """
import importlib.util, sys
import torch
from pathlib import Path
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

for name in ("dnc_gpt2", "modeling_dnc_gpt2", "memory_dnc_gpt2"):
    assert importlib.util.find_spec(name) is None, name
root = Path(sys.argv[1])
for folder in sys.argv[2:]:
    tokens = load_file(root / "tokens.safetensors")["tokens"]
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert type(config).__name__ == "DNCGPT2Config" and type(model).__name__ == "DNCGPT2LMHeadModel"
    assert type(model).__module__.startswith("transformers_modules.")
    copy = root / "copies" / Path(folder).name
    model.save_pretrained(copy)
    again = AutoModelForCausalLM.from_pretrained(copy, trust_remote_code=True)
    with torch.no_grad():
        result = {
            "logits": model(tokens).logits,
            "logits_again": again(tokens).logits,
            "generated": model.generate(tokens[:, :4], max_new_tokens=9, do_sample=False, pad_token_id=0),
        }
    save_file(result, root / f"{Path(folder).name}.result")
"""


# Pushes what lies in a folder and loads it again, both over HTTP: only the Hub's address is given.
OVER_HTTP = """
import sys
import torch
from pathlib import Path
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = Path(sys.argv[1])
if sys.argv[2] == "push":
    from dnc_gpt2 import DNCGPT2LMHeadModel
    print(DNCGPT2LMHeadModel.from_pretrained(folder).push_to_hub("someone/model", commit_message="A model"))
    AutoTokenizer.from_pretrained(folder).push_to_hub("someone/model")
else:
    options = {"trust_remote_code": True}
    model = AutoModelForCausalLM.from_pretrained("someone/model", **options)
    assert type(model).__module__.startswith("transformers_modules.")
    tokens = AutoTokenizer.from_pretrained("someone/model", **options)("a river by the sea", return_tensors="pt")
    with torch.no_grad():
        save_file({"logits": model(**tokens).logits}, folder / "loaded.result")
"""


@pytest.fixture
def commits(monkeypatch) -> dict[str, dict[str, bytes]]:
    """A Hub that takes every commit: repository -> path -> content, filled as things are pushed."""
    repositories: dict[str, dict[str, bytes]] = {}

    def create_repo(self, repo_id, **_):
        return RepoUrl(f"https://huggingface.co/{repo_id if '/' in repo_id else f'someone/{repo_id}'}")

    def create_commit(self, repo_id, operations, **_):
        for operation in operations:
            with operation.as_file() as file:
                repositories.setdefault(repo_id, {})[operation.path_in_repo] = file.read()

    def upload_folder(self, *, repo_id, folder_path, ignore_patterns=None, **_):
        paths = [path for path in Path(folder_path).rglob("*") if path.is_file()]
        names = [path.relative_to(folder_path).as_posix() for path in paths]
        for name in filter_repo_objects(names, ignore_patterns=ignore_patterns):
            repositories.setdefault(repo_id, {})[name] = (Path(folder_path) / name).read_bytes()

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    return repositories


def write_card(folder: Path, kind: str = "dnc") -> None:
    text = model_card(kind, METRICS, {"dataset": "biographies", "seed": 7}, memory=kind == "dnc")
    (folder / "README.md").write_text(text, encoding="utf-8")


def assert_card_tells_the_metrics(content: bytes) -> None:
    text = content.decode()
    assert "| ppl | 33.1" in text and "| seed | 7 |" in text
    results = {result.metric_type: result.metric_value for result in ModelCard(text).data.eval_results}
    assert results == {"perplexity": METRICS["ppl"], "accuracy": METRICS["top1_acc"]}


def test_saved_folder_holds_the_code_and_says_where_it_is(tiny_model, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.glob("*.py")} == CODE
    for name in CODE:
        assert (tmp_path / name).read_bytes() == (PROJECT / name).read_bytes()
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "dnc_gpt2" and config["architectures"] == ["DNCGPT2LMHeadModel"]
    assert config["auto_map"] == {
        "AutoConfig": "configuration_dnc_gpt2.DNCGPT2Config",
        "AutoModelForCausalLM": "modeling_dnc_gpt2.DNCGPT2LMHeadModel",
    }


@pytest.mark.parametrize("name", sorted(CODE))
def test_shared_code_imports_nothing_of_the_project_but_itself(name):
    lines = (PROJECT / name).read_text(encoding="utf-8").splitlines()
    imports = [line.split()[1] for line in lines if line.strip().startswith(("import ", "from "))]
    assert not [module for module in imports if module.split(".")[0] == "dnc_gpt2"]


@pytest.mark.parametrize("addressing", ADDRESSINGS)
def test_auto_classes_know_the_model(tiny_model, tmp_path, addressing):
    model, tokens = tiny_model(addressing=addressing), torch.randint(1, 67, (2, 20))
    model.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is DNCGPT2Config
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is DNCGPT2LMHeadModel
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    backbone = AutoModel.from_pretrained(tmp_path)
    assert type(backbone) is DNCGPT2Model
    assert torch.equal(backbone(tokens).last_hidden_state, model.transformer(tokens).last_hidden_state)
    assert type(AutoModelForCausalLM.from_config(model.config)) is DNCGPT2LMHeadModel


def test_saved_or_pushed_folder_alone_is_enough_in_another_process(tiny_model, tmp_path, commits):
    tokens = torch.randint(1, 67, (2, 20))
    save_file({"tokens": tokens}, tmp_path / "tokens.safetensors")
    models = {addressing: tiny_model(addressing=addressing) for addressing in ADDRESSINGS}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    models["pushed"] = models["lru"]
    models["pushed"].push_to_hub("someone/pushed")
    (tmp_path / "pushed").mkdir()
    for name, content in commits["someone/pushed"].items():
        (tmp_path / "pushed" / name).write_bytes(content)

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    caches = {name: str(tmp_path / name) for name in ("HF_HOME", "HF_MODULES_CACHE")}
    result = subprocess.run(
        [sys.executable, "-I", "-c", ALONE, str(tmp_path), *(str(tmp_path / name) for name in models)],
        cwd=elsewhere,
        env={**os.environ, **caches},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    for name, model in models.items():
        with torch.no_grad():
            actual, expected = load_file(tmp_path / f"{name}.result"), model(tokens).logits
            assert torch.equal(actual["logits"], expected)
            assert torch.equal(actual["logits_again"], expected)
            generated = model.generate(tokens[:, :4], max_new_tokens=9, do_sample=False, pad_token_id=0)
            assert torch.equal(actual["generated"], generated)
        assert {path.name for path in (tmp_path / "copies" / name).glob("*.py")} == CODE


@pytest.mark.parametrize("load", [DNCGPT2LMHeadModel, AutoModelForCausalLM], ids=["own", "auto"])
def test_pushed_model_carries_its_code_and_the_card_of_its_folder(tiny_model, tmp_path, commits, load):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    write_card(tmp_path)
    load.from_pretrained(tmp_path).push_to_hub("someone/model", tags=["asked-for"])
    pushed = commits["someone/model"]
    assert set(pushed) == CODE | {"README.md", "config.json", "generation_config.json", "model.safetensors"}
    assert all(pushed[name] == (PROJECT / name).read_bytes() for name in CODE)
    assert pushed["model.safetensors"] == (tmp_path / "model.safetensors").read_bytes()
    assert_card_tells_the_metrics(pushed["README.md"])
    card = ModelCard(pushed["README.md"].decode())
    assert card.data.tags == ["gpt2", "dnc", "memory", "asked-for"]
    assert "trust_remote_code=True" in card.text


def test_model_saved_and_pushed_at_once_carries_the_card(tiny_model, tmp_path, commits):
    tiny_model().save_pretrained(tmp_path / "first")
    write_card(tmp_path / "first")
    model = DNCGPT2LMHeadModel.from_pretrained(tmp_path / "first")
    model.save_pretrained(tmp_path / "second", push_to_hub=True, repo_id="someone/model")
    assert_card_tells_the_metrics(commits["someone/model"]["README.md"])
    assert_card_tells_the_metrics((tmp_path / "second" / "README.md").read_bytes())


def test_new_model_does_not_take_a_card_that_lies_about(tiny_model, tmp_path, commits, monkeypatch):
    write_card(tmp_path)
    monkeypatch.chdir(tmp_path)
    tiny_model().push_to_hub("someone/model")
    assert b"33.1" not in commits["someone/model"]["README.md"]


def test_memory_on_a_plain_gpt2_does_not_take_the_card_of_that_gpt2(tiny_config, tmp_path, commits):
    names = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "bos_token_id", "eos_token_id")
    GPT2LMHeadModel(GPT2Config(**{name: getattr(tiny_config(), name) for name in names})).save_pretrained(tmp_path)
    write_card(tmp_path, "baseline")
    DNCGPT2LMHeadModel.from_pretrained(tmp_path).push_to_hub("someone/model")
    assert b"33.1" not in commits["someone/model"]["README.md"]
    assert set(commits["someone/model"]) >= CODE


def test_trained_model_is_pushed_with_its_code_and_card(tiny_config, tmp_path, commits):
    text = TokenizedText(torch.randint(1, 67, (65,)), torch.arange(65) == 0, num_bytes=65, num_words=65)
    arguments = DNCTrainingArguments(
        output_dir=str(tmp_path / "dnc"), max_steps=1, save_strategy="no", use_cpu=True, disable_tqdm=True
    )
    trainer = DNCTrainer(DNCGPT2LMHeadModel(tiny_config()), arguments, ExampleDataset(text, 8, 2))
    trainer.train()
    trainer.save_model()
    write_card(tmp_path / "dnc")
    trainer.push_to_hub(model_name="dnc")
    pushed = commits["someone/dnc"]
    assert set(pushed) >= CODE | {"README.md", "config.json", "model.safetensors"}
    assert_card_tells_the_metrics(pushed["README.md"])


def test_a_model_is_pushed_to_and_loaded_from_a_hub_over_http(tiny_config, tmp_path):
    tokenizer = train_tokenizer(["a river by the sea"], 270)
    model = DNCGPT2LMHeadModel(tiny_config(vocab_size=len(tokenizer))).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    write_card(tmp_path)

    def run(what: str, **environment: str) -> str:
        settings = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_none", "HF_HUB_DISABLE_XET": "1"}
        home = tmp_path / f"home_{what}"
        home.mkdir()
        result = subprocess.run(
            [sys.executable, "-c", OVER_HTTP, str(tmp_path), what],
            cwd=home,
            env={**os.environ, **settings, "HF_HOME": str(home), **environment},
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr[-3000:]
        return result.stdout

    with local_hub() as hub:
        assert f"{hub.url}/someone/model" in run("push", PYTHONPATH=str(PROJECT))
        pushed = hub.files["someone/model"]
        assert set(pushed) >= CODE | {"README.md", "config.json", "model.safetensors", "tokenizer.json"}
        assert list(hub.objects.values()) == [pushed["model.safetensors"]], "weights go the way of large files"
        assert_card_tells_the_metrics(pushed["README.md"])
        run("load", PYTHONPATH="")
    with torch.no_grad():
        expected = model(**tokenizer("a river by the sea", return_tensors="pt")).logits
    assert torch.equal(load_file(tmp_path / "loaded.result")["logits"], expected)
