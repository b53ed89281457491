"""What can be done with an adapter's folder; what commands offer of it is here, where it costs no import."""

from typing import Literal

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
"""Of merged weights; "auto" is the base's own."""
TARGETS = ("dora", "dvora")
"""What adapters are converted to."""
TO_LORA = (
    "an adapter of DVoRA is no LoRA: it rescales whole rows of the weight, (g - 1) W, which has the rank of W itself. "
    "Convert it to dora, which is exact, or merge it"
)
Runtime = Literal["onnx", "web"]
"""Of what `dvora export` writes."""
