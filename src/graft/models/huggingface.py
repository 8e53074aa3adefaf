"""Hugging Face's text encoders as backbones (an extra: `pip install 'graft[text]'`)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from graft.config.words import did_you_mean
from graft.models.backbone import Backbone
from graft.models.hub import hub
from graft.models.text_blocks import Pool, Pooling, take_apart
from graft.models.tokenizer import tokenizer_from
from graft.models.weights import WeightsFile, load_file_into
from graft.transforms.text import PrepareTokens, TextPreprocessing, read_tokenizer

if TYPE_CHECKING:
    from transformers import PretrainedConfig

NO_CODE = {"trust_remote_code": False}  # transformers would ask whether to run what a folder brings
SPECIAL = ("pad", "cls", "sep", "mask")
SPARED = ("position_embeddings", "token_type_embeddings", "relative_attention_bias")


def huggingface_backbone(
    *,
    model: str | None = None,
    architecture: Mapping[str, Any] | None = None,
    tokenizer: str | None = None,
    weights: str | None = "DEFAULT",
    pooling: Pooling = "mean",
    dropout: float | None = None,
    taps: Sequence[str] | str | None = None,
    pretrained: bool = True,
    recorded: Mapping[str, Any] | None = None,
) -> Backbone:
    """An encoder of transformers without its head: embeddings, each layer, pooling.

    Args:
        model: a folder as `save_pretrained` writes it, or a name on the hub; None: `architecture`,
            or the encoder of the run that `weights` names.
        architecture: transformers' own config of a new encoder, `model_type` first of all.
        tokenizer: of a new encoder: a tokenizer.json, a folder with one (any run on texts has it),
            or text files (.txt, .csv, a folder of them) that a WordPiece tokenizer of as many
            pieces as the encoder has embeddings is trained on; None: that of the run in `weights`.
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
    try:
        import transformers
    except ImportError as error:
        raise ValueError("this backbone needs transformers: pip install 'graft[text]'") from error
    transformers.logging.set_verbosity_error()  # what does not fit is said below
    transformers.logging.disable_progress_bar()
    if pooling not in ("mean", "cls"):
        raise ValueError(f"backbone.pooling={pooling}: must be mean or cls")
    if recorded is None and model is not None and architecture is not None:
        raise ValueError("backbone.model brings its own architecture: use backbone=huggingface")
    if recorded is None and tokenizer is not None and architecture is None:
        raise ValueError("backbone.tokenizer is for a new encoder (backbone=bert): leave it out")
    if recorded is None and architecture is not None and weights == "DEFAULT":
        raise ValueError("backbone.weights=DEFAULT: a new encoder has none: null, a file or a run")
    file = None
    if recorded is None and weights not in (None, "DEFAULT"):
        file = WeightsFile.read(str(weights), TextPreprocessing)
    own: TextPreprocessing | None = file.preprocessing if file else None
    source = Path(str(model)).expanduser()
    name = str(source) if source.is_dir() else str(model)
    named = model is not None and recorded is None
    if named and name[0] in "./~" and not source.is_dir():
        raise FileNotFoundError(f"backbone.model={model}: no such folder")
    loads = named and pretrained and weights == "DEFAULT"
    about: Any = {}
    with hub(f"transformers' {name}", load=named and not source.is_dir()):
        if recorded is not None:
            own = TextPreprocessing(**recorded)
            config = _config(json.loads(own.architecture))
        elif model is not None:
            config = transformers.AutoConfig.from_pretrained(name, **NO_CODE)
            own = own or _preprocessing(
                transformers.AutoTokenizer.from_pretrained(name, **NO_CODE), config, name
            )
        elif architecture is not None:
            config = _config(architecture)
            own = _chosen(tokenizer, own, config)
        elif own is not None:
            config = _config(json.loads(own.architecture))
        else:
            raise ValueError(
                "backbone.model: name an encoder's folder or a model on the hub, or set "
                "backbone.weights to a run on texts"
            )
        _set_dropout(config, dropout)
        if loads:
            built, about = transformers.AutoModel.from_pretrained(
                name, config=config, dtype=torch.float32, output_loading_info=True, **NO_CODE
            )
        else:
            try:
                built = transformers.AutoModel.from_config(config).float()
            except ValueError as error:
                raise ValueError(f"backbone.architecture: {error}") from error
    _check_loaded(about, name)
    return _assembled(built, own, file, name if loads else weights, pooling, taps)


def _assembled(
    built: Any,
    own: TextPreprocessing,
    file: WeightsFile | None,
    weights: str | None,
    pooling: Pooling,
    taps: Sequence[str] | str | None,
) -> Backbone:
    """The backbone of a model of transformers, with the weights of a file if there is one."""
    rows = torch.tensor([[own.cls, own.sep, own.sep], [own.cls, own.sep, own.pad]])
    example = PrepareTokens(own.pad, own.sep)(rows)
    pool = Pool(pooling)
    label = f"transformers {built.config.model_type}"
    weights = None if weights == "DEFAULT" else weights
    backbone = Backbone(
        {**take_apart(built, example), "pool": pool},
        own,
        taps=taps,
        pool=pool,
        channels_last=False,
        example=example,
        description=f"{label}, {f'weights {weights}' if weights else 'random weights'}",
        weights=weights or "",
        no_weight_decay=[p for n, p in built.named_parameters() if any(s in n for s in SPARED)],
    )
    if file is not None:
        layouts = [(built, ("pooler.",)), (backbone, backbone.unused_keys)]
        backbone.taken = load_file_into(file, layouts, label=label)
    return backbone


def _config(values: Mapping[str, Any]) -> PretrainedConfig:
    """Raises a ValueError for a key that the architecture does not have: transformers would not."""
    from transformers import AutoConfig

    options = {key: value for key, value in values.items() if key != "model_type"}
    try:
        known = AutoConfig.for_model(values.get("model_type", ""))
        config: PretrainedConfig = AutoConfig.for_model(values.get("model_type", ""), **options)
    except Exception as error:  # its checks of values raise several kinds
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"backbone.architecture: {reason}") from error
    for key in options:  # not those that begin with an underscore, some of which load code
        if key.startswith("_") or key not in known.to_dict():
            hint = did_you_mean(key, list(known.to_dict()))
            raise ValueError(f"backbone.architecture.{key}: {known.model_type} has no such{hint}")
    return config


def _chosen(tokenizer: str | None, own: TextPreprocessing | None, config: Any) -> TextPreprocessing:
    """For a new encoder: with a tokenizer of its own choice, or that of its weights."""
    if tokenizer is None:
        if own is None:
            raise ValueError(
                "backbone.tokenizer: name a tokenizer.json, a run on texts, or text files to train "
                "one on"
            )
        return own.at(min(own.length, _longest(config)))
    from transformers import PreTrainedTokenizerFast

    made = PreTrainedTokenizerFast(
        tokenizer_object=read_tokenizer(tokenizer_from(tokenizer, config.vocab_size)),
        **{f"{kind}_token": f"[{kind.upper()}]" for kind in SPECIAL},
    )
    config.pad_token_id = made.pad_token_id
    if own and read_tokenizer(own.tokenizer).get_vocab() != made.get_vocab():
        raise ValueError(
            f"backbone.tokenizer={tokenizer}: the weights were trained with another vocabulary: "
            "leave it null for theirs"
        )
    return _preprocessing(made, config, tokenizer)


def _set_dropout(config: Any, dropout: float | None) -> None:
    """By the names that BERT, DistilBERT and ModernBERT have for it."""
    for key in list(vars(config)) if dropout is not None else ():
        named = key == "dropout" or key.endswith(("dropout_prob", "_dropout"))
        if named and isinstance(getattr(config, key), float | int):
            setattr(config, key, dropout)


def _longest(config: Any) -> int:
    """Tokens of a text at most: some count positions from the number after padding's."""
    later = any(name in config.model_type for name in ("roberta", "camembert", "mpnet"))
    return int(config.max_position_embeddings) - ((config.pad_token_id or 0) + 1 if later else 0)


def _preprocessing(tokenizer: Any, config: Any, name: str) -> TextPreprocessing:
    """Raises a ValueError if the tokenizer does not fit the model."""
    numbers = {kind: getattr(tokenizer, f"{kind}_token_id") for kind in SPECIAL}
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
            f"{largest:,}, and the encoder {config.vocab_size:,} embeddings"
        )
    values = {**config.to_diff_dict(), "model_type": config.model_type}
    known = type(config)().to_dict()
    values = {k: v for k, v in values.items() if k in known and not k.startswith("_")}
    return TextPreprocessing(
        tokenizer=backend.to_str(),
        length=min(_longest(config), int(tokenizer.model_max_length)),
        **{kind: -1 if number is None else int(number) for kind, number in numbers.items()},
        architecture=json.dumps(values, sort_keys=True, default=str),
        origin=f"as in {name}",
    )


def _check_loaded(about: Mapping[str, Any], name: str) -> None:
    """Raises a ValueError where weights are missing; a pooler is not used."""
    missing = [str(key) for key in about.get("missing_keys", ()) if "pooler" not in key]
    differ = [str(key) for key in about.get("mismatched_keys", ())]
    if wrong := sorted([*missing, *differ]):
        more = ", ..." if len(wrong) > 3 else ""
        raise ValueError(
            f"weights: {name} does not fit its own config.json: {len(wrong)} missing or of another "
            f"shape ({', '.join(wrong[:3])}{more})"
        )
