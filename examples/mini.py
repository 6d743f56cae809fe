"""Second-order pruning on one page: trace, score, plan, cut, check.  Notebooks 01_tracing and 04_obd derive it."""

import copy
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

OUTSIDE = "", 0  # the axis of all that must stay: inputs, outputs, space, and whatever meets an unknown operator


def equation(func, args, given, made):
    """Return what an operator makes equal, in einsum's notation: equal letters are equal axes, dots are OUTSIDE."""
    match str(func), args:
        case "aten.convolution.default", [Tensor(ndim=4), *_, False, _, 1]:  # not transposed, one group
            return "nc..,oc..,o->no.."
        case "aten.native_batch_norm.default" | "aten.max_pool2d_with_indices.default", [Tensor(ndim=4), *_]:
            return "nc..,c,c,c,c->nc.."  # pooling has no weights
        case "aten.mean.dim", [Tensor(ndim=4), [2, 3] | [-2, -1] | [-1, -2], *_]:
            return "nc..->nc.." if made[0].ndim == 4 else "nc..->nc"
        case "aten.view.default", [Tensor(shape=[n, c, 1, 1]), _] if made[0].shape == (n, c):
            return "nc..->nc"
        case "aten.t.default" | "aten.mm.default", [Tensor(ndim=2), *_]:
            return "oc->co" if len(given) == 1 else "nc,co->no"
        case "aten.addmm.default", [Tensor(shape=[width]), *_] if width == made[0].shape[1]:
            return "o,nc,co->no"
        case _ if torch.Tag.pointwise in func.tags and {x.shape for x in given} == {x.shape for x in made}:
            return ",".join("abcdefgh"[: x.ndim] for x in given) + "->" + "abcdefgh"[: made[0].ndim]
    return ",".join("." * x.ndim for x in given) + "->"  # unknown


class Recorder(TorchDispatchMode):
    """Sees every operator.  An axis is a (name, dim) of a parameter or buffer; equal axes share a root (union-find)."""

    def __init__(self, model):
        super().__init__()
        self.root = {OUTSIDE: OUTSIDE}
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            tensor.axes = [(name, dim) for dim in range(tensor.ndim)]
            self.root |= {axis: axis for axis in tensor.axes}

    def unify(self, *axes):
        roots = {self.root[axis] for axis in axes}
        self.root |= {axis: min(roots) for axis, root in self.root.items() if root in roots}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given, made = ([x for x in tree_leaves(tree) if isinstance(x, Tensor)] for tree in ((args, kwargs), result))
        left, right = equation(func, args, given, made).split("->")
        named = {".": OUTSIDE}
        for tensor, letters in zip(given, left.split(","), strict=False):  # weights may be missing
            for axis, letter in zip(getattr(tensor, "axes", [OUTSIDE] * tensor.ndim), letters, strict=True):
                self.unify(axis, named.setdefault(letter, axis))
        for tensor in made:
            tensor.axes = [named[letter] for letter in (right if len(right) == tensor.ndim else "." * tensor.ndim)]
        return result


def trace(model, images):
    """Return the groups, each a list of the (name, dim) of parameters and buffers that must lose the same units."""
    model = copy.deepcopy(model).cpu()
    with torch.no_grad(), Recorder(model) as recorder:
        recorder.unify(OUTSIDE, *model(images.cpu()).axes)
    _, *roots = dict.fromkeys(recorder.root.values())  # the first is that of OUTSIDE
    groups = [[axis for axis, root in recorder.root.items() if root == one] for one in roots]
    return [group for group in groups if len(group) > 1]  # what equals nothing else is not in use


def score(model, groups, images, labels):
    """Score a unit by ½ Σ w² E[g²] over its weights w: OBD, with the gradients g of the losses of single samples."""
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    slope = grad(lambda weights, x, y: F.cross_entropy(functional_call(model, weights, x[None]), y[None]))
    g = vmap(slope, (None, 0, 0), chunk_size=64)(weights, images, labels)
    costs = {name: weight**2 * g[name].square().mean(0) / 2 for name, weight in weights.items()}
    slices = [[costs[name].movedim(dim, 0) for name, dim in group if name in costs] for group in groups]
    return [sum(rows.reshape(len(rows), -1).sum(1) for rows in group) for group in slices]


def plan(scores, share):
    """Return a mask per group of the units that stay: the cheapest share of all units goes, but never a whole group."""
    ranks = torch.cat(scores).argsort().argsort().split([len(costs) for costs in scores])
    return [(rank >= round(share * sum(map(len, ranks)))) | (rank == rank.max()) for rank in ranks]


def cut(model, groups, stay, silence=False):
    """Return a copy with only the units that stay; or, to check it, one of full size with zeros for the others."""
    model = copy.deepcopy(model)
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    for group, mask in zip(groups, stay, strict=True):
        kept, gone = torch.where(mask)[0], torch.where(~mask)[0]
        for name, dim in group:
            old = tensors[name].data
            tensors[name].data = old.index_fill(dim, gone, 0) if silence else old.index_select(dim, kept)
            layer = vars(model.get_submodule(name.rpartition(".")[0]))
            sizes = ("in_channels", "in_features") if dim else ("out_channels", "out_features", "num_features")
            layer.update({size: tensors[name].shape[dim] for size in sizes if size in layer})
    return model


class Residual(nn.Sequential):
    """Adds its input to the output of its layers."""

    def forward(self, x):
        return F.relu(x + super().forward(x))


def network(width=16):
    """Return a small residual network for images of 32 × 32 pixels."""
    parts = []
    for before, n in ((3, width), (width, 2 * width), (2 * width, 4 * width)):
        inner = nn.Conv2d(n, n, 3, 1, 1), nn.BatchNorm2d(n), nn.ReLU(), nn.Conv2d(n, n, 3, 1, 1), nn.BatchNorm2d(n)
        parts += [nn.Conv2d(before, n, 3, 2, 1), nn.BatchNorm2d(n), nn.ReLU(), Residual(*inner)]
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10))


def main(epochs=5):
    """Run this page: train a small network, prune it more and more, and print what is left."""
    folder = Path(__file__).parents[1] / "data" / "cifar10-mini"
    sheets = json.loads((folder / "manifest.json").read_text())["train"]  # of 25 × 40 images each
    pixels = b"".join(Image.open(folder / name).convert("RGB").tobytes() for name in sheets["sheets"])
    images = torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(-1, 32, 40, 32, 3).permute(0, 2, 4, 1, 3)
    images, labels = images.reshape(-1, 3, 32, 32) / 64 - 2, torch.tensor([int(digit) for digit in sheets["labels"]])
    torch.manual_seed(0)
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for batch in torch.cat([torch.randperm(4000) for _ in range(epochs)]).split(50):  # the other 1000 are for the test
        optimizer.zero_grad()
        F.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
    groups = trace(model.eval(), images[:2])
    scores = score(model, groups, images[:256], labels[:256])
    print("removed  by      parameters  accuracy")
    for share in (0, 0.05, 0.1, 0.2, 0.3):
        for name, costs in {"OBD": scores, "random": [torch.rand_like(costs) for costs in scores]}.items():
            small, silenced = (cut(model, groups, plan(costs, share), silence) for silence in (False, True))
            logits, wanted = (net(images[4000:]).detach() for net in (small, silenced))
            torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)
            accuracy = (logits.argmax(1) == labels[4000:]).float().mean()
            print(f"{share:7.0%}  {name:6}  {sum(w.numel() for w in small.parameters()):10}  {accuracy:8.1%}")


if __name__ == "__main__":
    main()
