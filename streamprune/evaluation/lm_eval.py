"""`python -m streamprune.evaluation.lm_eval …`: lm-eval's own command line, which then knows `--model streamprune`.

Releases of lm-eval up to 0.4.13 do not look for models of other packages; later ones find it by its entry point.
"""

from __future__ import annotations

from lm_eval.__main__ import cli_evaluate

import streamprune.evaluation.harness  # noqa: F401 - registers the name

if __name__ == "__main__":
    cli_evaluate()
