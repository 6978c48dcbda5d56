"""The Lightning callback logs through the module, and MGSLoss trains in `training_step` as any loss."""

from __future__ import annotations

import pytest

import mgs_core as mgs

torch = pytest.importorskip("torch")
lightning = pytest.importorskip("lightning")

from mgs_core.adapters.lightning import MGSCallback  # noqa: E402  # after the skip
from mgs_core.adapters.torch import MGSLoss  # noqa: E402  # after the skip

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning warns of workers, of logging intervals and of its own dependencies


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(5, 6), torch.nn.Tanh(), torch.nn.Dropout(0.5), torch.nn.Linear(6, 3))
        self.criterion = MGSLoss(torch.nn.CrossEntropyLoss(), penalty=mgs.Penalty("trace", 0.01), every=2)
        self.penalties, self.seen = [], []

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, _):
        loss = self.criterion(self(batch[0]), batch[1])
        self.penalties.append(self.criterion.last.penalty)
        return loss

    def validation_step(self, batch, _):
        loss = self.criterion(self(batch[0]), batch[1])
        self.seen.append(self.criterion.last.penalty)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        x, y = batch  # as a probe is not
        return [x.to(device), y.to(device)]


@pytest.mark.parametrize(("unit", "steps"), [("step", [2, 4, 6]), ("epoch", [0, 1])])
def test_logs_on_schedule(tmp_path, unit, steps):
    torch.manual_seed(0)
    x, y = torch.randn(12, 5), torch.arange(12) % 3
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=4)
    schedule = {"every": 2} if unit == "step" else {}
    module, callback = Module(), MGSCallback(x, y, unit=unit, labels=y, output="loss", **schedule)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", callbacks=[callback], default_root_dir=tmp_path, num_sanity_val_steps=0, **quiet
    )
    trainer.fit(module, loader, loader)
    assert [record["step"] for record in callback.monitor.history] == steps
    assert float(trainer.callback_metrics["mgs_trace"]) == pytest.approx(callback.monitor.history[-1]["mgs_trace"], rel=1e-5)
    assert "mgs_alignment" in trainer.callback_metrics
    assert [penalty is not None for penalty in module.penalties] == [True, False, True, False, True, False]
    assert module.seen
    assert set(module.seen) == {None}


@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "bf16-mixed"])
def test_probe_has_the_precision_of_the_trainer(tmp_path, precision):
    x, y = torch.randn(8, 5), torch.arange(8) % 3
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=4)
    module, callback = Module(), MGSCallback(x, every=1)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", callbacks=[callback], default_root_dir=tmp_path, precision=precision, **quiet
    )
    trainer.fit(module, loader)
    assert len(callback.monitor.history) == 2


def test_micro_batches_before_the_first_step_are_not_measured(tmp_path):
    x, y = torch.randn(16, 5), torch.arange(16) % 3
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=4)
    callback = MGSCallback(x, every=1, output="sum")
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    options = {"max_epochs": 1, "accelerator": "cpu", "accumulate_grad_batches": 2, "default_root_dir": tmp_path}
    lightning.Trainer(callbacks=[callback], **options, **quiet).fit(Module(), loader)
    assert [record["step"] for record in callback.monitor.history] == [1, 2]


@pytest.mark.wrong_types
def test_an_unknown_unit_is_refused():
    with pytest.raises(mgs.ArgumentError, match='`unit` must be "step" or "epoch"; got \'steps\''):
        MGSCallback(torch.ones(2, 4), unit="steps")


class Alternating(Module):
    """Take two steps a batch, of two optimisers."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, _):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(torch.nn.functional.cross_entropy(self(batch[0]), batch[1]))
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(self.net[0].parameters(), 0.1), torch.optim.SGD(self.net[3].parameters(), 0.1)]


@pytest.mark.parametrize(("every", "steps"), [(3, [4, 6]), (mgs.Schedule(2, start=1), [2, 4, 6])])
def test_steps_that_are_left_out_are_made_up_for(tmp_path, every, steps):
    callback = fitted(tmp_path, Alternating(), [MGSCallback(X, every=every)])[0]
    assert [record["step"] for record in callback.monitor.history] == steps


def test_each_measurement_reaches_the_logger_and_a_second_fit_goes_on(tmp_path):
    logger = lightning.pytorch.loggers.CSVLogger(tmp_path)
    callbacks, module = [MGSCallback(X, every=2), MGSCallback(X[:4], unit="epoch", prefix="few_")], Module()
    fitted(tmp_path, module, callbacks, logger=logger)
    logger.save()
    table = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()
    rows = [dict(zip(table[0].split(","), row.split(","), strict=True)) for row in table[1:]]
    for callback, steps in zip(callbacks, ([1], [2]), strict=True):  # Lightning counts batches from 0
        name = "few_trace" if callback is callbacks[1] else "mgs_trace"
        assert [(int(row["step"]), int(row["epoch"])) for row in rows if row.get(name)] == [(step, 0) for step in steps]
        found = [float(row[name]) for row in rows if row.get(name)]
        assert found == pytest.approx([record[name] for record in callback.monitor.history])
    fitted(tmp_path, module, callbacks)
    assert [record["step"] for record in callbacks[0].monitor.history] == [2, 2]


def test_the_first_process_alone_writes(tmp_path, monkeypatch):
    records = []
    callback = MGSCallback(X, every=1, sinks=[mgs.CallbackSink(lambda numbers, step: records.append(step))])
    monkeypatch.setattr(lightning.Trainer, "is_global_zero", False)
    fitted(tmp_path, Module(), [callback])
    assert (records, len(callback.monitor.history)) == ([], 3)


X, Y = torch.randn(12, 5, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3


def fitted(folder, module, callbacks, logger=False):
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), batch_size=4)
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    options = {"max_epochs": 1, "accelerator": "cpu", "default_root_dir": folder, "logger": logger}
    lightning.Trainer(callbacks=callbacks, **options, **quiet).fit(module, loader)
    return callbacks
