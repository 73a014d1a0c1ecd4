"""Published settings as runs: a file for each paper, and an entry in :data:`PRESETS` for each row of its tables.

A preset is a plain :class:`fastmeta.training.RunConfig`; every setting may be changed on the command line
(``fastmeta train --preset NAME --data DIR --seed 1``). The files say what is the paper's, what its code's, and what
nobody published, so that it was chosen here. None of these runs has been made: there was no ImageNet to make them on.

The images are a folder ``train/<class>/``, ``val/<class>/`` (ImageNet's validation images are what the papers report
on) or parquet shards ``train-*.parquet``, ``validation-*.parquet``. How the machine is used is no part of a preset:
``--machine.device cuda --machine.precision bfloat16 --machine.channels-last --machine.workers 8`` and torchrun.
"""

from fastmeta.presets import example_weights, learning_to_impute, meta_gradient
from fastmeta.training.config import RunConfig

PRESETS: dict[str, RunConfig] = {
    "imagenet-10pct-meta-gradient": meta_gradient.IMAGENET,
    "imagenet-10pct-meta-gradient-resnet-50": meta_gradient.IMAGENET_RESNET_50,
    "imagenet-5pct-fixmatch-l2i": learning_to_impute.IMAGENET,
    "imagenet-10pct-fixmatch-weights": example_weights.IMAGENET,
}


def preset(name: str) -> RunConfig:
    """The run of that name.

    Raises:
        ValueError: there is none.

    >>> preset("imagenet-5pct-fixmatch-l2i").model
    'resnet-26'
    """
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name]


__all__ = ["PRESETS", "preset"]
