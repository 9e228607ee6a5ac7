"""The module from a terminal: python -m dalm_utils train | status | sample | evaluate | data | notebook."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import time
from pathlib import Path

import numpy as np

from .config import PROFILES, PROJECT, RunConfig, check_names, load_config, parse_field


def main(arguments: list[str] | None = None) -> int:
    """Run one command; errors that a user can mend are one line, without a traceback."""
    parser = argparse.ArgumentParser(prog="python -m dalm_utils", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)

    command = commands.add_parser("train", help="train one run, or continue it")
    command.add_argument("notebook", choices=sorted(PROFILES), help="whose settings to use")
    command.add_argument("settings", nargs="*", metavar="FIELD=VALUE", help="any field of RunConfig")
    command.add_argument("--profile", help="laptop or full; by default DALM_PROFILE, else laptop")
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
    command.add_argument("--block-length", type=int, help="write from left to right in blocks of so many tokens")
    command.add_argument("--temperature", type=float, default=1.0)
    command.add_argument("--top-p", type=float)
    command.add_argument("--top-k", type=int)
    command.add_argument("--repetition-penalty", type=float, default=1.0)
    command.add_argument("--stop-at-end", action="store_true", help="stop where the model ends the document")
    command.add_argument("--num", type=int, default=1)
    command.add_argument("--seed", type=int, default=0)
    command.set_defaults(do=_sample)

    command = commands.add_parser("evaluate", help="held-out likelihood of a diffusion or AR model")
    command.add_argument("model")
    command.add_argument("--text", default="docstrings")
    command.add_argument("--field", default="text")
    command.add_argument("--length", type=int, default=256)
    command.add_argument("--blocks", type=int, default=96)
    command.add_argument("--samples", type=int, default=8, help="masks drawn per block")
    command.set_defaults(do=_evaluate)

    command = commands.add_parser("data", help="tokenise a text into the cache, and say what is in it")
    command.add_argument("text", nargs="?", default="docstrings", help="docstrings, a .jsonl file, or a folder")
    command.add_argument("--field", default="text", help="the field of a JSON line that holds the document")
    command.add_argument("--tokenizer", default="tiny-gpt2", help="the model whose tokenizer to use")
    command.set_defaults(do=_data)

    command = commands.add_parser("notebook", help="run a notebook top to bottom, with progress")
    command.add_argument("path", type=Path)
    command.add_argument("--in-place", action="store_true", help="write the outputs into the notebook itself")
    command.set_defaults(do=_notebook)

    options = parser.parse_args(arguments)
    try:
        options.do(options)
    except (ValueError, OSError, RuntimeError) as error:
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
    model, tokenizer = build(config.replace(device="cpu"))  # `train` moves it to this process's own device
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
    if "eta" in record:
        parts.append(f"{datetime.timedelta(seconds=record['eta'])} to go")
    return "  ".join(parts)


def _status(options) -> None:
    from .checkpoint import History, RunFolder

    places = (Path(options.run), PROJECT / RunConfig().runs / options.run)
    folder = next((RunFolder(path.resolve()) for path in places if (path / "config.json").is_file()), None)
    if folder is None:
        raise FileNotFoundError(f"no run {options.run!r}: neither {' nor '.join(map(os.path.relpath, places))} is one")
    settings = json.loads((folder.path / "config.json").read_text())
    history = History.load(folder.path / "history.jsonl")
    step = history.last("step") or 0
    print(f"{folder.path.name}: step {step} of {settings['total_steps']}, ", end="")
    print("running now" if folder.is_claimed() else "finished" if step == settings["total_steps"] else "not running")
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


def _sample(options) -> None:
    from .backbone import load_diffusion
    from .sampling import generate

    samples = generate(
        *load_diffusion(options.model, device="auto"), prompt=options.prompt, suffix=options.suffix,
        length=options.length, steps=options.steps, order=options.order, temperature=options.temperature,
        top_p=options.top_p, top_k=options.top_k, repetition_penalty=options.repetition_penalty,
        block_length=options.block_length, stop_at_end=options.stop_at_end, num_samples=options.num, seed=options.seed,
    )  # fmt: skip
    print("\n\n---\n\n".join(samples.text))


def _evaluate(options) -> None:
    from .backbone import load_base
    from .corpus import load_corpus
    from .evaluation import ar_nll, nelbo
    from .objective import mask_id_of

    model, tokenizer = load_base(options.model, device="auto")
    blocks = load_corpus(options.text, tokenizer, field=options.field).blocks("test", options.length, options.blocks)
    if mask_id_of(model) is None:
        print(f"AR NLL on {len(blocks)} test blocks: {ar_nll(model, tokenizer, blocks)}")
    else:
        print(f"NELBO on {len(blocks)} test blocks: {nelbo(model, tokenizer, blocks, num_samples=options.samples)}")


def _data(options) -> None:
    from .backbone import load_base
    from .corpus import load_corpus

    corpus = load_corpus(options.text, load_base(options.tokenizer)[1], field=options.field)
    print(json.dumps({**corpus.facts, "folder": corpus.folder.name}, indent=1))


def _notebook(options) -> None:
    """Execute with the kernel's progress bars on the terminal; the results lie beside the run's checkpoints."""
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError
    from nbconvert import HTMLExporter

    class Client(NotebookClient):
        def process_message(self, message, cell, cell_index):
            if message["msg_type"] == "stream" and message["content"]["name"] == "stderr":
                print(message["content"]["text"], end="", file=sys.stderr, flush=True)  # progress bars and warnings
                return None
            return super().process_message(message, cell, cell_index)

    notebook = nbformat.read(options.path, as_version=4)
    code = [index for index, cell in enumerate(notebook.cells) if cell.cell_type == "code"]
    begun = time.monotonic()

    def announce(cell, cell_index, **_):
        if cell.cell_type == "code" and cell.source.strip():
            first_line = next((line for line in cell.source.splitlines() if line.strip()), "")
            minutes = (time.monotonic() - begun) / 60
            print(f"[{minutes:4.1f} min] cell {code.index(cell_index) + 1}/{len(code)}: {first_line[:90]}", flush=True)

    client = Client(
        notebook,
        timeout=None,
        extra_arguments=["--log-level=ERROR"],
        resources={"metadata": {"path": str(options.path.parent)}},
    )
    client.on_cell_start = announce
    target = options.path if options.in_place else PROJECT / "checkpoints" / "runs" / options.path.name
    failure = None
    try:
        client.execute()
    except CellExecutionError as error:
        failure = RuntimeError(f"a cell of {options.path.name} failed:\n{error}")
    if failure is None or not options.in_place:  # a notebook under git is replaced by a whole run only
        target.parent.mkdir(parents=True, exist_ok=True)
        for cell in notebook.cells:  # when and how fast cells ran is nobody's business but the terminal's
            cell.metadata.pop("execution", None)
        nbformat.write(notebook, target)
    if failure is not None:
        raise failure
    if not options.in_place:
        page, _ = HTMLExporter(template_name="classic").from_notebook_node(notebook)
        target.with_suffix(".html").write_text(page)
    print(f"\nfinished in {(time.monotonic() - begun) / 60:.1f} minutes")
    for output in notebook.cells[code[-1]].outputs:
        print(output.get("text", ""), end="")
    print(f"the executed notebook: {os.path.relpath(target)}")
    if not options.in_place:
        print(f"the same as a page:    {os.path.relpath(target.with_suffix('.html'))}")


if __name__ == "__main__":
    sys.exit(main())
