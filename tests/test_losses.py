"""The loss without logits against the plain computation with them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax
from torch.utils._python_dispatch import TorchDispatchMode

import losses_dnc_gpt2 as losses
from losses_dnc_gpt2 import IGNORED, linear_cross_entropy


def problem(tokens: int, vocab: int, hidden: int, ignored: float = 0.3, dtype=torch.float64, seed: int = 0):
    """Hidden states, weight, targets, and hidden states without the read."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, hidden, dtype=dtype, generator=generator)
    weight = torch.randn(vocab, hidden, dtype=dtype, generator=generator)
    targets = torch.randint(vocab, (tokens,), generator=generator)
    targets[torch.rand(tokens, generator=generator) < ignored] = IGNORED
    base = x + 0.3 * torch.randn(tokens, hidden, dtype=dtype, generator=generator)
    return x.requires_grad_(), weight.requires_grad_(), targets, base


def with_logits(x: Tensor, weight: Tensor, targets: Tensor, base: Tensor):
    """The four results, by definition."""
    logits = x @ weight.T
    scored = targets != IGNORED
    log_p, log_base = log_softmax(logits, -1), log_softmax(base @ weight.T, -1)
    divergence = (log_p.exp() * (log_p - log_base)).sum(-1) * scored
    loss = cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
    return loss, (logits.argmax(-1) == targets) & scored, divergence.detach()


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(0, 40),
    vocab=st.integers(1, 30),
    hidden=st.integers(1, 9),
    ignored=st.sampled_from([0.0, 0.4, 1.0]),
    chunk=st.integers(1, 50),
    seed=st.integers(0, 1000),
)
def test_results_and_gradients_equal_those_of_whole_logits(tokens, vocab, hidden, ignored, chunk, seed):
    x, weight, targets, base = problem(tokens, vocab, hidden, ignored, seed=seed)
    expected = with_logits(x, weight, targets, base)
    (2.5 * expected[0]).backward()
    gradients = x.grad, weight.grad
    x.grad = weight.grad = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "chunk_length", lambda *_: chunk)
        actual = linear_cross_entropy(x, weight, targets, base)
    (2.5 * actual.loss).backward()
    torch.testing.assert_close(actual.loss, expected[0])
    torch.testing.assert_close(actual.correct, expected[1])
    torch.testing.assert_close(actual.divergence, expected[2])
    torch.testing.assert_close((x.grad, weight.grad), gradients)


def test_operator_is_well_formed_for_compilers():
    x, weight, targets, base = problem(7, 11, 5)
    arguments = (x, weight, targets, base, targets > 3, True)
    torch.library.opcheck(losses._linear_cross_entropy, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("chunk, largest", [(8, 8 * 50), (64, 64 * 50)])
def test_no_tensor_is_larger_than_a_chunk_of_tokens_times_the_vocabulary(monkeypatch, chunk, largest):
    x, weight, targets, base = problem(64, 50, 4, ignored=0.0)
    monkeypatch.setattr(losses, "chunk_length", lambda *_: chunk)
    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            values = result if isinstance(result, (tuple, list)) else [result]
            sizes.extend(value.numel() for value in values if isinstance(value, Tensor))
            return result

    compute = losses._linear_cross_entropy._init_fn  # as an operator it would be opaque to the watch
    with torch.no_grad(), Watch():
        compute(x, weight, targets, base, targets > 3, True)
    assert max(sizes) == largest


def test_divergence_is_computed_of_the_chosen_scored_tokens_alone():
    x, weight, targets, base = problem(20, 11, 5)
    chosen = torch.arange(20) % 3 == 0
    every, some = (linear_cross_entropy(x, weight, targets, base, compared).divergence for compared in (None, chosen))
    assert some[chosen & (targets != IGNORED)].all()
    torch.testing.assert_close(some, every * chosen)
    assert not linear_cross_entropy(x, weight, targets).divergence.any()


def test_of_equally_probable_tokens_the_first_is_the_prediction():
    weight = torch.ones(5, 3)
    correct = linear_cross_entropy(torch.ones(3, 3), weight, torch.tensor([0, 1, 4])).correct
    assert correct.tolist() == [True, False, False]


def test_a_frozen_head_gets_no_gradient_and_hidden_states_do():
    x, weight, targets, _ = problem(9, 11, 5)
    expected = torch.autograd.grad(linear_cross_entropy(x, weight, targets).loss, x)[0]
    linear_cross_entropy(x, weight.requires_grad_(False), targets).loss.backward()
    assert weight.grad is None
    torch.testing.assert_close(x.grad, expected)


def test_a_second_backward_pass_is_refused_and_not_wrong():
    x, weight, targets, _ = problem(9, 11, 5)
    loss = 3 * linear_cross_entropy(x, weight, targets).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_gradient_of_the_weight_that_float16_holds_as_a_mean_alone_does_not_overflow_as_a_sum(monkeypatch):
    monkeypatch.setattr(losses, "chunk_length", lambda *_: 256)
    _, weight, _, _ = problem(1, 5, 3, dtype=torch.float32)
    x, targets = torch.full((4000, 3), 50.0), torch.zeros(4000, dtype=torch.long)
    gradients = []
    for enabled in (True, False):
        with torch.autocast("cpu", torch.float16, enabled=enabled):
            loss = linear_cross_entropy(x, weight, targets).loss
        gradients += torch.autograd.grad(loss / len(x), weight)
    assert (len(x) * gradients[1]).abs().max() > torch.finfo(torch.float16).max
    torch.testing.assert_close(*gradients, rtol=2e-2, atol=1e-2)


def test_large_logits_stay_finite():
    x, weight, targets, base = problem(9, 11, 5, dtype=torch.float32)
    result = linear_cross_entropy(1e4 * x, weight, targets, -1e4 * base)
    result.loss.backward()
    assert all(value.isfinite().all() for value in (result.loss, result.divergence, x.grad, weight.grad))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_near_full_precision(dtype):
    x, weight, targets, base = problem(50, 30, 8, dtype=torch.float32)
    exact = linear_cross_entropy(x, weight, targets, base)
    exact.loss.backward()
    gradients = x.grad, weight.grad
    x.grad = weight.grad = None
    with torch.autocast("cpu", dtype):
        near = linear_cross_entropy(x, weight, targets, base)
    near.loss.backward()
    assert near.loss.dtype == x.grad.dtype == weight.grad.dtype == torch.float32
    torch.testing.assert_close(near.loss, exact.loss, rtol=2e-2, atol=0)
    torch.testing.assert_close(near.divergence, exact.divergence, rtol=0.1, atol=0.1)
    torch.testing.assert_close((x.grad, weight.grad), gradients, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("targets", ["labels", "shift_labels"])
@pytest.mark.parametrize("num_items", [None, 7])
def test_the_model_without_logits_gives_the_loss_with_them(tiny_model, targets, num_items):
    model = tiny_model()
    tokens = torch.randint(model.config.vocab_size, (2, 20), generator=torch.Generator().manual_seed(0))
    labels = tokens.masked_fill(torch.arange(20) % 5 == 1, IGNORED)
    inputs = {"input_ids": tokens, targets: labels, "num_items_in_batch": num_items}
    expected, actual = (
        model(**inputs, output_base_logits=True),
        model(**inputs, output_logits=False, output_divergence=True),
    )
    assert actual.logits is None
    # Transformers computes it in single precision.
    torch.testing.assert_close(actual.loss, expected.loss, check_dtype=False, rtol=1e-6, atol=0)
    scored = torch.nn.functional.pad(labels, (0, 1), value=IGNORED)[:, 1:] if targets == "labels" else labels
    log_p, log_base = (log_softmax(logits, -1) for logits in (expected.logits, expected.base_logits))
    divergence = (log_p.exp() * (log_p - log_base)).sum(-1)
    torch.testing.assert_close(actual.divergence, divergence * (scored != IGNORED))
    assert torch.equal(actual.correct, expected.logits.argmax(-1) == scored)


def test_the_model_without_logits_compiles_to_one_graph(tiny_model):
    model = tiny_model(n_positions=8, n_layer=1, scan="numba").train()
    tokens = torch.randint(model.config.vocab_size, (2, 8), generator=torch.Generator().manual_seed(0))
    inputs = {
        "input_ids": tokens,
        "labels": tokens,
        "output_logits": False,
        "output_divergence": True,
        "use_cache": False,
    }
    expected = model(**inputs)
    expected.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    actual = torch.compile(model, fullgraph=True, backend="aot_eager")(**inputs)
    actual.loss.backward()
    torch.testing.assert_close(actual.loss, expected.loss)
    torch.testing.assert_close(actual.divergence, expected.divergence)
    torch.testing.assert_close({name: parameter.grad for name, parameter in model.named_parameters()}, gradients)


def test_a_loss_without_targets_or_with_a_foreign_head_is_an_error(tiny_model):
    model = tiny_model()
    tokens = torch.zeros(1, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="needs labels or shift_labels"):
        model(tokens, output_logits=False)
    model.lm_head = torch.nn.Linear(model.config.n_embd, model.config.vocab_size).double()
    with pytest.raises(ValueError, match="linear LM head without bias"):
        model(tokens, labels=tokens, output_logits=False)


def test_an_offloaded_head_is_refused_where_its_weight_is_used_directly():
    head = torch.nn.Linear(3, 5, bias=False, device="meta")
    with pytest.raises(ValueError, match="LM head that is not offloaded"):
        losses.causal_lm_losses(head, torch.randn(1, 4, 3), torch.zeros(1, 4, dtype=torch.long), None, None)
