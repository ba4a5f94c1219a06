"""From files to a model: a checkpoint (hub.py), its config.json (config_file.py), its weights (load.py)."""
from weights.config_file import config_from_dict, read_config
from weights.device import parse_device, parse_dtype
from weights.devices import parse_devices
from weights.hub import LEARNED, find_checkpoint
from weights.load import load_model
from weights.safetensors_file import write_tensors
from weights.save import official_state_dict, save_model

__all__ = ["LEARNED", "config_from_dict", "find_checkpoint", "load_model", "official_state_dict",
           "parse_device", "parse_devices", "parse_dtype", "read_config", "save_model", "write_tensors"]
