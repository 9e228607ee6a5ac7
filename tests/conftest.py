"""Fixtures that several test files share. The process that hands out tests to others imports this without torch."""

import signal

import pytest


def pytest_configure(config):
    """Some tests send SIGINT. A process that a shell started in the background ignores it, and so do its children."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def hears_hangups():
    """Under nohup this process ignores SIGHUP, and so would the processes that a test starts."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture
def fp16(monkeypatch):
    """Real float16 products and a loss scaler on the CPU, where accelerate gives none; each call starts anew."""
    import torch
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    from dalm_utils import machine, run, sampling, training

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
def own_cache(tmp_path_factory):
    """Texts are prepared in a folder of this session: tests that run side by side share no file with each other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DALM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
