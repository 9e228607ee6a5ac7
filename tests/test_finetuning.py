"""Training on prompt/answer pairs: what is masked, what is scored, and what padding changes (nothing)."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from dalm_utils import annealed_mask, ar_nll, diffusion_loss, generate, load_diffusion, nelbo, paired_difference, train
from dalm_utils.backbone import hidden_states
from dalm_utils.head import logits_of
from dalm_utils.history import History
from dalm_utils.objective import Batch, batch_loss, corrupt, sample_times, seeded
from dalm_utils.pairs import Pairs
from dalm_utils.run import build
from dalm_utils.tasks import TASKS
from tests.helpers import (
    FAMILIES,
    assert_same_loss_and_gradients,
    comparable,
    number_word,
    stop_after,
    tiny_base,
    tiny_config,
    tiny_diffusion,
    tiny_model,
    tiny_tokenizer,
)
from tests.processes import exit_codes, kill_at, start_many
from tests.test_documents import write_lines

QUESTIONS = [
    {"prompt": f"Return the {what} of {number_word(n)}", "response": f" along axis {n % 5}" * (1 + n % 3)}
    for n in range(60)
    for what in ("sum", "mean")
]


def pairs_config(folder, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "pairs.jsonl"
    if not source.exists():
        write_lines(source, QUESTIONS)
    settings = dict(objective="finetune", text=str(source), length=40)
    return tiny_config(folder, **{**settings, **changes})


def task_of(config, model=None, tokenizer=None, processes=1):
    if model is None:
        model, tokenizer = tiny_diffusion()
    return TASKS[config.objective](model, tokenizer, config, processes=processes)


def some_pairs(length=12, seed=0, count=6):
    """Random pairs of uneven lengths, end token 0."""
    draws = np.random.default_rng(seed)
    tokens, roles = [], []
    for _ in range(count):
        prompt, answer = draws.integers(1, 4), draws.integers(1, 6)
        tokens += [*draws.integers(1, 320, prompt + answer), 0]
        roles += [0] * prompt + [1] * answer + [2]
    return Pairs(np.array(tokens), np.array(roles), length, begin=0)


# ----------------------------------------------------------------------------------------------- the batch
@pytest.mark.parametrize("objective", ["finetune", "finetune-ar"])
def test_only_answers_and_what_ends_them_are_predicted(tmp_path, objective):
    tokenizer = tiny_tokenizer()
    model = tiny_diffusion()[0] if objective == "finetune" else tiny_model(vocab=len(tokenizer))
    task = task_of(pairs_config(tmp_path, objective=objective, batch=8), model, tokenizer)
    for step in range(20):
        rows, batch = task.train[task.block_indices(step)], task.draw(step)
        prompts = rows.real & ~rows.answers
        assert torch.equal(batch.noised[prompts], batch.tokens[prompts])
        assert not prompts.flatten()[batch.places].any() and batch.real.flatten()[batch.places].all()
        assert batch.normalizer == rows.answers.sum()
        assert torch.equal(batch.tokens, rows.tokens)
        if objective == "finetune-ar":  # every answer token, and nothing after the end
            assert torch.equal(batch.places, rows.answers.flatten().nonzero()[:, 0])
            assert torch.equal(batch.real, rows.real)


def test_an_answer_goes_on_with_end_tokens_up_to_the_longest_answer(tmp_path):
    """So the number of [MASK] tokens says nothing about the length of the answer."""
    task = task_of(pairs_config(tmp_path, batch=8))
    gaps = []
    for step in range(200):
        rows, (tokens, maskable, counted, real) = task.train[task.block_indices(step)], task.sequences(step)
        extra = maskable & ~rows.answers
        assert torch.equal(counted, rows.answers) and torch.equal(real, rows.real | extra)
        assert (tokens[extra] == task.tokenizer.bos_token_id).all()
        assert torch.equal(real.cummin(1).values, real)  # nothing real comes after padding
        gaps.append(torch.stack([rows.answers.sum(1), maskable.sum(1)], 1))
    answers, gaps = torch.cat(gaps).T
    longest = task.train.longest_answer
    assert (gaps <= longest).all()
    for size in answers.unique():  # uniform between the answer's length and the longest one's
        found = gaps[answers == size]
        assert found.min() == size and found.max() == longest
        spread = ((longest - size + 1) ** 2 - 1).item() / 12
        assert found.double().mean() == pytest.approx(
            (size + longest).item() / 2, abs=5 * (spread / len(found)) ** 0.5 + 1e-9
        )


def plain_loss(model, task, step):
    """A loop over sequences and answers, without padding: obviously the definition."""
    _, maskable, counted, real = task.sequences(step)
    batch, mask, total = task.draw(step), task.attention_mask(step, torch.float32), 0.0
    times = sample_times(len(batch.tokens), generator=seeded(task.config.seed, step, "times"))
    for b, size in enumerate(real.sum(1).tolist()):
        own = None if mask is None else mask[..., :size, :size]
        log_p = logits_of(model, hidden_states(model, batch.noised[b : b + 1, :size], own))[0].log_softmax(-1)
        for i in range(1, size):
            if maskable[b, i] and batch.noised[b, i] == model.config.mask_token_id:
                total = total - log_p[i - 1, batch.tokens[b, i]] / times[b]
    return total / counted.sum()


@pytest.mark.parametrize("step", [2, 20])  # under the annealed mask, and without one
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_equal_the_plain_definition(tmp_path, family, step):
    model, tokenizer = tiny_diffusion(family, tied=False)
    task = task_of(pairs_config(tmp_path, batch=6), model, tokenizer)
    assert (task.attention_mask(step, torch.float32) is None) == (step == 20)
    assert_same_loss_and_gradients(
        model,
        lambda: batch_loss(model, task.draw(step), task.attention_mask(step, torch.float32)).loss,
        lambda: plain_loss(model, task, step),
    )


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_padded_batch_is_its_rows_one_by_one(family, ratio, attention):
    """And what stands in the padding is never seen."""
    model, _ = tiny_diffusion(family, attention=attention)
    tokens, answers, real = some_pairs()[:]
    assert len(real.sum(1).unique()) > 1
    times = sample_times(len(tokens), generator=torch.Generator().manual_seed(0))
    noised, masked = corrupt(tokens, times, 320, maskable=answers, generator=torch.Generator().manual_seed(0))
    mask = annealed_mask(tokens.shape[1], ratio, generator=torch.Generator().manual_seed(1))
    noised[~real] = 77
    batch = Batch.of(tokens, noised, masked, times, answers.sum(), real)
    whole = batch_loss(model, batch, mask)
    parts = [batch.rows(b, b + 1).trimmed() for b in range(len(tokens))]
    assert [part.tokens.shape[1] for part in parts] == real.sum(1).tolist()
    assert all(torch.equal(part.noised.flatten()[part.places], torch.full((part.count,), 320)) for part in parts)
    alone = [batch_loss(model, part, mask) for part in parts]
    torch.testing.assert_close(sum(loss.loss for loss in alone), whole.loss)
    torch.testing.assert_close(torch.cat([loss.token_nll for loss in alone]), whole.token_nll)
    torch.testing.assert_close(batch_loss(model, batch.trimmed(), mask).token_nll, whole.token_nll)


def test_a_prompt_is_read_and_never_scored(tmp_path):
    """The loss depends on what a model reads in a prompt, and not on which tokens the prompt has."""
    model, tokenizer = tiny_diffusion()
    task = task_of(pairs_config(tmp_path, batch=8), model, tokenizer)
    batch, rows = task.draw(30), task.train[task.block_indices(30)]
    prompts = rows.real & ~rows.answers
    prompts[:, 0] = False
    before = batch_loss(model, batch)
    other = dataclasses.replace(batch, tokens=batch.tokens.masked_fill(prompts, 5))
    assert torch.equal(batch_loss(model, other).token_nll, before.token_nll)
    read = dataclasses.replace(batch, noised=batch.noised.masked_fill(prompts, 5))
    assert ((batch_loss(model, read).token_nll - before.token_nll).abs() > 1e-6).all()


def test_one_process_or_two_draw_the_same_batch(tmp_path):
    alone, together = task_of(pairs_config(tmp_path, batch=4)), task_of(pairs_config(tmp_path, batch=2), processes=2)
    for name, tensor in alone.draw(3).tensors().items():
        assert torch.equal(tensor, together.draw(3).tensors()[name])


def test_places_suffice(tmp_path):
    task = task_of(pairs_config(tmp_path, batch=8))
    assert max(task.draw(step).count for step in range(300)) <= task.capacity(8)


# ------------------------------------------------------------------------------------------------- a run
def test_a_diffusion_model_stays_open_and_an_ar_base_is_adapted_on_the_way(tmp_path):
    adapted = train(*tiny_diffusion(), pairs_config(tmp_path / "a"))
    assert adapted.series("ratio")[1][0] < 1 and adapted.series("ratio")[1][-1] == 1
    model, tokenizer = load_diffusion(tmp_path / "a" / "runs" / "tiny" / "best")
    model.config.annealed = True
    opened = train(model, tokenizer, pairs_config(tmp_path / "b"))
    assert set(opened.series("ratio")[1]) == {1.0}


@pytest.mark.slow
def test_finetuning_learns_answers_and_where_they_end(tmp_path):
    lines = [
        {"prompt": f"Return the {w} of {number_word(n)}:", "response": {"sum": " one", "mean": " two axis"}[w]}
        for n in range(80)
        for w in ("sum", "mean")
    ]
    source = write_lines(tmp_path / "two.jsonl", lines)
    config = pairs_config(
        tmp_path, text=source, steps=150, batch=8, anneal_steps=40, learning_rate=1e-2, eval_every=50, save_every=150
    )
    model, tokenizer = tiny_diffusion()
    history = train(model, tokenizer, config)
    values = history.series("nelbo")[1]
    assert values[-1] < 0.5 < 3 < history.series("loss")[1][0]
    for word, answer in (("sum", " one"), ("mean", " two axis")):
        told = generate(
            model,
            tokenizer,
            prompt=f"Return the {word} of abc:",
            length=8,
            temperature=0,
            order="confidence",
            stop_at_end=True,
        )
        assert told.text[0].endswith(f":{answer}")


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["finetune", "finetune-ar"])
def test_a_stopped_run_ends_as_an_undisturbed_one(tmp_path, objective):
    def fresh():
        tokenizer = tiny_tokenizer()
        return tiny_diffusion() if objective == "finetune" else (tiny_model(vocab=len(tokenizer)), tokenizer)

    options = dict(objective=objective, steps=16, sample_every=8)
    whole_model, tokenizer = fresh()
    whole = train(whole_model, tokenizer, pairs_config(tmp_path / "whole", **options))
    config = pairs_config(tmp_path / "cut", **options)
    train(*fresh(), config, on_log=stop_after(6))
    model, tokenizer = fresh()
    history = train(model, tokenizer, config)
    assert comparable(history) == comparable(whole)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, whole_model.state_dict()[name])


@pytest.mark.slow
def test_a_killed_run_ends_as_an_undisturbed_one(tmp_path):
    options = dict(steps=16, sample_every=8)
    whole_model, tokenizer = tiny_diffusion()
    whole = train(whole_model, tokenizer, pairs_config(tmp_path / "whole", **options))
    config = pairs_config(tmp_path, **options)
    kill_at(10, tmp_path, vars(config))
    model, tokenizer = tiny_diffusion()
    assert comparable(train(model, tokenizer, config)) == comparable(whole)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, whole_model.state_dict()[name])


@pytest.mark.slow
def test_two_processes_follow_the_curve_of_one(tmp_path):
    steps = dict(steps=12, log_every=2, eval_every=6, sample_every=6)
    alone = train(*tiny_diffusion(), pairs_config(tmp_path / "alone", batch=4, **steps))
    config = pairs_config(tmp_path, batch=2, **steps)
    processes = start_many(2, tmp_path, vars(config))
    assert exit_codes(*processes) == [0, 0], (tmp_path / "messages-0").read_text()
    ours = History.load(config.folder / "history.jsonl")
    for key, tolerance in (("loss", 1e-5), ("grad_norm", 1e-4), ("nelbo", 1e-5)):
        assert ours.series(key)[1] == pytest.approx(alone.series(key)[1], rel=tolerance)
    assert ours.series("sample") == alone.series("sample")


def test_what_is_left_out_is_said_once(tmp_path, capsys):
    long = {"prompt": "Return", "response": " axis" * 100}
    source = write_lines(
        tmp_path / "long.jsonl", [*QUESTIONS, *({**long, "prompt": f"Return {number_word(n)}"} for n in range(300))]
    )
    train(*tiny_diffusion(), pairs_config(tmp_path, text=source, steps=2))
    said = capsys.readouterr().err
    assert said.count("training pairs are longer than length=40 and left out") == 1


def test_a_teacher_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no teacher, but distill=4\.0; set distill=0"):
        train(*tiny_diffusion(), pairs_config(tmp_path, distill=4.0))


def test_pairs_without_the_objective_are_told_what_to_do(tmp_path):
    with pytest.raises(ValueError, match=r"has prompt/answer pairs, not documents: .*objective='finetune'"):
        train(*tiny_diffusion(), pairs_config(tmp_path, objective="diffusion"))
    with pytest.raises(ValueError, match="'docstrings' is a text without records"):
        train(*tiny_diffusion(), pairs_config(tmp_path, text="docstrings"))


def test_the_model_must_be_of_the_objective(tmp_path):
    tokenizer = tiny_tokenizer()
    with pytest.raises(ValueError, match="no \\[MASK\\] token"):
        train(tiny_model(vocab=len(tokenizer)), tokenizer, pairs_config(tmp_path))
    with pytest.raises(ValueError, match="needs an AR model"):
        train(*tiny_diffusion(), pairs_config(tmp_path, objective="finetune-ar"))
    config = pairs_config(tmp_path, base=tiny_base(tmp_path))
    assert hasattr(build(config)[0].config, "mask_token_id")
    assert not hasattr(build(config.replace(objective="finetune-ar"))[0].config, "mask_token_id")


# --------------------------------------------------------------------------------------------------- scores
def exact_conditional_nelbo(model, pair):
    """Every set of answer tokens enumerated; nats per answer token."""
    tokens, answers, real = (column[0] for column in pair)
    tokens, places = tokens[real], answers.nonzero()[:, 0].tolist()
    by_size = {size: [] for size in range(1, len(places) + 1)}
    for size in by_size:
        for hidden in itertools.combinations(places, size):
            noised = tokens.clone()
            noised[list(hidden)] = model.config.mask_token_id
            log_p = logits_of(model, hidden_states(model, noised[None]))[0].log_softmax(-1)
            by_size[size].append(np.mean([-log_p[i - int(model.config.shift), tokens[i]].item() for i in hidden]))
    return np.mean([np.mean(scores) for scores in by_size.values()])


@pytest.mark.parametrize("shift", [True, False])
@torch.no_grad()
def test_the_conditional_nelbo_is_the_enumerated_one(shift):
    model, tokenizer = tiny_diffusion(shift=shift)
    pairs = some_pairs(count=4)
    exact = np.array([exact_conditional_nelbo(model, pairs[i : i + 1]) for i in range(4)])
    scores = [nelbo(model, tokenizer, pairs, num_samples=8, seed=seed, precision="fp32") for seed in range(60)]
    drawn = np.stack([score.per_block for score in scores])
    error = drawn.std(0, ddof=1) / len(drawn) ** 0.5
    assert (np.abs(drawn.mean(0) - exact) <= 4 * error + 1e-6).all() and (error < 0.05 * exact).all()
    sizes = pairs.answers
    assert scores[0].mean == pytest.approx((drawn[0] * sizes).sum() / sizes.sum())  # per token of all answers


@torch.no_grad()
def test_the_ar_likelihood_of_pairs_is_that_of_their_answers():
    model, tokenizer = tiny_model(vocab=320), tiny_tokenizer()
    pairs = some_pairs(count=5)
    expected, counts = [], []
    for i in range(5):
        tokens, answers, real = (column[0] for column in pairs[i : i + 1])
        log_p = logits_of(model, hidden_states(model, tokens[real][None], annealed_mask(int(real.sum()), 0.0)))
        places = answers.nonzero()[:, 0]
        expected.append(-log_p[0].log_softmax(-1)[places - 1, tokens[places]].mean().item())
        counts.append(len(places))
    score = ar_nll(model, tokenizer, pairs, precision="fp32")
    assert score.per_block == pytest.approx(expected, rel=1e-5)
    assert score.mean == pytest.approx(np.average(expected, weights=counts), rel=1e-5)
    assert score.tokens == sum(counts)


@torch.no_grad()
def test_the_error_of_a_mean_over_answers_of_uneven_length_agrees_with_a_bootstrap():
    model, tokenizer = tiny_model(vocab=320), tiny_tokenizer()
    first, second = (
        ar_nll(m, tokenizer, some_pairs(count=60, length=20), precision="fp32")
        for m in (model, tiny_model(vocab=320, seed=1))
    )
    pick = np.random.default_rng(0).integers(60, size=(4000, 60))
    for (mean, error), values in (
        ((first.mean, first.stderr), first.per_block),
        (paired_difference(first, second), first.per_block - second.per_block),
    ):
        drawn = (values * first.sizes)[pick].sum(1) / first.sizes[pick].sum(1)
        assert mean == pytest.approx(drawn.mean(), abs=0.1 * drawn.std())
        assert error == pytest.approx(drawn.std(), rel=0.1)


@torch.no_grad()
def test_a_batch_in_which_all_is_real_is_one_without_padding():
    model, _ = tiny_diffusion()
    tokens = torch.randint(1, 320, (2, 8), generator=torch.Generator().manual_seed(0))
    masked = torch.arange(8).expand(2, 8) > 0
    every = torch.ones(2, 8, dtype=torch.bool)
    losses = [diffusion_loss(model, tokens, tokens, masked, torch.ones(2), real=real).loss for real in (None, every)]
    torch.testing.assert_close(*losses)
