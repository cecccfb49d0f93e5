"""The model: what is trainable, that documents of a row stay apart in it, what is refused."""

import numpy as np
import pytest
import torch
from helpers import tinyllama_shape
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from loop.config.schema import Config, ConfigError
from loop.data.batch_plan import PackingSpec
from loop.data.collate import collate
from loop.data.tokenization import Example
from loop.kernels.attention import ATTENTION_BACKENDS
from loop.kernels.attention_backends import available_backends
from loop.model.activation_checkpointing import use_checkpointing
from loop.model.loading import load_base, load_model_config, resolve_base
from loop.model.loss import summed_cross_entropy
from loop.model.quantization import keep_codes
from loop.model.structure import decoder_layers

PLAIN = {"base": "x", "data": {"train": "x"}}
PACKING = PackingSpec(max_tokens=256, max_seq_len=64)


def test_the_seed_configuration_trains_6307840_parameters():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tinyllama_shape())
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **Config(**PLAIN).lora))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 6_307_840
    assert len(decoder_layers(model)) == 22


def documents(seed: int, lengths=(30, 50, 20)) -> list[Example]:
    rng = np.random.default_rng(seed)
    examples = []
    for i, length in enumerate(lengths):
        ids = rng.integers(5, 300, length).astype(np.int32)
        examples.append(Example(str(i), ids, ids.copy()))
    return examples


@pytest.mark.parametrize(
    "backend",
    [
        "sdpa",
        *(
            pytest.param(name, marks=pytest.mark.gpu)
            for name in ("varlen", "flash_attn", "flash_attn_4")
        ),
    ],
)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_no_token_of_another_document_moves_logits_loss_or_gradient_by_a_bit(
    backend, checkpointing, training, request, monkeypatch
):
    device = "cpu" if backend == "sdpa" else "cuda"
    if available_backends(device)[backend].startswith("missing"):
        pytest.skip(available_backends(device)[backend])
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    base = request.getfixturevalue("tiny_base" if device == "cpu" else "tinyllama")
    attention = ATTENTION_BACKENDS[backend].transformers_name
    model = load_base(base, torch.bfloat16, device, attention=attention)
    model.enable_input_require_grads()
    torch.manual_seed(0)
    model = get_peft_model(
        model,
        LoraConfig(
            task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False
        ),
    )
    if checkpointing:
        use_checkpointing(model)
    model.train(training)

    def second_document(first: Example):
        """Logits and gradients of the second document alone, in a row behind `first`."""
        _, second, third = documents(0)
        unsupervised = [
            Example(e.id, e.input_ids, np.full_like(e.labels, -100)) for e in (first, third)
        ]
        batch = collate([unsupervised[0], second, unsupervised[1]], PACKING).to(device)
        logits = model(**batch.model_inputs()).logits
        loss = summed_cross_entropy(logits, batch.targets)
        model.zero_grad()
        loss.backward()
        return [
            logits.detach(),
            loss.detach(),
            *(p.grad.clone() for p in model.parameters() if p.requires_grad),
        ]

    torch.use_deterministic_algorithms(
        True, warn_only=True
    )  # flash attention's backward adds with atomics otherwise
    try:
        before, after = (second_document(documents(seed)[0]) for seed in (0, 1))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(before, after))
    assert sum(g.abs().sum() for g in after[2:]) > 0


def test_a_row_gives_what_its_documents_give_alone(tiny_base):
    attention = ATTENTION_BACKENDS["sdpa"].transformers_name
    model = load_base(tiny_base, torch.float32, "cpu", attention=attention).eval()
    examples = documents(0)
    with torch.no_grad():
        row = model(**collate(examples, PACKING).model_inputs()).logits[0]
        alone = torch.cat(
            [model(**collate([e], PACKING).model_inputs()).logits[0] for e in examples]
        )
    assert torch.allclose(row, alone, atol=1e-4)


def test_a_layer_is_recomputed_inside_of_its_hooks(tiny_base):
    """ZeRO-3's are among them.

    Otherwise it would gather for the recomputation, and keep that until the backward pass ends.
    """
    model = load_base(tiny_base, torch.float32, "cpu", quantization=None)
    calls = {"layer": 0, "attention": 0}
    use_checkpointing(model)
    for layer in decoder_layers(model):
        layer.register_forward_hook(lambda *_: calls.update(layer=calls["layer"] + 1))
        layer.self_attn.register_forward_hook(
            lambda *_: calls.update(attention=calls["attention"] + 1)
        )
    model.train()(**collate(documents(0), PACKING).model_inputs()).logits.sum().backward()
    assert calls == {
        "layer": len(decoder_layers(model)),
        "attention": 2 * len(decoder_layers(model)),
    }


def test_nf4_weights_are_never_repacked(tiny_base):
    """bitsandbytes repacks them in place on CPUs with AVX512-BF16.

    Gradients and shards would be wrong ever after.
    """
    model = load_base(tiny_base, torch.bfloat16, "cpu")
    linears = [m for m in model.modules() if hasattr(m, "support_avx512bf16_for_cpu")]
    assert len(linears) == 3 * 7 and not any(m.support_avx512bf16_for_cpu for m in linears)
    before = [
        m.weight.clone().view(torch.uint8) for m in linears
    ]  # codes, some of which read as NaN in bf16
    with torch.no_grad():
        for _ in range(2):
            model.eval()(input_ids=torch.ones(1, 8, dtype=torch.long))
    assert all(torch.equal(a, m.weight.view(torch.uint8)) for a, m in zip(before, linears))


def test_codes_that_are_stored_as_float16_are_bytes_to_us(tiny_base):
    """As in bases that were quantised elsewhere: the engine casts what is no byte by value."""
    model, other = (load_base(tiny_base, torch.bfloat16, "cpu") for _ in range(2))
    for module in other.modules():
        if hasattr(module, "quant_state"):
            module.weight.data, module.compute_dtype = (
                module.weight.data.view(torch.float16),
                torch.float16,
            )
    keep_codes(other, torch.bfloat16)
    assert {p.dtype for p in other.parameters()} == {torch.uint8, torch.bfloat16}
    ids = torch.arange(5, 13)[None]
    with torch.no_grad():
        assert torch.equal(model.eval()(input_ids=ids).logits, other.eval()(input_ids=ids).logits)


def test_the_summed_loss_ignores_what_is_no_target():
    logits = torch.randn(1, 3, 7, requires_grad=True)
    loss = summed_cross_entropy(logits, torch.tensor([2, -100, 5]))
    loss.backward()
    assert loss.item() == pytest.approx(
        -(logits[0].log_softmax(-1)[0, 2] + logits[0].log_softmax(-1)[2, 5]).item()
    )
    assert (logits.grad[0, 1] == 0).all()
    assert (
        summed_cross_entropy(logits[:, :1], torch.tensor([-100])).item() == 0
    )  # a rank without targets


def test_what_is_not_a_model_is_named(tmp_path, tiny_base):
    with pytest.raises(ConfigError, match="no config.json"):
        resolve_base(str(tmp_path))
    with pytest.raises(ConfigError, match="no such folder"):
        resolve_base("./nowhere")
    for name in ("my folder/x", "owner/weights.gguf", "tests/nowhere", "owner/.."):
        with pytest.raises(ConfigError, match="no such folder"):
            resolve_base(name)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_model_config(str(tmp_path))
    assert resolve_base("owner/name") == {
        "pretrained_model_name_or_path": "owner/name",
        "trust_remote_code": False,
    }


def test_a_loss_in_chunks_is_the_loss():
    """Whatever the chunks, with unsupervised rows: the value, and the gradient as bf16 has it."""
    torch.manual_seed(0)
    targets = torch.randint(0, 50, (37,))
    targets[::5] = -100
    for dtype, most in ((torch.float32, 1e-6), (torch.bfloat16, 0)):
        logits = (3 * torch.randn(1, 37, 50)).to(dtype).requires_grad_()
        whole = summed_cross_entropy(logits, targets)
        (expected,) = torch.autograd.grad(whole * 0.3, logits)
        for chunk in (50, 199, 1000):
            loss = summed_cross_entropy(logits, targets, chunk)
            (found,) = torch.autograd.grad(loss * 0.3, logits)
            torch.testing.assert_close(loss, whole, rtol=1e-6, atol=0)
            assert (found - expected).abs().max() <= most + 2**-8 * bool(dtype != torch.float32)
            assert not found[0, ::5].any() and found.dtype == dtype
