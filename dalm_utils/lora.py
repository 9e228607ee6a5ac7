"""Low-rank adapters (LoRA, arXiv 2106.09685): train a small fraction of the weights, and end with a stock model."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .backbone import transformer_blocks
from .head import mask_id_of
from .objective import seeded

NAME = "default"  # peft's own name for the only adapter
ALPHA = 2  # times the rank: the usual scale of the update, alpha / rank


class Adapter:
    """Adapters on every linear layer of a model's transformer blocks, in place, and a trainable embedding of [MASK].

    Nothing else is trained from then on. The model stays a stock class and computes as before until it is trained;
    `merge` adds what was learned to its weights and puts the stock layers back.

    peft could train rows of an embedding, too, but copies the whole embedding in each forward pass, and its gradient.
    Here a hook puts the row in where [MASK] was read; nothing needs it in the head, which never predicts [MASK].

    Args:
        rank: of each layer's low-rank update.
        seed: for the initialization of A; B starts at zero.

    Raises:
        RuntimeError: peft is not installed.
        ValueError: an embedding that does more than look up a row.
    """

    def __init__(self, model: PreTrainedModel, rank: int, seed: int = 0):
        lora_config, lora_model = _peft()
        embedding, mask_id = model.get_input_embeddings(), mask_id_of(model)
        if mask_id is not None and type(embedding) is not nn.Embedding:
            raise ValueError(f"lora_rank does not know the embedding {type(embedding).__name__}; use lora_rank=0")
        self.model, self.mask_id = model, mask_id
        self._requires_grad = {name: weight.requires_grad for name, weight in model.named_parameters()}
        layers = dict(_linear_layers(model))
        config = lora_config(
            r=rank, lora_alpha=ALPHA * rank, target_modules=list(layers),
            fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in layers.values()),
        )  # fmt: skip
        with torch.random.fork_rng():
            torch.manual_seed(seeded(seed, 0, "lora").initial_seed())
            self._tuner = lora_model(model, config, NAME)
        for weight in self.trained().values():
            weight.data = weight.data.float()  # whatever the model is in: BF16 is too coarse for small updates
        if mask_id is not None:
            embedding.mask_row = nn.Parameter(embedding.weight[mask_id].detach().float())
            self._hook = embedding.register_forward_hook(self._put_mask_row)

    def _put_mask_row(self, embedding: nn.Embedding, given: tuple, output: Tensor) -> Tensor:
        return torch.where((given[0] == self.mask_id)[..., None], embedding.mask_row.to(output.dtype), output)

    def trained(self) -> dict[str, nn.Parameter]:
        """What is trained, by name."""
        return {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}

    @torch.no_grad()
    def load(self, file: Path) -> None:
        """Load a .safetensors file with the weights of `trained`, in place."""
        stored, own = load_file(file), self.trained()
        if stored.keys() != own.keys():
            raise ValueError(f"{file} holds the adapter of another model; take the base that the run began with")
        for name, weight in own.items():
            weight.copy_(stored[name])

    @torch.no_grad()
    def merged(self) -> dict[str, Tensor]:
        """The state dict of the stock model with what was learned, in host memory; training on does not change it.

        Weights that are tied to others are left out.
        """
        layers = {f"{name}.weight": m for name, m in self.model.named_modules() if hasattr(m, "get_delta_weight")}
        weights = {}
        for name, weight in self.model.state_dict().items():
            name, weight = name.replace(".base_layer.", "."), weight.to("cpu")
            if "lora_" in name or name.endswith("mask_row") or name in self.model.all_tied_weights_keys:
                continue
            weights[name] = weight + layers[name].get_delta_weight(NAME).to(weight) if name in layers else weight
        if self.mask_id is not None:
            embedding = self.model.get_input_embeddings()
            name = next(f"{name}.weight" for name, module in self.model.named_modules() if module is embedding)
            weights[name] = weights[name].clone()
            weights[name][self.mask_id] = embedding.mask_row.to("cpu")
        return weights

    @torch.no_grad()
    def merge(self) -> None:
        """Add what was learned to the model's weights, and put its stock layers back; once."""
        if self.mask_id is not None:
            embedding = self.model.get_input_embeddings()
            self._hook.remove()
            embedding.weight[self.mask_id] = embedding.mask_row
            del embedding.mask_row
        self._tuner.merge_and_unload()
        for name, weight in self.model.named_parameters():
            weight.requires_grad_(self._requires_grad[name])


def _peft() -> tuple[type, type]:
    try:
        from peft import LoraConfig, LoraModel  # takes a second to import, and only this needs it
    except ModuleNotFoundError:
        raise RuntimeError("lora_rank needs peft: pip install 'dalm_utils[lora]', or set lora_rank=0") from None
    return LoraConfig, LoraModel


def _linear_layers(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    """The linear layers of the transformer blocks, with their names in the model."""
    blocks = transformer_blocks(model)
    prefix = next(name for name, module in model.named_modules() if module is blocks)
    layers = ((f"{prefix}.{name}", layer) for name, layer in blocks.named_modules())
    return [(name, layer) for name, layer in layers if isinstance(layer, nn.Linear | Conv1D)]
