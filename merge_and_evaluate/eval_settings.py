"""What an eval recipe's groups say about their members: shots and every other setting.

lm-eval takes a group's settings from the group's own YAML and its default ones for a task that is named alone:
`arc_challenge` has 25 shots in the leaderboard's group and 0 by itself. Here a member keeps what its group says.
"""

from dataclasses import fields

TASK_KINDS = ("TASK", "PY_TASK")


def _group_keys() -> set[str]:
    """The keys of a group's YAML that are about the group; lm-eval hands all others down to its members."""
    from lm_eval.config.group import GroupConfig

    return {field.name for field in fields(GroupConfig)}


def _group_config(entry) -> dict:
    """A group's YAML with its `!function` names resolved: lm-eval's index keeps them as text."""
    from lm_eval.tasks._yaml_loader import load_yaml

    return load_yaml(entry.yaml_path, resolve_func=True) if entry.yaml_path else entry.cfg or {}


def _entries(config: dict) -> list[dict]:
    """A group's `task` list, names as mappings: {"task": ["a", {"group": "b"}]} -> [{"task": "a"}, {"group": "b"}]."""
    entries = config.get("task")
    return [{"task": e} if isinstance(e, str) else e for e in entries] if isinstance(entries, list) else []


def listed(index: dict, config: dict) -> list[str]:
    """The names right under a group; a group that is written out in place, and so has no name in the index, is opened:
    {"task": [{"group": "new", "task": ["a", "b"]}, "c"]} -> ["a", "b", "c"]."""
    found = []
    for entry in _entries(config):
        name = entry.get("group", entry.get("task"))
        found += listed(index, entry) if "group" in entry and name not in index else [name]
    return found


def members(index: dict, config: dict, outer: dict) -> list[tuple[str, dict]]:
    """[(name, settings)] of all that a group's `config` holds, groups before what they hold, as lm-eval 0.4.13 builds
    it.

    `outer` are the settings that the group gets from where it is named; they win over its own, and a member's own
    win over both: ({"task": ["a", {"task": "b", "num_fewshot": 2}], "num_fewshot": 5}, {}) -> [("a",
    {"num_fewshot": 5}), ("b", {"num_fewshot": 2})].
    """
    settings = {**{key: value for key, value in config.items() if key not in _group_keys()}, **outer}
    found = []
    for entry in _entries(config):
        kind = "group" if "group" in entry else "task"
        name, own = entry[kind], {key: value for key, value in entry.items() if key != kind}
        if name in index:
            found += named(index, name, {**settings, **own})
        elif kind == "group":  # written out in place: lm-eval reads its keys as a group's YAML
            found += members(index, entry, settings)
    return found


def named(index: dict, name: str, settings: dict) -> list[tuple[str, dict]]:
    """[(name, settings)] of a task, or of a group or tag and all in it. A tag has no settings and no score."""
    entry = index[name]
    if entry.kind.name in TASK_KINDS:
        return [(name, settings)]
    if entry.kind.name == "TAG":
        return [(name, settings), *((task, settings) for task in sorted(entry.tags))]
    return [(name, settings), *members(index, _group_config(entry), settings)]


def shots(own: int | None, given: int | None) -> int:
    """A task's demonstrations: its own, unless the recipe's num_fewshot is given; but lm-eval lets an own 0 win."""
    return (own if own == 0 or given is None else given) or 0


def settings_of_members(index: dict, names: list[str]) -> dict[str, dict]:
    """{task or group: what the recipe's groups set for it}, for all that `names` hold; the first mention counts."""
    found: dict[str, dict] = {}
    for name in names:
        for member, settings in named(index, name, {}) if name in index else []:
            found.setdefault(member, settings)
    return found


def _in_its_place(index: dict, name: str, known: dict[str, dict]) -> list[dict]:
    """Entries of a group's `task` list that build `name` as the recipe has it; a group that the recipe does not hold
    is opened, since what is in it may be the recipe's."""
    entry = index[name]
    if entry.kind.name in TASK_KINDS:
        return [{"task": name, **known.get(name, {})}]
    if name in known and entry.kind.name == "GROUP":
        return [{"group": name, **known[name]}]
    inside = children(index, name)
    return [item for child in inside for item in _in_its_place(index, child, known)]


def children(index: dict, name: str) -> list[str]:
    """The names right under a group or tag: "mmlu" -> ["mmlu_stem", "mmlu_other", …]; [] for a task."""
    entry = index[name]
    if entry.kind.name == "TAG":
        return sorted(entry.tags)
    names = listed(index, entry.cfg or {}) if entry.kind.name == "GROUP" else []
    return [child for child in names if child in index]


def part_of_recipe(index: dict, recipe_names: list[str], names: list[str]) -> list[dict]:
    """What stands for `names` in a group's `task` list, with the recipe's settings; [] if lm-eval's own way does.

    That is so where each name is one of the recipe's own, or no group of the recipe sets anything for it.
    """
    known = settings_of_members(index, recipe_names)
    named_alone = [name for name in names if name in index and name not in recipe_names]
    if not any(known.get(member) for name in named_alone for member, _ in named(index, name, {})):
        return []
    return [entry for name in names if name in index for entry in _in_its_place(index, name, known)]
