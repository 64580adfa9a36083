"""Rebuild the demo model and the built-in texts that ship inside the package.

What: streamprune/demo_model/, a small trained Llama (three bf16 shards, byte-level BPE tokenizer, README,
licence), and streamprune/text/, calibration.txt.gz (from the train split) and heldout.txt.gz (never trained
on); together less than 3 MB.

Why: a random model cannot show what pruning costs. This one is trained, so perplexity tells methods apart,
and its text is what every CPython carries: the language reference in ``pydoc_data.topics`` and the docstrings
and comments of the standard library (read as source, never imported).

How:
    python tools/train_demo.py                               # the shipped files: under an hour on one core
    python tools/train_demo.py --minutes 5 --out build/demo  # a quick one

All randomness comes from --seed and one thread is used: the same CPython, torch, tokenizers and transformers
on the same kind of processor give the same bytes. With the defaults: held-out perplexity 30.3 per token.
"""

from __future__ import annotations

import argparse
import ast
import gzip
import inspect
import math
import platform
import random
import re
import shutil
import sysconfig
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from pydoc_data.topics import topics

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy, dropout
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, TokenizersBackend

PACKAGE = Path(__file__).resolve().parent.parent / "streamprune"
MAX_BYTES = 3_000_000
VOCAB = 2048
END = "<|endoftext|>"
DOCUMENT_BREAK = "\n\n\n"  # two blank lines; inside a document there is never more than one
SKIPPED = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "pydoc_data", "site-packages"}
CALIBRATION_CHARS = 360_000


def clean(text: str) -> str:
    """`text` without common indentation, trailing blanks and runs of blank lines."""
    text = re.sub(r"[ \f\r]+\n", "\n", inspect.cleandoc(text) + "\n")
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def module_texts(path: Path) -> Iterator[str]:
    """The docstrings of a source file, then its comments of three lines or more."""
    source = path.read_bytes()
    with warnings.catch_warnings(action="ignore"):  # about escapes such as "\\d"
        tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""
    for block in re.findall(r"(?:^[ \t]*#.*\n){3,}", source.decode("utf-8", "ignore"), re.MULTILINE):
        yield re.sub(r"^[ \t]*#+[!:]? ?", "", block, flags=re.MULTILINE)


def raw_documents() -> Iterator[Iterable[str]]:
    """The texts of each topic, longest first, then of each standard-library module, by path."""
    yield from ([text] for text in sorted(topics.values(), key=lambda text: (-len(text), text)))
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if not any(p in SKIPPED or p.startswith(("config-", "_sysconfigdata")) for p in parts):
            yield module_texts(path)


def documents() -> list[str]:
    """One cleaned text a topic or module. A paragraph of 20 characters or more occurs once in all of them."""
    seen: set[str] = set()
    result = []
    for texts in raw_documents():
        kept = []
        for text in map(clean, texts):
            for paragraph in text.split("\n\n"):
                key = " ".join(paragraph.split())
                if len(key) < 20 or key not in seen:
                    kept.append(paragraph)
                    seen.add(key)
        document = clean("\n\n".join(kept))
        if len(document) >= 200:
            result.append(document)
    return result


def take(pool: list[str], chars: int) -> tuple[list[str], list[str]]:
    """(taken, rest): from the front of `pool` what fits in `chars` characters; no text above a quarter."""
    taken, rest, left = [], [], chars
    for document in pool:
        if len(document) <= min(left, chars // 4):
            taken.append(document)
            left -= len(document)
        else:
            rest.append(document)
    return taken, rest


def train_tokenizer(docs: list[str]) -> TokenizersBackend:
    """A byte-level BPE of exactly VOCAB entries; `END` has id 0 and is never added by itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=[END], initial_alphabet=letters, show_progress=False)
    tokenizer.train_from_iterator(docs, trainer)
    return TokenizersBackend(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, clean_up_tokenization_spaces=False
    )


def new_model() -> LlamaForCausalLM:
    """1.3 M parameters, dropout in train mode. Eager attention is the faster one for short rows on a CPU."""
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=128, intermediate_size=320, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=512,
        tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, attn_implementation="eager",
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for name, module in model.named_modules():
        if name.endswith(("embed_tokens", "o_proj", "down_proj")):
            module.register_forward_hook(lambda module, _, out: dropout(out, 0.1, module.training))
    return model


def loss_of(model: LlamaForCausalLM, batch: Tensor) -> Tensor:
    """Mean next-token cross entropy in nats; `batch` is int64 (windows, length)."""
    logits = model(batch, use_cache=False).logits[:, :-1]
    return cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, ids: Tensor, window: int = 256) -> float:
    """Over whole windows of `ids` (int64, one dimension) that do not overlap; leaves `model` in eval mode."""
    model.eval()
    windows = ids[: len(ids) // window * window].view(-1, window)
    total = sum(loss_of(model, batch).item() * len(batch) for batch in windows.split(16))
    return math.exp(total / len(windows))


def train(model: LlamaForCausalLM, ids: Tensor, held: Tensor, args: argparse.Namespace) -> int:
    """AdamW, cosine schedule, 2048 tokens a step; the last fifth on windows of 512 instead of 256.

    With `args.minutes`: as many steps as fit, judged by the first 30. Returns the number of steps.
    """
    step, total, running = 0, args.steps, 0.0
    matrices, gains = ([p for p in model.parameters() if p.ndim == n] for n in (2, 1))
    groups = [{"params": matrices, "weight_decay": 0.2}, {"params": gains, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)
    draw = torch.Generator().manual_seed(args.seed)
    begin = time.monotonic()
    while step < total:
        if args.minutes and step == 30:
            total = max(60, int(args.minutes * 60 * 30 / (time.monotonic() - begin)))
        done = step / total
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * min((step + 1) / 200, 0.02 + 0.49 * (1 + math.cos(math.pi * done)))
        length = 512 if done >= 0.8 else 256
        starts = torch.randint(len(ids) - length, (2048 // length, 1), generator=draw)
        model.train()
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, ids[starts + torch.arange(length)])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        running = loss.item() if step == 0 else 0.99 * running + 0.01 * loss.item()
        step += 1
        if step % 500 == 0 or step == total:
            score = f"perplexity {math.exp(running):.2f}, held-out {perplexity(model, held):.2f}"
            print(f"step {step}/{total}, {time.monotonic() - begin:.0f} s: {score}", flush=True)
    return total


@torch.no_grad()
def spread_features(model: LlamaForCausalLM, seed: int, sigma: float = 1.0) -> None:
    """Give the input features of every linear log-normal scales and keep the function of the model.

    The writer of a feature (norm, v, up) is divided by s, the columns that read it are multiplied by s.
    """
    draw = torch.Generator().manual_seed(seed)
    group = model.config.num_attention_heads // model.config.num_key_value_heads
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for writer, readers in (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
            (attention.v_proj, (attention.o_proj,)),
            (mlp.up_proj, (mlp.down_proj,)),
        ):
            s = torch.exp(sigma * torch.randn(len(writer.weight), generator=draw))
            writer.weight /= s.view(-1, *[1] * (writer.weight.ndim - 1))
            if writer is attention.v_proj:
                s = s.view(-1, attention.head_dim).repeat_interleave(group, 0).flatten()
            for reader in readers:
                reader.weight *= s


README = """# The demo model of streamprune

A Llama of {parameters:,} parameters (6 layers, hidden size 128, vocabulary 2048, tied embeddings), bfloat16,
to show pruning on a trained model without a download; it is of no other use.

- Made by `python tools/train_demo.py --steps {steps} --seed {seed}` (CPython {python}, torch {torch}).
- Trained on {train_chars:,} characters = {train_tokens:,} tokens, seen {epochs:.1f} times.
- Held-out perplexity {perplexity:.2f} per token, {bits:.3f} bits per byte ({held_tokens:,} tokens).

**Text.** `pydoc_data.topics` and the docstrings and comments of the standard library, under the Python
Software Foundation License, version 2 (`LICENSE-TEXT`). Changes: indentation and repeated paragraphs dropped,
split by topic and module into train and held-out. `streamprune/text/` holds part of the train text and all
of the held-out part, under the same licence; two blank lines part the documents.

**Features of unequal scale.** In large language models the input features of a linear differ widely in scale,
in one this small far less (log scale: standard deviation about 0.25). So the norm gains, `v_proj` and `up_proj`
were divided by log-normal factors (sigma 1) after training, the columns that read them multiplied. The
function stays (largest change of a logit in float32: {change:.1e}), but the size of a weight alone no longer
says how much it matters.
"""


def build(folder: Path, args: argparse.Namespace) -> None:
    """Write demo_model/ and text/ into `folder`."""
    home, text = folder / "demo_model", folder / "text"
    home.mkdir()
    text.mkdir()
    shutil.copyfile(Path(sysconfig.get_path("stdlib")) / "LICENSE.txt", home / "LICENSE-TEXT")
    docs = documents()
    random.Random(args.seed).shuffle(docs)
    held_docs, train_docs = take(docs, sum(map(len, docs)) // 20)
    held_text = DOCUMENT_BREAK.join(held_docs) + "\n"
    sample = DOCUMENT_BREAK.join(take(train_docs, CALIBRATION_CHARS)[0]) + "\n"
    for name, content in (("heldout.txt.gz", held_text), ("calibration.txt.gz", sample)):
        (text / name).write_bytes(gzip.compress(content.encode(), mtime=0))  # equal text, equal bytes
    tokenizer = train_tokenizer(train_docs)
    tokenizer.save_pretrained(home)
    ids = torch.tensor([i for doc in tokenizer(train_docs)["input_ids"] for i in [*doc, 0]])
    held = torch.tensor(tokenizer(held_text)["input_ids"])

    model = new_model()
    steps = train(model, ids, held, args)
    before = model(held[None, :256]).logits
    spread_features(model, args.seed)
    change = (model(held[None, :256]).logits - before).abs().max().item()
    if change > 1e-3:
        raise SystemExit(f"spreading the features changed a logit by {change}")
    model.to(torch.bfloat16).save_pretrained(home, max_shard_size="1MB")

    saved = AutoModelForCausalLM.from_pretrained(home, dtype=torch.float32)
    held = torch.tensor(AutoTokenizer.from_pretrained(home)(held_text)["input_ids"])
    result = perplexity(saved, held)
    readme = README.format(
        parameters=saved.num_parameters(), steps=steps, seed=args.seed,
        python=platform.python_version(), torch=torch.__version__.partition("+")[0],
        train_chars=sum(map(len, train_docs)), train_tokens=len(ids), epochs=steps * 2048 / len(ids),
        perplexity=result, bits=math.log2(result) * len(held) / len(held_text.encode()),
        held_tokens=len(held), change=change,
    )  # fmt: skip
    (home / "README.md").write_text(readme)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if size >= MAX_BYTES:
        raise SystemExit(f"{size} bytes in all, the limit is {MAX_BYTES}")
    print(f"held-out perplexity {result:.2f} after {steps} steps; {size} bytes in all")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, default=8000, help="optimiser steps (default %(default)s)")
    length.add_argument("--minutes", type=float, help="train about this long instead: not reproducible")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=PACKAGE, help="folder for demo_model/ and text/")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.out) as folder:
        build(Path(folder), args)
        for path in Path(folder).glob("*/*"):
            path.chmod(0o644)
            (args.out / path.parent.name).mkdir(exist_ok=True)
            path.replace(args.out / path.parent.name / path.name)


if __name__ == "__main__":
    main()
