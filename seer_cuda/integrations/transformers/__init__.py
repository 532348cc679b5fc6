# SPDX-License-Identifier: Apache-2.0
"""Gates on Llama, Qwen2 and Qwen3 models of Hugging Face transformers (`docs/transformers.md`).

>>> from seer_cuda.integrations import transformers as seer_hf
>>> seer_hf.load_gates(model, "adapter")               # a released folder: attaches, then loads
>>> model.generate(**inputs)                           # sparse prefill, dense decode
>>> seer_hf.configure(model, rule=seer_cuda.Rule("density", 0.2, local=1))
>>> seer_hf.detach(model)                              # the model as it was

Nothing of transformers is imported before a function is called.
"""

from seer_cuda.integrations.transformers._attach import (
    attach,
    attached_config,
    configure,
    detach,
    gate_loss,
    gate_parameters,
    gates,
    observe,
)
from seer_cuda.integrations.transformers._config import Mode, SeerConfig
from seer_cuda.integrations.transformers._files import load_gates, save_gates

__all__ = [
    "Mode",
    "SeerConfig",
    "attach",
    "attached_config",
    "configure",
    "detach",
    "gate_loss",
    "gate_parameters",
    "gates",
    "load_gates",
    "observe",
    "save_gates",
]
