"""How many rows a model's blocks compute."""

from collections import Counter
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode


class Products(TorchFunctionMode):
    """Counts the rows of the first product of each block, where a hook would end all sharing."""

    def __init__(self, blocks: nn.ModuleList) -> None:
        super().__init__()
        first = [next(module for module in block.modules() if isinstance(module, nn.Linear)) for block in blocks]
        self._blocks = {id(layer.weight): number for number, layer in enumerate(first)}
        self.rows = Counter[int]()
        self.largest = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is nn.functional.linear and (number := self._blocks.get(id(args[1]))) is not None:
            self.rows[number] += len(args[0])
            self.largest = max(self.largest, len(args[0]))
        return function(*args, **(kwargs or {}))
