"""Processes and devices: launch, rendezvous, watchdog, sharding, DeepSpeed, FSDP."""
