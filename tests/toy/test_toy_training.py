"""A stage of the toy's training: killed and taken up again it ends as if undisturbed; a full disk loses nothing."""

import errno
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import stages
import torch
from stages import Schedule, Stage
from torch import nn

SETTINGS = Schedule(steps=12, muon_rate=1e-2, adam_rate=1e-3, warmup=2, save_every=4)


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(6, 6)])})
        self.head = nn.Linear(6, 2)

    def forward(self, inputs):
        return self.head(self.encoder["layers"][0](inputs).tanh()).square().mean()


def train(work, stop_after=None, pause=0.0):
    model = Small()
    stage = Stage(work, "small", model, SETTINGS)
    for step in stage.steps():
        time.sleep(pause)
        stage.update(model(torch.randn(8, 6)))
        if stage.is_due(step):
            stage.save(step, {"twice": 2.0 * step})
        if step == stop_after:
            return None
    return model.state_dict()


@pytest.mark.parametrize("stop_after", [2, 4, 7, 10])
def test_a_stopped_stage_ends_as_an_undisturbed_one(tmp_path, stop_after):
    whole = train(tmp_path / "whole")
    train(tmp_path / "stopped", stop_after)
    again = train(tmp_path / "stopped")
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    lines = (tmp_path / "stopped/small.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["step", "4", "8", "12"]


def test_a_full_disk_keeps_the_last_whole_state(tmp_path, monkeypatch):
    whole = train(tmp_path / "whole")
    train(tmp_path / "full", stop_after=4)
    before = (tmp_path / "full/small.pt").read_bytes()

    def half_written(state, file):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(stages.torch, "save", half_written)
        with pytest.raises(OSError, match="No space"):
            train(tmp_path / "full")
    assert (tmp_path / "full/small.pt").read_bytes() == before
    assert sorted(path.name for path in (tmp_path / "full").iterdir()) == ["small.csv", "small.pt"]
    again = train(tmp_path / "full")
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_a_state_of_other_settings_is_refused(tmp_path):
    train(tmp_path, stop_after=4)
    with pytest.raises(ValueError, match="other settings"):
        Stage(tmp_path, "small", Small(), Schedule(steps=20, muon_rate=1e-2, adam_rate=1e-3, warmup=2))


def test_a_killed_stage_ends_as_an_undisturbed_one(tmp_path):
    """SIGKILL while a step is computed or a state is written, until a run comes through."""
    whole = train(tmp_path / "whole")
    command = [sys.executable, __file__, str(tmp_path / "killed")]
    environment = {"PYTHONPATH": str(Path(stages.__file__).parent)}
    killed, log = 0, tmp_path / "killed/small.csv"
    for lines in (2, 3):  # as soon as the log has its first, its second row
        process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
        while process.poll() is None and not (log.exists() and len(log.read_text().splitlines()) >= lines):
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
    assert killed == 2
    subprocess.run(command, env=environment, check=True, stderr=subprocess.DEVNULL)
    state = torch.load(tmp_path / "killed/small.pt", weights_only=True)
    assert all(torch.equal(whole[name], state["model"][name]) for name in whole)


if __name__ == "__main__":
    train(Path(sys.argv[1]), pause=0.05)
