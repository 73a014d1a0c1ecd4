"""A yardstick from outside: what the labels alone give without any deep learning."""

from fastmeta.data import Images, Split

_MOST_VALUES = 10**7  # that are read for it


def support_vector_error(images: Images, split: Split) -> float | None:
    """Test error of scikit-learn's SVC, default settings, on the pixels of the labeled images.

    None where the split has no test images, where labeled and test images have more than 10 million pixels, or for
    texts, which have none.

    >>> from fastmeta.data import load_digits, make_split
    >>> digits = load_digits()
    >>> split = make_split(digits, labels_per_class=1, seed=0, test_fraction=0.25)
    >>> 0.2 < support_vector_error(digits, split) < 0.7
    True
    """
    from sklearn.svm import SVC

    if len(images.image_shape) != 3:
        return None
    values = (len(split.labeled) + len(split.test)) * images.get(split.labeled[:1])[0].numel()
    if not len(split.test) or values > _MOST_VALUES:
        return None
    labeled, test = (images.get(places).flatten(1).float().numpy() for places in (split.labeled, split.test))
    scale = 255.0 if labeled.max() > 1 else 1.0
    machine = SVC().fit(labeled / scale, images.targets[split.labeled].numpy())
    return float((machine.predict(test / scale) != images.targets[split.test].numpy()).mean())
