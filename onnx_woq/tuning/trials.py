"""The trials of a tuning run: each made, judged, and written down in a journal that a killed run resumes from."""

from __future__ import annotations

import logging
import math
import re
import shutil
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from onnx_woq.engine.execute import SolveCache, execute
from onnx_woq.engine.executors import pickled, result_of, submitted
from onnx_woq.engine.metadata import metadata
from onnx_woq.engine.output import Destination
from onnx_woq.engine.plan import PlannedWeight, make_plan
from onnx_woq.engine.resources import Resources
from onnx_woq.engine.solve import solves_alike
from onnx_woq.engine.statistics import SharedStatistics
from onnx_woq.errors import OnnxWoqError
from onnx_woq.graph.find.linears import LinearGroup
from onnx_woq.graph.io.model import Model, clone, load, model_hash
from onnx_woq.recipe import Recipe
from onnx_woq.tuning import bootstrap, journal
from onnx_woq.tuning.failures import failure_of
from onnx_woq.tuning.judge import FileStamps, Judge, Runner, Verdict, judge_model, judge_remotely, stamp_files
from onnx_woq.tuning.results import Trial

if TYPE_CHECKING:
    from onnx_woq.core.stats import Stats

logger = logging.getLogger(__name__)


@dataclass
class Run:
    """The state that all trials of one run share.

    Attributes:
        source: the float model.
        folder: where journal and trials are.
        source_hash, calibration_hash: of the model and the calibration data.
        start: by `time.monotonic`.
        timeout: seconds after which no work begins.
        means: what the work is done with.
        elsewhere: where a model is judged while the next one is made; None to judge here and then go on.
        known: what a later configuration solves alike.
        more: other configurations will follow those that are asked for now, so what is known is kept.
        race: the configurations race for the best metric, so that the clearly worse drop out early.
        leader: of the race so far, with all that has been measured of it.
    """

    source: Model
    folder: Path
    source_hash: str
    calibration_hash: str
    start: float
    timeout: float | None
    resources: Resources
    elsewhere: Executor | None = None
    known: SolveCache = field(default_factory=dict)
    more: bool = False
    race: bool = False
    leader: Trial | None = None

    @property
    def key(self) -> str:
        """Returns what every journal entry of this model and data begins with."""
        return f"{self.source_hash}/{self.calibration_hash}"

    @property
    def journal(self) -> Path:
        """Returns the file that lets a killed run resume."""
        return self.folder / "journal.jsonl"

    def say(self, stage: str, done: int, total: int) -> None:
        """Reports progress to whoever asked for it."""
        self.resources.say(stage, done, total)

    def trial_path(self, name: str, recipe: Recipe) -> Path:
        """Returns the path of a trial's model, in a folder of its own with tokenizer and config beside it.

        It follows from name and recipe alone: folders of trials are removed, so neither a name that looks like a path
        nor a journal from elsewhere may lead out of the work folder.
        """
        plain = re.sub(r"[^\w-]+", "_", name)
        return self.folder / f"{plain}-{recipe.fingerprint()}" / self.source.path.name

    def trial_key(self, recipe: Recipe, judge: Judge) -> str:
        """Returns the journal's key of a trial."""
        return f"{self.key}/{recipe.fingerprint()}/{judge.key}"

    def out_of_time(self) -> bool:
        """Tells whether no more work may begin."""
        return self.timeout is not None and time.monotonic() - self.start > self.timeout


class _OutOfTime(KeyboardInterrupt):
    """Signal that the run's time is over, raised between two linear groups.

    As an interrupt by the user does, it leaves what has been solved for a later run.
    """


@dataclass(frozen=True)
class _Candidate:
    """A model that has been made and not yet judged; `seconds` have gone into it."""

    name: str
    recipe: Recipe
    path: Path
    files: FileStamps
    seconds: float


def each_trial(
    run: Run, recipes: Mapping[str, Recipe], judge: Judge, shared: SharedStatistics
) -> Generator[Trial, None, None]:
    """Yields the trials of `recipes` in their order, each as soon as it is judged; fewer if time runs out.

    What an earlier run has finished is taken from the journal, what is new is added to it. Models stay on the disk
    until the caller drops them: if he keeps one, there are never more than two and the one that is judged elsewhere.
    """
    found = _each_made(run, recipes, judge, shared)
    score = _to_send(judge, run.elsewhere) if run.elsewhere else None
    if run.elsewhere and score:
        trials = _each_judged_there(run, judge, found, run.elsewhere, score)
    else:
        trials = (_judged_here(run, judge, one) if isinstance(one, _Candidate) else one for one in found)
    for trial in trials:
        if not trial.resumed and trial.status != "fault":  # a repaired program will try it again
            made = model_hash(load(trial.path)) if trial.path else ""
            entry = {"key": run.trial_key(trial.recipe, judge), "pairs": trial.pairs, "model": made}
            exact = {"metric": trial.metric}  # an infinite one too, which reports leave out
            journal.append(run.journal, trial.to_dict() | entry | exact)
        yield trial


def _runner(run: Run) -> Runner | None:
    """Returns the model that the next one has to beat."""
    leader = run.leader
    return Runner(leader.path, leader.pairs) if run.race and leader and leader.pairs else None


def made_again(run: Run, trial: Trial, shared: SharedStatistics) -> Trial:
    """Makes the model of a trial again, whatever time that takes: its file has gone since it was made."""
    run.timeout = None
    path = run.trial_path(trial.name, trial.recipe)
    _make(run, path, trial.recipe, shared)
    return replace(trial, path=path)


def drop(trial: Trial) -> Trial:
    """Removes the model of a trial from the disk; returns the trial without it."""
    if trial.path is None:
        return trial
    shutil.rmtree(trial.path.parent, ignore_errors=True)
    return replace(trial, path=None)


def _each_made(
    run: Run, recipes: Mapping[str, Recipe], judge: Judge, shared: SharedStatistics
) -> Iterator[Trial | _Candidate]:
    """Yields a model to be judged for each recipe, or a trial that is over: from an earlier run, or by failing."""
    known = journal.read(run.journal)
    left = list(recipes.values())
    for name, recipe in recipes.items():
        left.pop(0)
        found: Trial | _Candidate
        if remembered := _remembered(run, name, recipe, judge, known.get(run.trial_key(recipe, judge))):
            found = remembered
        elif run.out_of_time():
            return
        else:
            try:
                found = _made(run, name, recipe, shared)
            except _OutOfTime:
                return
        if not run.more and not any(solves_alike(recipe, later) for later in left):
            run.known.clear()
        yield found


def _made(run: Run, name: str, recipe: Recipe, shared: SharedStatistics) -> Trial | _Candidate:
    start = time.monotonic()
    run.say(name, 0, 0)
    path = run.trial_path(name, recipe)
    try:
        _make(run, path, recipe, shared)
        return _Candidate(name, recipe, path, stamp_files(load(path).files), time.monotonic() - start)
    except Exception as error:
        failed = failure_of(error, path)
    logger.warning("%s failed: %s", name, failed.text)
    shutil.rmtree(path.parent, ignore_errors=True)
    return Trial(name, failed.status, None, False, None, time.monotonic() - start, failed.text, recipe)


def _make(run: Run, path: Path, recipe: Recipe, shared: SharedStatistics) -> None:
    """Quantizes the float model by `recipe` and writes it to `path`."""
    if path.parent.is_symlink():  # nothing is written where a link leads to
        path.parent.unlink()
    plan = make_plan(clone(run.source), recipe)
    plan.require_work()
    plan = plan.raised()
    plan.prepare()

    def while_time_lasts(left: Sequence[PlannedWeight], states: Path) -> Iterator[tuple[LinearGroup, Stats | None]]:
        for item in shared.of(plan, left, states):
            if run.out_of_time():
                raise _OutOfTime
            yield item

    execute(
        plan,
        Destination(path, path.parent),
        while_time_lasts,
        run.resources,
        properties=metadata(recipe, run.source_hash, run.calibration_hash),
        companions_from=run.source.named,
        resume="any",
        cache=run.known,
    )


def _judged_here(run: Run, judge: Judge, candidate: _Candidate) -> Trial:
    runner = _runner(run)
    return _trial(
        run, judge, candidate, judge_model(candidate.path, judge.score, lambda *at: run.say("evaluate", *at), runner)
    )


def _to_send(judge: Judge, executor: Executor) -> bytes | None:
    try:
        return pickled(judge.score, executor)
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
        logger.warning("the evaluation cannot be sent to another process (%s): trials are judged here", problem)
        return None


def _each_judged_there(
    run: Run, judge: Judge, each_made: Iterator[Trial | _Candidate], executor: Executor, score: bytes
) -> Iterator[Trial]:
    """Yields trials judged on the executor: while one model is judged there, the next one is made here."""
    waiting: tuple[_Candidate, Future[Verdict]] | None = None
    try:
        for one in each_made:
            if waiting:
                yield _settled(run, judge, executor, *waiting)
                waiting = None
            if isinstance(one, _Candidate):
                files = one.files | stamp_files(judge.reads)
                runner = _runner(run)
                if runner and runner.path:
                    files |= stamp_files(load(runner.path).files)
                waiting = one, submitted(executor, judge_remotely, one.path.absolute(), score, files, runner)
            else:
                yield one
        if waiting:
            yield _settled(run, judge, executor, *waiting)
    finally:
        if waiting:
            waiting[1].cancel()


def _settled(run: Run, judge: Judge, executor: Executor, candidate: _Candidate, future: Future[Verdict]) -> Trial:
    """Returns the trial that an executor has judged. Only a number counts: anything else is judged again here."""
    run.say("evaluate", 0, 0)
    try:
        verdict = result_of(future, executor)
        problem = verdict.error
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
    if not problem:
        return _trial(run, judge, candidate, verdict)
    logger.warning("%s was not judged by the executor (%s): it is judged here", candidate.name, problem)
    return _judged_here(run, judge, candidate)


def _trial(run: Run, judge: Judge, candidate: _Candidate, verdict: Verdict) -> Trial:
    """Makes a trial of a candidate and its verdict; the model of a trial that failed is removed."""
    measured = verdict.measured
    pairs = measured.pairs if measured else ()
    if run.leader and measured and len(measured.leader) > len(run.leader.pairs):
        run.leader = measured_further(judge, run.leader, measured.leader)
    ok = judge.counts(verdict.metric)
    error = verdict.error or ("" if ok else f"the metric is {verdict.metric}")
    if verdict.error:
        logger.warning("%s failed: %s", candidate.name, error)
    if not ok:
        shutil.rmtree(candidate.path.parent, ignore_errors=True)
    outcome = judge.outcome(verdict.metric, pairs) if ok else ""
    return Trial(
        name=candidate.name,
        status="ok" if ok else "fault" if verdict.fault else "failed" if verdict.error else "nan",
        metric=verdict.metric if ok else None,
        met=outcome == "within",
        verdict=outcome,
        standard_error=bootstrap.standard_error(np.array(pairs)) if ok and pairs else None,
        dropped=ok and bool(measured and measured.dropped),
        pairs=pairs if ok else (),
        bytes=sum(size for size, _ in candidate.files.values()),
        seconds=candidate.seconds + verdict.seconds,
        error=error,
        recipe=candidate.recipe,
        path=candidate.path if ok else None,
    )


def measured_further(judge: Judge, trial: Trial, pairs: tuple[tuple[float, float], ...]) -> Trial:
    """Returns a trial that has been seen on more samples."""
    metric = judge.metric(pairs)
    outcome = judge.outcome(metric, pairs)
    error = bootstrap.standard_error(np.array(pairs))
    return replace(trial, metric=metric, pairs=pairs, verdict=outcome, met=outcome == "within", standard_error=error)


def _remembered(run: Run, name: str, recipe: Recipe, judge: Judge, entry: Mapping[str, Any] | None) -> Trial | None:
    """Returns a trial that an earlier run finished, from its journal entry; its verdict follows the present limit.

    It is None if there is no entry, or none that makes sense. The model of the trial counts only if it is the one that
    was judged.
    """
    try:
        return None if entry is None else _read_back(run, name, recipe, judge, entry)
    except (KeyError, TypeError, ValueError, OverflowError):
        logger.warning("%s: the entry of %s makes no sense, so it is tried again", run.journal, name)
        return None


def _read_back(run: Run, name: str, recipe: Recipe, judge: Judge, entry: Mapping[str, Any]) -> Trial:
    path = run.trial_path(name, recipe)
    status, metric = entry["status"], entry["metric"]
    if status not in ("ok", "failed", "nan") or (status == "ok") != (metric is not None):
        raise ValueError(status)
    pairs = tuple((float(num), float(den)) for num, den in entry.get("pairs", ()))
    if metric is not None and any(math.isnan(number) for number in (float(metric), *sum(pairs, ()))):
        raise ValueError("no number")
    outcome = "" if metric is None else judge.outcome(float(metric), pairs)
    return Trial(
        name=name,
        status=status,
        metric=metric,
        met=outcome == "within",
        verdict=outcome,
        standard_error=bootstrap.standard_error(np.array(pairs)) if pairs else None,
        dropped=bool(entry.get("dropped", False)),
        pairs=pairs,
        bytes=None if entry.get("bytes") is None else int(entry["bytes"]),
        seconds=float(entry.get("seconds", 0.0)),
        error=str(entry.get("error", "")),
        recipe=recipe,
        resumed=True,
        path=path if metric is not None and _is_model(path, entry.get("model")) else None,
    )


def _is_model(path: Path, wanted: object) -> bool:
    """Tells whether the model at `path` is there, as the run that wrote the journal has judged it."""
    if not path.exists():
        return False
    with suppress(OnnxWoqError):
        if model_hash(load(path)) == wanted:
            return True
    logger.warning("%s is not the model that was judged: it is made again if it is wanted", path)
    return False
