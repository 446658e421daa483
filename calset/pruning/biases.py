"""Which linears of a model can have a bias that its checkpoint carries and transformers loads again.

A bias that is there can change. One that is not can be added where a switch of the model's config (``attention_bias``,
``mlp_bias``) makes transformers build the linear with it, as in Llama and Qwen3: the switch is turned on in the new
checkpoint's config.json, and every linear that it gives a bias gets one. Anywhere else an added bias would be lost on
loading. It must not know methods.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from calset.pruning.decoder import find_decoder
from calset.pruning.layout import parameters_on_meta, quiet

SWITCHES = ("attention_bias", "mlp_bias")


@dataclass(frozen=True, slots=True)
class Carriers:
    """``linears``: full names of those that can have a bias. ``switches``: what the config must say for that."""

    linears: frozenset[str]
    switches: Mapping[str, bool]


def find_carriers(
    config: Any, wanted: Collection[str] | None = None, can_add: Callable[[str], bool] = lambda name: True
) -> Carriers:
    """Look at the model that transformers builds from the config, as it is and with each switch turned on.

    Args:
        wanted: the linears that are pruned: a switch that gives none of them a bias stays off; default: all.
        can_add: whether the checkpoint can hold a bias for a linear that has none.
    """
    before = _parameters(config)
    found = set(before["biased"])
    switches = {}
    changed = copy.deepcopy(config)
    for switch in SWITCHES:
        # Only of a plain text model: in a nested config a switch may mean the vision tower's.
        if getattr(config, switch, None) is not False or config.get_text_config() is not config:
            continue
        trial = copy.deepcopy(changed)
        setattr(trial, switch, True)
        after = _parameters(trial)
        gained = after["biased"] - before["biased"]
        new = gained - found
        # The switch does nothing else, and everything is where it was.
        is_clean = gained >= found - before["biased"] and after["all"] ^ before["all"] == {f"{n}.bias" for n in gained}
        if is_clean and all(map(can_add, new)) and (new if wanted is None else new & set(wanted)):
            found |= gained
            switches[switch] = True
            changed = trial
    return Carriers(frozenset(found), switches)


def _parameters(config: Any) -> dict[str, set[str]]:
    """Names of all parameters, and of the decoder's linears with a bias."""
    from transformers import AutoModelForCausalLM

    with parameters_on_meta(), quiet():
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    linears = find_decoder(model, allow_partial=True).linears()
    return {
        "all": {name for name, _ in model.named_parameters()},
        "biased": {name for name, linear in linears.items() if linear.bias is not None},
    }
