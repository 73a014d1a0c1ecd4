"""Texts as rows of tokens, and their strong view."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastmeta.data.images import ImageDataset, fingerprint_of
from fastmeta.data.random_numbers import KeyedRandom
from fastmeta.data.readers.optional import optional

PAD, UNKNOWN, START, END = range(4)
_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


class Texts(ImageDataset):
    """Texts with classes, tokenized, in memory: :meth:`get` gives tokens ``[n, L]`` int64 in place of images.

    Args:
        name: what reports call them.
        tokens: ``[M, L]`` int64, of :func:`tokenize`.
        vocabulary: V, how many tokens there are.
        targets: ``[M]`` int64 classes; -1 where there is no label.
        classes: their names.
        parts: official parts by name, places ``[.]`` int64.
        names: of the texts.
    """

    def __init__(
        self,
        name: str,
        tokens: Tensor,
        vocabulary: int,
        targets: Tensor,
        classes: tuple[str, ...],
        parts: Mapping[str, Tensor],
        names: Sequence[str],
    ) -> None:
        blank = torch.zeros(len(tokens), 1, 1, 1, dtype=torch.uint8)  # pixels, which a text has not
        super().__init__(name, blank, targets, classes, parts, names)
        self.images, self.vocabulary = tokens, vocabulary
        self.image_shape = tuple(tokens.shape[1:])
        self.fingerprint = fingerprint_of(name, classes, tokens, targets)


def trained_tokenizer(texts: Sequence[str], vocabulary: int) -> Any:
    """A tokenizer of lower-case words: the most frequent ones of the texts, and the longest pieces of others.

    The same texts give the same one, as a run that is continued needs it. The trainer of word pieces breaks ties
    differently each time.

    Args:
        texts: to be counted.
        vocabulary: how many words, at most; single characters come on top.

    Raises:
        MissingPackage: tokenizers is not installed.
    """
    tokenizers = optional("tokenizers", "tokenizers", "texts")
    models = tokenizers.models
    normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    splitter = tokenizers.pre_tokenizers.BertPreTokenizer()
    counter = tokenizers.Tokenizer(models.WordLevel(unk_token=_SPECIAL[UNKNOWN]))
    counter.normalizer, counter.pre_tokenizer = normalizer, splitter
    trainer = tokenizers.trainers.WordLevelTrainer(
        vocab_size=vocabulary, special_tokens=_SPECIAL, min_frequency=2, show_progress=False
    )
    counter.train_from_iterator(texts, trainer)
    words = counter.get_vocab()
    ordered = sorted(words, key=lambda word: words[word])
    characters = sorted({character for word in ordered[len(_SPECIAL) :] for character in word})
    tokens = dict.fromkeys([*ordered, *characters, *(f"##{character}" for character in characters)])
    pieces = {token: number for number, token in enumerate(tokens)}
    made = tokenizers.Tokenizer(models.WordPiece(pieces, unk_token=_SPECIAL[UNKNOWN]))
    made.normalizer, made.pre_tokenizer = normalizer, splitter
    return made


def tokenize(tokenizer: Any, texts: Sequence[str], length: int) -> Tensor:
    """``[CLS]``, the last ``length - 2`` tokens of each text, ``[SEP]``, then ``[PAD]``: ``[M, length]`` int64."""
    rows = torch.full((len(texts), length), PAD, dtype=torch.int64)
    for row, encoded in zip(rows, tokenizer.encode_batch(list(texts)), strict=True):
        tokens = [START, *encoded.ids[-(length - 2) :], END]
        row[: len(tokens)] = torch.tensor(tokens)
    return rows


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
    all texts times its ``idf``. Special tokens stay.

    Args:
        idf: ``log(M / d_w)``, d_w the number of the M texts that have the token w; ``[V]``.
        cumulative: of the probabilities of what is drawn ``[V]``.
        share: of the tokens that are replaced, about.
    """

    idf: Tensor
    cumulative: Tensor
    share: float = 0.3

    @staticmethod
    def of(texts: Tensor, vocabulary: int, share: float = 0.3) -> "ReplacedWords":
        """Counted in tokens ``[M, L]``."""
        counts = texts.flatten().bincount(minlength=vocabulary)
        pairs = (torch.arange(len(texts)).unsqueeze(1) * vocabulary + texts).unique()  # a text and a token in it
        idf = (len(texts) / (pairs % vocabulary).bincount(minlength=vocabulary).clamp_min(1)).log()
        score = counts * idf
        chances = (score.max() - score).double()
        chances[: len(_SPECIAL)] = 0
        return ReplacedWords(idf, (chances / chances.sum()).cumsum(dim=0), share)

    def __call__(self, images: Tensor, random: KeyedRandom) -> Tensor:
        """Of tokens ``[n, L]``: as many."""
        texts, device = images, images.device
        words = texts >= len(_SPECIAL)
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
