"""The sampling that a checkpoint suggests in its generation_config.json."""
from pathlib import Path

from weights.chat_template import read_settings
from weights.messages import named, quoted

WHOLE = "top_k",
DECIDE = "temperature", "top_p", "top_k"        # one of these makes it a way to sample
NAMES = *DECIDE, "repetition_penalty"


def read_sampling(folder: str | Path) -> dict[str, float | int]:
    """Fields of `Sampler`: those that the file has, and temperature 1 and top_p 1 where it leaves them out,
    as transformers does. Raises ValueError with one line where it has none, or not numbers."""
    path = Path(folder) / "generation_config.json"
    settings = read_settings(path)
    found = {name: settings[name] for name in NAMES if settings.get(name) is not None}
    if not any(name in found for name in DECIDE):
        raise ValueError(f"{named(path)}: it suggests no way to sample; give --temperature X and --top-p X "
                         "instead of --sample")
    for name, value in found.items():
        if type(value) is not int and (type(value) is not float or name in WHOLE):
            kind = "whole number" if name in WHOLE else "number"
            raise ValueError(f"{named(path)}: {name} must be a {kind}, not {quoted(value)}")
    return {"temperature": 1.0, "top_p": 1.0, **found}
