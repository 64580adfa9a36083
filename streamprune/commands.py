"""What each command does: calls the function of that name, and prints what it returns.

Results are text or JSON on stdout, everything else goes to stderr. Each takes the parsed arguments and returns the exit
code.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from streamprune.arguments import Handler, check_eval, settings_of
from streamprune.disk.claims import check_folder
from streamprune.errors import UsageError
from streamprune.methods.recipes import Recipe
from streamprune.process.console import print_stderr, stdout_kept_clean
from streamprune.process.imports import many_imports
from streamprune.process.output import print_json, say, sum_up
from streamprune.settings import Calibration, Resources, flags_of

if TYPE_CHECKING:
    from streamprune.packing.job import PackResult
    from streamprune.pruning.job import JobResult


def _job(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments that `prune` and `plan` have in common. Raises UsageError for invalid ones."""
    amount = args.sparsity if args.pattern is None else args.pattern
    changes = {name: getattr(args, name) for name, *_ in flags_of(Recipe)}
    if args.pattern is not None and args.selector is not None:
        why = "keeps the highest scores of each group, whatever the selector is"
        _tell_notes(args, [f"--pattern {args.pattern} {why}, so that --selector {args.selector} made no difference"])
    return {
        **({} if amount is None else {"amount": amount}), "recipe": Recipe.named(args.method, **changes),
        "calibration": settings_of(Calibration, args), "resources": settings_of(Resources, args),
        **{k: getattr(args, k) for k in ("stats", "propagate", "only", "skip", "fetch", "trust_remote_code")},
    }  # fmt: skip


def _prune(args: argparse.Namespace) -> int:
    from streamprune.process.memory import format_bytes
    from streamprune.progress import show_progress
    from streamprune.pruning.announce import next_steps
    from streamprune.pruning.job import prune

    job = _job(args)
    if "amount" not in job:
        raise UsageError("say how much to prune: either --sparsity S or --pattern N:M")
    with show_progress("prune", args.quiet) as progress:
        result = prune(
            args.model, args.out, **job, save_stats=args.save_stats, follow_links=args.follow_links,
            allow_zeros=args.allow_zeros, shard_size=args.shard_size, restart=args.restart, progress=progress,
            dry_run=args.dry_run, tell=None if args.quiet else progress.say,
        )  # fmt: skip
    if args.dry_run:
        return _print_dry_run(args, job, result)
    if args.json:
        print_json({
            "status": result.status, "out": str(result.out), "recipe": result.recipe, "sparsity": result.sparsity,
            "seconds": result.seconds, "peak_rss_bytes": result.peak_rss_bytes,
        })  # fmt: skip
    elif not args.quiet:
        share = f"{result.recipe}, {100 * (result.sparsity or 0):.2f} % of the weights in pruned linears"
        if result.status == "done":
            share += f", {result.seconds:.1f} s, peak {format_bytes(result.peak_rss_bytes)}"
        sum_up(f"{result.out}: {result.status} ({share})")
    _tell_notes(args, result.notes)
    if result.status == "done" and not args.quiet:
        for line in next_steps(args.model, result.out, result.report["job"]):
            print_stderr(f"prune: {line}")
    return 0


def _print_dry_run(args: argparse.Namespace, job: dict[str, Any], result: JobResult) -> int:
    found = None
    if result.status in ("would begin", "would resume"):
        from streamprune.planning.plan import plan
        from streamprune.tables import plan_table

        with stdout_kept_clean():
            found = plan(args.model, **job, save_stats=args.save_stats)
        if not args.json and not args.quiet:
            say(plan_table(found) + "\n")
    if args.json:
        print_json({"status": result.status, "out": str(result.out), "plan": found and found.to_json()})
    elif not args.quiet:
        sum_up(f"{result.out}: {result.status} (a dry run: nothing was written)")
    _tell_notes(args, result.notes)
    return 0


def _calibrate(args: argparse.Namespace) -> int:
    from streamprune.process.memory import format_bytes
    from streamprune.progress import show_progress
    from streamprune.pruning.job import calibrate

    with show_progress("calibrate", args.quiet) as progress:
        result = calibrate(
            args.model, args.out, calibration=settings_of(Calibration, args), resources=settings_of(Resources, args),
            allow_zeros=args.allow_zeros, restart=args.restart, fetch=args.fetch,
            trust_remote_code=args.trust_remote_code, progress=progress,
        )  # fmt: skip
    if args.json:
        print_json({
            "status": result.status, "out": str(result.out), "seconds": result.seconds,
            "peak_rss_bytes": result.peak_rss_bytes, **{k: v for k, v in result.report.items() if k == "ranks"},
        })  # fmt: skip
    elif not args.quiet:
        cost = (
            f" ({result.seconds:.1f} s, peak {format_bytes(result.peak_rss_bytes)})" if result.status == "done" else ""
        )
        sum_up(f"{result.out}: {result.status}{cost}")
    _tell_notes(args, result.notes)
    return 0


def _eval(args: argparse.Namespace) -> int:
    check_folder(args.model)
    check_eval(args)
    if args.tasks is not None:
        return _eval_tasks(args)
    with many_imports():
        from streamprune.evaluation.evaluate import evaluate
    from streamprune.progress import show_progress
    from streamprune.tables import evaluation_lines

    with show_progress("eval", args.quiet) as progress:
        found = evaluate(
            args.model, args.text, reference=args.reference, seqlen=args.seqlen, windows=args.windows,
            text_field=args.text_field, bos=args.bos, resources=settings_of(Resources, args),
            trust_remote_code=args.trust_remote_code, progress=progress,
        )  # fmt: skip
    _tell_models(args)
    if args.json:
        print_json(found.to_json(args.model, args.text, args.reference, by_window=args.by_window))
    else:
        say(evaluation_lines(found))
    return 0


def _tell_models(args: argparse.Namespace) -> None:
    from streamprune.pruning.announce import what_is

    for name in () if args.quiet else filter(None, (args.model, args.reference)):
        print_stderr(f"eval: {name}: {what_is(name)}")


def _eval_tasks(args: argparse.Namespace) -> int:
    with many_imports():
        from streamprune.evaluation.tasks import evaluate_tasks
    from streamprune.progress import show_progress
    from streamprune.tables import task_table

    own = ("reference", "num_fewshot", "limit", "include_path", "seqlen", "bos", "trust_remote_code")
    given = {k: getattr(args, k) for k in own} | {"resources": settings_of(Resources, args)}
    with show_progress("eval", args.quiet) as progress:
        found = evaluate_tasks(args.model, args.tasks, **given, progress=progress)
    _tell_models(args)
    print_json(found.to_json(args.model, args.reference)) if args.json else say(task_table(found))
    return 0


def _inspect(args: argparse.Namespace) -> int:
    with many_imports():
        from streamprune.inspection.inspect import inspect
    from streamprune.tables import inspection_table

    found = inspect(args.model, **{k: getattr(args, k) for k in ("against", "expect", "only", "skip", "quiet")})
    if args.json:
        print_json(found.to_json())
    elif not args.quiet:
        say(inspection_table(found))
    for failure in found.failures[:10]:
        print_stderr(f"streamprune: {failure}")
    return 0 if found.ok is not False else 2


def _plan(args: argparse.Namespace) -> int:
    check_folder(args.model)
    with many_imports():
        from streamprune.planning.plan import plan
    from streamprune.tables import plan_table

    with stdout_kept_clean():
        found = plan(args.model, nproc=args.nproc, **_job(args))
    if args.json:
        print_json(found.to_json())
    elif not args.quiet:
        say(plan_table(found))
    return 0


def _report(args: argparse.Namespace) -> int:
    from streamprune.process.memory import format_bytes
    from streamprune.reporting.page import report

    made = report(args.outs, args.output, against=args.against, eval=args.eval)
    if args.json:
        print_json({"path": str(made.path), "models": made.models, "bytes": made.bytes})
    elif not args.quiet:
        what = f"{made.models} model{'' if made.models == 1 else 's'}"
        sum_up(f"{made.path}: {what}, {format_bytes(made.bytes)}; open it in a browser")
    return 0


def _pack(args: argparse.Namespace) -> int:
    from streamprune.packing.job import pack
    from streamprune.progress import show_progress

    with show_progress("pack", args.quiet) as progress:
        result = pack(
            args.model, args.out, layout=args.layout, follow_links=args.follow_links, restart=args.restart,
            progress=progress,
        )  # fmt: skip
    return _print_packed(args, result)


def _unpack(args: argparse.Namespace) -> int:
    from streamprune.packing.job import unpack
    from streamprune.progress import show_progress

    with show_progress("unpack", args.quiet) as progress:
        result = unpack(args.model, args.out, restart=args.restart, progress=progress)
    return _print_packed(args, result)


def _print_packed(args: argparse.Namespace, result: PackResult) -> int:
    from streamprune.process.memory import format_bytes

    if args.json:
        print_json({
            "status": result.status, "out": str(result.out), "layout": result.layout,
            "bytes_before": result.bytes_before, "bytes_after": result.bytes_after,
            "seconds": result.seconds, "peak_rss_bytes": result.peak_rss_bytes, "left_out": list(result.left_out),
        })  # fmt: skip
    elif not args.quiet:
        share = 100 * result.bytes_after / result.bytes_before
        sizes = f"{format_bytes(result.bytes_before)} to {format_bytes(result.bytes_after)}, {share:.2f} %"
        cost = f", {result.seconds:.1f} s, peak {format_bytes(result.peak_rss_bytes)}"
        sum_up(f"{result.out}: {result.status} ({result.layout}, {sizes}{cost if result.status == 'done' else ''})")
        if result.left_out:
            sum_up(f"files not packed, as no loader of the model reads them: {', '.join(result.left_out)}")
    _tell_notes(args, result.notes)
    return 0


def _upload(args: argparse.Namespace) -> int:
    from streamprune.process.memory import format_bytes
    from streamprune.publishing.upload import upload

    with stdout_kept_clean():
        done = upload(args.out, args.name, private=args.private, dry_run=args.dry_run)
    if args.json:
        print_json(asdict(done))
    elif not args.quiet:
        what = f"{len(done.files)} files, {format_bytes(done.bytes)}"
        sum_up(f"{done.name}: {what} (a dry run: nothing was sent)" if args.dry_run else f"{done.url}: {what}")
    left_out = ", ".join(done.left_out)
    _tell_notes(args, [f"files not sent, as they are no part of the output: {left_out}"] if left_out else [])
    return 0


def _demo(args: argparse.Namespace) -> int:
    from streamprune.demo import run_demo
    from streamprune.progress import show_progress
    from streamprune.tables import demo_table

    with show_progress("demo", args.quiet) as progress:
        rows = run_demo(progress)
    if args.json:
        print_json({"models": rows})
    elif not args.quiet:
        say(demo_table(rows))
    return 0


def _tell_notes(args: argparse.Namespace, notes: Sequence[str]) -> None:
    for note in () if args.quiet else notes:
        print_stderr(f"streamprune: note: {' '.join(note.split())}")


COMMANDS: dict[str, Handler] = {
    "prune": _prune, "calibrate": _calibrate, "eval": _eval, "inspect": _inspect, "plan": _plan, "report": _report,
    "pack": _pack, "unpack": _unpack, "upload": _upload, "demo": _demo,
}  # fmt: skip
