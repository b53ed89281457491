"""Saved adapters: from a file into a model's outputs, and back.

One value, lambda_b of a layer, from `adapter_model.safetensors` to the outputs of a batch:

1. `peft/config.py`, `from_pretrained`: settings, and the names and shapes in the file's header.
2. `peft/model.py`, `inject_adapter`: checks first, then PEFT has every target wrapped (`peft/injecting/`).
3. `state/checked_values.py`: names, shapes and values, each as early as possible, and only here.
4. `state/state_dict.py`, `from_saved`: PEFT calls it through the model, with the entries of the file.
5. `layers/layer.py`: torch copies the value into `dvora_lambda_b[adapter_name]`; `forward` takes it from there.
6. `layers/outputs.py`: active adapters and the base's output become the layer's output.
7. `weight/linear.py`: the products.

Back: PEFT's `save_pretrained` calls `as_saved` in `state/state_dict.py`. `state/hotswap.py` enters at 4, with an
adapter that is there; `state/withdrawal.py` removes one whose values were refused.
"""
