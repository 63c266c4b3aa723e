"""The folder of a CosineLinear: model.safetensors, and config.json with its settings and the names of its classes."""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from distill import files
from distill.errors import IntegrityError, RecipeError
from distill.folder import load_weights, read_json, refuse_other_files
from distill.heads import CosineLinear


def save_head(head: CosineLinear, path: str | Path, *, names: Sequence[str]) -> None:
    """Write a folder that `load_head` opens, `names` in the order of the labels. It appears whole or not at all.

    It takes the place of an earlier one. RecipeError if `path` holds something else.
    """
    refuse_other_files(Path(path), "head")
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"names are a list of str, got {names!r:.100}.")
    if len(names) != head.out_features:
        raise ValueError(f"save_head needs a name for each of {head.out_features} classes, got {len(names)}.")
    config = {
        "in_features": head.in_features,
        "out_features": head.out_features,
        "nb_proxy": head.nb_proxy,
        "to_reduce": head.to_reduce,
        "sigma": head.sigma is not None,
        "gamma": head.gamma,
        "names": list(names),
    }
    with files.published_folder(Path(path)) as temporary:
        weights = {name: value.cpu().contiguous() for name, value in head.state_dict().items()}
        save_file(weights, temporary / "model.safetensors")
        files.write_json(temporary / "config.json", config)


def load_head(path: str | Path) -> tuple[CosineLinear, list[str]]:
    """The head, on the CPU and in eval mode, and the names of its classes.

    IntegrityError for a folder that is damaged, RecipeError for a model's.
    """
    path = Path(path)
    settings = read_json(path / "config.json", {})
    if (path / "modules.json").exists() or "model_type" in settings:
        raise RecipeError(
            f"{path} is a model's folder, not a head's: Encoder.from_pretrained opens it. Name the folder that save_head wrote."
        )
    weights = load_weights(path)
    names = settings.pop("names", [])
    try:
        with torch.device("meta"):
            head = CosineLinear(**settings)
        head.load_state_dict(weights, assign=True)
    except (RuntimeError, TypeError, ValueError) as error:
        raise IntegrityError(f"{path}: config.json and the weights do not belong together ({error}).") from error
    if (
        not isinstance(names, list)
        or not all(isinstance(name, str) for name in names)
        or len(names) != head.out_features
    ):
        raise IntegrityError(f"{path}/config.json: names are those of {head.out_features} classes, got {names!r:.100}.")
    return head.eval(), names
