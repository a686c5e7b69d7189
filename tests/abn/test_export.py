"""The layer in a network that is exported without `fold`: ordinary operations, with the same outputs."""

import pytest
import torch
from torch import nn

from segtrain.abn import InPlaceABN, InPlaceABNSync


@pytest.fixture(params=[InPlaceABN, InPlaceABNSync])
def network(request):
    torch.manual_seed(0)
    made = nn.Sequential(nn.Conv2d(3, 8, 3), request.param(8), nn.Conv2d(8, 4, 1), request.param(4, activation="elu"))
    for layer in made[1::2]:
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
        nn.init.normal_(layer.running_mean)
        nn.init.uniform_(layer.running_var, 0.5, 2)
    return made.eval()


@pytest.fixture
def images():
    return torch.randn(2, 3, 12, 10, generator=torch.Generator().manual_seed(1))


def test_an_exported_layer_is_ordinary_operations(network, images):
    with torch.no_grad():
        expected = network(images)
        exported = torch.export.export(network, (images,)).run_decompositions()
        torch.testing.assert_close(exported.module()(images), expected, rtol=1e-5, atol=1e-5)
    targets = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    assert "aten.convolution.default" in targets and not any("segtrain" in target for target in targets)


def test_a_traced_layer_too(network, images):
    with torch.no_grad():
        expected = network(images)
        traced = torch.jit.trace(network, (images,))
        torch.testing.assert_close(traced(images), expected, rtol=1e-5, atol=1e-5)


def test_onnx(network, images, tmp_path):
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    with torch.no_grad():
        expected = network(images)
        program = torch.onnx.export(network, (images,), dynamo=True, verbose=False)
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    program.save(tmp_path / "network.onnx")
    session = runtime.InferenceSession(str(tmp_path / "network.onnx"), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)
