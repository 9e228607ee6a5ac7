"""Diffusion models in EleutherAI's lm-evaluation-harness: LAMBADA, HellaSwag and its other tasks.

    pip install -r requirements-eval.txt
    python -m dalm_utils.harness --model dalm_diffusion --model_args path=FOLDER --tasks lambada_openai,hellaswag

is the harness's own command line, with one more model; --include_path adds task files of your own. In Python:
`lm_eval.simple_evaluate(model=register()(path=FOLDER), tasks=[...])`.

The harness asks of every continuation whether greedy decoding gives it, which costs as much as the likelihood. Of the
choices of a multiple-choice task it reads the answer only for the metric exact_match, so they are decoded only with
greedy=true in --model_args; without it, their exact_match is 0.
"""

from __future__ import annotations

import itertools
import sys
from collections import defaultdict
from dataclasses import dataclass, fields
from functools import cache

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .backbone import load_diffusion, max_length
from .evaluation import continuation_nelbo
from .sampling import generate
from .tokens import begin_id, decode, encode

COUNTS = ("num_samples", "steps", "block_length", "batch_size", "max_length")  # whole numbers of at least 1


@dataclass
class Responder:
    """Answers the harness's three kinds of request, given as tuples, with a diffusion model.

    A likelihood is `-continuation_nelbo`, in nats: an estimate of a lower bound on log p, with the same masks for all
    choices of one length.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    num_samples: int = 32  # masks drawn for each likelihood
    order: str = "confidence"  # in which tokens are revealed; see `generate`
    steps: int | None = None  # of sampling; None: one for each token
    block_length: int | None = 32  # texts are sampled in blocks of this many tokens, from left to right
    batch_size: int = 8  # requests in one call of `generate`; a likelihood is a batch of its own, `num_samples` masks
    max_length: int | None = None  # positions, the begin token included; None: as many as the model can see
    seed: int = 0
    precision: str = "auto"

    def __post_init__(self):
        for name in COUNTS:
            value = getattr(self, name)
            if value is not None and not (type(value) is int and value >= 1):
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        positions = max_length(self.model)
        self.room = min(self.max_length or positions, positions) - 1
        self._check_sampling({"max_gen_toks": 1})

    def loglikelihood(
        self, requests: list[tuple[str, str]], greedy: list[bool] | None = None
    ) -> list[tuple[float, bool]]:
        """For each (context, continuation): log p, and whether greedy decoding gives the continuation.

        All requests are checked before any is answered.

        Args:
            greedy: for each request, whether to decode it; where not, the second answer is False. None: all.

        Raises:
            ValueError: a continuation without a token, or longer than the model; longer contexts lose their beginning.
        """
        pairs = [self._encode_pair(*request) for request in requests]
        scores = [-self._bound(before, after) for before, after in tqdm(pairs, "likelihoods")]
        wanted = [i for i in range(len(pairs)) if greedy is None or greedy[i]]
        answers = dict(zip(wanted, self._are_greedy([pairs[i] for i in wanted]), strict=True))
        return [(score, answers.get(i, False)) for i, score in enumerate(scores)]

    def loglikelihood_rolling(self, requests: list[tuple[str]]) -> list[float]:
        """For each (text,): log p, in windows as long as the model; the last is preceded by as much as fits."""
        texts = encode(self.tokenizer, [text for (text,) in requests])
        return [self._rolling(ids) for ids in tqdm(texts, "likelihoods of whole texts")]

    def generate_until(self, requests: list[tuple[str, dict]]) -> list[str]:
        """For each (context, options): the text that follows, up to the first stop string or end token.

        Options are `max_gen_toks`, the number of tokens that are masked at the start; `until`, a list of stop strings;
        and `temperature`, `top_p`, `top_k`, greedy if not given or None. All are checked before any text is generated.

        Raises:
            ValueError: more tokens than the model has positions, or an option that `generate` does not take.
        """
        for options, _ in itertools.groupby(options for _, options in requests):
            self._check_sampling(options)
        texts: list[str] = []
        bar = tqdm(total=len(requests), desc="sampling")
        for options, group in itertools.groupby(requests, key=lambda request: request[1]):
            contexts = [context for context, _ in group]
            for start in range(0, len(contexts), self.batch_size):
                batch = contexts[start : start + self.batch_size]
                texts += self._continue(batch, options, self.seed + len(texts))
                bar.update(len(batch))
        bar.close()
        return texts

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """As the harness does for AR models: spaces go with the word after them, and both are tokenized as one.

        Where the first letters of the continuation are in one token with the end of the context, the continuation is
        tokenized by itself.
        """
        if not continuation:
            raise ValueError(f"the continuation of {context[-60:]!r} is empty; correct the task's targets or choices")
        stripped = context.rstrip()
        before, whole = encode(self.tokenizer, [stripped, context + continuation])
        after = whole[len(before) :]
        if whole[: len(before)] != before:
            rest = context[len(stripped) :] + continuation
            after = encode(self.tokenizer, [rest], inside=bool(before))[0]
        if not after:
            raise ValueError(f"the continuation {continuation!r} of {context[-60:]!r} has no token to score")
        if len(after) > self.room:
            raise ValueError(
                f"the continuation {continuation[:60]!r} has {len(after)} tokens; {self.room} fit the model"
            )
        return before[max(0, len(before) + len(after) - self.room) :], after

    def _bound(self, before: list[int], after: list[int]) -> float:
        options = dict(num_samples=self.num_samples, seed=self.seed, precision=self.precision)
        return continuation_nelbo(self.model, self.tokenizer, before, after, **options)[0]

    def _rolling(self, ids: list[int]) -> float:
        total = 0.0
        for start in range(0, len(ids), self.room):
            end = min(start + self.room, len(ids))
            total -= self._bound(ids[max(0, end - self.room) : start], ids[start:end])
        return total

    def _are_greedy(self, pairs: list[tuple[list[int], list[int]]]) -> list[bool]:
        answers = []
        for start in tqdm(range(0, len(pairs), self.batch_size), "greedy decoding"):
            batch = pairs[start : start + self.batch_size]
            parts = [[torch.tensor(before, dtype=torch.long), len(after)] for before, after in batch]
            expected = [[begin_id(self.tokenizer), *before, *after] for before, after in batch]
            options = dict(order=self.order, temperature=0, precision=self.precision)
            samples = generate(self.model, self.tokenizer, parts=parts, expected=expected, **options)
            rows = zip(samples.tokens.tolist(), expected, strict=True)
            answers += [row[: len(wanted)] == wanted for row, wanted in rows]
        return answers

    def _check_sampling(self, options: dict) -> None:
        """Raise ValueError for options of which no text can be generated."""
        length = options["max_gen_toks"]
        if not 1 <= length < self.room:
            raise ValueError(
                f"cannot generate max_gen_toks={length} tokens: at least 1 and at most {self.room - 1} fit beside a "
                "context; in a terminal, --gen_kwargs max_gen_toks=N sets it for all tasks"
            )
        wrong = [[-1] * (1 + length)]  # `generate` checks all options, and stops at its first token
        self._generate([[length]], options, expected=wrong)

    def _generate(self, parts: list[list], options: dict, **more) -> torch.Tensor:
        """The tokens `[N, L]` of sequences whose gaps are filled as the options of a request say."""
        filters = {name: options[name] for name in ("top_p", "top_k") if options.get(name)}
        return generate(
            self.model, self.tokenizer, parts=parts, order=self.order, steps=self.steps, block_length=self.block_length,
            temperature=options.get("temperature") or 0.0, precision=self.precision, **filters, **more,
        ).tokens  # fmt: skip

    def _continue(self, contexts: list[str], options: dict, seed: int) -> list[str]:
        length = options["max_gen_toks"]
        before = [ids[max(0, len(ids) + length - self.room) :] for ids in encode(self.tokenizer, contexts)]
        parts = [[torch.tensor(ids, dtype=torch.long), length] for ids in before]
        tokens = self._generate(parts, options, stop_at_end=True, seed=seed).tolist()
        rows = [row[1 + len(ids) : 1 + len(ids) + length] for row, ids in zip(tokens, before, strict=True)]
        return [self._text(row, ids, options.get("until") or []) for row, ids in zip(rows, before, strict=True)]

    def _text(self, tokens: list[int], before: list[int], until: list[str]) -> str:
        end = begin_id(self.tokenizer)
        text = decode(self.tokenizer, tokens[: tokens.index(end)] if end in tokens else tokens, before)
        for stop in until:
            text = text.split(stop)[0] if stop else text
        return text


@cache
def register() -> type:
    """The harness's model class, which its command line and `simple_evaluate` then know as `dalm_diffusion`.

    Raises:
        ImportError: lm-eval is not installed.
    """
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs

    @register_model("dalm_diffusion")
    class DiffusionLM(LM):
        """A diffusion model as one of the harness's models.

        The harness passes a batch size of 1 unless it is given another; both 1 and "auto" mean the default of
        `Responder`, whose answers do not depend on it.

        Args:
            path: a model that `load_diffusion` reads.
            greedy: whether to decode the choices of multiple-choice tasks, too.
            options: fields of `Responder`.
        """

        def __init__(self, path=None, device="auto", batch_size=1, max_batch_size=None, greedy=False, **options):
            super().__init__()
            _check_options(path, options)
            if not torch.cuda.is_available():
                device = "auto"  # the command line asks for CUDA unless told otherwise
            model, tokenizer = load_diffusion(path, device=device)
            self._device = model.device
            if str(batch_size) not in ("1", "None") and not str(batch_size).startswith("auto"):
                options["batch_size"] = int(batch_size)
            self.greedy = greedy
            self.responder = Responder(model, tokenizer, **options)

        def loglikelihood(self, requests):
            greedy = None if self.greedy else _has_no_alternative(requests)
            return self.responder.loglikelihood([request.args for request in requests], greedy)

        def loglikelihood_rolling(self, requests):
            return self.responder.loglikelihood_rolling([request.args for request in requests])

        def generate_until(self, requests):
            asked = []
            for context, options in (request.args for request in requests):
                given = {name: value for name, value in options.items() if value is not None}
                asked.append((context, normalize_gen_kwargs(given)))
            return self.responder.generate_until(asked)

    return DiffusionLM


def _check_options(path: str | None, options: dict) -> None:
    """Raise ValueError for options of the harness's model that it does not have."""
    if path is None:
        raise ValueError("the model's arguments lack path=FOLDER, the folder of a diffusion model")
    known = [field.name for field in fields(Responder)][2:]
    if unknown := [name for name in options if name not in known]:
        raise ValueError(
            f"the model has no option {', '.join(unknown)}; there are path, device, greedy, {', '.join(known)}"
        )


def _has_no_alternative(requests: list) -> list[bool]:
    """For each of the harness's requests, whether it is the only continuation asked of its document.

    The harness does not say which task a request is of; several continuations of one document are choices.
    """
    places = [(request.task_name, request.doc_id) for request in requests]
    continuations = defaultdict(set)
    for place, request in zip(places, requests, strict=True):
        continuations[place].add(request.idx)
    return [None in place or len(continuations[place]) == 1 for place in places]


def main() -> None:
    """The harness's command line. An error that its user can mend is one line."""
    try:
        register()
    except ImportError as error:
        sys.exit(f"error: {error}; install the harness with: pip install -r requirements-eval.txt")
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"error: {error or type(error).__name__}")


if __name__ == "__main__":
    main()
