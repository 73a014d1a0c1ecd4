"""A rectangle of an image, brought to a square: bilinear, in float32 with every product rounded."""

import torch
from torch import Tensor

from fastmeta.data.augment.pixels import constant, to_bytes
from fastmeta.dispatch import Operator


def _fake(images: Tensor, columns: Tensor, *rest: object) -> Tensor:
    size = columns.shape[1]
    return images.new_empty(*images.shape[:2], size, size, dtype=torch.float32 if rest[-1] else torch.uint8)


OPERATOR = Operator("crop", fake=_fake)


def crop(
    images: Tensor, middle: Tensor, share: Tensor, size: int, *, unit: bool = True, impl: str | None = None
) -> Tensor:
    """Of uint8 ``[n, channels, height, width]``, ``[n, channels, size, size]``.

    Args:
        images: what is cut from.
        middle: ``[n, 2]``, x and y in [-1, 1] over the image.
        share: ``[n, 2]``, of its width and height; less than 0: left and right are exchanged.
        size: side of the result.
        unit: float32 in [0, 1]; else uint8, the nearest.
        impl: implementation to use; see :func:`fastmeta.use_impl`.
    """
    sides = constant((float(images.shape[3]), float(images.shape[2])), images.device).double().view(1, 2, 1)
    across = (2 * torch.arange(size, device=images.device, dtype=torch.float64) + 1) / size - 1
    place = share.double().unsqueeze(2) * across + middle.double().unsqueeze(2)  # [n, 2, size]
    place = (((place + 1) * sides - 1) / 2).clamp(min=0).minimum(sides - 1)
    first = place.floor()
    columns, rows = first.to(torch.int32).unbind(1)
    column_shares, row_shares = (place - first).float().unbind(1)
    places = (columns, column_shares, rows, row_shares)
    kernel = OPERATOR.select(impl, images, *places)
    if kernel is None:
        result = crop_reference(images, *places)
        return result if unit else to_bytes(result)
    return kernel(images.contiguous(), *(each.contiguous() for each in places), unit)


def crop_reference(
    images: Tensor,  # [N, C, H, W]
    columns: Tensor,  # [N, S]
    column_shares: Tensor,  # [N, S], of the next column
    rows: Tensor,  # [N, S]
    row_shares: Tensor,  # [N, S]
) -> Tensor:  # [N, C, S, S]
    """First along the rows, then along the columns."""
    images = images.float()
    channels, height, width = images.shape[1:]

    def mixed(first: Tensor, second: Tensor, share: Tensor) -> Tensor:
        return first + share * (second - first)

    def row(place: Tensor) -> Tensor:
        return place.long()[:, None, :, None].expand(-1, channels, -1, width)

    def column(place: Tensor) -> Tensor:
        return place.long()[:, None, None, :].expand(-1, channels, height, -1)

    after = (columns + 1).clamp(max=width - 1)
    drawn = mixed(images.gather(3, column(columns)), images.gather(3, column(after)), column_shares[:, None, None])
    width = drawn.shape[3]
    below = (rows + 1).clamp(max=height - 1)
    return mixed(drawn.gather(2, row(rows)), drawn.gather(2, row(below)), row_shares[:, None, :, None]).div_(255)
