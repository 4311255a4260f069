"""Datasets that ship with the project, of our own writing."""

from dataclasses import dataclass
from pathlib import Path

from lora_engine.assets_path import asset_path


@dataclass(frozen=True)
class ExampleDataset:
    """A bundled file, its title and one sentence about it."""

    name: str
    title: str
    description: str
    file: str

    @property
    def path(self) -> Path:
        """Where the file is. Raises NotFoundError in a broken installation."""
        return asset_path(f"datasets/{self.file}")


EXAMPLES: tuple[ExampleDataset, ...] = (
    ExampleDataset(
        "customer_support",
        "Customer support",
        "Messages to a small shop and its replies: a new voice and new subjects for a model that knows old stories.",
        "customer_support.jsonl",
    ),
    ExampleDataset(
        "short_stories",
        "Short stories",
        "Fairy tales in an old-fashioned manner, close to what the embedded model was pretrained on.",
        "short_stories.txt",
    ),
    ExampleDataset(
        "records_to_sentences",
        "Records to sentences",
        "Lists of fields and the sentence that says the same: far from anything the embedded model has read.",
        "records_to_sentences.csv",
    ),
)
