"""What one synchronisation costs through a file in memory: a flat vector, and what other methods have to send."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn

from dvora.sync import FolderTarget, ModelTarget, Publisher

MEMORY = Path("/dev/shm")
REPEATS = 7


def costs(base: Callable[[], nn.Module], adapted: Callable[[], PeftModel]) -> dict[str, tuple[int, float]]:
    """Bytes, and milliseconds of a core, from one model into another, by method.

    Args:
        base: makes the model that is trained.
        adapted: makes it with an adapter of DVoRA.
    """
    result = {}
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as name:
        file = Path(name) / "state.safetensors"
        folder, copy = FolderTarget(name), ModelTarget(adapted())
        publisher = Publisher(adapted(), folder, "policy", keep=1)
        vectors = (publisher.publish, lambda: copy.put(folder.latest("policy")))
        result["DVoRA"] = (publisher.publish().vector.nbytes, _milliseconds(*vectors))
        for rank in (1, 16):
            config = LoraConfig(r=rank, target_modules="all-linear")
            lora, other = get_peft_model(base(), config), get_peft_model(base(), config)

            def save(model: PeftModel = lora) -> None:
                save_file(get_peft_model_state_dict(model), file)

            def load(model: PeftModel = other) -> None:
                set_peft_model_state_dict(model, load_file(file))

            milliseconds = _milliseconds(save, load)
            result[f"LoRA_r{rank}"] = (file.stat().st_size, milliseconds)
        full, other = base(), base()
        milliseconds = _milliseconds(lambda: save_model(full, file), lambda: load_model(other, file))
        result["full_weights"] = (file.stat().st_size, milliseconds)
    return result


def _milliseconds(save: Callable[[], object], load: Callable[[], object]) -> float:
    """The median of both together, of a core: whatever else runs on the machine."""
    seconds = []
    for _ in range(REPEATS):
        start = time.process_time()
        save()
        load()
        seconds.append(time.process_time() - start)
    return 1000 * median(seconds)
