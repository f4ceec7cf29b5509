"""The training engine: the only place that names Megatron or Transformer Engine."""

import warnings

# Megatron advises to install Apex and calls deprecated torch functions at every turn.
warnings.filterwarnings("ignore", module=r"megatron\.")
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
