"""Devices and floating-point types by their names on the command line."""
import torch

from weights.messages import quoted

DTYPES = {"bfloat16": torch.bfloat16, "bf16": torch.bfloat16, "float16": torch.float16, "fp16": torch.float16,
          "float32": torch.float32, "fp32": torch.float32, "float64": torch.float64, "fp64": torch.float64}


def parse_device(device: str | torch.device | None) -> torch.device:
    """A device that is there; None is CUDA where there is one. Raises ValueError with one line."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError, ValueError):
        raise ValueError(f"unknown device {quoted(device)}: use cpu, cuda, cuda:N or mps") from None
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not count:
            raise ValueError(f"device '{device}': PyTorch finds no CUDA GPU on this machine; use device cpu")
        if (device.index or 0) >= count:
            raise ValueError(f"device '{device}': the last of {count} GPUs here is cuda:{count - 1}")
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device 'mps': PyTorch finds no Apple GPU on this machine; use device cpu")
    elif device.type not in ("cpu", "mps"):
        raise ValueError(f"device '{device}' is not supported: use cpu, cuda, cuda:N or mps")
    return device


def parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """A floating-point type from its name, None for the checkpoint's own. Raises ValueError with one line."""
    if dtype is None or dtype in DTYPES.values():
        return dtype
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"unknown dtype {quoted(dtype)}: use one of {', '.join(DTYPES)}")
    return DTYPES[dtype]
