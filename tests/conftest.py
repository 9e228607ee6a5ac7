"""Fixtures that several test files share."""

import json
import shutil

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from dalm_utils import corpus, machine, run, sampling, training


@pytest.fixture
def fp16(monkeypatch):
    """Real float16 products and a loss scaler on the CPU, where accelerate gives none; each call starts anew."""

    def accelerator(config):
        AcceleratorState._reset_state()
        one = Accelerator(mixed_precision="fp16", cpu=True)
        one.native_amp, one.scaler = True, torch.amp.GradScaler("cpu", init_scale=2.0**28)
        return one

    monkeypatch.setattr(training, "make_accelerator", accelerator)
    for module in (machine, run, sampling):  # float16 although it is slow here
        monkeypatch.setattr(module, "pick_precision", lambda precision, device: "fp16")
    yield
    AcceleratorState._reset_state()


@pytest.fixture(scope="session", autouse=True)
def prepared_texts_do_not_pile_up(tmp_path_factory):
    """Take out of the cache what was made there from a text in the tests' own folder."""
    yield
    own = str(tmp_path_factory.getbasetemp())
    for facts in corpus.CACHE.glob("*/facts.json"):
        if json.loads(facts.read_text())["name"].startswith(own):
            shutil.rmtree(facts.parent)
            facts.parent.with_name(f".{facts.parent.name}.lock").unlink(missing_ok=True)
