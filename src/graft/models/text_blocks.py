"""A text encoder of transformers as blocks: embeddings, each layer, pooling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

Inputs = tuple[Tensor, Tensor, Tensor]
"""What `PrepareTokens` gives: ids, mask and types."""
State = tuple[Tensor, Tensor]
"""Between blocks: tokens (N, T, D), and a mask (N, T) that is true where there is text."""
Pooling = Literal["mean", "cls"]
LAYERS = ("encoder.layer", "transformer.layer", "layers")
"""Where models that begin with `embeddings` have their layers: BERT, DistilBERT, ModernBERT."""


class Embeddings(nn.Module):
    """The inputs -> the state before the first layer."""

    def __init__(self, module: nn.Module, types: bool) -> None:
        super().__init__()
        self.module, self.types = module, types

    @property
    def pieces(self) -> Tensor:
        """(V, D), the embedding of each piece."""
        return self.module.get_parameter("word_embeddings.weight")

    def forward(self, inputs: Inputs) -> State:
        ids, mask, types = inputs
        more = {"token_type_ids": types} if self.types else {}
        return self.module(input_ids=ids, **more), mask


class Layer(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, state: State) -> State:
        tokens, mask = state
        found = self.module(tokens, attention_mask=mask[:, None, None, :])
        return found[0] if isinstance(found, tuple) else found, mask


class Whole(nn.Module):
    """An encoder that does not come apart: it can only be frozen as a whole."""

    def __init__(self, model: nn.Module, types: bool) -> None:
        super().__init__()
        self.model, self.types = model, types

    def forward(self, inputs: Inputs) -> State:
        ids, mask, types = inputs
        more = {"token_type_ids": types} if self.types else {}
        return self.model(input_ids=ids, attention_mask=mask.long(), **more).last_hidden_state, mask


class Pool(nn.Module):
    """A state -> (N, D): the mean of the tokens that are text, or the first one."""

    def __init__(self, pooling: Pooling) -> None:
        super().__init__()
        self.pooling = pooling

    def extra_repr(self) -> str:
        return self.pooling

    def forward(self, state: State | Tensor) -> Tensor:
        if isinstance(state, Tensor):  # the last block's own output, where `taps` names it
            return state
        tokens, mask = state
        if self.pooling == "cls":
            return tokens[:, 0]
        weights = mask[..., None].to(tokens.dtype)
        return (tokens * weights).sum(1) / weights.sum(1)


@torch.no_grad()
def take_apart(model: Any, example: Inputs) -> dict[str, nn.Module]:
    """Blocks whose composition equals the model, checked on `example`; or one block, `body`."""
    types = getattr(model.config, "type_vocab_size", 0) > 1
    whole = Whole(model.eval(), types)
    expected, mask = whole(example)
    for path in LAYERS:
        try:
            blocks = _in_order(model, model.get_submodule(path), types)
            state: Any = example
            for block in blocks.values():
                state = block(state)
        except Exception:  # not this kind of model: transformers has hundreds, each fails its way
            continue
        if torch.allclose(state[0][mask], expected[mask], atol=1e-4, rtol=1e-4):
            return blocks
    return {"body": whole}


def _in_order(model: Any, layers: Sequence[nn.Module], types: bool) -> dict[str, nn.Module]:
    numbered = {f"layer{i}": Layer(layer) for i, layer in enumerate(layers, 1)}
    return {"embeddings": Embeddings(model.embeddings, types), **numbered}
