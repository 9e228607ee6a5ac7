"""Sampling against cached keys and values: where it is exact, what it computes, and who is refused."""

import pytest
import torch

from dalm_utils import block_cache, generate
from dalm_utils.backbone import hidden_states
from dalm_utils.block_cache import check_cache
from dalm_utils.orders import ORDERS
from tests.helpers import FAMILIES, tiny_diffusion

BATCH = ["Return", "Return the sum of an array along the given axis.", "a : array_like"]
REQUESTS = {
    "one text": dict(length=20, block_length=6),
    "a batch of different lengths": dict(prompt=BATCH, length=10, block_length=4),
    "a gap between texts": dict(prompt="Return the sum", suffix="of an array.", length=9, block_length=4),
    "several gaps": dict(parts=[["Return the", 3, "of an array", 4, "axis", 2], ["a", 7, "b", 2]], block_length=4),
    "texts that end": dict(length=12, block_length=4, num_samples=8, stop_at_end=True, temperature=1.5),
    "fewer steps, and filters": dict(length=20, block_length=7, steps=9, top_p=0.9, repetition_penalty=1.3),
}


def same_with_a_refresh_at_every_pass(pair, **options):
    plain, cached = (
        generate(*pair, **options, **how, num_samples=options.get("num_samples", 2), return_history=True)
        for how in (dict(), dict(cache=True, refresh=1))
    )
    return torch.equal(plain.tokens, cached.tokens) and plain == cached
