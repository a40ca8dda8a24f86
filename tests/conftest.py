"""Settings for the whole suite: no network, and no two thread pools that fight for two cores."""

import os
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("NUMBA_NUM_THREADS", "1")  # as many as a worker of two has cores
# Workers load different code under the same names; what they copy must not meet.
os.environ["HF_MODULES_CACHE"] = (_modules := tempfile.TemporaryDirectory(prefix="modules-")).name
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

# Before anything imports triton, which reads it then: kernels for GPUs run on the CPU where there is no GPU.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from dnc_gpt2 import DNCGPT2Config, DNCGPT2LMHeadModel

TINY = {
    "vocab_size": 67,
    "n_positions": 8,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "mem_slots": 6,
    "mem_width": 8,
    "num_reads": 2,
    "bos_token_id": 0,
    "eos_token_id": 0,
    # The kernels have tests of their own; compiling them would slow down every other file.
    "scan": "eager",
}


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(params=["lru", "dnc", "simplified", "lru-on-top"])
def memory(request) -> dict:
    """Options of each kind of memory, in mid-stack, and of one on top of it."""
    return {"memory_layer": TINY["n_layer"]} if request.param == "lru-on-top" else {"addressing": request.param}


@pytest.fixture
def tiny_config():
    """A function that makes the configuration of a tiny model without dropout."""

    def make(**options) -> DNCGPT2Config:
        return DNCGPT2Config(**{**TINY, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, **options})

    return make


@pytest.fixture
def tiny_model(tiny_config):
    """A function that makes a tiny model in float64 and evaluation mode, its weights away from their special start."""

    def make(**options) -> DNCGPT2LMHeadModel:
        model = DNCGPT2LMHeadModel(tiny_config(**options)).double().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        return model

    return make
