"""What a token teaches: trials of recipes on the laptop base, `python -m tests.benchmarks.recipe --help`.

Each trial is one line of words: `released` for the recipe of arXiv 2410.17891's code, then `name=value`, where a name
is a field of `RunConfig`, a share of the run (`anneal`, `warmup`), or a lever that lives only here. All trials start
from the same base, see the same text in the same order, and are scored by the NELBO of the same held-out blocks under
the same masks. One core each, so that several can run side by side; what is done is not done again.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import dalm_utils as dalm
from dalm_utils import run as loop
from dalm_utils.annealing import annealed_mask
from dalm_utils.config import PROJECT, RunConfig, load_config, parse_field
from dalm_utils.objective import default_maskable, logits_of, mask_id_of, sample_times, seeded
from dalm_utils.training import _accelerator

RESULTS = PROJECT / "notebooks" / "recorded" / "recipe.jsonl"
RELEASED = dict(times="uniform", normalize="masked", dropout=0.1, anneal=0.01)
LEVERS = dict(
    anneal=1 / 3, warmup=1 / 12,  # shares of the run
    power=1.0,  # a masked token weighs t ** -power
    counts=0,  # 1: an exact number of masked tokens instead of independent coins
    grow=0.0,  # times up to 1 only after this share of the run
    pairs=0,  # 1: half as many blocks, each twice, masked where the other one is not
    begin="mean",  # [MASK] starts as the mean embedding, that at a token's usual norm (scaled), zero, bos, or a token
    soft=0.0,  # look-ahead edges all open, their weight in attention growing as ratio ** soft
    window=0,  # 1: look-ahead opens as a window that grows, not edge by edge
    ar=0.0,  # weight of the AR loss on the clean text
    distill=0.0,  # weight of agreeing with the base, which sees the clean text to the left, about what is masked
    align=0.0,  # the same for the last hidden states
    deep=0.0,  # the same for the hidden states of all blocks, at all positions
    hold=1.0,  # share of the run in which these four fade
    muon=0.0,  # Muon's rate for the matrices inside the blocks, times learning_rate
    embed=1.0,  # rate of the embeddings, times learning_rate
    beta1=0.9, ema=0.0,
    decay="cosine",  # or linear, or wsd: constant, then linear in the last fifth
)  # fmt: skip
TEACHING = ("distill", "align", "deep")


class Trial(loop.Run):
    """A run with levers."""

    levers: dict = LEVERS

    def save(self) -> None:
        pass

    def _prepare(self) -> None:
        super()._prepare()
        self.teacher = (
            copy.deepcopy(self.model).eval() if any(self.levers[k] for k in ("distill", "align", "deep")) else None
        )

    def _attention_mask(self):
        length, ratio = self.config.length, dalm.anneal_ratio(self.step, self.config.anneal_steps)
        if ratio == 1.0:
            return None
        if self.levers["soft"]:
            ahead = torch.ones(length, length).triu(1)
            return (ahead * self.levers["soft"] * math.log(ratio))[None, None]
        if not self.levers["window"]:
            return super()._attention_mask()
        far = torch.arange(length)[None, :] - torch.arange(length)[:, None] > ratio**2 * length
        return torch.zeros(length, length).masked_fill_(far, -torch.inf)[None, None]

    def _batch(self):
        levers, config, step = self.levers, self.config, self.step
        rows = self.global_batch // (2 if levers["pairs"] else 1)
        tokens = self.blocks[[self._block_at(step * rows + i) for i in range(rows)]]
        draws = {purpose: seeded(config.seed, step, purpose) for purpose in ("times", "corruption")}
        times = sample_times(rows, method=config.times, eps=config.eps, generator=draws["times"])
        if levers["grow"]:
            times = times * min(1.0, 0.2 + 0.8 * step / (levers["grow"] * self.total))
        coins = torch.rand(tokens.shape, generator=draws["corruption"])
        if levers["counts"]:
            wanted = (times * (config.length - 1)).ceil().clamp(min=1)
            times = wanted / (config.length - 1)
            coins[:, 0] = 2
            masked = coins.argsort(1).argsort(1) < wanted[:, None]
        else:
            masked = (coins < times[:, None]) & default_maskable(tokens)
        if levers["pairs"]:
            tokens, masked = torch.cat([tokens, tokens]), torch.cat([masked, ~masked & default_maskable(tokens)])
            times = torch.cat([times, (1 - times).clamp(min=config.eps)])
        noised = torch.where(masked, mask_id_of(self.model), tokens)
        weights = times ** -levers["power"]
        count = (masked if config.normalize == "masked" else default_maskable(tokens)).sum()
        if levers["power"] != 1.0:  # the loss is a mean, whatever the weights
            count = (masked * weights[:, None]).sum()
        return tokens, noised, masked, 1 / weights, max(float(count), 1.0)

    def _optimize(self):
        levers = self.levers
        fade = max(0.0, 1 - self.step / (levers["hold"] * self.total))
        if fade > 0 and (levers["ar"] or self.teacher):
            self._extra(fade)
        norm = super()._optimize()
        if levers["ema"]:
            decay = min(levers["ema"], (1 + self.step) / (10 + self.step))
            with torch.no_grad():
                for kept, now in zip(self.average, self.model.parameters(), strict=True):
                    kept.lerp_(now, 1 - decay)
        return norm

    def _extra(self, fade: float) -> None:
        """Gradients of the AR loss on the clean text, or of agreeing with the base about what is masked."""
        tokens, noised, masked, times, _ = self._batch()
        causal = annealed_mask(self.config.length, 0.0)
        self.model.train()
        if self.levers["ar"]:
            maskable = default_maskable(tokens)
            loss = dalm.diffusion_loss(
                self.model, tokens, tokens, maskable, torch.ones(len(tokens)), attention_mask=causal
            )
            (self.levers["ar"] * fade * loss.loss).backward()
        if self.teacher is None:
            return
        rows, columns = masked.nonzero(as_tuple=True)
        weights = 1 / times[rows]  # what `_batch` calls times is one over the weight
        positions = torch.arange(tokens.shape[1])[None]
        ask = dict(position_ids=positions, use_cache=False, output_hidden_states=True)
        with torch.no_grad():
            wise = self.teacher.base_model(tokens, attention_mask=causal, **ask).hidden_states
        mine = self.model.base_model(noised, attention_mask=self._attention_mask(), **ask).hidden_states
        loss = 0.0
        if self.levers["distill"]:
            with torch.no_grad():
                target = logits_of(self.teacher, wise[-1][rows, columns - 1]).log_softmax(-1)
            own = logits_of(self.model, mine[-1][rows, columns - 1]).log_softmax(-1)
            keep = torch.arange(own.shape[-1]) != mask_id_of(self.model)
            kl = F.kl_div(own[:, keep], target[:, keep], reduction="none", log_target=True).sum(-1)
            loss = loss + self.levers["distill"] * (kl * weights).sum() / weights.sum()
        if self.levers["align"]:
            own, target = mine[-1][rows, columns - 1], wise[-1][rows, columns - 1]
            error = (own - target).square().mean(-1) / target.square().mean()
            loss = loss + self.levers["align"] * (error * weights).sum() / weights.sum()
        if self.levers["deep"]:
            for own, target in zip(mine[1:-1], wise[1:-1], strict=True):
                error = (own - target).square().mean(-1) / target.square().mean()
                loss = loss + self.levers["deep"] * error[:, 1:].mean() / len(mine)
        (fade * loss).backward()


def _orthogonal(grad, coefficients, steps, eps):
    """torch's Newton-Schulz iteration in float32: bfloat16 is slow on most CPUs."""
    x = grad.T if grad.shape[0] > grad.shape[1] else grad
    x = x / x.norm().clamp(min=eps)
    a, b, c = coefficients
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if grad.shape[0] > grad.shape[1] else x


torch.optim._muon._zeropower_via_newtonschulz = _orthogonal


class Both(torch.optim.Optimizer):
    """Muon for the matrices inside the blocks, AdamW for the rest."""

    def __init__(self, parts):
        self.parts, self.defaults, self.state = parts, {}, {}
        self.param_groups = [group for part in parts for group in part.param_groups]

    def register_step_pre_hook(self, hook):
        pass

    def step(self, closure=None):
        for group in self.param_groups:
            group["lr"] *= group["ratio"]
        for part in self.parts:
            part.step()

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass

    def zero_grad(self, set_to_none=True):
        for part in self.parts:
            part.zero_grad(set_to_none)


def _optimizer(model, config: RunConfig):
    levers = Trial.levers
    tables = {id(p) for n, p in model.named_parameters() if "wte" in n or "wpe" in n}
    inside = [p for p in model.parameters() if p.dim() == 2 and id(p) not in tables]
    outside = [p for p in model.parameters() if id(p) in tables]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    rest = [
        {"params": outside, "ratio": levers["embed"], "weight_decay": config.weight_decay},
        {"params": vectors, "ratio": 1.0, "weight_decay": 0.0},
    ]
    parts = []
    if levers["muon"]:
        muon = torch.optim.Muon(
            inside, lr=config.learning_rate, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"
        )
        muon.param_groups[0]["ratio"] = levers["muon"]
        parts.append(muon)
    else:
        rest.append({"params": inside, "ratio": 1.0, "weight_decay": config.weight_decay})
    betas = (levers["beta1"], config.beta2)
    return Both([*parts, torch.optim.AdamW(rest, lr=config.learning_rate, betas=betas, fused=True)])


def _rate(config: RunConfig, step: int, steps: int) -> float:
    kind = Trial.levers["decay"]
    if step < config.warmup_steps or kind == "cosine":
        return _cosine(config, step, steps)
    left = (steps - step) / (steps - config.warmup_steps)
    return config.learning_rate * (min(1.0, left / 0.2) if kind == "wsd" else left)


_cosine = loop.learning_rate
loop._adamw, loop.learning_rate = _optimizer, _rate


def parse(recipe: str) -> tuple[dict, dict]:
    """The fields of a recipe and its levers."""
    fields, levers = {}, dict(LEVERS)
    for word in recipe.split():
        name, _, value = word.partition("=")
        name = {"lr": "learning_rate"}.get(name, name)
        if name == "released":
            fields |= {k: v for k, v in RELEASED.items() if k not in LEVERS}
            levers |= {k: v for k, v in RELEASED.items() if k in LEVERS}
        elif name in LEVERS:
            levers[name] = type(LEVERS[name])(value)
        else:
            fields[name] = parse_field(name, value)
    return fields, levers


@torch.no_grad()
def _begin(model, tokenizer, kind: str) -> None:
    """Let [MASK] start as something else than the mean of all embeddings."""
    table, mask_id = model.get_input_embeddings().weight, tokenizer.mask_token_id
    if kind == "zero":
        table[mask_id] = 0
    elif kind == "scaled":
        table[mask_id] *= table[:mask_id].norm(dim=1).mean() / table[mask_id].norm()
    elif kind != "mean":
        table[mask_id] = table[tokenizer.bos_token_id if kind == "bos" else tokenizer.encode(kind)[0]]


def trial(recipe: str, tokens: float, seed: int) -> dict:
    """Adapt the base by one recipe; its figures."""
    fields, levers = parse(recipe)
    sizes = {"batch": 16, "length": 256, **{k: v for k, v in fields.items() if k in ("batch", "length")}}
    steps = round(tokens / (sizes["batch"] * sizes["length"]))
    Trial.levers = levers
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(
            "gpt2", "laptop", name="trial", runs=folder, device="cpu", precision="fp32", seed=seed, steps=steps,
            anneal_steps=max(1, round(levers["anneal"] * steps)), warmup_steps=round(levers["warmup"] * steps),
            eval_every=10**9, sample_every=0, save_every=10**9, log_every=max(1, steps // 10), **fields,
        )  # fmt: skip
        model, tokenizer = loop.build(config)
        _begin(model, tokenizer, levers["begin"])
        run = Trial(model, tokenizer, config, _accelerator(config), resume="never")
        run.average = [p.detach().clone() for p in model.parameters()] if levers["ema"] else []
        run._evaluate = dict
        begun = time.perf_counter()
        while not run.is_done:
            run.advance()
        seconds = time.perf_counter() - begun
        run.close()
    held_out = dalm.load_corpus(config.text, tokenizer).blocks("validation", 256, limit=96)
    score = dalm.nelbo(model, tokenizer, held_out, num_samples=4)
    result = {
        "tokens": steps * sizes["batch"] * sizes["length"],
        "seconds": round(seconds, 1), "nelbo": round(score.mean, 4), "stderr": round(score.stderr, 4),
    }  # fmt: skip
    if run.average:
        with torch.no_grad():
            for kept, now in zip(run.average, model.parameters(), strict=True):
                now.copy_(kept)
        result["nelbo_average"] = round(dalm.nelbo(model, tokenizer, held_out, num_samples=4).mean, 4)
    return result


def table(lines: list[str]) -> str:
    """The results in Markdown: a row for each recipe and number of tokens, the best first; a mean over its seeds."""
    groups: dict[tuple, list[dict]] = {}
    for result in map(json.loads, lines):
        groups.setdefault((result["asked"], result["recipe"]), []).append(result)
    rows = ["| million tokens | recipe | NELBO of each seed | seconds |", "|---|---|---|---|"]
    mean = {key: sum(result["nelbo"] for result in group) / len(group) for key, group in groups.items()}
    for key in sorted(groups, key=lambda key: (key[0], mean[key])):
        scores = ", ".join(f"{result['nelbo']:.3f}" for result in groups[key])
        seconds = sum(result["seconds"] for result in groups[key]) / len(groups[key])
        rows.append(f"| {key[0]} | {key[1]} | {scores} | {seconds:.0f} |")
    return "\n".join(rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipes", nargs="*", help='none: show the results; for instance "released lr=1e-3"')
    parser.add_argument("--tokens", type=float, default=0.49, help="millions of training tokens")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.recipes:
        print(table(options.results.read_text().splitlines()))
    for recipe in options.recipes:
        for seed in options.seeds:
            asked = {"recipe": recipe, "seed": seed, "asked": options.tokens}
            lines = options.results.read_text().splitlines() if options.results.exists() else []
            if not any(asked.items() <= json.loads(line).items() for line in lines):
                result = trial(recipe, options.tokens * 1e6, seed)
                with open(options.results, "a") as file:
                    file.write(json.dumps(asked | result) + "\n")
                print(recipe, seed, result["nelbo"], result.get("nelbo_average", ""), result["seconds"], flush=True)
