"""accelerate launch: two processes train what one does; checkpoints of the adapter only; a run goes on bit for bit.

Start it with accelerate launch --multi_gpu --num_processes 2 --main_process_port 0 -m examples.accelerate_launch
On CPUs too: with --cpu, accelerate 1.15 leaves starting processes to MPI, and starts one.
"""
