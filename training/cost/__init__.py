"""What a training step costs, counted and not measured: weights, activations, FLOPs, bytes. Imports no torch."""
