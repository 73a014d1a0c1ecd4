"""The operators' names and the options that select cases; importable before fastmeta is built."""

import argparse

# The stem of each operator's files, here, in fastmeta/ops and in tests.
STEMS = {
    "per_example_dot": "per_example_dot",
    "label_gradient": "label_gradient",
    "last_layer_gradient": "last_layer_gradient",
    "hessian_vector_product": "hvp",
    "solve_hessian": "solve_hessian",
    "feature_similarity": "feature_similarity",
    "finite_difference_labels": "finite_difference_labels",
    "perturbed": "perturbed",
    "alignment_direction": "alignment_direction",
    "masked_adam_": "masked_adam",
}
OPERATORS = tuple(STEMS)
DTYPES = ("bfloat16", "float32")


def add_choices(parser: argparse.ArgumentParser) -> None:
    """Which cases, and how thoroughly."""
    parser.add_argument(
        "--operators", nargs="+", choices=OPERATORS, default=OPERATORS, metavar="NAME", help="default: all"
    )
    parser.add_argument("--shapes", nargs="+", metavar="TEXT", help="cases whose shape contains this, as '768, 512'")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES, help="default: both")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter samples")


def as_arguments(options: argparse.Namespace) -> list[str]:
    """The same choices for another process."""
    arguments = ["--operators", *options.operators, "--dtypes", *options.dtypes]
    arguments += ["--shapes", *options.shapes] if options.shapes else []
    return arguments + ["--quick"] * options.quick
