"""The MMDiT and its mathematics: pure torch, no process groups (see `pretrain/engine` for those)."""
