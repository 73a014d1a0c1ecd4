"""Networks."""

from fastmeta.models.by_name import NETS, WITHOUT_LAST_LAYER, automatic_model, build_model
from fastmeta.models.conv_large import ConvLarge
from fastmeta.models.conv_net import ConvNet
from fastmeta.models.libraries import UnknownModel
from fastmeta.models.mlp import MLP
from fastmeta.models.mobilenet_v2 import MobileNetV2
from fastmeta.models.normalize import Normalized
from fastmeta.models.resnet import ResNet
from fastmeta.models.resnet26 import ResNet26
from fastmeta.models.tcdcn import TCDCN
from fastmeta.models.weights import load_weights, read_weights
from fastmeta.models.wide_resnet import WideResNet

__all__ = [
    "MLP",
    "NETS",
    "TCDCN",
    "WITHOUT_LAST_LAYER",
    "ConvLarge",
    "ConvNet",
    "MobileNetV2",
    "Normalized",
    "ResNet",
    "ResNet26",
    "UnknownModel",
    "WideResNet",
    "automatic_model",
    "build_model",
    "load_weights",
    "read_weights",
]
