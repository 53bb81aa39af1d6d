"""The model, its standardization, the loop of an epoch, and what the scripts' default flags make of hard data."""

import math
import re
import runpy

import numpy as np
import pytest
import torch
from torch.func import functional_call, hessian
from torch.nn.functional import linear, nll_loss, one_hot, softmax

from ddp_tutorial.model import ScaleInputs, SimpleModel
from ddp_tutorial.training import evaluate, train_one_epoch
from tests.ranks import DDP, RESILIENT, SINGLE, save_data, start_ranks, train

CPU = torch.device("cpu")


@pytest.fixture
def problem():
    torch.manual_seed(0)
    return SimpleModel(5, 3), torch.randn(50, 5), torch.randint(3, (50,))


def batches(x, y, size):
    return list(zip(x.split(size), y.split(size), strict=True))


@pytest.mark.parametrize("path", [SINGLE, DDP, RESILIENT], ids=lambda path: path.stem)
def test_the_model_is_a_linear_layer_and_a_softmax(path, problem):
    model, x, _ = problem
    expected = softmax(linear(x, model.linear.weight, model.linear.bias), dim=1)
    torch.testing.assert_close(model(x), expected.log())
    in_script = runpy.run_path(str(path))["SimpleModel"](5, 3)  # the reader's copy must not drift from ours
    assert list(in_script.state_dict()) == list(model.state_dict())
    in_script.load_state_dict(model.state_dict())
    assert torch.equal(in_script(x), model(x))


def test_large_scores_stay_finite(problem):
    model, x, y = problem
    assert nll_loss(model(x * 1e6), y).isfinite()


def test_the_gradient_is_the_closed_form(problem):
    model, x, y = problem
    nll_loss(model(x), y).backward()
    residual = model(x).exp().detach() - one_hot(y, 3)
    torch.testing.assert_close(model.linear.weight.grad, residual.T @ x / len(x))
    torch.testing.assert_close(model.linear.bias.grad, residual.mean(0))


FEATURES = {
    "independent": lambda z: z[:, :6],
    "one feature": lambda z: z[:, :1],
    "equal": lambda z: z[:, :1].repeat(1, 12) * 100 + 3000,
    "nearly equal": lambda z: z[:, :1] + 0.05 * z,
    "few directions": lambda z: z[:, :2] @ torch.ones(2, 12).double().cumsum(0).cumsum(1) + 7,
    "wild scales": lambda z: z * torch.logspace(-3, 3.6, 12) + torch.logspace(3.6, -3, 12),
    "heavy tails": lambda z: z**5,
    "some constant": lambda z: torch.cat((z[:, :3], torch.full_like(z[:, :3], 4e3)), dim=1),
}


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # from inside torch.func
@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("n_classes", [2, 4])
def test_standardize_bounds_the_curvature(features, n_classes):
    torch.manual_seed(0)
    x = FEATURES[features](torch.randn(80, 12, dtype=torch.float64))
    scaled = ScaleInputs(x.mean(0), x.std(0, correction=0)).double()(x)
    constant = 3 if features == "some constant" else 0
    mean_square = scaled.square().sum(1).mean().item()
    assert mean_square == pytest.approx(1 - constant / x.shape[1], abs=1e-4)  # the buffers are float32

    y = torch.randint(n_classes, (80,))
    model = SimpleModel(x.shape[1], n_classes).double()

    def loss(flat):
        weight, bias = flat[:-n_classes].view_as(model.linear.weight), flat[-n_classes:]
        return nll_loss(functional_call(model, {"linear.weight": weight, "linear.bias": bias}, (scaled,)), y)

    size = n_classes * (x.shape[1] + 1)
    for point in (torch.zeros(size), torch.randn(size)):
        curvature = torch.linalg.eigvalsh(hessian(loss)(point.double()))
        assert 0.01 < curvature[-1] <= 0.5 + 1e-4


def test_train_one_epoch_counts_each_sample_once(problem):
    model, x, y = problem
    frozen = torch.optim.SGD(model.parameters(), lr=0.0)
    steps = train_one_epoch(model, batches(x, y, 16), frozen, CPU)
    assert steps.dtype == torch.float64 and steps[:, 1].tolist() == [16, 16, 16, 2]
    loss_sum = steps[:, 0].sum().item()
    assert loss_sum == pytest.approx(nll_loss(model(x), y, reduction="sum").item(), rel=1e-6)


def test_train_one_epoch_takes_the_steps_of_sgd(problem):
    model, x, y = problem
    twin = SimpleModel(5, 3)
    twin.load_state_dict(model.state_dict())
    expected = []
    for part_x, part_y in batches(x, y, 16):
        loss = nll_loss(twin(part_x), part_y)
        expected.append(loss.item() * len(part_y))
        for p, gradient in zip(twin.parameters(), torch.autograd.grad(loss, list(twin.parameters())), strict=True):
            p.data -= 0.5 * gradient
    model.eval()
    steps = train_one_epoch(model, batches(x, y, 16), torch.optim.SGD(model.parameters(), lr=0.5), CPU)
    assert steps[:, 0].tolist() == pytest.approx(expected, rel=1e-6)  # each before its step
    torch.testing.assert_close(model.state_dict(), twin.state_dict())
    assert model.training


def test_an_epoch_in_two_parts_is_one_epoch(problem):
    """Bit for bit: a stopped run goes on in the middle of an epoch."""
    model, x, y = problem
    twin = SimpleModel(5, 3)
    twin.load_state_dict(model.state_dict())
    whole = train_one_epoch(model, batches(x, y, 4), torch.optim.SGD(model.parameters(), lr=0.5), CPU)
    optimizer, parts = torch.optim.SGD(twin.parameters(), lr=0.5), batches(x, y, 4)
    halves = [train_one_epoch(twin, half, optimizer, CPU) for half in (parts[:5], parts[5:])]
    assert torch.equal(torch.cat(halves), whole)
    assert torch.equal(twin.linear.weight, model.linear.weight)


@pytest.mark.parametrize("bad", [0, 7, 12])
def test_the_first_loss_that_is_not_finite_has_its_row(bad, problem):
    model, x, y = problem
    parts = batches(x, y, 4)
    parts[bad][0][0, 0] = torch.nan
    steps = train_one_epoch(model, parts, torch.optim.SGD(model.parameters(), lr=0.5), CPU)
    assert steps[:, 0].isfinite().tolist() == [True] * bad + [False] * (13 - bad)


def test_the_loss_falls(problem):
    model, x, y = problem
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    seen = [train_one_epoch(model, batches(x, y, 50), optimizer, CPU)[0, 0].item() for _ in range(10)]
    assert all(later < earlier for earlier, later in zip(seen, seen[1:], strict=False))


def test_evaluate_counts_each_sample_once(problem):
    model, x, y = problem
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    loss_sum, n_samples, n_correct = evaluate(model, batches(x, y, 16), CPU).tolist()
    assert loss_sum == pytest.approx(nll_loss(model(x), y, reduction="sum").item(), rel=1e-6)
    assert (n_correct, n_samples) == ((model(x).argmax(1) == y).sum().item(), 50)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert not model.training and all(p.grad is None for p in model.parameters())


def test_evaluate_nothing(problem):
    assert evaluate(problem[0], [], CPU).tolist() == [0, 0, 0]  # a rank without validation samples


def test_wild_features_train_as_well_as_tame_ones(script, gaussian, gaussian_run, tmp_path):
    arrays = {path.stem: np.load(path) for path in gaussian.glob("*.npy")}
    tame = gaussian_run.history[-1]["val_loss"]
    scale = np.geomspace(1e-3, 4e3, arrays["X_train"].shape[1])
    for split in ("X_train", "X_val"):
        arrays[split] = (arrays[split] * scale + 50 * scale).astype(np.float32)
    wild = train(0, script, save_data(tmp_path / "wild", **arrays), tmp_path / "out").history[-1]["val_loss"]
    print(f"validation loss: tame {tame:.4f}, wild {wild:.4f}")
    assert wild == pytest.approx(tame, abs=0.005)


def test_many_correlated_features_with_an_offset(script, tmp_path):
    rng = np.random.default_rng(0)
    y = rng.integers(5, size=2500)
    hidden = rng.standard_normal((2500, 10)) + rng.standard_normal((5, 10))[y]
    X = (hidden @ rng.random((10, 784)) + 0.1 * rng.standard_normal((2500, 784)) + 1000).astype(np.float32)
    assert np.corrcoef(X.T).mean() > 0.5
    data = save_data(tmp_path / "data", X_train=X[:2000], y_train=y[:2000], X_val=X[2000:], y_val=y[2000:])
    history = train(0, script, data, tmp_path / "out").history
    print(f"validation loss: {history[-1]['val_loss']:.4f}, chance {math.log(5):.4f}")
    assert history[-1]["val_loss"] < 0.6 * math.log(5)


DIVERGED = r"the loss is not finite, .*: use a smaller --lr"


def divergence(path, ranks):
    """What the one line says that ends diverging ranks."""
    assert [rank.code for rank in ranks] == [2] * len(ranks), ranks
    (line,) = "".join(rank.stderr for rank in ranks).splitlines()
    return line.removeprefix(f"{path.name}: error: ")


@pytest.mark.parametrize("n", [0, 4])
def test_divergence_names_the_step_and_the_remedy(n, script, small, tmp_path):
    ranks = start_ranks(n, script, "--data-dir", small, "--out", tmp_path / "out", "--lr", 9e37)
    assert re.fullmatch(r"epoch \d+, step 1: " + DIVERGED, divergence(script, ranks))


@pytest.mark.parametrize("path, n", [(SINGLE, 0), (DDP, 0), (DDP, 4)], ids=["single", "ddp_alone", "ddp_four_ranks"])
def test_divergence_names_the_epoch_and_the_remedy(path, n, small, tmp_path):
    ranks = start_ranks(n, path, "--data-dir", small, "--out", tmp_path / "out", "--lr", 9e37)
    assert re.fullmatch(r"epoch \d+: " + DIVERGED, divergence(path, ranks))


def test_a_validation_that_diverges_in_the_only_epoch(single, ddp, script, small, tmp_path):
    """The loss of the only step is that of the first weights. What the step makes of them is finite, but not there."""
    save_data(small, X_val=1000 * np.load(small / "X_val.npy"))
    for path in (single, ddp, script):
        flags = ("--data-dir", small, "--out", tmp_path / path.stem, "--lr", 9e37, "--epochs", 1)
        assert re.fullmatch("epoch 1: " + DIVERGED, divergence(path, start_ranks(0, path, *flags)))


# No run ends in silence


def test_a_run_that_an_outlier_spoils_says_why_before_and_after(single, ddp, script, gaussian, tmp_path):
    arrays = {path.stem: np.load(path) for path in gaussian.glob("*.npy")}
    arrays["X_train"][2000] = 1e4
    data = save_data(tmp_path / "data", **arrays)
    for path, n in ((single, 0), (ddp, 2), (script, 2)):
        flags = ("--data-dir", data, "--out", tmp_path / path.stem, "--epochs", 2)
        first, *others = start_ranks(n, path, *flags)
        assert first.code == 0 and {(rank.code, rank.stderr) for rank in others} <= {(0, "")}, others
        before, after = first.stderr.splitlines()
        assert re.fullmatch(f"warning: {data}/X_train.npy: .* feature \\d+ .*: look for outliers, or clip them", before)
        assert re.fullmatch(r"warning: a validation loss of 1\.\d+ is .* guessing .* \(1\.38\d+\): look for .*", after)


@pytest.mark.parametrize("kind", ["gaussian", "digits"])
def test_a_run_that_learns_has_no_warning(kind, single, request, tmp_path):
    data = request.getfixturevalue(kind)
    (rank,) = start_ranks(0, single, "--data-dir", data, "--out", tmp_path, "--epochs", 2)
    assert (rank.code, rank.stderr) == (0, "")


def test_labels_of_other_rows_are_warned_of(single, gaussian, tmp_path):
    arrays = {path.stem: np.load(path) for path in gaussian.glob("*.npy")}
    np.random.default_rng(0).shuffle(arrays["y_train"])
    data = save_data(tmp_path / "data", **arrays)
    (rank,) = start_ranks(0, single, "--data-dir", data, "--out", tmp_path / "out", "--epochs", 5)
    (line,) = rank.stderr.splitlines()
    assert rank.code == 0 and "labels that belong to other rows" in line
