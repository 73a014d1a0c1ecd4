"""``python -m bench <command>``."""

import argparse
import sys
from importlib import import_module

# Imported when chosen: `gpu` builds fastmeta, which the others import.
COMMANDS = {
    "ops": ("bench.operators", "Every operator on the CPU against what users have today."),
    "step": ("bench.step.command", "A training step with each method against the plain step, on the CPU."),
    "data": ("bench.data", "How fast images are read and augmented, against Pillow in workers."),
    "augment": ("bench.augment", "How fast weak and strong views are made, against Pillow, kornia and torchvision."),
    "checkpoints": ("bench.checkpoints", "Seconds of a checkpoint, and the hours that failures cost a run with it."),
    "scaling": ("bench.scaling.command", "What a step exchanges, keeps and costs on 8 to 512 GPUs, by formulas."),
    "train": ("bench.train.command", "Images a second of the trainer with each method, and what a step is made of."),
    "resources": ("bench.resources", "Registers, shared memory and spills of every kernel of the GPU, without one."),
    "compile": ("bench.compile", "Kernels and libraries for a GPU that is not here, as an archive for `gpu --cache`."),
    "host": ("bench.host", "What a call costs the host, without a GPU and without the driver's launch."),
    "gpu": ("bench.gpu.command", "Everything that needs a GPU: build, tests, sanitizer, operators, step time."),
}


def main(arguments: list[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="python -m bench", description="Benchmarks of fastmeta.")
    commands = parser.add_subparsers(required=True, metavar="command")
    for name, (module, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, formatter_class=argparse.RawDescriptionHelpFormatter)
        if given[:1] == [name]:
            chosen = import_module(module)
            command.description = chosen.__doc__
            chosen.add_arguments(command)
            command.set_defaults(run=chosen.run)
    options = parser.parse_args(given)
    return options.run(options)


if __name__ == "__main__":
    sys.exit(main())
