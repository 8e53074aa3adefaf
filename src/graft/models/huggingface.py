"""Hugging Face's text encoders as backbones (an extra: `pip install 'graft[text]'`)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from graft.models.backbone import Backbone
from graft.models.hub import hub
from graft.models.tokenizer import tokenizer_from
from graft.models.weights import WeightsFile, load_file_into
from graft.transforms.text import PrepareTokens, TextPreprocessing, read_tokenizer

if TYPE_CHECKING:
    from transformers import PretrainedConfig

State = tuple[Tensor, Tensor]
"""Between blocks: tokens (N, T, D), and a mask (N, T) that is true where there is text."""
Blocks = dict[str, nn.Module]
Pooling = Literal["mean", "cls"]
LAYERS = ("encoder.layer", "transformer.layer", "layers")
"""Where models that begin with `embeddings` have their layers: BERT, DistilBERT, ModernBERT."""
SPARED = ("position_embeddings", "token_type_embeddings", "relative_attention_bias")


class Embeddings(nn.Module):
    """(ids, mask, types) of `PrepareTokens` -> the state before the first layer."""

    def __init__(self, module: nn.Module, types: bool) -> None:
        super().__init__()
        self.module, self.types = module, types

    @property
    def pieces(self) -> Tensor:
        """(V, D), the embedding of each piece."""
        return self.module.get_submodule("word_embeddings").weight  # type: ignore[return-value]

    def forward(self, inputs: tuple[Tensor, Tensor, Tensor]) -> State:
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

    def forward(self, inputs: tuple[Tensor, Tensor, Tensor]) -> State:
        ids, mask, types = inputs
        more = {"token_type_ids": types} if self.types else {}
        return self.model(input_ids=ids, attention_mask=mask.long(), **more).last_hidden_state, mask


class Pool(nn.Module):
    """A state -> (N, D): the mean of the tokens that are text, or the first one."""

    def __init__(self, pooling: Pooling) -> None:
        super().__init__()
        if pooling not in ("mean", "cls"):
            raise ValueError(f"backbone.pooling={pooling}: must be mean or cls")
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


def huggingface_backbone(
    *,
    model: str | None,
    weights: str | None = "DEFAULT",
    pooling: Pooling = "mean",
    dropout: float | None = None,
    taps: Sequence[str] | str | None = None,
    pretrained: bool = True,
    recorded: Mapping[str, Any] | None = None,
) -> Backbone:
    """An encoder of transformers without its head: embeddings, each layer, pooling.

    Args:
        model: a folder as `save_pretrained` writes it, or a name on the hub; None: the encoder of
            the run that `weights` names.
        weights: "DEFAULT" (those of `model`), a file, a run folder of ours, or None for random
            ones.
        pooling: "mean" of a text's tokens, or "cls", the first one.
        dropout: in place of the encoder's own, everywhere.
        taps: see `Backbone`.
        pretrained: False neither downloads nor reads weights: for a checkpoint that is loaded next.
        recorded: the preprocessing of that checkpoint, from which the encoder is built.

    Raises:
        ValueError: transformers is not installed, weights of another architecture, a tokenizer
            that does not fit.
        OSError: the model cannot be downloaded.
    """
    transformers = _transformers()
    file = None
    if recorded is None and weights not in (None, "DEFAULT"):
        file = WeightsFile.read(str(weights), TextPreprocessing)
    own = TextPreprocessing(**recorded) if recorded else file.preprocessing if file else None
    if own is None and model is None:
        raise ValueError(
            "backbone.model: name an encoder's folder, or a model on the hub; or set "
            "backbone.weights to a run of graft train experiment=pretrain_bert"
        )
    source = Path(str(model)).expanduser()
    name = str(source) if source.is_dir() else str(model)
    loads = pretrained and weights == "DEFAULT" and recorded is None
    with hub(f"transformers' {name}", load=own is None and not source.is_dir()):
        if own is None:
            config = transformers.AutoConfig.from_pretrained(name)
            tokenizer = transformers.AutoTokenizer.from_pretrained(name)
            own = _preprocessing(tokenizer, config, name)
        else:
            config = _config(own.architecture)
        if dropout is not None:
            _set_dropout(config, dropout)
        if loads:
            built, about = transformers.AutoModel.from_pretrained(
                name, config=config, dtype=torch.float32, output_loading_info=True
            )
            _check_loaded(about, name)
        else:
            built = transformers.AutoModel.from_config(config).float()
    label = f"transformers {config.model_type}"
    return _assembled(
        built, own, label, file, str(weights or ""), pooling=pooling, taps=taps, model=model
    )


def bert_backbone(
    *,
    layers: int = 4,
    width: int = 256,
    heads: int = 4,
    pieces: int = 8000,
    length: int = 128,
    dropout: float = 0.1,
    tokenizer: str | None = None,
    weights: str | None = None,
    pooling: Pooling = "mean",
    taps: Sequence[str] | str | None = None,
    pretrained: bool = True,
    recorded: Mapping[str, Any] | None = None,
) -> Backbone:
    """A BERT of any size (Devlin et al. 2019), from random weights or those of a run of ours.

    Args:
        pieces: kinds of tokens that there is an embedding for; those of a tokenizer that is trained
            here.
        length: tokens of a text at most.
        tokenizer: a tokenizer.json, a folder with one (any run on texts has it), or text files (a
            .txt, a .csv, a folder of them), of which a WordPiece tokenizer is trained; None: that
            of the run in `weights`.
        weights, pooling, taps, pretrained, recorded: see `huggingface_backbone`.

    Raises:
        ValueError: as there.
    """
    transformers = _transformers()
    file = None
    if pretrained and weights is not None:
        file = WeightsFile.read(weights, TextPreprocessing)
    config = transformers.BertConfig(
        vocab_size=pieces,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        max_position_embeddings=length,
    )
    _set_dropout(config, dropout)
    if recorded is not None:
        own = TextPreprocessing(**recorded)
    elif file is not None and file.preprocessing is not None:
        own = file.preprocessing.at(min(length, file.preprocessing.length))
        if tokenizer is not None and _vocabulary(tokenizer_from(tokenizer, pieces)) != _vocabulary(
            own.tokenizer
        ):
            raise ValueError(
                f"backbone.tokenizer={tokenizer}: {file.path} was trained with another vocabulary: "
                "leave it null for its own"
            )
    elif tokenizer is None:
        raise ValueError(
            "backbone.tokenizer: name a tokenizer.json, a run on texts, or text files to train one "
            "on"
        )
    else:
        wrapped = transformers.PreTrainedTokenizerFast(
            tokenizer_object=read_tokenizer(tokenizer_from(tokenizer, pieces)),
            **{f"{kind}_token": f"[{kind.upper()}]" for kind in ("pad", "cls", "sep", "mask")},
        )
        own = _preprocessing(wrapped, config, str(tokenizer))
    built = transformers.BertModel(config, add_pooling_layer=False)
    return _assembled(
        built, own, "BERT", file, str(weights or ""), pooling=pooling, taps=taps, model=None
    )


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ValueError("this backbone needs transformers: pip install 'graft[text]'") from error
    transformers.logging.set_verbosity_error()  # ours says what is loaded, and what does not fit
    transformers.logging.disable_progress_bar()
    return transformers


def _config(architecture: str) -> PretrainedConfig:
    values = json.loads(architecture)
    config: PretrainedConfig = _transformers().AutoConfig.for_model(
        values.pop("model_type"), **values
    )
    return config


def _set_dropout(config: PretrainedConfig, dropout: float) -> None:
    """By the names that BERT, DistilBERT and ModernBERT have for it."""
    for key in vars(config):
        named = key == "dropout" or key.endswith(("dropout_prob", "_dropout"))
        if named and isinstance(getattr(config, key), float | int):
            setattr(config, key, dropout)


def _preprocessing(tokenizer: Any, config: PretrainedConfig, name: str) -> TextPreprocessing:
    """Raises a ValueError if the tokenizer does not fit the model."""
    numbers = {
        kind: getattr(tokenizer, f"{kind}_token_id") for kind in ("pad", "cls", "sep", "mask")
    }
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or None in (numbers["pad"], numbers["cls"], numbers["sep"]):
        raise ValueError(
            f"{name}: its tokenizer has no special tokens for padding and the ends of a text: an "
            "encoder such as BERT is needed"
        )
    largest = max(backend.get_vocab().values())
    if largest >= config.vocab_size:
        raise ValueError(
            f"{name}: the tokenizer is of another vocabulary: it has tokens up to number "
            f"{largest:,}, and the model embeddings for {config.vocab_size:,}"
        )
    length = int(getattr(config, "max_position_embeddings", 512))
    values: dict[str, Any] = config.to_diff_dict()
    return TextPreprocessing(
        tokenizer=backend.to_str(),
        length=min(length, int(tokenizer.model_max_length)),
        **{kind: -1 if number is None else int(number) for kind, number in numbers.items()},
        architecture=json.dumps({**values, "model_type": config.model_type}, sort_keys=True),
        origin=f"as in {name}",
    )


def _vocabulary(tokenizer: str) -> dict[str, int]:
    return read_tokenizer(tokenizer).get_vocab()


def _check_loaded(about: Mapping[str, Any], name: str) -> None:
    """Raises a ValueError where weights are missing; the pooler of old checkpoints is not used."""
    missing = [key for key in about["missing_keys"] if "pooler" not in key]
    differ = [str(key[0] if isinstance(key, tuple) else key) for key in about["mismatched_keys"]]
    if wrong := sorted([*missing, *differ]):
        more = ", ..." if len(wrong) > 3 else ""
        raise ValueError(
            f"weights: {name} does not fit its own config.json: {len(wrong)} missing or of another "
            f"shape ({', '.join(wrong[:3])}{more})"
        )


def _assembled(
    built: Any,
    own: TextPreprocessing,
    label: str,
    file: WeightsFile | None,
    weights: str,
    *,
    pooling: Pooling,
    taps: Sequence[str] | str | None,
    model: str | None,
) -> Backbone:
    """The backbone of a model of transformers, with the weights of a file if there is one."""
    types = getattr(built.config, "type_vocab_size", 0) > 1
    rows = torch.tensor([[own.cls, own.sep, own.sep], [own.cls, own.sep, own.pad]])
    example = PrepareTokens(own.pad, own.sep)(rows)
    pool = Pool(pooling)
    blocks = _take_apart(built, types, example)
    described = "random weights" if not weights else f"weights {model or weights}"
    backbone = Backbone(
        {**blocks, "pool": pool},
        own,
        taps=taps,
        pool=pool,
        channels_last=False,
        example=example,
        description=f"{label}, {described}",
        weights=(f"{label} {model}" if weights == "DEFAULT" else weights),
        no_weight_decay=[p for n, p in built.named_parameters() if any(s in n for s in SPARED)],
    )
    if file is not None:
        layouts = [(built, ("pooler.",)), (backbone, backbone.unused_keys)]
        backbone.taken = load_file_into(file, layouts, label=label)
    return backbone


@torch.no_grad()
def _take_apart(built: Any, types: bool, example: tuple[Tensor, Tensor, Tensor]) -> Blocks:
    """Blocks whose composition equals the model, checked on two texts; or one block, `body`."""
    built.eval()
    whole = Whole(built, types)
    expected, mask = whole(example)
    ways: tuple[Callable[[], Any], ...] = tuple(
        lambda path=path: built.get_submodule(path) for path in LAYERS
    )
    for way in ways:
        try:
            layers = {f"layer{i}": Layer(layer) for i, layer in enumerate(way(), 1)}
            blocks: Blocks = {"embeddings": Embeddings(built.embeddings, types), **layers}
            state: Any = example
            for block in blocks.values():
                state = block(state)
            found = state[0]
        except Exception:  # not this kind of model: transformers has hundreds, each fails its way
            continue
        if torch.allclose(found[mask], expected[mask], atol=1e-4, rtol=1e-4):
            return blocks
    return {"body": whole}
