"""Files of a person's own kept with the ledger, so that a run can be repeated after the file has gone."""

import hashlib
import json
import re
import tempfile
from pathlib import Path


def store_upload(home: Path, name: str, content: bytes) -> Path:
    """Write `content` to home/datasets/<hash>/<name> and return that path; equal files are stored once.

    `name` is what the person called the file and is not trusted: letters, digits and ._- stay."""
    safe = re.sub(r"[^A-Za-z0-9._-]+", "_", Path(name).name).lstrip(".")[-80:] or "data.txt"
    return _store(home / "datasets" / _short_hash(content), safe, content)


def store_config(home: Path, content: bytes) -> Path:
    """Write a model's config.json to home/models/<model type>-<hash>/ and return that folder, which is the model's
    name from then on; equal files are stored once."""
    try:
        kind = json.loads(content.decode("utf-8-sig"))["model_type"]
    except (ValueError, LookupError, TypeError, RecursionError):
        kind = None
    safe = re.sub(r"[^A-Za-z0-9_-]+", "_", kind)[:40] if isinstance(kind, str) else ""
    return _store(home / "models" / f"{safe or 'model'}-{_short_hash(content)[:8]}", "config.json", content).parent


def _short_hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _store(folder: Path, name: str, content: bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = folder / name
    if not path.exists():
        # A name of its own: two programs may store the same file at once.
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".", suffix=".partial", delete=False) as partial:
            partial.write(content)
        Path(partial.name).replace(path)
    return path
