"""One dataclass holds every setting of a run; a profile is a dictionary of changes to it."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import math
import os
import re
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


def _project() -> Path:
    """The checkout that holds this package; the working directory where the package is installed without one."""
    parent = Path(__file__).resolve().parents[1]
    pyproject = parent / "pyproject.toml"
    is_checkout = pyproject.is_file() and b'name = "dalm_utils"' in pyproject.read_bytes()
    return parent if is_checkout else Path.cwd()


PROJECT = _project()  # relative paths in a config start here


def cache_folder() -> Path:
    """Where prepared texts are kept: `DALM_CACHE` if it is set, else data/cache of the project."""
    return PROJECT / os.path.expanduser(os.environ.get("DALM_CACHE") or "data/cache")


def runs_folder() -> Path:
    """Where runs are kept: `DALM_RUNS` if it is set, else checkpoints/runs of the project."""
    return PROJECT / os.path.expanduser(os.environ.get("DALM_RUNS") or RunConfig.runs)


def display_path(path: str | Path) -> str:
    """A path as one would type it here: relative within the working directory, else absolute."""
    relative = os.path.relpath(path)
    return os.path.abspath(path) if relative.startswith(os.pardir) else relative


Objective = Literal["diffusion", "ar", "finetune", "finetune-ar"]  # see `tasks.TASKS`


@dataclass(frozen=True)
class RunConfig:
    """Every setting of one training run. Immutable: use `replace` to make a changed copy."""

    # what and where
    name: str = "run"  # the run's folder is <runs>/<name>
    runs: str = "checkpoints/runs"  # where runs are kept; relative paths start at the project's root
    base: str = "tiny-gpt2"  # a folder in checkpoints/base, any local folder, or a hub id, also id@revision
    hub: Literal["auto", "huggingface", "modelscope", "local"] = "auto"  # where to look for the base
    text: str = "docstrings"  # docstrings, mathematics, arxiv, a .jsonl or .parquet file, or a folder of text files
    field: str = "text"  # the field of a record that holds the document; "question,answer" for pairs
    train_blocks: int | None = None  # train on this many blocks, or pairs, of the text (None: all)

    # the objective
    objective: Objective = "diffusion"  # finetune: answers of prompt/answer pairs; ar: the next token, makes bases
    scratch: bool = False  # start from random weights instead of the base's
    shift: bool = True  # the logits at i-1 predict token i, as in the AR model
    anneal_steps: int = 10_000  # steps over which the causal mask opens
    normalize: Literal["maskable", "masked"] = "maskable"  # divide by maskable tokens (NELBO) or masked (released code)
    times: Literal["stratified", "uniform"] = "stratified"  # how t is drawn; stratified over the global batch
    eps: float = 1e-3  # the smallest t
    distill: float = 0.0  # how much the frozen base's prediction counts in the target, against 1 for the token itself
    distill_fit: bool = False  # lower `distill` to what the base's predictions of this text are worth
    distill_steps: int | None = None  # steps over which `distill` falls to 0 (None: the whole run)
    lora_rank: int = 0  # train adapters of this rank (LoRA), and [MASK]'s embedding; 0: all weights

    # the optimizer
    length: int = 512  # tokens in a block, including the begin token
    batch: int = 8  # blocks in one forward pass of one process
    accumulate: int = 1  # forward passes per optimizer step
    epochs: float = 1.0  # passes over the training blocks...
    steps: int | None = None  # ...unless the number of optimizer steps is given
    learning_rate: float = 5e-5  # the peak, reached at the end of the warm-up
    warmup_steps: int = 0  # linear from zero
    final_lr: float = 0.1  # the cosine ends at this fraction of the peak
    weight_decay: float = 0.01  # on matrices only
    beta2: float = 0.98  # AdamW's second beta
    clip: float = 1.0  # gradients are scaled down to this norm
    dropout: float = 0.0  # masking already regularizes, and dropout would add a third to a CPU step
    seed: int = 0  # of times, corruption, annealing masks, data order, dropout

    # numerical stability
    spike: float | None = None  # skip a step whose gradient norm is this many times the running mean (None: never)
    max_skips: int = 25  # after this many skipped steps in a row, roll back with half the learning rate
    patience: int | None = None  # stop after this many evaluations without a better NELBO (None: never)

    # the machine
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: the GPU, if there is one
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # auto: bf16 where the hardware is fast in it
    cuda_graph: bool = True  # on one GPU, replay each step as a CUDA graph
    compile: bool = False  # torch.compile each transformer block; pays off in long runs
    gradient_checkpointing: bool = False  # less memory, a third more time

    # the records
    log_every: int = 10  # steps per record in the history; its loss is their mean
    eval_every: int = 500  # steps between held-out NELBOs
    eval_blocks: int = 64  # held-out blocks for each
    eval_samples: int = 4  # masks drawn per block
    sample_every: int = 0  # steps between generated samples (0: none)
    save_every: int = 500  # steps between checkpoints
    keep: int = 2  # checkpoints kept, the newest ones, besides the best
    trackers: str = ""  # trackers that accelerate knows, separated by commas, for instance "tensorboard"

    def __post_init__(self):
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            _check_type(field.name, getattr(self, field.name), hints[field.name])
        for name in (
            "length", "batch", "accumulate", "epochs", "learning_rate", "anneal_steps", "clip", "log_every",
            "eval_every", "eval_blocks", "eval_samples", "save_every", "keep", "max_skips",
        ):  # fmt: skip
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.spike is not None and not self.spike > 1:
            raise ValueError(f"spike must be above 1 (times the usual gradient norm), or None, got {self.spike}")
        for name in ("steps", "train_blocks", "patience", "distill_steps"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, or None, got {getattr(self, name)}")
        for name in ("warmup_steps", "weight_decay", "sample_every", "seed", "distill", "lora_rank"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("dropout", "beta2", "eps"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if not 0 <= self.final_lr <= 1:
            raise ValueError(f"final_lr must be in [0, 1], got {self.final_lr}")
        if self.eps == 0:
            raise ValueError("eps must be above 0: the loss divides by t, and t is drawn from [eps, 1]")
        if self.length < 2:
            raise ValueError(f"length must be at least 2 (a begin token and one more), got {self.length}")
        for name, value in vars(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{name} must be a finite number, got {value}")
        if self.name in ("", ".", "..") or any(sign in self.name for sign in ("/", "\\", "\0")):
            raise ValueError(f"name must be the name of one folder inside of {self.runs!r}, got {self.name!r}")
        if not self.runs.strip():
            raise ValueError(f"runs must name a folder, got {self.runs!r}")

    def replace(self, **changes) -> RunConfig:
        """A copy with some fields changed. Raises ValueError for a field that does not exist."""
        check_names(changes)
        return dataclasses.replace(self, **changes)

    @property
    def folder(self) -> Path:
        """The folder where this run keeps its checkpoints and history."""
        return PROJECT / os.path.expanduser(self.runs) / self.name


# Fields that may change when a run is resumed, because they do not change what is learned. Where such a field matters
# through something that follows from it (the tokens of the text, the global batch, the number of steps), that is
# compared instead.
FREE_FIELDS = {
    "name", "runs", "hub", "text", "field", "batch", "accumulate", "epochs", "steps", "precision", "device",
    "cuda_graph", "compile", "distill_fit", "gradient_checkpointing", "sample_every", "save_every", "keep", "trackers",
    "max_skips", "patience",
}  # fmt: skip

# What the profiles of the three notebooks share. `real` is a real pretrained model that needs neither a hub nor a GPU.
LAPTOP = dict(base="tiny-gpt2", text="docstrings", length=256, batch=4, learning_rate=7e-4)
TEACHER = dict(distill=16.0, distill_fit=True)  # not in the paper; notebook 2 measures what it is worth
REAL = dict(
    base="data/smollm2-135m/SmolLM2-135M-Instruct.Q4_1.gguf", text="docstrings", length=128, batch=2,
    learning_rate=2e-4, eval_blocks=32,
)  # fmt: skip
AS_RECORDED = dict(batch=8, learning_rate=1e-4)  # the run of SmolLM2 that notebook 2 shows
FULL = dict(
    base="gpt2",
    text="arxiv:1",
    field="article",
    device="cuda",
    precision="fp16",
    length=512,
    batch=8,
    learning_rate=5e-5,
)

PROFILES: dict[str, dict[str, dict]] = {
    "gpt2": {
        "laptop": LAPTOP | dict(
            steps=180, warmup_steps=15, anneal_steps=60, eval_every=60, eval_blocks=32, sample_every=90, save_every=90
        ),
        "real": REAL | dict(
            steps=480, warmup_steps=40, anneal_steps=5, eval_every=160, sample_every=240, save_every=240
        ),
        "full": FULL | dict(
            epochs=10, train_blocks=40_000, warmup_steps=2_000, anneal_steps=10_000, eval_every=2_500,
            sample_every=10_000, save_every=5_000,
        ),
    },
    "shift": {
        "laptop": LAPTOP | TEACHER | dict(
            epochs=1, train_blocks=360, warmup_steps=7, anneal_steps=30, eval_every=30, eval_blocks=32, save_every=90,
        ),
        "real": REAL | AS_RECORDED | dict(
            epochs=1, train_blocks=2_400, warmup_steps=20, anneal_steps=100, eval_every=50, save_every=100
        ),
        "full": FULL | dict(
            epochs=1, train_blocks=8_000, warmup_steps=100, anneal_steps=333, eval_every=100, save_every=500
        ),
    },
    "galactica": {
        "laptop": LAPTOP | TEACHER | dict(
            base="tiny-galactica", text="mathematics", epochs=3, train_blocks=240, warmup_steps=15, anneal_steps=60,
            eval_every=60, eval_blocks=32, save_every=60, spike=10.0, patience=3,
        ),
        "real": REAL | dict(
            text="mathematics", epochs=3, train_blocks=800, warmup_steps=100, anneal_steps=12, eval_every=200,
            save_every=400, spike=10.0, patience=3,
        ),
        "full": FULL | dict(
            base="facebook/galactica-125m", epochs=3, train_blocks=12_000, warmup_steps=500, anneal_steps=1_500,
            eval_every=500, save_every=500, spike=10.0, patience=3,
        ),
    },
}  # fmt: skip


NOT_FIELDS = ("DALM_PROFILE", "DALM_CACHE")  # variables that set something other than a field of RunConfig


def load_config(recipe: str = "", profile: str | None = None, *, notebook: str = "", **overrides) -> RunConfig:
    """The settings of a recipe: its profile, then `DALM_<FIELD>` from the environment, then `overrides`.

    Args:
        recipe: a name in `PROFILES`: "gpt2", "shift" or "galactica", one for each notebook.
        profile: a name in `PROFILES[recipe]`; None takes `DALM_PROFILE`, else "laptop".
        notebook: another name for `recipe`.
        overrides: any field of `RunConfig`.

    Raises:
        ValueError: an unknown recipe, profile or field (the nearest name is suggested), or a bad value.
    """
    recipe = recipe or notebook
    profile = profile or profile_name()
    fields = {"name": f"{recipe}-{profile}"} | _pick(_pick(PROFILES, recipe, "recipe"), profile, "profile")
    check_names(overrides)
    return RunConfig(**{**fields, **_from_environment(), **overrides})


def profile_name() -> str:
    """The profile that is used where none is asked for."""
    return os.environ.get("DALM_PROFILE") or "laptop"


def _from_environment() -> dict:
    """The fields of `RunConfig` that `DALM_<FIELD>` sets; an empty variable counts as unset."""
    found = {}
    for variable, text in os.environ.items():
        if variable.startswith("DALM_") and variable not in NOT_FIELDS and text:
            name = variable.removeprefix("DALM_").lower()
            check_names({name: text}, origin=f" (from the environment variable {variable})")
            found[name] = parse_field(name, text)
    return found


def parse_field(name: str, text: str):
    """The value of a field of `RunConfig` that was written as text."""
    hint = typing.get_type_hints(RunConfig)[name]
    kinds = (str,) if typing.get_origin(hint) is Literal else typing.get_args(hint) or (hint,)
    if type(None) in kinds and text.lower() in ("none", ""):
        return None
    if bool in kinds:
        if text.lower() not in ("true", "false", "1", "0"):
            raise ValueError(f"{name} must be true or false, got {text!r}")
        return text.lower() in ("true", "1")
    try:
        return kinds[0](text)
    except ValueError:
        raise ValueError(f"{name} must be of type {kinds[0].__name__}, got {text!r}") from None


def _check_type(name: str, value, hint) -> None:
    if typing.get_origin(hint) is Literal:
        if value not in typing.get_args(hint):
            raise ValueError(f"{name} must be one of {', '.join(typing.get_args(hint))}; got {value!r}")
        return
    kinds = typing.get_args(hint) or (hint,)
    if (isinstance(value, bool) and bool not in kinds) or not isinstance(
        value, kinds + ((int,) if float in kinds else ())
    ):
        expected = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
        raise ValueError(f"{name} must be of type {expected}, got {value!r}")


def field_table() -> str:
    """Every field of `RunConfig` with its default and its comment, grouped as in the source."""
    lines = []
    for line in inspect.getsource(RunConfig).splitlines():
        if field := re.match(r"    (\w+): .+? = (.+?)  # (.+)", line):
            lines.append("  {:28} {}".format(f"{field[1]}={field[2]}".replace('"', ""), field[3]))
        elif title := re.match(r"    # (.+)", line):
            lines += ["", f"{title[1]}:"]
    return "\n".join(lines)


def check_names(changes, origin: str = "") -> None:
    """Raise ValueError, with the nearest name, if a key is not a field of `RunConfig`."""
    names = [field.name for field in dataclasses.fields(RunConfig)]
    for name in changes:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; the fields are {', '.join(names)}"
            raise ValueError(f"RunConfig has no field {name!r}{origin}{hint}")


def _pick(table: dict, key: str, what: str):
    if key not in table:
        raise ValueError(f"no {what} named {key!r}; choose one of {', '.join(table)}")
    return table[key]
