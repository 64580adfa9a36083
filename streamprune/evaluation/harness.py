"""streamprune as a model of lm-eval (EleutherAI's lm-evaluation-harness): its requests, in one pass layer by layer.

Texts become tokens as lm-eval's own `hf` model makes them: the same special tokens, the same split of context and
continuation, the same windows of a rolling likelihood, so that both give the same numbers. Text is scored and not
generated. Importing this file takes the package lm_eval, and registers the name `streamprune` with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NoReturn

import lm_eval.models  # noqa: F401 - its own models first: it looks for them only where no other is known
import numpy as np
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from streamprune.calibration.texts import check_bos
from streamprune.calibration.tokens import load_tokenizer
from streamprune.errors import CheckpointError, UsageError
from streamprune.evaluation.likelihoods import Likelihoods, likelihoods, open_model
from streamprune.evaluation.requests import Request
from streamprune.progress import ProgressCallback, show_progress
from streamprune.settings import Resources

Answer = tuple[float, bool] | float
"""Of a likelihood: its logarithm, and whether each token is the most likely one; of a rolling one: the logarithm."""

_KINDS = ("loglikelihood", "loglikelihood_rolling")


@register_model("streamprune")
class StreampruneLM(TemplateLM):  # type: ignore[misc]
    """A checkpoint, larger than memory or not: `lm_eval --model streamprune --model_args pretrained=OUT,max_ram=4GiB`.

    `max_length` is how many tokens it is given at the most, `add_bos_token` as for `hf`. lm-eval's batch sizes are
    ignored: memory says how large batches are. `ahead` are tasks whose requests may share the first pass, and
    `progress` is told the stages of each. Raises the errors of streamprune.errors.
    """

    def __init__(
        self, pretrained: str | Path, *, max_ram: str | int | None = None, max_vram: str | int | None = None,
        device: str | None = None, dtype: str = "auto", work: str | Path | None = None, trust_remote_code: bool = False,
        max_length: int | None = None, add_bos_token: bool | None = None, batch_size: object = None,
        max_batch_size: object = None, ahead: Iterable[Any] = (), progress: ProgressCallback | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self._checkpoint, self.max_length = open_model(pretrained, max_length)
        resources = Resources(device or "auto", dtype, max_ram=max_ram, max_vram=max_vram, work=work)
        self._how: dict[str, Any] = {
            "seqlen": max_length, "resources": resources, "trust_remote_code": bool(trust_remote_code)
        }  # fmt: skip
        self.tokenizer = load_tokenizer(self._checkpoint.path, bool(trust_remote_code))
        self._bos, self.ahead, self._progress = add_bos_token, ahead, progress
        self._known: dict[tuple[str, tuple[str, ...]], Answer] = {}
        self.passes: list[Likelihoods] = []
        """What each pass through the model was."""

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> Any:
        """As LM's, without lm-eval's own choice of a GPU where there is none."""
        return super().create_from_arg_string(arg_string, _without_default_device(additional_config))

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None) -> Any:
        """As LM's, without lm-eval's own choice of a GPU where there is none."""
        return super().create_from_arg_obj(arg_dict, _without_default_device(additional_config))

    @property
    def eot_token_id(self) -> int | None:
        """The token that ends a text."""
        found: int | None = self.tokenizer.eos_token_id
        return found

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context: BOS, or EOS. Raises CheckpointError where there is neither."""
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        raise CheckpointError(
            f"{self._checkpoint.path}: its tokenizer has no BOS and no EOS token, and a request without a context "
            "needs one to begin with"
        )

    @property
    def tokenizer_name(self) -> str:
        """For lm-eval's cache of requests."""
        return str(self._checkpoint.path)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Messages as text."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history, tokenize=False, add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )  # fmt: skip

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text, with the tokenizer's special tokens unless it begins with BOS already, or `add_bos_token`."""
        special = self._bos if add_special_tokens is None else add_special_tokens
        bos = self.tokenizer.bos_token
        if add_special_tokens is None and bos is not None and string.startswith(bos):
            special = False
        ids: list[int] = self.tokenizer.encode(string, **({} if special is None else {"add_special_tokens": special}))
        if special and self._bos and bos is not None and ids[:1] != [self.tokenizer.bos_token_id]:
            ids = [self.tokenizer.bos_token_id, *ids]
        return ids

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """The likelihood of each request's continuation after its context, and whether it is what comes first."""
        found: list[tuple[float, bool]] = self._answers("loglikelihood", requests)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The likelihood of each request's text as a whole."""
        found: list[float] = self._answers("loglikelihood_rolling", requests)
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> NoReturn:
        """Raises UsageError: layer by layer, each token would be a pass through the whole model."""
        names = ", ".join(sorted({str(r.task_name) for r in requests}))
        raise UsageError(f"{names}: asks for generated text, and streamprune only scores text; leave it out")

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        found = self._pass([_request(context, continuation) for _, context, continuation in requests])
        return list(zip(found.logprobs.tolist(), found.greedy.tolist(), strict=True))

    def _answers(self, kind: str, instances: Sequence[Any]) -> Any:
        if any((kind, i.args) not in self._known for i in instances):
            others = (i for task in self.ahead for i in task.instances if i.request_type in _KINDS)
            asked = {(kind, i.args): i for i in instances}
            asked |= {(i.request_type, i.args): i for i in others}
            self._learn({key: i for key, i in asked.items() if key not in self._known})
        return [self._known[kind, i.args] for i in instances]

    def _learn(self, asked: dict[tuple[str, tuple[str, ...]], Any]) -> None:
        requests: list[Request] = []
        spans = []
        for (kind, args), instance in asked.items():
            begin = len(requests)
            requests += self._rolling(*args) if kind == "loglikelihood_rolling" else [self._pair(instance, *args)]
            spans.append(slice(begin, len(requests)))
        found = self._pass(requests)
        for (kind, args), span in zip(asked, spans, strict=True):
            total = float(found.logprobs[span].sum())
            rolling = kind == "loglikelihood_rolling"
            self._known[kind, args] = total if rolling else (total, bool(found.greedy[span].all()))

    def _pass(self, requests: Sequence[Request]) -> Likelihoods:
        shown = nullcontext(self._progress) if self._progress else show_progress("streamprune", False)
        with shown as progress:
            found = likelihoods(self._checkpoint.path, requests, progress=progress, **self._how)
        self.passes.append(found)
        return found

    def _pair(self, instance: Any, context: str, continuation: str) -> Request:
        """One request. Raises UsageError where the continuation is no token of its own."""
        if context:
            before, after = self._encode_pair(context, continuation)
        else:
            before, after = [self.prefix_token_id], self.tok_encode(continuation, add_special_tokens=False)
            if after[:1] == before:
                before, after = after[:1], after[1:]
        if not before or not after:
            what = "context" if not before else "continuation"
            raise UsageError(
                f"task {instance.task_name}, document {instance.doc_id}: the {what} of {context[-20:]!r} + "
                f"{continuation[:40]!r} makes no token with this model's tokenizer"
            )
        return _request(before, after)

    def _rolling(self, text: str) -> list[Request]:
        """Windows in each of which something new is predicted, with as much before it as the model takes."""
        windows = get_rolling_token_windows(
            token_list=self.tok_encode(text), prefix_token=self.prefix_token_id, max_seq_len=self.max_length,
            context_len=1,
        )  # fmt: skip
        return [_request(*make_disjoint_window(window)) for window in windows]


def _without_default_device(given: dict[str, Any] | None) -> dict[str, Any]:
    """lm-eval asks for `cuda:0` unless it was told something else; its own models take the CPU where there is none."""
    none_there = not torch.cuda.is_available()
    return {k: v for k, v in (given or {}).items() if not (k == "device" and v == "cuda:0" and none_there)}


def bos_flag(mode: str) -> bool | None:
    """`add_bos_token` for "auto", "always" or "never". Raises UsageError for anything else."""
    check_bos(mode)
    return {"auto": None, "always": True, "never": False}[mode]


def _request(context: Sequence[int], continuation: Sequence[int]) -> Request:
    return Request(np.asarray([*context, *continuation], np.uint32), len(continuation))
