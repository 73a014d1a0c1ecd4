"""Operations applied to a batch, every image with its own."""

from collections.abc import Callable

import torch
from torch import Tensor

from fastmeta import checks
from fastmeta.data.augment import reference
from fastmeta.data.augment.operations import GRAY, LARGEST_SIDE, OPERATIONS
from fastmeta.data.augment.pixels import shifted, to_bytes, to_unit
from fastmeta.dispatch import Operator


def _fake(images: Tensor, *arguments: object) -> Tensor:
    return images.new_empty(images.shape, dtype=torch.float32 if arguments[-1] else torch.uint8)


OPERATOR = Operator("augment", fake=_fake)


def apply_operations(
    images: Tensor,
    operations: Tensor,
    levels: Tensor,
    places: Tensor | None = None,
    *,
    fill: int = 0,
    square: tuple[int, int, int] = GRAY,
    impl: str | None = None,
) -> Tensor:
    """Apply to each image its own operations, one after another: ``images[n]`` first takes ``operations[n, 0]``.

    They are Pillow's, bit for bit: ``ImageEnhance``, ``ImageOps``, ``Image.rotate`` and ``Image.transform`` to the
    nearest pixel, ``ImageFilter.BLUR`` and ``SMOOTH``, ``crop`` with ``resize``, and ``Image.blend`` for what has a
    share. In an image of one channel ``color`` changes nothing.

    Args:
        images: uint8 ``[N, C, H, W]`` with 1 or 3 channels, up to 8192 pixels a side; any strides.
        operations: int64 ``[N, D]``, places in :data:`OPERATIONS`.
        levels: float32 ``[N, D]``; :data:`OPERATIONS` says what they mean.
        places: float32 ``[N, D, 2]``, x and y in pixels of the middle of a cutout's square; None: the image's middle.
        fill: what a rotation, shear or translation moves in, 0 to 255.
        square: red, green and blue of a cutout; an image of one channel takes the first.
        impl: implementation to use; see :func:`fastmeta.use_impl`.

    Returns:
        uint8 ``[N, C, H, W]``.

    Raises:
        TypeError: a tensor has another dtype.
        ValueError: a shape does not fit, a color is out of range, or an operation is none. On a GPU nobody waits to
            look at operations: one that is none leaves the image as it is.
        RuntimeError: the named ``impl`` is not available.

    >>> from fastmeta.data.augment import CODES
    >>> image = torch.tensor([[[[0, 100, 200]]]], dtype=torch.uint8)
    >>> codes = torch.tensor([[CODES["invert"], CODES["translate-x"]]])
    >>> apply_operations(image, codes, torch.tensor([[1.0, -1.0]])).tolist()
    [[[[0, 255, 155]]]]
    """

    def check() -> None:
        _check(images, operations, levels, places, fill, square)

    return _run(images, None, operations, levels, places, fill, square, False, False, impl, check)


def view(
    images: Tensor,  # [N, C, H, W], uint8 or in [0, 1]
    moves: Tensor | None,  # [N, 3] int32: by how many rows and columns, and whether left and right are exchanged
    operations: Tensor | None = None,  # [N, D]
    levels: Tensor | None = None,  # [N, D]
    places: Tensor | None = None,  # [N, D, 2]
    *,
    reflected: bool = False,
    fill: int = 0,
    square: tuple[int, int, int] = GRAY,
) -> Tensor:  # [N, C, H, W] float32 in [0, 1]
    """Shift, flip, :func:`apply_operations` and scale, in one call for 8-bit images of 1 or 3 channels.

    What moves in is 0, or the image ``reflected`` at its border.
    """
    if images.dtype != torch.uint8 or (operations is None and images.shape[1] not in (1, 3)):
        images = images if moves is None else shifted(images, moves, reflected=reflected)
        if operations is None:
            return to_unit(images)
        images, moves = to_bytes(images), None
    if operations is None or levels is None:
        operations = torch.empty(len(images), 0, dtype=torch.int64, device=images.device)
        levels = torch.empty(len(images), 0, device=images.device)
    codes, strengths = operations, levels

    def check() -> None:
        _check(images, codes, strengths, places, fill, square)

    return _run(images, moves, codes, strengths, places, fill, square, reflected, True, None, check)


def _run(
    images: Tensor,
    moves: Tensor | None,
    operations: Tensor,
    levels: Tensor,
    places: Tensor | None,
    fill: int,
    square: tuple[int, int, int],
    reflected: bool,
    unit: bool,
    impl: str | None,
    check: Callable[[], None],
) -> Tensor:
    kernel = OPERATOR.select(impl, images, operations, levels)
    if kernel is None:
        check()
        if moves is not None:
            images = shifted(images, moves, reflected=reflected)
        images = reference.apply_in_turn(images, operations, levels, places, fill, square)
        return to_unit(images) if unit else images
    tensors = [None if each is None else each.contiguous() for each in (images, moves, operations, levels, places)]
    return checks.run(kernel, (*tensors, fill, *square, reflected, unit), check)


def _check(
    images: Tensor, operations: Tensor, levels: Tensor, places: Tensor | None, fill: int, square: tuple[int, int, int]
) -> None:
    tensors = {"images": images, "operations": operations, "levels": levels}
    tensors |= {"places": places} if places is not None else {}
    for name, tensor in tensors.items():
        dtype = {"images": torch.uint8, "operations": torch.int64}.get(name, torch.float32)
        if tensor.dtype != dtype:
            raise TypeError(f"{name} must be {str(dtype)[6:]}, got {str(tensor.dtype)[6:]}")
        if tensor.device != images.device:
            raise ValueError(f"{name} must be on {images.device} like images, got {tensor.device}")
    if images.dim() != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images must be [N, 1 or 3, H, W], got {list(images.shape)}")
    if not 0 < min(images.shape[2:]) <= max(images.shape[2:]) <= LARGEST_SIDE:
        raise ValueError(f"images must have 1 to {LARGEST_SIDE} pixels a side, got {list(images.shape)}")
    if operations.dim() != 2 or len(operations) != len(images):
        raise ValueError(f"operations must be [N, D] with N = {len(images)}, got {list(operations.shape)}")
    for name, shape in {"levels": operations.shape, "places": (*operations.shape, 2)}.items():
        if name in tensors and tensors[name].shape != shape:
            raise ValueError(f"{name} must be {list(shape)} like operations, got {list(tensors[name].shape)}")
    for name, values in (("fill", (fill,)), ("square", square)):
        if not all(0 <= value <= 255 for value in values):
            raise ValueError(f"{name} must lie in 0 .. 255, got {values if name == 'square' else fill}")
    if operations.is_cpu and operations.numel():
        low, high = int(operations.min()), int(operations.max())
        if low < 0 or high >= len(OPERATIONS):
            raise ValueError(f"operations must lie in 0 .. {len(OPERATIONS) - 1}, got {low if low < 0 else high}")
