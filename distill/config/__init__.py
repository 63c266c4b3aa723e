"""Groups of flags that recipes share, and what they build."""

from distill.config.bounds import at_least, unused
from distill.config.evaluation import EvaluationConfig, hold_out
from distill.config.join import JoinConfig
from distill.config.loss import LossConfig
from distill.config.sides import SidesConfig
from distill.config.student import SUITED, StudentConfig, describe_start, suited
from distill.config.teacher import TeacherConfig

__all__ = [
    "SUITED",
    "EvaluationConfig",
    "JoinConfig",
    "LossConfig",
    "SidesConfig",
    "StudentConfig",
    "TeacherConfig",
    "at_least",
    "describe_start",
    "hold_out",
    "suited",
    "unused",
]
