"""Prunes a model to 2:4 with llm-compressor: run by bench_peers.py in the environment that has it, and by nobody else.

The one argument is a JSON object: model, ids (an array of token ids, a window a row), method, out. Nothing of this
project is imported.
"""

import json
import sys

import numpy as np
import torch
from datasets import Dataset
from llmcompressor import oneshot
from transformers import AutoModelForCausalLM


def main(job: dict[str, str]) -> None:
    """Calibrates on all windows, prunes and saves."""
    if job["method"] == "wanda":
        from llmcompressor.modifiers.pruning import WandaPruningModifier as Modifier
    else:
        try:
            from llmcompressor.modifiers.pruning import SparseGPTModifier as Modifier
        except ImportError:  # before 0.8
            from llmcompressor.modifiers.obcq import SparseGPTModifier as Modifier
    windows = np.load(job["ids"]).tolist()
    data = Dataset.from_dict({"input_ids": windows, "attention_mask": [[1] * len(w) for w in windows]})
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype="auto")
    recipe = Modifier(sparsity=0.5, mask_structure="2:4", ignore=["re:.*lm_head"])
    with torch.no_grad():
        oneshot(
            model=model, dataset=data, recipe=recipe, max_seq_length=len(windows[0]),
            num_calibration_samples=len(windows),
        )  # fmt: skip
    model.save_pretrained(job["out"])


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
