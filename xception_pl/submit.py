"""`python -m xception_pl.submit RECIPE`: trains a recipe as a SLURM job, on one node or many."""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from xception_pl.commands import Arguments, one_sentence_errors, recipe_help, split_arguments
from xception_pl.recipe import Recipe, RecipeError
from xception_pl.run.slurm import Node, batch_script, need_sbatch, parse_time, partition_nodes, sbatch

_OPTIONS = {
    "--nodes N": "nodes (default: 1)",
    "--gpus-per-node N": "GPUs a node, one process each; 0 trains on CPUs",
    "--tasks-per-node N": "with --gpus-per-node 0: processes a node (default: 1)",
    "--cpus-per-task N": "CPUs of a process (default: its loader workers and one more, as far as the nodes have them)",
    "--time TIME": "longest time, such as 24:00:00 or 3-12 (default: the partition's)",
    "--partition NAME": "where to run (default: the cluster's default)",
    "--sbatch OPTIONS": "more options of sbatch, for example --sbatch='--account=vision --constraint=ib'; they win",
    "--dry-run": "print the plan and the script, and stop",
    "--help": "print this and stop",
}
_SUMMARY = """Writes the sbatch script into a new run folder, beside the recipe as it is now, and submits it. Two minutes before its time
ends, or when it is preempted, the job saves and queues itself again; it then goes on in the same folder, as often as it takes."""
_BEFORE_END_SECONDS = 120


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is asked of SLURM."""

    nodes: int
    gpus: int
    """A node."""
    tasks: int
    """Processes a node: one a GPU, or as many as were asked for on CPUs."""
    cpus: int | None
    """A process; None lets the job decide."""
    time: str | None
    partition: str | None
    more: list[str]
    """Further options of sbatch."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code: 0 done, 2 a mistake in the input."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or {"-h", "--help"} & set(argv):
        print(recipe_help("submit", _SUMMARY, _OPTIONS))
        return 0
    with one_sentence_errors(ValueError):
        names = ("nodes", "gpus-per-node", "tasks-per-node", "cpus-per-task", "time", "partition", "sbatch")
        arguments = split_arguments(argv, flags=("dry-run",), options=names, example="recipes/imagenet.yaml")
        job = _read_job(arguments)
        recipe = _for_cluster(arguments, job)
        if "dry-run" not in arguments.flags:
            need_sbatch()
        job = _fit_to_nodes(job, recipe, partition_nodes(job.partition))
        from xception_pl.training import prepare

        prepared = prepare(recipe, dry_run=True)
        folder = prepared.folder.absolute()
        text = job_script(job, recipe, folder, command=arguments.line("submit"))
        # The devices are another machine's: that they are missing here is no news.
        print("\n".join(line for line in prepared.lines() if not line.startswith("unchecked trainer.")), flush=True)
        if "dry-run" in arguments.flags:
            print(f"\n{folder / 'job.sbatch'} would be:\n\n{text}", end="")
            return 0
        folder.mkdir(parents=True)
        script = folder / "job.sbatch"
        script.write_text(text, encoding="utf-8")
        (folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
        number = sbatch(script)
    print(f"\nsubmitted job {number}: {script}")
    print(f"  follow it    tail -F {shlex.quote(str(folder / f'slurm-{number}.log'))}")
    print(f"  its state    squeue --job {number}")
    print(f"  pause it     scancel --signal=USR1 {number}    (it saves and queues itself again)")
    print(f"  end it       scancel {number}", flush=True)
    return 0


def job_script(job: Job, recipe: Recipe, folder: Path, *, command: str) -> str:
    """The sbatch script that trains `folder`/recipe.yaml into `folder`, and goes on there when the job is queued again."""
    options = {
        "job-name": recipe.run.name,
        "nodes": job.nodes,
        "ntasks-per-node": job.tasks,
        "gpus-per-node": job.gpus or None,
        "cpus-per-task": job.cpus,
        "time": job.time,
        "partition": job.partition,
        "output": folder / "slurm-%j.log",
        "open-mode": "append",
        "signal": f"USR1@{_BEFORE_END_SECONDS}",
    }
    own = [f"--{name}={shlex.quote(str(value))}" for name, value in options.items() if value is not None]
    train = [sys.executable, "-m", "xception_pl.fit", str(folder / "recipe.yaml"), "--into", str(folder)]
    threads = "1  # a GPU multiplies; processes and loader workers take a core each"
    body = [
        "",
        "# Processes meet at the first node, on a port of this job and start.",
        'first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        "export MASTER_ADDR=$(scontrol show node \"$first\" | sed -n 's/.*NodeAddr=\\([^ ]*\\).*/\\1/p')",
        "export MASTER_PORT=$((15000 + (10 * SLURM_JOB_ID + ${SLURM_RESTART_COUNT:-0}) % 10000))",
        "",
        f"export OMP_NUM_THREADS={threads if job.gpus else '${SLURM_CPUS_PER_TASK:-1}'}",
        "export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}  # srun no longer takes it from sbatch",
        "export PYTHONFAULTHANDLER=1  # a crash in native code shows where",
    ]
    if job.gpus:
        body += [
            "export NCCL_DEBUG=${NCCL_DEBUG:-WARN}",
            "# Where nodes have several networks and NCCL takes the wrong one: export NCCL_SOCKET_IFNAME=ib0",
        ]
    body += ["", "# Ranks end each other: the one that is lost is named, and the job queued again."]
    body += [f"srun --kill-on-bad-exit=0 {shlex.join([*train, '--resume', 'auto'])}"]
    title = f"Written by `{command}`."
    return batch_script([*own, "--requeue", *job.more], body, folder=Path.cwd(), title=title)


def _read_job(arguments: Arguments) -> Job:
    """The command line's own options; every mistake in them, and in how they go together."""
    options, problems = arguments.options, list(arguments.problems)

    def number(name: str, least: int, default: int | None) -> int | None:
        text = options.get(name)
        if text is None:
            return default
        if not text.isdecimal() or int(text) < least:
            problems.append(f"--{name} must be a whole number, at least {least}, not {text}.")
            return default
        return int(text)

    nodes, gpus = number("nodes", 1, 1), number("gpus-per-node", 0, None)
    tasks, cpus = number("tasks-per-node", 1, None), number("cpus-per-task", 1, None)
    if gpus is None and "gpus-per-node" not in options:
        problems.append("--gpus-per-node is needed: GPUs of each node, or 0 to train on CPUs.")
    if gpus and tasks is not None and tasks != gpus:
        problems.append(f"--tasks-per-node {tasks} is not --gpus-per-node {gpus}: a GPU has one process; leave it out.")
    try:
        parse_time(options.get("time", "0"))
    except ValueError as error:
        problems.append(f"--time: {error}.")
    try:
        more = shlex.split(options.get("sbatch", ""))
    except ValueError as error:
        problems.append(f"--sbatch {options['sbatch']!r} is not a shell's line of options: {error}.")
    if problems:
        raise RecipeError(problems)
    assert nodes is not None
    assert gpus is not None
    return Job(
        nodes=nodes,
        gpus=gpus,
        tasks=gpus or tasks or 1,
        cpus=cpus,
        time=options.get("time"),
        partition=options.get("partition"),
        more=more,
    )


def _for_cluster(arguments: Arguments, job: Job) -> Recipe:
    """The recipe with the job's world; the global batch must divide by it."""
    world = {
        "trainer.accelerator": "gpu" if job.gpus else "cpu",
        "trainer.devices": str(job.tasks),
        "trainer.num_nodes": str(job.nodes),
    }
    for name, value in world.items():
        given = arguments.overrides.get(name, value)
        if given not in (value, "auto"):
            raise RecipeError([f"--{name}={given} is not the job's {value}: leave it out."])
    return Arguments(recipe=arguments.recipe, overrides=arguments.overrides | world).load()


def _fit_to_nodes(job: Job, recipe: Recipe, nodes: list[Node] | None) -> Job:
    """The job with CPUs that the partition has.

    Raises:
        RecipeError: with a sentence for what the partition lacks.
    """
    if nodes is None:  # no sinfo here: sbatch will tell
        return job
    where = f"partition {job.partition}" if job.partition else "the default partition"
    most = max(node.gpus for node in nodes)
    if job.gpus > most:
        has = f"nodes with {most} GPUs at most" if most else "no GPUs"
        raise RecipeError([f"--gpus-per-node {job.gpus}: {where} has {has}."])
    fitting = [node for node in nodes if node.gpus >= job.gpus and node.cpus >= job.tasks * (job.cpus or 1)]
    if len(fitting) < job.nodes:
        what = f"{job.gpus} GPUs" if job.gpus else f"{job.tasks * (job.cpus or 1)} CPUs"
        raise RecipeError([f"--nodes {job.nodes}: {where} has {len(fitting)} nodes with {what} or more."])
    limits = [node.limit_seconds for node in fitting]
    wanted = parse_time(job.time) if job.time else 0
    if None not in limits and (wanted is None or wanted > max(limit for limit in limits if limit is not None)):
        longest = max(limit for limit in limits if limit is not None)
        raise RecipeError([f"--time {job.time}: {where} takes jobs of {longest / 3600:g} hours at most."])
    if job.cpus is not None:
        return job
    spare = sorted((node.cpus for node in fitting), reverse=True)[job.nodes - 1] // job.tasks
    cpus = max(1, min(recipe.data.workers + 1, spare))
    return Job(**{**job.__dict__, "cpus": cpus})


if __name__ == "__main__":
    sys.exit(main())
