"""torchrun and DistributedDataParallel: two processes train what one does, and exchange the vectors' gradients only.

Start it with torchrun --standalone --nproc-per-node 2 -m examples.torchrun_ddp
"""
