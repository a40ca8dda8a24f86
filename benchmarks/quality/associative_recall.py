"""Multi-query associative recall (Arora et al. 2023, "Zoology"): our memory beside others that carry as many numbers.

A sequence states 4 to 64 pairs of a key and a value and then names every key once, at gaps drawn from a power law among
random tokens; at each of these the model has to name the value, which is all that is trained and scored. Sequences have
64 tokens, or 4 a pair where that is more; keys, values and random tokens are drawn from a vocabulary of 512, half of
it keys. All models have 2 layers x 64 and, but for Mamba, attend within windows of 32 tokens; each has one model for
all numbers of pairs, the learning rate of the best of three short trials, and the same steps and data. What is finished
is kept in `--folder` and not made again. The peers are optional; their versions here:

pip install titans-pytorch==0.5.5 recurrent-memory-transformer-pytorch==0.7.0 mambapy==1.2.0
python benchmarks/quality/associative_recall.py
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPT2LMHeadModel, MambaConfig, MambaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fitting import fit, once, settle
from timing import publish

from dnc_gpt2 import DNCGPT2Config, DNCGPT2LMHeadModel
from dnc_gpt2.models import gpt2_config

VOCABULARY, WINDOW, HIDDEN, LAYERS, HEADS = 512, 32, 64, 2, 4
SLOTS = WIDTH = 64  # 4,096 numbers, which the other models' sizes are chosen to equal
PAIRS = (4, 8, 16, 32, 64)
POWER = 0.01  # of the law that the gaps follow, as in the paper
BATCH, TRIAL_STEPS = 16, 40
LEARNING_RATES = (1e-3, 3e-3, 1e-2)


class Examples(NamedTuple):
    """Sequences, and the places where a value is asked for."""

    tokens: Tensor  # [B, T]
    queries: Tensor  # [B, P], where each key is named again
    values: Tensor  # [B, P], what is to be answered there


def examples(pairs: int, batch: int, generator: torch.Generator) -> Examples:
    """Sequences of so many pairs, drawn as in Zoology; random tokens are none of a sequence's own keys."""

    def draw(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    length = max(64, 4 * pairs)
    half = VOCABULARY // 2
    keys = draw(batch, half).argsort(-1)
    values = half + draw(batch, half).argsort(-1)[:, :pairs]
    others = torch.cat([keys[:, pairs:], torch.arange(half, VOCABULARY).expand(batch, -1)], dim=1)
    keys = keys[:, :pairs]
    tokens = others.gather(1, (draw(batch, length) * others.shape[1]).long())
    tokens[:, : 2 * pairs] = torch.stack([keys, values], dim=-1).flatten(1)
    places = torch.arange(1, (length - 2 * pairs) // 2 + 1)
    gaps = torch.multinomial((places ** (POWER - 1.0)).expand(batch, -1), pairs, generator=generator)
    queries = 2 * pairs + 2 * gaps
    return Examples(tokens.scatter(1, queries, keys), queries, values)


class System(NamedTuple):
    """A model and how it is run."""

    model: nn.Module
    logits: Callable[[Tensor], Tensor]  # [B, T] -> [B, T, V]
    state: int  # numbers carried from window to window, of one sequence


def with_memory(**options: Any) -> System:
    config = DNCGPT2Config(
        vocab_size=VOCABULARY,
        n_positions=WINDOW,
        n_embd=HIDDEN,
        n_layer=LAYERS,
        n_head=HEADS,
        mem_slots=SLOTS,
        mem_width=WIDTH,
        num_reads=1,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        **options,
    )
    model = DNCGPT2LMHeadModel(config)
    state = model.transformer.memory.initial_state(1, torch.device("cpu"))
    return System(model, lambda tokens: model(tokens).logits, sum(x.numel() for x in state if x is not None))


def gpt2() -> System:
    model = GPT2LMHeadModel(gpt2_config(with_memory().model.config))

    def logits(tokens: Tensor) -> Tensor:
        return model(tokens.reshape(-1, WINDOW)).logits.view(*tokens.shape, -1)

    return System(model, logits, 0)


def mamba() -> System:
    import mambapy  # noqa: F401  without it transformers' backward pass takes minutes

    config = MambaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        state_size=SLOTS * WIDTH // (LAYERS * 2 * HIDDEN),
        expand=2,
        use_mambapy=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = MambaForCausalLM(config)
    state = LAYERS * config.intermediate_size * (config.state_size + config.conv_kernel)
    return System(model, lambda tokens: model(tokens, use_cache=False).logits, state)


def recurrent_memory_transformer() -> System:
    from recurrent_memory_transformer_pytorch import RecurrentMemoryTransformer

    model = RecurrentMemoryTransformer(
        dim=HIDDEN,
        num_tokens=VOCABULARY,
        depth=LAYERS,
        num_memory_tokens=SLOTS * WIDTH // HIDDEN,
        seq_len=WINDOW,
        heads=HEADS,
        dim_head=HIDDEN // HEADS,
        use_xl_memories=False,  # keys and values of the window before would be further state
        emb_gradient_frac=1.0,
        num_residual_streams=1,
    )

    def logits(tokens: Tensor) -> Tensor:
        memories, outputs = None, []
        for window in tokens.split(WINDOW, dim=1):
            output, memories, _ = model(window, memories)
            outputs.append(output)
        return torch.cat(outputs, dim=1)

    return System(model, logits, model.memory_tokens.numel())


def titans(heads: int = 2) -> System:
    """Memory as context, one neural memory: of `heads` matrices of 32 x 32, and their momentum."""
    from titans_pytorch import MemoryAsContextTransformer, MemoryMLP

    model = MemoryAsContextTransformer(
        num_tokens=VOCABULARY,
        dim=HIDDEN,
        depth=LAYERS,
        segment_len=WINDOW,
        neural_memory_segment_len=4,
        neural_memory_batch_size=WINDOW,
        neural_memory_layers=(LAYERS,),
        neural_memory_model=MemoryMLP(dim=32, depth=1),
        neural_memory_kwargs={"heads": heads, "dim_head": 32, "qk_rmsnorm": True},
        num_persist_mem_tokens=4,
        heads=HEADS,
        dim_head=HIDDEN // HEADS,
        num_residual_streams=1,
    )
    memory = next(module for module in model.modules() if type(module).__name__ == "NeuralMemory")
    for parameter in memory.memory_model_parameters:
        parameter.data = parameter.data.clone()  # the package lets all heads share one, which no optimizer can update
    return System(model, model, 2 * sum(x.numel() for x in memory.memory_model_parameters))


SYSTEMS: dict[str, Callable[[], System]] = {
    "gpt2": gpt2,
    "lru": lambda: with_memory(),
    "lru-on-top": lambda: with_memory(memory_layer=LAYERS),
    "dnc": lambda: with_memory(addressing="dnc", temporal_links=False),
    "dnc-on-top": lambda: with_memory(addressing="dnc", temporal_links=False, memory_layer=LAYERS),
    "mamba": mamba,
    "rmt": recurrent_memory_transformer,
    "titans": titans,
}


def train(name: str, seed: int, steps: int, learning_rate: float) -> tuple[System, float, float]:
    """A trained model, its loss over the last fifth of the steps, and the seconds that it took."""
    torch.manual_seed(seed)
    system = SYSTEMS[name]()
    generator = torch.Generator().manual_seed(seed)
    losses: list[float] = []

    def loss(step: int) -> Tensor:
        batch = examples(PAIRS[step % len(PAIRS)], BATCH, generator)
        logits = answers(system, batch)
        value = F.cross_entropy(logits.flatten(0, 1), batch.values.flatten())
        losses.append(float(value.detach()))
        return value

    start = time.perf_counter()
    fit(system.model.parameters(), loss, steps, learning_rate)
    return system, statistics.fmean(losses[-max(1, steps // 5) :]), time.perf_counter() - start


def answers(system: System, batch: Examples) -> Tensor:
    """Logits [B, P, V] where the values are asked for."""
    logits = system.logits(batch.tokens)
    return logits.gather(1, batch.queries[..., None].expand(-1, -1, logits.shape[-1]))


@torch.no_grad()
def accuracy(system: System, pairs: int, queries: int) -> float:
    """Share of the right answers to at least so many questions."""
    system.model.eval()
    generator = torch.Generator().manual_seed(2**40 + pairs)  # a seed that no training has
    right: list[Tensor] = []
    while sum(x.numel() for x in right) < queries:
        batch = examples(pairs, 4 * BATCH, generator)
        right.append(answers(system, batch).argmax(-1) == batch.values)
    return float(torch.cat(right).double().mean())


def measure(name: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Everything of one row of the table; the trials of the learning rate are the first seed's."""
    folder = options.folder / name
    trials = {
        rate: once(folder / f"trial-{rate}.json", lambda rate=rate: train(name, 0, options.trial_steps, rate)[1])
        for rate in LEARNING_RATES
    }
    rate = min(trials, key=trials.get)

    def result() -> dict[str, Any]:
        system, loss, seconds = train(name, seed, options.steps, rate)
        recalled = {str(pairs): accuracy(system, pairs, options.queries) for pairs in PAIRS}
        parameters = sum(parameter.numel() for parameter in system.model.parameters())
        return {
            "learning_rate": rate,
            "state": system.state,
            "parameters": parameters,
            "loss": loss,
            "seconds": seconds,
            "accuracy": recalled,
        }

    return once(folder / f"seed-{seed}.json", result)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = list(SYSTEMS)
    parser.add_argument("--models", nargs="+", choices=names, default=names, metavar="NAME", help=" ".join(names))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--trial_steps", type=int, default=TRIAL_STEPS, help="of each learning rate")
    parser.add_argument("--queries", type=int, default=2000, help="questions asked at each number of pairs, at least")
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/quality/associative_recall"), help="what is finished lies here"
    )
    parser.add_argument("--output", help="JSON file to write the table to")
    options = parser.parse_args(argv)
    settle(options.folder, options, "steps", "trial_steps", "queries")
    rows = []
    for name in options.models:
        try:
            results = [measure(name, seed, options) for seed in options.seeds]
        except ImportError as error:
            print(f"{name} is left out: {error}; the head of {Path(__file__).name} says what to install.")
            continue
        recalled = [statistics.fmean(result["accuracy"][str(pairs)] for result in results) for pairs in PAIRS]
        first = results[0]
        seconds = statistics.fmean(result["seconds"] for result in results)
        seeds = " ".join(map(str, options.seeds))
        rows.append([name, seeds, first["state"], first["parameters"], first["learning_rate"], seconds, *recalled])
    header = ["model", "seeds", "state", "parameters", "learning rate", "seconds", *(f"{n} pairs" for n in PAIRS)]
    publish(f"Associative recall, {options.steps} steps", header, rows, options.output)


if __name__ == "__main__":
    main()
