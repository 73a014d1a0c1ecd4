"""A finished run on other pictures of faces: where their landmarks are."""

from pathlib import Path

import torch

from fastmeta.data import Plain
from fastmeta.data.landmarks import Landmarks, landmark_table
from fastmeta.training.files import write_text
from fastmeta.training.predict import check_machine, load_model
from fastmeta.training.reports.run_folder import RunFolder


def predict_landmarks(
    run: RunFolder, faces: Landmarks, out: Path, *, device: str = "cpu", batch_size: int = 256
) -> dict[str, float]:
    """Find the landmarks of every picture, and write a CSV with a line for each: path, coordinates in its pixels.

    Args:
        run: a finished run on landmarks.
        faces: what to predict, as large as the run's.
        out: the CSV; it is whole or not there.
        device: where the net is.
        batch_size: pictures at once.

    Returns:
        The mean error (:meth:`fastmeta.data.landmarks.Landmarks.errors`) of each part whose landmarks are known.

    Raises:
        ValueError: the run is not finished, or of before its scale was kept; or there is no such device.
        OSError: the CSV cannot be written.
    """
    check_machine(device, batch_size)
    model = load_model(run).to(device)
    assert run.results is not None
    if "standardized_by" not in run.results:
        raise ValueError(f"{run.folder}: results.json must have standardized_by, which runs of an earlier version lack")
    mean, deviation = torch.tensor(run.results["standardized_by"], dtype=torch.float64)
    faces = faces.standardized_by(mean, deviation)
    plain = Plain(run.config["image_size"])
    with torch.inference_mode():
        outputs = torch.cat(
            [model(plain(faces.get(places).to(device))).cpu() for places in torch.arange(len(faces)).split(batch_size)]
        )
    everything = torch.arange(len(faces))
    names = map(faces.describe, everything.tolist())
    write_text(out, landmark_table(names, faces.in_pictures(outputs, everything)))
    errors = faces.errors(outputs, faces.targets)
    known = {part: errors[places][errors[places].isfinite()] for part, places in faces.parts.items()}
    return {part: float(found.mean()) for part, found in known.items() if len(found)}
