"""TensorBoard, on request: the rows of both CSV logs and the validation picture as event files.

The CSV files stay the record. Events are written by the main process; a run that continues from step S
tells the readers to forget what an earlier process wrote after S, and rows that no event file holds yet
(TensorBoard was switched on later) are written first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from comit_bench.errors import MissingError
from comit_bench.train.logs import read_rows

FOLDER = "tensorboard"
TRAIN, VALIDATION = "train", "validation"


def check_tensorboard(asked: bool) -> None:
    """Refuse before the first step what would fail at the first row."""
    if not asked:
        return
    try:
        version("tensorboard")
    except PackageNotFoundError as error:
        raise MissingError(
            'tensorboard is true, but TensorBoard is not installed: pip install "comit-bench[track]", '
            "or set tensorboard=false (log.csv and validation.csv are always written)"
        ) from error


class Board:
    """Event files below a run's ``directory/tensorboard``; nothing at all where it is not ``active``."""

    def __init__(self, directory: Path, *, active: bool) -> None:
        self.directory, self.active = directory, active
        self._writer: Any = None

    def start(self, resumed: int) -> None:
        """Begin to write after step ``resumed``; call it when the CSV logs were brought to that step."""
        if not self.active:
            return
        from torch.utils.tensorboard import SummaryWriter  # needs the extra `track`

        folder = self.directory / FOLDER
        fresh = not any(folder.glob("events.out.tfevents.*"))
        self._writer = SummaryWriter(str(folder), purge_step=None if fresh else resumed + 1)
        if fresh:
            self._replay()

    def _replay(self) -> None:
        for group, name in ((TRAIN, "log.csv"), (VALIDATION, "validation.csv")):
            for row in read_rows(self.directory / name):
                values = {key: float(value) for key, value in row.items() if value and key != "step"}
                self._write(group, int(row["step"]), values)
        self._writer.flush()

    def _write(self, group: str, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            if name != "step" and math.isfinite(value):
                self._writer.add_scalar(f"{group}/{name}", value, step)

    def scalars(self, group: str, step: int, values: Mapping[str, float]) -> None:
        """One row; on disk when this returns, so that a kill loses nothing that the CSV has."""
        if self._writer is not None:
            self._write(group, step, values)
            self._writer.flush()

    def picture(self, step: int, path: Path) -> None:
        """The PNG at ``path``."""
        if self._writer is None or not path.is_file():
            return
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
        self._writer.add_image(f"{VALIDATION}/picture", pixels, step, dataformats="HWC")
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
