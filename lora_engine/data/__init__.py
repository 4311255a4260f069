"""Datasets: reading uploads, recognising tasks, rendering, checking, splitting. No torch."""

from lora_engine.data.bundled import EXAMPLES, ExampleDataset
from lora_engine.data.check import DataReport, check_dataset, check_examples
from lora_engine.data.classes import class_names, classes_text, encode_classes, encode_text
from lora_engine.data.decode import MAX_UPLOAD_BYTES
from lora_engine.data.encode import IGNORED, encode_examples, encode_prompt
from lora_engine.data.read import FORMATS, read_dataset
from lora_engine.data.render import render_example, render_prompt
from lora_engine.data.schema import Dataset, DroppedRow, Encoded, Example, Part
from lora_engine.data.split import split_examples
from lora_engine.data.tasks import TASK_COLUMNS, TaskColumns
from lora_engine.data.tokenizer import TextTokenizer, load_tokenizer

__all__ = [
    "EXAMPLES",
    "FORMATS",
    "IGNORED",
    "MAX_UPLOAD_BYTES",
    "TASK_COLUMNS",
    "DataReport",
    "Dataset",
    "DroppedRow",
    "Encoded",
    "Example",
    "ExampleDataset",
    "Part",
    "TaskColumns",
    "TextTokenizer",
    "check_dataset",
    "check_examples",
    "class_names",
    "classes_text",
    "encode_classes",
    "encode_examples",
    "encode_prompt",
    "encode_text",
    "load_tokenizer",
    "read_dataset",
    "render_example",
    "render_prompt",
    "split_examples",
]
