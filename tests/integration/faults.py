"""Stand-in for bad luck: loaded into every process of a run by VERL_USE_EXTERNAL_MODULES, breaks what FAULT names."""

import os

import wrapt


def _break(module: object) -> None:
    where, _, what = os.environ.get("FAULT", "").partition(":")
    if getattr(module, "__name__", "") != where:
        return
    owner, _, name = what.rpartition(".")
    target = getattr(module, owner) if owner else module

    def broken(*_: object, **__: object) -> None:
        raise OSError("injected: the disk is on fire")

    setattr(target, name, broken)


for _name in ("relex_verl.observer", "relex_verl.tracking", "relex_verl.report"):
    wrapt.register_post_import_hook(_break, _name)
