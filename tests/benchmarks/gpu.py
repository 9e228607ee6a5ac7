"""Everything that only a GPU can show, in order of importance and within a number of minutes.

    python -m tests.benchmarks.gpu --minutes 8 --out FOLDER

1. the CUDA tests; 2. one training step, ours as a CUDA graph and eager, beside plain loops; 3. the loop of the profile
`full` with its checkpoints; 4. evaluation and sampling; 5. the notebooks under `full`, on random weights of the right
shapes and a text made here; 6. an adaptation of SmolLM2-135M, if its file is in data/.

No network is needed. FOLDER/gpu.json and FOLDER/gpu.md are rewritten after every row, so an interrupted run keeps what
it measured. On a machine without a GPU, `--tiny` runs all parts at sizes that measure nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from dalm_utils.config import PROJECT
from tests.benchmarks import machine

SHAPES = ((8, 512), (32, 512), (32, 1024))
PRECISIONS = ("fp16", "bf16")


class Report:
    """What was measured so far, in two files that are rewritten whenever something is added."""

    def __init__(self, folder: Path, minutes: float):
        self.folder, self.ends = folder, time.monotonic() + 60 * minutes
        self.content: dict = {"machine": machine(), "parts": {}}
        folder.mkdir(parents=True, exist_ok=True)

    def seconds_left(self) -> float:
        return self.ends - time.monotonic()

    def add(self, part: str, row: dict) -> None:
        self.content["parts"].setdefault(part, []).append(row)
        (self.folder / "gpu.json").write_text(json.dumps(self.content, indent=1) + "\n")
        (self.folder / "gpu.md").write_text(self.markdown())
        print(f"{part}: {row}", flush=True)

    def markdown(self) -> str:
        lines = [self.content["machine"]]
        for part, rows in self.content["parts"].items():
            columns = list(dict.fromkeys(name for row in rows for name in row))
            lines += ["", f"### {part}", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
            lines += [f"| {' | '.join(_show(row.get(name, '')) for name in columns)} |" for row in rows]
        return "\n".join(lines) + "\n"


def _show(value) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def call(report: Report, *words: str, limit: float = 600, env: dict | None = None) -> dict:
    """Run Python with these arguments within the time that is left; its exit code, seconds, and last lines."""
    limit = max(1.0, min(limit, report.seconds_left()))
    begun = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, *words], cwd=PROJECT, env={**os.environ, **(env or {})}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    try:
        said, _ = process.communicate(timeout=limit)
        code: int | str = process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with the kernels and processes that it started
        said, code = process.communicate()[0], "out of time"
    return {"code": code, "seconds": round(time.monotonic() - begun, 1), "said": said}


def last_json(said: str) -> dict:
    """The last line that is a JSON object; empty if there is none."""
    for line in reversed(said.splitlines()):
        if line.startswith("{"):
            try:
                return json.loads(line)
            except ValueError:
                return {}
    return {}


# --------------------------------------------------------------------------------------------------- parts
def cuda_tests(report: Report, tiny: bool) -> Iterator[dict]:
    """tests/test_cuda.py, and the steps that are replayed."""
    chosen = ["-k", "one_graph"] if tiny else []
    result = call(report, "-m", "pytest", "-q", "tests/test_cuda.py", "tests/test_step.py", *chosen, limit=240)
    failed = [line for line in result["said"].splitlines() if line.startswith(("FAILED", "ERROR"))]
    summary = next((line for line in reversed(result["said"].splitlines()) if "passed" in line), result["said"][-200:])
    yield {"exit": result["code"], "seconds": result["seconds"], "result": summary.strip("= "), "failed": failed}


def steps(report: Report, tiny: bool) -> Iterator[dict]:
    """Milliseconds of one step of every way, at every shape and precision."""
    from tests.benchmarks import train_step

    shapes, precisions, size = (((2, 16),), ("fp32",), "laptop") if tiny else (SHAPES, PRECISIONS, "gpt2")
    for batch, length in shapes:
        for precision in precisions:
            plain = None
            for way in ("plain", *(way for way in train_step.WAYS if way not in ("plain", "released"))):
                words = ["-m", "tests.benchmarks.train_step", "--only", way, "--sizes", size]
                words += ["--batch", str(batch), "--length", str(length), "--precision", precision]
                words += ["--rounds", "1", "--vocab", "64"] if tiny else ["--rounds", "3"]
                result = call(report, *words, limit=90)
                figures = last_json(result["said"])
                row = {"batch": batch, "length": length, "precision": precision, "step": way}
                if not figures:
                    yield {**row, "error": (result["said"].strip().splitlines() or [str(result["code"])])[-1][:200]}
                    continue
                plain = figures["seconds"] if way == "plain" else plain
                yield row | {
                    "ms": 1e3 * figures["seconds"],
                    "tokens/s": batch * length / figures["seconds"],
                    "times plain": plain / figures["seconds"] if plain else "",
                    "fraction of the GEMM rate": figures["work"] / figures["seconds"] / figures["gemm"],
                    "host ms": 1e3 * figures["host"],
                    "launches": figures["launches"],
                    "GiB": figures["gib"],
                }


def inputs(report: Report, tiny: bool) -> dict[str, str]:
    """By name: random models of GPT-2's and Galactica's shapes with a small tokenizer, and a text of some megabytes."""
    from dalm_utils import load_base, save_diffusion
    from tests.benchmarks.cost import shape

    folder = report.folder / "inputs"
    if folder.exists():
        return {path.name: str(path) for path in folder.iterdir()}
    text = folder / "text"
    text.mkdir(parents=True)
    wanted, size = (2e5 if tiny else 4e6), 0
    package = Path(importlib.util.find_spec("torch").origin).parent
    for number, file in enumerate(sorted(package.rglob("*.py"))):
        content = file.read_text(errors="replace")
        if size < wanted and len(content) > 2000:
            (text / f"{number:05d}.txt").write_text(content)
            size += len(content)
    for name, base, recipe in (("gpt2", "tiny-gpt2", "gpt2"), ("galactica", "tiny-galactica", "galactica")):
        small, tokenizer = load_base(base)
        model = small
        if not tiny:
            config = shape(recipe).config
            config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
            config.pad_token_id = tokenizer.pad_token_id
            torch.manual_seed(0)
            model = type(small)(config)
        save_diffusion(model, tokenizer, folder / name)
    return inputs(report, tiny)


def full_loop(report: Report, tiny: bool) -> Iterator[dict]:
    """The loop of the profile `full` for about a minute, with its evaluations and checkpoints."""
    places = inputs(report, tiny)
    runs = str((report.folder / "runs").resolve())
    for name, steps in ({"tiny": 20} if tiny else {"first": 600, "longer": 2400}).items():
        settings = [f"name={name}", f"base={places['gpt2']}", f"text={places['text']}", "field=text", f"runs={runs}"]
        settings += [f"steps={steps}", "train_blocks=none", f"anneal_steps={steps // 2}", f"warmup_steps={steps // 10}"]
        settings += [f"eval_every={steps // 2}", f"save_every={steps // 2}", "sample_every=0"]
        settings += ["device=cpu", "precision=fp32", "batch=2", "length=32", "eval_blocks=4"] if tiny else []
        result = call(report, "-m", "dalm_utils", "train", "gpt2", "--profile", "full", *settings, limit=120)
        history = Path(runs) / name / "history.jsonl"
        records = [json.loads(line) for line in history.read_text().splitlines()] if history.exists() else []
        progress = [record for record in records if record.get("seconds")]
        row = {"steps": steps, "exit": result["code"], "wall s": result["seconds"]}
        if len(progress) > 2:
            first, last = progress[len(progress) // 2], progress[-1]
            row["ms a step"] = 1e3 * (last["seconds"] - first["seconds"]) / (last["step"] - first["step"])
            row["training s"] = last["seconds"]
            row["GiB"] = last["memory"]
        if result["code"] != 0:
            row["said"] = result["said"].strip()[-300:]
        yield row


def scoring(report: Report, tiny: bool) -> Iterator[dict]:
    """Evaluation and sampling with the model that ships."""
    sizes = ["--length", "512", "--blocks", "96"]
    if tiny:
        sizes = ["--length", "32", "--blocks", "4", "--text", inputs(report, tiny)["text"]]
    result = call(report, "-m", "dalm_utils", "evaluate", "tiny-diffugpt", *sizes, "--json", limit=90)
    yield {"what": "evaluate", "exit": result["code"], "wall s": result["seconds"], **_nelbo_of(result["said"])}
    sizes = ["--length", "8", "--num", "2"] if tiny else ["--length", "256", "--num", "32"]
    result = call(report, "-m", "dalm_utils", "sample", "tiny-diffugpt", *sizes, "--json", limit=90)
    passes = last_json(result["said"]).get("forward_passes")
    yield {"what": "sample", "exit": result["code"], "wall s": result["seconds"], "forward passes": passes}


def _nelbo_of(said: str) -> dict:
    return {key: value for key, value in last_json(said).items() if key.startswith("nats_per_token")}


def notebooks(report: Report, tiny: bool) -> Iterator[dict]:
    """Every notebook from top to bottom under `full`, on random weights."""
    places = inputs(report, tiny)
    names = {"02_shift_ablation": "gpt2", "01_gpt2_full_training": "gpt2", "03_galactica_adaptation": "galactica"}
    for name, model in names.items():
        if report.seconds_left() < 60 and not tiny:
            return
        settings = dict(PROFILE="laptop" if tiny else "full", BASE=places[model], TEXT=places["text"], FIELD="text")
        settings |= dict(RUNS=str((report.folder / "notebook-runs").resolve()), TRAIN_BLOCKS="64" if tiny else "800")
        settings |= dict(EPOCHS="1", ANNEAL_STEPS="40", WARMUP_STEPS="10", EVAL_EVERY="50", SAVE_EVERY="50")
        settings |= dict(LENGTH="64", EVAL_BLOCKS="4", STEPS="4", DISTILL="0") if tiny else {}
        environment = {f"DALM_{key}": value for key, value in settings.items()}
        path = report.folder / f"{name}.ipynb"
        shutil.copy(PROJECT / "notebooks" / f"{name}.ipynb", path)
        shutil.copytree(PROJECT / "notebooks" / "recorded", report.folder / "recorded", dirs_exist_ok=True)
        words = ["-m", "dalm_utils", "notebook", str(path), "--in-place"]
        result = call(report, *words, limit=300, env=environment)
        row = {"notebook": name, "exit": result["code"], "wall s": result["seconds"]}
        yield row if result["code"] == 0 else row | {"said": result["said"].strip()[-300:]}


def smollm2(report: Report, tiny: bool) -> Iterator[dict]:
    """An adaptation of a pretrained model, in the minutes that are left."""
    from dalm_utils.hubs import SMOLLM2

    if not SMOLLM2.is_file() or tiny:
        yield {"skipped": "data/ holds no SmolLM2; `python -m dalm_utils data smollm2` gets it"}
        return
    runs = str((report.folder / "runs").resolve())
    settings = ["name=smollm2", f"runs={runs}", "batch=16", "length=512", "steps=2000", "device=cuda"]
    settings += ["anneal_steps=100", "warmup_steps=100", "eval_every=250", "save_every=1000"]
    words = ["-m", "dalm_utils", "train", "gpt2", "--profile", "real", *settings]
    result = call(report, *words, limit=report.seconds_left() - 5)
    history = Path(runs) / "smollm2" / "history.jsonl"
    scores = [r for r in map(json.loads, history.read_text().splitlines()) if "nelbo" in r] if history.exists() else []
    yield {"exit": result["code"], "wall s": result["seconds"]}
    for record in scores:
        yield {key: record[key] for key in ("step", "tokens", "nelbo", "nelbo_stderr")}


PARTS: dict[str, Callable[[Report, bool], Iterator[dict]]] = {
    "tests": cuda_tests, "step": steps, "loop": full_loop, "scoring": scoring, "notebooks": notebooks,
    "smollm2": smollm2,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--out", type=Path, required=True, help="a new folder, for the report and all that is made")
    parser.add_argument("--tiny", action="store_true", help="all parts, at sizes that measure nothing")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    asked = parser.parse_args()
    if not torch.cuda.is_available() and not asked.tiny:
        sys.exit("error: torch sees no CUDA device here; --tiny tries this script without one")
    if asked.out.exists() and any(asked.out.iterdir()):
        sys.exit(f"error: {asked.out} is not empty; name a new folder with --out")
    report = Report(asked.out.resolve(), asked.minutes)
    for name in asked.only:
        if report.seconds_left() < 5:
            report.add(name, {"skipped": "no time left"})
            continue
        try:
            for row in PARTS[name](report, asked.tiny):
                report.add(name, row)
        except Exception as error:  # one part must not cost the others
            report.add(name, {"error": f"{type(error).__name__}: {error}"})
    print(f"\n{report.markdown()}\nwritten to {report.folder / 'gpu.md'}")


if __name__ == "__main__":
    main()
