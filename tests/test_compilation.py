"""`torch.compile` and `torch.export`: one graph, no compiling anew from token to token or from length to length."""

import pytest
import torch
from test_cache import LEFT, padded
from test_generation import generate, prompt
from test_modeling import plain_gpt2, random_tokens
from torch import Tensor, nn
from transformers import CompileConfig, PreTrainedModel

WINDOW = 8  # that of `tiny_config`


@pytest.fixture
def compiled_generation():
    """A function that generates with compiled decoding; its `graphs` lists the size of each graph compiled for it."""
    torch.compiler.reset()
    graphs = []

    def count(graph: torch.fx.GraphModule, _) -> nn.Module:
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    def run(model: PreTrainedModel, tokens: Tensor, **options) -> Tensor:
        config = CompileConfig(backend=count, mode=None, fullgraph=True)
        config._compile_all_devices = True
        return generate(model, tokens, cache_implementation="static", compile_config=config, **options)

    run.graphs = graphs
    yield run
    torch.compiler.reset()


def test_compiled_decoding_is_one_graph_for_all_tokens_and_windows(tiny_model, compiled_generation, memory):
    model, tokens = tiny_model(**memory), prompt(3, 11)
    mask = padded(LEFT, 11)
    for length in (11, 5):
        expected = generate(model, tokens[:, :length], attention_mask=mask[:, :length])
        actual = compiled_generation(model, tokens[:, :length], attention_mask=mask[:, :length])
        assert torch.equal(actual, expected)
    assert len(compiled_generation.graphs) == 1


def test_compiled_decoding_without_padding_is_one_graph_as_gpt2s(tiny_model, compiled_generation):
    model, tokens = tiny_model(), prompt(2, 3)
    for kind in (model, plain_gpt2(model)):
        kind.generation_config.eos_token_id = None
        before = len(compiled_generation.graphs)
        options = {"max_new_tokens": 5}
        assert torch.equal(compiled_generation(kind, tokens, **options), generate(kind, tokens, **options))
        assert len(compiled_generation.graphs) == before + 1


def test_compiled_decoding_runs_the_fused_scan_inside_its_graph(tiny_config, compiled_generation):
    pytest.importorskip("numba")
    from dnc_gpt2 import DNCGPT2LMHeadModel

    model, tokens = DNCGPT2LMHeadModel(tiny_config(scan="numba", initializer_range=0.2)).eval(), prompt()
    assert torch.equal(compiled_generation(model, tokens), generate(model, tokens))
    assert len(compiled_generation.graphs) == 1


class Logits(nn.Module):
    """A model that takes token ids alone and gives logits."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids, use_cache=False).logits


@torch.no_grad()
def test_exported_graph_takes_any_length(tiny_config):
    pytest.importorskip("numba")
    from dnc_gpt2 import DNCGPT2LMHeadModel

    model = DNCGPT2LMHeadModel(tiny_config(scan="numba", initializer_range=0.2)).eval()
    for kind, lengths in ((model, (3, 6, WINDOW, WINDOW + 1, 30)), (plain_gpt2(model), (3, 6, WINDOW))):
        shapes = {"input_ids": {1: torch.export.Dim.DYNAMIC}}
        graph = torch.export.export(Logits(kind), (random_tokens(2, 6),), dynamic_shapes=shapes, strict=False).module()
        for length in lengths:
            tokens = random_tokens(2, length)
            torch.testing.assert_close(graph(tokens), kind(tokens).logits)


@torch.no_grad()
def test_exported_graph_of_one_length_needs_no_kernels(tiny_model, memory):
    model, tokens = tiny_model(**memory, n_positions=3), random_tokens(2, 4)
    graph = torch.export.export(Logits(model), (tokens,), strict=False).module()
    other = random_tokens(2, 4)
    torch.testing.assert_close(graph(other), model(other).logits)
