"""Compare what STAC, torch's optimizers and others train to, each tuned with the same effort, on tasks of many kinds.

    python examples/benchmark_quality.py --out quality --jobs 2

Every contestant tries the same number of values of its learning rates and decay, on tuning seeds; the best by the final
metric runs again on fresh seeds, and only those are reported. All start from the same weights and see the same batches,
under the same clipping and schedule (schedule-free ones have none); each run has one thread. The folder gets the report
(results.md, results.json, drawings) after each task, and every finished run in runs.jsonl: with --resume the same
command goes on after a kill, and one of more tasks, contestants, trials or seeds adds to what is there.

The extra ``bench`` brings what others need; a contestant or task that cannot run is left out with the reason. Two
minutes of it all: --quick.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmark_report import describe_machine
from command_line import Parser, at_least_one, output_folder, whole_number
from quality.contestants import ADAMW, CONTESTANTS
from quality.plots import draw
from quality.results import Result, results_of
from quality.tables import as_markdown, write_json
from quality.tasks import DEFAULT_TASKS, TASKS
from quality.tournament import FIRST_TUNING_SEED, Plan, Tournament, load_records, read_plugin, workers

QUICK_TASKS = ["wave-pinn", "photo"]
QUICK_CONTESTANTS = [ADAMW, "Lion", "STAC cautious", "STAC Muon"]
QUICK = {"trials": 2, "seeds": 2, "steps": 200}


def make_parser() -> Parser:
    """Return a parser with all options."""
    parser = Parser(__doc__)
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help=f"of {', '.join(TASKS)} (default: all but the last)")
    parser.add_argument("--contestants", nargs="+", metavar="NAME", help=f"of {', '.join(CONTESTANTS)} (default: all)")
    parser.add_argument("--trials", type=at_least_one, help="values that each contestant tries (default: 8)")
    parser.add_argument("--tuning-seeds", type=at_least_one, default=1, help="seeds of a trial (default: %(default)s)")
    parser.add_argument(
        "--seeds", type=whole_number(1, FIRST_TUNING_SEED), help="fresh seeds of each winner (default: 5)"
    )
    parser.add_argument("--steps", type=at_least_one, help="the most that a run takes (default: as the task says)")
    parser.add_argument("--jobs", type=at_least_one, default=1, help="processes that train (default: %(default)s)")
    parser.add_argument("--out", type=output_folder, default=Path("quality"), help="(default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on with the runs that --out holds")
    parser.add_argument("--plugin", metavar="MODULE", help="a module that adds to CONTESTANTS or TASKS when imported")
    parser.add_argument("--quick", action="store_true", help="two tasks, four contestants, few and short runs")
    return parser


def chosen(parser: Parser, option: str, given: list[str] | None, known: Sequence[str], default: list[str]) -> list[str]:
    """Return the names that are meant, each once."""
    for name in given or []:
        if name not in known:
            parser.error(f"argument {option}: {name!r} is none of {', '.join(map(repr, known))}")
    return list(dict.fromkeys(given or default))


def report(tournament: Tournament, task: str, folder: Path, command: str) -> None:
    """Write what is known once a task is done."""
    machine = describe_machine(torch.device("cpu"))
    results = results_of(tournament)
    (folder / "results.md").write_text(as_markdown(tournament, results, command, machine), encoding="utf-8")
    write_json(tournament, results, folder / "results.json", command, machine)
    draw(task, [result for result in results if result.task == task], folder)


def main(argv: Sequence[str] | None = None) -> list[Result]:
    """Run the comparison, write and print the report, and return the results."""
    parser = make_parser()
    options = parser.parse_args(argv)
    try:
        read_plugin(options.plugin)
    except ImportError as error:
        parser.error(f"argument --plugin: {error}")
    quick = QUICK if options.quick else {}
    contestants = list(CONTESTANTS)
    plan = Plan(
        tasks=chosen(parser, "--tasks", options.tasks, list(TASKS), QUICK_TASKS if quick else DEFAULT_TASKS),
        contestants=chosen(
            parser, "--contestants", options.contestants, contestants, QUICK_CONTESTANTS if quick else contestants
        ),
        trials=options.trials or quick.get("trials", 8),
        tuning_seeds=options.tuning_seeds,
        seeds=options.seeds or quick.get("seeds", 5),
        steps=options.steps or quick.get("steps"),
    )
    path = options.out / "runs.jsonl"
    if path.exists() and not options.resume:
        parser.error(f"{path} holds the runs of an earlier comparison: go on with --resume, or name another --out")
    try:
        records = load_records(path)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    options.out.mkdir(parents=True, exist_ok=True)

    command = shlex.join(["python", "examples/benchmark_quality.py", *(sys.argv[1:] if argv is None else argv)])
    with workers(options.jobs, options.plugin) as pool:
        tournament = Tournament(plan=plan, path=path, pool=pool, jobs=options.jobs, records=records)
        tournament.play(lambda task: report(tournament, task, options.out, command))
    print((options.out / "results.md").read_text(encoding="utf-8"))
    print(f"written: {options.out / 'results.md'}, .json, and a PNG for each task of curves, sensitivity, memory")
    return results_of(tournament)


if __name__ == "__main__":
    main()
