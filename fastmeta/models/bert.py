"""BERT for texts, from transformers: new, or pretrained with a tokenizer of its own."""

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastmeta.models.libraries import UnknownModel, first_line
from fastmeta.models.weights import load_weights, read_weights

_SIZES = {"bert-tiny": (64, 2, 2), "bert-small": (256, 4, 4), "bert-base": (768, 12, 12)}  # width, layers, heads
TEXT_NETS = tuple(_SIZES)
ENCODER = "encoder.json"
"""Where a run keeps the settings of its encoder."""
_HUB = "transformers:"
_ATTENTION = "eager"  # which has the derivatives that methods of the whole model ask for


class Bert(nn.Module):
    """An encoder of tokens, the mean of what it says of each, then a linear layer ``fc``.

    The mean, where others take the first token, which has nothing to say before pretraining.

    Args:
        body: an encoder of transformers.
        num_classes: C.
    """

    def __init__(self, body: Any, num_classes: int) -> None:
        super().__init__()
        self.body = body
        self.dropout = nn.Dropout(0.1)
        self.fc = nn.Linear(body.config.hidden_size, num_classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens ``[N, L]`` int64, 0 where there is none, to logits ``[N, C]``."""
        mask = (tokens != 0).long()
        hidden = self.body(input_ids=tokens, attention_mask=mask).last_hidden_state
        mean = torch.einsum("nl,nld->nd", mask.to(hidden.dtype), hidden) / mask.sum(dim=1, keepdim=True).clamp_min(1)
        return self.fc(self.dropout(mean))


def build_text_model(name: str, num_classes: int, *, vocabulary: int, length: int) -> Bert:
    """A classifier of tokens.

    Args:
        name: a BERT (Devlin et al., 2019) without pretrained weights, ``bert-tiny``: 64 wide, two layers;
            ``bert-small``: 256, four; ``bert-base``: 768, twelve, as published. Or a pretrained encoder: a folder as
            transformers saves it, or ``transformers:NAME``. Or the folder of a run, with what it left.
        num_classes: C.
        vocabulary: how many tokens there are; 0 is padding.
        length: most tokens of a text.

    Raises:
        UnknownModel: a ValueError: transformers is not installed, or there is no such net.
        ValueError: the net has fewer tokens or shorter texts, or cannot be read.
    """
    folder = Path(name)
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise UnknownModel(f"model {name} needs the package transformers: pip install transformers") from error
    if name not in _SIZES and (folder / "model.pt").is_file():
        model = Bert(_made(transformers, folder, vocabulary, length), num_classes)
        load_weights(model, read_weights(str(folder / "model.pt")), f"model {name}")
        return model
    if name not in _SIZES:
        if not folder.is_dir() and not name.startswith(_HUB):
            choice = f"auto, {', '.join(_SIZES)}, {_HUB}NAME or a folder"
            raise UnknownModel(f"model must be one of {choice} for texts, got {name!r}")
        return Bert(_pretrained(transformers, name, vocabulary, length), num_classes)
    width, layers, heads = _SIZES[name]
    settings = transformers.BertConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        max_position_embeddings=length,
        attn_implementation=_ATTENTION,
    )
    return Bert(transformers.BertModel(settings, add_pooling_layer=False), num_classes)


def write_encoder(model: nn.Module, folder: Path) -> None:
    """What :func:`build_text_model` needs beside ``model.pt`` to make the net of a run again."""
    assert isinstance(model, Bert)
    model.body.config.to_json_file(folder / ENCODER, use_diff=False)


def _made(transformers: Any, run: Path, vocabulary: int, length: int) -> Any:
    """The encoder of a run, without its weights."""
    try:
        settings = transformers.AutoConfig.from_pretrained(run / ENCODER)
        body = transformers.AutoModel.from_config(settings, attn_implementation=_ATTENTION)
    except Exception as error:  # whatever they raise
        raise ValueError(f"model {run} must hold a run's {ENCODER} beside model.pt: {first_line(error)}") from error
    return _checked(body, str(run), vocabulary, length)


def _pretrained(transformers: Any, name: str, vocabulary: int, length: int) -> Any:
    try:
        body = transformers.AutoModel.from_pretrained(name.removeprefix(_HUB), attn_implementation=_ATTENTION)
    except Exception as error:  # whatever they raise: files that are missing or damaged, a name the hub has not
        raise ValueError(f"model {name} cannot be made: {first_line(error)}") from error
    return _checked(body, name, vocabulary, length)


def _checked(body: Any, name: str, vocabulary: int, length: int) -> Any:
    has = body.config
    if has.vocab_size < vocabulary:
        raise ValueError(f"model {name} has {has.vocab_size} tokens, and its tokenizer {vocabulary}")
    longest = getattr(has, "max_position_embeddings", length)
    if longest < length:
        raise ValueError(f"image_size must be at most {longest} tokens with model {name}, got {length}")
    body.pooler = None  # of the first token: a layer without a gradient here
    return body.float()
