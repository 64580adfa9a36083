"""The model card of an output: README.md with the hub's metadata, which says what was done and how to load it.

The source's own card is kept beside it as README.source.md. Nothing in a card differs between a run that was
interrupted and one that was not: neither times nor memory. Of the source's metadata, its licence, languages, task and
base model are carried over; the hub has no relation for pruned models: `finetune` is its word for weights made from
others, `quantized` for those in fewer bits.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamprune.disk.checkpoint import Checkpoint
from streamprune.disk.header import open_file, read_bytes
from streamprune.disk.hub import hub_name, is_hub_name
from streamprune.disk.report import CARD
from streamprune.methods.recipes import Recipe
from streamprune.process.versions import versions
from streamprune.pruning.command import command_of
from streamprune.pruning.records import StageRecord
from streamprune.pruning.spec import JobSpec

_FRONT = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", re.DOTALL | re.MULTILINE)
_MOST_BYTES, _MOST_CHARACTERS = 1 << 20, 300
_CARRIED = ("license", "license_name", "license_link", "language", "pipeline_tag", "base_model", "base_model_relation")
_PLAIN = re.compile(r"[A-Za-z][\w./-]*")
_WORDS = {"y", "n", "yes", "no", "on", "off", "true", "false", "null"}
"""What YAML 1.1 takes for something else than text."""

Metadata = dict[str, str | list[str]]


def kept_as(carried: Collection[str]) -> dict[str, str]:
    """Side files of the source in whose place our card is, on any file system -> what each is called beside it."""
    heads = sorted({name.split("/")[0] for name in carried})
    taken, moved = {head.lower() for head in heads}, {}
    for head in heads:
        if head.lower() == CARD.lower():
            number = 1
            while (free := f"README.source{f'-{number}' if number > 1 else ''}.md").lower() in taken:
                number += 1
            taken.add(free.lower())
            moved[head] = free
    return {name: moved[head] + name[len(head) :] for name in carried if (head := name.split("/")[0]) in moved}


def metadata_of(path: Path) -> Metadata | None:
    """What a card says of itself, as far as it is text or a list of texts; None where that cannot be read."""
    import yaml

    with open_file(path) as f:
        text = read_bytes(f, path, min(path.stat().st_size, _MOST_BYTES)).decode("utf-8-sig", errors="replace")
    front = _FRONT.match(text)
    try:
        loader = getattr(yaml, "CBaseLoader", yaml.BaseLoader)  # to which every scalar is text
        found = yaml.load(front[1], Loader=loader) if front else {}
    except (yaml.YAMLError, ValueError, RecursionError):
        return None
    if not isinstance(found, dict):
        return None if found else {}
    kept = {key: found[key] for key in _CARRIED if key in found}
    kept = {k: value for k, value in kept.items() if all(map(_is_text, value if isinstance(value, list) else [value]))}
    base = kept.get("base_model", [])
    if not all(map(is_hub_name, base if isinstance(base, list) else [base])):  # a folder, which the hub refuses
        kept = {key: value for key, value in kept.items() if not key.startswith("base_model")}
    return kept


def _is_text(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= _MOST_CHARACTERS and value.isprintable()


@dataclass(frozen=True)
class _Source:
    """What is known of MODEL."""

    name: str
    """On the hub, or its folder's."""
    commit: str | None
    metadata: Metadata
    card: str | None
    """What its card is called beside ours."""
    readable: bool

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> _Source:
        kept = kept_as(checkpoint.side_files().carried)
        own = next((name for name in kept if "/" not in name), None)
        found = metadata_of(checkpoint.path / own) if own else {}
        metadata = dict(found or {})
        config: Mapping[str, Any] = checkpoint.config
        if "license" not in metadata and _is_text(config.get("license")):
            metadata["license"] = config["license"]
        hub = hub_name(checkpoint.path)
        if hub is not None:
            metadata["base_model"] = hub[0]
            metadata.pop("base_model_relation", None)
        name, commit = hub or (checkpoint.path.resolve().name, None)
        return cls(name, commit, metadata, kept[own] if own else None, found is not None)


def card_of(
    spec: JobSpec, checkpoint: Checkpoint, calibration: Mapping[str, Any], records: Sequence[StageRecord]
) -> bytes:
    """The text of the card. Raises CheckpointError where the source's cannot be read from the disk."""
    source, recipe = _Source.of(checkpoint), spec.recipe
    assert recipe is not None
    parts = [
        f"# {_plain(source.name)}, pruned", _about(source, recipe), _table(spec, recipe, calibration, records),
        _again(spec, source, calibration), _loading(spec, recipe, checkpoint.config), _afterwards(source),
    ]  # fmt: skip
    return (_front(spec, recipe, source.metadata) + "\n" + "\n\n".join(parts) + "\n").encode(errors="replace")


def _front(spec: JobSpec, recipe: Recipe, source: Metadata) -> str:
    found: Metadata = {
        key: source[key] for key in ("license", "license_name", "license_link", "language") if key in source
    }
    if "base_model" in source:
        relation = source.get("base_model_relation", "finetune")
        found |= {"base_model": source["base_model"]}
        found["base_model_relation"] = "quantized" if recipe.in_fp8 else relation
    tags = ["streamprune", "pruned", "sparse", *([spec.pattern] if spec.pattern else [])]
    tags += ["fp8", "compressed-tensors"] if recipe.in_fp8 else []
    found |= {
        "library_name": "transformers",
        "pipeline_tag": source.get("pipeline_tag", "text-generation"),
        "tags": tags,
    }
    lines = []
    for key, value in found.items():
        lines += (
            [f"{key}: {_scalar(value)}"] if isinstance(value, str) else [f"{key}:", *(f"- {_scalar(v)}" for v in value)]
        )
    return "\n".join(["---", *lines, "---", ""])


def _scalar(value: str) -> str:
    """A text in YAML: as it is where nobody takes it for anything else, or in JSON's quotes, which are YAML's, too."""
    plain = _PLAIN.fullmatch(value) and value.lower() not in _WORDS
    return value if plain else json.dumps(value, ensure_ascii=False)


def _about(source: _Source, recipe: Recipe) -> str:
    of = f" at commit `{source.commit}`" if source.commit else ""
    rest = "Embeddings, norms, biases, head and tokenizer are unchanged."
    if recipe.tune:
        rest = "Norms and biases of the layers were tuned as well; embeddings, head and tokenizer are unchanged."
    return (
        f"This is {_code(source.name)}{of}, with some weights of its linear layers set to zero by streamprune. {rest}"
    )


def _table(spec: JobSpec, recipe: Recipe, calibration: Mapping[str, Any], records: Sequence[StageRecord]) -> str:
    linears = [linear for record in records for linear in record.linears]
    pruned, weights = sum(n["pruned"] for n in linears), sum(n["rows"] * n["in_features"] for n in linears)
    asked = f"{spec.pattern}: {_pattern(spec.pattern)}" if spec.pattern else f"{100 * (spec.sparsity or 0):.4g} %"
    shared = f", shared out among layers by {recipe.allocate}" if recipe.allocate else " of each row"
    made = [f"{part} {getattr(recipe, part)}" for part in ("score", "selector", "refit", "quantize", "tune")
            if getattr(recipe, part) is not None and not (part == "selector" and spec.pattern)]  # fmt: skip
    rows = [
        ("recipe", f"{recipe.name} ({', '.join(made)})"),
        ("pruned", asked + ("" if spec.pattern else shared)),
        ("zeros", f"{100 * pruned / weights if weights else 0:.2f} % of {weights} weights in {len(linears)} linears"),
        ("kept weights", _values(recipe)),
    ]
    rows += [(f"{what} linears", _code(text)) for what, text in (("only", spec.only), ("not", spec.skip)) if text]
    if calibration.keys() >= {"text", "samples", "seqlen", "seed"}:
        windows = f"{calibration['samples']} windows of {calibration['seqlen']} tokens, seed {calibration['seed']}"
        of = ", of the built-in text" if calibration["text"] == "built-in" else ""
        share = calibration.get("replace_tokens")
        replaced = f"; {100 * share:.4g} % of the tokens of every second one are random" if share else ""
        rows.append(("calibrated on", windows + of + replaced))
    rows.append(("versions", ", ".join(f"{name} {version}" for name, version in versions().items())))
    return "\n".join(
        ["| | |", "|---|---|", *(f"| {name} | {text.replace('|', chr(92) + '|')} |" for name, text in rows)]
    )


def _pattern(pattern: str) -> str:
    kept, of = pattern.split(":")
    return f"{kept} of every {of} consecutive inputs are kept"


def _values(recipe: Recipe) -> str:
    if not recipe.aims and not recipe.in_fp8:
        return "unchanged, bit for bit"
    new = "new values, chosen so that outputs stay close to the dense model's" if recipe.aims else "unchanged"
    return new + (", stored in FP8 (E4M3, a scale for each output channel)" if recipe.in_fp8 else "")


def _again(spec: JobSpec, source: _Source, calibration: Mapping[str, Any]) -> str:
    job, drawn = spec.fixed(), ("samples", "seqlen", "seed")
    if spec.stats is not None and calibration.keys() >= {"digest", *drawn}:  # as if it had calibrated by itself
        job |= {"stats": None, "calib": calibration["digest"], **{key: calibration[key] for key in drawn}}
    text = calibration.get("text")  # its name is in the report; here, equal texts would make different outputs
    made = command_of(job, text if text in (None, "built-in") else "TEXT", source.name)
    made = "".join(c if c.isprintable() else "?" for c in made)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", made)), default=0))
    return f"Made with\n\n{fence}\n{made}\n{fence}"


def loader_of(config: Mapping[str, Any]) -> str:
    """The class of transformers that loads a model with this config.json."""
    kinds = config.get("architectures")
    sees = isinstance(kinds, list) and any(str(kind).endswith("ForConditionalGeneration") for kind in kinds)
    return "AutoModelForImageTextToText" if sees else "AutoModelForCausalLM"


def _loading(spec: JobSpec, recipe: Recipe, config: Mapping[str, Any]) -> str:
    kind = loader_of(config)
    remote = ", trust_remote_code=True" if "auto_map" in config else ""
    parts = ["## Loading", "```python\n"
             f"from transformers import AutoTokenizer, {kind}\n\n"
             f'model = {kind}.from_pretrained("OUT", dtype="auto"{remote})\n'
             f'tokenizer = AutoTokenizer.from_pretrained("OUT"{remote})\n```',
             "OUT is this folder, or its name on the hub."]  # fmt: skip
    if recipe.in_fp8:
        parts[-1] += (
            " The weights are in compressed-tensors' format `float-quantized`: `pip install compressed-tensors`."
        )
        if spec.only is None and spec.skip is None:
            parts.append("vLLM loads this format as well: `vllm serve OUT`.")
    else:
        parts.append(
            "Any program that loads the source loads this model: vLLM (`vllm serve OUT`), llama.cpp's converter and "
            "others. The zeros are stored like other numbers, so that the files are not smaller, and the model is not "
            "faster without kernels that make use of the zeros."
        )
    if spec.pattern == "2:4" and not recipe.quantize:
        parts.append(
            "The sparse kernels of NVIDIA's GPUs (Ampere and later) support the pattern 2:4, for example through "
            "Torch's `to_sparse_semi_structured`."
        )
    return "\n\n".join(parts)


def _afterwards(source: _Source) -> str:
    measure = "`python -m streamprune eval OUT --text FILE --reference MODEL`"
    parts = [
        "## What to know",
        f"Pruning changes the model's predictions. To measure by how much, run {measure}. What was done to each linear "
        "layer is in `streamprune.json`.",
    ]
    if source.card is not None:
        parts.append(f"The source's own card is [{source.card}]({source.card}). Its measurements are of the model "
                     "before pruning.")  # fmt: skip
        if not source.readable:
            parts[-1] += " Its metadata could not be read, and is left out here."
    if "license" not in source.metadata:
        parts.append("Neither the source's card nor its config.json names a licence.")
    return "\n\n".join(parts)


def _plain(text: str) -> str:
    shown = "".join(c if c.isprintable() else "?" for c in text[:_MOST_CHARACTERS])
    return re.sub(r"([\\`*_\[\]<>#|&])", r"\\\1", shown)


def _code(text: str) -> str:
    shown = "".join(c if c.isprintable() and c != "`" else "?" for c in text[:_MOST_CHARACTERS])
    return f"`{shown}`"
