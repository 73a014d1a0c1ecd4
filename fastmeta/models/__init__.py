"""Networks."""

from fastmeta.models.conv_net import ConvNet

__all__ = ["ConvNet"]
