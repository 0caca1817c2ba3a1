"""What this machine's processor is good at, where torch does not tell."""

from functools import cache
from pathlib import Path


@cache
def cpu_multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions that multiply bfloat16; without them it is slower than float32."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags
