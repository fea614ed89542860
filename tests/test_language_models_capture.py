"""What is captured is the model's own hidden state, and nothing above it is computed."""

import pytest

pytest.importorskip("torch", reason="language models run in torch: install the extra 'lm'")
pytest.importorskip("transformers", reason="language models run in torch: install the extra 'lm'")

import torch
from language_models_cases import BLOCKS, FAMILIES, VOCABULARY, WIDTH, random_model
from torch import nn

from crosscoder_jax.language_models.capture import capture_residuals, check_capture, find_blocks, hook_point

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


def padded_batch(device="cpu"):
    """Three sequences of 12, 7 and 1 tokens, padded on the right to 12."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, VOCABULARY, (3, 12), generator=generator)
    mask = torch.zeros_like(ids)
    for row, length in enumerate((12, 7, 1)):
        mask[row, :length] = 1
    return ids.to(device), mask.to(device)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_residual_equals_hidden_states_exactly(family, dtype, device):
    model = random_model(family).to(device, dtype)
    ids, mask = padded_batch(device)
    with torch.inference_mode():
        states = model(
            input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False
        ).hidden_states
    captured = capture_residuals(model, ids, mask, range(BLOCKS - 1))
    assert list(captured) == [0, 1, 2]
    for layer, residual in captured.items():
        assert residual.shape == (3, 12, WIDTH)
        assert residual.dtype == dtype
        # hidden_states[0] is the embedding, so the state after block L is entry L + 1.
        assert torch.equal(residual, states[layer + 1])
        assert not torch.equal(residual, states[layer])


@pytest.mark.parametrize(("family", "norm"), [("llama", "model.norm"), ("gpt2", "transformer.ln_f")])
def test_last_layer_is_read_before_the_final_norm(family, norm):
    model = random_model(family)
    ids, mask = padded_batch()
    with torch.inference_mode():
        states = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
        residual = capture_residuals(model, ids, mask, [BLOCKS - 1])[BLOCKS - 1]
        normed = model.get_submodule(norm)(residual)
    assert torch.equal(normed, states[-1])
    assert not torch.allclose(residual, states[-1])


def test_nothing_above_the_deepest_layer_is_computed():
    model = random_model()
    ran = []
    watched = {f"block {i}": block for i, block in enumerate(model.model.layers)}
    watched |= {"norm": model.model.norm, "head": model.lm_head}
    for name, module in watched.items():
        module.register_forward_hook(lambda _module, _inputs, _output, name=name: ran.append(name))
    capture_residuals(model, *padded_batch(), [0, 2])
    assert ran == ["block 0", "block 1", "block 2"]
    ran.clear()
    capture_residuals(model, *padded_batch(), [BLOCKS - 1])
    assert ran == ["block 0", "block 1", "block 2", "block 3"]


def test_several_layers_in_one_pass_equal_single_passes_in_the_order_asked():
    model, batch = random_model("gemma2"), padded_batch()
    captured = capture_residuals(model, *batch, [2, 0])
    assert list(captured) == [2, 0]
    for layer in (2, 0):
        assert torch.equal(captured[layer], capture_residuals(model, *batch, [layer])[layer])


def test_equal_weights_give_bitwise_equal_activations(device):
    first, second = (random_model("qwen3", seed=3).to(device, torch.bfloat16) for _ in range(2))
    ids, mask = padded_batch(device)
    assert torch.equal(
        capture_residuals(first, ids, mask, [1])[1], capture_residuals(second, ids, mask, [1])[1]
    )


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "bloom"])
def test_tokens_do_not_see_the_padding(family):
    model = random_model(family)
    ids, mask = padded_batch()
    other = torch.where(mask == 1, ids, 7)
    residual, unmoved = (capture_residuals(model, i, mask, [2])[2] for i in (ids, other))
    assert torch.equal(residual[mask == 1], unmoved[mask == 1])
    # Alone and unpadded the shapes differ, and with them the order of the sums: float32 noise is allowed.
    alone = capture_residuals(model, ids[1:2, :7], mask[1:2, :7], [2])[2]
    torch.testing.assert_close(residual[1, :7], alone[0], rtol=1e-5, atol=1e-5)


def test_hooks_are_gone_afterwards_also_after_an_error():
    model = random_model()
    ids, mask = padded_batch()
    capture_residuals(model, ids, mask, [1])
    with pytest.raises(IndexError):
        capture_residuals(model, ids + VOCABULARY, mask, [1])
    assert all(not block._forward_hooks for block in find_blocks(model))
    with torch.inference_mode():
        assert model(input_ids=ids, attention_mask=mask).logits.shape == (3, 12, VOCABULARY)


@pytest.mark.parametrize("layer", [BLOCKS, -1, 99])
def test_a_layer_out_of_range_is_refused(layer):
    with pytest.raises(ValueError, match=rf"layer {layer} does not exist .* 4 blocks are 0 to 3"):
        capture_residuals(random_model(), *padded_batch(), [0, layer])


class Unusual(nn.Module):
    """A model that holds the lists it is given and returns what it is told."""

    def __init__(self, lists: dict[str, nn.ModuleList], output=None):
        super().__init__()
        self.config = random_model().config
        self.output = output
        for name, blocks in lists.items():
            self.add_module(name, blocks)

    def forward(self, input_ids, **_):
        hidden = torch.ones(*input_ids.shape, WIDTH)
        for block in self.get_submodule("blocks"):
            hidden = block(hidden)


def identities(count=BLOCKS):
    return nn.ModuleList(nn.Identity() for _ in range(count))


def test_a_model_without_a_single_list_of_blocks_is_refused_with_the_lists_it_has():
    with pytest.raises(ValueError, match=r"Unusual has 0 lists of 4 blocks.*lists: blocks \(3\)"):
        find_blocks(Unusual({"blocks": identities(3)}))
    with pytest.raises(ValueError, match=r"has 2 lists of 4 blocks.*encoder \(4\), decoder \(4\)"):
        find_blocks(Unusual({"encoder": identities(), "decoder": identities()}))
    with pytest.raises(ValueError, match="lists: none"):
        find_blocks(Unusual({}))


def test_lists_inside_a_block_do_not_count():
    blocks = nn.ModuleList(nn.ModuleDict({"experts": identities()}) for _ in range(BLOCKS))
    assert find_blocks(Unusual({"blocks": blocks})) is blocks


class Streams(nn.Module):
    def forward(self, hidden):
        return hidden[None].expand(2, *hidden.shape)


def test_a_block_with_several_residual_streams_is_refused():
    model = Unusual({"blocks": nn.ModuleList(Streams() for _ in range(BLOCKS))})
    with pytest.raises(ValueError, match=r"block 0 returned the shape \(2, 3, 12, 32\)"):
        capture_residuals(model, *padded_batch(), [0])


@pytest.mark.parametrize("family", FAMILIES)
def test_check_capture_passes_every_family(family):
    check_capture(random_model(family).to(torch.bfloat16), [0, 2, BLOCKS - 1])


def test_check_capture_refuses_blocks_that_run_twice():
    model = random_model()
    # A looped transformer: the hook on the shared block fires in the first loop already.
    model.model.layers[2] = model.model.layers[0]
    with pytest.raises(ValueError, match="after block 2 of LlamaForCausalLM is not its hidden state 3"):
        check_capture(model, [2])


def test_hook_point_names_block_and_place():
    assert hook_point(0) == "blocks.0.resid_post"
