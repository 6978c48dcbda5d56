"""Tiny randomly initialised transformers models: exact kernels, a penalised Trainer, a callback that logs."""

from __future__ import annotations

import pytest

import mgs_core as mgs

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from mgs_core.adapters.huggingface import MGSCallback, MGSTrainerMixin, next_token_loss  # noqa: E402  # after the skip
from mgs_core.adapters.torch import MGSLoss, twice_differentiable  # noqa: E402  # after the skip
from torch.nn.functional import cross_entropy  # noqa: E402  # after the skip

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers and accelerate warn of their own dependencies


def bert():
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, max_position_embeddings=8,
        num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(config)


def gpt():
    config = transformers.GPT2Config(
        vocab_size=30, n_embd=8, n_layer=2, n_head=2, n_positions=8, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(config)


def words(n: int = 5):
    random = torch.Generator().manual_seed(1)
    mask = torch.ones(n, 6, dtype=torch.int64)
    mask[0, 4:] = 0
    return {"input_ids": torch.randint(0, 30, (n, 6), generator=random), "attention_mask": mask}


def classify(outputs, targets):
    return cross_entropy(outputs, targets, reduction="none")


def predict(outputs, targets):
    return cross_entropy(outputs[:, :-1].transpose(1, 2), targets[:, 1:], reduction="none").mean(1)


@pytest.mark.parametrize(("make", "loss"), [(bert, classify), (gpt, predict)])
def test_kernel_and_penalty_are_those_of_a_loop(make, loss):
    model, inputs = make().double().eval(), words()
    targets = torch.arange(5) % 3 if loss is classify else inputs["input_ids"]
    kernel = mgs.kernel(model, inputs, targets, output="loss", loss=loss, differentiable=True)  # through fused attention
    with twice_differentiable():
        rows = []
        for a in range(5):
            each = {name: value[a : a + 1] for name, value in inputs.items()}
            value = loss(model(**each).logits, targets[a : a + 1])
            parts = torch.autograd.grad(
                value, list(model.parameters()), create_graph=True, allow_unused=True, materialize_grads=True
            )
            rows.append(torch.cat([part.reshape(-1) for part in parts]))
    rows = torch.stack(rows)
    torch.testing.assert_close(kernel, rows @ rows.T, rtol=1e-10, atol=1e-12)
    penalty = mgs.Penalty("log_determinant", 1.0)
    gradients = [
        torch.autograd.grad(penalty(k), list(model.parameters()), allow_unused=True, materialize_grads=True)
        for k in (kernel, rows @ rows.T)
    ]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-11)


class PenalisedTrainer(MGSTrainerMixin, transformers.Trainer):
    pass


class Data(torch.utils.data.Dataset):
    def __init__(self, labels) -> None:
        self.inputs, self.labels = words(8), labels

    def __len__(self) -> int:
        return 8

    def __getitem__(self, number):
        return {**{name: value[number] for name, value in self.inputs.items()}, "labels": self.labels[number]}


def arguments(folder, **options):
    return transformers.TrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to=[], per_device_train_batch_size=4, logging_steps=1, save_strategy="no",
        disable_tqdm=True, seed=0, **options,
    )  # fmt: skip


@pytest.mark.parametrize("unit", ["step", "epoch"])
def test_trainer_penalises_and_logs(tmp_path, unit):
    pytest.importorskip("accelerate")
    criterion = MGSLoss(torch.nn.CrossEntropyLoss(), penalty=mgs.Penalty("trace", 0.01))
    trainer = PenalisedTrainer(
        bert(), arguments(tmp_path, max_steps=4), train_dataset=Data(torch.arange(8) % 3), eval_dataset=Data(torch.arange(8) % 3),
        mgs_loss=criterion,
    )  # fmt: skip
    callback = MGSCallback(trainer, words(), unit=unit, output="sum", **({"every": 2} if unit == "step" else {}))
    trainer.add_callback(callback)
    trainer.train()
    assert [record["step"] for record in callback.monitor.history] == ([2, 4] if unit == "step" else [0, 1])
    assert criterion.last.penalty > 0
    logged = [entry for entry in trainer.state.log_history if "mgs_trace" in entry]
    assert [entry["step"] for entry in logged] == [2, 4]
    own = [entry["step"] for entry in trainer.state.log_history if "loss" in entry]
    assert own == [1, 2, 3, 4], "the trainer's own rows stay"
    trainer.evaluate()
    assert criterion.last.penalty is None


def test_trainer_takes_a_language_model_and_accumulates(tmp_path):
    pytest.importorskip("accelerate")
    labels = words(8)["input_ids"].clone()
    labels[:, 4:] = -100
    steps = {"accumulated": (4, 2), "whole": (8, 1)}
    moved = {}
    for name, (size, accumulate) in steps.items():
        criterion = MGSLoss(next_token_loss, weighting=None, penalty=mgs.Penalty("trace", 0.0))
        options = arguments(
            tmp_path, max_steps=1, gradient_accumulation_steps=accumulate, optim="sgd", learning_rate=0.5, max_grad_norm=0.0
        )
        options.per_device_train_batch_size = size
        trainer = PenalisedTrainer(gpt(), options, train_dataset=Data(labels), mgs_loss=criterion)
        trainer.train()
        moved[name] = torch.cat([value.detach().reshape(-1) for value in trainer.model.parameters()])
    torch.testing.assert_close(moved["accumulated"], moved["whole"], rtol=1e-4, atol=1e-6)


@pytest.mark.wrong_types
def test_losses_of_the_trainers_own_and_missing_labels_are_refused(tmp_path):
    criterion = MGSLoss(torch.nn.CrossEntropyLoss())
    for options, keywords in (({"label_smoothing_factor": 0.1}, {}), ({}, {"compute_loss_func": classify})):
        with pytest.raises(mgs.ArgumentError, match="`label_smoothing_factor` and `compute_loss_func` must be left out"):
            PenalisedTrainer(bert(), arguments(tmp_path, **options), mgs_loss=criterion, **keywords)
    with pytest.raises(mgs.ArgumentError, match="`mgs_loss` must be an MGSLoss; got CrossEntropyLoss"):
        PenalisedTrainer(bert(), arguments(tmp_path), mgs_loss=torch.nn.CrossEntropyLoss())
    trainer = PenalisedTrainer(bert(), arguments(tmp_path), mgs_loss=criterion)
    with pytest.raises(mgs.ArgumentError, match='`unit` must be "step" or "epoch"; got \'steps\''):
        MGSCallback(trainer, words(), unit="steps")
    with pytest.raises(mgs.ArgumentError, match=r"`inputs` must have one column of labels for `mgs_loss`; got \['input_ids'\]"):
        trainer.compute_loss(bert(), {"input_ids": words()["input_ids"]})


def test_epochs_that_are_not_whole_have_numbers_of_their_own(tmp_path):
    pytest.importorskip("accelerate")
    data = Data(torch.arange(8) % 3)
    trainer = transformers.Trainer(bert(), arguments(tmp_path, max_steps=5), train_dataset=data)
    callback = MGSCallback(trainer, words(), unit="epoch", output="sum")
    trainer.add_callback(callback)
    trainer.train()
    assert [record["step"] for record in callback.monitor.history] == [0, 1, 2]


def test_the_model_that_the_trainer_makes_is_measured(tmp_path):
    pytest.importorskip("accelerate")
    options = arguments(tmp_path, max_steps=3, optim="sgd", learning_rate=1.0)
    trainer = transformers.Trainer(model_init=bert, args=options, train_dataset=Data(torch.arange(8) % 3))
    callback = MGSCallback(trainer, words(), every=1, output="sum")
    trainer.add_callback(callback)
    trainer.train()
    expected = mgs.kernel(trainer.model.eval(), words(), output="sum").trace()
    assert callback.monitor.history[-1]["mgs_trace"] == pytest.approx(float(expected), rel=1e-5)
    assert callback.monitor.history[0]["mgs_trace"] != pytest.approx(float(expected), rel=1e-3)


def test_the_labels_may_have_another_name(tmp_path):
    pytest.importorskip("accelerate")

    class Renamed(Data):
        def __getitem__(self, number):
            given = super().__getitem__(number)
            return {**given, "kind": given.pop("labels")}

    criterion = MGSLoss(torch.nn.CrossEntropyLoss(), penalty=mgs.Penalty("trace", 0.01))
    several = arguments(tmp_path, max_steps=1, label_names=["labels", "token_type_ids"])
    PenalisedTrainer(bert(), several, train_dataset=Data(torch.arange(8) % 3), mgs_loss=criterion).train()
    options = arguments(tmp_path, max_steps=1, label_names=["kind"])
    PenalisedTrainer(bert(), options, train_dataset=Renamed(torch.arange(8) % 3), mgs_loss=criterion).train()
    assert criterion.last.penalty > 0


def test_decoders_see_the_labels_moved_by_one(tmp_path):
    pytest.importorskip("accelerate")
    torch.manual_seed(0)
    size = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    model = transformers.BartForConditionalGeneration(
        transformers.BartConfig(
            vocab_size=50, d_model=16, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=32, dropout=0.0, **size
        )
    )
    batch = {**words(4), "labels": torch.randint(4, 50, (4, 5))}
    criterion = MGSLoss(lambda logits, labels: cross_entropy(logits.transpose(1, 2), labels, reduction="none").mean(1))
    trainer = PenalisedTrainer(model, arguments(tmp_path), mgs_loss=criterion)
    torch.testing.assert_close(trainer.compute_loss(model, batch), model(**batch).loss)


def test_a_batch_without_a_token_to_predict_has_no_loss():
    logits = torch.randn(2, 3, 4, requires_grad=True)
    losses = next_token_loss(logits, torch.full((2, 3), -100))
    losses.mean().backward()
    assert not losses.any()
    assert not logits.grad.any()
    assert next_token_loss(logits.bfloat16(), torch.ones(2, 3, dtype=torch.int64)).dtype == torch.float32


def test_next_token_loss_is_the_models_own():
    model, inputs = gpt().eval(), words()
    labels = inputs["input_ids"].clone()
    labels[1, 3:] = -100
    outputs = model(**inputs, labels=labels)
    torch.testing.assert_close(next_token_loss(outputs.logits, labels).mean(), outputs.loss)


@pytest.mark.parametrize("kind", ["tensor", "tuple"])
def test_predictions_of_models_that_return_tensors_are_whole(tmp_path, kind):
    pytest.importorskip("accelerate")

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = bert()

        def forward(self, input_ids, attention_mask):
            logits = self.inner(input_ids, attention_mask).logits
            return logits if kind == "tensor" else (logits,)

    criterion = MGSLoss(torch.nn.CrossEntropyLoss(), select=None if kind == "tensor" else lambda outputs: outputs[0])
    data = Data(torch.arange(8) % 3)
    trainer = PenalisedTrainer(Net(), arguments(tmp_path, label_names=["labels"]), mgs_loss=criterion)
    found = trainer.predict(data)
    predicted = found.predictions
    assert found.label_ids.tolist() == data.labels.tolist()
    with torch.no_grad():
        expected = trainer.model.eval().inner(**data.inputs).logits
    torch.testing.assert_close(torch.as_tensor(predicted), expected, rtol=1e-5, atol=1e-6)
