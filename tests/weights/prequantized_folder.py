"""The stored quantized checkpoints as folders, whole or with damage."""
import shutil
from pathlib import Path

DATA = Path(__file__).parent / "data" / "quantized"


def folder_of(name: str, folder: Path) -> Path:
    """A folder as its writer leaves it."""
    shutil.copyfile(DATA / f"{name}.json", folder / "config.json")
    shutil.copyfile(DATA / f"{name}.safetensors", folder / "model.safetensors")
    return folder
