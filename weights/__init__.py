"""From files to a model: where a checkpoint lies (hub.py) and how it becomes a LlamaVision (load.py)."""
from weights.hub import LEARNED, find_checkpoint
from weights.load import (
    load_model,
    official_state_dict,
    parse_device,
    parse_dtype,
    save_model,
    write_tensors,
)

__all__ = ["LEARNED", "find_checkpoint", "load_model", "official_state_dict", "parse_device", "parse_dtype",
           "save_model", "write_tensors"]
