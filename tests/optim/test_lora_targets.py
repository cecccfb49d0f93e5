"""Which layers get LoRA, where a base has more than plain linear layers."""

from types import SimpleNamespace

import pytest
import torch

from loop.optim import lora_targets


@pytest.mark.parametrize(
    ("experts", "images", "targets"),
    [
        (False, False, "all-linear"),  # PEFT's own meaning will do
        (True, False, ["q_proj"]),
        (False, True, ["q_proj"]),
    ],
)
def test_all_linear_is_a_list_where_there_are_experts_or_images(
    monkeypatch, experts, images, targets
):
    def see(model, lora_config, **options):
        raise torch.OutOfMemoryError(repr(lora_config.target_modules))

    monkeypatch.setattr(lora_targets, "has_fused_experts", lambda model: experts)
    monkeypatch.setattr(lora_targets, "sees_images", lambda model: images)
    monkeypatch.setattr(lora_targets, "linear_names", lambda model: ["q_proj"])
    monkeypatch.setattr(lora_targets, "without_renamed", lambda names, model: names)
    monkeypatch.setattr(lora_targets, "get_peft_model", see)
    with pytest.raises(torch.OutOfMemoryError) as error:  # it is no mistake in `lora`
        lora_targets.put_lora(torch.nn.Linear(2, 2), {"target_modules": "all-linear"})
    said = str(error.value)
    assert said == repr(targets) or said == repr({*targets})


def test_experts_of_one_tensor_are_counted_and_shared_ones_are_linear_layers():
    model = torch.nn.Module()
    model.experts = torch.nn.Module()
    model.experts.up = torch.nn.Parameter(torch.zeros(4, 3, 2))
    model.shared_expert = torch.nn.Linear(3, 2)
    assert lora_targets.count_expert_weights(model) == 24
    model.experts.up = torch.nn.Parameter(torch.zeros(0))  # a shard, as ZeRO-3 leaves it
    model.experts.up.ds_shape = (4, 3, 2)
    model.experts.up.ds_numel = 24
    assert lora_targets.count_expert_weights(model) == 24


def test_a_language_model_beside_other_parts_sees_images():
    own = SimpleNamespace()
    own.get_text_config = lambda decoder: own
    assert not lora_targets.sees_images(SimpleNamespace(config=own))
    whole = SimpleNamespace(get_text_config=lambda decoder: own)
    assert lora_targets.sees_images(SimpleNamespace(config=whole))
