"""Label gradient from feature similarity: the last-layer rule without its softmax Jacobian."""

from torch import Tensor

from fastmeta import checks
from fastmeta.dispatch import Operator, in_own_dtype, unnamed

OPERATOR = Operator(
    "feature_similarity",
    numbers=2,
    triton="feature_similarity",
    fake=lambda features_u, features_h, residual_h, *rest: features_u.new_empty(
        features_u.shape[0], residual_h.shape[1]
    ),
)


def gram_is_cheaper(count_u: int, count_h: int, num_features: int, num_classes: int) -> bool:
    """Whether ``(h_u h_H^T) r`` takes fewer multiplications than ``h_u (h_H^T r)``.

    >>> gram_is_cheaper(1024, 1024, 2048, 1000), gram_is_cheaper(256, 256, 128, 10)
    (True, False)
    """
    gram = count_u * count_h * (num_features + num_classes)
    product = (count_u + count_h) * num_features * num_classes
    return gram < product


@in_own_dtype
def feature_similarity_reference(
    features_u: Tensor,  # [Nu, D]
    features_h: Tensor,  # [Nh, D]
    residual_h: Tensor,  # [Nh, C]
    scale: float,
    bias: bool,
) -> Tensor:  # [Nu, C]
    """``scale (h_u h_H^T + 1) r_H``, in the cheaper association order."""
    if gram_is_cheaper(features_u.shape[0], features_h.shape[0], features_h.shape[1], residual_h.shape[1]):
        similarity = features_u @ features_h.T
        return scale * ((similarity + 1 if bias else similarity) @ residual_h)
    product = features_u @ (features_h.T @ residual_h)
    return scale * (product + residual_h.sum(0) if bias else product)


def feature_similarity(
    features_u: Tensor,
    features_h: Tensor,
    residual_h: Tensor,
    *,
    scale: float = 1.0,
    bias: bool = True,
    impl: str | None = None,
) -> Tensor:
    r"""Label gradient of unlabeled examples as residuals of hold-out examples weighted by feature similarity.

    .. math:: g_u = \text{scale} \sum_{h} (h_u^T h_h + 1)\, r_h

    Learning to Impute (journal version), Eq. (6), which leaves out the ``+ 1`` of the bias (``bias=False``) and the
    softmax Jacobian. Up to a constant in each row it equals :func:`label_gradient` for cross-entropy along the
    hold-out gradient.

    Args:
        features_u: features of the unlabeled examples, ``[Nu, D]``.
        features_h: features of the hold-out examples, ``[Nh, D]``.
        residual_h: their residuals ``dl/df``, ``[Nh, C]``.
        scale: factor of the result, ``eta / Nh`` for a mean.
        bias: whether the bias moves as well.
        impl: implementation to use; see :func:`fastmeta.use_impl`.

    Returns:
        ``[Nu, C]``.

    Raises:
        ValueError: a shape does not fit.
        TypeError: dtypes are not floating or not the same.
        RuntimeError: the named ``impl`` is not available.

    >>> import torch
    >>> feature_similarity(torch.ones(1, 2), torch.ones(1, 2), torch.tensor([[0.5, -0.5]]))
    tensor([[ 1.5000, -1.5000]])
    """
    arguments = features_u, features_h, residual_h, scale, bias
    if unnamed(impl):
        result = OPERATOR.entry(*arguments)
        if result is not NotImplemented:
            return result
    kernel = OPERATOR.select(impl, features_u, features_h, residual_h)

    def check() -> None:
        checks.number(scale, "scale")
        h_u = checks.matrix(features_u, "features_u", "[Nu, D]")
        h_h = checks.matrix(features_h, "features_h", "[Nh, D]")
        if h_h.shape[1] != h_u.shape[1]:
            raise ValueError(f"features_h must be [Nh, D] with D = {h_u.shape[1]}, got {list(h_h.shape)}")
        r = checks.matrix(residual_h, "residual_h", "[Nh, C]")
        if r.shape[0] != h_h.shape[0]:
            raise ValueError(f"residual_h must be [Nh, C] with Nh = {h_h.shape[0]}, got {list(r.shape)}")
        checks.like(h_u, "features_u", features_h=h_h, residual_h=r)

    if kernel is not None:
        return checks.run(kernel, arguments, check)
    check()
    return feature_similarity_reference(features_u, features_h, residual_h, scale, bias)
