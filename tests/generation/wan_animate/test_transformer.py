"""The step that reuses against the model's own forward pass: the same bits, and every shared part computed once."""

from __future__ import annotations

import gc
from collections import Counter

import pytest
import torch
from diffusers import WanAnimateTransformer3DModel
from torch.utils.flop_counter import FlopCounterMode

from runner.forecast.flops import PRODUCTION
from runner.generation.wan_animate import transformer as module
from runner.generation.wan_animate.transformer import (
    ConditioningCache,
    Rope,
    denoise_step,
    embed_context,
    held_bytes,
    rotate,
    run_block,
)
from runner.quantization.formats.e2m1 import G32
from runner.quantization.linear import FP4Linear
from runner.spec.recipes import get_recipe
from runner.weights.resolved import ResolvedRecipe
from runner.weights.store import ModelStore

WIDTH, HEIGHT, FRAMES = 48, 64, 13
LEVELS = (999.0, 714.0, 24.0)
# Run once a window; the cross-attention's and the face adapters' are once a layer.
ONCE = ("pose_patch_embedding", "condition_embedder.text_embedder", "condition_embedder.image_embedder", "face_encoder")


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """The order of sums depends on the number of threads: it must be one number on both sides."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(before)


def load(tiny_store_dir, dtype=torch.float32, **changed) -> WanAnimateTransformer3DModel:
    """The tiny model in `dtype`. Every parameter is disturbed: fresh norms, biases and paddings compute nothing."""
    folder = tiny_store_dir / get_recipe("fp32").weights / "transformer"
    if changed:
        torch.manual_seed(0)
        config = WanAnimateTransformer3DModel.load_config(folder)
        model = WanAnimateTransformer3DModel.from_config(config, **changed).to(dtype)
    else:
        model = WanAnimateTransformer3DModel.from_pretrained(folder, local_files_only=True, torch_dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return model.eval()


def in_four_bits(model, fmt=G32) -> None:
    """Every linear layer, the time embedder's included, as one that has no floating weight."""
    for name, layer in [(n, m) for n, m in model.named_modules() if type(m) is torch.nn.Linear]:
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, FP4Linear.from_linear(layer, fmt, "absmax"))


class Inputs:
    """What a window of the tiny model is denoised from, seeded."""

    def __init__(self, model, batch=1, frames=FRAMES, width=WIDTH, height=HEIGHT, device="cpu", seed=0) -> None:
        generator = None if device == "meta" else torch.Generator().manual_seed(seed)
        config, later = model.config, (frames - 1) // 4 + 1

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(batch, *shape, generator=generator, device=device).to(model.dtype)

        size = config.motion_encoder_size
        tokens = 257 if config.image_dim == 1280 else 5
        self.hidden = [draw(36, later + 1, height // 8, width // 8) for _ in LEVELS]
        self.texts = [draw(512, config.text_dim), draw(512, config.text_dim)]
        self.clip = draw(tokens, config.image_dim)
        self.pose = draw(16, later, height // 8, width // 8)
        self.faces = [draw(3, frames, size, size), draw(3, frames, size, size) * 0 - 1]
        self.levels = [torch.full((batch,), level, device=device) for level in LEVELS]

    def forward(self, model, step: int, cfg_index: int = 0) -> torch.Tensor:
        """The library's velocity."""
        return model(
            hidden_states=self.hidden[step].clone(),
            timestep=self.levels[step],
            encoder_hidden_states=self.texts[cfg_index],
            encoder_hidden_states_image=self.clip,
            pose_hidden_states=self.pose,
            face_pixel_values=self.faces[cfg_index],
            return_dict=False,
        )[0]

    def conditionings(self, model, guided: bool = False) -> list[ConditioningCache]:
        contexts = embed_context(model, self.texts[: 1 + guided], self.clip)
        first = ConditioningCache(model, contexts[0], self.pose, self.faces[0])
        return [first, *(first.sharing(model, context, self.faces[1]) for context in contexts[1:])]

    def step(self, model, conditioning: ConditioningCache, step: int, **how) -> torch.Tensor:
        return denoise_step(model, conditioning, self.hidden[step], self.levels[step], **how)


def assert_equal_steps(model, inputs: Inputs, guided: bool = False, **how) -> None:
    conditioning = inputs.conditionings(model, guided)
    velocities = []
    for step in range(len(LEVELS)):
        for cfg_index, shared in enumerate(conditioning):
            before = inputs.hidden[step].clone()
            here, theirs = inputs.step(model, shared, step, **how), inputs.forward(model, step, cfg_index)
            assert here.dtype == theirs.dtype
            assert torch.equal(here, theirs), (step, cfg_index)
            assert torch.equal(inputs.hidden[step], before), "the latents were written to"
            velocities.append(here)
    assert len({float(velocity.double().sum()) for velocity in velocities}) == len(velocities)  # each its own


@pytest.fixture(scope="module")
def model(tiny_store_dir):
    return load(tiny_store_dir)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("guided", [False, True], ids=["unguided", "guided"])
def test_steps_equal_model_forward(tiny_store_dir, dtype, guided):
    model = load(tiny_store_dir, dtype)
    assert_equal_steps(model, Inputs(model), guided)


def test_steps_with_four_bit_layers_equal_model_forward(tiny_store_dir):
    model = load(tiny_store_dir, torch.bfloat16)
    in_four_bits(model)
    assert not any(type(layer) is torch.nn.Linear for layer in model.modules())
    assert_equal_steps(model, Inputs(model))


def test_steps_of_batch_equal_model_forward(model):
    assert_equal_steps(model, Inputs(model, batch=2, frames=5))


def test_steps_of_model_without_added_kv_projections_equal_model_forward(tiny_store_dir):
    model = load(tiny_store_dir, added_kv_proj_dim=None)
    assert model.blocks[0].attn2.add_k_proj is None
    assert_equal_steps(model, Inputs(model), guided=True)


def counted(model) -> Counter[str]:
    """Calls of every module by its dotted name, from now on."""
    calls: Counter[str] = Counter()
    for name, part in model.named_modules():
        part.register_forward_hook(lambda *_, name=name: calls.update([name]))
    return calls


def test_conditioning_is_computed_once_for_all_steps(tiny_store_dir):
    model = load(tiny_store_dir)
    calls, inputs = counted(model), Inputs(model)
    cross = [
        f"blocks.{i}.attn2.{part}"
        for i in range(4)
        for part in ("to_k", "to_v", "norm_k", "add_k_proj", "add_v_proj", "norm_added_k")
    ]
    cross += [f"face_adapter.{i}.{part}" for i in range(2) for part in ("to_k", "to_v", "norm_k", "pre_norm_kv")]
    batches = 2  # 13 faces, 8 at a time
    for step in range(3):
        inputs.forward(model, step)
    assert {calls[name] for name in (*ONCE, *cross)} == {3}
    assert calls["motion_encoder"] == 3 * batches
    calls.clear()
    (conditioning,) = inputs.conditionings(model)
    for step in range(3):
        inputs.step(model, conditioning, step)
    assert {calls[name] for name in (*ONCE, *cross)} == {1}
    assert calls["motion_encoder"] == batches
    assert {calls[name] for name in ("blocks.3.attn2.to_q", "face_adapter.1.to_q", "blocks.3.attn1.to_k")} == {3}
    calls.clear()
    for shared in inputs.conditionings(model, guided=True):
        inputs.step(model, shared, 0)
    shared_too = [name for name in cross if "add" in name.rpartition(".")[2]]
    assert {calls[name] for name in ("pose_patch_embedding", "condition_embedder.image_embedder", *shared_too)} == {1}
    assert {calls[name] for name in cross if name not in shared_too} == {2}


def test_step_runs_each_block_only_while_handed_out(model):
    """Streaming hands out one block at a time; no part of another block may run meanwhile."""
    inputs, out = Inputs(model), []
    (conditioning,) = inputs.conditionings(model)
    touched: set[tuple[int, int]] = set()
    hooks = [
        part.register_forward_pre_hook(lambda *_, index=index: touched.add((index, out[-1])))
        for index, block in enumerate(model.blocks)
        for part in block.modules()
    ]

    def hand_out():
        for index, block in enumerate(model.blocks):
            out.append(index)
            yield block

    velocity = inputs.step(model, conditioning, 0, blocks=hand_out())
    for hook in hooks:
        hook.remove()
    assert touched == {(index, index) for index in range(4)}
    assert torch.equal(velocity, inputs.forward(model, 0))


def test_run_block_compiles_to_one_graph_for_all_blocks(model):
    """One graph serves all blocks and all steps: there is no graph break and no graph per block or noise level."""
    graphs = []

    def note(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(run_block, backend=note, fullgraph=True, dynamic=False)
    assert_equal_steps(model, Inputs(model), block_forward=compiled)
    torch._dynamo.reset()
    assert len(graphs) == 1


def test_step_uses_attention_backend_of_each_processor(tiny_store_dir, monkeypatch):
    model, asked = load(tiny_store_dir), []
    for block in model.blocks:
        block.attn1.processor._attention_backend = "_native_math"
    honest = module.run_attention
    monkeypatch.setattr(module, "run_attention", lambda *given: (asked.append(given[3]), honest(*given))[1])
    assert_equal_steps(model, Inputs(model))
    # A step: four blocks of self-, text and image attention, and two face adapters.
    assert Counter(asked) == {"_native_math": 3 * 4, None: 3 * (4 * 2 + 2)}


def strided_rotation(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """As the library writes it."""
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    out = torch.empty_like(x)
    out[..., 0::2] = first * cos - second * sin
    out[..., 1::2] = first * sin + second * cos
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rotate_without_strided_writes_has_same_bits(dtype):
    generator = torch.Generator().manual_seed(3)
    x = (10 * torch.randn(2, 96, 3, 32, generator=generator)).to(dtype)
    angle = 100 * torch.rand(1, 96, 1, 16, generator=generator)
    rope = Rope(angle.cos(), angle.sin())
    turned = rotate(x, rope)
    assert turned.dtype == dtype
    assert turned.is_contiguous()
    assert torch.equal(turned, strided_rotation(x, *rope))
    by_numbers = torch.view_as_complex(x.double().unflatten(-1, (-1, 2))) * torch.polar(
        torch.ones_like(angle, dtype=torch.float64), angle.double()
    )
    error = (turned.double() - torch.view_as_real(by_numbers).flatten(-2)).abs().max()
    assert error < 100 * torch.finfo(dtype).eps


def test_step_with_latents_of_other_shape_is_refused(model):
    (conditioning,) = Inputs(model).conditionings(model)
    other = Inputs(model, frames=9)
    with pytest.raises(ValueError, match=r"latents of \(4, 8, 6\) in a window of \(5, 8, 6\)"):
        other.step(model, conditioning, 0)


def test_sharing_with_other_reference_is_refused(model):
    inputs, other = Inputs(model), Inputs(model, seed=1)
    (conditioning,) = inputs.conditionings(model)
    (context,) = embed_context(model, other.texts[:1], other.clip)
    with pytest.raises(ValueError, match="has another image"):
        conditioning.sharing(model, context, other.faces[0])


def flop_of(call) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize("guided", [False, True], ids=["unguided", "guided"])
def test_conditioning_cache_flop_and_bytes_equal_forecast(tiny_store_dir, model, guided):
    shape = ResolvedRecipe(ModelStore(tiny_store_dir), get_recipe("fp32")).costs.transformer
    inputs, size = Inputs(model), (WIDTH, HEIGHT, FRAMES)
    conditioning = inputs.conditionings(model, guided)
    whole = flop_of(lambda: inputs.forward(model, 0))
    first = flop_of(lambda: [inputs.step(model, shared, 0) for shared in inputs.conditionings(model)])
    for shared in conditioning:
        inputs.step(model, shared, 0)
    later = flop_of(lambda: inputs.step(model, conditioning[0], 1))
    assert first == whole  # nothing is left out, nothing done twice
    assert whole - later == shape.conditioning_flop(*size)
    assert held_bytes(conditioning) == shape.conditioning_bytes(*size, element=4, guided=guided)


def test_conditioning_cache_of_14b_model_equals_bytes_by_hand(tiny_store_dir):
    """Shapes of the 14B model on the meta device, summed by hand; the module's docstring gives the same sum."""
    with torch.device("meta"):
        model = WanAnimateTransformer3DModel(image_dim=1280, added_kv_proj_dim=5120, num_layers=5).to(torch.bfloat16)
    model.rope = type(model.rope)(128, (1, 2, 2), 1024)  # its angles are float32 in a loaded model
    model.rope.to("meta")
    inputs = Inputs(model, frames=81, width=832, height=480, device="meta")
    conditioning = inputs.conditionings(model)
    inputs.step(model, conditioning[0], 0)
    blocks = 5 * 769 * 5120 * 2 * 2
    adapter, motion = 22 * 5 * 5120 * 2 * 2, 22 * 5 * 5120 * 2
    pose, rope = 21 * 1560 * 5120 * 2, 2 * 34320 * 64 * 4
    assert held_bytes(conditioning) == blocks + adapter + motion + pose + rope
    full = 8 * (blocks + adapter) + motion + pose + rope
    assert PRODUCTION.transformer.conditioning_bytes(832, 480, 81) == full
    assert full == pytest.approx(1.00e9, rel=0.005)
    saved = PRODUCTION.transformer.conditioning_flop(832, 480, 81)
    key_values, motion_encoder = 3.23e12, 3.2e12  # 40 x 4 x 769 x 5120^2; 81 faces, counted on their own
    assert saved == pytest.approx(key_values + motion_encoder, rel=0.05)  # embedders, adapters and pose are the rest


def test_conditioning_cache_is_freed_after_window(model):
    inputs = Inputs(model)
    gc.collect()
    gc.disable()  # what is freed is freed because nothing names it any more
    try:
        (conditioning,) = inputs.conditionings(model)
        inputs.step(model, conditioning, 0)
        assert sum(isinstance(thing, ConditioningCache) for thing in gc.get_objects()) == 1
        del conditioning
        assert not any(isinstance(thing, ConditioningCache) for thing in gc.get_objects())
    finally:
        gc.enable()
