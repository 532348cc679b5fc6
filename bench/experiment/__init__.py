# SPDX-License-Identifier: Apache-2.0
"""The learned system at work: a model trained from scratch to 32k context, gates distilled for it,
its perplexity by density, and the time of whole prefills (docs/experiment.md).

    python -m bench.experiment all --folder DIR       every stage, each goes on where it was killed
    python -m bench.experiment train --folder DIR     one stage
    python -m bench.experiment page                   docs/experiment.md and its figures
"""
