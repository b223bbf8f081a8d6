"""The demo's training: it computes what the library computes, and what it saves is what the product reads."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch


@pytest.fixture(scope="module")
def pipe():
    from _demo_models import make_pipeline
    from _demo_vae import new_vae

    torch.manual_seed(1)
    return make_pipeline(new_vae().eval().requires_grad_(False), seed=2)


@pytest.fixture(scope="module")
def stock(pipe):
    from _demo_stock import Stock

    made = Stock(pipe, np.random.default_rng(4), 4)
    for _ in range(2):
        made.add()
    return made


def test_training_step_equals_model_forward(pipe, stock) -> None:
    """The shortened prompt and the frozen motion encoder change nothing but the time it takes."""
    from _demo_models import embed_prompts
    from _demo_transformer import Ready, distinct, predict_velocity

    model, text = pipe.transformer, embed_prompts(pipe)[0]
    batch = stock.batch(2, 3)
    sigma, noisy = torch.tensor([0.95, 0.4]), torch.randn_like(batch.clean)
    faces = torch.randn(2, 3, 9, 32, 32)
    batch.motion = torch.stack([model.motion_encoder(f.transpose(0, 1)).T[..., None, None] for f in faces]).detach()
    with torch.no_grad():
        theirs = model(
            hidden_states=torch.cat([noisy, batch.scene], dim=1),
            timestep=1000 * sigma,
            encoder_hidden_states=text.expand(2, -1, -1),
            encoder_hidden_states_image=batch.clip,
            pose_hidden_states=batch.pose,
            face_pixel_values=faces,
            return_dict=False,
        )[0]
        encoder, model.motion_encoder = model.motion_encoder, Ready()
        try:
            short, bias = distinct(text)
            ours = predict_velocity(model, batch, short, bias, noisy, sigma)
        finally:
            model.motion_encoder = encoder
    assert short.shape[1] < 40
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


def test_encode_example_equals_pipeline_encoding(pipe, stock) -> None:
    """A batch's scene and pose are those that AnimatePipeline denoises from."""
    from _demo_stock import FRAMES, HEIGHT, WIDTH, encode_example
    from demo_world import example

    from runner.generation.protocol import SegmentPlan
    from runner.generation.sampling import make_sampler
    from runner.generation.wan_animate.pipeline import AnimatePipeline
    from runner.preprocess.conditions import ConditionFrames
    from runner.spec.options import JobOptions
    from runner.timing import StageTimer

    made = example(np.random.default_rng(6), WIDTH, HEIGHT, 5, 32)
    ours = encode_example(pipe, made)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    class Enough(Exception):
        pass

    class Watched(AnimatePipeline):
        def _denoise(self, job, index, window):
            seen.append((window.scene, window.pose))
            raise Enough

    class Source:
        frames = 5

        def __init__(self) -> None:
            from PIL import Image

            self.reference = Image.fromarray(made.reference)

        def window(self, start, stop):
            return ConditionFrames(made.pose[start:stop], made.face[start:stop])

    names = ("tokenizer", "text_encoder", "vae", "image_processor", "image_encoder", "transformer")
    product = Watched(**{name: getattr(pipe, name) for name in names})
    plan = SegmentPlan(5, 5, 1, 1, WIDTH, HEIGHT, 1, 1, 0.0)
    new_sampler = partial(make_sampler, "euler", "official", 5.0, 1)
    with pytest.raises(Enough):
        list(product.render(Source(), "a", JobOptions(size=f"{WIDTH}x{HEIGHT}"), plan, new_sampler, StageTimer()))
    ((scene, pose),) = seen
    torch.testing.assert_close(ours["scene"][None], scene, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours["pose"][None], pose, atol=1e-4, rtol=1e-4)
    assert FRAMES == 21


def test_trained_lora_attached_by_runner_gives_trained_output(pipe, tmp_path) -> None:
    import copy

    from _demo_distill import attach, published_tensors
    from safetensors.torch import save_file

    from runner.quantization.lora.apply import attach as attach_in_product
    from runner.quantization.lora.apply import read_lora

    plain, trained = copy.deepcopy(pipe.transformer), copy.deepcopy(pipe.transformer)
    layers = attach(trained, rank=4)
    state = {}
    for name, layer in layers.items():
        for part in ("up", "diff_b"):
            getattr(layer, part).data.normal_(std=0.02)
        for part in ("down", "up", "diff_b"):
            getattr(layer, part).data = getattr(layer, part).data.bfloat16().float()
            state[f"{name}.{part}"] = getattr(layer, part).data
    save_file(published_tensors(state), tmp_path / "l.safetensors")
    done = attach_in_product(plain, [read_lora(tmp_path / "l.safetensors")])
    assert not done.untargeted
    assert done.tensors == len(state)
    x = torch.randn(3, 160)
    for place in ("blocks.1.attn1.to_q", "blocks.3.attn2.to_out.0", "blocks.0.ffn.net.0.proj", "proj_out"):
        torch.testing.assert_close(plain.get_submodule(place)(x), trained.get_submodule(place)(x), atol=1e-5, rtol=1e-4)


def test_fast_convolutions_equal_library_convolutions(monkeypatch) -> None:
    from _demo_vae import decode_unclamped, fast_convolutions, new_vae
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d

    torch.manual_seed(0)
    vae, video = new_vae().eval(), torch.rand(1, 3, 9, 16, 24) * 2 - 1
    with torch.no_grad():
        latents = vae.encode(video).latent_dist.mean
        frames = vae.decode(latents).sample
        monkeypatch.setattr(WanCausalConv3d, "forward", WanCausalConv3d.forward)  # put back afterwards
        fast_convolutions()
        torch.testing.assert_close(vae.encode(video).latent_dist.mean, latents, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(decode_unclamped(vae, latents).clamp(-1, 1), frames, atol=1e-5, rtol=1e-4)


def test_train_vae_started_again_resumes_from_checkpoint(tmp_path, monkeypatch, capsys) -> None:
    """A second start continues where the first one ended; the checkpoint contains the statistics of the latents."""
    import _demo_vae

    monkeypatch.setattr(_demo_vae, "fast_convolutions", lambda: None)
    monkeypatch.setattr(_demo_vae, "STOCK", 3)
    monkeypatch.setattr(_demo_vae, "CROP", 16)
    monkeypatch.setattr(_demo_vae, "CLIPS", {5: 1})
    threads = torch.get_num_threads()
    try:
        _demo_vae.train_vae(tmp_path, minutes=1 / 60, clips=1)
        first = torch.load(tmp_path / "vae.pt", weights_only=True)
        assert first["step"] >= 1
        assert len(first["latents_std"]) == 16 and min(first["latents_std"]) > 0
        _demo_vae.train_vae(tmp_path, minutes=2 / 60, clips=1)
        _demo_vae.train_decoder(tmp_path, minutes=0.5 / 60)
    finally:
        torch.set_num_threads(threads)
    second = torch.load(tmp_path / "vae.pt", weights_only=True)
    assert second["step"] > first["step"]
    assert any(not torch.equal(first["model"][k], second["model"][k]) for k in first["model"])
    later = torch.load(tmp_path / "decoder.pt", weights_only=True)
    moved = {k.split(".")[0] for k, kept in second["average"].items() if not torch.equal(later["model"][k], kept)}
    assert moved == {"decoder", "post_quant_conv"}  # latents stay what the transformer learned them to be


def test_optimiser_moves_kernels_in_place_and_resumes() -> None:
    """Muon's matrices share the kernels' memory; a step after resuming equals the step without interruption."""
    import copy

    from _demo_optimiser import Optimiser

    def make():
        torch.manual_seed(3)
        return torch.nn.Sequential(torch.nn.Conv3d(8, 8, 3), torch.nn.Flatten(), torch.nn.Linear(8, 2))

    def step(model, optimiser) -> None:
        optimiser.zero_grad()
        model(torch.arange(432.0).view(2, 8, 3, 3, 3) / 432).square().mean().backward()
        optimiser.step(1e-3)

    model = make()
    optimiser, before = Optimiser(model.parameters()), [p.detach().clone() for p in model.parameters()]
    assert [tuple(m.shape) for m in optimiser.matrices] == [(8, 216)]
    step(model, optimiser)
    assert all((p != old).any() for p, old in zip(model.parameters(), before, strict=True))
    again = make()
    again.load_state_dict(model.state_dict())
    resumed = Optimiser(again.parameters())
    resumed.load_state_dict(copy.deepcopy(optimiser.state_dict()))  # torch's own would share the momentum
    step(model, optimiser)
    step(again, resumed)
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
