"""Triton kernels, installed as ``fastmeta.triton_kernels``: the top-level name belongs to Triton and vLLM.

One file for each operator under the stem it has in ``fastmeta/ops``, with a function ``plan`` that takes the arguments
of the registered schema (``csrc/operators.cpp``). It checks them and chooses form, tiles and grids once for each layout
of the tensors; later calls with that layout only launch.
"""

if __name__ != "fastmeta.triton_kernels":
    raise ImportError(f"{__file__} is the package fastmeta.triton_kernels; install fastmeta and import that")
