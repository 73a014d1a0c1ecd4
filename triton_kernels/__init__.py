"""Triton kernels, installed as ``fastmeta.triton_kernels``: the top-level name belongs to Triton and vLLM.

Empty in this version: ``impl="triton"`` raises for every operator.
"""

if __name__ != "fastmeta.triton_kernels":
    raise ImportError(f"{__file__} is the package fastmeta.triton_kernels; install fastmeta and import that")
