"""The audit: wrong labels are found on real data, by each backend alike; the gallery and its files."""

from __future__ import annotations

import base64
import csv
import dataclasses
import io
import re
import warnings

import numpy as np
import pytest

import mgs_core as mgs

onnx = pytest.importorskip("onnx")
roc_auc_score = pytest.importorskip("sklearn.metrics").roc_auc_score
datasets = pytest.importorskip("sklearn.datasets")
load_digits_arrays = pytest.importorskip("mgs_core.experiments.data").load_digits_arrays
module = pytest.importorskip("mgs_core.experiments.audit")
write_audit = pytest.importorskip("mgs_core.report").write_audit
gallery = pytest.importorskip("mgs_core.report.gallery")
imread = pytest.importorskip("matplotlib.image").imread

IMAGES, TRUE = (array[:600] for array in load_digits_arrays())
RANDOM = np.random.default_rng(0)
WRONG = RANDOM.random(600) < 0.2
LABELS = np.where(WRONG, (TRUE + 1) % 10, TRUE)  # the next class: the hardest kind


@pytest.fixture(scope="module")
def found():
    return mgs.audit(IMAGES, LABELS)


def test_wrong_labels_are_found_and_corrected(found):
    assert isinstance(found, mgs.Audit)
    assert roc_auc_score(WRONG, found.scores) > 0.97
    assert roc_auc_score(WRONG, found.neighbours) > 0.9
    assert roc_auc_score(WRONG, -found.class_cosine) > 0.8
    assert np.mean(found.suggested == TRUE) > 0.93  # of the given labels 0.8 are right
    assert WRONG[found.contradicted].mean() > 0.95
    assert found.contradicted[WRONG].mean() > 0.8
    assert found.weights[WRONG].mean() < 0.2 < 1.0 < found.weights[~WRONG].mean()
    np.testing.assert_array_equal(found.given, LABELS)
    assert (np.diff(found.scores[found.order]) <= 0).all()


def test_clean_labels_are_hardly_contradicted():
    clean = mgs.audit(IMAGES, TRUE)
    assert clean.contradicted.sum() <= 1
    assert clean.predictable > 0.95
    assert clean.by_heart < 0.4
    assert (clean.scores > 0).sum() > 2  # though others fit better here and there


def test_inputs_that_say_nothing_are_warned_of():
    random = np.random.default_rng(0)
    with pytest.warns(UserWarning, match=r"The samples predict \d+% of each other's labels, which naming the most frequent one"):
        nothing = mgs.audit(random.normal(size=(200, 10)), random.integers(0, 2, 200), networks=1)
    assert nothing.contradicted.mean() > 0.2  # which is why
    assert nothing.predictable < 0.6


def test_few_samples_most_of_them_wrong():
    inputs, true = datasets.load_wine(return_X_y=True)
    random = np.random.default_rng(0)
    wrong = random.random(len(true)) < 0.55
    labels = np.where(wrong, (true + random.integers(1, 3, len(true))) % 3, true)
    found = mgs.audit((inputs - inputs.mean(axis=0)) / inputs.std(axis=0), labels)
    assert roc_auc_score(wrong, found.scores) > 0.97
    assert np.mean(found.suggested == true) > 0.9
    assert wrong[~found.contradicted].mean() < 0.15  # of the given labels 0.55


def kept(monkeypatch, **options):
    """Audit 100 images, and return the kernels, the samples that each network was trained on, and what is judged by what."""
    made, trained, judged = [], [], []
    cosine, step, judge = module._Training.cosine, module._Training.step, module.judge

    def keep(training, samples):
        made.append(cosine(training, samples))
        return made[-1]

    def follow(training, batch, now):
        if not trained or trained[-1][0] is not training:
            trained.append((training, set()))
        trained[-1][1].update(batch.tolist())
        step(training, batch, now)

    monkeypatch.setattr(module._Training, "cosine", keep)
    monkeypatch.setattr(module._Training, "step", follow)
    monkeypatch.setattr(module, "judge", lambda *given: judged.append(given[:2]) or judge(*given))
    mgs.audit(IMAGES[:100], LABELS[:100], epochs=3, batch_size=10, **options)
    return made, [samples for _, samples in trained], judged[0]


def test_networks_are_trained_on_shares_of_their_own_and_their_kernels_averaged(monkeypatch):
    (first, second), (one, other), (kernels, members) = kept(monkeypatch)
    assert not one & other
    assert one | other == set(range(100))
    counts = [np.bincount(LABELS[sorted(share)], minlength=10) for share in (one, other)]
    assert abs(counts[0] - counts[1]).max() <= 1
    np.testing.assert_allclose(np.diagonal(first), 1.0)
    assert abs(first - second).max() > 0.05
    np.testing.assert_allclose(kernels, [(first + second) / 2])
    assert members[0].all()


def test_apart_each_sample_is_judged_by_networks_that_were_not_trained_on_it(monkeypatch):
    made, shares, (kernels, members) = kept(monkeypatch, networks=3, apart=True)
    for number, (kernel, judged) in enumerate(zip(kernels, members, strict=True)):
        assert set(np.flatnonzero(judged)) == shares[number]
        np.testing.assert_allclose(kernel, np.mean([own for other, own in enumerate(made) if other != number], axis=0))


def clouds(samples, columns, distance):
    """Two clouds that ten columns tell apart, a fifth of the labels wrong."""
    random = np.random.default_rng(0)
    true = random.integers(0, 2, samples)
    inputs = random.normal(size=(samples, columns))
    inputs[:, :10] += distance * (true[:, None] - 0.5)
    wrong = random.random(samples) < 0.2
    return inputs, np.where(wrong, 1 - true, true), wrong


def test_many_columns_are_warned_of_and_judged_apart():
    inputs, labels, wrong = clouds(300, 300, 2.0)
    with pytest.warns(UserWarning, match=r"learnt labels by heart.*[89]\d% of the labels, but [67]\d% of those.*Pass apart=True"):
        together = mgs.audit(inputs, labels)
    apart = mgs.audit(inputs, labels, apart=True)
    assert roc_auc_score(wrong, together.scores) < 0.9
    assert roc_auc_score(wrong, apart.scores) > 0.97
    assert together.contradicted.sum() < 5  # of 60 that are wrong
    assert wrong[apart.contradicted].mean() > 0.9
    assert apart.contradicted[wrong].mean() > 0.6
    assert together.by_heart > 0.4 > apart.by_heart == 0.0
    assert abs(together.predictable - apart.predictable) < 0.1  # by networks that were not trained on the samples


@pytest.mark.parametrize("options", [{}, {"apart": True}])
def test_labels_of_noise_are_not_called_predictable(options):
    random = np.random.default_rng(0)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        nothing = mgs.audit(random.normal(size=(300, 400)), random.integers(0, 2, 300), **options)
    assert abs(nothing.predictable - 0.5) < 0.1
    assert any("The samples predict" in str(warning.message) for warning in told)


def test_samples_that_never_meet_their_class_have_no_cosine(tmp_path):
    inputs, labels = np.repeat(10.0 * np.eye(20), 2, axis=0), np.repeat(np.arange(20), 2)
    inputs = inputs + np.random.default_rng(0).normal(size=inputs.shape)
    found = mgs.audit(inputs, labels)
    assert np.isnan(found.class_cosine).all()
    assert (mgs.audit(inputs, labels, networks=1).class_cosine > 0.5).any()
    write_audit(found, inputs, tmp_path)
    rows = csv.DictReader((tmp_path / "suspects.csv").read_text(encoding="utf-8").splitlines())
    assert {row["class_cosine"] for row in rows} == {""}


def test_few_samples_for_many_networks():
    with pytest.warns(UserWarning, match="The samples predict"):
        found = mgs.audit(IMAGES[:5], np.array([0, 1, 0, 1, 1]), networks=8, epochs=1)
    assert np.isfinite(found.scores).all()


def test_short_trainings_have_enough_steps():
    assert module.usual_epochs(1000) == 4
    assert module.usual_epochs(106) == 24  # one step an epoch
    assert module.usual_epochs(500, model="cnn") == module.usual_epochs(500, model="my.onnx") == 12
    assert module.usual_epochs(500, batch_size=10, model="cnn") == 4


def test_blocks_and_seeds_and_epochs(found):
    done = []
    blocks = mgs.audit(IMAGES, LABELS, block=200, on_epoch=done.append)
    assert blocks.blocks == 3
    assert done == list(range(1, 9))  # two networks, four epochs each
    assert roc_auc_score(WRONG, blocks.scores) > 0.95
    assert np.corrcoef(blocks.scores, found.scores)[0, 1] > 0.9  # in the order of the samples
    again = mgs.audit(IMAGES, LABELS, epochs=1, seed=5)
    np.testing.assert_array_equal(again.scores, mgs.audit(IMAGES, LABELS, epochs=1, seed=5).scores)


@pytest.mark.parametrize("backend", [name for name, there in mgs.available_backends().items() if there and name != "keras"])
def test_backends_agree(backend):
    numpy, other = (mgs.audit(IMAGES[:200], LABELS[:200], epochs=1, backend=name) for name in ("numpy", backend))
    np.testing.assert_allclose(other.scores, numpy.scores, atol=1e-3)
    np.testing.assert_allclose(other.class_cosine, numpy.class_cosine, atol=1e-3)


def mine(path, *, before=(), after=()):
    """Write the built-in network with nodes before and after it; nodes before take `raw` and give `x`."""
    proto = mgs.experiments.models.build("cnn", (8, 8), 10, seed=0).plain
    numbers = {"mean": IMAGES[:200].mean(), "deviation": IMAGES[:200].std(), "none": 0.0}
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(np.float32(value), name) for name, value in numbers.items())
    if before:
        proto.graph.input[0].name = "raw"
    for node in reversed(before):
        proto.graph.node.insert(0, node)
    proto.graph.node.extend(after)
    if after:
        proto.graph.output[0].name = "end"
    onnx.save(proto, path)
    return path


NODE = onnx.helper.make_node
SCALED = [NODE("Sub", ["raw", "mean"], ["centred"]), NODE("Div", ["centred", "deviation"], ["x"])]
SHORT = {"networks": 1, "epochs": 1}


def test_a_model_of_ones_own_takes_the_inputs_as_they_are(tmp_path):
    theirs = mgs.audit(IMAGES[:200], LABELS[:200], **SHORT, model="cnn")
    found = mgs.audit(IMAGES[:200], LABELS[:200], **SHORT, model=mine(tmp_path / "mine.onnx", before=SCALED))
    np.testing.assert_allclose(found.scores, theirs.scores, atol=2e-3)
    loaded = mgs.onnx.load(tmp_path / "mine.onnx")
    function = mgs.FunctionalModel(loaded.function, loaded.parameters)
    np.testing.assert_array_equal(mgs.audit(IMAGES[:200], LABELS[:200], **SHORT, model=function).scores, found.scores)
    with pytest.raises(mgs.ArgumentError, match=r"`model` must return a score for each of the 11 classes .*got 10 outputs"):
        mgs.audit(IMAGES[:200], LABELS[:200] + 1, model=tmp_path / "mine.onnx")
    with pytest.raises(mgs.ArgumentError, match=r"`model` must return \(n, c\), c ≥ 11 for these labels; .* \(1, 10\)"):
        mgs.audit(IMAGES[:200], LABELS[:200] + 1, model=function)
    some = mgs.audit(IMAGES[:200], LABELS[:200] % 3, **SHORT, model=tmp_path / "mine.onnx")  # which knows more classes
    assert some.suggested.shape == (200,)


@pytest.mark.parametrize("last", ["Softmax", "Sigmoid"])
def test_a_model_of_ones_own_is_trained_before_its_softmax(last, tmp_path):
    plain, ended = (
        mgs.audit(IMAGES[:200], LABELS[:200], **SHORT, model=mine(tmp_path / f"{len(after)}.onnx", before=SCALED, after=after))
        for after in ([], [NODE(last, ["logits"], ["end"])])
    )
    np.testing.assert_array_equal(ended.scores, plain.scores)


def test_files_hold_every_sample(found, tmp_path):
    page = write_audit(found, IMAGES, tmp_path, names=[f"<{k}>" for k in range(10)], shown=30)
    with (tmp_path / "suspects.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["sample"]) for row in rows] == found.order.tolist()
    assert float(rows[3]["score"]) == pytest.approx(found.scores[found.order[3]], rel=1e-5)
    assert rows[0]["given"] == f"<{LABELS[found.order[0]]}>"
    np.testing.assert_array_equal(np.load(tmp_path / "weights.npy"), found.weights)
    text = page.read_text(encoding="utf-8")
    assert text.count("data:image/png;base64,") == 30
    assert f"others predict {found.predictable:.0%} of the labels as given" in text
    assert "&lt;3&gt;" in text
    assert "<3>" not in text
    assert f"fits {(found.scores > 0).sum()} of 600 samples better; {found.contradicted.sum()} labels are contradicted" in text
    assert "http" not in text
    assert "<li>10 classes</li>" in text
    skipping = dataclasses.replace(found, given=found.given + 2, suggested=found.suggested + 2)  # none is of class 0 or 1
    assert "<li>10 classes</li>" in write_audit(skipping, IMAGES, tmp_path).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("shape", "pictures"),
    [
        ((5,), 0), ((4, 4), 6), ((3, 5, 5), 6), ((5, 5, 3), 6), ((1, 5, 5), 6), ((5, 5, 1), 6), ((2, 9, 9), 0), ((9, 9, 2), 0),
        ((4, 5, 5), 6), ((5, 5, 4), 6), ((4, 4, 4), 6), ((3, 4, 4), 6), ((3, 9, 2), 0), ((4, 9, 3), 6), ((3, 9, 9, 3), 0),
    ],
)  # fmt: skip
def test_samples_that_are_images_are_shown(shape, pictures, tmp_path):
    inputs = RANDOM.normal(size=(6, *shape))
    zero = np.zeros(6)
    audit = mgs.Audit(zero, np.array([0, 1] * 3), np.array([0, 1] * 3), zero > 0, zero, zero, zero + 1)
    assert write_audit(audit, inputs, tmp_path).read_text().count("<img") == pictures


def test_pictures_are_square_and_cards_apart(found, tmp_path):
    """Their attribute `height` would outweigh the ratio, and cards on a telephone reach over their margin."""
    text = write_audit(found, IMAGES, tmp_path).read_text(encoding="utf-8")
    assert re.search(r"\.suspects img \{[^}]* height: auto; aspect-ratio: 1;", text)
    assert re.search(r"\.suspects \.card \{[^}]* margin-inline: 0;", text)


def test_what_is_transparent_is_grey():
    def drawn(image):
        return imread(io.BytesIO(base64.b64decode(gallery._picture(image).partition(",")[2])))[..., :3]

    colours = RANDOM.uniform(0, 9, (5, 6, 3))
    opacity = np.repeat([[[0.0]], [[1.0]], [[4.0]]], [1, 2, 2], axis=0) * np.ones((5, 6, 1))
    plain = drawn(colours)
    for constant in (0.0, 255.0):
        np.testing.assert_array_equal(drawn(np.concatenate([colours, constant + 0 * opacity], axis=2)), plain)
    for image in (rgba := np.concatenate([colours, opacity], axis=2), np.moveaxis(rgba, 2, 0)):
        for row, share in ((0, 0.0), (1, 0.25), (3, 1.0)):
            np.testing.assert_allclose(drawn(image)[row], share * plain[row] + (1 - share) / 2, atol=0.01)
    rgba[..., 3] -= 1  # as scaled inputs have it
    np.testing.assert_allclose(drawn(rgba)[0], 0.5, atol=0.01)


def test_tensors_with_a_graph_are_taken(tmp_path):
    torch = pytest.importorskip("torch")
    inputs = torch.tensor(IMAGES[:60], requires_grad=True)
    found = mgs.audit(inputs, torch.tensor(LABELS[:60]), networks=1, epochs=1)
    np.testing.assert_array_equal(found.scores, mgs.audit(IMAGES[:60], LABELS[:60], networks=1, epochs=1).scores)
    assert write_audit(found, inputs, tmp_path, shown=2).read_text(encoding="utf-8").count("<img") == 2


@pytest.mark.parametrize(("factor", "shift"), [(1e30, 0.0), (1e-30, 0.0), (1.0, 1e9)])
def test_the_unit_and_the_origin_of_the_inputs_do_not_matter(factor, shift):
    plain, moved = (mgs.audit(x, LABELS[:200], epochs=2) for x in (IMAGES[:200], IMAGES[:200] * factor + shift))
    np.testing.assert_allclose(moved.scores, plain.scores, atol=0.01)


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: mgs.audit(np.zeros(5), np.arange(5)),
            r"`inputs` must be real numbers of shape.*Give each sample an axis: inputs\[:, None",
        ),
        (lambda: mgs.audit(np.ones((5, 2), "<U1"), np.arange(5)), "got dtype <U1.*Convert them to numbers"),
        (lambda: mgs.audit(np.ones((9, 1)) * [1, 2], np.arange(9) % 2), "`inputs` must differ between samples; got 9 equal ones"),
        (
            lambda: mgs.audit(IMAGES, LABELS, model="resnet"),
            r"`model` must be one of mlp, cnn, or the path of an .onnx file; got 'res",
        ),
        (lambda: mgs.audit(np.arange(96.0).reshape(2, 4, 4, 3), [0, 1], model="cnn"), r"numpy.moveaxis\(x, -1, 1\) puts"),
        (lambda: mgs.audit(np.arange(400.0).reshape(2, 5, 10, 4), [0, 1], model="cnn"), r"numpy.moveaxis\(x, -1, 1\) puts"),
        (lambda: mgs.audit(np.full((5, 2), np.nan), np.arange(5)), "`inputs` must be finite"),
        (lambda: mgs.audit(np.zeros((5, 2)), np.arange(4)), r"`labels` must be integers from 0.*shape \(5,\)"),
        (lambda: mgs.audit(np.zeros((5, 2)), np.zeros(5, int)), "of at least 2 classes"),
        (lambda: mgs.audit(IMAGES, LABELS, epochs=0), "`epochs` must be an integer of at least 1; got 0"),
        (lambda: mgs.audit(IMAGES, LABELS, networks=0), "`networks` must be an integer of at least 1; got 0"),
        (lambda: mgs.audit(IMAGES, LABELS, networks=1, apart=True), "`networks` must be at least 2 with.*Pass networks=2"),
        (lambda: mgs.audit(IMAGES[:3], np.array([0, 1, 0]), apart=True), "`networks` must be at least 2 with.*Pass four samples"),
        (lambda: mgs.audit(IMAGES, LABELS, seed=-1), "`seed` must be an integer of at least 0; got -1"),
        (lambda: mgs.audit(IMAGES, LABELS, block=1), "`block` must be an integer of at least 3; got 1"),
        (lambda: mgs.audit(IMAGES, LABELS, learning_rate=float("nan")), "`learning_rate` must be a finite number above 0"),
        (lambda: mgs.audit(IMAGES[:5], [0, 1, 0, 1, 10**7]), r"from 0 without large gaps.*return_inverse=True\)\[1\]"),
        (lambda: mgs.audit(IMAGES, LABELS, model="oracle.onnx"), "oracle.onnx"),
    ],
)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(mgs.ArgumentError, match=message):
        call()


@pytest.mark.parametrize(
    ("inputs", "names", "message"),
    [
        (IMAGES, ["a", "b"], "`names` must name each of the 10 classes; got 2 names"),
        (IMAGES[:5], None, "`inputs` must be the 600 samples of the audit; got 5"),
    ],
)
def test_names_and_samples_that_are_too_few_are_refused(found, tmp_path, inputs, names, message):
    with pytest.raises(mgs.ArgumentError, match=message):
        write_audit(found, inputs, tmp_path, names=names)


def test_the_page_says_by_which_samples_each_is_judged(found, tmp_path):
    assert found.blocks == 1
    assert "the gradients of all other samples predict" in write_audit(found, IMAGES, tmp_path).read_text(encoding="utf-8")
    text = write_audit(dataclasses.replace(found, blocks=3), IMAGES, tmp_path).read_text(encoding="utf-8")
    assert "judged in 3 blocks" in text
    assert "the gradients of all other samples of its block, which was drawn at random, predict" in text


def test_an_unwritable_folder_is_refused(found, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(mgs.ArgumentError, match="`folder` must be a folder that can be written"):
        write_audit(found, IMAGES, tmp_path / "file")


@pytest.mark.parametrize(
    ("units", "match"),
    [
        ([1, 1, 30, 1, 1], "Column 2 of `inputs` has 99% of their variance and half of the columns together less than 1%"),
        ([1, 1, 1e4], "Column 2 of `inputs` has 100%"),
        ([1e4, 1], "Column 0 of `inputs` has 100%"),
        ([1] * 7 + [1e4], "Column 7 of `inputs` has 100%"),
        ([1] * 13 + [20] * 3, r"Column 1[345] of `inputs` has [34]\d%"),  # no column has most
        ([0, 0, 1, 0, 300], "Column 4 of `inputs` has 100%"),  # constant columns count neither way
    ],
)
@pytest.mark.filterwarnings("ignore:The samples predict")  # their labels are anyone's
def test_a_table_in_several_units_is_warned_of(units, match):
    x, y = np.random.default_rng(0).normal(size=(60, len(units))), np.arange(60) % 2
    with pytest.warns(UserWarning, match=match):
        mgs.audit(x * units, y, networks=1, epochs=1)
    mgs.audit((x - x.mean(0)) / x.std(0), y, networks=1, epochs=1)  # warnings are errors


def test_tables_in_one_unit_are_not_warned_of():
    """Nor is one in which a column varies some times as much, from which the audit learns no less."""
    random = np.random.default_rng(0)
    pixels = random.uniform(0, 255, (300, 64)) * (np.arange(64) < 20)
    pixels[np.arange(44), np.arange(20, 64)] = 255  # each of these is lit once
    coins = (random.random((5000, 10)) < [0.5] * 5 + [0.001] * 5).astype(float)
    scaled = (coins - coins.mean(0)) / coins.std(0)  # those that are rare range far
    some = random.normal(size=(60, 5)) * [1, 7, 1, 0, 0]
    for x in (IMAGES.reshape(600, -1), pixels, coins, scaled, datasets.load_iris().data, some, some[:, :1], some[:, 3:]):
        module.warn_of_units(x)  # warnings are errors


def test_an_audit_is_printed_as_figures_and_suspects():
    found = mgs.audit(IMAGES[:120], LABELS[:120], epochs=2)
    lines = str(found).splitlines()
    assert lines[0].split() == ["samples", "120"]
    assert {"predictable", "by_heart", "blocks"} <= {line.split()[0] for line in lines[:6]}
    a = int(found.order[0])
    assert lines[-10].split() == [str(a), str(LABELS[a]), str(found.suggested[a]), f"{found.scores[a]:+.3f}"]
    assert len(lines) == 18
