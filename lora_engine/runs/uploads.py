"""Datasets kept with the ledger, so that a run can be repeated after the person's file has gone."""

import hashlib
import re
import tempfile
from pathlib import Path


def store_upload(home: Path, name: str, content: bytes) -> Path:
    """Write `content` to home/datasets/<hash>/<name> and return that path; equal files are stored once.

    `name` is what the person called the file and is not trusted: letters, digits and ._- stay."""
    safe = re.sub(r"[^A-Za-z0-9._-]+", "_", Path(name).name).lstrip(".")[-80:] or "data.txt"
    folder = home / "datasets" / hashlib.sha256(content).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = folder / safe
    if not path.exists():
        # A name of its own: two programs may store the same file at once.
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".", suffix=".partial", delete=False) as partial:
            partial.write(content)
        Path(partial.name).replace(path)
    return path
