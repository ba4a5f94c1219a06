"""Reads adapter_config.json, the settings of a LoRA adapter as PEFT writes them.

Whatever would change the numbers and is not supported is refused by its name: no adapter is merged in part.
Settings of training alone (dropout, targets, how weights began) are not needed: the tensors say where they
belong.
"""
import math
import re
from dataclasses import dataclass
from pathlib import Path

from weights.files import read_json
from weights.hub import ADAPTER
from weights.messages import named, one_line, quoted

MERGE = "merge it into its base with peft's merge_and_unload(), and give the merged folder as --model"
VIRTUAL = {"PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "ADAPTION_PROMPT", "CPT"}
# Settings with which weights are not simply base + scale * B A; anything that is set there is refused.
UNSUPPORTED = {
    "alora_invocation_tokens": "it acts only after certain tokens, so it cannot be merged",
    "arrow_config": "it is chosen token by token, so it cannot be merged",
    "layer_replication": "it repeats layers of its base; " + MERGE,
    "target_parameters": MERGE,
    "trainable_token_indices": MERGE,
    "use_qalora": MERGE,
    "use_bdlora": MERGE,
    "kasa_config": MERGE,
    "monteclora_config": MERGE,
}
KNOWN_SWITCHES = {"use_rslora", "use_dora"}
ONLY_TRAINING = {"loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config",
                 "megatron_config", "runtime_config"}
BEGINNINGS = (None, True, False, "gaussian", "eva", "orthogonal")      # that leave the base's weights alone
MOST_PATTERNS, MOST_LETTERS = 2000, 200
# A pattern whose search could take hours: something repeated that holds a group, or much that is repeated.
SLOW = re.compile(r"\)[*+{]|([*+{].*){4}")


@dataclass(frozen=True)
class LoraConfig:
    """What decides the scale of an adapter's changes."""
    rank: int
    alpha: float
    rank_patterns: dict[re.Pattern, int]        # of some modules, by their names; the first that fits counts
    alpha_patterns: dict[re.Pattern, float]
    root_scaled: bool                           # rsLoRA: alpha / sqrt(rank) (arXiv 2312.03732)
    dora: bool                                  # arXiv 2402.09353
    ties_weights: bool                          # expects that the head stays the embedding
    base: str | None                            # what it says that it was trained on

    def rank_of(self, module: str) -> int:
        return _first(self.rank_patterns, module, self.rank)

    def scale_of(self, module: str) -> float:
        rank = self.rank_of(module)
        alpha = _first(self.alpha_patterns, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.root_scaled else rank)


def read_lora_config(folder: Path) -> LoraConfig:
    """The settings in adapter_config.json. Raises ValueError with one line where it cannot be merged."""
    path = folder / ADAPTER
    data = read_json(path)
    try:
        return lora_config_from_dict(data)
    except ValueError as error:
        raise ValueError(f"{named(path)}: {error}") from None


def lora_config_from_dict(data: dict) -> LoraConfig:
    """The settings from the parsed adapter_config.json. Raises ValueError with one line."""
    kind = data.get("peft_type") if isinstance(data, dict) else None
    if not isinstance(kind, str):
        raise ValueError("it has no peft_type, so it is not the configuration of a PEFT adapter")
    if kind.upper() in VIRTUAL:
        raise ValueError(f"peft_type {kind} adds virtual tokens, which no weight can hold: only LoRA is "
                         "supported")
    if kind.upper() != "LORA":
        raise ValueError(f"peft_type {quoted(kind)} is not supported, only LORA: {MERGE}")
    _refuse_unsupported(data)
    base = data.get("base_model_name_or_path")
    return LoraConfig(
        _rank("r", data.get("r")), _number("lora_alpha", data.get("lora_alpha")),
        _patterns("rank_pattern", data, _rank), _patterns("alpha_pattern", data, _number),
        _switch("use_rslora", data), _switch("use_dora", data), _switch("ensure_weight_tying", data),
        one_line(base, 120) if isinstance(base, str) and base else None)


def _refuse_unsupported(data: dict):
    for name, remedy in UNSUPPORTED.items():
        if data.get(name):
            raise ValueError(f"{name} is set, which is not supported: {remedy}")
    for name, value in data.items():
        unknown = (name.startswith("use_") and name not in KNOWN_SWITCHES
                   or name.endswith("_config") and name not in ONLY_TRAINING)
        if unknown and value:
            raise ValueError(f"{one_line(name, 60)} is set, which is not known here: {MERGE}")
    begun = data.get("init_lora_weights")
    if not any(begun is known or isinstance(begun, str) and begun == known for known in BEGINNINGS):
        raise ValueError(f"init_lora_weights {quoted(begun)} changed the base's weights, too: save it as a "
                         "plain LoRA, as peft does with path_initial_model_for_weight_conversion")


def _first(patterns: dict[re.Pattern, float], module: str, otherwise: float) -> float:
    return next((value for pattern, value in patterns.items() if pattern.fullmatch(module)), otherwise)


def _patterns(name: str, data: dict, check) -> dict[re.Pattern, float]:
    """Names of modules, or ends of names, or regular expressions of them, as PEFT reads them."""
    value = data.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict) or len(value) > MOST_PATTERNS:
        raise ValueError(f"{name} is {quoted(value)}, not an object of modules and numbers")
    patterns = {}
    for key, number in value.items():
        if len(key) > MOST_LETTERS or SLOW.search(key):
            raise ValueError(f"{name} has {quoted(key)}, a pattern that may take too long: name modules, or "
                             "use simpler patterns")
        try:
            pattern = re.compile(rf"(.*\.)?({key})")
        except (re.error, RecursionError, OverflowError) as error:
            words = one_line(error, 60)
            raise ValueError(f"{name} has {quoted(key)}, which is no pattern ({words})") from None
        patterns[pattern] = check(f"{name} of {quoted(key, 60)}", number)
    return patterns


def _rank(name: str, value: object) -> int:
    if type(value) is not int or not 1 <= value < 2 ** 31:
        raise ValueError(f"{name} is {quoted(value)}, but must be a whole number of at least 1")
    return value


def _number(name: str, value: object) -> float:
    if type(value) not in (int, float) or not abs(value) < 1e9:
        raise ValueError(f"{name} is {quoted(value)}, but must be a number")
    return float(value)


def _switch(name: str, data: dict) -> bool:
    value = data.get(name)
    if value not in (None, True, False) or isinstance(value, (int, float)) and not isinstance(value, bool):
        raise ValueError(f"{name} is {quoted(value)}, but must be true or false")
    return bool(value)
