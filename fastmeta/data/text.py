"""Texts as rows of tokens, and their strong view."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastmeta.data.images import ImageDataset, fingerprint_of
from fastmeta.data.random_numbers import KeyedRandom
from fastmeta.data.tokenizer import Tokenizer

_LENGTH, _VOCABULARY = 128, 8000


class Texts(ImageDataset):
    """Texts with classes, tokenized, in memory: :meth:`get` gives tokens ``[n, L]`` int64 in place of images.

    Args:
        name: what reports call them.
        texts: M of them.
        targets: ``[M]`` int64 classes; -1 where there is no label.
        classes: their names.
        parts: official parts by name, places ``[.]`` int64.
        names: of the texts.
        tokenizer: folder of a run or a pretrained net, or ``transformers:NAME``. None: one of the texts of the parts
            train and unlabeled.
        length: L, tokens of a text; the last ones are kept. None: 128, as published for IMDb.

    Raises:
        MissingPackage: tokenizers is not installed.
        DataError: the tokenizer cannot be read.
        ValueError: it is not one like BERT's; or the length is less than 3.
    """

    def __init__(
        self,
        name: str,
        texts: Sequence[str],
        targets: Tensor,
        classes: tuple[str, ...],
        parts: Mapping[str, Tensor],
        names: Sequence[str],
        *,
        tokenizer: str | None = None,
        length: int | None = None,
    ) -> None:
        texts = [text.replace("<br />", " ") for text in texts]  # which reviews of IMDb are full of
        read = [parts[part] for part in ("train", "unlabeled") if part in parts]
        self.read_in_training = torch.cat(read) if read else torch.arange(0)
        """Places of the texts that training may read."""
        if tokenizer is None:
            self.tokenizer = Tokenizer.of([texts[place] for place in self.read_in_training.tolist()], _VOCABULARY)
        else:
            self.tokenizer = Tokenizer.read(tokenizer)
        tokens = self.tokenizer(texts, _LENGTH if length is None else length)
        blank = torch.zeros(len(tokens), 1, 1, 1, dtype=torch.uint8)  # pixels, which a text has not
        super().__init__(name, blank, targets, classes, parts, names)
        self.images = tokens
        self.image_shape = tuple(tokens.shape[1:])
        self.fingerprint = fingerprint_of(name, classes, tokens, targets)


@dataclass(frozen=True)
class AsTokens:
    """The text as it is."""

    def __call__(self, images: Tensor, random: KeyedRandom | None = None) -> Tensor:
        """Tokens ``[n, L]``, int64."""
        return images.long()


@dataclass(frozen=True)
class ReplacedWords:
    """Tokens that say little are replaced by others that say little (Xie et al., 2020, UDA, appendix B).

    Token i of a text is replaced with probability ``min(share (C - t_i) / Z, 1)``: ``t_i`` is its count in the text
    over the text's length, times its ``idf``, C the largest of them there and Z the mean of ``C - t_j``. What replaces
    it is drawn from the vocabulary, with probability proportional to ``max_w S(w) - S(w)``, ``S(w)`` the count of w in
    all texts times its ``idf``; a token that no text has is none of them. Special tokens stay.

    Args:
        idf: ``log(M / d_w)``, d_w the number of the M texts that have the token w; ``[V]``.
        cumulative: of the probabilities of what is drawn ``[V]``.
        special: tokens that stay ``[V]`` bool.
        share: of the tokens that are replaced, about.
    """

    idf: Tensor
    cumulative: Tensor
    special: Tensor
    share: float = 0.3

    @staticmethod
    def of(texts: Tensor, special: Tensor, share: float = 0.3) -> "ReplacedWords":
        """Counted in tokens ``[M, L]``."""
        vocabulary = len(special)
        counts = texts.flatten().bincount(minlength=vocabulary)
        pairs = (torch.arange(len(texts)).unsqueeze(1) * vocabulary + texts).unique()  # a text and a token in it
        idf = (len(texts) / (pairs % vocabulary).bincount(minlength=vocabulary).clamp_min(1)).log()
        drawn = ~special & (counts > 0)
        score = torch.where(drawn, counts * idf, 0.0)
        chances = torch.where(drawn, score.max() - score, 0.0).double()
        if not chances.any():  # all tokens say the same
            chances = drawn.double()
        return ReplacedWords(idf, (chances / chances.sum()).cumsum(dim=0), special, share)

    def __call__(self, images: Tensor, random: KeyedRandom) -> Tensor:
        """Of tokens ``[n, L]``: as many."""
        texts, device = images, images.device
        words = ~self.special.to(device)[texts]
        same = (texts.unsqueeze(1) == texts.unsqueeze(2)).sum(dim=2)  # how often the text has it
        length = words.sum(dim=1, keepdim=True).clamp_min(1)
        value = same / length * self.idf.to(device)[texts]
        least = torch.where(words, value, 0.0).amax(dim=1, keepdim=True) - value
        mean = torch.where(words, least, 0.0).sum(dim=1, keepdim=True) / length
        drawn = random.uniform(2 * texts.shape[1]).to(device)
        gone, which = drawn.split(texts.shape[1], dim=1)
        # Where all of a text's words say the same, each has the same chance.
        chance = torch.where(mean > 0, self.share * least / mean, self.share)
        other = torch.searchsorted(self.cumulative.to(device), which.double().contiguous(), right=True)
        return torch.where(words & (gone < chance), other.clamp_max(len(self.idf) - 1), texts)
