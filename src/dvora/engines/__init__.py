"""Room of the engines that shard parameters: DTensor, ZeRO-3, FSDP2."""
