"""The rows of the papers' tables as runs: a file for each paper, and all of them in :data:`PRESETS`.

A :class:`Preset` has a plain :class:`fastmeta.training.RunConfig` and the paper's figure; every setting may be changed
on the command line (``fastmeta train --preset NAME --data DIR --seed 1``), and ``fastmeta presets`` lists them. The
files say what is the paper's, what its code's, and what nobody published, so that it was chosen here.

A name has the paper, the arm, the data set and the number of labels; ``-alone`` is the paper's baseline, without its
method. How the machine is used is no part of a preset: ``--machine.device cuda --machine.precision bfloat16
--machine.channels-last --machine.workers 8`` and torchrun.
"""

import difflib

from fastmeta.presets import (
    example_weights,
    label_gradient_alignment,
    landmarks,
    learning_to_impute_v1,
    learning_to_impute_v2,
    meta_gradient,
)
from fastmeta.presets.preset import Preset

PRESETS: dict[str, Preset] = {
    **learning_to_impute_v1.PRESETS,
    **learning_to_impute_v2.PRESETS,
    **landmarks.PRESETS,
    **meta_gradient.PRESETS,
    **example_weights.PRESETS,
    **label_gradient_alignment.PRESETS,
}


def preset(name: str) -> Preset:
    """The preset of that name.

    Raises:
        ValueError: there is none; with the names that come nearest.

    >>> preset("l2i-v2-fm-imagenet-5pct").config.model
    'resnet-26'
    """
    if name not in PRESETS:
        nearest = difflib.get_close_matches(name, PRESETS, n=3, cutoff=0.0)
        raise ValueError(
            f"preset must be one of those that fastmeta presets lists ({', '.join(nearest)}, ...), got {name!r}"
        )
    return PRESETS[name]


__all__ = ["PRESETS", "Preset", "preset"]
