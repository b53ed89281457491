"""The layers that PEFT sees: how each type of layer is adapted."""
