"""Where the shipped files are: beside the packages in a checkout, inside the package in a wheel."""

import os
from pathlib import Path

from lora_engine.errors import NotFoundError

_PACKAGE = Path(__file__).resolve().parent


def asset_path(name: str) -> Path:
    """Path of `assets/<name>` ("base", "datasets/..."). Raises NotFoundError."""
    for root in (_PACKAGE.parent / "assets", _PACKAGE / "_assets"):
        path = root / name
        if path.exists():
            return path
    raise NotFoundError(f"asset is {name!r}; allowed: a file that ships with the project.")


def absolute_model(model: str) -> str:
    """A model given as a folder as its full path, since a worker may run elsewhere; anything else as it is."""
    folder = Path(os.path.expanduser(model))  # noqa: PTH111 (leaves ~nobody as it is instead of raising)
    return str(folder.resolve()) if model != "embedded" and folder.is_dir() else model


def app_path() -> Path:
    """Path of the dashboard's main script."""
    for root in (_PACKAGE.parent / "app", _PACKAGE / "_app"):
        if (root / "main.py").exists():
            return root / "main.py"
    raise NotFoundError("app is missing; allowed: an installation that ships the dashboard.")
