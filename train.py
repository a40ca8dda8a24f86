"""Train a plain GPT-2 and a GPT-2 with memory under equal conditions, save both and compare them.

Without options it trains both on the embedded corpus in a few minutes. `python train.py --help` lists the options.
"""

import copy
import logging
import os
import shutil
import sys
from pathlib import Path
from typing import Any, NoReturn

import datasets
import torch
from transformers import AutoConfig, GPT2Config, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers import logging as transformers_logging
from transformers.trainer import TRAINER_STATE_NAME

from dnc_gpt2 import DNCGPT2Config
from dnc_gpt2.card import model_card
from dnc_gpt2.checkpoints import fault, newest_whole
from dnc_gpt2.comparison import Comparison, evaluation_dataset, printed, tuning_dataset
from dnc_gpt2.corpus import is_embedded, load_corpus
from dnc_gpt2.data import DataArguments, first_records, stream_records
from dnc_gpt2.examples import ExampleDataset
from dnc_gpt2.histograms import finish_reports
from dnc_gpt2.models import count_parameters, freeze_backbone, new_models, require_checkpoint
from dnc_gpt2.opponents import SCORED, TRAINED, check_opponents, opponent_model
from dnc_gpt2.options import (
    INSPECT_OPTION,
    OPPONENTS_OPTION,
    ModelArguments,
    one_line_errors,
    parse,
    remember_run,
)
from dnc_gpt2.pointing import has_pointer
from dnc_gpt2.report import has_memory_metrics, write_text
from dnc_gpt2.signals import StopOnSignal
from dnc_gpt2.streaming import StreamedExamples
from dnc_gpt2.tokenization import TOKENIZER_CHARS, load_tokenizer, split_end, tokenize_texts, train_tokenizer
from dnc_gpt2.trainer import DNCTrainer, DNCTrainingArguments

logger = logging.getLogger(__name__)

EMBEDDED = Path(__file__).parent / "configs" / "embedded.yaml"


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run the whole job; returns the comparison."""
    extra = {
        **INSPECT_OPTION,
        **OPPONENTS_OPTION,
        "--num_gpus": {"type": int, "help": "Start this many processes, one a GPU."},
    }
    model_arguments, data, training, options = parse(
        (ModelArguments, DataArguments, DNCTrainingArguments), arguments, EMBEDDED, extra
    )
    if options.num_gpus is not None:
        launch(options.num_gpus, sys.argv[1:] if arguments is None else arguments)
    quiet = not sys.stderr.isatty() or training.process_index != 0
    training.disable_tqdm = training.disable_tqdm or quiet
    if quiet:
        datasets.disable_progress_bars()
        transformers_logging.disable_progress_bar()
    mention_idle_gpus(training)
    if data.streaming and training.max_steps <= 0:
        sys.exit("train.py: --streaming needs --max_steps: how long a stream is, is not known.")
    if model_arguments.freeze_backbone and not model_arguments.model_name_or_path:
        sys.exit("train.py: --freeze_backbone needs --model_name_or_path: a new backbone has learned nothing to keep.")
    if model_arguments.freeze_backbone and model_arguments.model == "both" and training.should_save:
        logger.warning(
            "--freeze_backbone leaves the plain GPT-2 as it is: what is gained on it comes of this text as well as of "
            "the memory. To tell these apart, train a GPT-2 alone (--model baseline) without it, and compare."
        )
    run = Path(training.output_dir or f"runs/{'embedded' if is_embedded(data) else 'text'}")
    if options.opponents and model_arguments.model != "both":
        sys.exit(f"train.py: --opponents {','.join(options.opponents)} needs --model both.")
    kinds = [*model_arguments.kinds, *(TRAINED[name] for name in options.opponents if name in TRAINED)]
    check_output(run, kinds, training, model_arguments.model_name_or_path)
    checkpoints = {kind: checkpoint_to_resume(run, kind, kinds, training) for kind in kinds}
    if model_arguments.model_name_or_path:
        require_checkpoint(model_arguments.model_name_or_path)

    corpus = load_corpus(data, ("validation",) if data.streaming else ("train", "validation"))
    stream = stream_records(data, "train") if data.streaming else None
    tokenizer_name = data.tokenizer_name or model_arguments.model_name_or_path
    if tokenizer_name:
        tokenizer = load_tokenizer(tokenizer_name)
    else:
        texts = corpus.texts["train"] if stream is None else first_records(stream, TOKENIZER_CHARS)
        tokenizer = train_tokenizer(texts, data.tokenizer_vocab_size)
    config = memory_config(model_arguments, data, tokenizer)
    example_length = data.seq_len * data.windows_per_example
    check_opponents(options.opponents, config, example_length, model_arguments.model_name_or_path)
    models = new_models(
        config=config,
        kinds=model_arguments.kinds,
        seed=training.seed,
        pretrained=model_arguments.model_name_or_path,
    )
    vocabulary = min(model.config.vocab_size for model in models.values())
    train_text = held_out = None
    if stream is None:
        train_text = tokenize_texts(corpus.texts["train"], tokenizer, "training", data.max_train_tokens, vocabulary)
    eval_text = tokenize_texts(corpus.texts["validation"], tokenizer, "validation", data.max_eval_tokens, vocabulary)
    if data.held_out_tokens:
        train_text, held_out_text = split_end(train_text, data.held_out_tokens, tokenizer)
        if model_arguments.pointer_weight is None:
            held_out = tuning_dataset(held_out_text, data, tokenizer)
    eval_dataset = evaluation_dataset(eval_text, data)

    if training.should_save and training.overwrite_output_dir:
        for kind in {*kinds, *TRAINED.values()}:  # opponents of the run that is replaced are none of the new one
            shutil.rmtree(run / kind, ignore_errors=True)

    def train_kind(kind: str, model: PreTrainedModel) -> DNCTrainer:
        """Train one model, or load it where it is finished, and save it in its folder of the run."""
        if model_arguments.freeze_backbone:
            freeze_backbone(model)
        arguments_of_kind = copy.copy(training)
        arguments_of_kind.output_dir = str(run / kind)
        arguments_of_kind.run_name = f"{training.run_name or run.name}-{kind}"  # in the trackers of --report_to
        arguments_of_kind.push_to_hub = training.push_to_hub and kind in models
        if training.hub_model_id and len(models) > 1:
            arguments_of_kind.hub_model_id = f"{training.hub_model_id}-{kind}"  # a repository each
        set_seed(training.seed)
        if stream is None:
            train_dataset = training_dataset(train_text, data, training)
        else:
            train_dataset = streamed_dataset(stream, tokenizer, vocabulary, data, training)
        trainer = DNCTrainer(
            model,
            arguments_of_kind,
            train_dataset,
            eval_dataset,
            carry_memory=data.carry_memory,
            eval_streams=data.eval_streams,
            tuning_dataset=held_out if has_pointer(model) else None,
            processing_class=tokenizer,
        )
        train(trainer, checkpoints[kind])
        finish_reports(trainer.callback_handler.callbacks)
        if trainer.args.should_save:
            given = sys.argv[1:] if arguments is None else arguments
            remember_run(run / kind, data, training.seed, given, untrained=not has_trainable(model))
        trainer.accelerator.wait_for_everyone()  # the other processes read what the main one has saved
        trainer.free_optimizer()
        return trainer

    trainers = {kind: train_kind(kind, model) for kind, model in models.items()}
    trainer = trainers[model_arguments.kinds[-1]]
    comparer = Comparison(
        corpus,
        tokenizer,
        data,
        str(run),
        accelerator=trainer.accelerator,
        batch_size=training.per_device_eval_batch_size,
        seed=training.seed,
        inspect=options.inspect,
        report_path=run / "report.html",
        progress=not training.disable_tqdm,
    )
    for kind in models:
        comparer.add(kind, str(run / kind))
    for opponent in options.opponents:
        if opponent in SCORED:
            comparer.add_scored(opponent, str(run / "baseline"), config.mem_slots)
            continue
        model = opponent_model(
            opponent,
            config,
            example_length=example_length,
            parameters=count_parameters(models["dnc"]),
            seed=training.seed,
            pretrained=model_arguments.model_name_or_path,
        )
        train_kind(TRAINED[opponent], model)
        comparer.add(TRAINED[opponent], str(run / TRAINED[opponent]))
    comparison = comparer.finish()
    if trainer.is_world_process_zero():
        tokens = None if train_text is None else len(train_text.tokens)
        for kind in kinds:
            result = comparison["models"][kind]
            memory = has_memory_metrics(result)
            model_config = AutoConfig.from_pretrained(run / kind)
            summary = training_summary(corpus.description, tokens, model_config, model_arguments, data, training)
            if result.get("untrained"):
                summary = {"starting from": model_arguments.model_name_or_path, "optimizer steps": 0}
            metrics = {k: v for k, v in result["metrics"].items() if isinstance(v, float | int)}
            write_text(run / kind / "README.md", model_card(kind, metrics, summary, comparison, memory=memory))
        print(printed(comparison))
        print(f"\n  Everything is in {run}/")
    if training.push_to_hub:
        for kind, trainer in trainers.items():
            trainer.push_to_hub(model_name=kind)
    return comparison


def check_output(run: Path, kinds: list[str], training: DNCTrainingArguments, source: str | None) -> None:
    """End the process where the run would damage an earlier one, or the checkpoint `source` that it starts from."""
    if run.is_file():
        sys.exit(f"train.py: {run} is a file; choose another --output_dir.")
    existing = next(folder for folder in (run, *run.resolve().parents) if folder.exists())
    if not os.access(existing, os.W_OK | os.X_OK):
        sys.exit(f"train.py: {existing} may not be written to; choose another --output_dir or allow it.")
    resume = asked_to_resume(training)
    if training.overwrite_output_dir and resume:
        sys.exit(
            f"train.py: --overwrite_output_dir would delete what --resume_from_checkpoint {resume} goes on from; "
            "give one of the two."
        )
    if training.overwrite_output_dir and source and run.resolve() in Path(source).resolve().parents:
        sys.exit(
            f"train.py: --overwrite_output_dir would delete {source}, which --model_name_or_path starts from; choose "
            "another --output_dir."
        )
    taken = [str(run / kind) for kind in kinds if (run / kind).is_dir() and any((run / kind).iterdir())]
    taken += [str(run / "comparison.json")] * (run / "comparison.json").exists()
    if taken and not (training.overwrite_output_dir or resume):
        sys.exit(
            f"train.py: {' and '.join(taken)} already exist; choose another --output_dir, go on with "
            "--resume_from_checkpoint true, or replace them with --overwrite_output_dir."
        )


def memory_config(
    model_arguments: ModelArguments, data: DataArguments, tokenizer: PreTrainedTokenizerBase
) -> DNCGPT2Config:
    """Configuration of the model with memory; the baseline takes its GPT-2 part."""
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    if model_arguments.model_name_or_path:
        return DNCGPT2Config.from_pretrained(
            model_arguments.model_name_or_path, **model_arguments.memory_options(), n_positions=data.seq_len, **special
        )
    dropout = model_arguments.dropout
    return DNCGPT2Config(
        vocab_size=len(tokenizer),
        n_positions=data.seq_len,
        n_embd=model_arguments.hidden_size,
        n_layer=model_arguments.num_layers,
        n_head=model_arguments.num_heads,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        **model_arguments.memory_options(),
        **special,
    )


def training_dataset(text, data: DataArguments, training: DNCTrainingArguments) -> ExampleDataset:
    """The training examples, in as many streams as the global batch has rows where memory is carried."""
    rows = training.per_device_train_batch_size * training.gradient_accumulation_steps * training.world_size
    return ExampleDataset(
        text,
        data.seq_len,
        data.windows_per_example,
        streams=rows if data.carry_memory else None,
        reset_at_documents=data.reset_at_documents,
    )


def streamed_dataset(
    records: datasets.IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    data: DataArguments,
    training: DNCTrainingArguments,
) -> StreamedExamples:
    """The training examples of this process from the start of a stream."""
    return StreamedExamples(
        records,
        tokenizer,
        data.seq_len,
        data.windows_per_example,
        rows=training.per_device_train_batch_size * training.gradient_accumulation_steps,
        rank=training.process_index,
        world_size=training.world_size,
        reset_at_documents=data.reset_at_documents,
        vocab_size=vocab_size,
    )


def asked_to_resume(training: DNCTrainingArguments) -> str | None:
    """What --resume_from_checkpoint names: "true", a folder, or nothing."""
    asked = training.resume_from_checkpoint
    if not asked or asked.lower() == "false":
        return None
    return "true" if asked.lower() == "true" else asked


def checkpoint_to_resume(run: Path, kind: str, kinds: list[str], training: DNCTrainingArguments) -> str | None:
    """The checkpoint of one kind from which to go on: the one that is asked for or the last, `None` before the first.

    Where a checkpoint of one kind is named, the others go on from their last.
    """
    asked = asked_to_resume(training)
    if asked is None:
        return None
    folder = run / kind
    if asked != "true":
        owner = Path(asked).resolve().parent
        if not (Path(asked) / TRAINER_STATE_NAME).is_file() or owner not in [(run / name).resolve() for name in kinds]:
            sys.exit(
                f"train.py: --resume_from_checkpoint {asked} is no checkpoint-<step> folder of this run ({run}), nor "
                "true; name one of its folders, or true for the last."
            )
        if owner == folder.resolve():
            if reason := fault(asked):
                sys.exit(
                    f"train.py: --resume_from_checkpoint {asked} is not a whole checkpoint ({reason}); true takes the "
                    "newest whole one."
                )
            newest, _ = newest_whole(folder)
            if newest.resolve() != Path(asked).resolve():
                sys.exit(
                    f"train.py: {newest} is newer than --resume_from_checkpoint {asked} and would be lost to the "
                    "resumed run; move it to another folder first, or go on from it with true."
                )
            return asked
    last, skipped = newest_whole(folder)
    if training.should_save:
        instead = f"going on from {last}" if last else "there is no other"
        for path, reason in skipped.items():
            logger.warning("%s is not whole (%s): %s.", path, reason, instead)
    if last is None and (folder / TRAINER_STATE_NAME).is_file():
        return str(folder)  # a finished model whose checkpoints are gone
    return None if last is None else str(last)


def has_trainable(model: PreTrainedModel) -> bool:
    """Whether there is anything to train: of a plain GPT-2 whose backbone is frozen there is nothing."""
    return any(parameter.requires_grad for parameter in model.parameters())


def train(trainer: DNCTrainer, checkpoint: str | None) -> None:
    """Train what there is to train, evaluate at the end and save the final checkpoint.

    SIGINT or SIGTERM ends the process after the step under way, with a checkpoint.
    """
    if has_trainable(trainer.model) and (checkpoint is None or not trainer.load_finished(checkpoint)):
        if checkpoint == trainer.args.output_dir:
            sys.exit(
                f"train.py: {checkpoint} holds a finished model, but no checkpoint-<step> to go on from; choose "
                "another --output_dir, or replace it with --overwrite_output_dir."
            )
        stop = StopOnSignal()
        trainer.add_callback(stop)
        with stop:
            trainer.train(resume_from_checkpoint=checkpoint)
        if stop.signal is not None:
            saved, _ = newest_whole(trainer.args.output_dir)
            if trainer.is_world_process_zero():
                print(
                    f"train.py: ended by {stop.signal.name} after step {trainer.state.global_step} of "
                    f"{trainer.state.max_steps}; {saved} is whole, and the same command with "
                    "--resume_from_checkpoint true goes on from it.",
                    file=sys.stderr,
                )
            sys.exit(128 + stop.signal)
    history = trainer.state.log_history
    if not any("eval_loss" in row and row["step"] == trainer.state.global_step for row in history):
        trainer.evaluate()
    else:
        trainer.tune_pointer()  # for these weights, which may come from a checkpoint
    trainer.save_model()
    trainer.save_state()


def training_summary(
    description: dict[str, Any],
    tokens: int | None,
    config: GPT2Config | DNCGPT2Config,
    model_arguments: ModelArguments,
    data: DataArguments,
    training: DNCTrainingArguments,
) -> dict[str, Any]:
    """What the card says of the training of a model with this configuration, on so many tokens."""
    memory = {}
    if isinstance(config, DNCGPT2Config):
        memory = {"lambda_routing": training.lambda_routing, "lambda_entropy": training.lambda_entropy}
        memory |= {name: getattr(config, name) for name in (*model_arguments.memory_options(), "pointer_weight")}
    source = next(iter(description.values()))
    return {
        "dataset": ", ".join(source) if isinstance(source, list) else source,
        "training tokens": tokens,
        "starting from": model_arguments.model_name_or_path,
        "optimizer steps": training.max_steps if training.max_steps > 0 else None,
        "epochs": training.num_train_epochs if training.max_steps <= 0 else None,
        "batch size": training.train_batch_size * training.gradient_accumulation_steps * training.world_size,
        "tokens an example": data.seq_len * data.windows_per_example,
        "attention window": config.n_positions,
        "layers, width, heads": [config.n_layer, config.n_embd, config.n_head],
        "carried memory": data.carry_memory,
        "learning rate": training.learning_rate,
        "frozen backbone": model_arguments.freeze_backbone,
        "seed": training.seed,
        **memory,
    }


def mention_idle_gpus(training: DNCTrainingArguments) -> None:
    """Say how to use all GPUs where one process uses one of several."""
    gpus = torch.cuda.device_count()
    if gpus > 1 and training.world_size == 1 and not training.use_cpu:
        logger.warning(
            "Using one of %d GPUs. To use all: accelerate launch --num_processes %d --multi_gpu train.py, or train.py "
            "--num_gpus %d, with the same options.",
            *[gpus] * 3,
        )


def launch(num_gpus: int, arguments: list[str]) -> NoReturn:
    """Become `accelerate launch` with one process a GPU."""
    rest, skip = [], False
    for argument in arguments:
        if argument == "--num_gpus":
            skip = True
        elif skip:
            skip = False
        elif not argument.startswith("--num_gpus="):
            rest.append(argument)
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(num_gpus), "--multi_gpu"]
    os.execv(sys.executable, [*launcher, __file__, *rest])  # in place of this process, so that signals reach it


if __name__ == "__main__":
    with one_line_errors("train.py"):
        main()
