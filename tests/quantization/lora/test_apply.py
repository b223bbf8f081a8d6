from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from runner.errors import WeightsCorrupt
from runner.quantization.formats.e2m1 import FORMATS, dequantize
from runner.quantization.formats.scales import quantize
from runner.quantization.linear import FP4Linear
from runner.quantization.lora.apply import (
    Lora,
    attach,
    attached,
    detach,
    merge_param,
    parse_deltas,
    plan_merge,
    read_lora,
)
from tests.quantization.lora_files import (
    CONFIG_14B,
    PREFIX,
    PUBLISHED_BYTES,
    Widths,
    linears,
    norms,
    published_shapes,
    random_tensors,
    write_published,
)

TRANSFORMER = "Wan2.2-Animate-14B-Diffusers/transformer"


@pytest.fixture(scope="module")
def tiny(tiny_store_dir: Path) -> nn.Module:
    """The tiny transformer, float32. Tests leave it as they found it."""
    from diffusers import WanAnimateTransformer3DModel

    return WanAnimateTransformer3DModel.from_pretrained(tiny_store_dir / TRANSFORMER)


@pytest.fixture(scope="module")
def config(tiny_store_dir: Path) -> dict[str, Any]:
    return json.loads((tiny_store_dir / TRANSFORMER / "config.json").read_text())


@pytest.fixture
def published(tmp_path: Path, config: dict[str, Any]) -> Path:
    """The published pattern for the tiny model."""
    path = tmp_path / "distill.safetensors"
    write_published(path, config)
    return path


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(param.shape) for name, param in model.named_parameters()}


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def merged_by_peft(store: Path, lora: Path, strength: float) -> dict[str, Tensor]:
    """What the unmodified library makes of the tiny transformer with `lora` fused into it."""
    from diffusers import WanAnimatePipeline, WanAnimateTransformer3DModel

    model = WanAnimateTransformer3DModel.from_pretrained(store / TRANSFORMER)
    absent = ("tokenizer", "text_encoder", "vae", "scheduler", "image_processor", "image_encoder")
    pipe = WanAnimatePipeline(transformer=model, **dict.fromkeys(absent))
    pipe.load_lora_weights(lora.parent, weight_name=lora.name)
    pipe.fuse_lora(lora_scale=strength)
    pipe.unload_lora_weights()
    return model.state_dict()


class TestPublishedPattern:
    def test_published_pattern_has_size_of_published_file(self) -> None:
        """The size of the file is public; header and data of this pattern have exactly that size."""
        shapes = published_shapes(CONFIG_14B)
        header, offset = {}, 0
        for key in sorted(shapes):
            size = 2 * math.prod(shapes[key])
            header[key] = {"dtype": "BF16", "shape": list(shapes[key]), "data_offsets": [offset, offset + size]}
            offset += size
        text = len(json.dumps(header, separators=(",", ":")))
        assert len(shapes) == 1749
        assert 8 + (text + 7) // 8 * 8 + offset == PUBLISHED_BYTES

    def test_published_pattern_has_target_in_14b_model_for_every_tensor(self) -> None:
        from diffusers import WanAnimatePipeline, WanAnimateTransformer3DModel

        with torch.device("meta"):
            model = WanAnimateTransformer3DModel(**CONFIG_14B)
            tensors = {key: torch.empty(shape) for key, shape in published_shapes(CONFIG_14B).items()}
        deltas, unread = parse_deltas(tensors)
        plan = plan_merge([Lora("distill", "", 1.0, deltas, unread)], shapes_of(model))
        assert plan.tensors == 1749
        assert plan.untargeted == []

        linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        assert len(linear) == 521
        assert len(linear & plan.applied.keys()) == 488
        kept = WanAnimatePipeline.lora_state_dict(dict(tensors))
        assert 1749 - len(kept) == 285 == len(norms(Widths.of(CONFIG_14B)))

    @pytest.mark.parametrize("strength", [1.0, 0.7])
    def test_merge_of_published_pattern_equals_peft_and_applies_dropped_tensors(
        self, tiny: nn.Module, tiny_store_dir: Path, published: Path, config: dict[str, Any], strength: float
    ) -> None:
        lora = read_lora(published, strength)
        plan = plan_merge([lora], shapes_of(tiny))
        assert plan.tensors == len(published_shapes(config)) and plan.untargeted == []

        theirs = merged_by_peft(tiny_store_dir, published, strength)
        w = Widths.of(config)
        pairs = 2 * len(linears(w))  # weights and biases of linear layers
        dropped = [name for name in plan.applied if torch.equal(theirs[name], tiny.get_parameter(name))]
        assert len(dropped) == len(norms(w)) and len(plan.applied) == pairs + len(dropped)
        for name, param in tiny.named_parameters():
            ours = merge_param(name, param.detach(), plan)
            if name in dropped:
                ((addend,),) = (plan.applied[name],)
                assert torch.equal(ours, param + strength * addend.delta.dense()) and not torch.equal(ours, param)
            else:
                assert torch.equal(ours, theirs[name]), name
                assert torch.equal(ours, param) == (name not in plan.applied)

    def test_plan_merge_maps_original_names_to_parameters(
        self, tiny: nn.Module, tmp_path: Path, config: dict[str, Any]
    ) -> None:
        """Checked by hand for one tensor of each kind that PEFT does not apply."""
        tensors = write_published(tmp_path / "a.safetensors", config)
        plan = plan_merge([read_lora(tmp_path / "a.safetensors")], shapes_of(tiny))
        for key, param in {
            "blocks.2.norm3.diff": "blocks.2.norm2.weight",
            "blocks.2.norm3.diff_b": "blocks.2.norm2.bias",
            "blocks.1.self_attn.norm_k.diff": "blocks.1.attn1.norm_k.weight",
            "blocks.0.cross_attn.norm_q.diff": "blocks.0.attn2.norm_q.weight",
            "blocks.0.cross_attn.norm_k_img.diff": "blocks.0.attn2.norm_added_k.weight",
            "img_emb.proj.0.diff": "condition_embedder.image_embedder.norm1.weight",
            "img_emb.proj.4.diff_b": "condition_embedder.image_embedder.norm2.bias",
            "patch_embedding.diff_b": "patch_embedding.bias",
        }.items():
            (addend,) = plan.applied[param]
            assert torch.equal(addend.delta.dense(), tensors[PREFIX + key].float())


def test_merge_of_lora_with_alpha_equals_peft(
    tiny: nn.Module, tiny_store_dir: Path, tmp_path: Path, config: dict[str, Any]
) -> None:
    """As in the Lightning files: the pairs of the published pattern, only those in blocks, each with its alpha."""
    shapes = {
        key: shape for key, shape in published_shapes(config, rank=4).items() if ".blocks." in key and "lora" in key
    }
    tensors = random_tensors(shapes, dtype=torch.float32)
    tensors |= {key.replace("lora_down.weight", "alpha"): torch.tensor(1.0) for key in shapes if "lora_down" in key}
    save_file(tensors, tmp_path / "lightning.safetensors")
    theirs = merged_by_peft(tiny_store_dir, tmp_path / "lightning.safetensors", 1.0)
    plan = plan_merge([read_lora(tmp_path / "lightning.safetensors")], shapes_of(tiny))
    assert plan.tensors == len(tensors)
    for name, param in tiny.named_parameters():
        torch.testing.assert_close(merge_param(name, param.detach(), plan), theirs[name], rtol=0, atol=1e-7, msg=name)


def test_merge_of_lora_saved_by_diffusers_equals_peft(tiny: nn.Module, tiny_store_dir: Path, tmp_path: Path) -> None:
    """A LoRA as trained with PEFT: alpha differs from the rank, depends on the layer, and is only in the header."""
    from diffusers import WanAnimateTransformer3DModel
    from peft import LoraConfig

    model = WanAnimateTransformer3DModel.from_pretrained(tiny_store_dir / TRANSFORMER)
    lora_config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["to_q", "ffn.net.2"],
        alpha_pattern={"attn2.to_q": 20},
        init_lora_weights=False,
    )
    model.add_adapter(lora_config)
    model.save_lora_adapter(tmp_path, weight_name="trained.safetensors")
    theirs_of = {}
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight"):
            theirs_of[f"{name}.weight"] = module.get_delta_weight("default").detach()
    plan = plan_merge([read_lora(tmp_path / "trained.safetensors")], shapes_of(tiny))
    assert plan.untargeted == []
    assert plan.applied.keys() == theirs_of.keys() and len(theirs_of) == 2 * 4 + 4 + 2  # attentions, ffn, face adapters
    for name, theirs in theirs_of.items():
        (addend,) = plan.applied[name]
        torch.testing.assert_close(addend.delta.dense(), theirs)


def lora_of(tensors: dict[str, Tensor], name: str = "lora", strength: float = 1.0) -> Lora:
    deltas, unread = parse_deltas(tensors)
    return Lora(name, "", strength, deltas, unread)


SHAPES = {"proj_out.weight": (6, 32), "proj_out.bias": (6,), "pose.weight": (32, 8), "pose.bias": (32,)}
SHAPES |= {"norm.weight": (32,), "norm.bias": (32,), "scale_shift_table": (1, 2, 32)}


class TestPlan:
    def test_plan_merge_lists_tensors_without_target(self) -> None:
        tensors = {
            "diffusion_model.head.head.diff_b": torch.ones(6),
            "diffusion_model.head.head.reshape_weight": torch.ones(2),
            "diffusion_model.blocks.9.self_attn.q.lora_down.weight": torch.ones(2, 8),
            "diffusion_model.blocks.9.self_attn.q.lora_up.weight": torch.ones(6, 2),
            "diffusion_model.blocks.9.self_attn.q.alpha": torch.ones(()),
        }
        plan = plan_merge([lora_of(tensors, "style")], SHAPES)
        assert list(plan.applied) == ["proj_out.bias"] and plan.tensors == 1
        assert plan.untargeted == [
            "style: diffusion_model.blocks.9.self_attn.q.alpha",
            "style: diffusion_model.blocks.9.self_attn.q.lora_down.weight",
            "style: diffusion_model.blocks.9.self_attn.q.lora_up.weight",
            "style: diffusion_model.head.head.reshape_weight",
        ]

    def test_plan_merge_of_lora_without_any_target_is_refused(self) -> None:
        with pytest.raises(WeightsCorrupt, match=r"other\.safetensors: none of its 1 changes .* lora_te1\.bias"):
            plan_merge([lora_of({"lora_te1.diff_b": torch.ones(3)}, "other")], SHAPES)

    @pytest.mark.parametrize(
        "tensors",
        [
            {"head.head.diff": torch.ones(6, 31)},
            {"head.head.diff_b": torch.ones(1)},  # would broadcast
            {"head.head.lora_down.weight": torch.ones(2, 9), "head.head.lora_up.weight": torch.ones(6, 2)},
            {"head.head.lora_down.weight": torch.ones(2, 32), "head.head.lora_up.weight": torch.ones(1, 2)},
            {"head.diff_m": torch.ones(1, 6, 32)},
        ],
    )
    def test_shape_conflict_names_file_key_and_both_shapes(self, tensors: dict[str, Tensor]) -> None:
        with pytest.raises(WeightsCorrupt) as caught:
            plan_merge([lora_of(tensors, "t2v")], SHAPES)
        message = str(caught.value)
        target = "scale_shift_table" if "head.diff_m" in tensors else "proj_out"
        assert "t2v.safetensors" in message and next(iter(tensors)) in message and target in message
        assert message.count("[") == 2

    def test_plan_merge_of_text_to_video_lora_is_refused(self) -> None:
        """Its patch embedding has 16 input channels, this model's has 36."""
        shapes = {"patch_embedding.weight": (8, 36, 1, 2, 2)}
        with pytest.raises(
            WeightsCorrupt, match=r"\[8, 16, 1, 2, 2\], but patch_embedding\.weight has \[8, 36, 1, 2, 2\]"
        ):
            plan_merge([lora_of({"diffusion_model.patch_embedding.diff": torch.ones(8, 16, 1, 2, 2)})], shapes)


class TestMerge:
    def test_merge_param_equals_hand_calculation(self) -> None:
        a = lora_of(
            {
                "diffusion_model.head.head.lora_down.weight": torch.tensor([[1.0, 2.0], [0.0, 1.0]]),
                "diffusion_model.head.head.lora_up.weight": torch.tensor([[1.0, 0.0], [2.0, 4.0]]),
                "diffusion_model.head.head.alpha": torch.tensor(1.0),
                "diffusion_model.head.head.diff_b": torch.tensor([1.0, 2.0]),
                "diffusion_model.head.diff_m": torch.ones(1, 2, 2),
            },
            strength=2.0,
        )
        b = lora_of({"transformer.proj_out.diff": torch.full((2, 2), 10.0)}, strength=-0.5)
        shapes = {"proj_out.weight": (2, 2), "proj_out.bias": (2,), "scale_shift_table": (1, 2, 2)}
        plan = plan_merge([a, b], shapes)
        # 2 * 1/2 * [[1, 2], [2, 8]] - 0.5 * 10
        assert merge_param("proj_out.weight", torch.zeros(2, 2), plan).tolist() == [[-4.0, -3.0], [-3.0, 3.0]]
        assert merge_param("proj_out.bias", torch.tensor([1.0, 1.0]), plan).tolist() == [3.0, 5.0]
        assert merge_param("scale_shift_table", torch.zeros(1, 2, 2), plan).flatten().tolist() == [2.0] * 4

    def test_merge_param_returns_float32_and_keeps_input(self) -> None:
        plan = plan_merge([lora_of({"proj_out.diff": torch.full((2, 2), 2.0**-12)})], {"proj_out.weight": (2, 2)})
        weight = torch.ones(2, 2, dtype=torch.bfloat16).t()  # one bf16 step is 2**-7
        merged = merge_param("proj_out.weight", weight, plan)
        assert merged.dtype == torch.float32 and torch.all(merged == 1 + 2.0**-12)
        assert torch.all(weight == 1)
        other = merge_param("proj_in.weight", weight, plan)
        assert other.dtype == torch.float32 and torch.all(other == 1)

    def test_merge_param_of_weight_with_other_shape_is_refused(self) -> None:
        plan = plan_merge([lora_of({"proj_out.diff": torch.ones(2, 2)})], {"proj_out.weight": (2, 2)})
        with pytest.raises(WeightsCorrupt, match=r"\[2, 2\], but proj_out\.weight has \[4, 2\]"):
            merge_param("proj_out.weight", torch.zeros(4, 2), plan)

    @pytest.mark.parametrize("name", FORMATS)
    def test_lora_merged_before_quantising_is_kept_and_after_is_lost(self, name: str) -> None:
        """A change of 2 % of the weight's norm, a fifth of the quantisation error; measured by its projection on
        itself."""
        fmt, generator = FORMATS[name], torch.Generator().manual_seed(0)
        weight = torch.randn(512, 512, generator=generator) / 20
        down, up = torch.randn(16, 512, generator=generator), torch.randn(512, 16, generator=generator)
        down *= 0.02 * weight.norm() / (up @ down).norm()
        key = "transformer.proj_out"
        plan = plan_merge(
            [lora_of({f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up})], {"proj_out.weight": (512, 512)}
        )

        def through(values: Tensor) -> Tensor:
            return dequantize(quantize(values, fmt, "mse"), fmt)

        def kept(change: Tensor) -> float:
            delta = up @ down
            return float((change * delta).sum() / delta.square().sum())

        plain = through(weight)
        before = through(merge_param("proj_out.weight", weight, plan)) - plain
        after = through(merge_param("proj_out.weight", plain, plan)) - plain
        assert 0.95 <= kept(before) <= 1.05
        assert kept(after) < 0.1


class Model(nn.Module):
    """Parameters of each kind, in four bits, bf16 and float32, some under names of the real model."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.proj_out = FP4Linear.from_linear(nn.Linear(32, 6), FORMATS["g32"])
            self.pose = nn.Linear(8, 32, dtype=torch.bfloat16)
            self.norm = nn.LayerNorm(32)
            self.scale_shift_table = nn.Parameter(torch.randn(1, 2, 32))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.pose(x.bfloat16()).float() + self.scale_shift_table[0, 1])
        return self.proj_out(x)


def loras() -> list[Lora]:
    pairs = {
        "proj_out.lora_A.weight": (4, 32),
        "proj_out.lora_B.weight": (6, 4),
        "proj_out.diff_b": (6,),
        "pose.lora_A.weight": (2, 8),
        "pose.lora_B.weight": (32, 2),
    }
    full = {"norm.diff": (32,), "norm.diff_b": (32,), "scale_shift_table.diff": (1, 2, 32), "proj_out.diff": (6, 32)}
    scaled = random_tensors(pairs, seed=1, size=1.0) | {"proj_out.alpha": torch.tensor(8.0)}
    return [
        lora_of(scaled, "first", 0.8),
        lora_of(random_tensors(full | {"pose.diff_b": (32,)}, seed=2, size=1.0), "second", -1.3),
    ]


@pytest.fixture
def model() -> Iterator[Model]:
    made = Model()
    before = state(made)
    yield made
    detach(made)
    assert all(same_bits(tensor, before[name]) for name, tensor in made.state_dict().items())


class TestAttach:
    def test_attach_gives_same_output_as_merge(self, model: Model) -> None:
        """Compared with the same model in plain weights, merged: its weights start as the layer's dequantised ones."""
        plain = Model()
        linear = nn.Linear(32, 6)
        linear.weight.data = dequantize(model.proj_out.stored, FORMATS["g32"])
        linear.bias.data = state(model)["proj_out.bias"]
        plain.proj_out = linear  # type: ignore[assignment]
        expected_plan = plan_merge(loras(), SHAPES)
        for name, param in plain.named_parameters():
            param.data = merge_param(name, param.data, expected_plan).to(param.dtype)

        x = torch.randn(5, 8, generator=torch.Generator().manual_seed(9))
        assert not torch.allclose(model(x), plain(x), atol=0.1)
        plan = attach(model, loras())
        assert plan.tensors == 6 + 5 and plan.untargeted == []
        torch.testing.assert_close(model(x), plain(x))

    def test_detach_restores_model(self, model: Model) -> None:
        before, x = state(model), torch.ones(2, 8)
        output, references = model(x), {name: param.data_ptr() for name, param in model.named_parameters()}
        for _ in range(3):  # subtracting would drift
            attach(model, loras())
            now = model.state_dict()
            changed = [name for name in before if not same_bits(now[name], before[name])]
            assert sorted(changed) == sorted(SHAPES.keys() - {"proj_out.weight"})
            detach(model)
            assert list(model.state_dict()) == list(before)
            assert all(same_bits(tensor, before[name]) for name, tensor in model.state_dict().items())
        assert model.proj_out.lora_scale is None and torch.equal(model(x), output)
        assert {name: param.data_ptr() for name, param in model.named_parameters()} == references
        detach(model)  # again: nothing to do

    def test_attach_of_next_set_replaces_previous(self, model: Model) -> None:
        x = torch.ones(2, 8)
        attach(model, loras()[1:])
        expected = model(x)
        detach(model)
        attach(model, loras()[:1])
        attach(model, loras()[1:])
        assert torch.equal(model(x), expected)
        attach(model, [])
        assert model.proj_out.lora_scale is None

    def test_attach_of_refused_set_changes_nothing(self, model: Model) -> None:
        before = state(model)
        with pytest.raises(WeightsCorrupt):
            attach(model, [*loras(), lora_of({"norm.diff": torch.ones(9)})])
        assert all(same_bits(tensor, before[name]) for name, tensor in model.state_dict().items())
        assert model.proj_out.lora_scale is None

    @pytest.mark.parametrize("failing", range(7))
    def test_attach_that_fails_halfway_changes_nothing(
        self, model: Model, failing: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The failure is at the first parameter, at the last, or at the layer."""
        before, steps = state(model), iter(range(100))

        def step(*args: Any) -> Any:
            if next(steps) == failing:
                raise KeyboardInterrupt
            return real_merge(*args)

        def set_lora(lora: Any) -> None:
            if lora is not None and next(steps) == failing:
                raise KeyboardInterrupt
            real_set(lora)

        real_merge, real_set = merge_param, model.proj_out.set_lora
        monkeypatch.setattr("runner.quantization.lora.apply.merge_param", step)
        monkeypatch.setattr(model.proj_out, "set_lora", set_lora)
        with pytest.raises(KeyboardInterrupt):
            attach(model, loras())
        assert all(same_bits(tensor, before[name]) for name, tensor in model.state_dict().items())
        assert model.proj_out.lora_scale is None

    def test_attached_block_that_raises_detaches(self, model: Model) -> None:
        before = state(model)

        def job() -> None:
            with attached(model, loras()):
                assert model.proj_out.lora_scale is not None
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            job()
        assert all(same_bits(tensor, before[name]) for name, tensor in model.state_dict().items())
        assert model.proj_out.lora_scale is None

    @pytest.mark.parametrize("name", FORMATS)
    def test_attached_published_pattern_on_4_bit_layers_acts_as_merge(
        self, tiny: nn.Module, published: Path, name: str
    ) -> None:
        """Each layer gives the result of its dequantised weight, merged; afterwards the bits are as before."""
        fmt, model = FORMATS[name], copy.deepcopy(tiny)
        for path, module in tiny.named_modules():
            if type(module) is nn.Linear:
                model.set_submodule(path, FP4Linear.from_linear(module, fmt, "absmax"))
        layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, FP4Linear)}
        before, x = state(model), torch.randn(3, 128, generator=torch.Generator().manual_seed(1))
        outputs = {path: layer(x[:, : layer.in_features]) for path, layer in layers.items()}
        with attached(model, [read_lora(published, 0.9)]) as plan:
            assert plan.untargeted == []
            changed = [path for path, layer in layers.items() if layer.lora_scale is not None]
            assert len(changed) == sum(f"{path}.weight" in plan.applied for path in layers) > 0.8 * len(layers)
            for path, layer in layers.items():
                inputs = x[:, : layer.in_features]
                weight = merge_param(f"{path}.weight", dequantize(layer.stored, fmt), plan)
                assert layer.bias is not None
                bias = merge_param(f"{path}.bias", before[f"{path}.bias"], plan)
                torch.testing.assert_close(layer(inputs), nn.functional.linear(inputs, weight, bias))
        assert list(model.state_dict()) == list(before)
        assert all(same_bits(tensor, before[key]) for key, tensor in model.state_dict().items())
        assert all(torch.equal(layer(x[:, : layer.in_features]), outputs[path]) for path, layer in layers.items())

    def test_attached_published_pattern_on_tiny_model_equals_merge(self, tiny: nn.Module, published: Path) -> None:
        lora, before = read_lora(published, 0.9), state(tiny)
        with attached(tiny, [lora, dataclasses.replace(lora, strength=0.2)]) as plan:
            for name, param in tiny.named_parameters():
                expected = merge_param(name, before[name], plan)
                assert torch.equal(param, expected)
                assert torch.equal(param, before[name]) == (name not in plan.applied)
        assert all(same_bits(tensor, before[name]) for name, tensor in tiny.state_dict().items())
