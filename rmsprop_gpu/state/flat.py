"""A state dict as stored in files: arrays under ``<parameter>/<buffer>``, and all else as one JSON text."""

from __future__ import annotations

import json
import math
import numbers
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..arrays.checks import Problems, a, quoted
from ..arrays.real import one_real

HEADER = "rmsprop_gpu"  # the key of the text; keys of arrays all have a slash


def flattened(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The flat form of what `state_dict` returned.

    Raises
    ------
    TypeError
        Naming every key of a group whose value JSON cannot hold.

    Examples
    --------
    >>> from rmsprop_gpu import RMSProp
    >>> flat = flattened(RMSProp({"a/w": np.ones(2)}, clipnorm=0.5, momentum=0.9).state_dict())
    >>> list(flat)
    ['rmsprop_gpu', 'a/w/step', 'a/w/bias_weight', 'a/w/square_avg', 'a/w/momentum_buffer']
    >>> json.loads(flat["rmsprop_gpu"])["param_groups"][0]["clipnorm"]
    0.5
    """
    text = as_json({name: x for name, x in state_dict.items() if name != "state"})
    arrays = {f"{key}/{name}": x for key, buffers in state_dict["state"].items() for name, x in buffers.items()}
    return {HEADER: text, **arrays}


def as_json(frame: Mapping[str, Any]) -> str:
    """What a state dict has beside its arrays, as text; a TypeError names every key of a group that has no JSON."""
    problems = Problems()
    for i, group in enumerate(frame["param_groups"]):
        for name, value in group.items():
            try:
                json.dumps(value, default=_number)
            except (TypeError, ValueError, RecursionError) as error:
                found = f"param_groups[{i}][{quoted(name)}] is {a(type(value))}"
                problems.add(TypeError, f"{found}, which is not JSON ({error}); wanted numbers, texts, lists, mappings")
    problems.raise_any()
    return json.dumps(frame, default=_number)


def _number(x: object) -> bool | int | float:
    """A number from another library as Python's, which JSON writes to the last bit."""
    if isinstance(x, np.bool_):
        return bool(x)
    found = one_real(x)
    if isinstance(found, numbers.Integral):
        return int(found)
    if found is None or (float(found) != found and not math.isnan(found)):
        raise TypeError(f"it contains {a(type(x))}")
    return float(found)


def is_flat(saved: Mapping[Any, Any]) -> bool:
    """Is this the flat form, or arrays from one?"""
    return HEADER in saved or ("state" not in saved and any(isinstance(key, str) and "/" in key for key in saved))


def unflattened(flat: Mapping[Any, Any], problems: Problems) -> dict[str, Any]:
    """The state dict again, from any mapping: an open npz file has a 0-d array in place of the text."""
    state: dict[str, dict[str, Any]] = {}
    for key in flat:
        if key == HEADER:
            continue
        parameter, slash, buffer = key.rpartition("/") if isinstance(key, str) else ("", "", "")
        if slash:
            state.setdefault(parameter, {})[buffer] = flat[key]
        else:
            problems.add(ValueError, f'state_dict[{quoted(key)}] is not a "<parameter>/<buffer>"')
    return {**_header(flat, problems), "state": state}


def _header(flat: Mapping[Any, Any], problems: Problems) -> dict[str, Any]:
    where, wanted = f'state_dict["{HEADER}"]', "the JSON text that state_dict(flat=True) has there"
    if HEADER not in flat:
        problems.add(ValueError, f"{where} is missing; wanted {wanted} (safetensors stores it as metadata)")
        return {}
    text = flat[HEADER]
    if isinstance(text, np.ndarray) and text.shape == () and text.dtype.kind == "U":
        text = text.item()
    if not isinstance(text, str):
        problems.add(TypeError, f"{where} is {a(type(text))}; wanted {wanted}")
        return {}
    try:
        found = json.loads(text)
    except ValueError as error:
        problems.add(ValueError, f"{where} is not JSON ({error}); wanted {wanted}")
        return {}
    if not isinstance(found, dict):
        problems.add(ValueError, f"{where} is the JSON of {a(type(found))}; wanted {wanted}")
        return {}
    return found
