"""config.json, the model's numbers, and generation_config.json, how the model likes to write.

Two layouts of config.json are in circulation, and both are read: the hub's, one flat object, and
the converter's, with the concept fields nested under "concept". Only the hub's is written.
"""

import dataclasses
import json
from pathlib import Path

from ..config import Config, require
from ..sampling import Options
from .writing import replacing

# Architecture switches that the official code offers and this one fixes. A file that asks for
# anything else is refused, because the weights would load and the text would be silently wrong.
FIXED = {
    "mlp_type": "swiglu",
    "use_rms_norm": True,
    "norm_order": "post",
    "use_qk_norm": True,
    "use_rope": True,
    "rope_full_precision": True,
    "use_bias": False,
    "weight_sharing": True,
    "interpretable": True,
    "use_unknown": True,
    "use_attention_known": False,
    "use_attention_unknown": False,
    "factorize_unknown": True,
    "apply_topk_to_unknown": True,
    "use_epsilon_correction": True,
    "topk_on_logits": False,
}
# What a file must state: sizes, and numbers that, guessed wrongly, load but change the model.
REQUIRED = ("n_layers", "n_head", "n_embd", "block_size", "diff_block_size", "norm_eps",
            "rope_base", "clip_qkv", "n_concepts", "topk_known", "n_unknown_concepts",
            "unknown_topk", "vocab_size")
GENERATION = "generation_config.json"  # beside the weights; a model need not have one
WRITING = ("max_new_tokens", "temperature", "top_p", "repetition_penalty", "allow_eos", "align")


def read_json(file: Path) -> dict:
    """Read the JSON object in a file.

    Raises ValueError, naming the file, when it holds anything else, or when an object has a key
    twice. Programs differ in which of the two values they would use.
    """
    try:
        data = json.loads(file.read_text(encoding="utf-8-sig"), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{file} is not a JSON object")
    return data


def unique_keys(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object as a dict; ValueError when a key stands in it twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"{twice} is listed twice")
    return found


def config_from_dict(data: dict) -> Config:
    """A Config from either published layout of config.json.

    Keys that the model has no use for (`auto_map`, ...) are ignored. Raises ValueError when a size
    is missing, or when a value asks for an architecture that this implementation does not have.
    """
    # The nested "block_size" is the concept heads' streaming size, not the context length.
    nested = {k: v for k, v in data.get("concept", {}).items() if k != "block_size"}
    # If absent, these two are null, not the 8B's value.
    flat = {"topk_known_features": None, "n_kv_heads": None, **data, **nested}
    model_type = flat.get("model_type", "steerling")
    require(model_type in ("steerling", "causal_diffusion"), "model_type", model_type,
            "'steerling', 'causal_diffusion'")
    for name in REQUIRED:
        if name not in flat:
            raise ValueError(f"the config lacks {name}")
    for name, only in FIXED.items():
        require(flat.get(name, only) == only, name, flat.get(name), f"{only!r}")
    if flat.get("concept_dim") is not None:
        require(flat["concept_dim"] == flat["n_embd"], "concept_dim", flat["concept_dim"],
                f"n_embd = {flat['n_embd']}")
    fields = {field.name for field in dataclasses.fields(Config)}
    return Config(**{name: value for name, value in flat.items() if name in fields})


def config_to_dict(config: Config) -> dict:
    """The hub's flat layout, with every field that the hub's file has."""
    return {"model_type": "steerling", **dataclasses.asdict(config), **FIXED,
            "concept_dim": config.n_embd, "concept_block_size": 4096}


def read_config(file: Path) -> Config:
    """Read a config.json. Raises ValueError; every error names the file."""
    data = read_json(file)
    if not isinstance(data.get("concept", {}), dict):
        raise ValueError(f"{file}: concept is not an object")
    try:
        return config_from_dict(data)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def read_generation(folder: Path, config: Config) -> dict:
    """Read a model's own defaults for writing from its folder's generation_config.json.

    Returns {name: value} for those options of WRITING that the file sets. Its other keys are
    ignored, and so are options that are null. Without a file the result is empty. Raises
    ValueError, naming file, key and value, for a value that is not allowed.
    """
    file = folder / GENERATION
    data = read_json(file) if file.is_file() else {}
    found = {name: data[name] for name in WRITING if data.get(name) is not None}
    options = {name: value for name, value in found.items() if name != "max_new_tokens"}
    n = found.get("max_new_tokens", 1)
    try:
        require(type(n) is int and n >= 1, "max_new_tokens", n, "a whole number, 1 or more")
        Options(**options).check(config)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    return found


def write_generation(folder: Path, **options) -> None:
    """Write a generation_config.json with these of the options in WRITING."""
    with replacing(folder / GENERATION) as partial:
        partial.write_text(json.dumps(options, indent=2) + "\n")
