"""Which parameters of an engine are one and the same, as transformers sees it."""

from typing import Any

from relex_verl.verl_plugin.hub_layout import HubLayout, model_of

__all__ = ["tied_names"]


def tied_names(engine: Any, layout: HubLayout) -> dict[str, str]:
    """Tied name -> the name that holds its elements, both of the engine; empty where nothing is tied.

    transformers asks the top level of the configuration (and its class, where that is silent), and unties what a checkpoint
    stores twice with different values. Of the names of one tensor the one counts that the checkpoint has.
    """
    model = model_of(engine)
    declared = getattr(model, "all_tied_weights_keys", None)
    if declared is None:  # no model of transformers 5
        if not getattr(getattr(engine.model_config, "hf_config", None), "tie_word_embeddings", False):
            return {}
        declared = getattr(model, "_tied_weights_keys", None)
    if not isinstance(declared, dict):
        declared = {"lm_head.weight": "model.embed_tokens.weight"}
    ties: dict[str, str] = {}
    for holder in dict.fromkeys(declared.values()):
        names = [holder, *(tied for tied, name in declared.items() if name == holder)]
        chosen = next((name for name in names if layout.is_stored(name)), holder)
        ties |= {name: chosen for name in names if name != chosen}
    return ties
