"""Nothing that is read is executed: checkpoints, memory states, data, options."""

import ast
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from tiny_runs import tiny_run

import compare
from dnc_gpt2.checkpoints import close
from dnc_gpt2.data import DataArguments, DataError, load_texts
from dnc_gpt2.models import load_model
from dnc_gpt2.tokenization import load_tokenizer

ROOT = Path(__file__).parent.parent
PRODUCT = [path for folder in (ROOT, ROOT / "dnc_gpt2") for path in sorted(folder.glob("*.py"))]


class Touch:
    """Unpickled without restrictions it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def no_unpickling(monkeypatch):
    """Unrestricted unpickling fails the test; `torch.load(weights_only=True)` has an unpickler of its own."""

    class Refused:
        def __init__(self, *_, **__):
            pytest.fail("unrestricted unpickling")

    for name in ("load", "loads", "Unpickler", "_Unpickler", "_load", "_loads"):
        monkeypatch.setattr(pickle, name, Refused)
    return Refused


def test_loading_comparing_and_resuming_never_unpickle(tmp_path, no_unpickling):
    with pytest.raises(pytest.fail.Exception):
        torch.load(_saved(tmp_path / "any.pt"), weights_only=False)
    options = {"carry_memory": True, "save_steps": 1, "max_steps": 2, "eval_strategy": "no"}
    tiny_run(tmp_path, **options)
    arguments = list((tmp_path / "run").rglob("training_args.bin"))
    assert arguments
    for path in arguments:
        path.write_bytes(pickle.dumps(Touch(tmp_path / "executed")))
        if path.parent.name.startswith("checkpoint-"):
            close(path.parent)  # whole again by its sizes
    tiny_run(tmp_path, **{**options, "max_steps": 3}, resume_from_checkpoint="true")
    kinds = [str(tmp_path / "run" / kind) for kind in ("baseline", "dnc")]
    compare.main([*kinds, "--output_dir", str(tmp_path / "comparison"), "--use_cpu", "true"])
    assert not (tmp_path / "executed").exists()


def _saved(path: Path) -> Path:
    torch.save({"x": torch.zeros(1)}, path)
    return path


@pytest.mark.parametrize("path", PRODUCT, ids=lambda path: path.name)
def test_the_code_has_no_way_to_execute_what_it_reads(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
            assert not names & {"pickle", "dill", "marshal", "shelve", "joblib", "cloudpickle"}
        if not isinstance(node, ast.Call):
            continue
        called, keywords = ast.unparse(node.func), {keyword.arg: keyword.value for keyword in node.keywords}
        assert called not in {"eval", "exec", "__import__", "os.system", "yaml.load", "yaml.unsafe_load"}
        if called == "torch.load":
            assert ast.unparse(keywords["weights_only"]) == "True"
        if "trust_remote_code" in keywords:
            assert ast.unparse(keywords["trust_remote_code"]) != "True", "only on the user's word"
        if called.endswith("CausalLM.from_pretrained"):
            assert ast.unparse(keywords["use_safetensors"]) == "True"


@pytest.fixture
def foreign(tmp_path) -> Path:
    """A checkpoint of a model whose code it brings along, which makes a file when it is imported."""
    folder = tmp_path / "foreign"
    folder.mkdir()
    code = f"from pathlib import Path\nPath({str(tmp_path / 'executed')!r}).touch()\n"
    (folder / "evil.py").write_text(code + "class Config: pass\nclass Model: pass\nclass Tokenizer: pass\n")
    names = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (folder / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": names}))
    tokenizer = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return folder


def test_code_of_a_checkpoint_is_not_run_unasked(foreign, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # whoever is asked says yes without reading
    with pytest.raises(ValueError, match="foreign"):
        load_model(str(foreign))
    with pytest.raises(DataError, match="foreign"):
        load_tokenizer(str(foreign))
    assert not (tmp_path / "executed").exists()
    with pytest.raises(ValueError, match="foreign"):
        load_model(str(foreign), trust_remote_code=True)
    assert (tmp_path / "executed").exists(), "the test would notice"


def test_pickled_weights_are_not_read(tmp_path):
    tiny_run(tmp_path, model="baseline", max_steps=1)
    folder = tmp_path / "run" / "baseline"
    torch.save(load_model(str(folder)).state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="safetensors"):
        load_model(str(folder))
    checkpoint = folder / "checkpoint-1"
    shutil.copy(folder / "pytorch_model.bin", checkpoint)
    with pytest.raises(ValueError, match="only safetensors are read"):
        tiny_run(tmp_path, model="baseline", max_steps=2, resume_from_checkpoint="true")


def test_code_beside_data_is_not_run(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "data.py").write_text(f"from pathlib import Path\nPath({str(tmp_path / 'executed')!r}).touch()\n")
    (folder / "train.txt").write_text("some text here")
    try:
        assert load_texts(DataArguments(dataset_name=str(folder)), ["train"])["train"] == ["some text here"]
    except DataError as error:
        assert str(folder) in str(error)
    assert not (tmp_path / "executed").exists()
