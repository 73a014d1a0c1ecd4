"""A yardstick from outside: what the labels alone give without any deep learning."""

from fastmeta.data import ImageDataset, split_digits


def support_vector_error(dataset: ImageDataset, labels_per_class: int, seed: int) -> float:
    """Test error of scikit-learn's SVC, default settings, trained on the labeled images of the same split.

    >>> from fastmeta.data import load_digits
    >>> 0.2 < support_vector_error(load_digits(), labels_per_class=1, seed=0) < 0.6
    True
    """
    from sklearn.svm import SVC

    split = split_digits(dataset, labels_per_class, seed)
    pixels, targets = dataset.images.flatten(1).numpy(), dataset.targets.numpy()
    machine = SVC().fit(pixels[split.labeled], targets[split.labeled])
    return float((machine.predict(pixels[split.test]) != targets[split.test]).mean())
