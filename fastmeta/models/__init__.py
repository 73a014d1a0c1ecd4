"""Networks."""

from fastmeta.models.conv_large import ConvLarge
from fastmeta.models.conv_net import ConvNet
from fastmeta.models.wide_resnet import WideResNet

__all__ = ["ConvLarge", "ConvNet", "WideResNet"]
