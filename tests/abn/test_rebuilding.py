"""model.recompute=grouped, identity_input and both: gradients of the plain network, from fewer maps."""

import gc
import os

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from segtrain.models.blocks import ResidualBlock
from segtrain.models.memory import Allocations
from tests.helpers import processes
from tests.helpers.rebuilt import MODES, away, gradient, images, made, step


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("recompute", MODES)
def test_a_step_is_that_of_the_plain_network(backend, recompute, pooled, channels_last):
    """Output, gradients, running statistics and their count, in float64."""
    x = images()
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    plain, ours = made("none", pooled=pooled), made(recompute, pooled=pooled)
    for wanted, found in zip(step(plain, x), step(ours, x), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)
    assert ours.body[1].num_batches_tracked == 1


@pytest.mark.parametrize("options", [{"activation": "elu"}, {"variant": "two"}, {"scale": "signed"}])
def test_every_form_of_the_layer(options):
    assert away(step(made("both", **options))[1], step(made("none", **options))[1]) < 1e-12


@pytest.mark.parametrize(
    ("recompute", "options"),
    [
        ("identity_input", {"widths": (16, 16)}),  # basic blocks, as WideResNet-38's
        ("grouped", {"kind": ResidualBlock}),  # post-activation, as torchvision's ResNeXts
    ],
)
def test_other_blocks(recompute, options):
    assert away(step(made(recompute, **options))[1], step(made("none", **options))[1]) < 1e-12


def test_two_runs_are_equal_to_the_bit(backend):
    one, other = (step(made("both", torch.float32)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("recompute", MODES)
def test_float32_is_as_near_to_float64(backend, recompute):
    exact = step(made("none"))[1]
    plain, ours = (step(made(mode, torch.float32))[1] for mode in ("none", recompute))
    assert away(ours, exact) < 1.1 * away(plain, exact) + 1e-6


@pytest.mark.parametrize("recompute", MODES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_adds_in_float32(backend, recompute, dtype):
    """The distance from float64 over eight batches: in a single one, half precision has one form nearer by chance."""
    distances = {"none": 0.0, recompute: 0.0}
    for seed in range(8):
        x = images(seed=seed)
        exact = step(made("none"), x)[1]
        for mode in distances:
            distances[mode] += away(step(made(mode, torch.float32), x.float(), autocast=dtype)[1], exact) ** 2
    assert distances[recompute] ** 0.5 < 1.1 * distances["none"] ** 0.5
    seen = []
    model = made(recompute, torch.float32)
    for block in model.body[2]:
        block.register_forward_hook(lambda block, _, out: seen.append(out.dtype))
    step(model, autocast=dtype)
    assert set(seen) == {dtype if recompute == "grouped" else torch.float32}


# ------------------------------------------------------------------------------------------------ what is kept


def kept_maps(model, x, autocast=None):
    """What is alive after forward, in maps of x's height and width with 8 channels in float32."""
    if model.rebuilding is not None:
        model.rebuilding.passes = 1  # not the first pass, which takes samples
    with Allocations() as allocations, torch.autocast("cpu", torch.bfloat16, enabled=autocast is not None):
        out = model(x)
        gc.collect()
        kept = allocations.alive() - out.nbytes
    out.sum().backward()
    return kept / (x.shape[0] * 8 * x.shape[2] * x.shape[3] * 4)


@pytest.mark.parametrize(
    ("recompute", "maps"),
    # The stem's output; then for each block its activated input (1, then 2) and two inner maps; then bn_out's.
    [
        ("none", 1 + (1 + 2 * 2) + 3 * 2 + 2 + (3 * 2 + 4 * 2 + 2) / 4),
        ("grouped", 1 + (1 + 2 * 2) + 3 + 2 + (3 * 2 + 4 + 2) / 4),
        # What the first block reads, two inner maps a block, the sums that end the stages.
        ("identity_input", 1 + 1 + 3 * 2 + 2 + (4 * 2 + 2) / 4),
        ("both", 1 + 1 + 3 + 2 + (4 + 2) / 4),
    ],
)
def test_what_each_mode_keeps(recompute, maps):
    """Two stages of three and four blocks; the second, with a stride, has a quarter of the pixels."""
    model = made(recompute, torch.float32)
    assert kept_maps(model, images(torch.float32, size=64)) == pytest.approx(maps, rel=0.01)


def test_maps_before_a_max_pooling_are_kept_once():
    """The pooled map is pooled again from the sum that the walk begins with."""
    sizes = [
        kept_maps(made(mode, torch.float32, pooled=True), images(torch.float32, size=64)) for mode in ("none", "both")
    ]
    # 2 / 4 of offsets in bytes, 1 / 4 each
    assert sizes[1] == pytest.approx(1 + 1 + 3 + 2 + 0.5 / 4 + (4 + 2) / 4, rel=0.01)
    assert sizes[1] < 0.6 * sizes[0]


def test_half_precision_keeps_half_and_the_ends_in_float32():
    model = made("both", torch.float32)
    found = kept_maps(model, images(torch.float32, size=64), torch.bfloat16)
    images_in_half = 3 / 8 / 2
    assert found == pytest.approx((1 + 1 + 3) / 2 + 2 + 4 / 2 / 4 + 2 / 4 + images_in_half, rel=0.01)


def test_backward_computes_each_map_once_and_frees_it():
    model, x = made("both", torch.float32), images(torch.float32, size=64)
    counted = []
    forward = nn.functional.conv2d
    with Allocations() as allocations:
        out = model(x).sum()
        nn.functional.conv2d, before = lambda *a: (counted.append(1), forward(*a))[1], allocations.alive()
        try:
            out.backward()
        finally:
            nn.functional.conv2d = forward
        allocations.peak = 0
        assert allocations.alive() < before / 4  # gradients, and what the engine holds
    assert len(counted) == 7 + 5  # grouped convolutions of all blocks, last ones of identity blocks


# ------------------------------------------------------------------------------------------------ other uses


def close(found, wanted):
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("recompute", MODES)
def test_backward_twice_and_in_parts(recompute):
    plain, ours = made("none"), made(recompute)
    results = []
    for model in (plain, ours):
        out = model(images()).pow(2).sum()
        parameters = list(model.parameters())
        whole = torch.autograd.grad(out, parameters, retain_graph=True)
        close(torch.autograd.grad(out, parameters, retain_graph=True), whole)
        middle = model.body[3][1].convs.conv1.weight
        close(
            torch.autograd.grad(out, [middle], retain_graph=True),
            [whole[[p is middle for p in parameters].index(True)]],
        )
        close(torch.autograd.grad(out, parameters[-1:], retain_graph=True), whole[-1:])
        close(torch.autograd.grad(out, parameters[:1]), whole[:1])
        results.append(whole)
    close(results[1], results[0])


def test_a_gradient_of_a_gradient_is_refused():
    model = made("both")
    first = torch.autograd.grad(model(images()).pow(2).sum(), model.body[0].weight, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("recompute", MODES)
def test_micro_batches_add_up(recompute):
    """Two forwards with one backward, and a backward after each."""
    found = []
    for mode in ("none", recompute):
        for joint in (False, True):
            model = made(mode)
            losses = []
            for seed in (1, 2):
                losses.append(model(images(seed=seed)).pow(2).sum())
                if not joint:
                    losses.pop().backward()
            if joint:
                sum(losses).backward()
            found.append(gradient(model))
    close(found[1:], found[:1] * 3)


FROZEN = {
    "norms": lambda name: ".bn" in name,
    "last convolutions": lambda name: ".conv3." in name,
    "grouped convolutions": lambda name: ".conv2." in name,
    "a stage and the stem": lambda name: name.startswith(("body.0", "body.1", "body.2")),
    "all but the last block": lambda name: not name.startswith(("body.3.block4", "body.4", "cls")),
    "all but the classifier": lambda name: not name.startswith("cls"),
}


@pytest.mark.parametrize("frozen", FROZEN)
def test_frozen_weights(frozen):
    found = []
    for mode in ("none", *MODES):
        model = made(mode)
        for name, p in model.named_parameters():
            p.requires_grad_(not FROZEN[frozen](name))
        found.append(step(model)[1])
    close(found[1:], found[:1] * 3)


def test_frozen_statistics_and_a_gradient_for_the_images():
    found = []
    for mode in ("none", *MODES):
        model, x = made(mode), images().requires_grad_()
        step(model)
        step(model.eval(), x)
        found.append(x.grad)
    close(found[1:], found[:1] * 3)


@pytest.mark.parametrize("recompute", MODES)
def test_evaluation_is_that_of_the_plain_network_to_the_bit(backend, recompute):
    plain, ours = made("none", torch.float32).eval(), made(recompute, torch.float32).eval()
    with torch.no_grad():
        for dtype in (None, torch.bfloat16):
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
                assert torch.equal(ours(images(torch.float32)), plain(images(torch.float32)))
    assert ours.rebuilding.passes == 0
    assert list(ours.state_dict()) == list(plain.state_dict())


@pytest.mark.parametrize("part", ["network", "block"])
def test_under_checkpointing_nothing_is_rebuilt(part):
    """Only the innermost hooks act: those of torch.utils.checkpoint, which keep less anyway."""
    found, sizes = [], []
    for mode in ("none", "both"):
        model, x = made(mode), images().requires_grad_()
        if part == "block":
            block, call = model.body[2].block2, model.body[2].block2.forward
            block.forward = lambda z, *link, call=call: checkpoint(call, z, use_reentrant=False)
        with Allocations() as allocations:
            out = model(x) if part == "block" else checkpoint(model, x, use_reentrant=False)
            gc.collect()
            sizes.append(allocations.alive())
        out.pow(2).sum().backward()
        found.append(gradient(model))
    assert away(found[1], found[0]) < 1e-12
    assert sizes[1] <= sizes[0]


def test_a_scaler_that_overflows_skips_the_step():
    model = made("both", torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = {name: p.clone() for name, p in model.named_parameters()}
    changed = []
    for _ in range(40):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = model(images(torch.float32)).float().pow(2).mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        changed.append(any(not torch.equal(before[name], p) for name, p in model.named_parameters()))
    assert not changed[0] and changed[-1]
    assert all(p.isfinite().all() for p in model.parameters())
    assert model.rebuilding.drift is None


def test_weights_that_change_before_backward_are_an_error():
    """Autograd itself cannot tell inside the interception."""
    for name, mode in (("conv2", "grouped"), ("conv3", "identity_input")):
        model = made(mode)
        out = model(images()).sum()
        with torch.no_grad():
            getattr(model.body[2].block2.convs, name).weight.mul_(2)
        with pytest.raises(RuntimeError, match="update weights after backward"):
            out.backward()


def in_two_processes(rank, world):
    from torch.nn.parallel import DistributedDataParallel

    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}  # without them the processes cannot be counted
    found = {}
    for mode in ("none", *MODES):
        model = made(mode, norm="inplace_abn_sync")
        wrapped = DistributedDataParallel(model)
        wrapped(images(seed=rank)).pow(2).sum().backward()
        found[mode] = gradient(model)
    return found


def test_synchronised_and_data_parallel(tmp_path):
    first, second = processes.run(in_two_processes, 2, tmp_path)
    for mode in MODES:
        assert torch.equal(first[mode], second[mode])
        assert away(first[mode], first["none"]) < 1e-12


def sharded_in_two_processes(rank, world):
    from segtrain.models.execution import sharded

    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    found = {}
    for mode in ("none", "both"):
        model = made(mode)
        sharded(model)
        model(images(seed=rank)).pow(2).sum().backward()
        found[mode] = torch.cat([p.grad.full_tensor().flatten() for p in model.parameters()])
    return found


def test_sharded(tmp_path):
    for found in processes.run(sharded_in_two_processes, 2, tmp_path):
        assert away(found["both"], found["none"]) < 1e-12
