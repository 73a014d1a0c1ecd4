"""Texts to rows of tokens: a vocabulary of the texts themselves, or that of a pretrained net."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastmeta.data.images import DataError
from fastmeta.data.readers.optional import optional

PAD, UNKNOWN, START, END = "[PAD]", "[UNK]", "[CLS]", "[SEP]"
_SPECIAL = (PAD, UNKNOWN, START, END)
_AT_ONCE = 1000  # texts: what the tokenizer says of one is far larger than the text
FILE = "tokenizer.json"
"""Where a run keeps its own."""
HUB = "transformers:"


class Tokenizer:
    """Texts to rows ``[CLS] ... [SEP] [PAD] ...`` of tokens.

    Args:
        pieces: a ``tokenizers.Tokenizer``; ``[PAD]``, ``[UNK]``, ``[CLS]`` and ``[SEP]`` must be among its tokens, the
            first of them as token 0.
        name: what an error calls it.

    Attributes:
        size: V, how many tokens there are.
        special: ``[V]`` bool, tokens that stand for no piece of a text.

    Raises:
        ValueError: one of these tokens is not there, or padding is not token 0.
    """

    def __init__(self, pieces: Any, name: str = "tokenizer") -> None:
        missing = [token for token in _SPECIAL if pieces.token_to_id(token) is None]
        if missing:
            raise ValueError(f"{name} must have the tokens {', '.join(_SPECIAL)}, as BERT's, got none {missing[0]}")
        if pieces.token_to_id(PAD) != 0:
            raise ValueError(f"{name} must have {PAD} as token 0, got it as token {pieces.token_to_id(PAD)}")
        pieces.no_padding()
        pieces.no_truncation()
        pieces.encode_special_tokens = True  # "[SEP]" in a text is text
        self._pieces = pieces
        self.size: int = 1 + max(pieces.get_vocab().values())
        self.special = torch.zeros(self.size, dtype=torch.bool)
        added = [place for place, token in pieces.get_added_tokens_decoder().items() if token.special]
        self.special[[*map(pieces.token_to_id, _SPECIAL), *added]] = True

    @staticmethod
    def of(texts: Sequence[str], vocabulary: int) -> "Tokenizer":
        """Lower-case words: the most frequent ones of the texts, and the longest pieces of others.

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
        counter = tokenizers.Tokenizer(models.WordLevel(unk_token=UNKNOWN))
        counter.normalizer, counter.pre_tokenizer = normalizer, splitter
        trainer = tokenizers.trainers.WordLevelTrainer(
            vocab_size=vocabulary, special_tokens=list(_SPECIAL), show_progress=False
        )
        counter.train_from_iterator(texts, trainer)
        words = counter.get_vocab()
        ordered = sorted(words, key=lambda word: words[word])
        characters = sorted({character for word in ordered[len(_SPECIAL) :] for character in word})
        tokens = dict.fromkeys([*ordered, *characters, *(f"##{character}" for character in characters)])
        made = tokenizers.Tokenizer(
            models.WordPiece({token: number for number, token in enumerate(tokens)}, unk_token=UNKNOWN)
        )
        made.normalizer, made.pre_tokenizer = normalizer, splitter
        return Tokenizer(made)

    @staticmethod
    def read(name: str) -> "Tokenizer":
        """That of a run (its folder) or a pretrained net: a folder as transformers saves it, or ``transformers:NAME``.

        Raises:
            MissingPackage: tokenizers or transformers is not installed.
            DataError: there is none, or it cannot be read.
            ValueError: it is not one like BERT's.
        """
        own = Path(name) / FILE
        try:
            if own.is_file():
                return Tokenizer(optional("tokenizers", "tokenizers", "texts").Tokenizer.from_file(str(own)), str(own))
            transformers = optional("transformers", "transformers", "tokenizers of pretrained nets")
            whole = transformers.AutoTokenizer.from_pretrained(name.removeprefix(HUB), use_fast=True)
        except DataError:
            raise
        except Exception as error:  # whatever they raise: files that are missing or damaged, a name the hub has not
            cause = str(error).partition("\n")[0]
            raise DataError(f"model {name} has no tokenizer that can be read: {cause}") from error
        pieces = getattr(whole, "backend_tokenizer", None)
        if pieces is None:
            raise DataError(f"model {name} has no tokenizer of the package tokenizers, got {type(whole).__name__}")
        return Tokenizer(pieces, f"the tokenizer of model {name}")

    def write(self, path: Path) -> None:
        """A file for :meth:`read`."""
        path.write_text(self._pieces.to_str(), encoding="utf-8")

    def __call__(self, texts: Sequence[str], length: int) -> Tensor:
        """The last ``length - 2`` tokens of each text between ``[CLS]`` and ``[SEP]``: ``[M, length]`` int64.

        Raises:
            ValueError: the length is less than 3.
        """
        if length < 3:
            raise ValueError(f"image_size must be at least 3 tokens, of which two are special, got {length}")
        start, end = map(self._pieces.token_to_id, (START, END))
        rows = torch.zeros(len(texts), length, dtype=torch.int64)
        for first in range(0, len(texts), _AT_ONCE):
            encoded = self._pieces.encode_batch(list(texts[first : first + _AT_ONCE]), add_special_tokens=False)
            for row, one in zip(rows[first:], encoded, strict=False):
                tokens = [start, *one.ids[-(length - 2) :], end]
                row[: len(tokens)] = torch.tensor(tokens)
        return rows
