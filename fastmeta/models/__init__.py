"""Networks."""

from fastmeta.models.conv_net import ConvNet
from fastmeta.models.wide_resnet import WideResNet

__all__ = ["ConvNet", "WideResNet"]
