import importlib.util
import json
import math
import re
import sys
from types import SimpleNamespace

import pytest
import torch

from dalm_utils import continuation_nelbo, generate, harness, save_diffusion
from dalm_utils.backbone import hidden_states
from dalm_utils.harness import Responder, main, register
from dalm_utils.head import logits_of
from dalm_utils.tokens import encode
from tests.helpers import TEXTS, tiny_diffusion

PROMPTS = ["Return the sum", "axis : int, optional. Return the mean", "Parameters"]


def token_of(tokenizer, word):
    (token,) = encode(tokenizer, [word])[0]
    return token


def insists_on(word, lead=50.0):
    """A diffusion model that writes one token, given as its text, and all others with equal chances."""
    model, tokenizer = tiny_diffusion(tied=False)
    token = tokenizer.eos_token_id if word is None else token_of(tokenizer, word)
    with torch.no_grad():
        for weight in (model.transformer.ln_f.weight, model.transformer.ln_f.bias, model.lm_head.weight):
            weight.zero_()
        model.transformer.ln_f.bias[0] = 1.0
        model.lm_head.weight[token, 0] = lead
    return model, tokenizer


def respond(model, tokenizer, **options):
    return Responder(model, tokenizer, precision="fp32", **options)


# --------------------------------------------------------------------------------------- without the harness
@torch.no_grad()
def test_the_likelihood_of_a_last_word_is_the_models_own():
    model, tokenizer = tiny_diffusion()
    before, word = encode(tokenizer, ["Return the sum"])[0], token_of(tokenizer, " of")
    tokens = torch.tensor([[tokenizer.bos_token_id, *before, model.config.mask_token_id]])
    own = logits_of(model, hidden_states(model, tokens))[0, -2].log_softmax(-1)[word].item()
    (score, _), moved = respond(model, tokenizer).loglikelihood([("Return the sum", " of"), ("Return the sum ", "of")])
    assert score == pytest.approx(own, rel=1e-5)
    assert moved[0] == score  # a space at the end of the context belongs to the word


def test_longer_continuations_get_the_bound_and_no_draw_is_free():
    model, tokenizer = tiny_diffusion()
    choices = [" of an array along the given axis.", " of", " an array"]
    scores = respond(model, tokenizer, num_samples=4).loglikelihood([("Return the sum", choice) for choice in choices])
    for (score, _), choice in zip(scores, choices, strict=True):
        bound, _ = continuation_nelbo(model, tokenizer, "Return the sum", choice, num_samples=4, precision="fp32")
        assert score == pytest.approx(-bound, rel=1e-5)
    for seed in range(20):
        once = respond(model, tokenizer, num_samples=1, seed=seed)
        assert once.loglikelihood([("Return the sum", " of"), ("", "a")])[0][0] < -1


@pytest.mark.parametrize("batch_size", [1, 3])
def test_greedy_is_what_decoding_writes(batch_size):
    responder = respond(*insists_on(" of"), batch_size=batch_size)
    asked = [(PROMPTS[0], " of of of"), (PROMPTS[1], " of"), (PROMPTS[2], " of an of"), ("", " of of")]
    assert [greedy for _, greedy in responder.loglikelihood(asked)] == [True, True, False, True]


def test_a_long_context_loses_its_beginning_and_a_long_continuation_is_refused():
    model, tokenizer = tiny_diffusion()
    responder = respond(model, tokenizer, max_length=12)
    whole = " ".join(TEXTS[:3])
    ids = encode(tokenizer, [whole])[0]
    after = encode(tokenizer, [" of an array"])[0]
    kept = ids[len(ids) + len(after) - 11 :]
    bound, _ = continuation_nelbo(model, tokenizer, kept, after, precision="fp32")
    assert responder.loglikelihood([(whole, " of an array")])[0][0] == pytest.approx(-bound, rel=1e-5)
    with pytest.raises(ValueError, match="tokens; 11 fit the model"):
        responder.loglikelihood([("Return", " " + whole)])


def test_a_whole_text_is_scored_once_in_windows():
    model, tokenizer = insists_on(" of", lead=0.0)  # every token but [MASK] has the same chance
    texts = ["", "Return", " ".join(TEXTS[:8])]
    lengths = [len(ids) for ids in encode(tokenizer, texts)]
    assert lengths[-1] > 2 * model.config.max_position_embeddings
    scores = respond(model, tokenizer, num_samples=2).loglikelihood_rolling([(text,) for text in texts])
    assert scores == pytest.approx([-length * math.log(len(tokenizer) - 1) for length in lengths], rel=1e-5)


@torch.no_grad()
def test_the_last_window_sees_what_stands_before_it():
    model, tokenizer = tiny_diffusion()
    responder = respond(model, tokenizer, max_length=12)
    text = " ".join(TEXTS[:1])
    ids = encode(tokenizer, [text])[0]
    ids = ids[: len(ids) // 11 * 11 + 1]  # a single token is left for the last window
    text = tokenizer.decode(ids)
    assert encode(tokenizer, [text])[0] == ids
    windows = [(ids[i : i + 11], []) for i in range(0, len(ids) - 1, 11)] + [(ids[-1:], ids[-11:-1])]
    bounds = [continuation_nelbo(model, tokenizer, before, after, precision="fp32")[0] for after, before in windows]
    assert responder.loglikelihood_rolling([(text,)]) == pytest.approx([-sum(bounds)], rel=1e-5)


def test_writing_stops_at_stop_strings_and_at_the_end_token():
    responder = respond(*insists_on(" of"))
    asked = [("Return", {"max_gen_toks": 4}), ("Return", {"max_gen_toks": 4, "until": ["", "zzz", "f o"]})]
    assert responder.generate_until(asked) == [" of of of of", " o"]
    assert respond(*insists_on(None)).generate_until(asked) == ["", ""]
    with pytest.raises(ValueError, match="max_gen_toks=63 tokens: at least 1 and at most 62 fit"):
        responder.generate_until([("Return", {"max_gen_toks": 63})])


def test_what_a_task_asks_of_a_text_reaches_the_sampler(monkeypatch):
    asked = []
    responder = respond(*tiny_diffusion(), order="confidence", steps=3, block_length=2, seed=5)
    monkeypatch.setattr(responder, "_check_sampling", lambda options: None)
    monkeypatch.setattr(harness, "generate", lambda *_, **options: asked.append(options) or generate(*_, **options))
    how = dict(temperature=0.7, top_p=0.9, top_k=5)
    responder.generate_until([("Return", {"max_gen_toks": 4}), ("Return", {"max_gen_toks": 4, **how})])
    same = dict(order="confidence", steps=3, block_length=2, stop_at_end=True, precision="fp32")
    for options in asked:
        options.pop("parts")
    assert asked == [same | dict(temperature=0.0, seed=5), same | how | dict(seed=6)]


@pytest.fixture
def no_work(monkeypatch):
    """Fails a test that scores or decodes something."""
    monkeypatch.setattr(harness, "continuation_nelbo", lambda *_, **__: pytest.fail("a likelihood was computed"))
    monkeypatch.setattr(Responder, "_continue", lambda *_: pytest.fail("a text was generated"))


GOOD = {"max_gen_toks": 4}


@pytest.mark.parametrize(
    "kind, wrong, message",
    [
        ("loglikelihood", ("Return the ", ""), "continuation of 'Return the ' is empty; correct the task's"),
        ("loglikelihood", ("Return", " of" * 64), "has 64 tokens; 63 fit the model"),
        ("generate_until", ("Return", {"max_gen_toks": 63}), "at most 62 fit beside a context; in a terminal, --gen"),
        ("generate_until", ("Return", {"max_gen_toks": 0}), "cannot generate max_gen_toks=0 tokens"),
        ("generate_until", ("Return", GOOD | {"temperature": -1.0}), "temperature"),
        ("generate_until", ("Return", GOOD | {"top_p": 1.5}), "top_p must be above 0 and at most 1, got 1.5"),
        ("generate_until", ("Return", {"max_gen_toks": 9}), "3 steps are too few for 5 blocks"),
    ],
)
def test_a_request_that_cannot_be_answered_is_found_before_the_work(no_work, kind, wrong, message):
    responder = respond(*tiny_diffusion(), steps=3, block_length=2)
    right = ("Return", " of") if kind == "loglikelihood" else ("Return", GOOD)
    with pytest.raises(ValueError, match=message):
        getattr(responder, kind)([right, right, wrong])


def test_an_option_of_none_is_one_that_is_not_given():
    responder = respond(*tiny_diffusion())
    nothing = dict.fromkeys(("temperature", "top_p", "top_k", "until"))
    assert responder.generate_until([("Return", GOOD | nothing)]) == responder.generate_until([("Return", GOOD)])


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(num_samples=0), "num_samples must be a whole number of at least 1, got 0"),
        (dict(batch_size="two"), "batch_size must be a whole number of at least 1, got 'two'"),
        (dict(max_length=1), "at least 1 and at most -1 fit"),
        (dict(order="nonsense"), "order must be one of .*; got 'nonsense'"),
        (dict(precision="fp99"), "fp99"),
    ],
)
def test_an_option_that_cannot_work_is_found_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        Responder(*tiny_diffusion(), **options)


def test_only_what_is_asked_for_is_decoded(monkeypatch):
    responder = respond(*insists_on(" of"))
    decoded, decode = [], responder._are_greedy
    monkeypatch.setattr(responder, "_are_greedy", lambda pairs: decoded.extend(pairs) or decode(pairs))
    asked = [("Return", " of"), ("Return", " an"), ("Return", " of of"), ("Return", " of")]
    answers = responder.loglikelihood(asked, [True, True, True, False])
    assert [greedy for _, greedy in answers] == [True, False, True, False] and len(decoded) == 3
    assert [score for score, _ in answers] == [score for score, _ in responder.loglikelihood(asked)]


def test_a_continuation_is_decoded_unless_it_is_one_of_several_choices():
    def request(task, document, number):
        return SimpleNamespace(task_name=task, doc_id=document, idx=number)

    choices, twice = [request("a", 0, 0), request("a", 0, 1)], [request("a", 1, 0)] * 2
    requests = [*choices, *twice, request("b", 0, 0), request(None, None, 0), request(None, None, 1)]
    assert harness._has_no_alternative(requests) == [False, False, True, True, True, True, True]


@pytest.mark.parametrize(
    "path, options, message",
    [
        (None, {}, "arguments lack path=FOLDER"),
        (
            "tiny-diffugpt",
            {"num_sample": 2},
            "no option num_sample; there are path, device, greedy, num_samples, order",
        ),
    ],
)
def test_options_that_the_model_does_not_have_are_named(path, options, message):
    with pytest.raises(ValueError, match=message):
        harness._check_options(path, options)


def test_answers_to_a_batch_are_the_answers_alone_in_the_same_order():
    model, tokenizer = tiny_diffusion()
    greedy, short = {"max_gen_toks": 9, "until": []}, {"max_gen_toks": 3, "until": ["."]}
    asked = [(PROMPTS[0], greedy), (PROMPTS[1], greedy), (PROMPTS[2], short), (" ".join(TEXTS[:4]), short)]
    asked += [(PROMPTS[2], greedy)]
    together = respond(model, tokenizer, batch_size=2).generate_until(asked)
    assert together == [respond(model, tokenizer).generate_until([request])[0] for request in asked]
    assert len(set(together)) == len(asked)


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm-eval is installed")
def test_without_the_harness_the_command_says_what_to_install():
    with pytest.raises(SystemExit, match=r"No module named 'lm_eval'.*requirements-eval\.txt"):
        main()


# ------------------------------------------------------------------------------------------ in the harness
LEAD = 8.0  # of the logit of " of" over all others
LAMBADA = """
task: local_last_word
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
output_type: loglikelihood
test_split: test
doc_to_text: "{{text.split(' ')[:-1]|join(' ')}}"
doc_to_target: "{{' '+text.split(' ')[-1]}}"
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
HELLASWAG = """
task: local_endings
dataset_path: json
dataset_kwargs: {data_files: {validation: DATA}}
output_type: multiple_choice
validation_split: validation
doc_to_text: "{{query}}"
doc_to_target: "{{gold}}"
doc_to_choice: choices
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""
WRITING = """
task: local_writing
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
output_type: generate_until
test_split: test
doc_to_text: "{{text}}"
doc_to_target: "{{wanted}}"
generation_kwargs: {until: ["f o"], max_gen_toks: 5}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""
ROLLING = """
task: local_text
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: bits_per_byte}
"""


@pytest.fixture
def tasks(tmp_path):
    """A folder with four task files, their lines, and a saved model that insists on " of"."""
    pytest.importorskip("lm_eval", reason="the harness is an extra: pip install -r requirements-eval.txt")
    lines = {
        LAMBADA: [{"text": "Return the sum of"}, {"text": "Return the sum axis"}],
        HELLASWAG: [
            {"query": "Return the sum", "choices": ["an axis", "of"], "gold": 1},
            {"query": "Return the mean", "choices": ["of of", "axis", "a mean of arrays"], "gold": 0},
            {"query": "Return", "choices": ["of of", "axis"], "gold": 1},
        ],
        WRITING: [{"text": "Return the sum", "wanted": " o"}, {"text": "Return", "wanted": "f"}],
        ROLLING: [{"text": TEXTS[0]}],
    }
    for number, (task, rows) in enumerate(lines.items()):
        data = tmp_path / f"{number}.jsonl"
        data.write_text("\n".join(map(json.dumps, rows)))
        (tmp_path / f"{number}.yaml").write_text(task.replace("DATA", str(data)))
    save_diffusion(*insists_on(" of", lead=LEAD), tmp_path / "model")
    return tmp_path


def test_the_harness_computes_what_the_model_implies(tasks):
    import lm_eval
    from lm_eval.tasks import TaskManager

    names = ["local_last_word", "local_endings", "local_writing", "local_text"]
    results = lm_eval.simple_evaluate(
        model=register()(path=str(tasks / "model"), device="cpu", precision="fp32"),
        tasks=names, task_manager=TaskManager(include_path=str(tasks), include_defaults=False), bootstrap_iters=0,
    )["results"]  # fmt: skip
    tokenizer = tiny_diffusion()[1]
    total = math.log(math.exp(LEAD) + len(tokenizer) - 2)  # over " of" and all others but [MASK]

    def log_p(text):
        ids = encode(tokenizer, [text])[0]
        return ids.count(token_of(tokenizer, " of")) * LEAD - len(ids) * total

    last_word, endings, writing, text = (results[name] for name in names)
    assert last_word["acc,none"] == 0.5  # the word that greedy decoding writes
    assert last_word["perplexity,none"] == pytest.approx(math.exp(-(log_p(" of") + log_p(" axis")) / 2), rel=1e-4)
    assert endings["acc,none"] == pytest.approx(2 / 3) == endings["acc_norm,none"]
    assert writing["exact_match,none"] == 0.5
    bits = -log_p(TEXTS[0]) / math.log(2)
    assert text["bits_per_byte,none"] == pytest.approx(bits / len(TEXTS[0].encode()), rel=1e-4)


def test_a_request_with_options_of_none_is_answered(tasks):
    model = register()(path=str(tasks / "model"), device="cpu")
    options = {"max_gen_toks": 3, "temperature": None, "until": None, "do_sample": None}
    assert model.generate_until([SimpleNamespace(args=("Return", options))]) == [" of of of"]


@pytest.mark.parametrize("greedy, decoded, exact_match", [(False, 0, 0.0), (True, 7, 2 / 3)])
def test_choices_are_decoded_if_asked(tasks, monkeypatch, greedy, decoded, exact_match):
    import lm_eval
    from lm_eval.tasks import TaskManager

    counted, decode = [], Responder._are_greedy
    monkeypatch.setattr(Responder, "_are_greedy", lambda self, pairs: counted.extend(pairs) or decode(self, pairs))
    results = lm_eval.simple_evaluate(
        model=register()(path=str(tasks / "model"), device="cpu", greedy=greedy), tasks=["local_endings"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False), bootstrap_iters=0,
    )["results"]  # fmt: skip
    assert len(counted) == decoded and results["local_endings"]["exact_match,none"] == pytest.approx(exact_match)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("path=nowhere", "no model 'nowhere'"),
        ("path=tiny-gpt2", "holds an autoregressive model"),
        ("path=tiny-diffugpt,num_sample=2", "no option num_sample"),
        ("path=tiny-diffugpt,num_samples=0", "num_samples must be a whole number"),
        ("num_samples=2", "lack path=FOLDER"),
    ],
)
def test_wrong_arguments_of_its_command_line_are_one_line(tasks, monkeypatch, arguments, message):
    command = ["harness", "--model", "dalm_diffusion", "--model_args", arguments, "--tasks", "local_endings"]
    monkeypatch.setattr(sys, "argv", [*command, "--include_path", str(tasks)])
    with pytest.raises(SystemExit, match=message) as ended:
        main()
    assert ended.value.code.startswith("error: ") and "\n" not in ended.value.code


def test_its_command_line_knows_the_model(tasks, monkeypatch, capsys):
    arguments = ["--model", "dalm_diffusion", "--model_args", f"path={tasks / 'model'},num_samples=2", "--tasks"]
    arguments += ["local_last_word,local_endings", "--include_path", str(tasks), "--batch_size", "2"]
    monkeypatch.setattr(sys, "argv", ["harness", *arguments])
    main()
    shown = capsys.readouterr().out
    assert re.search(r"local_last_word.*\|acc +\|.*0\.5", shown) and re.search(r"acc_norm.*0\.6667", shown)
