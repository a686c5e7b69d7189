"""Networks of every form answer under torch.inference_mode, as validation, evaluation and prediction call them."""

import pytest
import torch

from segtrain.config import ModelConfig
from segtrain.models import from_config

FORMS = {
    "norm": {"norm": "abn", "recompute": "norm"},
    "norm_proposed": {"norm": "abn", "recompute": "norm_proposed"},
    "blocks": {"recompute": "blocks"},
    "8bit": {"keep": "8bit"},
    "4bit": {"keep": "4bit"},
    "identity_input": {"backbone": "resnext50", "recompute": "identity_input"},
    "grouped": {"backbone": "resnext50", "recompute": "grouped"},
    "both": {"backbone": "resnext50", "recompute": "both"},
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_the_answer_without_gradients_is_that_of_the_plain_network(form, training):
    options = {"backbone": "resnet18", "head_channels": 8, "output_stride": 32} | FORMS[form]
    torch.manual_seed(0)
    network = from_config(ModelConfig(**options), 3).train(training)
    plain = from_config(ModelConfig(**options | {"recompute": "none", "keep": "exact"}), 3).train(training)
    plain.load_state_dict(network.state_dict())
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        found, wanted = network(images), plain(images)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    network.train()(images).mean().backward()  # and a step works as before
    assert all(parameter.grad is not None for parameter in network.parameters() if parameter.requires_grad)
