"""Jobs in worker processes: all of them run, the first error ends the rest, Ctrl-C ends them in order."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from mmc_fast.errors import InputError
from mmc_fast.experiments import jobs
from mmc_fast.experiments.jobs import Job, claimed, finish, own_folder, read
from mmc_fast.experiments.manifest import MANIFEST, Manifest
from mmc_fast.experiments.pool import WorkerLost, run_pool
from mmc_fast.experiments.training import TrainingDiverged

ROOT = Path(__file__).resolve().parents[2]


def square(job: int, emit) -> None:
    emit((job, job * job, os.getpid(), torch.get_num_threads()))


def fail_on_three(job: int, emit) -> None:
    if job == 3:
        raise InputError("job 3 cannot be done")
    emit(job)


@pytest.mark.parametrize("workers", [1, 2])
def test_every_job_runs_once_with_one_thread(workers):
    before = torch.get_num_threads()
    events: list[tuple[int, int, int, int]] = []
    run_pool([1, 2, 3, 4], square, workers=workers, on_event=events.append)
    assert sorted((job, result) for job, result, _, _ in events) == [(1, 1), (2, 4), (3, 9), (4, 16)]
    assert {threads for *_, threads in events} == {1}
    assert (os.getpid() in {pid for _, _, pid, _ in events}) == (workers == 1)
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("workers", [1, 2])
def test_the_first_error_is_raised_as_it_was(workers):
    with pytest.raises(InputError, match="job 3 cannot be done"):
        run_pool([1, 3, 5, 7], fail_on_three, workers=workers, on_event=lambda event: None)


def test_no_worker_is_refused():
    with pytest.raises(InputError, match="workers is 0"):
        run_pool([1], square, workers=0, on_event=lambda event: None)


def halve(settings, workspace):
    """A job's function: half of a number; odd ones diverge."""
    if settings["n"] % 2:
        raise TrainingDiverged("the loss\nbecame nan")
    return {"half": settings["n"] // 2}, {"n": np.array([settings["n"]])}


def test_every_job_leaves_one_result_and_a_diverged_one_says_why(tmp_path):
    jobs = [Job(f"some/{name}", halve, {"n": n}) for name, n in (("four", 4), ("three", 3), ("four", 4))]
    events = []
    results = finish(jobs, tmp_path, workers=1, on_event=events.append)
    assert [r.values for r in results] == [{"half": 2}, {}, {"half": 2}]
    assert [r.failed for r in results] == [None, "the loss became nan", None]
    assert results[0].arrays["n"].tolist() == [4]
    assert [(kind, job.name, value) for kind, job, value in events] == [
        ("plan", "some/four", 2), ("done", "some/four", None), ("done", "some/three", None),
    ]  # fmt: skip
    assert len(list(tmp_path.glob("some/*.npz"))) == 2
    assert Job("other name", halve, {"n": 4}).key == jobs[0].key != jobs[1].key
    finish(jobs, tmp_path, workers=1, on_event=events.append)
    assert events[3:] == [("plan", jobs[0], 0)]


def tell(settings, workspace):
    """A job's function that reports its progress, and where it may write."""
    workspace.progress.on_start(3, "label")
    workspace.progress.on_epoch({"epoch": 1})
    workspace.progress.on_end({})
    return {"own": str(workspace.own.relative_to(workspace.folder))}, {}


def refuse(settings, workspace):
    raise InputError("no such data")


def test_a_job_is_known_by_function_and_settings_and_tells_its_progress(tmp_path):
    job = Job("some/a b:1", tell, {"n": [1, 2], "m": None})
    text = json.dumps([2, __name__, "tell", {"m": None, "n": [1, 2]}], sort_keys=True)
    assert job.key == hashlib.sha256(text.encode()).hexdigest()[:12]
    assert (job.own, job.path) == (f"some/a_b_1-{job.key}", f"some/a_b_1-{job.key}.npz")
    assert len({job.key, Job("x", halve, job.settings).key, Job("x", tell, {"n": [2, 1], "m": None}).key}) == 3
    events = []
    (result,) = finish([job], tmp_path, workers=1, on_event=events.append)
    assert events == [("plan", job, 1), ("start", job, 3), ("epoch", job, {"epoch": 1}), ("done", job, None)]
    assert result.values == {"own": job.own}
    assert (result.settings, result.threads, result.seconds >= 0) == (job.settings, 1, True)
    again = read(tmp_path / job.path, job.settings)
    assert (again.values, again.seconds) == (result.values, result.seconds)
    assert finish([], tmp_path, workers=1, on_event=events.append) == []
    assert len(events) == 4
    with pytest.raises(InputError, match="some/x: no such data"):
        finish([Job("some/x", refuse, {})], tmp_path, workers=1, on_event=events.append)
    with pytest.raises(InputError, match="there is no such file"):
        read(tmp_path / "none.npz")
    with pytest.raises(InputError, match="is the result of another job"):
        read(tmp_path / job.path, {"n": 1})


def test_a_folder_that_holds_something_else_is_not_taken_over(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").write_text("")
    for name, said in (("file", "is a file; choose a folder"), ("foreign", "holds no demo; choose another")):
        with pytest.raises(InputError, match=said):
            own_folder(tmp_path / name, "demo")
    own_folder(tmp_path / "deep" / "mine", "demo")
    assert own_folder(tmp_path / "deep" / "mine", "demo").folder == tmp_path / "deep" / "mine"
    with pytest.raises(InputError, match="demo"):
        own_folder(tmp_path / "deep" / "mine", "comparison")
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / f".{MANIFEST}.tmp").write_text("")  # what a kill during the very first write leaves
    own_folder(tmp_path / "killed", "demo")


def test_a_claimed_job_is_free_again_when_the_claim_ends(tmp_path):
    job = Job("some/job", halve, {"n": 2})
    own_folder(tmp_path, "jobs")
    with claimed(tmp_path, job) as mine, claimed(tmp_path, job) as theirs:
        assert (mine, theirs) == (True, False)
        assert not jobs._free(tmp_path, job)
    assert jobs._free(tmp_path, job)
    finish([job], tmp_path, workers=1, on_event=lambda event: None)
    with claimed(tmp_path, job):
        assert jobs._free(tmp_path, job), "finished by now"


SCRIPT = """
    import signal, sys, time
    from pathlib import Path
    from mmc_fast.experiments.training.interrupt import InterruptGuard
    from mmc_fast.experiments.pool import run_pool
    from mmc_fast.experiments.training.progress import Interrupted

    def patient(job, emit):
        with InterruptGuard() as guard:
            for step in range(600):
                emit(("step", job))
                if guard.requested:
                    Path(sys.argv[1], f"saved-{job}").touch()
                    raise Interrupted(f"job {job} saved")
                time.sleep(0.05)

    if __name__ == "__main__":
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background starts with it ignored
        try:
            run_pool([1, 2, 3], patient, workers=2, on_event=lambda event: print(event, flush=True))
        except Interrupted as error:
            print("end:", error, flush=True)
            sys.exit(130)
"""


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize(
    "whole_group", [pytest.param(False, id="parent", marks=pytest.mark.slow), pytest.param(True, id="as in a terminal")]
)
def test_ctrl_c_lets_jobs_save_and_starts_no_other(tmp_path: Path, whole_group: bool):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT), encoding="utf-8")
    process = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    seen: set[str] = set()
    while len(seen) < 2:  # both workers are at work
        line = process.stdout.readline()
        assert line, process.stderr and process.stderr.read()
        seen.add(line.strip())
    if whole_group:
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "end: interrupted" in out
    assert "Traceback" not in err
    assert sorted(p.name for p in tmp_path.glob("saved-*")) == ["saved-1", "saved-2"]


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_workers_do_not_outlive_a_killed_parent(tmp_path: Path):
    script = tmp_path / "script.py"
    source = textwrap.dedent(SCRIPT).replace('("step", job)', '("pid", __import__("os").getpid())')
    script.write_text(source, encoding="utf-8")
    process = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    pids: set[int] = set()
    while len(pids) < 2:
        pids.add(int(process.stdout.readline().split()[1].rstrip(")")))
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and any(_alive(pid) for pid in pids):
        time.sleep(0.1)
    assert not [pid for pid in pids if _alive(pid)]


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "zombie" not in Path(f"/proc/{pid}/status").read_text() if Path("/proc").exists() else True


def test_exchanged_changed_and_missing_results_are_named_or_made_again(tmp_path):
    jobs = [Job(f"some/{n}", halve, {"n": n}) for n in (2, 4)]
    finish(jobs, tmp_path, workers=1, on_event=lambda event: None)
    two, four = (tmp_path / job.path for job in jobs)
    mine = two.read_bytes()

    def again():
        return finish(jobs, tmp_path, workers=1, on_event=lambda event: None)

    shutil.copy(four, two)
    with pytest.raises(InputError, match=f"{two.name} was changed or exchanged .*; remove it and repeat the command"):
        again()
    Manifest.above(two, advice="x").add([two])
    with pytest.raises(InputError, match=f"{two.name} is the result of another job"):
        again()
    two.unlink()
    with pytest.warns(UserWarning, match=f"{two.name} is missing; it is computed again"):
        assert [r.values for r in again()] == [{"half": 1}, {"half": 2}]
    two.write_bytes(mine)  # of the same job: only the seconds differ
    with pytest.raises(InputError, match="changed or exchanged"):
        again()


def test_a_result_that_a_kill_left_unlisted_is_made_again(tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def kill(self, paths, *, drop=()):
        raise Killed

    job = Job("some/two", halve, {"n": 2})
    with monkeypatch.context() as m:
        m.setattr(Manifest, "add", kill)
        with pytest.raises(Killed):
            finish([job], tmp_path, workers=1, on_event=lambda event: None)
    assert (tmp_path / job.path).is_file()
    events = []
    (result,) = finish([job], tmp_path, workers=1, on_event=lambda event: events.append(event[0]))
    assert result.values == {"half": 1}
    assert events == ["plan", "done"]


def die(job: int, emit) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_one_line(tmp_path):
    with pytest.raises(WorkerLost, match="a worker process died") as error:
        run_pool([1, 2], die, workers=2, on_event=lambda event: None)
    assert "\n" not in str(error.value)
    assert type(error.value).__module__.startswith("mmc_fast")  # which the command line shows as a line
