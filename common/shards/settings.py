"""Settings in config.json that change what weights do, and in which two models differ."""

from common.shards.architecture import quiet_transformers
from common.shards.checkpoint import Checkpoint

THAT_COUNT = (
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "sliding_window",
    "hidden_act",
    "rms_norm_eps",
)


def _flat(config: dict) -> dict:
    """The settings that count, text_config's among them, each under its last name.

    {"rope_parameters": {"rope_theta": 1e6}, "vocab_size": 9} -> {"rope_theta": 1e6}
    """
    found = {}
    for key in THAT_COUNT:
        value = config.get(key)
        if isinstance(value, dict):
            found |= {("rope_type" if name == "type" else name): v for name, v in value.items()}
        elif value is not None:
            found[key] = value
    nested = config.get("text_config")
    return found | (_flat(nested) if isinstance(nested, dict) else {})


def _as_read(config: dict) -> dict | None:
    """The same as transformers' config class reads it: one spelling, defaults filled in. None where it knows none."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        return None
    try:
        with quiet_transformers():
            return _flat(CONFIG_MAPPING[model_type].from_dict(dict(config)).to_dict())
    except Exception:  # any value may be in it, and config classes fail in as many ways as there are classes
        return None


def config_notes(finetuned: Checkpoint, base: Checkpoint) -> list[str]:
    """A line for each setting in which the models differ; a merge takes the base's.

    transformers is asked only where config.json's own words differ: rope_theta has two spellings, and a key that is
    left out has a default.
    """
    theirs, mine = _flat(finetuned.config), _flat(base.config)
    if theirs == mine:
        return []
    read = _as_read(finetuned.config), _as_read(base.config)
    if None not in read:
        theirs, mine = read
    return [
        f"config.json has {key} {theirs.get(key)!r:.80} in {finetuned.label} but {mine.get(key)!r:.80} "
        f"in {base.label}; merged models use the base's"
        for key in dict.fromkeys([*theirs, *mine])
        if theirs.get(key) != mine.get(key)
    ]
