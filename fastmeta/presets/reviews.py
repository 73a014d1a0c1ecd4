"""UDA on IMDb's reviews, as two of the papers have it: 20 labels, BERT-base, 128 tokens of a text.

Of the papers: 20 labels, all other texts unlabeled, 8 labeled and 24 unlabeled texts, Adam at 2e-5, 10,000 steps, 1,000
of them to warm up, as UDA. Of UDA's script: training signal annealing (linear), an unlabeled weight of 1. Otherwise
than there: BERT starts without pretrained weights, and words are replaced where UDA translates texts back and forth, so
that the figures are out of reach. Chosen here: no threshold and no sharpening; a linear fall of the rate is left out.
"""

from dataclasses import replace

from fastmeta.training.config import EvaluationConfig, OptimizerConfig, RunConfig, ScheduleConfig

LABELS = 20


def loop(base: str) -> RunConfig:
    """Of a base: ``sl`` or ``uda``."""
    config = RunConfig(
        base="supervised",
        model="bert-base",
        image_size=128,
        labeled_view="weak",
        labeled_batch=8,
        unlabeled_batch=24,
        steps=10_000,
        optimizer=OptimizerConfig("adam", learning_rate=2e-5, weight_decay=0.0),
        schedule=ScheduleConfig("constant", warm_up=1_000),
        evaluation=EvaluationConfig(every=1_000, weights="student", report="last"),
    )
    if base == "sl":
        return config
    settings = {"threshold": 0.0, "temperature": 1.0, "weight": 1.0, "annealing": "linear"}
    return replace(config, base="uda", base_settings=settings)
