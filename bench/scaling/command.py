"""What a step exchanges, keeps and costs on 8 to 512 GPUs, by formulas: the tables of docs/scaling.md.

Nothing is measured; with --write the page gets the tables that are printed.
"""

import argparse
from pathlib import Path

from bench.scaling import page

PAGE = Path(__file__).parents[2] / "docs" / "scaling.md"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--write", action="store_true", help=f"write them into {PAGE.name}")


def run(options: argparse.Namespace) -> int:
    for name, text in page.blocks():
        print(f"{name}\n\n{text}")
    if options.write:
        PAGE.write_text(page.filled(PAGE.read_text()))
    return 0
