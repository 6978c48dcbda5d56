"""Functions written in Python may take numbers and names among their tensors, and return several tensors or none for some."""

import pytest

torch = pytest.importorskip("torch")
from mgs_core.adapters.torch import MGSLoss  # noqa: E402  # after the skip
from torch import nn  # noqa: E402  # after the skip

import mgs_core as mgs  # noqa: E402  # after the skip


class Scaled(torch.autograd.Function):
    """`scale · x w`, with arguments that are no tensors, and tensors without gradient, before and between."""

    @staticmethod
    def forward(ctx, scale, x, name, mask, w, bias=None):
        ctx.save_for_backward(x, mask, w)
        ctx.scale = scale
        return scale * (x * mask) @ w

    @staticmethod
    def backward(ctx, gradient):
        x, mask, w = ctx.saved_tensors
        return None, ctx.scale * gradient @ w.T * mask, None, None, ctx.scale * (x * mask).T @ gradient, None


class Split(torch.autograd.Function):
    """`x w` and `sin(x w)`; a caller may use one of them alone."""

    @staticmethod
    def forward(ctx, x, axis, w):
        ctx.save_for_backward(x, w)
        return x @ w, torch.sin(x @ w)

    @staticmethod
    def backward(ctx, one, other):
        x, w = ctx.saved_tensors
        total = one + other * torch.cos(x @ w)
        return total @ w.T, None, x.T @ total


class Frugal(torch.autograd.Function):
    """`x w` and its root, of which backward is told by None that it is not used."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, w)
        return x @ w, torch.relu(x @ w).sqrt()

    @staticmethod
    def backward(ctx, one, other):
        x, w = ctx.saved_tensors
        if other is not None:  # is infinite at 0
            one = one + other * 0.5 / torch.relu(x @ w).sqrt()
        return one @ w.T, x.T @ one


MASK = torch.tensor([1.0, 0.0, 2.0, 1.0], dtype=torch.float64)
BODIES = {
    "numbers and names": lambda s, x: Scaled.apply(2.0, s.first(x).tanh(), "name", MASK, s.w),
    "the weight is first": lambda s, x: Scaled.apply(0.5, s.w.T, "name", torch.ones(4).double(), s.first(x).T).T,
    "square, so that shapes cannot tell": lambda s, x: Scaled.apply(2.0, x, "name", MASK, s.first.weight).tanh() @ s.w,
    "twice": lambda s, x: Scaled.apply(2.0, Scaled.apply(1.0, x, "a", MASK, s.first.weight), "b", MASK, s.first.weight) @ s.w,
    "one output": lambda s, x: Split.apply(s.first(x).tanh(), 1, s.w)[0],
    "the other output": lambda s, x: Split.apply(s.first(x).tanh(), 1, s.w)[1],
    "both outputs": lambda s, x: sum(Split.apply(s.first(x).tanh(), 1, s.w)),
    "not told of what is not used": lambda s, x: Frugal.apply(s.first(x).tanh(), s.w)[0],
    "below a norm": lambda s, x: x @ torch._weight_norm(Scaled.apply(2.0, s.first.weight, "n", MASK, s.w), s.g, 0),
}


class Network(nn.Module):
    """Apply one of the bodies."""

    def __init__(self, body) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.first = body, nn.Linear(4, 4).double()
        self.w = nn.Parameter(torch.randn(4, 3, dtype=torch.float64))
        self.g = nn.Parameter(torch.rand(4, 1, dtype=torch.float64) + 0.5)

    def forward(self, x):
        return self.body(self, x)


X, Y = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 2, 1, 1, 0])


def rows(model, **options):
    found = [
        torch.autograd.grad(output, list(model.parameters()), allow_unused=True, materialize_grads=True, **options)
        for a in range(len(X))
        for output in model(X[a : a + 1])[0]
    ]
    return torch.stack([torch.cat([part.flatten() for part in parts]) for parts in found]).view(len(X), 3, -1)


@pytest.mark.parametrize("name", BODIES)
def test_kernel_is_that_of_a_loop(name):
    model = Network(BODIES[name])
    expected = rows(model, retain_graph=True)
    torch.testing.assert_close(mgs.kernel(model, X), torch.einsum("acp,bcp->ab", expected, expected))
    torch.testing.assert_close(mgs.kernel(model, X, output="full"), torch.einsum("acp,bdp->acbd", expected, expected))


@pytest.mark.parametrize("name", BODIES)
def test_gradient_of_a_penalty_is_that_of_central_differences(name):
    model = Network(BODIES[name])
    criterion = MGSLoss(nn.CrossEntropyLoss(), penalty=mgs.Penalty("log_determinant", 1.0), output="trace", model=model)
    criterion(model(X), Y).backward()
    direction = [torch.randn_like(value) for value in model.parameters()]
    pairs = zip(model.parameters(), direction, strict=True)
    along = sum(float((value.grad * part).sum()) for value, part in pairs if value.grad is not None)
    values = []
    for step in (1e-5, -2e-5):
        with torch.no_grad():
            for value, part in zip(model.parameters(), direction, strict=True):
                value.add_(part, alpha=step)
        values.append(float(criterion(model(X), Y).detach()))
    assert along == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-6)


class Centred(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, over_batch):
        ctx.over_batch = over_batch
        return x - x.mean(0 if over_batch else 1, keepdim=True)

    @staticmethod
    def backward(ctx, above):
        return above - above.mean(0 if ctx.over_batch else 1, keepdim=True), None


class Switched(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last, self.over_batch = nn.Linear(4, 5).double(), nn.Linear(5, 2).double(), False

    def forward(self, x):
        return self.last(Centred.apply(self.first(x), self.over_batch).sin())


def test_what_a_function_keeps_belongs_to_the_structure():
    model = Switched()
    for _ in range(2):
        mgs.kernel(model, X)
    model.over_batch = True
    with pytest.raises(mgs.SamplesInteractError):
        mgs.kernel(model, X)


class Reversible(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, module):
        ctx.module = module
        ctx.save_for_backward(x)
        with torch.no_grad():
            return module(x)

    @staticmethod
    def backward(ctx, gradient):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            torch.autograd.backward(ctx.module(x), gradient)
        return x.grad, None


class WithinReversible(nn.Module):
    def __init__(self):
        super().__init__()
        self.before, self.within, self.after = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        return self.after(Reversible.apply(self.before(x), self.within))


@pytest.mark.parametrize("stepped", [False, True])
def test_functions_that_take_a_backward_pass_of_their_own_are_refused(stepped):
    model, x = WithinReversible(), torch.randn(5, 4)
    if stepped:
        model(x).sum().backward()
        model.within.weight.grad[0, 0] = torch.nan  # as an overflow leaves it
    held = [value.grad for value in model.parameters()]
    before = [None if value.grad is None else value.grad.clone() for value in model.parameters()]
    with pytest.raises(mgs.UnsupportedModelError, match="calls `backward` itself, as those of reversible networks do"):
        mgs.kernel(model, x)
    for value, gradient in zip(model.parameters(), before, strict=True):
        assert (value.grad is None) == (gradient is None)
        assert gradient is None or torch.equal(value.grad.nan_to_num(), gradient.nan_to_num())
    assert all(value.grad is gradient for value, gradient in zip(model.parameters(), held, strict=True))


def test_gradients_that_are_there_do_not_matter():
    split, x = WithinReversible(), torch.randn(5, 4)
    split.forward = lambda x: Split.apply(split.before(x), 1, split.after.weight)[0]
    truth = mgs.kernel(split, x, parameters=["before.weight", "after.weight"])
    split.before.weight.grad = torch.full((4, 4), torch.nan)
    torch.testing.assert_close(mgs.kernel(split, x, parameters=["before.weight", "after.weight"]), truth)
    assert split.before.weight.grad.isnan().all()
