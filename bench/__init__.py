"""Benchmarks of fastmeta: ``python -m bench --help`` lists the commands, ``pytest bench`` runs every case once.

=============================== =======================================================================
case, inputs, ops/              what is measured, as data: variants and their cost, one file per operator
clock, floors, measure          how: samples in turn, ceilings of the machine, one case
operators                       all cases: ``bench ops``, and the phase of ``bench gpu``
rows, goals, report, plot       what the figures say
step/                           ``bench step``: training steps with a method against the plain step
train/                          ``bench train``: the trainer's own steps, and what they are made of
scaling/                        ``bench scaling``: docs/scaling.md, what 8 to 512 GPUs would exchange, keep and cost
gpu/                            ``bench gpu``: everything that needs a GPU, in phases
kernels, specimens, compiled    launches of the Triton kernels: ``bench compile``, ``resources``, ``host``
=============================== =======================================================================
"""

import os

# torch's profiler announces every start and stop on stderr below this level; it is read when torch is imported.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")
