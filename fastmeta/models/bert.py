"""BERT for texts, from transformers."""

import importlib

import torch
from torch import Tensor, nn

from fastmeta.models.libraries import UnknownModel

_SIZES = {"bert-tiny": (64, 2, 2), "bert-small": (256, 4, 4), "bert-base": (768, 12, 12)}  # width, layers, heads
TEXT_NETS = tuple(_SIZES)


class Bert(nn.Module):
    """BERT (Devlin et al., 2019) without pretrained weights; the mean over a text's tokens, then a linear layer.

    The mean, where pretrained nets take the first token, which has nothing to say before pretraining.

    Args:
        name: ``bert-tiny``: 64 wide, two layers; ``bert-small``: 256, four; ``bert-base``: 768, twelve, as published.
        num_classes: C.
        vocabulary: how many tokens there are; 0 is padding.
        length: most tokens of a text.

    Raises:
        UnknownModel: a ValueError: transformers is not installed, or there is no such net.
    """

    def __init__(self, name: str, num_classes: int, *, vocabulary: int, length: int) -> None:
        super().__init__()
        if name not in _SIZES:
            raise UnknownModel(f"model must be one of auto, {', '.join(_SIZES)} for texts, got {name!r}")
        try:
            transformers = importlib.import_module("transformers")
        except ImportError as error:
            raise UnknownModel(f"model {name} needs the package transformers: pip install transformers") from error
        width, layers, heads = _SIZES[name]
        settings = transformers.BertConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=4 * width,
            max_position_embeddings=length,
            attn_implementation="eager",  # which has the derivatives that methods of the whole model ask for
        )
        self.body = transformers.BertModel(settings, add_pooling_layer=False)
        self.dropout = nn.Dropout(0.1)
        self.fc = nn.Linear(width, num_classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens ``[N, L]`` int64 to logits ``[N, C]``."""
        mask = (tokens != 0).long()
        hidden = self.body(input_ids=tokens, attention_mask=mask).last_hidden_state
        mean = torch.einsum("nl,nld->nd", mask.to(hidden.dtype), hidden) / mask.sum(dim=1, keepdim=True).clamp_min(1)
        return self.fc(self.dropout(mean))
