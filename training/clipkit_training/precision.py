"""Which number format the towers compute in; losses and normalisation are fp32 whatever is chosen.

bf16 helps where the hardware multiplies in it (GPUs since Ampere, CPUs with AVX512-BF16 or AMX) and slows
everything else down, so `auto` asks the hardware. fp16 needs loss scaling and is for older GPUs.
"""

from contextlib import AbstractContextManager, nullcontext

import torch

from clipkit.errors import ConfigError
from clipkit.hardware import cpu_multiplies_bfloat16


def resolve_precision(name: str, device: torch.device) -> str:
    """`auto` as fp32 or bf16 for this device; refuses fp16 on a CPU. Raises: ConfigError."""
    if name == "fp16" and device.type == "cpu":
        raise ConfigError("precision: fp16 needs a GPU", hint="use precision: auto")
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if cpu_multiplies_bfloat16() else "fp32"


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """The context to run the towers in."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16 if precision == "bf16" else torch.float16)
