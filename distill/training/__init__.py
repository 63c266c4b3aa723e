"""Training: texts beside their stored teacher vectors, and the loop that pulls a student to them.

`match` puts texts and vectors together, `calibrate` finds a temperature, `train` runs `loop` over what `sampling` and `feed`
give each step; `gradients` fits a step into memory, `checkpoint` makes it resumable. `labels` is the other way to train: an
encoder and the head that classifies its vectors, together.
"""

from distill.training.calibration import Calibration, calibrate
from distill.training.examples import Examples, match
from distill.training.feed import Loss
from distill.training.labels import NO_LABEL, LabelConfig, LabelledTexts, LabelTraining, herd
from distill.training.loop import Run, train
from distill.training.settings import TrainConfig

__all__ = [
    "NO_LABEL",
    "Calibration",
    "Examples",
    "LabelConfig",
    "LabelTraining",
    "LabelledTexts",
    "Loss",
    "Run",
    "TrainConfig",
    "calibrate",
    "herd",
    "match",
    "train",
]
