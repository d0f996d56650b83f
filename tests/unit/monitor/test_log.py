"""A log is read while it grows; see tests/functional/test_watch.py for what may be in it."""

from __future__ import annotations

import json
import resource
import shutil
import sys
import warnings
from itertools import pairwise
from pathlib import Path

import pytest

import bnprobe
from bnprobe.errors import OutputError
from bnprobe.monitor.log import FILE, LogReader
from bnprobe.records import MonitorChange
from support.processes import run_together
from unit.monitor.test_monitor import _net, _train

LAYERS = {"bn": {"mismatch": 0.2, "equivalent_batch_size": 7.8, "r": 0.9, "d": 0.1}}
START = {"event": "start", "step": 0, "version": "0.1.0", "model": "Net", "every": 1, "skipped": {}}


def test_what_a_monitor_writes_is_read_again(tmp_path: Path) -> None:
    model = _net()
    model.first[1].eval()
    with bnprobe.Monitor(model, every=5, log=tmp_path, on_finding=lambda *_: None) as monitor:
        reader = LogReader(tmp_path)
        _train(model, range(12))
        assert reader.update()
        assert reader.log.samples[-1] == monitor.sample
        assert not reader.update()
        _train(model, range(12, 200), size=2)
    assert reader.update()
    assert (reader.log.model, reader.log.every, reader.log.unreadable) == ("Net", 5, 0)
    assert reader.log.samples[-1] == monitor.sample
    assert {name: layer.frozen for name, layer in reader.log.samples[-1].layers.items()} == {
        "first.1": True,
        "second.1": False,
    }
    assert list(reader.log.findings) == monitor.findings != []


def test_of_very_many_samples_some_are_left_out_evenly_and_the_last_stays(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with path.open("w") as file:
        file.write(json.dumps(START) + "\n")
        for step in range(4500):
            sample = {"event": "sample", "step": step, "samples": 2, "output": None, "loss": None, "layers": LAYERS}
            file.write(json.dumps(sample) + "\n")
    reader = LogReader(path)
    reader.update()
    steps = [sample.step for sample in reader.log.samples]
    assert 1000 <= len(steps) <= 2000
    assert reader.log.taken == 4500
    assert steps[-1] == 4499
    assert max(later - earlier for earlier, later in pairwise(steps)) == 4
    with path.open("a") as file:
        file.write(json.dumps(START) + "\n" + json.dumps({**sample, "step": 1}) + "\n")
    reader.update()
    assert [sample.step for sample in reader.log.samples] == [1]
    assert (reader.log.taken, reader.log.unreadable) == (1, 0)


def test_what_a_resumed_run_does_again_is_left_out(tmp_path: Path) -> None:
    sample = {"event": "sample", "samples": 2, "output": None, "loss": None, "layers": LAYERS}
    change = {"event": "change", "action": "renorm", "layers": ["bn"]}
    events = [START, {**sample, "step": 100}, {**change, "step": 116}, {**sample, "step": 200}, {**change, "step": 216}]
    events += [{**START, "step": 200}, {**sample, "step": 200}]
    (tmp_path / FILE).write_text("".join(f"{json.dumps(event)}\n" for event in events))
    log = bnprobe.MonitorLog.load(tmp_path)
    assert [each.step for each in log.samples] == [100, 200]
    assert (log.taken, log.changes) == (2, (MonitorChange(116, "renorm", ("bn",)),))
    assert log.step == 200


def test_a_run_that_begins_late_is_not_resumed(tmp_path: Path) -> None:
    """Lightning's first step shows what there is to watch."""
    (tmp_path / FILE).write_text(json.dumps({**START, "step": 1}) + "\n")
    assert bnprobe.MonitorLog.load(tmp_path).step == 0


def test_a_log_and_what_was_saved_of_it_are_loaded(tmp_path: Path) -> None:
    model = _net()
    with bnprobe.Monitor(model, every=5, log=tmp_path / "run", on_finding=lambda *_: None):
        _train(model, range(12))
    log = bnprobe.MonitorLog.load(str(tmp_path / "run"))
    assert bnprobe.MonitorLog.load(tmp_path / "run" / FILE) == log
    log.save(tmp_path / "log.json")
    assert bnprobe.MonitorLog.load(tmp_path / "log.json") == log


def _fills_the_disk(folder: Path) -> None:
    """As on a full disk: files cannot grow beyond so many bytes, in the middle of a line."""
    sys.dont_write_bytecode = True  # that of modules would be cut off, too, and stay so
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
    model = _net()
    with warnings.catch_warnings(record=True) as caught, bnprobe.Monitor(model, every=2, log=folder) as monitor:
        warnings.simplefilter("always")
        _train(model, range(20))
    (warning,) = caught
    assert "training goes on: OutputError: " in str(warning.message)
    assert monitor.step < 20
    assert not (folder / "monitor.jsonl").read_text().endswith("\n")


def test_a_disk_that_is_full_ends_the_log_and_what_follows_can_be_read(tmp_path: Path) -> None:
    run_together(1, _fills_the_disk, tmp_path)
    reader = LogReader(tmp_path)
    reader.update()
    before = reader.log.samples
    assert len(before) >= 2
    model = _net()
    monitor = bnprobe.Monitor(model, every=2, log=tmp_path)
    monitor.step = 40
    with monitor:
        _train(model, range(5))
    assert reader.update()
    assert reader.log.samples[: len(before)] == before
    assert [sample.step for sample in reader.log.samples[len(before) :]] == [40, 42, 44]
    assert reader.log.unreadable == 1  # the line that was cut off


def test_a_folder_that_disappears_ends_the_log_and_not_the_training(tmp_path: Path) -> None:
    model = _net()
    with bnprobe.Monitor(model, every=2, log=tmp_path / "run") as monitor:
        _train(model, range(3))
        shutil.rmtree(tmp_path / "run")
        with pytest.warns(UserWarning, match="training goes on: OutputError: .*No such file or directory"):
            _train(model, range(3, 9))
    assert monitor.step == 4
    assert not model._forward_pre_hooks


def test_a_folder_that_is_named_from_here_stays_the_same_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    model = _net()
    with bnprobe.Monitor(model, every=2, log="run"):
        monkeypatch.chdir(tmp_path / "elsewhere")
        _train(model, range(3))
    reader = LogReader(tmp_path / "run")
    reader.update()
    assert [sample.step for sample in reader.log.samples] == [2]


def test_a_place_that_cannot_be_written_is_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError):
        bnprobe.Monitor(_net(), log=tmp_path / "file" / "run")


def _is_refused(folder: Path) -> None:
    with pytest.raises(OutputError, match=r"Another monitor writes to .*monitor\.jsonl"):
        bnprobe.Monitor(_net(), log=folder).start()


def test_two_runs_do_not_write_to_one_log_at_once(tmp_path: Path) -> None:
    model = _net()
    with bnprobe.Monitor(model, every=2, log=tmp_path):
        run_together(1, _is_refused, tmp_path)
        _is_refused(tmp_path)
        _train(model, range(3))
    with bnprobe.Monitor(model, every=2, log=tmp_path):  # afterwards they do
        _train(model, range(3))
    reader = LogReader(tmp_path)
    reader.update()
    assert [sample.step for sample in reader.log.samples] == [2]
