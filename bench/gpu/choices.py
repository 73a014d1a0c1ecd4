"""What ``python -m bench gpu`` can be told; importable before fastmeta is built."""

import argparse

OPERATORS = (
    "per_example_dot",
    "label_gradient",
    "last_layer_gradient",
    "hessian_vector_product",
    "feature_similarity",
    "finite_difference_labels",
    "solve_hessian",
    "perturbed",
    "alignment_direction",
    "masked_adam_",
)
# The stem of each operator's test files.
STEMS = {name: name for name in OPERATORS} | {"hessian_vector_product": "hvp", "masked_adam_": "masked_adam"}
DTYPES = ("bfloat16", "float32")


def add_choices(parser: argparse.ArgumentParser) -> None:
    """Which cases, and how thoroughly."""
    parser.add_argument("--operators", nargs="+", choices=OPERATORS, default=OPERATORS, metavar="NAME")
    parser.add_argument("--shapes", nargs="+", metavar="TEXT", help="cases whose shape contains this, as '768, 512'")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--quick", action="store_true", help="fewer and shorter samples")


def as_arguments(options: argparse.Namespace) -> list[str]:
    """The same choices for another process."""
    arguments = ["--operators", *options.operators, "--dtypes", *options.dtypes]
    arguments += ["--shapes", *options.shapes] if options.shapes else []
    return arguments + ["--quick"] * options.quick
