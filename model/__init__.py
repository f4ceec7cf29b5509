"""The MMDiT and its mathematics: pure torch, no process groups (see `training/engine` for those)."""
