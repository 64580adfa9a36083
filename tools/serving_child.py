"""One program that serves models, in an environment of its own: perplexity of token ids and tokens a second, as JSON.

    python serving_child.py PROGRAM MODEL IDS.npy

PROGRAM is transformers, vLLM or OpenVINO; IDS are windows of token ids (windows, tokens), which are scored
as they are. All compute in float32, so that perplexities can be compared. Needs neither streamprune nor anything else
beside the program. The speeds are medians: of a prompt of one window, and of tokens generated after it.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

NEW_TOKENS = 32
REPEAT = 3


class Served:
    """A model that a program has loaded."""

    version = ""

    def losses(self, ids: list[int]) -> list[float]:
        """Nats of each token but the first."""
        raise NotImplementedError

    def generate(self, ids: list[int], count: int) -> None:
        """Generates so many tokens, whatever they are."""
        raise NotImplementedError


def losses_of(logits: np.ndarray, ids: list[int]) -> list[float]:
    """Of logits (tokens, vocabulary)."""
    scores = logits[:-1].astype(np.float64)
    scores -= scores.max(1, keepdims=True)
    found = np.log(np.exp(scores).sum(1)) - scores[np.arange(len(ids) - 1), ids[1:]]
    return [float(nats) for nats in found]


class Transformers(Served):
    def __init__(self, model: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self.version = f"transformers {version('transformers')}"
        self._torch = torch
        self._model = self._load(AutoModelForCausalLM, model)

    def _load(self, kind: Any, model: Path) -> Any:
        return kind.from_pretrained(model, dtype=self._torch.float32).eval()

    def losses(self, ids: list[int]) -> list[float]:
        with self._torch.inference_mode():
            logits = self._model(input_ids=self._torch.tensor([ids])).logits[0]
        return losses_of(logits.float().numpy(), ids)

    def generate(self, ids: list[int], count: int) -> None:
        given = self._torch.tensor([ids])
        mask = self._torch.ones_like(given)
        self._model.generate(
            input_ids=given, attention_mask=mask, max_new_tokens=count, min_new_tokens=count, do_sample=False,
            pad_token_id=0,
        )  # fmt: skip


class OpenVINO(Transformers):
    def __init__(self, model: Path) -> None:
        import torch
        from optimum.intel import OVModelForCausalLM

        self.version = f"optimum-intel {version('optimum-intel')}, openvino {version('openvino')}"
        self._torch = torch
        how = {"INFERENCE_PRECISION_HINT": "f32"}
        self._model = OVModelForCausalLM.from_pretrained(model, export=True, load_in_8bit=False, ov_config=how)


class VLLM(Served):
    def __init__(self, model: Path) -> None:
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        from vllm import LLM, SamplingParams

        self.version = f"vLLM {version('vllm-cpu')}"
        self._params = SamplingParams
        self._model = LLM(
            model=str(model), dtype="float32", enforce_eager=True, max_model_len=512, enable_prefix_caching=False
        )

    def losses(self, ids: list[int]) -> list[float]:
        done = self._model.generate(
            {"prompt_token_ids": ids}, self._params(max_tokens=1, prompt_logprobs=0), use_tqdm=False
        )[0]
        told = done.prompt_logprobs[1:]
        return [-here[token].logprob for here, token in zip(told, ids[1:], strict=True)]

    def generate(self, ids: list[int], count: int) -> None:
        how = self._params(max_tokens=count, min_tokens=count, ignore_eos=True, temperature=0)
        self._model.generate({"prompt_token_ids": ids}, how, use_tqdm=False)


PROGRAMS: dict[str, Callable[[Path], Served]] = {
    "transformers": Transformers,
    "vLLM": VLLM,
    "OpenVINO": OpenVINO,
}


def seconds(work: Callable[[], object]) -> float:
    """Median of several calls after one that does not count."""
    work()
    taken = []
    for _ in range(REPEAT):
        begun = time.perf_counter()
        work()
        taken.append(time.perf_counter() - begun)
    return median(taken)


@contextmanager
def stdout_for_the_result() -> Iterator[int]:
    """Whatever a program prints to stdout goes to stderr; yields where the result goes."""
    kept = os.dup(1)
    os.dup2(2, 1)
    yield kept


def main() -> None:
    program, model, path = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    windows = [[int(i) for i in row] for row in np.load(path)]
    with stdout_for_the_result() as out:
        served = PROGRAMS[program](model)
        losses = [nats for ids in windows for nats in served.losses(ids)]
        prompt = seconds(lambda: served.losses(windows[0]))
        short = seconds(lambda: served.generate(windows[0][:16], 1))
        long = seconds(lambda: served.generate(windows[0][:16], 1 + NEW_TOKENS))
        found = {
            "version": served.version, "perplexity": float(np.exp(np.mean(losses))), "tokens": len(losses),
            "prompt_tokens_per_second": len(windows[0]) / prompt,
            "new_tokens_per_second": NEW_TOKENS / max(long - short, 1e-9),
        }  # fmt: skip
        os.write(out, json.dumps(found).encode() + b"\n")
    sys.stderr.flush()
    os._exit(0)  # without waiting for a program's threads


if __name__ == "__main__":
    importlib.invalidate_caches()
    main()
