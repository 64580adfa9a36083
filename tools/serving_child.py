"""One program that serves models, in an environment of its own: perplexity of token ids, or tokens a second, as JSON.

    python serving_child.py PROGRAM MODEL IDS.npy [--speed]

PROGRAM is transformers, vLLM, OpenVINO or llama.cpp, whose MODEL is a GGUF file; IDS are windows of token ids (windows,
tokens), which are scored as they are. Perplexities are computed in float32, so that they can be compared. --speed loads
the model in bfloat16, prints a line when it is there, and then measures once for every line on stdin, so that several
models can take turns. Needs neither streamprune nor anything else beside the program.
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

PROMPT, NEW_TOKENS = 16, 128
"""Tokens of the prompt that others are generated after, and how many: greedily, one sequence."""
MOST_TOKENS = 512


class Served:
    """A model that a program has loaded, computing in `dtype`: float32 or bfloat16."""

    version = ""

    def losses(self, ids: list[int]) -> list[float]:
        """Nats of each token but the first."""
        raise NotImplementedError

    def generate(self, ids: list[int], count: int) -> None:
        """Generates so many tokens greedily, whatever they are."""
        raise NotImplementedError


def losses_of(logits: np.ndarray, ids: list[int]) -> list[float]:
    """Of logits (tokens, vocabulary)."""
    scores = logits[:-1].astype(np.float64)
    scores -= scores.max(1, keepdims=True)
    found = np.log(np.exp(scores).sum(1)) - scores[np.arange(len(ids) - 1), ids[1:]]
    return [float(nats) for nats in found]


class Transformers(Served):
    def __init__(self, model: Path, dtype: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self.version = f"transformers {version('transformers')}, torch {version('torch').partition('+')[0]}"
        self._torch = torch
        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()

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
    def __init__(self, model: Path, dtype: str) -> None:
        import torch
        from optimum.intel import OVModelForCausalLM

        self.version = f"OpenVINO {version('openvino')} through optimum-intel {version('optimum-intel')}"
        self._torch = torch
        how = {"INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[dtype]}
        self._model = OVModelForCausalLM.from_pretrained(model, export=True, load_in_8bit=False, ov_config=how)


class VLLM(Served):
    def __init__(self, model: Path, dtype: str) -> None:
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        from vllm import LLM, SamplingParams

        self.version = f"vLLM {version('vllm-cpu')} (vllm-cpu)"
        self._params = SamplingParams
        self._model = LLM(
            model=str(model), dtype=dtype, enforce_eager=True, max_model_len=MOST_TOKENS, enable_prefix_caching=False
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


class LlamaCpp(Served):
    def __init__(self, model: Path, dtype: str) -> None:
        from llama_cpp import GGML_TYPE_F32, Llama

        self.version = f"llama.cpp of llama-cpp-python {version('llama-cpp-python')}"
        exact = dtype == "float32"
        how = {"logits_all": True, "type_k": GGML_TYPE_F32, "type_v": GGML_TYPE_F32} if exact else {}
        cores = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
        self._model = Llama(
            str(model), n_ctx=MOST_TOKENS, n_threads=cores, n_threads_batch=cores, verbose=False, **how
        )  # fmt: skip

    def losses(self, ids: list[int]) -> list[float]:
        self._model.reset()
        self._model.eval(ids)
        return losses_of(self._model.scores[: len(ids)], ids)

    def generate(self, ids: list[int], count: int) -> None:
        for _ in itertools.islice(self._model.generate(ids, temp=0.0, repeat_penalty=1.0), count):
            pass
        self._model.reset()


PROGRAMS: dict[str, Callable[[Path, str], Served]] = {
    "transformers": Transformers,
    "vLLM": VLLM,
    "OpenVINO": OpenVINO,
    "llama.cpp": LlamaCpp,
}


def seconds(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def speed(served: Served, window: list[int]) -> dict[str, float]:
    """Tokens a second, once: of a prompt of one window, and of new tokens after a short one."""
    prompt = seconds(lambda: served.generate(window, 1))
    short = seconds(lambda: served.generate(window[:PROMPT], 1))
    long = seconds(lambda: served.generate(window[:PROMPT], 1 + NEW_TOKENS))
    return {"prompt": len(window) / prompt, "new": NEW_TOKENS / max(long - short, 1e-9)}


@contextmanager
def stdout_for_the_result() -> Iterator[int]:
    """Whatever a program prints to stdout goes to stderr; yields where the result goes."""
    kept = os.dup(1)
    os.dup2(2, 1)
    yield kept


def main() -> None:
    program, model, path = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    windows = [[int(i) for i in row] for row in np.load(path)]
    timed = sys.argv[4:] == ["--speed"]
    with stdout_for_the_result() as out:
        served = PROGRAMS[program](model, "bfloat16" if timed else "float32")
        found: dict[str, Any] = {"version": served.version}
        if not timed:
            losses = [nats for ids in windows for nats in served.losses(ids)]
            found |= {"perplexity": float(np.exp(np.mean(losses))), "tokens": len(losses)}
        os.write(out, json.dumps(found).encode() + b"\n")
        for _ in sys.stdin if timed else ():
            os.write(out, json.dumps(speed(served, windows[0])).encode() + b"\n")
    sys.stderr.flush()
    os._exit(0)  # without waiting for a program's threads


if __name__ == "__main__":
    importlib.invalidate_caches()
    main()
