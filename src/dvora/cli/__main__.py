"""`python -m dvora.cli`, for launchers that start modules: accelerate launch, torchrun."""

from .app import main

main()
