"""What the tests' small tokenizers are made of."""

from collections.abc import Callable

from lora_engine.data import TextTokenizer

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = ["the harbour is quiet tonight and the lamp is lit\n\nassistant user system question answer 0123456789"]

MakeTokenizer = Callable[..., TextTokenizer]
