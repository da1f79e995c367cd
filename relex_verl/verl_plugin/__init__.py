"""verl loads this module in the driver and in every Ray worker, at the end of `import verl` (entry point `verl.plugins`).

It only registers: the options `+relex=...` once Hydra is imported, the trainers once verl's own are. A run without
`+relex=...` pays for two import hooks and nothing else.
"""

import logging

try:
    from relex_verl.verl_plugin.registration import register

    register()
except Exception:
    # verl logs a plugin that fails to load at DEBUG only; the user would train without RELEX and not know it.
    logging.getLogger("relex_verl").error("relex-verl could not be loaded; +relex=... will not work", exc_info=True)
    raise
