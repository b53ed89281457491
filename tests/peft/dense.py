"""The dense reference of one adapter of one layer."""

from peft import PeftModel

from dvora.peft import DVoRALayer
from tests.peft.dense_weights import dense_weight
from tests.reference import DenseDVoRA


def dense_layer(layer: DVoRALayer, model: PeftModel, adapter_name: str) -> DenseDVoRA:
    """With matrices made anew from the configuration."""
    return dense_weight(
        layer.get_base_layer().get_parameter(layer.parameter_name), layer, model, [adapter_name]
    ).adapters[0]
