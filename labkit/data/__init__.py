"""From files of rows to `datasets.Dataset`: reading, checking, splitting, mixing, masks.

A function's module is imported when the function is first used, so that `labkit validate` does not
wait for transformers and datasets.

>>> from labkit import data
>>> data.to_messages({"instruction": "Add 2 and 3.", "output": "5"})["messages"][1]
{'role': 'assistant', 'content': '5'}
"""

import importlib

_HOME = {
    "CODES": "problems",
    "Problem": "problems",
    "read_rows": "rows",
    "detect_format": "formats",
    "to_messages": "formats",
    "validate": "validation",
    "FixReport": "fixing",
    "fix": "fixing",
    "validate_file": "fixing",
    "as_dataset": "tables",
    "load_task": "tables",
    "to_prompt_completion": "tables",
    "leaks": "splits",
    "split_by_key": "splits",
    "validate_splits": "splits",
    "Mixture": "mixing",
    "MixReport": "mixing",
    "mix": "mixing",
    "MaskView": "masks",
    "mask_view": "masks",
    "token_lengths": "masks",
}


def __getattr__(name: str):
    """Import the module of a public name on first use (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"labkit.data has no {name!r}; it has {', '.join(_HOME)}")
    return getattr(importlib.import_module(f"labkit.data.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
